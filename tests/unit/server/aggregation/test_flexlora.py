"""FlexLoRA: the mean of products of any rank, cut to the plan's, by hand and by brute force on whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.errors import AdapterError, ConfigError
from common.sections import PhaseSection
from server.aggregation.low_rank import leading
from server.aggregation.registry import aggregator_for

State = dict[str, np.ndarray]
A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "classifier.weight"


def phase(**settings: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "rounds": 2, "sample_rate": 1.0, "algorithm": "flexlora", **settings})


def drawn(rank: int, seed: int, rows: int = 7, columns: int = 6) -> State:
    generator = np.random.default_rng(seed)
    shapes = {A: (rank, columns), B: (rows, rank), HEAD: (3, 5)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def product(state: Any) -> np.ndarray:
    return np.asarray(state[B], np.float64) @ np.asarray(state[A], np.float64)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def fold(state: Any, updates: list[tuple[State, float]]) -> tuple[Any, State]:
    aggregator = aggregator_for(phase())
    for update, weight in updates:
        state = aggregator.accumulate(state, update, weight)
    return aggregator.finish(state)


def start(rank: int = 4) -> State:
    """As before round 1: B is zero."""
    return {**drawn(rank, seed=0), B: np.zeros((7, rank), np.float32)}


def test_two_sites_of_rank_1_by_hand() -> None:
    """Received B = (0, 0)ᵀ, A = (1, 0). One site returns (2, 0)ᵀ (1, 1), the other (0, 4)ᵀ (1, 1), weights 1 and 1.

    The mean of the products is [[1, 1], [2, 2]] = √5·√2 · u vᵀ with u = (1, 2)/√5, v = (1, 1)/√2: rank 1 already.
    FedIT would have (1, 2)ᵀ (1, 1), the same here; with A's of (1, 1) and (1, -1) it would not.
    """
    received = {A: np.array([[1, 0]], np.float32), B: np.zeros((2, 1), np.float32)}
    one = {A: np.array([[0, 1]], np.float32), B: np.array([[2], [0]], np.float32)}
    other = {A: np.array([[0, 1]], np.float32), B: np.array([[0], [4]], np.float32)}
    _, result = fold(aggregator_for(phase()).init(received), [(one, 1.0), (other, 1.0)])
    np.testing.assert_allclose(result[A], np.array([[1, 1]]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(result[B], np.array([[1], [2]]) * np.sqrt(2), atol=1e-6)
    # (2, 0)ᵀ (1, 1) and (0, 4)ᵀ (1, -1), mean [[1, 1], [2, -2]]: orthogonal rows of norm √2 and √8; the second stays.
    other = {A: np.array([[0, -1]], np.float32), B: np.array([[0], [4]], np.float32)}
    _, result = fold(aggregator_for(phase()).init(received), [(one, 1.0), (other, 1.0)])
    np.testing.assert_allclose(np.abs(result[A]), np.array([[1, 1]]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(result[B] @ result[A], [[0, 0], [2, -2]], atol=1e-6)


def test_with_equal_ranks_it_is_the_mean_of_the_sites_products_cut_to_the_rank() -> None:
    received, weights = drawn(3, seed=0), (1.0, 5.0, 2.0)
    updates = [drawn(3, seed) for seed in (1, 2, 3)]
    _, result = fold(aggregator_for(phase()).init(received), list(zip(updates, weights, strict=True)))
    products = [product({name: received[name] + one[name] for name in (A, B)}) for one in updates]
    np.testing.assert_allclose(product(result), best_of_rank(np.average(products, 0, weights), 3), atol=1e-5)


def test_sites_of_unequal_rank_move_the_product_by_the_mean_of_their_changes() -> None:
    """Three rounds; each site starts from the best approximation at its rank, as numpy's SVD of the matrix has it."""
    aggregator = aggregator_for(phase())
    ranks, weights = (4, 2, 1), (1.0, 3.0, 2.0)
    state = aggregator.init(start())
    whole = np.zeros((7, 6))
    for round in range(3):
        adapter = {name.removeprefix("adapter/"): array for name, array in aggregator.save(state).items()}
        changes, updates = [], []
        for site, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
            received, update = leading(adapter, rank), drawn(rank, seed=10 * round + site)
            np.testing.assert_allclose(product(received), best_of_rank(whole, rank), atol=2e-5)
            local = {name: received[name] + update[name] for name in (A, B)}
            changes.append(product(local) - product(received))
            updates.append((update, weight))
        state, result = fold(state, updates)
        whole = best_of_rank(whole + np.average(changes, 0, weights), 4)
        np.testing.assert_allclose(product(result), whole, atol=5e-5)
        np.testing.assert_allclose(result[A] @ result[A].T, np.eye(4), atol=1e-5)


