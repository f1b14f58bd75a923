"""Encoded examples of one split at one place: batches of fixed shape, and the frozen prefix cached once.

A physical batch always has the same number of rows and a length that depends on the bucket of its examples alone; dummy
rows fill it up. So no row's result depends on which other rows happened to be sampled (in bfloat16 a changing shape
moved other rows' clipped sums by 1 % of the clip norm; at a fixed shape by exactly 0).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.adapted import INPUT, AdaptedModel, Cut
from common.tasks.base import Encoded, Task

log = logging.getLogger(__name__)

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Padded lengths, none above the plan's ``max_length``. The bucket of an example depends on its own length alone."""

FEATURE_ROWS = 256
"""Rows of a physical batch of pooled features; they have no length."""

CACHE_LIMIT = 4 << 30
"""Largest prefix cache of one split in bytes; above it the prefix is computed anew."""


@dataclass(frozen=True)
class Batch:
    """One physical batch."""

    inputs: torch.Tensor
    """Token ids [B, T], hidden states [B, T, H] or features [B, H], as the cut wants it."""
    mask: torch.Tensor
    """Attention mask [B, T]; [B, 1] for features."""
    targets: torch.Tensor
    weights: torch.Tensor
    """[B] fp32: 1 for an example, 0 for a dummy row and for a row that cannot be learnt from."""
    indices: npt.NDArray[np.int64]
    """Which examples the first rows are."""


