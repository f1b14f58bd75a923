"""What a sequence of noisy releases costs in privacy, and how much noise meets a target.

Every release is the Poisson-subsampled Gaussian mechanism: each privacy unit joins with probability q, its clipped
contribution of norm at most C is added, and so is N(0, sigma^2 C^2) in every coordinate. Two data sets are neighbours
when one has exactly one unit more (add/remove). There are four accountants:

``epsilon``
    The accountant of record, an upper bound by privacy loss random variables; the only figure that is ever stated.
``rdp_epsilon``
    Rényi DP: 5 to 20 % larger, and cheap. For planning.
``filter_epsilon``
    A Rényi filter over fixed orders, valid also for segments chosen after seeing earlier releases: the lifetime limit.
``pld_epsilon``
    dp-accounting's privacy loss distributions: an independent second opinion, for tests and the command line.

Gaussian DP serves to divide a budget between phases and never to report it: as an account it is too low.

Only the direction *remove* is composed, as in Opacus. On 400 points over q, sigma, steps and delta its epsilon was
nowhere below that of *add* (where either is positive); the tests compare with the larger of both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

from scipy.optimize import brentq

from common.errors import PrivacyError
from common.privacy import renyi
from common.privacy.privacy_loss import EPSILON_ERROR, gaussian_epsilon, gaussian_mu, prv_epsilon
from common.privacy.renyi import ORDERS as ORDERS
from common.privacy.renyi import FloatArray, MergedSegment, divergence, renyi_epsilon

CALIBRATION_TOLERANCE = 0.01
"""``calibrate`` returns noise whose epsilon is at most this much (or 0.5 %) below the target, and never above it."""

LEAST_SAMPLED_TARGET = 2 * EPSILON_ERROR
"""Below it a plan with sampling cannot be calibrated: the error bound of PRV alone is half of it."""

_LARGEST_TARGET = 1e6
_NOISE_RANGE = (1e-6, 1e9)
_LEAST_RATE = 1e-9


@dataclass(frozen=True, order=True)
class Segment:
    """``steps`` releases of the Poisson-subsampled Gaussian mechanism, add/remove one unit.

    Attributes:
        sample_rate: probability q in (0, 1] with which each unit joins a step; at 1 every unit always joins.
        noise_multiplier: standard deviation sigma of the noise, in units of the clip norm, in [1e-6, 1e9].
        steps: number of releases, at least 1.

    Raises:
        PrivacyError: a field is outside its range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _check_sampling(self.sample_rate, self.steps)
        least, most = _NOISE_RANGE
        if not least <= self.noise_multiplier <= most:
            raise PrivacyError(f"noise_multiplier = {self.noise_multiplier!r} must lie in [{least:g}, {most:g}]")


@dataclass(frozen=True)
class PhaseLoad:
    """One phase of a plan before its noise is known.

    Attributes:
        sample_rate: probability q in (0, 1] with which each unit joins a step.
        steps: number of noisy steps of the whole phase, at least 1.
        share: this phase's part of the budget relative to the other phases', as a ratio of mu^2; positive.

    Raises:
        PrivacyError: a field is outside its range.
    """

    sample_rate: float
    steps: int
    share: float

    def __post_init__(self) -> None:
        _check_sampling(self.sample_rate, self.steps)
        if not (self.share > 0 and math.isfinite(self.share)):
            raise PrivacyError(f"share = {self.share!r} must be a positive number, in proportion to other phases")


def epsilon(segments: Sequence[Segment], delta: float) -> float:
    """Upper bound on the epsilon of all segments together: the figure that is stated.

    Histories without sampling (q = 1) are one Gaussian mechanism, solved exactly. Others are composed by PRV, whose
    bound lies about ``EPSILON_ERROR`` above the true value. Where PRV cannot be trusted, the Rényi bound, larger but
    valid, is returned instead: losses beyond 500 (tiny sigma), or so many steps at so small a delta that rounding
    errors matter (steps * 1e-15 > delta / 2). Beyond two million grid points the grid is coarsened, its error bound
    grows accordingly, and the smaller of both bounds is returned. The result is always finite. No segments cost
    nothing, equal segments are merged, and their order does not matter.

    Args:
        segments: the releases made, or planned.
        delta: in (0, 1).

    Raises:
        PrivacyError: ``delta`` is outside (0, 1).
    """
    _check_delta(delta)
    return _epsilon(_merge(segments), float(delta))


@lru_cache(maxsize=4096)  # in a simulation many sites ask the same question
def _epsilon(merged: tuple[MergedSegment, ...], delta: float) -> float:
    if not merged:
        return 0.0
    if merged[0].sample_rate == 1:  # sorted by sample rate: nothing else is left
        return gaussian_epsilon(1 / merged[0].noise_multiplier, delta)
    return prv_epsilon(merged, delta)


