"""FedSVD: the change of frame by hand, what is remembered in the new frame, and that plain SGD does not see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.adapter import orthonormal_rows
from common.sections import PhaseSection
from server.aggregation.optimizers import SECOND, VELOCITY
from server.aggregation.registry import aggregator_for

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
State = dict[str, np.ndarray]


def aggregator(algorithm: str = "fedsvd", **settings: Any) -> Any:
    return aggregator_for(PhaseSection(name="p", rounds=9, sample_rate=1.0, algorithm=algorithm, **settings))


def test_a_round_by_hand() -> None:
    """A = I, B = 0 + [[0, 2], [1, 0]]: singular values 2 and 1 with right vectors e₂ and e₁."""
    fedsvd = aggregator()
    state = fedsvd.init({A: np.eye(2, dtype=np.float32), B: np.zeros((2, 2), np.float32)})
    state = fedsvd.accumulate(state, {B: np.array([[0, 2], [1, 0]], np.float32)}, 3.0)
    _, result = fedsvd.finish(state)
    np.testing.assert_allclose(result[A], [[0, 1], [1, 0]], atol=1e-7)
    np.testing.assert_allclose(result[B], [[2, 0], [0, 1]], atol=1e-7)


def test_what_is_remembered_turns_with_b_by_hand() -> None:
    """The frame above swaps the columns of B, so it swaps those of velocity, second moment and average too."""
    update = np.array([[0, 2], [1, 0]], np.float32)
    for settings, part, expected in (
        ({"server_momentum": 0.5}, VELOCITY, [[2, 0], [0, 1]]),
        # τ² = 4, β₂ = 1/2: v = 2 + Δ²/2 = [[2, 4], [2.5, 2]] before the swap
        (
            {"server_optimizer": "adam", "server_adaptivity": 2.0, "server_second_moment": 0.5},
            SECOND,
            [[4, 2], [2, 2.5]],
        ),
        ({"server_average": 0.5}, "average", [[2, 0], [0, 1]]),
    ):
        fedsvd = aggregator(**settings)
        state = fedsvd.init({A: np.eye(2, dtype=np.float32), B: np.zeros((2, 2), np.float32)})
        state, _ = fedsvd.finish(fedsvd.accumulate(state, {B: update}, 1.0))
        np.testing.assert_allclose(fedsvd.save(state)[f"{part}/{B}"], expected, atol=1e-6)


def test_rows_of_a_are_orthonormal_the_product_stays_and_columns_of_b_fall() -> None:
    generator = np.random.default_rng(1)
    start = {A: generator.standard_normal((3, 7)).astype(np.float32), B: np.zeros((5, 3), np.float32)}
    update = generator.standard_normal((5, 3)).astype(np.float32)
    fedsvd = aggregator()
    _, result = fedsvd.finish(fedsvd.accumulate(fedsvd.init(start), {B: update}, 1.0))
    np.testing.assert_allclose(result[A] @ result[A].T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(result[B] @ result[A], update @ start[A], atol=1e-5)
    norms = np.linalg.norm(result[B], axis=0)
    assert (np.diff(norms) < 0).all()
    np.testing.assert_allclose(norms, np.linalg.svd(update @ start[A], compute_uv=False)[:3], rtol=1e-5)


def training(algorithm: str, rounds: int, start: State, **settings: Any) -> list[tuple[State, State]]:
    """(kept, sent) after each round of three sites that take two exact gradient steps on ‖B A - T‖²/2, B alone.

    Each site has another target in each round, so that the frame keeps turning.
    """
    generator, server = np.random.default_rng(10), aggregator(algorithm, **settings)
    state, found = server.init(start), []
    for _ in range(rounds):
        targets = generator.standard_normal((3, 5, 8))
        saved = server.save(state)
        b, a = (saved[f"adapter/{name}"].astype(np.float64) for name in (B, A))
        for weight, target in enumerate(targets, 1):
            local = b.copy()
            for _ in range(2):
                local -= 0.1 * (local @ a - target) @ a.T
            state = server.accumulate(state, {B: (local - b).astype(np.float32)}, float(weight))
        state, kept = server.finish(state)
        saved = server.save(state)
        found.append((kept, {name: saved[f"adapter/{name}"] for name in (A, B)}))
    return found


START: State = {A: orthonormal_rows(3, 8, 0, "a"), B: np.zeros((5, 3), np.float32)}


@pytest.mark.parametrize(
    "settings", [{}, {"server_momentum": 0.9, "server_learning_rate": 0.5}, {"server_average": 0.8}], ids=str
)
def test_under_plain_sgd_fedsvd_is_ffa(settings: dict[str, Any]) -> None:
    ffa = training("ffa", 12, START, **settings)
    fedsvd = training("fedsvd", 12, START, **settings)
    for one, other in zip(ffa, fedsvd, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_allclose(theirs[B] @ theirs[A], mine[B] @ mine[A], atol=2e-5)
    assert np.abs(fedsvd[-1][1][A] - START[A]).max() > 0.1  # the frame did change


def test_where_coordinates_are_treated_one_by_one_fedsvd_is_not_ffa() -> None:
    settings = {"server_optimizer": "adam", "server_learning_rate": 0.05}
    ffa, fedsvd = (training(name, 6, START, **settings)[-1][1] for name in ("ffa", "fedsvd"))
    assert np.abs(fedsvd[B] @ fedsvd[A] - ffa[B] @ ffa[A]).max() > 0.01


def test_the_model_stays_in_the_rows_of_the_first_a() -> None:
    sent = training("fedsvd", 12, START)[-1][1]
    projector = START[A].T @ START[A]
    np.testing.assert_allclose(sent[A] @ projector, sent[A], atol=1e-5)


def test_two_runs_are_bit_identical() -> None:
    settings = {"server_optimizer": "yogi", "server_average": 0.5}
    for one, other in zip(
        training("fedsvd", 4, START, **settings), training("fedsvd", 4, START, **settings), strict=True
    ):
        for mine, theirs in zip(one, other, strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in (A, B))
