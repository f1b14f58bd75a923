"""What every aggregation algorithm must keep to, and the numbers of each worked out by hand."""

from __future__ import annotations

import tracemalloc
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load, save

from common.algorithms import LOCAL_RULES
from common.errors import AdapterError, ConfigError
from common.sections import PhaseSection
from server.aggregation.base import Aggregator, create
from server.aggregation.optimizers import OPTIMIZERS
from server.aggregation.registry import aggregator_for, known_aggregators, known_rules

State = dict[str, np.ndarray]

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "classifier.weight"


def phase(algorithm: str, **settings: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "rounds": 2, "sample_rate": 1.0, "algorithm": algorithm, **settings})


def adapter(seed: int = 0) -> State:
    generator = np.random.default_rng(seed)
    shapes = {A: (2, 5), B: (4, 2), HEAD: (3, 5)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def trained(algorithm: str) -> tuple[str, ...]:
    """The tensors a site releases in round 1 of a phase that trains head and LoRA."""
    return (*({"A": A, "B": B}[matrix] for matrix in LOCAL_RULES[algorithm].trains(1)), HEAD)


def update(algorithm: str, seed: int) -> State:
    return {name: array for name, array in adapter(seed).items() if name in trained(algorithm)}


def fold(aggregator: Aggregator[Any], state: Any, updates: list[tuple[State, float]]) -> tuple[Any, State]:
    """One round."""
    for each, weight in updates:
        state = aggregator.accumulate(state, each, weight)
    return aggregator.finish(state)


def assert_equal(left: State, right: State, **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], **{"rtol": 0, "atol": 0, **tolerance})


def function(state: State) -> State:
    """What an adapter does to the model, whatever the frame and rank of its factors."""
    return {"product": state[B].astype(np.float64) @ state[A].astype(np.float64), HEAD: state[HEAD]}


EXACT = ("fedex", "flexlora")
"""Algorithms that take the mean of the products as it is: no server optimiser, no average, no memory."""
SERVERS: dict[str, dict[str, Any]] = {
    "momentum": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "adam": {"server_optimizer": "adam", "server_momentum": 0.9, "server_adaptivity": 0.1},
    "yogi": {"server_optimizer": "yogi", "server_momentum": 0.9, "server_adaptivity": 0.1},
    "average": {"server_momentum": 0.9, "server_average": 0.75},
    "adam-average": {"server_optimizer": "adam", "server_adaptivity": 0.1, "server_average": 0.75},
}
SETUPS = [(name, "mean") for name in EXACT] + [
    (name, server) for name in known_aggregators() if name not in EXACT for server in SERVERS
]


@pytest.fixture(params=SETUPS, ids="-".join)
def settings(request: pytest.FixtureRequest) -> PhaseSection:
    algorithm, server = request.param
    return phase(algorithm, **SERVERS.get(server, {}))


@pytest.fixture
def algorithm(settings: PhaseSection) -> str:
    return settings.algorithm


@pytest.fixture
def aggregator(settings: PhaseSection) -> Aggregator[Any]:
    return aggregator_for(settings)


# ---- every aggregator -----------------------------------------------------------------------------------------------


def test_every_algorithm_has_a_local_side_and_a_servers_side() -> None:
    assert set(known_aggregators()) == set(LOCAL_RULES)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    known = "fedex, fedit, fedsvd, ffa, flexlora, la-lora, rolora"
    with pytest.raises(ConfigError, match=rf"phase\.p\.algorithm = 'xyz': unknown \(known: {known}\)"):
        create(phase("ffa").model_copy(update={"algorithm": "xyz"}))
    with pytest.raises(ConfigError, match=r"phase\.p\.server_optimizer = 'xyz': unknown \(known: adam, sgd, yogi\)"):
        create(phase("ffa").model_copy(update={"server_optimizer": "xyz"}))
    with pytest.raises(ConfigError, match=r"phase\.p\.combine = 'xyz': unknown \(known: .*mean.*\)"):
        create(phase("ffa").model_copy(update={"combine": "xyz"}))


