"""Metrics under differential privacy: how the account of one step is shared between its gradient and its metrics.

A step of DP-SGD releases the clipped gradients of one Poisson sample of units as one Gaussian mechanism with noise
multiplier σ. k metrics of the same units join it as k further coordinates. A unit u contributes its gradient g_u with
‖g_u‖ ≤ C and its metrics m_u ∈ [0, 1]^k. With s, the metrics' share, the noise is independent in every coordinate, of
standard deviation ::

    σ_g · C   on the gradient,   σ_g = σ / √(1 - s)
    σ_m       on each metric,    σ_m = σ · √(k / s)

Measured in its own noise, what one unit adds to the step is the vector (g_u / (σ_g C), m_u / σ_m), and ::

    ‖·‖²  ≤  1/σ_g² + k/σ_m²  =  (1 - s)/σ² + s/σ²  =  1/σ²

with equality for a gradient of norm C and metrics that are all 1. Scaling coordinates by public numbers changes no
guarantee, so the step is the Poisson-subsampled Gaussian mechanism with noise multiplier σ, whatever s and k are. It is
what the ledger holds and the accountant composes, and it stays as it is without metrics: a metric costs no ε. It costs
noise on the gradient, a factor of 1/√(1 - s).

The mean that a site releases is the sum of a round's noisy metrics over its steps, divided by steps · q · public_size,
which is public, and cut to [0, 1]: a function of what the mechanism released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.messages import PhaseStatement
from common.sections import PrivacySection

LARGEST_LOSS = 2.0
"""Losses are cut at so many times the loss of a guess, ln(number of labels or tokens)."""


def metric_bounds(names: Sequence[str], outcomes: int) -> dict[str, float]:
    """Largest value of each metric; the least is 0. Public, so that all can compute it.

    Args:
        outcomes: among how many labels or tokens the model chooses.
    """
    largest = {"loss": LARGEST_LOSS * math.log(outcomes), "accuracy": 1.0}
    return {name: largest[name] for name in names}


@dataclass(frozen=True)
class NoiseSplit:
    """The noise of gradient and metrics; see the module's description.

    Attributes:
        metrics: k.
        share: s; without metrics it does not matter.
    """

    metrics: int
    share: float

    @classmethod
    def of(cls, privacy: PrivacySection) -> NoiseSplit:
        """As the plan says."""
        return cls(len(privacy.metrics), privacy.metrics_share)

    def gradient(self, noise_multiplier: float) -> float:
        """σ_g, in units of the clip norm."""
        return noise_multiplier / math.sqrt(1 - self.share) if self.metrics else noise_multiplier

    def metric(self, noise_multiplier: float) -> float:
        """σ_m, in units of a metric's bound."""
        return noise_multiplier * math.sqrt(self.metrics / self.share)

    def of_mean(self, phase: PhaseStatement, steps: int, public_size: int) -> float:
        """Standard deviation of the noise on a site's mean over one round, in units of the metric's bound.

        Args:
            phase: q and σ at the site.
            steps: of a round.
        """
        return self.metric(phase.noise_multiplier) / (math.sqrt(steps) * phase.sample_rate * public_size)
