"""The mean of the products B_k A_k, beside the means of the factors: what ``fedex`` and ``flexlora`` share.

Every site starts a round from the same B and A, so B_k = B + ΔB_k, A_k = A + ΔA_k, and what the means of the factors
miss is a product of updates alone:

    mean(B_k A_k) - mean(B_k) mean(A_k) = mean(ΔB_k ΔA_k) - mean(ΔB_k) mean(ΔA_k)

It is summed by stacking factors (:class:`server.aggregation.low_rank.Products`). With secure sums: impossible, since
each site's own ΔB_k and ΔA_k must be seen; a sum of updates does not hold their products.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from common.adapter import AdapterState, lora_pairs
from common.errors import ConfigError
from common.messages import Tensors
from common.sections import PhaseSection
from server.aggregation.base import FedOpt, RoundState
from server.aggregation.low_rank import Matrix, Products
from server.aggregation.mean import Sums, WeightedMean

PLAIN = {
    "combine": "mean",
    "server_optimizer": "sgd",
    "server_learning_rate": 1.0,
    "server_momentum": 0.0,
    "server_average": 0.0,
    "server_noise": None,
}
"""The settings under which the server's step is the mean itself."""


@dataclass
class Folded:
    """The round so far."""

    sums: Sums = field(default_factory=Sums)
    """In fp64 throughout: their products are compared with those below."""
    products: dict[str, Products] = field(default_factory=dict)
    """Name of a B → Σ w ΔB ΔA of its pair."""


class MeanAndProducts:
    """The weighted mean of the updates, and the products of each site's own factors."""

    least = 1

    def __init__(self, phase: PhaseSection) -> None:
        self.mean = WeightedMean(phase)

    def empty(self) -> Folded:
        """Nothing yet."""
        return Folded()

    def add(self, folded: Folded, update: Tensors, weight: float) -> Folded:
        """Adds ``weight · update`` and ``weight · ΔB ΔA`` of each pair in it."""
        self.mean.add(folded.sums, update, weight)
        for b, a in lora_pairs(update):
            delta_b, delta_a = update[b], update[a]
            sum_ = folded.products.get(b) or Products.none(delta_b.shape[0], delta_a.shape[1])
            folded.products[b] = sum_.plus(delta_b, delta_a, weight)
        return folded

    def close(self, folded: Folded) -> AdapterState:
        """The mean of the updates."""
        return self.mean.close(folded.sums)

    def residuals(self, folded: Folded) -> dict[str, tuple[Matrix, Matrix]]:
        """Name of a B → factors [d, m] and [m, k] of mean(ΔB_k ΔA_k) - mean(ΔB_k) mean(ΔA_k), with the least m."""
        self.close(folded)  # adds up what still waits
        found, totals, weight = {}, folded.sums.totals, folded.sums.weight
        for b, a in lora_pairs(totals):
            left, right = folded.products[b].plus(totals[b], totals[a], -1 / weight).least()
            found[b] = (left / weight, right)
        return found


class ExactMean(FedOpt):
    """A round whose step is the plain mean, and which knows how far that is from the mean of the products.

    Raises:
        ConfigError: a setting would make the step another one.
    """

    def __init__(self, phase: PhaseSection) -> None:
        super().__init__(phase)
        for setting, plain in PLAIN.items():
            if (value := getattr(phase, setting)) != plain:
                raise ConfigError(
                    f"phase.{phase.name}.{setting} = {value!r}: '{phase.algorithm}' takes the mean of the products as "
                    f"it is; leave {setting} at {plain!r}, or use another algorithm"
                )
        self.rule: MeanAndProducts = MeanAndProducts(phase)

    def residuals(self, state: RoundState) -> dict[str, tuple[Matrix, Matrix]]:
        """What the means of the factors miss in the round so far, for each pair that was trained."""
        return self.rule.residuals(state.folded) if state.names else {}


def beside(adapter: Tensors, b: str, a: str, residual: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
    """Factors of a pair's product and its residual together: [B, R_B] and [A; R_A]."""
    return np.hstack([adapter[b], residual[0]]), np.vstack([adapter[a], residual[1]])