def test_every_setting_of_the_composition_has_its_part() -> None:
    assert set(known_rules()) == set(get_args(PhaseSection.model_fields["combine"].annotation))
    assert set(OPTIMIZERS) == set(get_args(PhaseSection.model_fields["server_optimizer"].annotation))


def test_the_order_of_replies_does_not_matter_beyond_rounding(algorithm: str, aggregator: Aggregator[Any]) -> None:
    updates = [(update(algorithm, seed), weight) for seed, weight in ((1, 40.0), (2, 0.5), (3, 800.0), (4, 12.0))]
    _, forwards = fold(aggregator, aggregator.init(adapter()), updates)
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        _, other = fold(aggregator, aggregator.init(adapter()), [updates[index] for index in order])
        assert_equal(function(other), function(forwards), atol=4e-6)


def test_weights_count_relative_to_each_other_alone(algorithm: str, aggregator: Aggregator[Any]) -> None:
    one, other = update(algorithm, 1), update(algorithm, 2)
    _, small = fold(aggregator, aggregator.init(adapter()), [(one, 1.0), (other, 3.0)])
    _, large = fold(aggregator, aggregator.init(adapter()), [(one, 1000.0), (other, 3000.0)])
    _, repeated = fold(aggregator, aggregator.init(adapter()), [(one, 1.0)] + [(other, 1.0)] * 3)
    assert_equal(function(large), function(small), atol=4e-6)
    assert_equal(function(repeated), function(small), atol=4e-6)


def test_updates_of_zero_change_nothing_bit_for_bit(algorithm: str, aggregator: Aggregator[Any]) -> None:
    zeros = {name: np.zeros_like(array) for name, array in update(algorithm, 1).items()}
    state = aggregator.init(adapter())
    for _ in range(3):
        state, result = fold(aggregator, state, [(zeros, 1.0), (zeros, 7.0)])
        assert_equal(result, adapter())
        assert_equal(sent(aggregator, state), adapter())


def test_tensors_that_are_not_trained_stay_bit_for_bit(algorithm: str, aggregator: Aggregator[Any]) -> None:
    only_head = {HEAD: update(algorithm, 1)[HEAD]}
    _, result = fold(aggregator, aggregator.init(adapter()), [(only_head, 2.0)])
    assert_equal({name: result[name] for name in (A, B)}, {name: adapter()[name] for name in (A, B)})
    assert not np.array_equal(result[HEAD], adapter()[HEAD])


def test_neither_a_rounds_first_state_nor_updates_are_changed_in_place(
    algorithm: str, aggregator: Aggregator[Any]
) -> None:
    start, one = adapter(), update(algorithm, 1)
    first = aggregator.init(start)
    second, _ = fold(aggregator, first, [(update(algorithm, 3), 1.0)])
    for before in (first, second):
        saved = {name: array.copy() for name, array in aggregator.save(before).items()}
        fold(aggregator, before, [(one, 1.0), (update(algorithm, 2), 1.0)])
        assert_equal(aggregator.save(before), saved)
    assert_equal(start, adapter())
    assert_equal(one, update(algorithm, 1))


def test_the_result_is_fp32_in_the_layout_of_the_adapter(algorithm: str, aggregator: Aggregator[Any]) -> None:
    state, result = fold(aggregator, aggregator.init(adapter()), [(update(algorithm, 1), 1.0)])
    expected = {name: (array.shape, np.dtype(np.float32)) for name, array in adapter().items()}
    for tensors in (result, sent(aggregator, state)):
        assert {name: (array.shape, array.dtype) for name, array in tensors.items()} == expected


def sent(aggregator: Aggregator[Any], state: Any) -> State:
    """The adapter that the next request carries."""
    saved = aggregator.save(state)
    return {name.removeprefix("adapter/"): saved[name] for name in saved if name.startswith("adapter/")}


