"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505, §3): sites of different rank, averaged as products and cut by SVD.

The global product W = B A is moved by the weighted mean of the sites' changes of it,

    W ← W + mean(B_k' A_k' - B_k A_k),

where B_k A_k is what site k received (W cut to its rank by SVD) and B_k' A_k' what it made of it. The result is cut to
the plan's rank by SVD, B = U S and A = Vᵀ, so that its first columns and rows are its best approximation of any smaller
rank: that is what a site of that rank receives next. Where all ranks are equal this is the paper's mean(B_k' A_k') up
to the cut. Where they differ the paper averages the products themselves, and a small site's missing directions count
as zeros: they fade a little in every round, even if nobody changes anything. Here they count as unchanged.

Every site keeps the plan's scale (α/r, or α/√r with rsLoRA) at whatever rank, so products mean the same everywhere.

Under DP: post-processing; the noisy factors multiply as in ``fedit``, and the cut drops the weakest directions, which
hold noise first. With secure sums: impossible.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.adapter import AdapterState, lora_pairs, rank_of
from common.errors import AdapterError
from common.messages import Tensors
from server.aggregation.base import RoundState, register
from server.aggregation.exact import ExactMean, beside
from server.aggregation.low_rank import refactor


@register("flexlora")
class FlexLoRA(ExactMean):
    """Updates may come at any rank up to the plan's; the global adapter is kept in the order of its SVD."""

    def init(self, adapter: Tensors) -> RoundState:
        """No memory, nothing folded.

        Raises:
            AdapterError: the rank exceeds the width of an adapted module.
        """
        for _, a in lora_pairs(adapter):
            rank, width = adapter[a].shape
            if rank > width:
                raise AdapterError(f"lora.r = {rank} exceeds the input width {width} of '{a}'; choose a smaller rank")
        return super().init(adapter)

    def accumulate(self, state: RoundState, update: Tensors, weight: float) -> RoundState:
        """Fills the update up with zeros to the plan's rank: of what a site did not receive it changes nothing.

        Raises:
            AdapterError: the update does not fit at its rank, or not the round's earlier replies.
        """
        return super().accumulate(state, filled_up(state.adapter, update), weight)

    def finish(self, state: RoundState) -> tuple[RoundState, AdapterState]:
        """Means of the factors plus residual, cut to the plan's rank; a pair that did not change keeps its bits."""
        after, adapter = super().finish(state)
        residuals = self.residuals(state)
        for b, a in lora_pairs(adapter):
            if b not in residuals:
                continue
            moved = any(not np.array_equal(adapter[name], state.adapter[name]) for name in (b, a))
            if moved or residuals[b][0].size:
                adapter[b], adapter[a] = refactor(*beside(adapter, b, a, residuals[b]), rank=len(adapter[a]))
        return replace(after, adapter=adapter), dict(adapter)


def filled_up(adapter: Tensors, update: Tensors) -> Tensors:
    """An update of a smaller rank with zeros in the adapter's further columns of B and rows of A.

    Raises:
        AdapterError: its rank is larger, or its pairs have different ranks.
    """
    rank, full = rank_of(update), rank_of(adapter)
    if rank is None or full is None or rank == full:
        return update
    filled = {name: update[name] for name in update}
    for b, a in lora_pairs(filled):
        if filled[b].shape[1:] != (rank,) or filled[a].shape[:1] != (rank,) or rank > full:
            raise AdapterError(f"update: '{b}' {list(filled[b].shape)} does not fit the global adapter at rank {rank}")
        filled[b] = np.pad(filled[b], ((0, 0), (0, full - rank)))
        filled[a] = np.pad(filled[a], ((0, full - rank), (0, 0)))
    return filled
