"""The accountants over grids of (q, sigma, T, delta): against the exact Gaussian and a second library, always finite,
never with a warning (warnings are errors here), and monotone in every argument.

``tests/unit/common/privacy/test_accounting.py`` has single cases and fifty-digit references; this is their breadth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr

from common.privacy.accounting import Segment, epsilon, filter_epsilon, pld_epsilon, rdp_epsilon
from common.privacy.privacy_loss import EPSILON_ERROR

ACCOUNTANTS = (epsilon, rdp_epsilon, filter_epsilon)
TOLERANCE = 0.02
"""What the stated bound may lie above the second library's figure; the bound adds 0.01 for its own grid."""


def exact_gaussian(mu: float, delta: float) -> float:
    """Balle & Wang 2018, Theorem 8: delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), solved for eps >= 0."""

    def excess(eps: float) -> float:
        above = float(log_ndtr(mu / 2 - eps / mu))
        below = eps + float(log_ndtr(-mu / 2 - eps / mu))
        return above + math.log1p(-math.exp(below - above)) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    highest = mu * (mu / 2 + 9)
    while excess(highest) > 0:
        highest *= 2
    return float(brentq(excess, 0.0, highest, xtol=1e-13, rtol=1e-12))


# ---------------------------------------------------------------------------------------------------- without sampling


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("steps", [1, 15, 60, 1000])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0, 40.0])
def test_without_sampling_epsilon_is_that_of_the_exact_gaussian(sigma: float, steps: int, delta: float) -> None:
    exact = exact_gaussian(math.sqrt(steps) / sigma, delta)
    found = epsilon([Segment(1.0, sigma, steps)], delta)
    assert exact * (1 - 1e-8) - 1e-8 <= found <= exact * (1 + 1e-8) + 1e-8
    for bound in (rdp_epsilon, filter_epsilon):
        assert bound([Segment(1.0, sigma, steps)], delta) >= found


@pytest.mark.parametrize("count", [15, 60])
def test_many_unsampled_segments_of_unlike_noise_are_one_exact_gaussian(count: int) -> None:
    segments = [Segment(1.0, 10.0 + index, 1 + index % 3) for index in range(count)]
    mu = math.sqrt(math.fsum(each.steps / each.noise_multiplier**2 for each in segments))
    assert epsilon(segments, 1e-5) == pytest.approx(exact_gaussian(mu, 1e-5), rel=1e-9)


# ------------------------------------------------------------------------------------------------------- with sampling

