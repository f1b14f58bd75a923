"""Verdicts, and the statistics behind them.

A verdict is either *exact* (keys are known, so figures are compared up to floating point; a correct engine never fails)
or *statistical*. All statistical checks of an audit together fail a correct engine with probability ``FAMILY`` at most:
each of them gets ``LEVEL`` = FAMILY / STATISTICAL_CHECKS (Bonferroni), and divides it again among its own comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

FAMILY = 1e-4
"""Probability that an audit of a correct engine finds any fault."""
STATISTICAL_CHECKS = 16
"""At least as many as there are statistical verdicts in an audit."""
LEVEL = FAMILY / STATISTICAL_CHECKS
"""False-alarm probability of one statistical verdict."""
APPROXIMATE = 50
"""Where a distribution is known approximately, its level is divided by this once more."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """One named check."""

    part: str
    """``replay``, ``noise``, ``sampling``, ``canaries`` or ``ledger``."""
    name: str
    claim: str
    """What must hold."""
    held: bool
    figure: float | None
    """What was measured, at its worst place; ``None``: nothing could be measured."""
    least: float | None = None
    most: float | None = None
    """Between which bounds the figure must lie."""
    false_alarm: float = 0.0
    """Probability that a correct engine fails this check, at most."""
    where: str = ""
    """Phase, layer or data set of the worst figure."""
    suspects: str = ""
    """Which fault would look like this; empty if the check holds."""


def within(
    part: str,
    name: str,
    claim: str,
    figure: float,
    least: float | None = None,
    most: float | None = None,
    *,
    false_alarm: float = 0.0,
    where: str = "",
    suspects: str = "",
) -> Verdict:
    """The verdict on a figure that must lie in [least, most]."""
    held = bool((least is None or figure >= least) and (most is None or figure <= most))  # NaN never holds
    return Verdict(part, name, claim, held, figure, least, most, false_alarm, where, "" if held else suspects)


@dataclass(frozen=True)
class Comparison:
    """One of the comparisons of a verdict."""

    figure: float
    least: float
    most: float
    where: str

    @property
    def excess(self) -> float:
        """Above 1 outside the bounds; the comparison with the largest is the worst."""
        middle, half = (self.least + self.most) / 2, (self.most - self.least) / 2
        if math.isnan(self.figure):
            return math.inf
        if not half:
            return 0.0 if self.figure == middle else math.inf
        return abs(self.figure - middle) / half


def worst_of(comparisons: list[Comparison]) -> Comparison:
    """The comparison that lies farthest outside its bounds, or nearest to them."""
    return max(comparisons, key=lambda each: each.excess)


def deviation_range(values: int, level: float) -> tuple[float, float]:
    """Where the root mean square of so many standard normal values lies with probability 1 − level (χ², exact)."""
    low, high = stats.chi2.ppf(level / 2, values), stats.chi2.isf(level / 2, values)
    return math.sqrt(low / values), math.sqrt(high / values)


def correlation(one: FloatArray, other: FloatArray) -> float:
    """Cosine of two vectors; 0 where one of them is zero."""
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 else 0.0


def correlation_limit(values: int, level: float) -> float:
    """What the cosine of two independent normal vectors exceeds in size with probability ``level`` (exact).

    r·√((n−1)/(1−r²)) is Student's t with n − 1 degrees of freedom, whatever the scale of either vector.
    """
    if values < 2:
        return 1.0
    t = float(stats.t.isf(level / 2, values - 1))
    return t / math.sqrt(values - 1 + t * t)


def dispersion_range(trials: int, rate: float, counts: int, level: float) -> tuple[float, float]:
    """Where Σ(c − np)²/(np(1−p)) of ``counts`` independent binomial counts c, divided by their number, lies.

    Mean and variance are exact; the shape is the gamma distribution's (for large np: χ²).
    """
    spread = trials * rate * (1 - rate)
    variance = counts * (2 + (1 - 6 * rate * (1 - rate)) / spread)
    shape, scale = counts**2 / variance, variance / counts
    low, high = (f(level / APPROXIMATE / 2, shape, scale=scale) for f in (stats.gamma.ppf, stats.gamma.isf))
    return float(low) / counts, float(high) / counts


def binomial_range(trials: int, rate: float, level: float) -> tuple[float, float]:
    """Bounds on a binomial count, inclusive (exact)."""
    return float(stats.binom.ppf(level / 2, trials, rate)), float(stats.binom.isf(level / 2, trials, rate))
