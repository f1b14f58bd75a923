"""Rényi divergences of the Poisson-subsampled Gaussian mechanism (Mironov, Talwar & Zhang 2019, arXiv 1908.10530).

They add up over releases, also over those chosen after seeing earlier ones, which is why a site's lifetime filter uses
them. All sums here have non-negative terms only, so that they keep their relative precision down to the smallest sample
rates, where a sum that starts at 1 loses it (at q = 1e-6 such a sum returns 0).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45),
    *(tenths / 10 for tenths in range(15, 60)),
    *(fifths / 5 for fifths in range(30, 65)),
    *(float(order) for order in (*range(13, 64), *range(64, 128, 2), *range(128, 256, 8), *range(256, 512, 32))),
    *(512.0, 640.0, 768.0, 1024.0, 1536.0, 2048.0),
)
"""The orders of every site's lifetime filter; ledgers store sums per order, so the tuple never changes.

So dense because low noise and small rates have a sharp best order: the bound is within 2 % of that over all orders.
"""

_LEAST_SAMPLED_NOISE = 0.05  # below it sampling hardly helps, and the quadrature would need millions of points


class MergedSegment(NamedTuple):
    """All steps of a history with one sample rate and one noise multiplier; the accountants' canonical form."""

    sample_rate: float
    noise_multiplier: float
    steps: int


def divergence(merged: tuple[MergedSegment, ...], orders: tuple[float, ...] = ORDERS) -> FloatArray:
    """Rényi divergence of the composition at each order; finite, float64, of the shape of ``orders``."""
    total = np.zeros(len(orders))
    for rate, sigma, steps in merged:
        total += steps * _divergence_of_step(rate, sigma, orders)
    return total


def renyi_epsilon(merged: tuple[MergedSegment, ...], delta: float) -> float:
    """Canonne, Kamath & Steinke 2020 (arXiv 2004.00010), Proposition 12, minimised over ``ORDERS``."""
    if not merged:
        return 0.0
    order = np.array(ORDERS)
    bounds = divergence(merged) + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    return max(0.0, float(np.min(bounds)))


def log_ratio(rate: float, exponent: FloatArray) -> FloatArray:
    """log(1 - q + q exp(y)), to relative precision for small q and without overflow."""
    if rate == 1:
        return exponent
    small = np.log1p(rate * np.expm1(np.minimum(exponent, 30)))
    large = exponent + np.log1p((1 - rate) * np.expm1(-np.maximum(exponent, 30)))
    return np.where(exponent < 30, small, large)


def trapezoid(sigma: float, furthest: float) -> tuple[FloatArray, float]:
    """Nodes over all Gaussians with centres in [0, furthest], and their spacing.

    The trapezoidal rule converges exponentially for analytic integrands. A spacing of sigma/6 resolves the Gaussians,
    one of sigma^2/2 the logarithm's branch points at distance pi * sigma^2 from the line: either error is below 1e-16.
    """
    spacing = min(sigma / 6, sigma**2 / 2)
    return np.arange(-11 * sigma, furthest + 11 * sigma + spacing, spacing), spacing


@lru_cache(maxsize=4096)
def _divergence_of_step(rate: float, sigma: float, orders: tuple[float, ...]) -> FloatArray:
    """One release at each order: log(1 + moment)/(order - 1), with the moments of section 3.3."""
    order = np.array(orders)
    if rate == 1 or sigma < _LEAST_SAMPLED_NOISE:
        return order / (2 * sigma**2)  # without sampling: never less than with it
    whole = order == np.floor(order)
    log_moment = np.empty(len(order))
    log_moment[whole] = [_log_moment_at_whole_order(rate, sigma, int(each)) for each in order[whole]]
    if not whole.all():
        log_moment[~whole] = _log_moments(rate, sigma, order[~whole])
    result: FloatArray = np.logaddexp(0.0, log_moment) / (order - 1)
    result.setflags(write=False)  # the cache hands the same array to everybody
    return result


def _log_moment_at_whole_order(rate: float, sigma: float, order: int) -> float:
    """log(E_Q[(P/Q)^order] - 1) by binomial expansion, from whose terms those of the 1 are taken one by one."""
    k = np.arange(2, order + 1)
    binomial = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    exponent = k * (k - 1) / (2 * sigma**2)
    excess = exponent + np.log(-np.expm1(-exponent))  # log(exp(exponent) - 1)
    return float(_log_sum(binomial + (order - k) * math.log1p(-rate) + k * math.log(rate) + excess))


def _log_moments(rate: float, sigma: float, orders: FloatArray) -> FloatArray:
    """The same at fractional orders a: E_Q[(1+u)^a - 1 - a*u] with u = P/Q - 1, of which E_Q[u] = 0.

    The integrand is never negative (Bernoulli's inequality), so its logarithm can be summed at any scale.
    """
    x, spacing = trapezoid(sigma, float(orders.max()))
    t = log_ratio(rate, (x - 0.5) / sigma**2)
    a, u = orders[:, None], np.expm1(np.minimum(t, 30.0))
    with np.errstate(divide="ignore"):  # u = 0 contributes nothing: log(0)
        series = np.log(a * (a - 1) / 2 * u**2 * (1 + (a - 2) / 3 * np.clip(u, -1e-3, 1e-3)))
        direct = np.log(np.maximum(np.expm1(np.minimum(a * t, 30.0)) - a * u, 0.0))
    beyond = np.maximum(t, 30 / a)
    large = a * beyond + np.log1p(-a * np.exp((1 - a) * beyond) + (a - 1) * np.exp(-a * beyond))
    value = np.where(np.abs(a * u) < 1e-3, series, np.where(a * t < 30, direct, large))
    log_density = -0.5 * (x / sigma) ** 2 + math.log(spacing / (sigma * math.sqrt(2 * math.pi)))
    return _log_sum(value + log_density)


def _log_sum(logarithms: FloatArray) -> FloatArray:
    """log(sum(exp)) over the last axis, each row of which has a finite term; SciPy's is ten times slower here."""
    top = logarithms.max(axis=-1)
    return np.asarray(top + np.log(np.exp(logarithms - top[..., None]).sum(axis=-1)))
