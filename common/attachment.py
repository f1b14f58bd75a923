"""What PEFT puts into a base network: a LoRA pair at each adapted linear map, and a copy of the head to train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from common.errors import ModelError
from common.model import BaseModel, can_checkpoint, checkpointed, layer_stack
from common.sections import LoraSection
from common.targets import stored_transposed, target_modules
from common.tasks.base import Task
from common.tensor_groups import layer_of


class Attachment:
    """An adapter in place: its tensors in fp32, and what of it trains.

    Args:
        heads: names of the network's modules that are the task's head.

    Raises:
        ModelError: a target module or a layer does not exist.
    """

    def __init__(self, base: BaseModel, task: Task, lora: LoraSection, heads: Sequence[str]) -> None:
        self._base = base
        targets = target_modules(base.encoder, lora)
        self.depth = len(layer_stack(base.encoder) or ())
        """Layers of the encoder; 0 where they are no plain stack."""
        self.first_adapted = _first_adapted(lora, self.depth)
        """The lowest layer that has a LoRA pair."""
        config = LoraConfig(
            task_type=task.peft_type,
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides; a float is exact
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            target_modules=list(targets),
            fan_in_fan_out=stored_transposed(base.encoder, targets),
            layers_to_transform=list(range(self.first_adapted, self.depth)) if self.first_adapted else None,
            modules_to_save=list(heads) or None,
            bias="none",
        )
        self.peft: PeftModel = get_peft_model(base.network, config)
        self.peft.eval()
        self.parameters = _canonical(self.peft)
        """Canonical PEFT name → parameter."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The base alone, without gradients. PEFT's own context leaves every tensor of the adapter trainable."""
        trainable = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        try:
            with torch.no_grad(), self.peft.disable_adapter():
                yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)

    @contextmanager
    def training(self, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
        """Makes exactly these tensors trainable; yields them by name. Everything stays in eval mode but the adapter's
        own leaf modules (linear maps and dropout), so no row's result depends on another row."""
        chosen = {name: self.parameters[name] for name in names}
        wanted = {id(parameter) for parameter in chosen.values()}
        touched = []
        for parameter in self.parameters.values():
            parameter.requires_grad_(id(parameter) in wanted)
        checkpointing = checkpointed(self._recomputed_layers(chosen))
        for module, parameters in self._modules:
            if not parameters or any(id(parameter) in wanted for parameter in parameters):
                module.train()
                touched.append(module)
        try:
            with checkpointing:
                yield chosen
        finally:
            for module in touched:
                module.eval()
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    @cached_property
    def _modules(self) -> list[tuple[nn.Module, tuple[nn.Parameter, ...]]]:
        """The adapter's own leaf modules with their parameters, of which dropout has none."""
        own = {id(parameter) for parameter in self.parameters.values()}
        found = []
        for name, module in self.peft.named_modules():
            parameters = tuple(one for one in module.parameters(recurse=False) if id(one) in own)
            if parameters or (".lora_dropout." in name and isinstance(module, nn.Dropout)):
                found.append((module, parameters))
        return found

    def _recomputed_layers(self, names: Iterable[str]) -> list[nn.Module]:
        """The layers from the lowest trained one up, if their activations are to be recomputed in the backward pass."""
        trained = [layer for name in names if (layer := layer_of(name)) is not None]
        if not (self._base.placement.gradient_checkpointing and trained):
            return []
        layers = list(layer_stack(self._base.encoder) or ())[min(trained) :]
        if not layers or not can_checkpoint(layers):
            raise ModelError(
                "device.gradient_checkpointing: is not possible for this family of models; set it to false"
            )
        return layers

    def peft_config(self, lora: LoraSection | None = None) -> dict[str, Any]:
        """PEFT's own description of the adapter, as plain JSON values; the base is named by digest, not by a path.

        Args:
            lora: the settings at the rank of an adapter that has another than this one.
        """
        config = self.peft.peft_config["default"].to_dict()
        if lora is not None:
            config["r"], config["lora_alpha"] = lora.r, lora.alpha
        config["base_model_name_or_path"] = None
        config["inference_mode"] = True
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _first_adapted(lora: LoraSection, depth: int) -> int:
    if lora.layers is None:
        return 0
    if not depth:
        raise ModelError("lora.layers: this model has no plain stack of layers to choose from; leave it empty")
    if lora.layers > depth:
        raise ModelError(f"lora.layers = {lora.layers}: the model has only {depth} layers")
    return depth - lora.layers


def _canonical(peft: PeftModel) -> dict[str, nn.Parameter]:
    """What PEFT has made trainable, by names that do not tell under which name PEFT keeps the adapter."""
    return {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
