"""The rules that a few hostile sites cannot win: by hand, by brute force, and what the module says of them."""

from __future__ import annotations

import itertools
import statistics
import tracemalloc
from typing import Any

import numpy as np
import pytest

from common.errors import RunFailed
from common.sections import PhaseSection
from server.aggregation import robust
from server.aggregation.base import rule_for
from server.aggregation.registry import aggregator_for
from server.checkpoint import RunFolder

State = dict[str, np.ndarray]
RULES = ("median", "trimmed-mean", "multi-krum")


def phase(rule: str, hostile: int = 1, **settings: Any) -> PhaseSection:
    return PhaseSection(
        **{"name": "p", "rounds": 1, "sample_rate": 1.0, "combine": rule, "hostile_sites": hostile, **settings}
    )


def combined(rule: str, updates: list[State], hostile: int = 1, weights: list[float] | None = None) -> State:
    chosen = rule_for(phase(rule, hostile))
    folded = chosen.empty()
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        folded = chosen.add(folded, update, weight)
    return chosen.close(folded)


def matrices(*values: Any) -> list[State]:
    return [{"x": np.array(value, np.float32)} for value in values]


def drawn(n: int, seed: int = 0) -> list[State]:
    generator = np.random.default_rng(seed)
    shapes = {"a": (3, 7), "b": (5,), "c": ()}
    return [
        {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(n)
    ]


def flat(update: State) -> np.ndarray:
    return np.concatenate([update[name].astype(np.float64).ravel() for name in sorted(update)])


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_the_median_of_each_entry_by_hand() -> None:
    three = matrices([[1, -5], [0, 9]], [[2, 4], [7, 3]], [[100, 0], [1, 4]])
    assert combined("median", three)["x"].tolist() == [[2, 0], [1, 4]]
    four = [*three, *matrices([[3, 2], [-1, 6]])]  # sorted: 1 2 3 100, -5 0 2 4, -1 0 1 7, 3 4 6 9
    assert combined("median", four)["x"].tolist() == [[2.5, 1], [0.5, 5]]


def test_the_trimmed_mean_of_each_entry_by_hand() -> None:
    """f = 1 of five: 1 2 3 4 100 → 3, -9 0 0 6 7 → 2, 1 1 1 1 1 → 1, -8 -6 -4 -2 0 → -4."""
    five = matrices([[1, 7], [1, -2]], [[100, 0], [1, -8]], [[3, -9], [1, 0]], [[2, 0], [1, -4]], [[4, 6], [1, -6]])
    assert combined("trimmed-mean", five)["x"].tolist() == [[3, 2], [1, -4]]
    assert combined("trimmed-mean", five, hostile=2)["x"].tolist() == [[3, 0], [1, -4]]
    assert combined("trimmed-mean", five, hostile=0)["x"].ravel().tolist() == pytest.approx([22, 0.8, 1, -4])


def test_multi_krum_by_hand() -> None:
    """Points 0, 1, 2, 4 and 20 on a line, f = 1: scores are the sums of the two smallest squared distances.

    0: 1 + 4 = 5; 1: 1 + 1 = 2; 2: 1 + 4 = 5 (0, 1 and 4 lie at 4, 1 and 4); 4: 4 + 9 = 13; 20: 256 + 324 = 580. So 20
    is turned away, and the mean of the others is 1.75.
    """
    line = matrices(*([[value, 0], [0, 0]] for value in (4, 20, 0, 2, 1)))
    assert robust.MultiKrum(phase("multi-krum")).chosen(line) == [0, 2, 3, 4]
    assert combined("multi-krum", line)["x"].tolist() == [[1.75, 0], [0, 0]]


# ---- by brute force -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_median_is_that_of_the_standard_library(n: int) -> None:
    updates = drawn(n)
    expected = [statistics.median(values) for values in zip(*map(flat, updates), strict=True)]
    np.testing.assert_allclose(flat(combined("median", updates)), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("n", "hostile"), [(3, 1), (7, 1), (7, 3), (9, 4)])
def test_the_trimmed_mean_is_that_of_scipy(n: int, hostile: int) -> None:
    from scipy.stats import trim_mean

    updates = drawn(n)
    expected = trim_mean(np.stack([flat(update) for update in updates]), hostile / n + 1e-9, axis=0)
    np.testing.assert_allclose(flat(combined("trimmed-mean", updates, hostile)), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("n", "hostile"), [(5, 1), (7, 2), (9, 3), (9, 1), (3, 0)])
def test_multi_krum_is_that_of_the_papers_words(n: int, hostile: int) -> None:
    updates = drawn(n, seed=n)
    points = [flat(update) for update in updates]
    scores = []
    for i in range(n):
        others = sorted(float(np.sum((points[i] - points[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(others[: n - hostile - 2]))
    best = sorted(range(n), key=lambda index: scores[index])[: n - hostile]
    expected = np.mean([points[index] for index in best], axis=0)
    np.testing.assert_allclose(flat(combined("multi-krum", updates, hostile)), expected, rtol=0, atol=1e-7)


def test_distances_are_right_where_all_updates_lie_far_out() -> None:
    """Differences of 1 at a distance of 10,000: inner products about zero would hold them in their last digits."""
    far = np.float32(1e4)
    updates = [{"x": np.full(100_000, far) + np.float32(step)} for step in (0, 1, 3)]
    expected = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) * 1e5
    np.testing.assert_allclose(robust.squared_distances(updates), expected, rtol=1e-9, atol=1e-3)


# ---- every rule -----------------------------------------------------------------------------------------------------


def test_the_order_of_replies_does_not_matter(rule: str) -> None:
    updates = drawn(6)
    expected = combined(rule, updates)
    for order in ((5, 4, 3, 2, 1, 0), (2, 5, 0, 3, 1, 4)):
        other = combined(rule, [updates[index] for index in order])
        if rule == "multi-krum":  # whose sum is rounded in the order it is taken
            np.testing.assert_allclose(flat(other), flat(expected), rtol=0, atol=1e-7)
        else:
            assert all(other[name].tobytes() == expected[name].tobytes() for name in expected)


def test_equal_updates_are_the_result_and_its_form_is_theirs(rule: str) -> None:
    (update,) = drawn(1)
    result = combined(rule, [update] * 5)
    assert {name: (array.shape, array.dtype) for name, array in result.items()} == {
        name: (array.shape, np.dtype(np.float32)) for name, array in update.items()
    }
    assert all(np.array_equal(result[name], update[name]) for name in update)


def test_every_site_has_one_vote_whatever_size_it_declares(rule: str) -> None:
    updates = drawn(5)
    equal, other = (combined(rule, updates, weights=weights) for weights in ([1.0] * 5, [1e9, 1.0, 7.0, 0.5, 3.0]))
    assert all(np.array_equal(equal[name], other[name]) for name in updates[0])


@pytest.mark.parametrize("far", [1e3, -1e6, 1e30])
def test_hostile_updates_up_to_the_number_declared_move_the_result_no_further_than_the_honest_ones_spread(
    rule: str, far: float
) -> None:
    honest = drawn(7)
    hostile = [{name: np.full_like(array, far) for name, array in honest[0].items()} for _ in range(2)]
    points = np.stack([flat(update) for update in honest])
    for places in itertools.islice(itertools.permutations(range(9), 2), 0, 72, 7):
        updates = list(honest)
        for place, update in zip(sorted(places), hostile, strict=True):
            updates.insert(place, update)
        result = flat(combined(rule, updates, hostile=2))
        assert (result >= points.min(axis=0) - 1e-6).all() and (result <= points.max(axis=0) + 1e-6).all()


def test_tensors_larger_than_a_block_come_out_the_same(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [{"x": np.random.default_rng(seed).standard_normal((61, 67)).astype(np.float32)} for seed in range(6)]
    whole = combined(rule, updates)["x"]
    monkeypatch.setattr(robust, "BLOCK", 6 * 301)
    np.testing.assert_allclose(combined(rule, updates)["x"], whole, rtol=0, atol=1e-7)
    for size in (0, 1, 300, 301, 302):
        few = [{"x": update["x"].ravel()[:size]} for update in updates]
        assert combined(rule, few)["x"].shape == (size,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Sixty replies of 32 KiB."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for site in range(60):
        update = np.random.default_rng(site).standard_normal((16, 512)).astype(np.float32)
        folder.store_reply(1, f"s{site}", "d", {"x": update})
    return folder


def test_memory_does_not_grow_with_the_number_of_replies(
    rule: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "BLOCK", 1 << 13)

    def peak(replies: int) -> int:
        chosen = rule_for(phase(rule))
        tracemalloc.start()
        try:
            folded = chosen.empty()
            for site in range(replies):
                folded = chosen.add(folded, folder.reply(1, f"s{site}").parted()[0], 1.0)
            chosen.close(folded)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(60)  # what is imported and cached on the first call
    few, many = peak(6), peak(60)
    assert few > 4 * 16 * 512  # the result is seen
    assert many < few + 60 * 16 * 512 * 4 / 20  # 5 % of what the further replies hold


# ---- too few replies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "hostile", "least"),
    [("median", 4, 1), ("trimmed-mean", 0, 1), ("trimmed-mean", 2, 5), ("multi-krum", 0, 3), ("multi-krum", 2, 7)],
)
def test_a_rule_says_how_many_replies_it_needs_and_refuses_fewer(rule: str, hostile: int, least: int) -> None:
    assert rule_for(phase(rule, hostile)).least == least
    combined(rule, drawn(least), hostile)
    if least > 1:
        message = rf"phase\.p\.hostile_sites = {hostile}: .*{rule}.* needs replies of {least} sites"
        with pytest.raises(RunFailed, match=message):
            combined(rule, drawn(least - 1), hostile)


# ---- what the module says -------------------------------------------------------------------------------------------


def test_a_median_of_noise_has_half_again_the_variance_of_its_mean() -> None:
    """π/2 = 1.571 for many sites; a trimmed mean lies in between."""
    generator = np.random.default_rng(1)
    updates = [{"x": generator.standard_normal(40_000).astype(np.float32)} for _ in range(101)]
    median = float(combined("median", updates)["x"].var()) * 101
    trimmed = float(combined("trimmed-mean", updates, hostile=25)["x"].var()) * 101
    assert median == pytest.approx(np.pi / 2, rel=0.03)
    assert 1.05 < trimmed < median


def test_a_class_that_few_sites_know_is_not_learnt_by_the_median() -> None:
    generator = np.random.default_rng(2)
    updates = [{"x": generator.standard_normal(1000).astype(np.float32)} for _ in range(9)]
    for update in updates[:3]:
        update["x"] += np.float32(30)
    assert combined("trimmed-mean", updates, hostile=0)["x"].mean() == pytest.approx(10, abs=0.2)
    assert combined("median", updates)["x"].mean() < 1


def test_multi_krum_turns_away_the_smallest_sites_and_chooses_who_adds_no_noise() -> None:
    generator = np.random.default_rng(3)
    sigmas = [1.0, 1.0, 1.0, 1.0, 3.0, 4.0, 1.0, 1.0]
    updates = [{"x": (sigma * generator.standard_normal(2000)).astype(np.float32)} for sigma in sigmas]
    updates.append({"x": np.full(2000, 0.2, np.float32)})
    chosen = robust.MultiKrum(phase("multi-krum", hostile=2)).chosen(updates)
    assert chosen == [0, 1, 2, 3, 6, 7, 8]


def test_the_rules_serve_every_algorithm_that_combines_updates(rule: str) -> None:
    for algorithm in ("ffa", "fedit", "fedsvd", "rolora", "la-lora"):
        name = "layer.lora_B.weight"
        start = {name: np.ones((4, 2), np.float32), "layer.lora_A.weight": np.eye(2, 5, dtype=np.float32)}
        aggregator = aggregator_for(phase(rule, algorithm=algorithm))
        state = aggregator.init(start)
        for _ in range(5):
            state = aggregator.accumulate(state, {name: np.full((4, 2), 2.0, np.float32)}, 1.0)
        _, after = aggregator.finish(state)
        product = after[name] @ after["layer.lora_A.weight"]
        np.testing.assert_allclose(product, np.full((4, 2), 3.0) @ np.eye(2, 5), rtol=0, atol=1e-5)
