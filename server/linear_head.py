"""The linear head of an adapter, and what it sees of the texts that the server holds itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.adapted import AdaptedModel
from common.adapter import FEATURE_MAP, AdapterState
from common.examples import Examples
from common.messages import Tensors, adapter_digest, tensor_digest
from server.evaluation import ROWS

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """A linear head: ``weight`` [K, d] and ``bias`` [K]."""

    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """[n, K]."""
        scores: Floats = features @ self.weight.T + self.bias
        return scores

    def spread(self, features: Floats) -> float:
        """Root mean square of the logits about their mean over the classes: how sure the head is of itself."""
        logits = self.logits(features)
        return float(np.sqrt(np.mean((logits - logits.mean(axis=1, keepdims=True)) ** 2)))

    def times(self, factor: float) -> Head:
        """The head that answers the same, and is as many times as sure."""
        return Head(factor * self.weight, factor * self.bias)

    def towards(self, other: Head, share: float) -> Head:
        """The average with another."""
        return Head(
            (1 - share) * self.weight + share * other.weight,
            (1 - share) * self.bias + share * other.bias,
        )


class HeldOutFeatures:
    """What the linear heads of one run see of one set of texts.

    Args:
        texts: held out by the server.
    """

    def __init__(self, model: AdaptedModel, texts: Examples) -> None:
        self.model, self.texts = model, texts
        self._names = [name for name in model.spec.names if model.group_of(name) == "head"]
        self._weight = next((name for name in self._names if name.endswith("weight")), "")
        self._bias = next((name for name in self._names if name.endswith("bias")), "")
        self._seen: tuple[str, Floats] | None = None
        """Digest of the last feature map, and what a head behind it sees of the texts."""

    def head_of(self, adapter: Tensors) -> Head | None:
        """The adapter's head; ``None`` unless it is one linear map, finite, on features that no adapter changes."""
        linear = len(self._names) == 2 and self._weight and self._bias
        if not linear or self.model.cut_for(self._names, adapter).layer is not None:
            return None
        weight, bias = (np.asarray(adapter[name]).astype(np.float64) for name in (self._weight, self._bias))
        return Head(weight, bias) if np.isfinite(weight).all() and np.isfinite(bias).all() else None

    def with_head(self, adapter: Tensors, head: Head) -> AdapterState:
        """The adapter with another head."""
        state = {name: np.asarray(array) for name, array in adapter.items()}
        return {**state, self._weight: head.weight.astype(np.float32), self._bias: head.bias.astype(np.float32)}

    def seen(self, adapter: Tensors) -> Floats:
        """What the adapter's head sees of each text [n, d]; computed once for a feature map, since every round has the
        same. A row may hold what is not finite."""
        digests = {name: tensor_digest(array) for name, array in adapter.items() if name.startswith(FEATURE_MAP)}
        digest = adapter_digest(digests)
        if self._seen is None or self._seen[0] != digest:
            self._seen = digest, self._mapped(adapter)
        return self._seen[1]

    def _mapped(self, adapter: Tensors) -> Floats:
        """The features behind the adapter's map [n, d]."""
        features: Floats = self.texts.frozen_features(self.model, ROWS).float().cpu().numpy().astype(np.float64)
        if self.model.maps_features:
            weight, bias = (np.asarray(adapter[f"{FEATURE_MAP}{name}"], np.float64) for name in ("weight", "bias"))
            features = features @ weight.T + bias
            features = np.pad(features, ((0, 0), (0, self.model.width - features.shape[1])))
        return features