class Examples:
    """Encoded rows of one split; a row that cannot be learnt from stays as a void example that contributes zero."""

    def __init__(self, encoded: Sequence[Encoded | None], task: Task, cache_limit: int = CACHE_LIMIT) -> None:
        self.task = task
        self.encoded = list(encoded)
        self.cache_limit = cache_limit
        lengths = np.array([1 if item is None else max(1, len(item.ids)) for item in self.encoded], np.int64)
        buckets = np.array(BUCKETS)[np.searchsorted(BUCKETS, lengths)] if len(lengths) else lengths
        self.bucket = np.minimum(buckets, task.settings.max_length)  # a model may have no positions beyond it
        self._cache: dict[tuple[str, str], _Prefixes] = {}

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, indices: npt.NDArray[np.int64], rows: int, model: AdaptedModel, cut: Cut) -> Iterator[Batch]:
        """The chosen examples in physical batches of ``rows`` rows, by length bucket and in index order."""
        if cut.layer is None:
            prefixes = self._prefixes(model, cut, rows)
            for start in range(0, len(indices), FEATURE_ROWS):
                yield self._feature_batch(indices[start : start + FEATURE_ROWS], prefixes, model)
            return
        cached = None if cut == INPUT else self._prefixes(model, cut, rows)
        for length, chosen in self._by_bucket(indices, rows):
            yield self._token_batch(chosen, rows, length, model, cut, cached)

    def _by_bucket(self, indices: npt.NDArray[np.int64], rows: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        buckets = self.bucket[indices]
        for length in np.unique(buckets):
            inside = indices[buckets == length]
            for start in range(0, len(inside), rows):
                yield int(length), inside[start : start + rows]

    def _feature_batch(self, chosen: npt.NDArray[np.int64], prefixes: _Prefixes, model: AdaptedModel) -> Batch:
        device = model.base.placement.device
        features = torch.zeros(FEATURE_ROWS, prefixes.width)
        features[: len(chosen)] = prefixes.features(chosen)
        targets, weights = self._targets(chosen, FEATURE_ROWS, 1)
        mask = torch.ones(FEATURE_ROWS, 1, dtype=torch.long)
        return Batch(features.to(device), mask.to(device), targets.to(device), weights.to(device), chosen)

    def _token_batch(
        self,
        chosen: npt.NDArray[np.int64],
        rows: int,
        length: int,
        model: AdaptedModel,
        cut: Cut,
        cached: _Prefixes | None,
    ) -> Batch:
        device = model.base.placement.device
        ids = np.full((rows, length), model.base.tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros((rows, length), np.int64)
        mask[:, 0] = 1  # a dummy row attends to one pad token: attention over nothing would be NaN
        for row, index in enumerate(chosen):
            item = self.encoded[index]
            if item is not None:
                ids[row, : len(item.ids)] = item.ids
                mask[row, : len(item.ids)] = 1
        targets, weights = self._targets(chosen, rows, length)
        attention = torch.from_numpy(mask).to(device)
        inputs = torch.from_numpy(ids).to(device)
        if cached is not None and cached.stored:
            inputs = cached.padded(chosen, rows, length).to(device, model.base.placement.dtype)
        elif cut != INPUT:
            inputs = _prefix_by_row(model, inputs, attention, cut, len(chosen))
        return Batch(inputs, attention, targets.to(device), weights.to(device), chosen)

    def _targets(self, chosen: npt.NDArray[np.int64], rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        items = [self.encoded[index] for index in chosen]
        targets: list[npt.NDArray[np.int64] | None] = [None if item is None else item.target for item in items]
        weights = torch.zeros(rows)
        weights[: len(items)] = torch.tensor([0.0 if item is None else 1.0 for item in items])
        return self.task.collate(targets + [None] * (rows - len(items)), length), weights

    def _prefixes(self, model: AdaptedModel, cut: Cut, rows: int) -> _Prefixes:
        """The frozen prefix of every example, computed on first use and kept for this model and cut."""
        key = (model.base.digest, cut.key())
        if key not in self._cache:
            self._cache[key] = self._compute(model, cut, rows)
        return self._cache[key]

    def _compute(self, model: AdaptedModel, cut: Cut, rows: int) -> _Prefixes:
        width = int(model.network.config.hidden_size)
        lengths = np.array([0 if item is None else len(item.ids) for item in self.encoded], np.int64)
        store = _Prefixes(
            lengths, width, cut, stored=cut.layer is None or int(lengths.sum()) * width * 4 <= self.cache_limit
        )
        if not store.stored:
            return store
        below = model.layer_cut if cut.layer is None else INPUT
        shared = self._prefixes(model, below, rows) if below != INPUT else None
        for length, chosen in self._by_bucket(np.arange(len(self)), rows):
            if shared is not None and shared.stored:  # features then cost the top layers alone
                batch = self._token_batch(chosen, rows, length, model, below, shared)
                store.put(chosen, model.features(batch.inputs, batch.mask, below))
            else:
                batch = self._token_batch(chosen, rows, length, model, INPUT, None)
                store.put(chosen, _prefix_by_row(model, batch.inputs, batch.mask, cut, len(chosen)))
        return store


def _prefix_by_row(model: AdaptedModel, ids: torch.Tensor, mask: torch.Tensor, cut: Cut, examples: int) -> torch.Tensor:
    """The frozen prefix [B, …]; NaN in the rows of examples that fail, so that they fail alone.

    Args:
        examples: how many of the first rows are examples; the others are dummies.
    """
    try:
        return model.prefix(ids, mask, cut)
    except Exception:
        log.warning("a batch failed in the frozen prefix; its rows are computed one by one")
    width = int(model.network.config.hidden_size)
    shape = (len(ids), width) if cut.layer is None else (*ids.shape, width)
    hidden = torch.full(shape, torch.nan, device=ids.device, dtype=model.base.placement.dtype)
    for row in range(examples):
        alone = torch.arange(len(ids), device=ids.device).unsqueeze(1) == row
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        pads = torch.full_like(ids, model.base.tokenizer.pad_token_id or 0)
        try:
            hidden[row] = model.prefix(torch.where(alone, ids, pads), torch.where(alone, mask, first), cut)[row]
        except Exception:
            log.warning("an example failed in the frozen prefix and contributes zero")
    return hidden


class _Prefixes:
    """Activations of all examples at one cut: features [n, H], or hidden states [Σ lengths, H] with offsets."""

    def __init__(self, lengths: npt.NDArray[np.int64], width: int, cut: Cut, stored: bool) -> None:
        self.width, self.stored, self.cut = width, stored, cut
        self.lengths = np.ones_like(lengths) if cut.layer is None else lengths
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.values = torch.zeros(int(self.offsets[-1]) if stored else 0, width)

    def put(self, chosen: npt.NDArray[np.int64], hidden: torch.Tensor) -> None:
        """Stores rows of features [B, H] or hidden states [B, T, H]."""
        hidden = hidden.float().cpu()
        for row, index in enumerate(chosen):
            start, stop = self.offsets[index], self.offsets[index + 1]
            self.values[start:stop] = hidden[row] if self.cut.layer is None else hidden[row, : stop - start]

    def features(self, chosen: npt.NDArray[np.int64]) -> torch.Tensor:
        """Pooled features [b, H]."""
        return self.values[torch.from_numpy(chosen)]

    def padded(self, chosen: npt.NDArray[np.int64], rows: int, length: int) -> torch.Tensor:
        """Hidden states [rows, length, H], zero where there is no token."""
        result = torch.zeros(rows, length, self.width)
        for row, index in enumerate(chosen):
            start, stop = self.offsets[index], self.offsets[index + 1]
            result[row, : stop - start] = self.values[start:stop]
        return result
