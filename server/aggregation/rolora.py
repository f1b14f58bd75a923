"""RoLoRA (Chen et al. 2025, arXiv 2502.01755): sites train B in one round and A in the next.

In a round the other matrix is the same at all sites, so aggregation has no error: mean(B_k)·A = mean(B_k·A), and
likewise for A. Under DP noise enters linearly, as in ``ffa``, and each release has half the coordinates; but A gets a
budget of its own, and while B is small its gradient drowns in the noise. With secure sums: works as it is.
"""

from __future__ import annotations

from common.errors import AdapterError
from common.messages import Tensors
from server.aggregation.base import FedOpt, register


@register("rolora")
class RoLoRA(FedOpt):
    """Averages the matrix of the round (and the head); each keeps its own moments while the other is trained."""

    def check(self, adapter: Tensors, update: Tensors) -> None:
        """Refuses an update of both matrices."""
        moved = {matrix for matrix in ("lora_A", "lora_B") if any(f".{matrix}." in name for name in update)}
        if len(moved) > 1:
            raise AdapterError("update: both A and B; in rolora a round trains one of them")
        super().check(adapter, update)
