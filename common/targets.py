"""Which linear maps of a network get a LoRA pair."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from common.errors import ModelError, did_you_mean
from common.sections import LoraSection

ATTENTION_DEFAULTS = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
)
"""Query and value of the known families; where one map makes query, key and value, that one."""

TRANSPOSED = "Conv1D"
"""GPT-2's linear map, which keeps its weights as [in, out]."""


def target_modules(encoder: nn.Module, lora: LoraSection) -> tuple[str, ...]:
    """The names of the modules to adapt: those of the settings, or the family's query and value.

    Raises:
        ModelError: there is no linear module of such a name; tells the nearest.
    """
    linears = {
        name.rsplit(".", 1)[-1]
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == TRANSPOSED
    }
    for wanted in lora.target_modules:
        if wanted not in linears:
            raise ModelError(
                f"lora.target_modules: the model has no linear module '{wanted}'{did_you_mean(wanted, linears)}"
            )
    if lora.target_modules:
        return lora.target_modules
    for names in ATTENTION_DEFAULTS:
        if set(names) <= linears:
            return names
    raise ModelError(f"lora.target_modules: no default for this model; name some of {', '.join(sorted(linears))}")


def stored_transposed(encoder: nn.Module, targets: Iterable[str]) -> bool:
    """Whether all targets keep their weights as [in, out]."""
    chosen = set(targets)
    kinds = {type(module).__name__ for name, module in encoder.named_modules() if name.rsplit(".", 1)[-1] in chosen}
    return kinds == {TRANSPOSED}
