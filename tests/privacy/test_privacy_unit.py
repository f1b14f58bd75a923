"""A privacy unit of several examples: drawn, averaged, clipped and accounted for as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from small_sites import (
    SECRET,
    classifier,
    clipped_sum,
    encoded,
    flat,
    names_of,
    plan_for,
    policy_for,
    random_state,
    shown,
    site_for,
    void_gradients,
)

from client.privacy.mechanism import DPSGD
from client.privacy.noisy_sum import SUMS, FloatSum
from client.privacy.sampling import RoundSecret, examples_of
from common.adapted import AdaptedModel
from common.cuts import INPUT
from common.examples import Examples
from common.messages import PhaseStatement, PlanStatus, RefusalReason
from common.sections import PrivacySection
from common.tasks.base import Encoded

SUMMED = PhaseStatement("phase", 1.0, 1e-30, 1.0, 1)
CERTAIN = 1e-4
MANY = 12
UNITS = np.array([0, 1, 1, 2, 2, 2, 3, 0, *[4] * MANY])
"""Eight examples of four units, and a fifth unit of twelve examples at the end."""


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdaptedModel:
    return classifier(tiny_bert)


def summed(
    model: AdaptedModel,
    items: Sequence[Encoded | None],
    units: npt.NDArray[np.int64] | None,
    clip_norm: float = 1.0,
    most: int = 64,
    groups: Sequence[str] = ("head", "A", "B"),
) -> npt.NDArray[np.float64]:
    """The clipped sum of one full-batch step of the real trainer."""
    examples = Examples(items, model.task, units=units)
    names, received = names_of(model, groups), random_state(model)
    return flat(clipped_sum(model, examples, received, names, clip_norm, rows=16, most=most))


# ------------------------------------------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("most", [1, 3, 64])
def test_removing_a_unit_of_many_examples_moves_the_clipped_sum_by_at_most_the_clip_norm(
    model: AdaptedModel, most: int
) -> None:
    items, clip_norm = encoded(model, len(UNITS)), 0.05
    with_unit = summed(model, items, UNITS, clip_norm, most)
    moved = np.linalg.norm(with_unit - summed(model, items[:-MANY], UNITS[:-MANY], clip_norm, most))
    assert 0.98 * clip_norm < moved <= clip_norm * (1 + 1e-5)
    by_example = np.linalg.norm(summed(model, items, None, clip_norm) - summed(model, items[:-MANY], None, clip_norm))
    assert by_example > 2 * clip_norm, "the same examples as units of their own would have moved it by more"


def test_a_unit_contributes_the_mean_gradient_of_its_examples_clipped_once(model: AdaptedModel) -> None:
    items, clip_norm = encoded(model, len(UNITS)), 0.3
    alone = [summed(model, [item], None, clip_norm=1e6) for item in items]
    expected = np.zeros_like(alone[0])
    for unit in range(5):
        mean = np.mean([alone[index] for index in np.flatnonzero(unit == UNITS)], axis=0)
        expected += mean * min(1.0, clip_norm / np.linalg.norm(mean))
    assert np.allclose(summed(model, items, UNITS, clip_norm), expected, rtol=0, atol=2e-5)


def test_units_of_one_example_each_are_the_examples(model: AdaptedModel) -> None:
    items = encoded(model, 10)
    assert np.array_equal(summed(model, items, np.arange(10)), summed(model, items, None))


def test_one_example_that_yields_nan_makes_its_whole_unit_contribute_exactly_zero(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    void_gradients(model, token=5)
    items = encoded(model, len(UNITS))
    broken = items[4]
    assert broken is not None
    items[4] = Encoded(np.where(np.arange(len(broken.ids)) == 1, 5, broken.ids).astype(np.int32), broken.target)
    gone: list[Encoded | None] = [None if unit == 2 else item for item, unit in zip(items, UNITS, strict=True)]
    assert np.array_equal(
        summed(model, items, UNITS, groups=["head", "B"]), summed(model, gone, UNITS, groups=["head", "B"])
    )


def test_one_example_that_fails_makes_its_whole_unit_contribute_exactly_zero(model: AdaptedModel) -> None:
    items = encoded(model, len(UNITS))
    broken = items[4]
    assert broken is not None
    outside = np.where(np.arange(len(broken.ids)) == 1, model.network.config.vocab_size + 7, broken.ids)
    items[4] = Encoded(outside.astype(np.int32), broken.target)
    gone: list[Encoded | None] = [None if unit == 2 else item for item, unit in zip(items, UNITS, strict=True)]
    found, expected = summed(model, items, UNITS), summed(model, gone, UNITS)
    assert np.allclose(found, expected, rtol=0, atol=2e-6)


def test_a_row_of_no_unit_is_never_learnt_from(model: AdaptedModel) -> None:
    items, units = encoded(model, len(UNITS)), UNITS.copy()
    units[[3, 4, 5]] = -1
    left = np.flatnonzero(units >= 0)
    numbers = np.where(units[left] > 2, units[left] - 1, units[left])
    found, expected = (
        summed(model, items, np.where(units > 2, units - 1, units)),
        summed(model, [items[i] for i in left], numbers),
    )
    assert np.allclose(found, expected, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------ batches and sampling


@pytest.mark.parametrize("rows", [12, 16])
def test_no_unit_lies_in_two_batches_and_its_batch_has_the_length_of_its_longest_example(
    model: AdaptedModel, rows: int
) -> None:
    items = encoded(model, len(UNITS))
    examples = Examples(items, model.task, units=UNITS)
    seen: dict[int, int] = {}
    for batch in examples.batches(np.arange(len(items)), rows, model, INPUT):
        slots = batch.slots()
        assert slots is not None and batch.units is not None and batch.inputs.shape[0] == rows
        assert len(np.unique(slots)) == len(np.unique(batch.units)) + rows - len(batch.indices)
        for unit, members in zip(np.unique(batch.units), batch.by_unit(), strict=True):
            assert unit not in seen and sorted(members) == np.flatnonzero(unit == UNITS).tolist()
            seen[unit] = batch.inputs.shape[1]
            assert batch.inputs.shape[1] == examples.bucket[members].max()
            positions = np.flatnonzero(batch.units == unit)
            assert np.allclose(batch.weights[positions].sum(), 1.0)
            assert len({int(slots[position]) for position in positions}) == 1
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_another_units_examples_do_not_change_a_units_gradient_by_a_bit(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(FloatSum):
        """Keeps the gradient of each unit instead of their sum."""

        def add(self, gradients: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
            units.extend(torch.cat([gradient[row] for gradient in gradients]).numpy().tobytes() for row in range(16))

    monkeypatch.setitem(SUMS, "fast", Seen)
    items, seen = encoded(model, len(UNITS)), []
    for change in (0, 1):
        units: list[bytes] = []
        others = [Encoded(np.where(item.ids > 6, item.ids - change, item.ids), item.target) for item in items if item]
        summed(model, [a if unit == 1 else b for a, b, unit in zip(items, others, UNITS, strict=True)], UNITS)
        seen.append(set(units))
    zero, unit = sorted(seen[0] & seen[1], key=lambda gradient: any(gradient))
    assert not any(zero) and any(unit), "all but the unit that stayed and the dummies have changed"


def test_at_most_so_many_examples_of_a_unit_take_part_and_they_are_drawn_afresh() -> None:
    chosen = np.array([0, 2, 4])
    draws = [examples_of(UNITS, chosen, 3, RoundSecret.fixed(0, "north", 1), step) for step in range(2000)]
    counts = np.zeros(len(UNITS))
    for drawn in draws:
        assert drawn.tolist() == sorted(set(drawn)) and set(UNITS[drawn]) == {0, 2, 4}
        assert np.bincount(UNITS[drawn], minlength=5).tolist() == [2, 0, 3, 0, 3]
        counts[drawn] += 1
    assert counts[UNITS == 0].tolist() == [2000, 2000]
    twelve = counts[UNITS == 4]
    low, high = stats.binom.ppf([CERTAIN, 1 - CERTAIN], 2000, 3 / MANY)
    assert low <= twelve.min() and twelve.max() <= high
    assert len({tuple(drawn) for drawn in draws}) > 200


def test_no_unit_or_no_row_is_no_example() -> None:
    nobody = np.array([], np.int64)
    assert len(examples_of(UNITS, nobody, 3, SECRET, 0)) == 0
    assert len(examples_of(nobody, nobody, 3, SECRET, 0)) == 0
    assert len(examples_of(np.array([-1, -1]), nobody, 3, SECRET, 0)) == 0


def test_units_are_drawn_with_the_stated_rate_and_independently(model: AdaptedModel) -> None:
    examples = Examples(encoded(model, len(UNITS)), model.task, units=UNITS)
    mechanism = DPSGD(PhaseStatement("phase", 0.3, 1.0, 1.0, 1), 5, SECRET)
    assert examples.unit_count == 5
    table = np.zeros((4000, 5))
    for step in range(4000):
        table[step, mechanism.sample(examples.unit_count, step)] = 1
    low, high = stats.binom.ppf([CERTAIN, 1 - CERTAIN], 4000, 0.3)
    assert low <= table.sum(axis=0).min() and table.sum(axis=0).max() <= high
    correlations = np.corrcoef(table.T)[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(4000)


# --------------------------------------------------------------------------------------------------- plan and policy


def test_a_site_refuses_a_plan_for_another_unit_and_states_the_unit_it_protects(
    model: AdaptedModel, tmp_path: Path
) -> None:
    policy = policy_for(model, unit="patient")
    site = site_for(tmp_path, model, policy=policy)
    by_patient = plan_for(model, privacy=PrivacySection(epsilon=8.0, unit="patient"))
    by_example = plan_for(model, run_id="other", privacy=PrivacySection(epsilon=8.0, unit="example"))
    statement = site.describe(shown(by_patient)).privacy
    assert statement is not None and statement.unit == "patient"
    refused = site.describe(shown(by_example))
    assert (refused.status, refused.refusal) == (PlanStatus.REFUSED, RefusalReason.POLICY)


def test_a_site_that_demands_secure_noise_refuses_fast_noise(model: AdaptedModel, tmp_path: Path) -> None:
    fast = plan_for(model, privacy=PrivacySection(epsilon=8.0, noise="fast"))
    assert site_for(tmp_path / "a", model).describe(shown(fast)).refusal is RefusalReason.POLICY
    lenient = site_for(tmp_path / "b", model, policy=policy_for(model, secure_noise=False))
    assert lenient.describe(shown(fast)).status is PlanStatus.READY
