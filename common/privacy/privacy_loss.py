"""The privacy loss itself: exact for the Gaussian mechanism, composed on a grid for the subsampled one.

The grid method is that of Gopi, Lee & Wutschitz 2021 (arXiv 2106.02848) in Opacus's implementation. Opacus is imported
inside the function that needs it: it brings torch, and the callers of this module also run where torch is not wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import fft, special
from scipy.optimize import brentq

from common.privacy.renyi import FloatArray, MergedSegment, log_ratio, renyi_epsilon, trapezoid

EPSILON_ERROR = 0.01
"""What the PRV bound adds to its own estimate for the error of its grid (the default of Opacus)."""

_MOST_POINTS = 2**21  # beyond it the grid gets coarser and its error bound, which is added, grows in proportion
_WIDEST_LOSS = 500.0  # exp() of the privacy loss must stay well inside float64
_MARGIN = 3.0
"""Half-width of the grid beyond what the losses need. Each discretised step is off its mean by less than half a mesh;
with millions of steps, each of a loss below the mesh, that adds up, and beyond the margin the sum would leave the grid
and come in again at its other end (the Fourier transform is cyclic)."""

_ROUNDING_PER_STEP = 1e-15  # error in delta per composed step; measured: 5e-17, against the closed form at q = 1


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism with sensitivity/noise = mu (Balle & Wang 2018, Theorem 8).

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu). With z = epsilon/mu - mu/2 and Mills'
    ratio M(x) = Phi(-x)/phi(x), that is phi(z) * (M(z) - M(z + mu)): no large terms cancel.
    """
    target = math.log(delta)
    low, high = max(-mu / 2, -9.0), -float(special.ndtri(delta))  # high: delta(z) < Phi(-z)
    if high <= low or _log_gaussian_delta(low, mu) <= target:
        return max(0.0, mu * (mu / 2 + low))
    z = high  # an upper bound; the root, too, where rounding hides the difference: at a delta within 1e-14 of 1
    if _log_gaussian_delta(high, mu) < target:
        z = brentq(lambda z: _log_gaussian_delta(z, mu) - target, low, high, xtol=1e-13)
    return mu * (mu / 2 + float(z) + 1e-12) * (1 + 1e-14)  # never below the root