def pld_epsilon(segments: Sequence[Segment], delta: float) -> float:
    """The same epsilon by dp-accounting's privacy loss distributions: for comparison, never the stated figure.

    Arguments and errors are those of :func:`epsilon`.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_delta(delta)
    merged = _merge(segments)
    # Its error is about steps * interval^2 / 2. The last term keeps the number of grid points bounded.
    interval = min(1e-3, math.sqrt(5e-5 / max(1, sum(segment.steps for segment in merged))))
    interval = max(1e-4, interval, renyi_epsilon(merged, float(delta)) / 2e5)
    total = pld.identity(value_discretization_interval=interval)
    for rate, sigma, steps in merged:
        one = pld.from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=interval)
        total = total.compose(one.self_compose(steps))
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


def rdp(segments: Sequence[Segment], orders: Sequence[float] = ORDERS) -> FloatArray:
    """Rényi divergence of all segments together at each order.

    Args:
        segments: the releases made, or planned.
        orders: Rényi orders, each above 1.

    Returns:
        float64 array of the shape of ``orders``; finite.
    """
    return divergence(_merge(segments), tuple(orders))


def rdp_epsilon(segments: Sequence[Segment], delta: float) -> float:
    """Upper bound on epsilon by Rényi DP over ``ORDERS``.

    Arguments and errors are those of :func:`epsilon`.
    """
    _check_delta(delta)
    return renyi_epsilon(_merge(segments), float(delta))


def filter_epsilon(segments: Sequence[Segment], delta: float) -> float:
    """Upper bound on epsilon that holds however the segments were chosen, also after seeing releases of earlier ones.

    It is what a lifetime limit is compared with: 5 to 25 % above ``rdp_epsilon`` in common histories. The argument
    stands in :mod:`common.privacy.renyi`. Arguments and errors are those of :func:`epsilon`.
    """
    _check_delta(delta)
    return renyi.filter_epsilon(divergence(_merge(segments)), float(delta))


def default_delta(public_size: int) -> float:
    """The largest power of ten not above 1/(10 * public_size), and never above 1e-5.

    Raises:
        PrivacyError: ``public_size`` is not a positive whole number.
    """
    if not isinstance(public_size, Integral) or public_size < 1:
        raise PrivacyError(f"public_size = {public_size!r} must be a whole number of at least 1")
    exponent = len(str(10 * int(public_size) - 1))  # the least k with 10^k >= 10 * public_size, without rounding
    return float(f"1e-{max(exponent, 5)}")


def calibrate(phases: Sequence[PhaseLoad], epsilon: float, delta: float) -> tuple[float, ...]:
    """One noise multiplier per phase so that the whole plan meets ``epsilon`` under the accountant of record.

    The phases' relative noise follows their shares of mu^2 by the central limit approximation of Gaussian DP (Dong,
    Roth & Su 2019, arXiv 1905.02383; Bu et al. 2019, arXiv 1911.11607), mu^2 = steps * q^2 * (exp(1/sigma^2) - 1), or
    steps / sigma^2 for q = 1. That approximation divides the budget and nothing else: one common factor is then found
    by the accountant of record, so the plan never costs more than ``epsilon`` and at most ``CALIBRATION_TOLERANCE``
    (or 0.5 %, if that is smaller) less, except where :func:`epsilon` itself jumps from one of its bounds to the other.

    Args:
        phases: at least one phase.
        epsilon: target of the whole plan, in (0, 1e6]; at least 0.02 if any phase samples.
        delta: in (0, 1).

    Returns:
        sigma per phase, in units of the clip norm, unrounded.

    Raises:
        PrivacyError: no phases, a value out of range, or a target below what any noise reaches.
    """
    _check_target(phases, epsilon, delta)
    relative = _relative_noise(phases, gaussian_mu(float(epsilon), float(delta)))
    scale = _solve_scale(phases, relative, float(epsilon), float(delta))
    return tuple(scale * sigma for sigma in relative)


def _relative_noise(phases: Sequence[PhaseLoad], mu: float) -> list[float]:
    total = math.fsum(phase.share for phase in phases)
    relative = []
    for phase in phases:
        step = phase.share / total * mu**2 / phase.steps
        inverse_variance = step if phase.sample_rate == 1 else math.log1p(step / phase.sample_rate**2)
        relative.append(inverse_variance**-0.5)
    return relative


def _solve_scale(phases: Sequence[PhaseLoad], relative: Sequence[float], target: float, delta: float) -> float:
    """The factor on all noise at which epsilon lies just below ``target``.

    The Rényi bound gives a first guess and a slope; from there it is a secant in log(epsilon) over log(factor), where
    the curve is nearly straight, kept inside a bracket. Two to five evaluations of PRV as a rule.
    """
    window = min(CALIBRATION_TOLERANCE, target / 200)
    aim = math.log(target - window / 4)

    def miss(log_scale: float, accountant: Callable[[Sequence[Segment], float], float] = epsilon) -> float:
        plan = _scaled_plan(phases, relative, log_scale, target)
        return math.log(max(accountant(plan, delta), 1e-12)) - aim

    guess, slope = _first_guess(lambda log_scale: miss(log_scale, rdp_epsilon))
    noisy: tuple[float, float] | None = None  # (log factor, miss) with enough noise
    quiet: tuple[float, float] | None = None  # the same with too little
    for attempt in range(1, 100):
        error = miss(guess)
        if error <= math.log(target) - aim:
            noisy = (guess, error)
            if error >= math.log(target - window) - aim:
                break
        else:
            quiet = (guess, error)
        if noisy is None or quiet is None:
            guess += attempt * math.copysign(max(abs(error), 0.01), error) / slope
        elif noisy[0] - quiet[0] < 1e-9:  # a jump of epsilon, whose upper side is above the target
            break
        else:
            secant = min(max(quiet[1] / (quiet[1] - noisy[1]), 0.02), 0.98)
            guess = quiet[0] + (noisy[0] - quiet[0]) * (secant if attempt % 4 else 0.5)
    assert noisy is not None, "the noise grows with every attempt, until it is enough or out of range"
    return math.exp(noisy[0])


def _first_guess(miss: Callable[[float], float]) -> tuple[float, float]:
    """Where a decreasing function crosses zero, roughly, and minus its slope there; (0, 1) if it never does."""
    low = high = 0.0
    while miss(low) < 0 and low > -20:
        low -= 1
    while miss(high) > 0 and high < 10:
        high += 1
    if low == high or miss(low) < 0 or miss(high) > 0:
        return 0.0, 1.0
    root = float(brentq(miss, low, high, xtol=1e-3))
    return root, min(max((miss(root) - miss(root + 0.05)) / 0.05, 0.5), 4.0)


def _scaled_plan(
    phases: Sequence[PhaseLoad], relative: Sequence[float], log_scale: float, target: float
) -> list[Segment]:
    scale = math.exp(log_scale)
    if scale * max(relative) > _NOISE_RANGE[1]:
        raise PrivacyError(
            f"epsilon = {target!r} cannot be reached by noise multipliers up to {_NOISE_RANGE[1]:g}: "
            "ask for a larger epsilon or delta, or plan fewer steps"
        )
    return [Segment(p.sample_rate, scale * sigma, p.steps) for p, sigma in zip(phases, relative, strict=True)]


def _merge(segments: Sequence[Segment]) -> tuple[MergedSegment, ...]:
    """Sorted, with equal segments merged and all unsampled ones joined: T steps at sigma are one at sigma/sqrt(T)."""
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for segment in segments:
        # A larger rate costs more, so raising the tiniest ones is valid; it keeps (1 - q)/q inside float64.
        steps[max(float(segment.sample_rate), _LEAST_RATE), float(segment.noise_multiplier)] += int(segment.steps)
    merged = [MergedSegment(rate, sigma, count) for (rate, sigma), count in steps.items() if rate < 1]
    precision = math.fsum(count / sigma**2 for (rate, sigma), count in steps.items() if rate == 1)
    if precision:
        merged.append(MergedSegment(1.0, precision**-0.5, 1))
    return tuple(sorted(merged))


def _check_sampling(sample_rate: float, steps: int) -> None:
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"sample_rate = {sample_rate!r} must lie in (0, 1]")
    if not isinstance(steps, Integral) or steps < 1:
        raise PrivacyError(f"steps = {steps!r} must be a whole number of at least 1")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta!r} must lie strictly between 0 and 1, and well below 1/(number of units)")


def _check_target(phases: Sequence[PhaseLoad], target: float, delta: float) -> None:
    _check_delta(delta)
    if not phases:
        raise PrivacyError("phases = [] is empty: noise is calibrated for a plan of at least one phase")
    if not 0 < target <= _LARGEST_TARGET:
        raise PrivacyError(f"epsilon = {target!r} must lie in (0, {_LARGEST_TARGET:g}]; usual targets are 0.5 to 10")
    if target < LEAST_SAMPLED_TARGET and any(phase.sample_rate < 1 for phase in phases):
        raise PrivacyError(
            f"epsilon = {target!r} cannot be reached by any noise: the error bound of the PRV accountant alone is "
            f"{EPSILON_ERROR}; ask for at least {LEAST_SAMPLED_TARGET}"
        )
