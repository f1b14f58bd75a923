"""A resident base model with one LoRA adapter (and head) attached: load a state, choose what trains, run it.

The model is cut into ``prefix`` (a constant of the example, cacheable) and ``top`` (what training changes). Every
trainer and evaluator goes through these two, so a cached and an uncached run execute the same top.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from common.adapter import FEATURE_MAP, AdapterSpec, AdapterState, kaiming_rows, orthonormal_rows, rank_of
from common.algorithms import LOCAL_RULES
from common.errors import ModelError
from common.messages import Tensors
from common.model import BaseModel, can_checkpoint, checkpointed, layer_stack, pool, top_of
from common.sections import LoraSection, PhaseSection
from common.targets import stored_transposed, target_modules
from common.tasks.base import Task

Group = Literal["head", "A", "B", "map"]
"""What a tensor is: the task's head, the A (down) or B (up) matrix of a LoRA pair, or the public feature map."""


@dataclass(frozen=True)
class Cut:
    """Where the frozen prefix ends: before layer ``layer``, or (``None``) after pooling, right before the head."""

    layer: int | None

    def key(self) -> str:
        """A name for caches."""
        return "features" if self.layer is None else f"layer{self.layer}"


INPUT = Cut(0)
"""No prefix: the top is the whole model and starts from token ids."""