def test_what_a_small_site_does_not_receive_does_not_fade() -> None:
    """Rounds in which nobody changes anything keep every bit, whatever the ranks."""
    aggregator = aggregator_for(phase())
    state, before = fold(aggregator.init(start()), [(drawn(4, seed=1), 1.0)])
    for _ in range(2):
        zeros = [({name: np.zeros_like(array) for name, array in drawn(rank, 2).items()}, 1.0) for rank in (4, 2, 1)]
        state, after = fold(state, zeros)
        assert all(np.array_equal(after[name], before[name]) for name in before)


def test_only_small_sites_answer_and_the_other_directions_stay_open() -> None:
    _, result = fold(aggregator_for(phase()).init(start()), [(drawn(1, seed=1), 1.0)])
    np.testing.assert_allclose(result[A] @ result[A].T, np.eye(4), atol=1e-5)
    assert np.count_nonzero(np.abs(result[B]).max(axis=0) > 1e-6) == 1


def test_the_head_is_averaged_as_ever() -> None:
    _, result = fold(aggregator_for(phase()).init(start()), [(drawn(4, 1), 1.0), (drawn(2, 2), 3.0)])
    mean = (drawn(4, 1)[HEAD].astype(np.float64) + 3 * drawn(2, 2)[HEAD].astype(np.float64)) / 4
    np.testing.assert_allclose(result[HEAD], start()[HEAD] + mean, atol=1e-6)


def test_a_pair_that_no_site_trains_keeps_its_bits() -> None:
    other = {"other.lora_A.weight": drawn(4, 3)[A], "other.lora_B.weight": drawn(4, 3)[B]}
    _, result = fold(aggregator_for(phase()).init({**start(), **other}), [(drawn(2, 1), 1.0)])
    assert all(np.array_equal(result[name], array) for name, array in other.items())


@pytest.mark.parametrize(
    "update",
    [
        drawn(5, 1),
        {**drawn(2, 1), A: drawn(3, 1)[A]},
        {**drawn(2, 1), B: drawn(3, 1)[B]},
        drawn(2, 1, rows=8),
        drawn(2, 1, columns=5),
    ],
    ids=["rank above the plan's", "A of another rank", "B of another rank", "rows", "columns"],
)
def test_an_update_that_fits_at_no_rank_is_refused(update: State) -> None:
    aggregator = aggregator_for(phase())
    with pytest.raises(AdapterError, match=r"^update: "):
        aggregator.accumulate(aggregator.init(start()), update, 1.0)


def test_a_rank_above_a_modules_width_is_refused_before_the_first_round() -> None:
    with pytest.raises(AdapterError, match=r"lora\.r = 7 exceeds the input width 6 of 'layer\.lora_A\.weight'"):
        aggregator_for(phase()).init(drawn(7, 0))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("combine", "median"),
        ("server_optimizer", "adam"),
        ("server_learning_rate", 0.5),
        ("server_momentum", 0.9),
        ("server_average", 0.5),
    ],
)
@pytest.mark.parametrize("algorithm", ["flexlora", "fedex"])
def test_what_would_not_be_the_mean_of_the_products_is_refused(algorithm: str, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^phase\.p\.{setting} = {value!r}: '{algorithm}' .*leave {setting} at"):
        aggregator_for(phase(algorithm=algorithm, **{setting: value}))
