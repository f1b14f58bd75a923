"""The accountants against each other, against second libraries and against integrals taken by brute force."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.privacy.accounting as accounting
from common.errors import PrivacyError
from common.privacy.accounting import (
    CALIBRATION_TOLERANCE,
    ORDERS,
    PhaseLoad,
    Segment,
    calibrate,
    default_delta,
    epsilon,
    pld_epsilon,
    rdp,
    rdp_epsilon,
)
from common.privacy.privacy_loss import EPSILON_ERROR, prv_epsilon
from common.privacy.renyi import MergedSegment

MIXTURES = (
    (Segment(1.0, 20.0, 40), Segment(0.1, 2.0, 40)),
    (Segment(1.0, 8.0, 10), Segment(0.02, 1.0, 300)),
    (Segment(1.0, 30.0, 40), Segment(0.1, 2.0, 40), Segment(0.05, 1.5, 200)),
    (Segment(0.5, 10.0, 30), Segment(0.001, 0.7, 1000)),
)


def plan_of(phases: list[PhaseLoad], noise: tuple[float, ...]) -> list[Segment]:
    return [Segment(phase.sample_rate, sigma, phase.steps) for phase, sigma in zip(phases, noise, strict=True)]


# ------------------------------------------------------------------------------------------ against second libraries


def test_the_row_of_the_common_example_is_reproduced() -> None:
    segments = [Segment(0.01, 1.0, 1000)]
    assert epsilon(segments, 1e-5) == pytest.approx(1.838, abs=5e-4)
    assert pld_epsilon(segments, 1e-5) == pytest.approx(1.828, abs=5e-4)
    assert rdp_epsilon(segments, 1e-5) == pytest.approx(2.101, abs=1e-2)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta"),
    [
        (0.001, 0.6, 1000, 1e-6),
        (0.01, 0.5, 10, 1e-5),
        (0.01, 0.8, 1, 1e-2),
        (0.01, 2.0, 20000, 1e-6),
        (0.05, 0.4, 20, 1e-5),
        (0.1, 2.0, 40, 1e-5),
        (0.1, 20.0, 10, 1e-8),
        (0.3, 50.0, 10, 1e-5),
        (0.5, 3.0, 20, 1e-9),
        (0.9, 1.0, 3, 1e-5),
        (0.999999, 0.8, 2, 1e-5),
        (1.0, 5.0, 30, 1e-5),
        (1.0, 0.8, 1, 1e-8),
    ],
)
def test_prv_bounds_both_directions_of_pld_from_above_by_at_most_0_02(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    segments = [Segment(rate, sigma, steps)]
    # dp-accounting reports the larger of the directions add and remove.
    assert -1e-6 <= epsilon(segments, delta) - pld_epsilon(segments, delta) <= 0.02


@pytest.mark.parametrize("segments", MIXTURES)
def test_prv_of_mixtures_bounds_pld_from_above_by_at_most_0_02(segments: tuple[Segment, ...]) -> None:
    assert -1e-6 <= epsilon(segments, 1e-5) - pld_epsilon(segments, 1e-5) <= 0.02


def test_prv_is_the_figure_of_the_stock_opacus_accountant() -> None:
    from opacus.accountants import PRVAccountant

    for rate, sigma, steps in [(0.01, 1.0, 1000), (0.2, 2.0, 50), (0.5, 4.0, 10)]:
        stock = PRVAccountant()
        stock.history = [(sigma, rate, steps)]
        assert epsilon([Segment(rate, sigma, steps)], 1e-5) == pytest.approx(stock.get_epsilon(1e-5), abs=1e-4)


def test_a_mixture_with_negligible_sampled_part_costs_the_gaussian_part_plus_the_error_bound() -> None:
    gaussian = Segment(1.0, 2.0, 3)
    alone = epsilon([gaussian], 1e-5)
    assert alone + 0.0099 <= epsilon([gaussian, Segment(1e-6, 100.0, 1)], 1e-5) <= alone + 0.011


def test_gaussian_dp_would_have_claimed_less_than_is_spent() -> None:
    mu = 0.01 * math.sqrt(1000 * math.expm1(1.0))  # q * sqrt(T * (exp(1/sigma^2) - 1))
    claimed = epsilon([Segment(1.0, 1 / mu, 1)], 1e-5)
    assert claimed < pld_epsilon([Segment(0.01, 1.0, 1000)], 1e-5) - 0.1


# ------------------------------------------------------------------------------------------ the Gaussian mechanism


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10])
@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (1.0, 1), (2.0, 3), (20.0, 40), (50.0, 4)])
def test_gaussian_epsilon_solves_the_hockey_stick_integral(sigma: float, steps: int, delta: float) -> None:
    """delta(eps) is the integral of (p - e^eps q)_+ with p = N(mu, 1), q = N(0, 1); its edge is eps/mu + mu/2."""
    mu = math.sqrt(steps) / sigma
    found = epsilon([Segment(1.0, sigma, steps)], delta)
    if found == 0:
        assert math.erf(mu / math.sqrt(8)) <= delta
        return
    x = np.linspace(found / mu + mu / 2, mu + 42, 400_001)
    gap = np.exp(-((x - mu) ** 2) / 2) - np.exp(found - x**2 / 2)
    brute = np.trapezoid(gap, x) / math.sqrt(2 * math.pi)
    assert brute == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 3.0, 100.0, 1e5])
@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-30])
def test_gaussian_epsilon_agrees_with_fifty_digits(mu: float, delta: float) -> None:
    found = epsilon([Segment(1.0, 1 / mu, 1)], delta)
    with mpmath.workdps(50):
        m = 1 / mpmath.mpf(1 / mu)  # of the rounded sigma
        if mpmath.erf(m / mpmath.sqrt(8)) <= delta:
            assert found == 0
            return

        def excess(eps: float) -> float:
            exact = mpmath.mpf(eps)
            upper = mpmath.ncdf(m / 2 - exact / m) - mpmath.exp(exact) * mpmath.ncdf(-m / 2 - exact / m)
            return float(upper / delta - 1)

        width = 1e-9 * max(found, mu)
        assert excess(found) <= 0 < excess(found - width)


def test_unsampled_steps_are_one_gaussian_with_less_noise() -> None:
    assert epsilon([Segment(1.0, 10.0, 25)], 1e-5) == pytest.approx(epsilon([Segment(1.0, 2.0, 1)], 1e-5), rel=1e-12)
    # 1/4 + 3/36 = 1/3: precisions add up
    both = [Segment(1.0, 2.0, 1), Segment(1.0, 6.0, 3)]
    assert epsilon(both, 1e-5) == pytest.approx(epsilon([Segment(1.0, math.sqrt(3), 1)], 1e-5), rel=1e-12)


# ------------------------------------------------------------------------------------------ Rényi


@pytest.mark.parametrize(
    ("rate", "sigma"),
    [(0.01, 1.0), (0.1, 0.5), (0.5, 3.0), (1e-6, 10.0), (0.999, 1.0), (1e-3, 0.3), (0.4, 0.15), (2e-3, 5.0)],
)
def test_renyi_divergence_is_its_defining_integral(rate: float, sigma: float) -> None:
    found = rdp([Segment(rate, sigma, 1)])
    with mpmath.workdps(30):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)
        kink = s * s * mpmath.log((1 - q) / q) + 0.5
        for order in (1.05, 1.5, 2.0, 3.3, 9.2):

            def integrand(x: mpmath.mpf, order: float = order) -> mpmath.mpf:
                return mpmath.npdf(x, 0, s) * (1 - q + q * mpmath.exp((x - 0.5) / s**2)) ** order

            inner = sorted({p for p in (0, kink, order / 2, order) if -20 * s < p < order + 20 * s})
            moment = mpmath.quad(integrand, [-20 * s, *inner, order + 20 * s])
            expected = mpmath.log(moment) / (mpmath.mpf(order) - 1)
            assert found[ORDERS.index(order)] == pytest.approx(float(expected), rel=1e-7), order


def test_renyi_divergence_without_sampling_is_linear_in_the_order() -> None:
    assert rdp([Segment(1.0, 2.0, 6)]) == pytest.approx(np.array(ORDERS) * 6 / 8)
    assert list(rdp([], orders=(2.0, 3.0))) == [0.0, 0.0]


def test_renyi_divergences_of_segments_add_up() -> None:
    first, second = [Segment(0.1, 1.0, 7)], [Segment(0.02, 0.8, 30), Segment(1.0, 9.0, 2)]
    assert rdp(first + second) == pytest.approx(rdp(first) + rdp(second), rel=1e-12)


def test_renyi_epsilon_over_the_fixed_orders_is_within_two_percent_of_that_over_all() -> None:
    dense = np.concatenate([np.arange(1.02, 12, 0.02), np.arange(12, 600)])
    for segment, delta in [
        (Segment(0.01, 1.0, 1000), 1e-5),
        (Segment(0.1, 2.0, 40), 1e-5),
        (Segment(0.001, 0.5, 100), 1e-6),
        (Segment(1.0, 0.5, 1), 1e-5),
        (Segment(1.0, 40.0, 10), 1e-8),
    ]:
        divergence = rdp([segment], orders=tuple(dense))
        bound = divergence + np.log1p(-1 / dense) - np.log(delta * dense) / (dense - 1)
        assert bound.min() * (1 - 1e-9) - 1e-9 <= rdp_epsilon([segment], delta) <= 1.02 * bound.min()


@pytest.mark.parametrize("segments", MIXTURES)
def test_the_renyi_bound_is_above_pld(segments: tuple[Segment, ...]) -> None:
    assert rdp_epsilon(segments, 1e-5) > pld_epsilon(segments, 1e-5)


# ------------------------------------------------------------------------------------------ how epsilon behaves


def test_no_release_costs_nothing() -> None:
    assert epsilon([], 1e-5) == pld_epsilon([], 1e-5) == rdp_epsilon([], 1e-5) == 0.0


@given(order=st.permutations(range(4)), split=st.integers(1, 39))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_neither_order_nor_splitting_changes_epsilon(order: list[int], split: int) -> None:
    whole = [Segment(0.1, 2.0, 40), Segment(1.0, 20.0, 40), Segment(0.05, 1.5, 20)]
    parts = [Segment(0.1, 2.0, split), Segment(1.0, 20.0, 40), Segment(0.05, 1.5, 20), Segment(0.1, 2.0, 40 - split)]
    assert epsilon([parts[index] for index in order], 1e-5) == epsilon(whole, 1e-5)
    assert rdp_epsilon([parts[index] for index in order], 1e-5) == rdp_epsilon(whole, 1e-5)


def test_equal_questions_are_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(merged: object, delta: float) -> float:
        calls.append(merged)
        return 1.0

    monkeypatch.setattr(accounting, "prv_epsilon", count)
    accounting._epsilon.cache_clear()
    for steps in ([5, 6], [6, 5], [11]):
        epsilon([Segment(0.123, 4.5, each) for each in steps], 1e-5)
    accounting._epsilon.cache_clear()
    assert len(calls) == 1


@given(
    rate=st.floats(1e-3, 1.0),
    sigma=st.floats(0.7, 20.0),
    steps=st.integers(1, 200),
    factor=st.floats(1.05, 3.0),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_epsilon_falls_with_noise_and_delta_and_rises_with_rate_and_steps(
    rate: float, sigma: float, steps: int, factor: float
) -> None:
    for accountant in (epsilon, rdp_epsilon):
        base = accountant([Segment(rate, sigma, steps)], 1e-6)
        # The estimate behind the bound carries rounding errors of its grid, of the size of the mesh.
        slack = 1e-4
        assert accountant([Segment(rate, sigma * factor, steps)], 1e-6) <= base + slack
        assert accountant([Segment(rate, sigma, steps)], 1e-6 * factor) <= base + slack
        # At q = 1 the closed form takes over from the grid, whose bound lies 0.01 higher.
        jump = EPSILON_ERROR * 1.2 if accountant is epsilon and rate < 1 <= rate * factor else 0.0
        assert accountant([Segment(min(1.0, rate * factor), sigma, steps)], 1e-6) >= base - slack - jump
        assert accountant([Segment(rate, sigma, steps + 10)], 1e-6) >= base - slack


@pytest.mark.parametrize(
    ("segments", "delta"),
    [
        ([Segment(0.5, 1e-6, 1)], 1e-5),
        ([Segment(1.0, 1e-6, 10**6)], 1e-5),
        ([Segment(0.5, 0.02, 4), Segment(1.0, 0.01, 4)], 1e-5),
        ([Segment(0.05, 0.3, 400)], 1e-5),
        ([Segment(0.5, 1e9, 10)], 1e-5),
        ([Segment(1e-300, 1.0, 10)], 1e-5),
        ([Segment(1 - 1e-16, 1.0, 10)], 1e-5),
        ([Segment(0.3, 5.0, 1000)], 1e-14),
        ([Segment(0.3, 5.0, 10)], 1e-300),
        ([Segment(1.0, 5.0, 10)], 1e-300),
        ([Segment(0.3, 5.0, 10)], 1 - 1e-12),
        ([Segment(1e-4, 1.0, 10**12)], 1e-5),
        ([Segment(1.0, 0.1, 4), Segment(0.9, 0.1, 1)], 1e-5),
        ([Segment(1.0, 1e9, 1)], 1e-5),
    ],
)
def test_extreme_histories_have_a_finite_epsilon_without_a_warning(segments: list[Segment], delta: float) -> None:
    found = epsilon(segments, delta)
    assert math.isfinite(found)
    assert 0 <= found <= rdp_epsilon(segments, delta) * (1 + 1e-9) + EPSILON_ERROR * 1.1


def test_losses_far_beyond_every_useful_epsilon_are_still_bounded_tightly() -> None:
    segments = [Segment(1.0, 0.2, 4), Segment(0.9, 0.5, 1)]
    assert 50 < pld_epsilon(segments, 1e-5) - 1e-6 < epsilon(segments, 1e-5) < pld_epsilon(segments, 1e-5) + 0.02


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-11, 1e-12])
def test_rounding_errors_at_a_tiny_delta_never_lower_epsilon_below_the_truth(delta: float) -> None:
    """30000 steps, mu = 0.5 in all; with q just below 1 they go through the grid, whose rounding reaches 1e-12."""
    steps, sigma = 30_000, math.sqrt(30_000) / 0.5
    exact = epsilon([Segment(1.0, sigma, steps)], delta)
    assert exact <= epsilon([Segment(1 - 1e-12, sigma, steps)], delta) <= 1.2 * exact


# ------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize(
    ("phases", "target", "delta"),
    [
        ([PhaseLoad(0.01, 1000, 1.0)], 1.0, 1e-5),
        ([PhaseLoad(0.01, 1000, 1.0)], 8.0, 1e-5),
        ([PhaseLoad(0.1, 40, 1.0)], 0.1, 1e-5),
        ([PhaseLoad(0.1, 40, 1.0)], 3.0, 1e-6),
        ([PhaseLoad(0.5, 1, 1.0)], 3.0, 1e-5),
        ([PhaseLoad(1.0, 40, 1.0)], 0.01, 1e-5),
        ([PhaseLoad(1.0, 40, 1.0)], 8.0, 1e-5),
        ([PhaseLoad(1.0, 40, 0.4), PhaseLoad(0.1, 20, 0.6)], 3.0, 1e-5),
        ([PhaseLoad(1.0, 40, 4), PhaseLoad(0.1, 20, 6), PhaseLoad(0.02, 400, 2)], 1.0, 1e-5),
    ],
)
def test_calibrated_noise_meets_the_target_by_prv_and_by_pld(
    phases: list[PhaseLoad], target: float, delta: float
) -> None:
    segments = plan_of(phases, calibrate(phases, target, delta))
    assert target - min(CALIBRATION_TOLERANCE, target / 200) <= epsilon(segments, delta) <= target
    assert target - 0.02 - 1e-6 <= pld_epsilon(segments, delta) <= target


@given(
    rates=st.lists(st.one_of(st.just(1.0), st.floats(1e-3, 0.9)), min_size=1, max_size=3),
    steps=st.integers(1, 100),
    share=st.floats(0.05, 5.0),
    target=st.floats(0.03, 15.0),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_calibration_never_exceeds_any_target(rates: list[float], steps: int, share: float, target: float) -> None:
    phases = [PhaseLoad(rate, steps * (1 + index), share**index) for index, rate in enumerate(rates)]
    spent = epsilon(plan_of(phases, calibrate(phases, target, 1e-5)), 1e-5)
    assert target - min(CALIBRATION_TOLERANCE, target / 200) <= spent <= target


def test_calibration_needs_few_evaluations_of_the_slow_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(merged: tuple[MergedSegment, ...], delta: float) -> float:
        calls.append(merged)
        return prv_epsilon(merged, delta)

    monkeypatch.setattr(accounting, "prv_epsilon", count)
    plans = [[PhaseLoad(0.015, 900, 1)], [PhaseLoad(1.0, 40, 1), PhaseLoad(0.11, 60, 2)]]
    for phases, target in itertools.product(plans, [0.3, 2.0, 9.0]):
        calls.clear()
        calibrate(phases, target, 1e-5)
        assert 1 <= len(calls) < 6


def test_shares_are_ratios_of_mu_squared() -> None:
    phases = [PhaseLoad(1.0, 40, 3.0), PhaseLoad(1.0, 10, 1.0)]
    first, second = calibrate(phases, 3.0, 1e-5)
    assert (40 / first**2) / (10 / second**2) == pytest.approx(3.0)


def test_only_the_ratios_of_shares_matter() -> None:
    small = calibrate([PhaseLoad(1.0, 40, 0.003), PhaseLoad(0.1, 10, 0.001)], 3.0, 1e-5)
    assert calibrate([PhaseLoad(1.0, 40, 30), PhaseLoad(0.1, 10, 10)], 3.0, 1e-5) == pytest.approx(small)


def test_a_larger_share_means_less_noise_for_that_phase_and_more_for_the_other() -> None:
    even = calibrate([PhaseLoad(0.1, 40, 1), PhaseLoad(0.02, 300, 1)], 2.0, 1e-5)
    uneven = calibrate([PhaseLoad(0.1, 40, 3), PhaseLoad(0.02, 300, 1)], 2.0, 1e-5)
    assert uneven[0] < even[0]
    assert uneven[1] > even[1]


def test_two_halves_of_a_phase_get_the_noise_of_the_whole() -> None:
    (whole,) = calibrate([PhaseLoad(0.05, 200, 1)], 2.0, 1e-5)
    halves = calibrate([PhaseLoad(0.05, 100, 1), PhaseLoad(0.05, 100, 1)], 2.0, 1e-5)
    assert halves == pytest.approx((whole, whole), rel=5e-3)


def test_calibration_survives_a_jump_between_the_bounds_of_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", lambda plan, _: 9.0 if plan[0].noise_multiplier < 3 else 0.5)
    (sigma,) = calibrate([PhaseLoad(1.0, 1, 1)], 2.0, 1e-5)
    assert sigma >= 3 * (1 - 1e-6)


@pytest.mark.parametrize(
    ("phases", "target", "delta", "named"),
    [
        ([], 1.0, 1e-5, "phases = "),
        ([PhaseLoad(0.1, 1, 1)], 0.0, 1e-5, "epsilon = 0.0"),
        ([PhaseLoad(0.1, 1, 1)], -1.0, 1e-5, "epsilon = -1.0"),
        ([PhaseLoad(0.1, 1, 1)], math.nan, 1e-5, "epsilon = nan"),
        ([PhaseLoad(0.1, 1, 1)], math.inf, 1e-5, "epsilon = inf"),
        ([PhaseLoad(0.1, 1, 1)], 0.015, 1e-5, "epsilon = 0.015 cannot be reached .* at least 0.02"),
        ([PhaseLoad(1.0, 10**18, 1)], 1e-12, 1e-30, "epsilon = 1e-12 cannot be reached"),
        ([PhaseLoad(0.1, 1, 1)], 1.0, 0.0, "delta = 0.0"),
        ([PhaseLoad(0.1, 1, 1)], 1.0, 1.0, "delta = 1.0"),
    ],
)
def test_impossible_targets_are_refused_by_name(
    phases: list[PhaseLoad], target: float, delta: float, named: str
) -> None:
    with pytest.raises(PrivacyError, match=named):
        calibrate(phases, target, delta)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "named"),
    [
        (0.0, 1.0, 1, "sample_rate = 0.0"),
        (1.1, 1.0, 1, "sample_rate = 1.1"),
        (math.nan, 1.0, 1, "sample_rate = nan"),
        (0.5, 0.0, 1, "noise_multiplier = 0.0"),
        (0.5, math.inf, 1, "noise_multiplier = inf"),
        (0.5, math.nan, 1, "noise_multiplier = nan"),
        (0.5, 1.0, 0, "steps = 0"),
        (0.5, 1.0, 1.5, "steps = 1.5"),
    ],
)
def test_impossible_segments_are_refused_by_name(rate: float, sigma: float, steps: int, named: str) -> None:
    with pytest.raises(PrivacyError, match=named):
        Segment(rate, sigma, steps)


def test_impossible_loads_and_deltas_are_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match="sample_rate = 2"):
        PhaseLoad(2, 1, 1.0)
    with pytest.raises(PrivacyError, match="steps = 0"):
        PhaseLoad(0.5, 0, 1.0)
    with pytest.raises(PrivacyError, match=r"share = -1\.0"):
        PhaseLoad(0.5, 1, -1.0)
    for accountant in (epsilon, pld_epsilon, rdp_epsilon):
        with pytest.raises(PrivacyError, match="delta = 0"):
            accountant([Segment(0.5, 1.0, 1)], 0)


# ------------------------------------------------------------------------------------------ delta, imports


@pytest.mark.parametrize(
    ("public_size", "delta"),
    [
        (1, 1e-5),
        (500, 1e-5),
        (9_999, 1e-5),
        (10_000, 1e-5),
        (10_001, 1e-6),
        (100_000, 1e-6),
        (100_001, 1e-7),
        (3_000_000, 1e-8),
        (10**9, 1e-10),
    ],
)
def test_default_delta_is_a_power_of_ten_at_most_a_tenth_of_one_over_the_size(public_size: int, delta: float) -> None:
    assert default_delta(public_size) == delta


@pytest.mark.parametrize("public_size", [0, -5, 2.5])
def test_default_delta_refuses_sizes_that_are_no_count(public_size: int) -> None:
    with pytest.raises(PrivacyError, match=f"public_size = {public_size}"):
        default_delta(public_size)


def test_describing_and_bounding_a_plan_needs_no_torch() -> None:
    """The relay and the planning of rounds run without torch; only PRV itself brings it."""
    program = (
        "import sys; from common.privacy.accounting import *; epsilon([Segment(1.0, 1.0, 1)], 1e-5);"
        "rdp_epsilon([Segment(0.1, 1.0, 1)], 1e-5); sys.exit('torch' in sys.modules)"
    )
    root = Path(accounting.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
