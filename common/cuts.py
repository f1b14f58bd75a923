"""Where a model is cut into ``prefix`` (a constant of the example, cacheable) and ``top`` (what training changes).

Every trainer and evaluator goes through these two, so a cached and an uncached run execute the same top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from common.attachment import Attachment
from common.messages import Tensors
from common.model import layer_stack, top_of
from common.readout import Readout
from common.tensor_groups import group_of


@dataclass(frozen=True)
class Cut:
    """Where the frozen prefix ends: before layer ``layer``, or (``None``) after pooling, right before the head."""

    layer: int | None

    def key(self) -> str:
        """A name for caches."""
        return "features" if self.layer is None else f"layer{self.layer}"


INPUT = Cut(0)
"""No prefix: the top is the whole model and starts from token ids."""


class CutModel:
    """One encoder with its adapter and readout, run in two parts."""

    def __init__(self, attachment: Attachment, readout: Readout) -> None:
        self.attachment, self.readout = attachment, readout
        self._encoder = readout.base.encoder
        self._views: dict[int, nn.Module | None] = {}

    # ---- where to cut -------------------------------------------------------------------------------------------

    def cut_for(self, names: Iterable[str], state: Tensors) -> Cut:
        """The latest point up to which activations do not depend on anything that is trained or adapted.

        Training only the head cuts after pooling while every B of the adapter is still zero (the adapter then adds
        exactly nothing); else the cut lies before the first adapted layer.
        """
        only_head = all(group_of(name) == "head" for name in names)
        pairs = (name for name in self.attachment.parameters if group_of(name) == "B")
        if only_head and self.readout.pools and not any(np.any(state[name]) for name in pairs):
            return Cut(None)
        return self.layer_cut

    @property
    def layer_cut(self) -> Cut:
        """The cut before the first adapted layer; ``INPUT`` where nothing lies below it, the family is unknown, or the
        stock head pools in its own way."""
        if self.readout.task.selects_pooling and not self.readout.pools:
            return INPUT
        # Pooled levels belong to the top.
        lowest = min(self.attachment.first_adapted, self.attachment.depth - self.readout.levels + 1)
        return Cut(lowest) if lowest > 0 and self._view(lowest) is not None else INPUT

    def _view(self, layer: int) -> nn.Module | None:
        """The encoder from a layer on; ``None`` where the family cannot be cut exactly, which is tried once."""
        if layer not in self._views:
            view = top_of(self._encoder, layer)
            self._views[layer] = view if view is not None and self._is_exact(view, layer) else None
        return self._views[layer]

    def _is_exact(self, view: nn.Module, layer: int) -> bool:
        """Whether a view computes what the encoder computes: families differ in what they do around their layers."""
        ids = torch.arange(1, 9, device=self.readout.base.placement.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        with self.attachment.switched_off():
            try:
                hidden = self._hidden_before(layer, ids, mask)
                cut = view(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return False
            whole = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.readout.levels > 1:
                whole = self.readout.pooled(self._encoder, mask, input_ids=ids)
                cut = self.readout.pooled(view, mask, inputs_embeds=hidden)
            if not self.readout.task.selects_pooling:
                whole, cut = self.readout.stock_logits(ids, mask), self.readout.logits(cut)
        return cut.shape == whole.shape and torch.allclose(cut, whole, rtol=1e-4, atol=1e-5)

    # ---- the two parts ------------------------------------------------------------------------------------------

    def prefix(self, ids: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen activations: features [B, levels · H] or hidden states [B, T, H] entering ``cut.layer``.

        Args:
            ids: token ids [B, T].
            mask: attention mask [B, T].
        """
        with self.attachment.switched_off():
            if cut.layer is None:
                return self.readout.pooled(self._encoder, mask, input_ids=ids)
            return self._hidden_before(cut.layer, ids, mask)

    def features(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Frozen pooled features [B, levels · H] from what ``prefix`` returned at a layer cut."""
        assert cut.layer
        view = self._view(cut.layer)
        assert view is not None
        with self.attachment.switched_off():
            return self.readout.pooled(view, mask, inputs_embeds=hidden)

    def top(self, hidden: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Logits from the cut on.

        Args:
            hidden: what ``prefix`` returned; for ``INPUT`` the token ids [B, T].
            mask: attention mask [B, T] (unused after pooling).
        """
        if cut.layer is None:
            return self.readout.logits(hidden)
        if cut == INPUT:
            if self.readout.base.pooling == "model":
                return self.readout.stock_logits(hidden, mask)
            network, inputs = self._encoder, {"input_ids": hidden}
        else:
            view = self._view(cut.layer)
            assert view is not None
            network, inputs = view, {"inputs_embeds": hidden}
        if self.readout.task.selects_pooling:
            return self.readout.logits(self.readout.pooled(network, mask, **inputs))
        return self.readout.logits(network(attention_mask=mask, **inputs).last_hidden_state)

    def _hidden_before(self, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        stack = layer_stack(self._encoder)
        assert stack is not None

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            raise _Reached(arguments[0] if arguments else keywords["hidden_states"])

        hook = stack[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._encoder(input_ids=ids, attention_mask=mask)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the layer was not reached")


class _Reached(Exception):
    """Carries hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden
