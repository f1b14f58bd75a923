"""Per-example gradients of a model, with proof that no trainable parameter escapes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from client.privacy.fused import LINEAR, RowGradients, forward_of, has_rule
from client.privacy.linear_maps import OwnWeights
from common.errors import CoverageError


def check_coverage(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses trainable parameters without an exact per-example rule.

    Raises:
        CoverageError: names the first parameter that would escape clipping, and its module's type.
    """
    expected = {id(parameter) for parameter in parameters.values()}
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable.keys() != expected:
        extra = [name for key, name in trainable.items() if key not in expected]
        frozen = [name for name, parameter in parameters.items() if id(parameter) not in trainable]
        raise CoverageError(
            f"privacy: '{(extra + frozen)[0]}' {'trains beside' if extra else 'is frozen among'} the parameters of the "
            "phase, so it would escape clipping; this is a defect"
        )
    uncovered: dict[int, str] = {}  # of a parameter with several owners, each has to be covered
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not has_rule(module) or own not in ("weight", "bias"):
                uncovered[id(parameter)] = f"{name} ({type(module).__name__})"
    for name, parameter in parameters.items():
        if id(parameter) in uncovered:
            raise CoverageError(
                f"privacy: '{name}' in {uncovered[id(parameter)]} has no exact per-example gradient, so it would "
                "escape clipping; adapt linear modules only (lora.target_modules)"
            )


@contextmanager
def per_sample_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], own: OwnWeights | None = None
) -> Iterator[Callable[[], None]]:
    """Within it, ``backward`` of a *sum* of per-example losses fills ``parameter.grad_sample`` [B, *shape] in fp32.

    ``parameter.grad`` stays empty. A parameter whose modules did not run has no ``grad_sample``: to clip it is refused
    by name, since a parameter that is noised and never learns is a mistake in the settings.

    Yields a function that forgets what a forward or backward pass has left, whether it was used or failed half-way.

    Args:
        own: what the sites that share a pass have in place of the model's values; the rows' gradients are then those at
            their own site's values, under the model's parameters.

    Raises:
        CoverageError: a trainable parameter is not covered; also from ``backward``, if it turns out there.
    """
    check_coverage(model, parameters)
    trained = {
        name: module
        for name, module in model.named_modules()
        if any(one.requires_grad or (own is not None and one in own) for one in module.parameters(recurse=False))
    }
    if own is not None:
        _check_own(trained, own)
    gradients = RowGradients(_places(trained, parameters), own)
    with ExitStack() as undo:
        undo.callback(setattr, gradients, "closed", True)
        undo.callback(_remove, parameters)
        _clear(parameters)
        for parameter in parameters.values():
            hook = parameter.register_hook(gradients.refuse_outside(parameter))  # type: ignore[no-untyped-call]
            undo.callback(hook.remove)
        for module in trained.values():
            replaced = forward_of(module, gradients)
            undo.callback(module.__dict__.pop, "forward")
            module.__dict__["forward"] = replaced
        yield partial(_clear, parameters)


def _check_own(modules: Mapping[str, nn.Module], own: OwnWeights) -> None:
    for name, module in modules.items():
        if type(module) not in LINEAR or any(one not in own for one in module.parameters(recurse=False)):
            raise CoverageError(
                f"privacy: '{name}' ({type(module).__name__}) cannot have weights for each site; only linear maps can, "
                "all of whose tensors are trained (simulation.sites_per_pass = 1)"
            )


def _places(modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name} ({type(module).__name__})")
    return {id(parameter): f"'{name}' in {', '.join(owners[id(parameter)])}" for name, parameter in parameters.items()}


def _clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]


def _remove(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        del parameter.grad_sample  # type: ignore[attr-defined]
