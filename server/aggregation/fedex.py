"""FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432, §4): FedIT, and the residual that makes its mean exact.

The sites train on as in ``fedit``, from mean(B) and mean(A). The global model of a round is mean(B_k A_k): the means'
product plus the residual (eq. in :mod:`server.aggregation.exact`). The paper adds each round's residual to the frozen
weights of every site. Here a site has pinned the digest of those weights and nothing may change them, so the residual
is a correction of what is evaluated, kept and exported, and training goes on without it: a round's correction is that
round's alone, and nothing piles up.

The corrected model is an ordinary adapter of higher rank: the factors side by side, [B, R_B] and [A; R_A], at the same
scale. With K sites of rank r the rank is at most K·r, and never above min(d, k) of the largest pair. Any PEFT loads it.

Under DP the residual is post-processing, but it is made of products of noisy factors: its noise grows with σ², and with
small ε it corrects with little else. With secure sums: impossible.
"""

from __future__ import annotations

import numpy as np

from common.adapter import AdapterState, lora_pairs
from common.messages import Tensors
from server.aggregation.base import RoundState, register
from server.aggregation.exact import ExactMean, beside
from server.aggregation.low_rank import Matrix, Products


@register("fedex")
class FedEx(ExactMean):
    """Averages every released tensor; what is evaluated and kept is the mean of the products."""

    def finish(self, state: RoundState) -> tuple[RoundState, AdapterState]:
        """The state holds the means of the factors, at the plan's rank; the result is at the rank of the exact mean."""
        after, means = super().finish(state)
        return after, corrected(means, self.residuals(state))


def corrected(adapter: Tensors, residuals: dict[str, tuple[Matrix, Matrix]]) -> AdapterState:
    """The adapter with each pair's residual beside its factors, all pairs at one rank (filled up with zeros).

    Args:
        residuals: name of a B → factors. If all are empty, the adapter keeps its bits.
    """
    pairs = {b: (a, _least(*beside(adapter, b, a, residuals[b]))) for b, a in lora_pairs(adapter) if b in residuals}
    rank = max((len(factors[1]) for _, factors in pairs.values()), default=0)
    result = {name: np.asarray(array, np.float32) for name, array in adapter.items()}
    if not any(residual.size for residual, _ in residuals.values()):
        return result
    for b, a in lora_pairs(adapter):
        left, right = pairs[b][1] if b in pairs else (adapter[b], adapter[a])
        missing = rank - len(right)
        result[b] = np.pad(left, ((0, 0), (0, missing))).astype(np.float32)
        result[a] = np.pad(right, ((0, missing), (0, 0))).astype(np.float32)
    return result


def _least(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The factors as they are, or those of least rank where theirs exceeds min(d, k)."""
    if len(a) <= min(len(b), a.shape[1]):
        return b, a
    return Products.none(len(b), a.shape[1]).plus(b, a).least()
