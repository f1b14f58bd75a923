"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313, §3): A is frozen at a public, orthonormal start; B is averaged exactly.

With one A for all, mean(B_k)·A = mean(B_k·A), so aggregation has no error, and DP noise enters linearly. With secure
sums: works as it is.
"""

from __future__ import annotations

from common.errors import AdapterError
from common.messages import Tensors
from server.aggregation.base import FedOpt, register


@register("ffa")
class FFALoRA(FedOpt):
    """Averages B (and the head); an update of A is a layout error."""

    def check(self, adapter: Tensors, update: Tensors) -> None:
        """Refuses an update of A."""
        frozen = [name for name in update if ".lora_A." in name]
        if frozen:
            raise AdapterError(f"update: '{frozen[0]}' is frozen in {self.name}")
        super().check(adapter, update)
