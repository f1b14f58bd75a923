"""Rényi divergences of the Poisson-subsampled Gaussian mechanism (Mironov, Talwar & Zhang 2019, arXiv 1908.10530).

They add up over releases, also over those chosen after seeing earlier ones, which is why a site's lifetime filter uses
them. All sums here have non-negative terms only, so that they keep their relative precision down to the smallest sample
rates, where a sum that starts at 1 loses it (at q = 1e-6 such a sum returns 0).

Why the lifetime limit is not the minimum over orders
-----------------------------------------------------
P and Q are the laws of all that a site ever releases, with and without one unit, and L = log dP/dQ; in the other
direction the same holds, since the divergences below bound both. Whoever asks chooses each step after seeing all
earlier ones, interleaved as they like, but before its noise is drawn. R(a) is the sum of the divergences of order a of
all executed steps: itself a random number, known at every moment. Then for each order

    E_P[exp((a - 1) (L - R(a)))] <= 1,                                                                            (1)

since the expression is a supermartingale (Feldman & Zrnic 2021, arXiv 2008.11193, section 3; Lécuyer 2021, arXiv
2103.01379). If R(a) <= B always, for an a and a B fixed in advance, the whole is (a, B)-Rényi private: the Rényi
filter. It is a statement about *one* order. "Go on while some order a still has R(a) <= B(a)" lets the releases choose
the order, and no theorem covers that: accounting adaptive choices by whole privacy profiles is not free in general
(Regehr et al. 2026, arXiv 2602.15815). The minimum over orders, :func:`renyi_epsilon`, is right for segments that are
fixed in advance, which is one plan. One order for everything is no way out either: it is too large for some histories
by factors of 10 to 1000, because small rates have a sharp best order. So :func:`filter_epsilon` mixes the orders, with
weights w(a) fixed in advance that sum to 1 (the method of mixtures, as for confidence sequences). By (1)

    E_P[M(L)] <= 1   with   M(l) = sum_a w(a) exp((a - 1) (l - R(a))),

and if every path obeys  1 - exp(epsilon - l) <= delta M(l)  for all real l, then for every event S

    P(S) - e^epsilon Q(S) <= E_P[(1 - exp(epsilon - L))_+] <= delta E_P[M(L)] <= delta.

With one order of weight 1 the least such epsilon is the bound of Canonne, Kamath & Steinke. R grows along each path and
M falls with it, so a limit that holds for what is *reserved* also holds for what was executed: steps never executed
count as if they had been. The limit itself has to be chosen without looking at releases.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.optimize import brentq

FloatArray = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45),
    *(tenths / 10 for tenths in range(15, 60)),
    *(fifths / 5 for fifths in range(30, 65)),
    *(float(order) for order in (*range(13, 64), *range(64, 128, 2), *range(128, 256, 8), *range(256, 512, 32))),
    *(512.0, 640.0, 768.0, 1024.0, 1536.0, 2048.0),
)
"""The orders of every site's lifetime filter. They and their weights are fixed in advance, so they never change.

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
    """Canonne, Kamath & Steinke 2020 (arXiv 2004.00010), Proposition 12, minimised over ``ORDERS``.

    For segments fixed in advance; where they were chosen after seeing releases it is :func:`filter_epsilon`.
    """
    if not merged:
        return 0.0
    order = np.array(ORDERS)
    bounds = divergence(merged) + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    return max(0.0, float(np.min(bounds)))


def filter_epsilon(divergences: FloatArray, delta: float) -> float:
    """Least epsilon for which steps chosen adaptively, of these summed divergences, are (epsilon, delta)-private.

    The argument stands at the top of this module. The condition there, solved for epsilon, is the maximum over l of
    l + log(1 - delta M(l)); that is concave in l, and its slope is zero where sum_a a w(a) delta exp(...) = 1.

    Args:
        divergences: R(a) at each of ``ORDERS``; finite, never negative.
        delta: in (0, 1).

    Returns:
        In common histories 5 to 25 % above :func:`renyi_epsilon` of the same segments; 0 for no steps.
    """
    if not divergences.any():
        return 0.0
    slope = np.array(ORDERS) - 1
    weighted = _log_weights() + math.log(delta)
    steep = weighted + np.log(ORDERS)
    # From here on losses are relative to one at which each term of the sum is at most 1/len(ORDERS).
    origin = float(np.min(divergences - (steep + math.log(len(ORDERS))) / slope))
    above = divergences - origin

    def excess(loss: float) -> float:
        return float(_log_sum(steep + slope * (loss - above)))

    highest = float(np.min(above - steep / slope))  # here one term is 1
    loss = float(brentq(excess, 0.0, highest, xtol=1e-12)) if excess(0.0) < 0 < excess(highest) else highest
    mass = float(np.exp(weighted + slope * (loss - above)).sum())
    found = origin + (loss + math.log1p(-mass))
    return max(0.0, found + 1e-11 * max(1.0, abs(found)))  # rounding must not put it below the maximum


@lru_cache(maxsize=1)
def _log_weights() -> FloatArray:
    """log w(a): evenly in log(a - 1) but for a factor that favours orders near 6, where budgets of 1 to 10 have theirs.

    What it favours changes the bound by a few per cent only; that it is fixed is what matters.
    """
    position = np.log(np.array(ORDERS) - 1)
    weight = np.gradient(position) / (1 + (position - math.log(5)) ** 2)
    result: FloatArray = np.log(weight / weight.sum())
    result.setflags(write=False)
    return result


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
    if whole.any():
        log_moment[whole] = _log_moments_at_whole_orders(rate, sigma, order[whole].astype(int))
    if not whole.all():
        log_moment[~whole] = _log_moments(rate, sigma, order[~whole])
    result: FloatArray = np.logaddexp(0.0, log_moment) / (order - 1)
    result.setflags(write=False)  # the cache hands the same array to everybody
    return result


def _log_moments_at_whole_orders(rate: float, sigma: float, orders: NDArray[np.int64]) -> list[float]:
    """log(E_Q[(P/Q)^a] - 1) by binomial expansion, from whose terms those of the 1 are taken one by one.

    A term is a!/(k! (a-k)!) (1-q)^(a-k) q^k (exp(k(k-1)/(2 sigma^2)) - 1): a part that depends on k, one on a - k and
    one on a, of which only the last is not shared by all orders.
    """
    most = int(orders.max())
    log_factorial = special.gammaln(np.arange(most + 1) + 1.0)
    k = np.arange(2, most + 1)
    exponent = k * (k - 1) / (2 * sigma**2)
    of_k = k * math.log(rate) - log_factorial[2:] + exponent + np.log(-np.expm1(-exponent))  # log(exp(exponent) - 1)
    of_rest = np.arange(most + 1) * math.log1p(-rate) - log_factorial
    return [float(log_factorial[a] + _log_sum(of_k[: a - 1] + of_rest[a - 2 :: -1])) for a in orders.tolist()]


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