def test_a_state_saved_between_two_rounds_goes_on_bit_for_bit(
    algorithm: str, aggregator: Aggregator[Any], settings: PhaseSection
) -> None:
    state, _ = fold(aggregator, aggregator.init(adapter()), [(update(algorithm, 1), 1.0)])
    saved = aggregator.save(state)
    assert all(isinstance(array, np.ndarray) for array in saved.values())
    again = aggregator_for(settings)
    stored = load(save({name: np.ascontiguousarray(array) for name, array in saved.items()}))  # as a checkpoint does
    following = [(update(algorithm, 2), 2.0), (update(algorithm, 3), 1.0)]
    after, expected = fold(aggregator, state, following)
    resumed_after, resumed = fold(again, again.load(stored), following)
    assert_equal(resumed, expected)
    assert_equal(again.save(resumed_after), aggregator.save(after))
    if algorithm not in EXACT:
        fresh = aggregator.init({name: saved[f"adapter/{name}"] for name in adapter()})
        _, without_memory = fold(aggregator, fresh, following)
        assert not np.array_equal(without_memory[HEAD], expected[HEAD])  # moments and average are part of what is saved


@pytest.mark.parametrize("what", ["unknown", "shape", "missing-later"])
def test_an_update_of_another_layout_is_refused_and_leaves_the_state_as_it_was(
    algorithm: str, aggregator: Aggregator[Any], what: str
) -> None:
    good = update(algorithm, 1)
    wrong = {
        "unknown": {**good, "other.weight": np.zeros(3, np.float32)},
        "shape": {**good, HEAD: good[HEAD].T},
        "missing-later": {HEAD: good[HEAD]},
    }[what]
    state = aggregator.accumulate(aggregator.init(adapter()), good, 1.0)
    with pytest.raises(AdapterError, match=r"^update: "):
        aggregator.accumulate(state, wrong, 1.0)
    _, expected = fold(aggregator, aggregator.init(adapter()), [(good, 1.0)])
    assert_equal(aggregator.finish(state)[1], expected)


def test_memory_does_not_grow_with_the_number_of_replies(algorithm: str, aggregator: Aggregator[Any]) -> None:
    start = {
        A: np.zeros((8, 4096), np.float32),
        B: np.zeros((4096, 8), np.float32),
        HEAD: np.zeros((9, 64), np.float32),
    }
    one = {name: array for name, array in start.items() if name in trained(algorithm)}

    def peak(replies: int) -> int:
        """Of a whole round, whose replies are all the same."""
        state = aggregator.init(start)
        tracemalloc.start()
        try:
            fold(aggregator, state, [(one, 1.0)] * replies)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(20), peak(100)
    assert few > 8 * one[B].size  # the sum itself is seen
    assert many < 1.05 * few


def test_a_sum_of_many_small_updates_does_not_lose_digits(algorithm: str) -> None:
    """10,000 updates of 1e-4 beside one of 1: in fp32 the small ones would be rounded by 6e-8 each."""
    mean = aggregator_for(phase(algorithm))
    state = mean.accumulate(mean.init({HEAD: np.zeros(1, np.float32)}), {HEAD: np.ones(1, np.float32)}, 1.0)
    for _ in range(10_000):
        state = mean.accumulate(state, {HEAD: np.full(1, 1e-4, np.float32)}, 1.0)
    assert mean.finish(state)[1][HEAD][0] == pytest.approx(2.0 / 10_001, rel=1e-6)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_the_weighted_mean_with_momentum_by_hand() -> None:
    """θ₀ = [[1, 2], [3, 4]], weights 1 and 3, η = 0.5, β = 0.5.

    Round 1: Δ = ([[4, 0], [0, 0]] + 3·[[0, 4], [0, 4]]) / 4 = [[1, 3], [0, 3]], v = Δ, θ = θ₀ + v/2.
    Round 2: Δ = [[1, 1], [1, 1]], v = v/2 + Δ = [[1.5, 2.5], [1, 2.5]], θ = θ + v/2.
    """
    for algorithm in ("fedit", "ffa", "rolora", "la-lora"):
        aggregator = aggregator_for(phase(algorithm, server_learning_rate=0.5, server_momentum=0.5))
        state = aggregator.init({B: np.array([[1, 2], [3, 4]], np.float32)})
        first = [(np.array([[4, 0], [0, 0]], np.float32), 1.0), (np.array([[0, 4], [0, 4]], np.float32), 3.0)]
        state, result = fold(aggregator, state, [({B: array}, weight) for array, weight in first])
        assert result[B].tolist() == [[1.5, 3.5], [3.0, 5.5]]
        state, result = fold(aggregator, state, [({B: np.ones((2, 2), np.float32)}, 5.0)])
        assert result[B].tolist() == [[2.25, 4.75], [3.5, 6.75]]


