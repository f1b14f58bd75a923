"""What stands behind the encoder: pooling, a public feature map where the task has one, and the task's head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from common.adapter import FEATURE_MAP
from common.errors import ModelError
from common.messages import Tensors
from common.model import BaseModel, layer_stack, pool
from common.tasks.base import Task


class Readout:
    """From token states to logits.

    Raises:
        ModelError: the head cannot be trained with the chosen pooling, or the feature map does not fit the model.
    """

    def __init__(self, base: BaseModel, task: Task) -> None:
        self.base, self.task = base, task
        self.width = int(base.network.config.hidden_size)
        """Entries H of a hidden state."""
        self.pools = task.selects_pooling and base.pooling != "model"
        """Whether token states are pooled here; else the stock class does what it does."""
        self.heads = _heads(base, task)
        """Names of the network's modules that are the task's head."""
        maps = self.pools and task.settings.maps_features
        self.levels = task.settings.feature_levels if maps else 1
        """How many of the topmost hidden states are pooled."""
        self.map = self._feature_map() if maps else None
        """The public linear map before the head: the pooled states of all levels → the head's first inputs."""

    @property
    def feature_width(self) -> int:
        """Entries of the pooled states of all levels, joined."""
        return self.levels * self.width

    @property
    def map_parameters(self) -> dict[str, nn.Parameter]:
        """Canonical name → parameter of the feature map; they are never trained."""
        found = {} if self.map is None else dict(self.map.named_parameters())
        return {f"{FEATURE_MAP}{name}": parameter for name, parameter in found.items()}

    def take_map(self, state: Tensors) -> None:
        """Puts a state's feature map in place, where there is one."""
        with torch.no_grad():
            for name, parameter in self.map_parameters.items():
                parameter.copy_(torch.from_numpy(state[name]))

    def pooled(self, network: nn.Module, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Pooled states [B, levels · H] of the top levels, the lowest first.

        Args:
            network: the encoder, or a view of it that starts at a layer.
            mask: attention mask [B, T].
            inputs: what the network starts from.
        """
        states: list[torch.Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            states.append(arguments[0] if arguments else keywords["hidden_states"])

        # Not output_hidden_states: the top's view and the encoder share layers, and each would record for the other.
        stack = list(layer_stack(self.base.encoder) or ())
        upper = stack[len(stack) - self.levels + 1 :]
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in upper]
        try:
            states.append(network(attention_mask=mask, **inputs).last_hidden_state)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([pool(one, mask, self.base.pooling) for one in states], dim=-1)

    def mapped(self, features: torch.Tensor) -> torch.Tensor:
        """What the head sees of pooled features [B, levels · H]: them, or those of the map filled up to [B, H]."""
        if self.map is None:
            return features
        mapped = self.map(features.float())
        return functional.pad(mapped, (0, self.width - mapped.shape[-1]))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits from pooled features [B, levels · H] or, for a language model, from token states [B, T, H]."""
        if not self.heads:
            output = self.base.network.get_output_embeddings()  # type: ignore[no-untyped-call]
            assert output is not None
            logits: torch.Tensor = output(features)
            return logits
        head: Any = getattr(self.base.network, self.heads[0])
        logits = head(self.mapped(features).float())
        return logits

    def stock_logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits as the stock class computes them from token ids [B, T]."""
        logits: torch.Tensor = self.base.network(input_ids=ids, attention_mask=mask).logits
        return logits

    def _feature_map(self) -> nn.Linear:
        rank, depth = self.task.settings.feature_rank or 0, len(layer_stack(self.base.encoder) or ())
        if depth < self.levels or not 1 <= rank <= self.width:
            raise ModelError(
                f"task.feature_levels = {self.levels}, task.feature_rank = {rank}: the model has "
                f"{depth} layers of width {self.width}; lower them, or set task.feature_map = 'none'"
            )
        made = nn.Linear(self.feature_width, rank, device=self.base.placement.device)
        return made.requires_grad_(False)


def _heads(base: BaseModel, task: Task) -> tuple[str, ...]:
    """Top-level modules beside the encoder that hold parameters."""
    if task.peft_type == "CAUSAL_LM":
        return ()
    heads = {
        name: module
        for name, module in base.network.named_children()
        if name != base.network.base_model_prefix and any(True for _ in module.parameters())
    }
    if base.pooling != "model" and [type(module) for module in heads.values()] != [nn.Linear]:
        raise ModelError(
            f"task.pooling = '{base.pooling}': this model's head ({', '.join(heads)}) is not one linear map; "
            "use task.pooling = 'model'"
        )
    return tuple(heads)
