"""A resident base model with one LoRA adapter (and head) attached: load a state, choose what trains, run it.

This is what callers hold. What it is made of has a module each: the tensors that PEFT put in (``attachment.py``), what
stands behind the encoder (``readout.py``), prefix and top (``cuts.py``), the adapter before round 1 (``start.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from common import start, tensor_groups
from common.adapter import AdapterSpec, AdapterState, rank_of
from common.attachment import Attachment
from common.cuts import Cut, CutModel
from common.messages import Tensors
from common.model import BaseModel
from common.readout import Readout
from common.sections import LoraSection, PhaseSection
from common.tasks.base import Task
from common.tensor_groups import Group


class AdaptedModel:
    """Base model + LoRA + head under PEFT, with canonical tensor names.

    Raises:
        ModelError: a target module does not exist, or the head cannot be trained with the chosen pooling.
    """

    def __init__(self, base: BaseModel, task: Task, lora: LoraSection) -> None:
        self.base, self.task, self.lora = base, task, lora
        self.original = self
        """The model that this one is a replica of."""
        self._readout = Readout(base, task)
        self._attachment = Attachment(base, task, lora, self._readout.heads)
        self._cut = CutModel(self._attachment, self._readout)
        self._parameters = {**self._readout.map_parameters, **self._attachment.parameters}
        self.spec = AdapterSpec.of(base.digest, {name: tuple(p.shape) for name, p in self._parameters.items()})
        self.network = base.network
        self.peft = self._attachment.peft
        """The network as PEFT sees it."""
        self.first_adapted = self._attachment.first_adapted
        """The lowest layer that has a LoRA pair."""
        self.levels = self._readout.levels
        """How many of the topmost hidden states are pooled."""
        self.width = self._readout.width
        """Entries H of a hidden state."""
        self.feature_width = self._readout.feature_width
        """Entries of the frozen features of an example: pooled states of all levels, joined."""
        self.maps_features = self._readout.map is not None
        """Whether a public linear map stands before the head."""

    def replica(self) -> AdaptedModel:
        """Another model for another thread: it shares the frozen weights, and has an adapter of its own."""
        own = {id(parameter) for parameter in self._parameters.values()}
        frozen = [one for one in (*self.peft.parameters(), *self.peft.buffers()) if id(one) not in own]
        shared = [*frozen, self.task, self.base.tokenizer, self.base.placement]
        twin = copy.deepcopy(self, {id(one): one for one in shared})
        twin.original = self.original
        return twin

    # ---- tensors ----------------------------------------------------------------------------------------------

    def group_of(self, name: str) -> Group:
        """Whether a tensor is the head, an A or a B matrix, or of the feature map."""
        return tensor_groups.group_of(name)

    def trained_in(self, phase: PhaseSection, round: int) -> tuple[str, ...]:
        """Names of exactly the tensors a site trains (and releases) in a round of this phase, from 1. Sorted.

        Raises:
            ModelError: the phase asks for more layers than there are.
        """
        return tensor_groups.trained_in(phase, round, self.spec.names, self._attachment.depth)

    def initial_state(self, seed: int, orthonormal: bool, feature_map: Tensors | None = None) -> AdapterState:
        """The adapter before round 1, from public information only (:func:`common.start.initial_state`)."""
        return start.initial_state(self.spec, self._cut, seed, orthonormal, feature_map)

    def load(self, state: Tensors) -> None:
        """Puts a full adapter state in place, at whatever rank it has; the scale of ``B A`` stays as it is.

        Raises:
            AdapterError: another layout.
        """
        self.spec.at_rank(rank_of(state) or self.lora.r).check(state, "adapter")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if parameter.shape != state[name].shape:
                    parameter.data = parameter.new_empty(state[name].shape)
                parameter.copy_(torch.from_numpy(np.asarray(state[name])))

    def state(self, names: Iterable[str] | None = None) -> AdapterState:
        """A copy of the adapter's tensors as fp32 arrays."""
        chosen = self.spec.names if names is None else tuple(names)
        return {name: self._parameters[name].detach().float().cpu().numpy().copy() for name in chosen}

    def peft_config(self, lora: LoraSection | None = None) -> dict[str, Any]:
        """PEFT's own description of the adapter (:meth:`common.attachment.Attachment.peft_config`)."""
        return self._attachment.peft_config(lora)

    # ---- training and running it ------------------------------------------------------------------------------

    def training(self, names: Iterable[str]) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Within it exactly these tensors are trainable; gives them by name. Everything stays in eval mode but the
        adapter's own linear maps and dropout, so no row's result depends on another row."""
        return self._attachment.training(names)

    def cut_for(self, names: Iterable[str], state: Tensors) -> Cut:
        """The latest point up to which activations do not depend on anything that is trained or adapted.

        Args:
            names: of the tensors that are trained.
            state: the whole adapter.
        """
        return self._cut.cut_for(names, state)

    @property
    def layer_cut(self) -> Cut:
        """The cut before the first adapted layer; ``INPUT`` where there is none."""
        return self._cut.layer_cut

    def prefix(self, ids: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen activations up to the cut, from token ids and mask [B, T]: [B, feature width] or [B, T, H]."""
        return self._cut.prefix(ids, mask, cut)

    def features(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen features [B, feature width] from what ``prefix`` returned at a layer cut."""
        return self._cut.features(hidden, mask, cut)

    def top(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Logits from what ``prefix`` returned at a cut; at ``INPUT`` from the token ids [B, T]."""
        return self._cut.top(hidden, mask, cut)