def test_without_momentum_a_round_leaves_no_trace_but_the_adapter() -> None:
    aggregator = aggregator_for(phase("ffa"))
    state, result = fold(aggregator, aggregator.init(adapter()), [(update("ffa", 1), 1.0)])
    assert_equal(aggregator.save(state), {f"adapter/{name}": array for name, array in result.items()})


def test_fedit_averages_a_and_b_each_on_its_own_by_hand() -> None:
    """Sites (B, A) = (1, 1) and (3, 2): the means' product is 2 · 1.5 = 3, not the products' mean (1 + 6) / 2 = 3.5."""
    aggregator = aggregator_for(phase("fedit"))
    zero = {A: np.zeros((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}
    sites = [{B: np.full((1, 1), b, np.float32), A: np.full((1, 1), a, np.float32)} for b, a in ((1, 1), (3, 2))]
    _, result = fold(aggregator, aggregator.init(zero), [(site, 1.0) for site in sites])
    assert (result[B].item(), result[A].item()) == (2.0, 1.5)
    _, result = fold(aggregator, aggregator.init(zero), list(zip(sites, (3.0, 1.0), strict=True)))
    assert (result[B].item(), result[A].item()) == (1.5, 1.25)


def test_in_ffa_the_mean_of_b_times_a_is_the_mean_of_the_products() -> None:
    aggregator = aggregator_for(phase("ffa"))
    start, weights = adapter(), (1.0, 4.0, 2.0)
    updates = [update("ffa", seed) for seed in (1, 2, 3)]
    _, result = fold(aggregator, aggregator.init(start), list(zip(updates, weights, strict=True)))
    products = [(start[B] + each[B]).astype(np.float64) @ start[A].astype(np.float64) for each in updates]
    expected = np.average(products, axis=0, weights=weights)
    np.testing.assert_allclose(result[B].astype(np.float64) @ result[A].astype(np.float64), expected, atol=1e-6)
    assert np.array_equal(result[A], start[A])


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
def test_where_a_is_frozen_at_the_sites_an_update_of_it_is_refused(algorithm: str) -> None:
    aggregator = aggregator_for(phase(algorithm))
    with pytest.raises(AdapterError, match=rf"'layer\.lora_A\.weight' is frozen in {algorithm}"):
        aggregator.accumulate(aggregator.init(adapter()), update("fedit", 1), 1.0)


def test_in_rolora_the_mean_of_one_matrix_is_the_mean_of_the_products_in_each_round() -> None:
    aggregator = aggregator_for(phase("rolora"))
    state, weights = aggregator.init(adapter()), (1.0, 4.0, 2.0)
    for round, moved in ((1, B), (2, A), (3, B)):
        before = {name: array.astype(np.float64) for name, array in sent(aggregator, state).items()}
        updates = [{moved: adapter(10 * round + site)[moved]} for site in range(3)]
        state, result = fold(aggregator, state, list(zip(updates, weights, strict=True)))
        local = [{**before, moved: before[moved] + each[moved]} for each in updates]
        expected = np.average([site[B] @ site[A] for site in local], axis=0, weights=weights)
        np.testing.assert_allclose(function(result)["product"], expected, atol=1e-5)
        other = {A: B, B: A}[moved]
        assert np.array_equal(result[other], before[other])


def test_in_rolora_a_reply_with_both_matrices_is_refused() -> None:
    aggregator = aggregator_for(phase("rolora"))
    with pytest.raises(AdapterError, match=r"^update: both A and B; in rolora a round trains one of them"):
        aggregator.accumulate(aggregator.init(adapter()), update("fedit", 1), 1.0)
