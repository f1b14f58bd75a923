"""The weighted mean against numpy's, at the borders of its groups and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from common.sections import PhaseSection
from server.aggregation.mean import BLOCK, GROUP, Sums, WeightedMean

MEAN = WeightedMean(PhaseSection(name="p", rounds=1, sample_rate=1.0))


def updates(count: int, shape: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [{"w": generator.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def mean_of(replies: list[Any], weights: list[float], sums: Sums | None = None) -> dict[str, np.ndarray]:
    folded = sums or MEAN.empty()
    for reply, weight in zip(replies, weights, strict=True):
        folded = MEAN.add(folded, reply, weight)
    return MEAN.close(folded)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP])
@pytest.mark.parametrize("shape", [(), (3,), (BLOCK,), (BLOCK + 1,), (2, BLOCK - 1)])
def test_the_mean_is_numpys_whatever_the_number_of_replies_and_their_shape(count: int, shape: tuple[int, ...]) -> None:
    replies, weights = updates(count, shape), [float(1 + index % 5) for index in range(count)]
    found = mean_of(replies, weights)["w"]
    expected = np.average([reply["w"].astype(np.float64) for reply in replies], axis=0, weights=weights)
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


def test_one_reply_is_its_own_mean_bit_for_bit() -> None:
    (reply,) = updates(1, (4, 5))
    assert np.array_equal(mean_of([reply], [8.0])["w"], reply["w"])


def test_in_double_precision_the_mean_is_rounded_once() -> None:
    replies, weights = updates(40, (1000,)), [0.1 * (1 + index) for index in range(40)]
    folded = Sums()
    found = mean_of(replies, weights, folded)["w"]
    expected = np.average([reply["w"].astype(np.float64) for reply in replies], axis=0, weights=weights)
    assert np.array_equal(found, expected.astype(np.float32))
    np.testing.assert_allclose(folded.totals["w"] / folded.weight, expected, rtol=0, atol=1e-15)


class OnDisk(Mapping[str, np.ndarray]):
    """A reply whose tensor is made anew whenever it is asked for, not writable and not contiguous."""

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads += 1
        array = np.full((3, 4), self.value, np.float32).T
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(["w"])

    def __len__(self) -> int:
        return 1


def test_replies_that_read_from_disk_are_read_once_each() -> None:
    replies = [OnDisk(float(value)) for value in range(2 * GROUP)]
    found = mean_of(replies, [1.0] * len(replies))
    assert np.array_equal(found["w"], np.full((4, 3), (2 * GROUP - 1) / 2, np.float32))
    assert max(reply.reads for reply in replies[1:]) == 1
    assert replies[0].reads == 2  # its shape as well
