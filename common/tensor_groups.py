"""What a tensor of an adapter is, as its canonical name tells, and which tensors a round trains. Names only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from common.adapter import FEATURE_MAP
from common.algorithms import LOCAL_RULES
from common.errors import ModelError
from common.sections import PhaseSection

Group = Literal["head", "A", "B", "map"]
"""What a tensor is: the task's head, the A (down) or B (up) matrix of a LoRA pair, or the public feature map."""


def group_of(name: str) -> Group:
    """Whether a tensor is the head, an A or a B matrix, or of the feature map."""
    if name.startswith(FEATURE_MAP):
        return "map"
    if ".lora_A." in name:
        return "A"
    return "B" if ".lora_B." in name else "head"


def layer_of(name: str) -> int | None:
    """The layer a LoRA tensor sits in, counted from the input; ``None`` for head and feature map."""
    if group_of(name) in ("head", "map"):
        return None
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def trained_in(phase: PhaseSection, round: int, names: Iterable[str], depth: int) -> tuple[str, ...]:
    """The names of exactly the tensors a site trains (and releases) in a round of this phase, from 1; in their order.

    Args:
        names: of all tensors of the adapter.
        depth: how many layers the model has.

    Raises:
        ModelError: the phase asks for more layers.
    """
    wanted: set[Group] = {"head"} if "head" in phase.train else set()
    if "lora" in phase.train:
        wanted.update(LOCAL_RULES[phase.algorithm].trains(round))
    if phase.layers is not None and phase.layers > depth:
        raise ModelError(f"phase.{phase.name}.layers = {phase.layers}: the model has only {depth} layers")
    lowest = 0 if phase.layers is None else depth - phase.layers
    return tuple(
        name for name in names if group_of(name) in wanted and ((layer := layer_of(name)) is None or layer >= lowest)
    )