class AdaptedModel:
    """Base model + LoRA + head under PEFT, with canonical tensor names.

    Raises:
        ModelError: a target module does not exist, or the head cannot be trained with the chosen pooling.
    """

    def __init__(self, base: BaseModel, task: Task, lora: LoraSection) -> None:
        self.base, self.task, self.lora = base, task, lora
        self.original = self
        """The model that this one is a replica of."""
        self.network = base.network
        self._encoder = base.encoder
        self._targets = target_modules(self._encoder, lora)
        self.depth = len(layer_stack(self._encoder) or ())
        self.first_adapted = self._first_adapted()
        self._heads = self._head_names()
        self.levels = task.settings.feature_levels if self._pools and task.settings.maps_features else 1
        self._map = self._feature_map()
        self.peft: PeftModel = self._attach()
        self._parameters = self._canonical_parameters()
        self.spec = AdapterSpec.of(base.digest, {name: tuple(p.shape) for name, p in self._parameters.items()})
        self._tops: dict[int, nn.Module | None] = {}

    def replica(self) -> AdaptedModel:
        """Another model for another thread: it shares the frozen weights, and has an adapter of its own."""
        own = {id(parameter) for parameter in self._parameters.values()}
        frozen = [one for one in (*self.peft.parameters(), *self.peft.buffers()) if id(one) not in own]
        shared = [*frozen, self.task, self.base.tokenizer, self.base.placement]
        twin = copy.deepcopy(self, {id(one): one for one in shared})
        twin.original = self.original
        return twin

    # ---- layout -----------------------------------------------------------------------------------------------

    def _first_adapted(self) -> int:
        if self.lora.layers is None:
            return 0
        if not self.depth:
            raise ModelError("lora.layers: this model has no plain stack of layers to choose from; leave it empty")
        if self.lora.layers > self.depth:
            raise ModelError(f"lora.layers = {self.lora.layers}: the model has only {self.depth} layers")
        return self.depth - self.lora.layers

    def _head_names(self) -> tuple[str, ...]:
        """Top-level modules beside the encoder that hold parameters: the task's head."""
        if self.task.peft_type == "CAUSAL_LM":
            return ()
        prefix = self.network.base_model_prefix
        heads = {
            name: module
            for name, module in self.network.named_children()
            if name != prefix and any(True for _ in module.parameters())
        }
        if self.base.pooling != "model" and [type(module) for module in heads.values()] != [nn.Linear]:
            raise ModelError(
                f"task.pooling = '{self.base.pooling}': this model's head ({', '.join(heads)}) is not one linear map; "
                "use task.pooling = 'model'"
            )
        return tuple(heads)

    def _attach(self) -> PeftModel:
        everywhere = self.first_adapted == 0
        config = LoraConfig(
            task_type=self.task.peft_type,
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]  # PEFT divides; a float is exact
            lora_dropout=self.lora.dropout,
            use_rslora=self.lora.use_rslora,
            target_modules=list(self._targets),
            fan_in_fan_out=stored_transposed(self._encoder, self._targets),
            layers_to_transform=None if everywhere else list(range(self.first_adapted, self.depth)),
            modules_to_save=list(self._heads) or None,
            bias="none",
        )
        peft = get_peft_model(self.network, config)
        peft.eval()
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return peft

    @property
    def maps_features(self) -> bool:
        """Whether a public linear map stands before the head."""
        return self._map is not None

    @property
    def width(self) -> int:
        """Entries H of a hidden state."""
        return int(self.network.config.hidden_size)

    @property
    def feature_width(self) -> int:
        """Entries of the frozen features of an example: pooled states of all levels, joined."""
        return self.levels * self.width

    def _feature_map(self) -> nn.Linear | None:
        settings = self.task.settings
        if not (self._pools and settings.maps_features):
            return None
        rank = settings.feature_rank or 0
        if self.depth < self.levels or not 1 <= rank <= self.width:
            raise ModelError(
                f"task.feature_levels = {self.levels}, task.feature_rank = {rank}: the model has "
                f"{self.depth} layers of width {self.width}; lower them, or set task.feature_map = 'none'"
            )
        return nn.Linear(self.feature_width, rank, device=self.base.placement.device)

    def _canonical_parameters(self) -> dict[str, nn.Parameter]:
        """Canonical PEFT name → parameter, for everything the adapter consists of."""
        found = {}
        if self._map is not None:
            found.update({f"{FEATURE_MAP}{name}": one for name, one in self._map.named_parameters()})
            self._map.requires_grad_(False)
        for name, parameter in self.peft.named_parameters():
            if parameter.requires_grad:
                found[name.replace(".modules_to_save.default", "").replace(".default", "")] = parameter
        return found

    def group_of(self, name: str) -> Group:
        """Whether a tensor is the head, an A or a B matrix."""
        if name.startswith(FEATURE_MAP):
            return "map"
        if ".lora_A." in name:
            return "A"
        return "B" if ".lora_B." in name else "head"

    def layer_of(self, name: str) -> int | None:
        """The layer a LoRA tensor sits in, counted from the input; ``None`` for the head."""
        if self.group_of(name) in ("head", "map"):
            return None
        return next((int(part) for part in name.split(".") if part.isdigit()), None)

    def trained_in(self, phase: PhaseSection, round: int) -> tuple[str, ...]:
        """Names of exactly the tensors a site trains (and releases) in a round of this phase, from 1. Sorted."""
        wanted: set[Group] = {"head"} if "head" in phase.train else set()
        if "lora" in phase.train:
            wanted.update(LOCAL_RULES[phase.algorithm].trains(round))
        if phase.layers is not None and phase.layers > self.depth:
            raise ModelError(f"phase.{phase.name}.layers = {phase.layers}: the model has only {self.depth} layers")
        lowest = 0 if phase.layers is None else self.depth - phase.layers
        return tuple(
            name
            for name in self.spec.names
            if self.group_of(name) in wanted and ((layer := self.layer_of(name)) is None or layer >= lowest)
        )

    # ---- state ------------------------------------------------------------------------------------------------

    def initial_state(self, seed: int, orthonormal: bool, feature_map: Tensors | None = None) -> AdapterState:
        """The adapter before round 1, from public information only: B = 0, A from the public seed, head per task.

        A has orthonormal rows (``ffa``), or LoRA's usual uniform entries (Hu et al. 2021, arXiv 2106.09685).

        Args:
            feature_map: what the coordinator has made (``server/feature_map.py``), where the model has one; else zero.
        """
        state: AdapterState = {}
        for name, shape in self.spec.shapes:
            if self.group_of(name) != "A":
                state[name] = np.zeros(shape, np.float32)
            elif orthonormal:
                state[name] = orthonormal_rows(shape[0], shape[1], seed, name)
            else:
                state[name] = kaiming_rows(shape[0], shape[1], seed, name)
        state.update(feature_map or {})
        if self._map is not None:
            with torch.no_grad():
                for name, parameter in self._map.named_parameters():
                    parameter.copy_(torch.from_numpy(state[f"{FEATURE_MAP}{name}"]))
        if self._heads:
            state.update(self._initial_head())
        return state

    def _initial_head(self) -> AdapterState:
        """Row k of a linear head = the centred, scaled embedding of label name k (public text); biases zero."""
        settings = self.task.settings
        weights = [name for name in self.spec.names if self.group_of(name) == "head" and name.endswith("weight")]
        if settings.head_init != "label-names" or self.base.pooling == "model" or len(weights) != 1:
            return {}
        embedded = self._embed(list(settings.labels))
        scale = settings.head_scale or (1.0 if self._map is None else 3.0)
        embedded -= embedded.mean(axis=0)
        norms = np.linalg.norm(embedded, axis=1, keepdims=True)
        return {weights[0]: np.ascontiguousarray(scale * embedded / np.maximum(norms, 1e-6), np.float32)}

    def _embed(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = []
        for text in texts:
            ids = torch.tensor([self.base.tokenizer(text)["input_ids"]], device=self.base.placement.device)
            with torch.no_grad():
                features = self._mapped(self.prefix(ids, torch.ones_like(ids), Cut(None)))
            rows.append(features[0].float().cpu().numpy())
        return np.stack(rows)

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

    @contextmanager
    def training(self, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
        """Makes exactly these tensors trainable; yields them by name. Everything stays in eval mode but the adapter's
        own leaf modules (linear maps and dropout), so no row's result depends on another row."""
        chosen = {name: self._parameters[name] for name in names}
        wanted = {id(parameter) for parameter in chosen.values()}
        touched = []
        for parameter in self._parameters.values():
            parameter.requires_grad_(id(parameter) in wanted)
        checkpointing = checkpointed(self._recomputed_layers(chosen))
        for module, parameters in self._adapter_modules:
            if not parameters or any(id(parameter) in wanted for parameter in parameters):
                module.train()
                touched.append(module)
        try:
            with checkpointing:
                yield chosen
        finally:
            for module in touched:
                module.eval()
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    @cached_property
    def _adapter_modules(self) -> list[tuple[nn.Module, tuple[nn.Parameter, ...]]]:
        """The adapter's own leaf modules with their parameters, of which dropout has none."""
        own = {id(parameter) for parameter in self._parameters.values()}
        found = []
        for name, module in self.peft.named_modules():
            parameters = tuple(one for one in module.parameters(recurse=False) if id(one) in own)
            if parameters or (".lora_dropout." in name and isinstance(module, nn.Dropout)):
                found.append((module, parameters))
        return found

    def _recomputed_layers(self, names: Iterable[str]) -> list[nn.Module]:
        """The layers from the lowest trained one up, if their activations are to be recomputed in the backward pass."""
        trained = [layer for name in names if (layer := self.layer_of(name)) is not None]
        if not (self.base.placement.gradient_checkpointing and trained):
            return []
        layers = list(layer_stack(self._encoder) or ())[min(trained) :]
        if not layers or not can_checkpoint(layers):
            raise ModelError(
                "device.gradient_checkpointing: is not possible for this family of models; set it to false"
            )
        return layers

    # ---- prefix and top ---------------------------------------------------------------------------------------

    def cut_for(self, names: Iterable[str], state: Tensors) -> Cut:
        """The latest point up to which activations do not depend on anything that is trained or adapted.

        Training only the head cuts after pooling while every B of the adapter is still zero (the adapter then adds
        exactly nothing); else the cut lies before the first adapted layer.
        """
        only_head = all(self.group_of(name) == "head" for name in names)
        if only_head and self._pools and not any(np.any(state[n]) for n in self.spec.names if self.group_of(n) == "B"):
            return Cut(None)
        return self.layer_cut

    @property
    def _pools(self) -> bool:
        """Whether token states are pooled here; else the stock class does what it does."""
        return self.task.selects_pooling and self.base.pooling != "model"

    @property
    def layer_cut(self) -> Cut:
        """The cut before the first adapted layer; ``INPUT`` where nothing lies below it, the family is unknown, or the
        stock head pools in its own way."""
        if self.task.selects_pooling and not self._pools:
            return INPUT
        lowest = min(self.first_adapted, self.depth - self.levels + 1)  # pooled levels belong to the top
        return Cut(lowest) if lowest > 0 and self._top(lowest) is not None else INPUT

    def features(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen pooled features [B, H] from what ``prefix`` returned at a layer cut."""
        assert cut.layer
        view = self._top(cut.layer)
        assert view is not None
        with self._base_alone():
            return self._pooled(view, mask, inputs_embeds=hidden)

    def _top(self, layer: int) -> nn.Module | None:
        if layer not in self._tops:
            view = top_of(self._encoder, layer)
            self._tops[layer] = view if view is not None and self._is_exact(view, layer) else None
        return self._tops[layer]

    def _is_exact(self, view: nn.Module, layer: int) -> bool:
        """Whether a view computes what the encoder computes: families differ in what they do around their layers."""
        ids = torch.arange(1, 9, device=self.base.placement.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        with self._base_alone():
            whole = self._encode(input_ids=ids, attention_mask=mask)
            try:
                cut = view(inputs_embeds=self._hidden_before(layer, ids, mask), attention_mask=mask).last_hidden_state
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return False
                if self.levels > 1:
                    hidden = self._hidden_before(layer, ids, mask)
                    whole = self._pooled(self._encoder, mask, input_ids=ids)
                    cut = self._pooled(view, mask, inputs_embeds=hidden)
            if not self.task.selects_pooling:
                whole, cut = self._stock(ids, mask), self._head(cut)
        return cut.shape == whole.shape and torch.allclose(cut, whole, rtol=1e-4, atol=1e-5)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Without adapter and gradients. PEFT's own context leaves every tensor of the adapter trainable behind it."""
        trainable = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        try:
            with torch.no_grad(), self.peft.disable_adapter():
                yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def prefix(self, ids: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen activations: features [B, H] or hidden states [B, T, H] entering ``cut.layer``.

        Args:
            ids: token ids [B, T].
            mask: attention mask [B, T].
        """
        with self._base_alone():
            if cut.layer is None:
                return self._pooled(self._encoder, mask, input_ids=ids)
            return self._hidden_before(cut.layer, ids, mask)

    def _hidden_before(self, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        stack = layer_stack(self._encoder)
        assert stack is not None

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            raise _Reached(arguments[0] if arguments else keywords["hidden_states"])

        hook = stack[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._encode(input_ids=ids, attention_mask=mask)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the layer was not reached")

    def _encode(self, **inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._encoder(**inputs).last_hidden_state
        return states

    def top(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Logits from the cut on.

        Args:
            hidden: what ``prefix`` returned; for ``INPUT`` the token ids [B, T].
            mask: attention mask [B, T] (unused after pooling).
        """
        if cut.layer is None:
            return self._head(hidden)
        if cut == INPUT:
            if self.base.pooling == "model":
                return self._stock(hidden, mask)
            network, inputs = self._encoder, {"input_ids": hidden}
        else:
            view = self._top(cut.layer)
            assert view is not None
            network, inputs = view, {"inputs_embeds": hidden}
        if self.task.selects_pooling:
            return self._head(self._pooled(network, mask, **inputs))
        return self._head(network(attention_mask=mask, **inputs).last_hidden_state)

    def _pooled(self, network: nn.Module, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Pooled states [B, levels · H] of the top levels, the lowest first."""
        states: list[torch.Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            states.append(arguments[0] if arguments else keywords["hidden_states"])

        # Not output_hidden_states: the top's view and the encoder share layers, and each would record for the other.
        stack = list(layer_stack(self._encoder) or ())
        upper = stack[len(stack) - self.levels + 1 :]
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in upper]
        try:
            states.append(network(attention_mask=mask, **inputs).last_hidden_state)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([pool(one, mask, self.base.pooling) for one in states], dim=-1)

    def _mapped(self, features: torch.Tensor) -> torch.Tensor:
        """What the head sees of pooled features [B, levels · H]: them, or those of the map filled up to [B, H]."""
        if self._map is None:
            return features
        mapped = self._map(features.float())
        return functional.pad(mapped, (0, self.width - mapped.shape[-1]))

    def _stock(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits as the stock class computes them."""
        logits: torch.Tensor = self.network(input_ids=ids, attention_mask=mask).logits
        return logits

    def _head(self, features: torch.Tensor) -> torch.Tensor:
        """Logits from pooled features [B, H] or, for a language model, from token states [B, T, H]."""
        if not self._heads:
            output = self.network.get_output_embeddings()  # type: ignore[no-untyped-call]
            assert output is not None
            logits: torch.Tensor = output(features)
            return logits
        head: Any = getattr(self.network, self._heads[0])
        logits = head(self._mapped(features).float())
        return logits

    def peft_config(self, lora: LoraSection | None = None) -> dict[str, Any]:
        """PEFT's own description of the adapter, as plain JSON values; the base is named by digest, not by a path.

        Args:
            lora: the settings at the rank of an adapter that has another than this model's.
        """
        config = self.peft.peft_config["default"].to_dict()
        if lora is not None:
            config["r"], config["lora_alpha"] = lora.r, lora.alpha
        config["base_model_name_or_path"] = None
        config["inference_mode"] = True
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


class _Reached(Exception):
    """Carries hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden
