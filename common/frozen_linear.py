"""Frozen linear maps by oneDNN, in fp32 on processors with AVX-512, where torch takes MKL.

MKL uses AVX-512 on Intel's processors alone; on an AMD EPYC a training step with LoRA takes 0.6 of its time with oneDNN
(benchmarks/frozen_linear.py). Both sum the same products in fp32, in another order, so results differ in their
last bits. Most of a training step with LoRA is the base's own maps, forward and, for the gradient of their input,
backward; their weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

FEWEST_ROWS = 16
"""With fewer rows MKL is as fast."""


class FrozenLinear(nn.Linear):
    """A linear map that oneDNN computes where it can, unless its weights train."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, in] to [..., out]."""
        if not self._suits(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            found: torch.Tensor = _Map.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return found
        return _product(input, self.weight, self.bias)

    def _suits(self, input: torch.Tensor) -> bool:
        """By shape and kind alone, never by content: which way a row is computed does not depend on other rows."""
        return (
            {(one.device.type, one.dtype) for one in (input, self.weight)} == {("cpu", torch.float32)}
            and not self.weight.requires_grad
            and input.numel() >= FEWEST_ROWS * self.in_features
            and not torch.is_autocast_enabled("cpu")
        )


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _product(gradients[0], ctx.weight.t(), None), None, None


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found


@cache
def available() -> bool:
    """Whether this processor gains by it. The operator is the one torch's own compiler uses; with a torch that has it
    no more everything goes on with MKL."""
    able = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return able and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(modules: Iterable[nn.Module]) -> None:
    """Turns the plain linear maps among frozen modules into :class:`FrozenLinear`, where that is of use."""
    for module in modules:
        if type(module) is nn.Linear and available():
            module.__class__ = FrozenLinear
