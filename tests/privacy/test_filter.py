"""The lifetime limit holds against whoever chooses each step after seeing the releases of all earlier ones.

The adversaries here are exact: mechanisms of a few outcomes, every choice after every outcome, and the true delta added
up over all paths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

from client.privacy.ledger import Decision, Ledger, Population
from common.messages import PhaseStatement, PrivacyStatement
from common.privacy.accounting import ORDERS, Segment, epsilon, filter_epsilon, pld_epsilon, rdp, rdp_epsilon
from common.privacy.renyi import _log_weights
from common.privacy.renyi import filter_epsilon as filter_of

Array = NDArray[np.float64]
ORDER = np.array(ORDERS)
DELTA = 1e-5


def least_epsilon_over_orders(divergences: Array, delta: float = DELTA) -> float:
    """Canonne, Kamath & Steinke 2020, Proposition 12, at the best order: right for what is fixed in advance."""
    return float(np.min(divergences + np.log1p(-1 / ORDER) - (math.log(delta) + np.log(ORDER)) / (ORDER - 1)))


# ------------------------------------------------------------------------------------------------- finite mechanisms


@dataclass(frozen=True)
class Finite:
    """A mechanism of a few outcomes: their probabilities with the unit (P) and without it (Q)."""

    with_unit: tuple[float, ...]
    without: tuple[float, ...]

    @classmethod
    def of(cls, *outcomes: tuple[float, float]) -> Finite:
        """From (probability under P, log P/Q) of all outcomes but one, which takes what is left."""
        p = [probability for probability, _ in outcomes]
        q = [probability * math.exp(-loss) for probability, loss in outcomes]
        return cls((*p, 1 - math.fsum(p)), (*q, 1 - math.fsum(q)))

    def divergences(self) -> Array:
        """The larger of both directions at each order."""
        p, q, a = np.log(self.with_unit), np.log(self.without), ORDER[:, None]
        directions = [logsumexp(a * one + (1 - a) * other, axis=1) / (ORDER - 1) for one, other in ((p, q), (q, p))]
        return np.asarray(np.maximum(*directions))


def delta_of(paths: list[tuple[float, float]], epsilon: float) -> float:
    """The hockey-stick divergence of (P, Q) of all paths."""
    return math.fsum(max(p - math.exp(epsilon) * q, 0.0) for p, q in paths)


def branch(first: Finite, then: Callable[[int], Finite]) -> list[tuple[float, float]]:
    """(P, Q) of all paths where the outcome of the first mechanism decides which one follows."""
    return [
        (first.with_unit[seen] * p, first.without[seen] * q)
        for seen in range(len(first.with_unit))
        for p, q in zip(then(seen).with_unit, then(seen).without, strict=True)
    ]


RARE = Finite.of((0.004, 0.09))
"""A first look that tells next to nothing: its first outcome is a little likelier with the unit."""
JUMP = Finite.of((5.83e-5, 8.775))
"""Almost never says anything, and then more than the limit: tight at high orders."""
PUSH = Finite.of((0.535, 8.51))
"""Often takes the loss right below the limit: tight at low orders."""


def test_letting_the_releases_choose_the_order_would_nearly_double_delta() -> None:
    """Why the limit is not the minimum over orders: each history fits, and the choice between them does not."""
    fixed = [least_epsilon_over_orders(RARE.divergences() + then.divergences()) for then in (JUMP, PUSH)]
    limit = max(fixed)
    for then in (JUMP, PUSH):
        assert delta_of(branch(RARE, lambda seen, then=then: then), limit) <= DELTA, "right for what is fixed"
    adaptive = branch(RARE, lambda seen: PUSH if seen == 0 else JUMP)
    assert delta_of(adaptive, limit) > 1.5 * DELTA


def test_the_filter_bounds_that_same_adversary() -> None:
    limit = max(filter_of(RARE.divergences() + then.divergences(), DELTA) for then in (JUMP, PUSH))
    for chosen in itertools.product((JUMP, PUSH), repeat=2):
        assert delta_of(branch(RARE, lambda seen, chosen=chosen: chosen[seen]), limit) <= DELTA


def random_mechanism(generator: np.random.Generator) -> Finite:
    """Three outcomes: a rare one of high loss, a common one of low loss, and the rest."""
    rare = 10 ** generator.uniform(-6, -2), generator.uniform(0.5, 6)
    common = generator.uniform(0.05, 0.6), generator.uniform(0.01, 0.6)
    return Finite.of(rare, common)


@pytest.mark.parametrize(("seed", "limit"), [(0, 4.0), (1, 6.5), (2, 8.596), (3, 8.64), (4, 9.5)])
def test_no_choice_of_three_steps_after_each_outcome_exceeds_delta(seed: int, limit: float) -> None:
    """The best adaptive adversary, found by going through every choice that the filter allows."""
    generator = np.random.default_rng(seed)
    offers = [*(random_mechanism(generator) for _ in range(3)), RARE, JUMP, PUSH]
    curves = [offer.divergences() for offer in offers]

    @cache
    def allowed(history: tuple[int, ...]) -> bool:
        return filter_of(np.sum([curves[each] for each in history], axis=0), DELTA) <= limit

    def worst(history: tuple[int, ...], p: float, q: float) -> float:
        """The largest delta that can still be reached from here."""
        best = max(p - math.exp(limit) * q, 0.0)
        if len(history) == 3:
            return best
        for index, offer in enumerate(offers):
            grown = tuple(sorted((*history, index)))
            if allowed(grown):
                outcomes = zip(offer.with_unit, offer.without, strict=True)
                best = max(best, math.fsum(worst(grown, p * a, q * b) for a, b in outcomes))
        return best

    reached = worst((), 1.0, 1.0)
    assert any(allowed((index,)) for index in range(len(offers))), "the limit lets something through"
    assert reached <= DELTA


# ----------------------------------------------------------------------------------------------------- the bound itself


def test_the_weights_of_the_orders_are_positive_and_sum_to_one() -> None:
    """They are fixed in advance: what every ledger ever admitted was admitted with these."""
    weights = np.exp(_log_weights())
    assert weights.min() > 0 and math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    assert len(ORDERS) == 202 and list(ORDERS) == sorted(set(ORDERS))
    chosen = {order: float(weights[ORDERS.index(order)]) for order in (1.05, 2.0, 6.0, 64.0, 2048.0)}
    assert chosen == pytest.approx(
        {1.05: 0.01121, 2.0: 0.01004, 6.0: 0.01067, 64.0: 0.00114, 2048.0: 0.00278}, abs=1e-5
    )


HISTORIES = {
    "the default recipe": [Segment(1.0, 12.0, 40), Segment(0.1, 2.0, 40)],
    "small batches": [Segment(0.01, 1.0, 1000)],
    "little noise": [Segment(0.01, 0.6, 100)],
    "no sampling": [Segment(1.0, 20.0, 40)],
    "five plans": [Segment(0.1, 1.5 + k / 10, 40) for k in range(5)],
    "hardly anything": [Segment(0.001, 10.0, 1)],
}


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("segments", HISTORIES.values(), ids=HISTORIES)
def test_it_is_the_least_epsilon_that_satisfies_the_condition(segments: list[Segment], delta: float) -> None:
    """1 - exp(eps - l) <= delta * sum of w(a) exp((a-1)(l - R(a))) for all l: on a grid, and not for a smaller eps."""
    divergences, found = rdp(segments), filter_epsilon(segments, delta)
    losses = found + np.geomspace(1e-6, 60, 20_000)

    def worst(candidate: float) -> float:
        with np.errstate(over="ignore"):
            exponent = _log_weights() + (ORDER - 1) * (losses[:, None] - divergences)
            mixture = np.exp(np.minimum(exponent, 700)).sum(axis=1)
        return float(np.max(-np.expm1(candidate - losses) - delta * mixture))

    assert worst(found) <= 1e-12
    assert worst(found * (1 - 1e-3)) > 0


@pytest.mark.parametrize("segments", HISTORIES.values(), ids=HISTORIES)
def test_it_bounds_what_the_same_segments_cost_when_fixed(segments: list[Segment]) -> None:
    fixed = pld_epsilon(segments, DELTA)
    assert filter_epsilon(segments, DELTA) >= fixed
    if fixed > 0.1:
        assert filter_epsilon(segments, DELTA) <= 1.35 * rdp_epsilon(segments, DELTA), "and is of use"


def test_no_steps_cost_nothing_and_extremes_stay_finite() -> None:
    assert filter_epsilon([], DELTA) == 0.0
    extremes = [Segment(1.0, 1e-6, 10**6), Segment(0.5, 1e-6, 10**12), Segment(1.0, 1e9, 1), Segment(1e-9, 1e9, 1)]
    for segment, delta in itertools.product(extremes, [1e-300, 1e-12, 1e-5, 0.5, 1 - 1e-12]):
        found = filter_epsilon([segment], delta)
        assert math.isfinite(found) and found >= 0
        if segment.sample_rate == 1:
            assert found >= epsilon([segment], delta), "which is exact here"


@given(
    rate=st.one_of(st.just(1.0), st.floats(1e-4, 1.0)),
    sigma=st.floats(0.3, 50.0),
    steps=st.integers(1, 500),
    executed=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_was_executed_costs_at_most_what_was_reserved(
    rate: float, sigma: float, steps: int, executed: float
) -> None:
    """So a limit over what is reserved holds for every way to stop early, skip or refuse."""
    reserved = [Segment(rate, sigma, steps), Segment(0.05, 1.2, 30)]
    part = max(1, round(executed * steps))
    run = [Segment(rate, sigma, part), Segment(0.05, 1.2, max(1, round(executed * 30)))]
    assert (rdp(run) <= rdp(reserved) * (1 + 1e-12)).all()
    assert filter_epsilon(run, DELTA) <= filter_epsilon(reserved, DELTA) + 1e-9


# ----------------------------------------------------------------------------------------------------------- the ledger


def statement(*phases: PhaseStatement) -> PrivacyStatement:
    return PrivacyStatement(8.0, DELTA, "example", "add-remove-one", "prv", sum(p.steps for p in phases), phases)


def test_a_ledger_admits_plans_while_the_filter_over_all_reserved_steps_allows_it(tmp_path: Path) -> None:
    """Plans of unlike kinds in turn; what each phase costs comes from the accountant alone."""
    limit = 4.0
    ledger = Ledger(tmp_path, durable=False)
    ledger.declare(Population("site", "example", 400, limit, DELTA))
    offers: list[tuple[PhaseStatement, ...]] = [
        (PhaseStatement("a", 1.0, 20.0, 1.0, 40), PhaseStatement("b", 0.1, 2.0, 1.0, 40)),
        (PhaseStatement("a", 0.01, 0.8, 1.0, 200),),
        (PhaseStatement("a", 1.0, 9.0, 1.0, 10),),
    ]
    reserved: list[Segment] = []
    decisions = []
    for index in range(12):
        phases = offers[index % 3]
        new = [Segment(each.sample_rate, each.noise_multiplier, each.steps) for each in phases]
        fits = filter_epsilon([*reserved, *new], DELTA) <= limit
        ledger.receive(f"plan-{index}", f"run-{index}", "{}", "site", statement(*phases), None)
        decision = ledger.approve(f"plan-{index}")
        assert (decision is Decision.APPROVED) == fits
        reserved += new if fits else []
        decisions.append(decision)
    assert len(set(decisions)) == 2, "some fitted and some did not"
    assert ledger.reserved("site") == reserved
    ledger.close()


def test_a_history_that_fits_by_the_minimum_over_orders_alone_is_refused(tmp_path: Path) -> None:
    phases = (PhaseStatement("a", 0.1, 2.0, 1.0, 40),)
    segments = [Segment(0.1, 2.0, 40)]
    low, high = rdp_epsilon(segments, DELTA), filter_epsilon(segments, DELTA)
    assert low < high
    for limit, decision in (((low + high) / 2, Decision.REFUSED), (high, Decision.APPROVED)):
        ledger = Ledger(tmp_path / decision, durable=False)
        ledger.declare(replace(Population("site", "example", 400, 1.0, DELTA), lifetime_epsilon=limit))
        ledger.receive("plan", "run", "{}", "site", statement(*phases), None)
        assert ledger.approve("plan") is decision
        ledger.close()


def test_a_plan_without_noise_costs_the_filter_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, durable=False)
    ledger.declare(Population("site", "example", 400, 0.1, DELTA))
    free: Any = replace(statement(PhaseStatement("a", 0.1, 0.0, 1.0, 40)), epsilon=None, delta=None)
    ledger.receive("plan", "run", "{}", "site", free, None)
    assert ledger.approve("plan") is Decision.APPROVED and ledger.reserved("site") == []
    ledger.close()
