"""Per-example gradients inside the backward pass itself, at the price of the batch gradient that they replace.

A trained linear map y = x·Wᵀ + b gets a forward pass of its own. Its backward pass returns the gradient of the input as
always, and in place of the batch's weight gradient Σᵢ gᵢᵀxᵢ it keeps each example's gᵢᵀxᵢ, summed over the example's
positions: the same multiplications, as one batched product (the outer products of Goodfellow 2015, arXiv 1510.01799,
kept per example; "book-keeping" of Bu et al. 2022, arXiv 2210.00038). What autograd itself gives a trained parameter is
then nothing, unless the parameter is used in another way as well, and that is refused.

=====================================  ================================================================================
case                                   what happens
=====================================  ================================================================================
a module runs several times            its gradients are added up, per example
two modules share a parameter          likewise
recomputation (checkpointing)          counts once, reentrant or not
a second backward pass                 ``grad_sample`` becomes a list of batches, as with Opacus
bf16 or fp16 activations               products are summed in fp32, and ``grad_sample`` is fp32
a parameter used past its module       ``CoverageError`` (PEFT's adapters of fused attention or of experts)
rows that are not the loss's rows      ``CoverageError``, here or when the rows are clipped; where numbers coincide by
                                       chance, :mod:`client.privacy.row_independence` tells
=====================================  ================================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from client.privacy.linear_maps import LinearMap, OwnWeights, Rows, map_of
from common.errors import CoverageError

LINEAR = (nn.Linear, Conv1D)
"""Types with a fused rule; exactly these, since a subclass may compute something else."""

RULED = (nn.RMSNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d)
"""Types for which Opacus's own rule is exact. Not ``Embedding``: its rule counts padding, and costs [B, V, H]."""

Forward = Callable[[torch.Tensor], torch.Tensor]
Rule = Callable[[nn.Module, list[torch.Tensor], torch.Tensor], Mapping[nn.Parameter, torch.Tensor]]
"""Opacus's signature: (module, inputs, gradient of the output) → gradient [B, *shape] of each trained parameter."""


def has_rule(module: nn.Module) -> bool:
    """Whether the per-example gradients of the module's own parameters are exact."""
    known = type(module) in (*LINEAR, nn.LayerNorm, *RULED)
    # A replaced forward pass computes something else, and Opacus's rule pads every convolution with zeros.
    return known and "forward" not in module.__dict__ and getattr(module, "padding_mode", "zeros") == "zeros"


class RowGradients:
    """What one context has collected: ``parameter.grad_sample`` [B, *shape], fp32 (fp64 of an fp64 parameter).

    Args:
        places: id of each trained parameter → its name and modules, for messages.
        own: what the sites that share a pass have in place of the model's own parameters.
    """

    def __init__(self, places: Mapping[int, str], own: OwnWeights | None = None) -> None:
        self.places, self.own = places, own
        self.closed = False
        # Makes a map's output differentiable where its input is a constant; gets no gradient itself.
        self.anchor = torch.empty(0, requires_grad=True)
        self._backward, self._rows = -1, 0
        self._passes: dict[int, int] = {}  # id of a parameter → the backward pass that it got its last gradient in

    @property
    def stretches(self) -> Rows | None:
        """Over which rows gradients are summed; ``None``: each row's is kept."""
        return self.own.rows if self.own is not None and self.own.summed else None

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor, backward: int) -> None:
        """Adds a module's contribution to the rows of a parameter.

        Args:
            gradient: [B, *shape].
            backward: which backward pass it belongs to.

        Raises:
            CoverageError: the rows are not those of the other modules, or nobody waits for them any more.
        """
        if self.closed:
            raise self.refusal(parameter, "got a gradient after the step had ended; this is a defect")
        if backward != self._backward:
            self._backward, self._rows = backward, len(gradient)
        if gradient.shape != (self._rows, *parameter.shape):
            raise self.refusal(
                parameter,
                f"works on {len(gradient)} rows where others work on {self._rows}; only modules whose inputs have one "
                "row per example can be trained",
            )
        before = getattr(parameter, "grad_sample", None)
        if before is None:
            parameter.grad_sample = gradient  # type: ignore[attr-defined]
        elif self._passes.get(id(parameter)) == backward:
            last = before[-1] if isinstance(before, list) else before
            last += gradient
        else:
            batches = before if isinstance(before, list) else [before]
            parameter.grad_sample = [*batches, gradient]  # type: ignore[attr-defined]
        self._passes[id(parameter)] = backward

    def refuse_outside(self, parameter: nn.Parameter) -> Callable[[torch.Tensor | None], None]:
        """A hook for gradients that reach a parameter past its modules' rules: they would escape clipping."""

        def refuse(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                raise self.refusal(
                    parameter,
                    "is also used past its module, so a part of its gradient would escape clipping; adapt plain linear "
                    "modules only (lora.target_modules)",
                )

        return refuse

    def refusal(self, parameter: nn.Parameter, reason: str) -> CoverageError:
        """An error that names the parameter and its modules."""
        return CoverageError(f"privacy: {self.places[id(parameter)]} {reason}")


def forward_of(module: nn.Module, gradients: RowGradients) -> Forward:
    """A forward pass in place of the module's own, equal to it but for rounding, that keeps per-example gradients."""
    return _linear(module, gradients) if type(module) in LINEAR else _ruled(module, gradients)


# -------------------------------------------------------------------------------------------------------- linear maps


def _batch_of(module: nn.Module, input: torch.Tensor, gradients: RowGradients) -> torch.Tensor:
    """The input, which must have a dimension for the examples."""
    if input.dim() < 2:
        parameter = next(parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)
        raise gradients.refusal(parameter, f"gets an input of shape {tuple(input.shape)}, without a row per example")
    return input


def _linear(module: Any, gradients: RowGradients) -> Forward:
    transposed = type(module) is Conv1D

    def forward(input: torch.Tensor) -> torch.Tensor:
        dtype = None
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input = input.to(dtype)
        linear = map_of(module.weight, module.bias, transposed, gradients.own, dtype)
        if not torch.is_grad_enabled():  # evaluation, or the first run of a reentrant checkpoint
            return linear.product(input)
        input = _batch_of(module, input, gradients)
        trained = _Trained(
            module.weight if module.weight.requires_grad else None,
            module.bias if module.bias is not None and module.bias.requires_grad else None,
            transposed,
            gradients,
            torch._C._current_graph_task_id(),
        )
        output: torch.Tensor = _Linear.apply(input, linear, trained, gradients.anchor)  # type: ignore[no-untyped-call]
        return output

    # Conv1D calls its argument x, and nobody passes either by name.
    return forward


@dataclass(frozen=True)
class _Trained:
    """Where the gradients of one run of a linear map go."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    transposed: bool
    """Whether the weight is stored as [in, out]."""
    gradients: RowGradients
    within: int
    """The backward pass in which this run was recomputed by a reentrant checkpoint; -1 for an ordinary run."""


class _Linear(torch.autograd.Function):
    """y [B, …, out] = x [B, …, in] · Wᵀ [out, in] + b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: LinearMap, trained: _Trained, anchor: torch.Tensor) -> torch.Tensor:
        ctx.linear, ctx.trained = linear, trained
        # The weights only so that autograd notices if they change before the backward pass.
        ctx.save_for_backward(None if trained.weight is None else x, linear.weight)
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, _ = ctx.saved_tensors
        trained: _Trained = ctx.trained
        backward = torch._C._current_graph_task_id() if trained.within < 0 else trained.within
        stretches = trained.gradients.stretches
        with torch.autocast(gradient.device.type, enabled=False):
            if trained.weight is not None:
                rows = _products(x, gradient, stretches) if trained.transposed else _products(gradient, x, stretches)
                trained.gradients.add(trained.weight, rows, backward)
            if trained.bias is not None:
                exact = _exact(gradient)  # never autograd's own tensor: it may be the gradient of other modules too
                rows = (
                    gradient.to(exact, copy=True)
                    if gradient.dim() == 2
                    else gradient.flatten(1, -2).sum(1, dtype=exact)
                )
                rows = rows if stretches is None else stretches.summed(rows)
                trained.gradients.add(trained.bias, rows, backward)
            back = ctx.linear.back(gradient) if ctx.needs_input_grad[0] else None
        return back, None, None, None