SAMPLED = [
    (rate, sigma, steps, delta)
    for index, (rate, sigma, steps) in enumerate(
        itertools.product([1e-4, 1e-2, 0.1, 0.5, 0.95], [0.5, 0.8, 2.0, 10.0], [1, 40, 1000])
    )
    for delta in [(1e-4, 1e-6, 1e-9)[index % 3]]
    if rate * math.sqrt(steps * math.expm1(1 / sigma**2)) < 8  # beyond it epsilon is of no use
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), SAMPLED)
def test_with_sampling_the_bound_lies_just_above_the_second_librarys(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    _just_above([Segment(rate, sigma, steps)], delta)


@pytest.mark.parametrize("delta", [1e-4, 1e-7])
@pytest.mark.parametrize("whole", [(3.0, 1), (30.0, 100)], ids=["one step", "many steps"])
@pytest.mark.parametrize("part", [(0.01, 0.7, 50), (0.2, 2.0, 20), (0.99, 5.0, 3)])
def test_unsampled_and_sampled_phases_together_too(
    part: tuple[float, float, int], whole: tuple[float, int], delta: float
) -> None:
    _just_above([Segment(1.0, *whole), Segment(*part)], delta)


def test_a_plan_of_fifteen_unlike_phases_of_both_kinds_too() -> None:
    segments = [
        Segment(1.0, 40.0 + index, 4) if index % 3 == 0 else Segment(0.02 + index / 100, 3.0 + index / 5, 10)
        for index in range(15)
    ]
    _just_above(segments, 1e-5)


def _just_above(segments: Sequence[Segment], delta: float) -> None:
    found, second = epsilon(segments, delta), pld_epsilon(segments, delta)
    assert -1e-6 <= found - second <= TOLERANCE
    assert found <= rdp_epsilon(segments, delta) + EPSILON_ERROR * 1.1
    assert filter_epsilon(segments, delta) >= second


# ------------------------------------------------------------------------------------------------------------ monotone

STEPS_OF_A_LADDER = {
    "rate": [[Segment(rate, 1.5, 60), Segment(1.0, 20.0, 5)] for rate in (1e-3, 0.03, 0.1, 0.4, 0.9)],
    "steps": [[Segment(0.05, 1.0, steps), Segment(1.0, 20.0, 5)] for steps in (1, 7, 60, 400, 1500)],
    "less noise": [[Segment(0.05, sigma, 60), Segment(1.0, 20.0, 5)] for sigma in (30.0, 5.0, 1.5, 0.8, 0.5)],
    "less noise in the unsampled phase": [
        [Segment(0.05, 1.5, 60), Segment(1.0, sigma, 5)] for sigma in (1e6, 40.0, 9.0, 3.0, 1.0)
    ],
    "unsampled": [[Segment(1.0, sigma, 60)] for sigma in (1e4, 90.0, 20.0, 5.0, 1.0)],
    "one more phase": [[Segment(0.1, 2.0 + k, 10) for k in range(count)] for count in (1, 2, 4, 8)],
}


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("ladder", STEPS_OF_A_LADDER.values(), ids=STEPS_OF_A_LADDER)
def test_more_of_anything_that_costs_costs_more(
    ladder: list[list[Segment]], accountant: Callable[[Sequence[Segment], float], float]
) -> None:
    slack = 1e-4 if accountant is epsilon else 1e-9  # the grid of PRV rounds by about its mesh
    for delta in (1e-4, 1e-8):
        costs = [accountant(segments, delta) for segments in ladder]
        assert all(later >= earlier - slack for earlier, later in itertools.pairwise(costs))
        assert costs[-1] > costs[0] + 0.1


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("segments", [ladder[2] for ladder in STEPS_OF_A_LADDER.values()], ids=STEPS_OF_A_LADDER)
def test_a_larger_delta_never_costs_more(
    segments: list[Segment], accountant: Callable[[Sequence[Segment], float], float]
) -> None:
    costs = [accountant(segments, delta) for delta in (1e-10, 1e-7, 1e-5, 1e-2)]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


# ------------------------------------------------------------------------------------------------------------ extremes


def between(low: float, high: float) -> st.SearchStrategy[float]:
    """Evenly over the logarithm."""
    return st.floats(math.log10(low), math.log10(high)).map(lambda exponent: min(max(10.0**exponent, low), high))


SEGMENTS = st.builds(
    Segment,
    st.one_of(st.just(1.0), between(1e-12, 1.0), st.sampled_from([5e-324, 1e-300, 1 - 1e-16, 1 - 1e-9])),
    between(1e-6, 1e9),
    between(1, 1e9).map(round),
)


@given(segments=st.lists(SEGMENTS, min_size=1, max_size=3), delta=st.one_of(between(1e-300, 0.9), st.just(1 - 1e-15)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_whatever_the_history_the_figures_are_finite_and_ordered(segments: list[Segment], delta: float) -> None:
    stated, planned, lifetime = (accountant(segments, delta) for accountant in ACCOUNTANTS)
    for figure in (stated, planned, lifetime):
        assert math.isfinite(figure) and figure >= 0
    assert stated <= planned * (1 + 1e-9) + EPSILON_ERROR * 1.1


@given(segments=st.lists(SEGMENTS, min_size=1, max_size=2), more=SEGMENTS, delta=between(1e-12, 1e-2))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_further_segment_never_lowers_what_a_site_has_spent(
    segments: list[Segment], more: Segment, delta: float
) -> None:
    before, after = filter_epsilon(segments, delta), filter_epsilon([*segments, more], delta)
    assert after >= before * (1 - 1e-10)


def test_a_delta_next_to_one_is_no_reason_to_fail() -> None:
    """Found by the search above: rounding hid the root of the closed form."""
    for mu, delta in itertools.product([0.1, 1.0, 100.0], [1 - 1e-15, 1 - 1e-9]):
        assert epsilon([Segment(1.0, 1 / mu, 1)], delta) >= exact_gaussian(mu, delta) * (1 - 1e-6)


@pytest.mark.parametrize(("rate", "delta"), [(1e-6, 1 - 1e-15), (1e-6, 1e-5), (3e-7, 1e-5)])
def test_millions_of_steps_whose_losses_are_below_the_mesh_do_not_leave_the_grid(rate: float, delta: float) -> None:
    """Also found by it. The sum of the steps is nearly Gaussian here, with mu^2 = steps * rate^2 * (e - 1)."""
    steps = round(20 / rate)
    mu = rate * math.sqrt(steps * math.expm1(1.0))
    assert epsilon([Segment(rate, 1.0, steps)], delta) >= exact_gaussian(mu, delta)
