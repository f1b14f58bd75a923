"""Per-example gradients by Opacus's hooks, with proof that no trainable parameter escapes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import nn

from common.errors import CoverageError


def check_coverage(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses trainable parameters for which Opacus has no exact per-example rule.

    Raises:
        CoverageError: names the first parameter that would escape clipping, and its module's type.
    """
    uncovered: dict[int, str] = {}  # of a parameter with several owners, each has to be covered
    for name, module in model.named_modules():
        if type(module) not in GradSampleModule.GRAD_SAMPLERS:
            own = module.parameters(recurse=False)
            uncovered.update({id(parameter): f"{name} ({type(module).__name__})" for parameter in own})
    expected = {id(parameter) for parameter in parameters.values()}
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable.keys() != expected:
        extra = [name for key, name in trainable.items() if key not in expected]
        frozen = [name for name, parameter in parameters.items() if id(parameter) not in trainable]
        raise CoverageError(
            f"privacy: '{(extra + frozen)[0]}' {'trains beside' if extra else 'is frozen among'} the parameters of the "
            "phase, so it would escape clipping; this is a defect"
        )
    for name, parameter in parameters.items():
        if id(parameter) in uncovered:
            raise CoverageError(
                f"privacy: '{name}' in {uncovered[id(parameter)]} has no exact per-example gradient, so it would "
                "escape clipping; adapt linear modules only (lora.target_modules)"
            )


@contextmanager
def per_sample_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Within it, ``backward`` of a *sum* of per-example losses fills ``parameter.grad_sample`` [B, *shape].

    Yields a function that forgets what a failed forward or backward pass left half done.

    Raises:
        CoverageError: a trainable parameter is not covered.
    """
    check_coverage(model, parameters)
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():
            # The lowest adapted layer's input is a constant, which is the point of a frozen prefix.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            yield lambda: _forget(model, parameters)
    finally:
        hooks.cleanup()


def _forget(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for module in model.modules():
        for attribute in ("activations", "max_batch_len"):
            module.__dict__.pop(attribute, None)  # not hasattr: PEFT's wrappers answer for the modules they wrap
    for parameter in parameters.values():
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter._forward_counter = 0  # type: ignore[attr-defined]
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample


def finite_rows(parameters: Mapping[str, nn.Parameter], rows: int) -> torch.Tensor:
    """Zeroes the gradient of every example that has a non-finite entry anywhere; returns the mask [rows] of the others.

    Such an example contributes exactly zero, so whether a release is sent and what it weighs never depends on it.

    Raises:
        CoverageError: a parameter received no per-example gradient of the expected shape.
    """
    finite: torch.Tensor | None = None
    for name, parameter in parameters.items():
        gradient = getattr(parameter, "grad_sample", None)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != (rows, *parameter.shape):
            raise CoverageError(f"privacy: '{name}' received no per-example gradient; it cannot be clipped")
        here = torch.isfinite(gradient.flatten(1).float().norm(dim=1))
        finite = here if finite is None else finite & here
    assert finite is not None
    if not bool(finite.all()):
        for parameter in parameters.values():
            parameter.grad_sample[~finite] = 0.0  # type: ignore[attr-defined]
    return finite