def _log_gaussian_delta(z: float, mu: float) -> float:
    mills = math.sqrt(math.pi / 2) * float(special.erfcx(z / math.sqrt(2)))
    if mu < 1e-5:
        difference = mu * (1 - z * mills)  # the ratio is convex, so its tangent bounds the difference from above
    else:
        difference = mills - math.sqrt(math.pi / 2) * float(special.erfcx((z + mu) / math.sqrt(2)))
    return math.log(difference) - z * z / 2 - math.log(2 * math.pi) / 2


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian mechanism has (epsilon, delta), to a relative 1e-6."""
    low = high = 1.0
    while gaussian_epsilon(low, delta) > epsilon:
        low /= 2
    while gaussian_epsilon(high, delta) <= epsilon:
        high *= 2
    return float(brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, low, high, rtol=1e-6))


def prv_epsilon(merged: tuple[MergedSegment, ...], delta: float) -> float:
    """Upper bound by PRV (Gopi et al. 2021, Theorem 5.5): estimate on a grid, plus the grid's error bound.

    Differs from ``opacus.accountants.PRVAccountant`` where that one fails: at q = 1, at tiny sigma, and in the rounding
    errors of the Fourier transform, which at a small delta and many steps exceed its error bound (at delta = 1e-11 and
    30000 steps epsilon comes out 0.03 too low); here they are taken off delta. The Rényi bound is returned where the
    grid cannot be trusted at all, and the smaller bound where it was coarsened.
    """
    from opacus.accountants.analysis.prv import Domain, compose_heterogeneous, discretize

    counts = [segment.steps for segment in merged]
    delta_error = delta / 1000
    rounding = sum(counts) * _ROUNDING_PER_STEP
    if rounding > delta / 2 or (width := _loss_width(merged, delta_error)) > _WIDEST_LOSS:
        return renyi_epsilon(merged, delta)
    root = math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
    mesh = max(EPSILON_ERROR / root, 2 * width / _MOST_POINTS)
    half = fft.next_fast_len(math.ceil(width / mesh) + 1, real=True)
    # An even number of points with 0 at index half - 1 is what Opacus's convolutions assume.
    domain = Domain(t_min=-mesh * (half - 1), t_max=mesh * half, size=2 * half)
    losses = [PrivacyLoss(segment.sample_rate, segment.noise_multiplier) for segment in merged]
    composed = compose_heterogeneous([discretize(loss, domain) for loss in losses], counts)
    if abs(composed.domain.shifts) > _MARGIN:
        return renyi_epsilon(merged, delta)
    estimate = _grid_epsilon(composed.domain.ts, composed.pmf, delta - delta_error - rounding)
    if mesh * root > EPSILON_ERROR * (1 + 1e-9):
        return min(estimate + mesh * root, renyi_epsilon(merged, delta))
    return estimate + EPSILON_ERROR


def _loss_width(merged: tuple[MergedSegment, ...], delta_error: float) -> float:
    """Half-width of the grid (Remark 5.6): neither the sum of all losses nor any one leaves it but with delta_error."""
    tail = delta_error / (8 * sum(segment.steps for segment in merged))
    single = max(renyi_epsilon((segment._replace(steps=1),), tail) for segment in merged)
    return max(renyi_epsilon(merged, delta_error / 4), single, EPSILON_ERROR) + _MARGIN


def _grid_epsilon(losses: FloatArray, mass: FloatArray, delta: float) -> float:
    """The epsilon >= 0 at which the hockey-stick divergence of a discrete privacy loss is ``delta``.

    Negative losses are left out: their factor exp(-loss) would turn rounding errors of the mass into nonsense.
    """
    loss, mass = losses[losses >= 0], mass[losses >= 0]
    above = np.cumsum(mass[::-1])[::-1]
    weighted = np.cumsum((mass * np.exp(-loss))[::-1])[::-1]
    too_much = np.flatnonzero(above - np.exp(loss) * weighted > delta)
    first = int(too_much[-1]) + 1 if len(too_much) else 0
    if above[first] <= delta:
        return 0.0
    return max(0.0, float(math.log((above[first] - delta) / weighted[first])))


@dataclass(frozen=True)
class PrivacyLoss:
    """log P/Q under P of one release, with P = (1-q) N(0, sigma^2) + q N(1, sigma^2) and Q = N(0, sigma^2).

    Opacus's ``discretize`` asks for ``cdf`` and ``mean``. Opacus's own class divides by zero at q = 1, and integrates
    the mean to 1e-8 only, which thousands of steps add up. Formulas: Gopi et al. 2021, Appendix B.
    """

    sample_rate: float
    noise_multiplier: float

    def cdf(self, loss: FloatArray) -> FloatArray:
        """P(log P/Q <= t) for increasing t; mass outside twelve standard deviations (below 1e-32) is left out."""
        q, sigma = self.sample_rate, self.noise_multiplier
        low, high = np.searchsorted(loss, self._loss_at(np.array([-12 * sigma, 1 + 12 * sigma])))
        result = np.zeros(len(loss))
        result[high:] = 1.0
        t = loss[low:high]
        with np.errstate(divide="ignore"):  # at or below log(1 - q) no outcome is left: log(0), probability 0
            scaled = sigma * (t + np.log1p(np.maximum((q - 1) / q * np.expm1(-t), -1.0)))
        result[low:high] = (1 - q) * special.ndtr(scaled + 0.5 / sigma) + q * special.ndtr(scaled - 0.5 / sigma)
        return result

    def mean(self) -> float:
        """E_P[log P/Q]; E_Q[P/Q - 1] = 0 is taken off, so that all terms have the size of the result for small q."""
        q, sigma = self.sample_rate, self.noise_multiplier
        x, spacing = trapezoid(sigma, 1.0)
        absent, present = (np.exp(-0.5 * ((x - centre) / sigma) ** 2) for centre in (0.0, 1.0))
        gain = q * (present - absent)
        total = np.sum((absent + gain) * self._loss_at(x) - gain)
        return float(total * spacing / (sigma * math.sqrt(2 * math.pi)))

    def _loss_at(self, x: FloatArray) -> FloatArray:
        return log_ratio(self.sample_rate, (x - 0.5) / self.noise_multiplier**2)
