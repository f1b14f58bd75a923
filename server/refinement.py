"""A noisy head, brought closer to what the server's own texts look like; their labels are not looked at.

Under DP a trained head is the sum of what the sites' data say and of noise whose size the server knows. The texts that
it holds itself know nothing of classes but much of the space: which directions of the features vary within a class,
and how many texts lie where. So the head sorts them; a linear discriminant (Fisher 1936) is fitted to what it found,
each text counted in every class by the head's own probability of it, as in a step of EM from a classifier to
unlabelled texts (Nigam et al. 2000, Machine Learning 39); and the two are averaged, the discriminant with the weight
ν², where ν is the noise's share of the mean square of the head's weights. ν² and two passes were chosen on validation
data, for data sets of 1,500 to 12,000 examples (DECISIONS.md, entry 63). Without noise nothing happens. All of it is
post-processing of what was released: free of ε. Training goes on from the head as it was; the refined one is
evaluated, kept, and what a next phase starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from common.adapted import AdaptedModel
from common.adapter import FEATURE_MAP, AdapterState
from common.examples import Examples
from common.messages import Tensors, adapter_digest, tensor_digest
from common.sections import PhaseSection
from server.evaluation import ROWS

PASSES = 2
"""How often texts are sorted and a discriminant is fitted; the second time by the average of the first."""
RIDGE = 0.1
"""Added to each within-class variance, as a multiple of the mean variance of the features."""

Floats = npt.NDArray[np.float64]


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


@dataclass(frozen=True)
class Head:
    """A linear head: ``weight`` [K, d] and ``bias`` [K]."""

    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """[n, K]."""
        scores: Floats = features @ self.weight.T + self.bias
        return scores

    def spread(self, features: Floats) -> float:
        """Root mean square of the logits about their mean over the classes: how sure the head is of itself."""
        logits = self.logits(features)
        return float(np.sqrt(np.mean((logits - logits.mean(axis=1, keepdims=True)) ** 2)))

    def times(self, factor: float) -> Head:
        """The head that answers the same, and is as many times as sure."""
        return Head(factor * self.weight, factor * self.bias)

    def towards(self, other: Head, share: float) -> Head:
        """The average with another."""
        return Head(
            (1 - share) * self.weight + share * other.weight,
            (1 - share) * self.bias + share * other.bias,
        )


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
    """Refines the heads of one run on one set of texts.

    Args:
        texts: held out by the server.
    """

    def __init__(self, model: AdaptedModel, texts: Examples) -> None:
        self.model, self.texts = model, texts
        names = [name for name in model.spec.names if model.group_of(name) == "head"]
        self._weight = next((name for name in names if name.endswith("weight")), "")
        self._bias = next((name for name in names if name.endswith("bias")), "")
        self._names = names
        self._seen: tuple[str, Floats] | None = None
        """Digest of the last feature map, and what a head behind it sees of the texts."""

    def refined(self, adapter: Tensors, phase: PhaseSection, deviations: Sequence[float]) -> AdapterState:
        """The adapter with its head refined, where the phase asks for it and the head is one linear map on features
        that no adapter changes; else as it is.

        Args:
            deviations: of the noise of each round of the phase so far.
        """
        state = {name: np.asarray(array) for name, array in adapter.items()}
        linear = len(self._names) == 2 and self._weight and self._bias
        if not (phase.server_refinement and linear and self.model.cut_for(self._names, adapter).layer is None):
            return state
        features = self._features(adapter)
        used = np.flatnonzero(features.var(axis=0) > 0)  # a map of lower rank fills up with zeros
        if len(features) < 2 or not len(used):
            return state
        weight = state[self._weight].astype(np.float64)
        head = Head(weight[:, used], state[self._bias].astype(np.float64))
        if not (np.isfinite(head.weight).all() and np.isfinite(head.bias).all()):
            return state
        better = refined(head, features[:, used], accumulated(deviations, phase.server_momentum))
        weight[:, used] = better.weight
        return {**state, self._weight: weight.astype(np.float32), self._bias: better.bias.astype(np.float32)}

    def _features(self, adapter: Tensors) -> Floats:
        """What the head sees of the texts [n, d]; computed once for a feature map, since every round has the same."""
        digests = {name: tensor_digest(array) for name, array in adapter.items() if name.startswith(FEATURE_MAP)}
        digest = adapter_digest(digests)
        if self._seen is None or self._seen[0] != digest:
            self._seen = digest, self._mapped(adapter)
        return self._seen[1]

    def _mapped(self, adapter: Tensors) -> Floats:
        """The features behind the adapter's map [n, d]; rows that are not finite are left out."""
        features = self.texts.frozen_features(self.model, ROWS).float().cpu().numpy().astype(np.float64)
        if self.model.maps_features:
            weight, bias = (np.asarray(adapter[f"{FEATURE_MAP}{name}"], np.float64) for name in ("weight", "bias"))
            features = features @ weight.T + bias
            features = np.pad(features, ((0, 0), (0, self.model.width - features.shape[1])))
        kept: Floats = features[np.isfinite(features).all(axis=1)]
        return kept
