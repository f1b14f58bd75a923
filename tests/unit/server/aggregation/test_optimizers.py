"""Server optimisers worked out by hand on 2×2 matrices, for two rounds."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest

from common.sections import PhaseSection
from server.aggregation.optimizers import SECOND, VELOCITY, optimizer_for

START = np.array([[1, 2], [3, 4]], np.float32)
FIRST = np.array([[2, 0], [4, -2]], np.float32)
NEXT = np.array([[2, 2], [0, -2]], np.float32)


def two_steps(**settings: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """θ and moments after each of the two updates, with θ starting at START."""
    optimizer = optimizer_for(PhaseSection(name="p", rounds=2, sample_rate=1.0, **settings))
    adapter, moments, found = {"w": START}, {}, []
    for update in (FIRST, NEXT):
        adapter, moments = optimizer.step(adapter, moments, {"w": update})
        found.append((adapter["w"], {part: arrays["w"] for part, arrays in moments.items() if arrays}))
    return found


def test_heavy_ball_by_hand() -> None:
    (first, moments), (second, later) = two_steps(server_learning_rate=0.5, server_momentum=0.5)
    assert first.tolist() == [[2, 2], [5, 3]]
    assert moments[VELOCITY].tolist() == FIRST.tolist()
    assert later[VELOCITY].tolist() == [[3, 2], [2, -3]]
    assert second.tolist() == [[3.5, 3], [6, 1.5]]


def test_without_momentum_heavy_ball_is_the_mean_and_remembers_nothing() -> None:
    (first, moments), (second, later) = two_steps()
    assert (first.tolist(), second.tolist()) == ([[3, 2], [7, 2]], [[5, 4], [7, 0]])
    assert not moments
    assert not later


ADAPTIVE = {"server_learning_rate": 2.0, "server_momentum": 0.5, "server_second_moment": 0.5, "server_adaptivity": 2.0}


def test_fedadam_by_hand() -> None:
    """τ = 2, so v starts at 4. Round 1: m = Δ/2, v = 2 + Δ²/2. Round 2: m = m/2 + Δ/2, v = v/2 + Δ²/2. η = 2.

    Without bias correction: m is half of Δ in round 1, as in Algorithm 2 of the paper.
    """
    (first, moments), (second, later) = two_steps(server_optimizer="adam", **ADAPTIVE)
    assert moments[VELOCITY].tolist() == [[1, 0], [2, -1]]
    assert moments[SECOND].tolist() == [[4, 2], [10, 4]]
    np.testing.assert_allclose(first, [[1 + 2 / 4, 2], [3 + 4 / (sqrt(10) + 2), 4 - 2 / 4]], rtol=1e-6)
    assert later[VELOCITY].tolist() == [[1.5, 1], [1, -1.5]]
    assert later[SECOND].tolist() == [[4, 3], [5, 4]]
    steps = [[3 / 4, 2 / (sqrt(3) + 2)], [2 / (sqrt(5) + 2), -3 / 4]]
    np.testing.assert_allclose(second, first + np.array(steps), rtol=1e-6)


def test_fedyogi_by_hand() -> None:
    """As FedAdam, but v ← v - Δ²/2 · sign(v - Δ²): 4 stays at Δ² = 4 or 0, and grows to 12 at Δ² = 16."""
    (first, moments), (second, later) = two_steps(server_optimizer="yogi", **ADAPTIVE)
    assert moments[SECOND].tolist() == [[4, 4], [12, 4]]
    np.testing.assert_allclose(first, [[1 + 2 / 4, 2], [3 + 4 / (sqrt(12) + 2), 4 - 2 / 4]], rtol=1e-6)
    assert later[VELOCITY].tolist() == [[1.5, 1], [1, -1.5]]
    assert later[SECOND].tolist() == [[4, 4], [12, 4]]
    steps = [[3 / 4, 2 / 4], [2 / (sqrt(12) + 2), -3 / 4]]
    np.testing.assert_allclose(second, first + np.array(steps), rtol=1e-6)


def test_yogi_forgets_a_large_second_moment_more_slowly_than_adam() -> None:
    """From v = 100 at Δ² = 4, β₂ = 0.5: Adam halves it, Yogi takes off 2."""
    moments = {SECOND: {"w": np.full((2, 2), 100, np.float32)}}
    update = {"w": np.full((2, 2), 2, np.float32)}
    found = {}
    for name in ("adam", "yogi"):
        optimizer = optimizer_for(PhaseSection(name="p", rounds=1, sample_rate=1.0, server_optimizer=name, **ADAPTIVE))
        found[name] = optimizer.step({"w": START}, moments, update)[1][SECOND]["w"][0, 0]
    assert found == {"adam": 52, "yogi": 98}


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi"])
def test_a_tensor_without_an_update_keeps_value_and_moments(name: str) -> None:
    section = PhaseSection(name="p", rounds=1, sample_rate=1.0, server_optimizer=name, **ADAPTIVE)
    optimizer = optimizer_for(section)
    adapter, moments = optimizer.step({"w": START, "u": START}, {}, {"w": FIRST, "u": FIRST})
    after, later = optimizer.step(adapter, moments, {"w": NEXT})
    assert np.array_equal(after["u"], adapter["u"])
    for part, arrays in moments.items():
        assert np.array_equal(later[part]["u"], arrays["u"])
        assert not np.array_equal(later[part]["w"], arrays["w"]) or part == SECOND


@pytest.mark.parametrize("name", ["sgd", "adam", "yogi"])
def test_what_is_given_stays_as_it_is_and_what_comes_back_is_fp32(name: str) -> None:
    section = PhaseSection(name="p", rounds=1, sample_rate=1.0, server_optimizer=name, **ADAPTIVE)
    moments = {part: {"w": np.full((2, 2), 9, np.float32)} for part in (VELOCITY, SECOND)}
    adapter, update = {"w": START.copy()}, {"w": FIRST.copy()}
    after, later = optimizer_for(section).step(adapter, moments, update)
    assert np.array_equal(adapter["w"], START)
    assert np.array_equal(update["w"], FIRST)
    assert all((arrays["w"] == 9).all() for arrays in moments.values())
    assert {array.dtype for arrays in (after, *later.values()) for array in arrays.values()} == {np.dtype(np.float32)}
