"""Linear maps by oneDNN, in fp32 on processors with AVX-512, where torch takes MKL.

MKL uses AVX-512 on Intel's processors alone: on an AMD EPYC oneDNN takes half the time, and three quarters of an
evaluation are linear maps. Both sum the same products in fp32, in another order, so results differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def linear_maps() -> AbstractContextManager[object]:
    """While this lasts, oneDNN computes what this thread computes without gradients, where it can."""
    return _ByOneDnn() if _known() else nullcontext()


@cache
def _known() -> bool:
    """The operator is the one torch's own compiler uses; a torch that has it no more goes on with MKL."""
    able = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return able and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _ByOneDnn(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is linear and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return _linear(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if any((one.device.type, one.dtype) != ("cpu", torch.float32) for one in (input, weight)):
        return linear(input, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found