def _exact(tensor: torch.Tensor) -> torch.dtype:
    """The format in which gradients are summed and kept."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _products(left: torch.Tensor, right: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Σ over positions of leftᵀ·right: per example, or summed over each stretch of rows."""
    if rows is None:
        return _outer(left, right)
    if left.dim() > 2:
        return rows.summed(_outer(left, right))
    left, right = left.to(_exact(left)), right.to(_exact(right))
    return torch.stack([left[run].t() @ right[run] for _, run in rows.runs])


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ over positions of leftᵀ·right, per example: [B, …, m], [B, …, n] → [B, m, n]. Products are summed in fp32."""
    if left.dim() == 2:
        return left.to(_exact(left)).unsqueeze(2) * right.to(_exact(right)).unsqueeze(1)
    left, right = left.flatten(1, -2), right.flatten(1, -2)
    if left.shape[-1] <= right.shape[-1]:
        return _batched(left.transpose(1, 2), right)
    return _batched(right.transpose(1, 2), left).transpose(1, 2).contiguous()  # few rows are faster than few columns


def _batched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    exact = _exact(left)
    if left.dtype == exact:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=exact)
    return torch.bmm(left.to(exact), right.to(exact))


# ---------------------------------------------------------------------------------------------- modules by other rules


def _ruled(module: nn.Module, gradients: RowGradients) -> Forward:
    """Rules that want the module's input and the gradient of its output, no more."""
    plain: Forward = module.forward
    rule: Rule = _layer_norm if type(module) is nn.LayerNorm else GradSampleModule.GRAD_SAMPLERS[type(module)]
    twin = copy.copy(module)  # computes the same without letting autograd see the parameters

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return plain(input)
        own = {name: None if value is None else value.detach() for name, value in module._parameters.items()}
        twin.__dict__["_parameters"] = own
        output: torch.Tensor = twin.forward(_batch_of(module, input, gradients))
        if not output.requires_grad:
            output.requires_grad_()
        within, seen = torch._C._current_graph_task_id(), input.detach()

        def keep(gradient: torch.Tensor) -> None:
            backward = torch._C._current_graph_task_id() if within < 0 else within
            with torch.autocast(gradient.device.type, enabled=False), torch.no_grad():
                exact = _exact(gradient)
                for parameter, rows in rule(module, [seen.to(exact)], gradient.detach().to(exact)).items():
                    gradients.add(parameter, rows.to(exact, copy=True), backward)

        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    return forward


def _layer_norm(module: Any, inputs: list[torch.Tensor], gradient: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    """As Opacus's, which takes a bias for granted."""
    shape = module.normalized_shape
    positions = tuple(range(1, gradient.dim() - len(shape)))
    rows = {}
    if module.weight is not None and module.weight.requires_grad:
        normal = functional.layer_norm(inputs[0], shape, eps=module.eps)
        rows[module.weight] = (normal * gradient).sum(positions) if positions else normal * gradient
    if module.bias is not None and module.bias.requires_grad:
        rows[module.bias] = gradient.sum(positions) if positions else gradient
    return rows
