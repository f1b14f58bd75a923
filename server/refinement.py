"""A noisy head, brought closer to what the server's own texts look like; their labels are not looked at.

Under DP a trained head is the sum of what the sites' data say and of noise whose size the server knows. The texts that
it holds itself know nothing of classes but much of the space: which directions of the features vary within a class,
and how many texts lie where. So the head sorts them; a linear discriminant (Fisher 1936) is fitted to what it found,
each text counted in every class by the head's own probability of it, as in a step of EM from a classifier to
unlabelled texts (Nigam et al. 2000, Machine Learning 39); and the two are averaged, the discriminant with the weight
ν², where ν is the noise's share of the mean square of the head's weights. ν² and two passes were chosen on validation
data, for data sets of 1,500 to 12,000 examples (DECISIONS.md, entry 63). Without noise nothing happens. All of it is
post-processing of what was released: free of ε. Training goes on from the head as it was; the refined one is
evaluated, kept, and, once it is calibrated (:mod:`server.calibration`), what a next phase starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from scipy.special import log_softmax

from common.adapter import AdapterState
from common.messages import Tensors
from common.sections import PhaseSection
from server.linear_head import Floats, Head, HeldOutFeatures

PASSES = 2
"""How often texts are sorted and a discriminant is fitted; the second time by the average of the first."""
RIDGE = 0.1
"""Added to each within-class variance, as a multiple of the mean variance of the features."""


def step_deviations(history: Iterable[Mapping[str, Any]], phase: str) -> list[float]:
    """Deviation of the noise in each number of the server's step, for each round of a phase.

    Args:
        history: records of finished rounds, the first first.
    """
    return [float(record["noise"]) for record in history if record["phase"] == phase]


def accumulated(deviations: Sequence[float], momentum: float) -> float:
    """Deviation of the noise in each number of the adapter after rounds whose steps had these.

    With heavy-ball momentum m the step of round t acts in all later ones: T rounds after the first add
    Σ_t (d_t · (1 - m^(T - t + 1)) / (1 - m))² of variance.

    Args:
        deviations: of each round's step at the server, the first first.
    """
    reach = (1 - momentum ** np.arange(len(deviations), 0, -1)) / (1 - momentum)
    return float(sqrt(np.sum((np.asarray(deviations) * reach) ** 2)))


def discriminant(head: Head, features: Floats) -> Head:
    """The linear discriminant of what a head makes of unlabelled features.

    Class k has Σ_i p_ik texts (and one more, so that none is empty), the mean of its texts drawn a little to that of
    all, and all classes share the covariance that is left; weights Σ⁻¹ μ_k, bias log π_k - μ_k Σ⁻¹ μ_k / 2 (Hastie,
    Tibshirani and Friedman 2009, equation 4.10).

    Args:
        features: [n, d].
    """
    shares = np.exp(log_softmax(head.logits(features), axis=1))
    centre = features.mean(axis=0)
    centred = features - centre
    counts = shares.sum(axis=0) + 1
    prior = counts / counts.sum()
    means = shares.T @ centred / counts[:, None]
    total = centred.T @ centred / len(centred)
    within = total - (means.T * prior) @ means + RIDGE * np.diag(total).mean() * np.eye(len(total))
    weight = np.linalg.solve(within, means.T).T
    return Head(weight, np.log(prior) - 0.5 * (weight * means).sum(axis=1) - weight @ centre)


def refined(head: Head, features: Floats, deviation: float) -> Head:
    """The head after ``PASSES`` averages with a discriminant of its own texts, as sure of itself as it was.

    A discriminant of few texts in many dimensions is far too sure, so the result is brought to the spread of logits
    that the head had; that changes no answer.

    Args:
        features: [n, d] of texts that nobody's privacy stands behind.
        deviation: of the noise in each of the head's numbers.
    """
    power = float(np.mean(head.weight**2))
    share = min(1.0, deviation**2 / power) ** 2 if power > 0 else 0.0
    best = head
    for _ in range(PASSES if share > 0 else 0):
        best = head.towards(discriminant(best, features), share)
    spread = best.spread(features)
    return best.times(head.spread(features) / spread) if best is not head and spread > 0 else best


class Refiner:
    """Refines the heads of one run.

    Args:
        held_out: what they see of the server's own texts.
    """

    def __init__(self, held_out: HeldOutFeatures) -> None:
        self.held_out = held_out

    def refined(self, adapter: Tensors, phase: PhaseSection, deviations: Sequence[float]) -> AdapterState:
        """The adapter with its head refined, where the phase asks for it and the head is one linear map on features
        that no adapter changes; else as it is.

        Args:
            deviations: of the noise of each round of the phase so far.
        """
        state = {name: np.asarray(array) for name, array in adapter.items()}
        head = self.held_out.head_of(adapter) if phase.server_refinement else None
        if head is None:
            return state
        features = self.held_out.seen(adapter)
        features = features[np.isfinite(features).all(axis=1)]
        used = np.flatnonzero(features.var(axis=0) > 0)  # a map of lower rank fills up with zeros
        if len(features) < 2 or not len(used):
            return state
        deviation = accumulated(deviations, phase.server_momentum)
        better = refined(Head(head.weight[:, used], head.bias), features[:, used], deviation)
        weight = head.weight.copy()
        weight[:, used] = better.weight
        return self.held_out.with_head(adapter, Head(weight, better.bias))
