"""The adapter before round 1: a pure function of what is public."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from common.adapter import AdapterSpec, AdapterState, kaiming_rows, orthonormal_rows
from common.cuts import Cut, CutModel
from common.messages import Tensors
from common.tensor_groups import group_of


def initial_state(
    spec: AdapterSpec, model: CutModel, seed: int, orthonormal: bool, feature_map: Tensors | None = None
) -> AdapterState:
    """B = 0, A from the public seed, the head from the label names or zero.

    A has orthonormal rows, or LoRA's usual uniform entries (Hu et al. 2021, arXiv 2106.09685).

    Args:
        model: takes the feature map over, which the head starts from.
        feature_map: what the coordinator has made (``server/feature_map.py``), where the model has one; else zero.
    """
    state: AdapterState = {}
    for name, shape in spec.shapes:
        if group_of(name) != "A":
            state[name] = np.zeros(shape, np.float32)
        elif orthonormal:
            state[name] = orthonormal_rows(shape[0], shape[1], seed, name)
        else:
            state[name] = kaiming_rows(shape[0], shape[1], seed, name)
    state.update(feature_map or {})
    model.readout.take_map(state)
    state.update(_initial_head(spec, model))
    return state


def _initial_head(spec: AdapterSpec, model: CutModel) -> AdapterState:
    """Row k of a linear head = the centred, scaled embedding of label name k (public text); biases zero."""
    readout, settings = model.readout, model.readout.task.settings
    weights = [name for name in spec.names if group_of(name) == "head" and name.endswith("weight")]
    if settings.head_init != "label-names" or readout.base.pooling == "model" or len(weights) != 1:
        return {}
    embedded = np.stack([_embedded(model, label) for label in settings.labels])
    scale = settings.head_scale or (1.0 if readout.map is None else 3.0)
    embedded -= embedded.mean(axis=0)
    norms = np.linalg.norm(embedded, axis=1, keepdims=True)
    return {weights[0]: np.ascontiguousarray(scale * embedded / np.maximum(norms, 1e-6), np.float32)}


def _embedded(model: CutModel, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the head sees of a text: [H]."""
    base = model.readout.base
    ids = torch.tensor([base.tokenizer(text)["input_ids"]], device=base.placement.device)
    with torch.no_grad():
        features = model.readout.mapped(model.prefix(ids, torch.ones_like(ids), Cut(None)))
    embedding: np.ndarray[Any, np.dtype[np.float32]] = features[0].float().cpu().numpy()
    return embedding
