"""What ε and δ promise, in one sentence that a reader without mathematics can hold against the law."""

from __future__ import annotations

import math


def odds_factor(epsilon: float) -> str:
    """e^ε to three digits; as a power where nobody would read the number."""
    if epsilon > math.log(1e6):
        return f"e^{epsilon:.0f}"
    factor = math.exp(epsilon)
    return f"{factor:.3g}" if factor < 1000 else f"{float(f'{factor:.3g}'):,.0f}"


def odds_in_words(epsilon: float, delta: float, unit: str) -> str:
    """The guarantee as a bound on odds: e^ε, and δ as the chance that it does not hold."""
    return (
        f"Whoever sees everything that leaves can raise or lower the odds that any one {unit} is in the data by a "
        f"factor of {odds_factor(epsilon)} at most, except with probability {delta:g}."
    )
