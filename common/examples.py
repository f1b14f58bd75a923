"""Encoded examples of one split at one place: batches of fixed shape, and the frozen prefix cached once.

A physical batch always has the same number of rows and a length that depends on the bucket of its examples alone; dummy
rows fill it up. So no row's result depends on which other rows happened to be sampled (in bfloat16 a changing shape
moved other rows' clipped sums by 1 % of the clip norm; at a fixed shape by exactly 0).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers

from common import frozen_linear
from common.adapted import AdaptedModel
from common.cuts import INPUT, Cut
from common.data.units import count_units
from common.prefix_files import PrefixCache
from common.prefixes import CACHE_LIMIT, Layout, Prefixes, prefix_by_row
from common.tasks.base import Encoded, Task
from common.tokenised import Tokenised

log = logging.getLogger(__name__)

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Padded lengths, none above the plan's ``max_length``. The bucket of an example depends on its own length alone."""

FEATURE_ROWS = 256
"""Rows of a physical batch of pooled features; they have no length."""


@dataclass(frozen=True)
class Batch:
    """One physical batch."""

    inputs: torch.Tensor
    """Token ids [B, T], hidden states [B, T, H] or features [B, H], as the cut wants it."""
    mask: torch.Tensor
    """Attention mask [B, T]; [B, 1] for features."""
    targets: torch.Tensor
    weights: torch.Tensor
    """[B] fp32: 1/(examples of the row's unit), 0 for a dummy row and for a row that cannot be learnt from."""
    indices: npt.NDArray[np.int64]
    """Which examples the first rows are."""
    units: npt.NDArray[np.int64] | None = None
    """Number of the privacy unit each of the first rows belongs to; ``None``: each is a unit of its own."""

    def slots(self) -> torch.Tensor | None:
        """[B] number of each row's unit within the batch, a dummy row being a unit of its own; ``None`` as above."""
        if self.units is None:
            return None
        _, slots = np.unique(self.units, return_inverse=True)
        return torch.from_numpy(np.concatenate([slots, np.arange(len(slots), len(self.weights))])).to(self.mask.device)

    def by_unit(self) -> list[npt.NDArray[np.int64]]:
        """The examples of each unit in the batch. No unit lies in two batches."""
        if self.units is None:
            return list(self.indices[:, None])
        return [self.indices[self.units == unit] for unit in np.unique(self.units)]


class Examples:
    """Encoded rows of one split; a row that cannot be learnt from stays as a void example that contributes zero.

    Args:
        encoded: the rows, as objects or as a part of a memory-mapped file.
        units: [n] number of each example's privacy unit (:func:`common.data.units.units_of`); ``None``: each example is
            a unit of its own.
        cache_limit: bytes of frozen hidden states that are kept.
        cache_folder: where on disk they are kept (:mod:`common.prefix_files`); ``None``: in memory.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded | None],
        task: Task,
        cache_limit: int = CACHE_LIMIT,
        units: npt.NDArray[np.int64] | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        self.task, self.units = task, units
        self.encoded: Sequence[Encoded | None] = encoded if isinstance(encoded, Tokenised) else list(encoded)
        self._kept = PrefixCache(cache_limit, cache_folder)
        lengths = np.maximum(1, self._lengths)
        buckets = np.array(BUCKETS)[np.searchsorted(BUCKETS, lengths)] if len(lengths) else lengths
        self.bucket = np.minimum(buckets, task.settings.max_length)  # a model may have no positions beyond it
        self._cache: dict[tuple[str, torch.dtype, int, Cut], Prefixes] = {}

    def __len__(self) -> int:
        return len(self.encoded)

    def keep_in(self, folder: Path) -> None:
        """Frozen activations that are computed from now on are kept in a folder, and found there if they were."""
        self._kept = PrefixCache(self._kept.limit, folder)

    @property
    def unit_count(self) -> int:
        """Number of privacy units."""
        return len(self) if self.units is None else count_units(self.units)

    def batches(self, indices: npt.NDArray[np.int64], rows: int, model: AdaptedModel, cut: Cut) -> Iterator[Batch]:
        """The chosen examples in physical batches of ``rows`` rows, by length bucket and in index order.

        All chosen examples of a privacy unit are in one batch, in the bucket of the longest of them, so that neither
        its gradient nor its shape depends on another unit.

        Args:
            rows: at least as many as examples of one unit are chosen.
        """
        if cut.layer is None:
            for _, chosen in self._by_bucket(indices, FEATURE_ROWS, np.ones(len(self), np.int64)):
                yield self._feature_batch(chosen, rows, model)
            return
        cached = None if cut == INPUT else self._prefixes(model, cut, rows)
        for length, chosen in self._by_bucket(indices, rows, self.bucket):
            yield self._token_batch(chosen, rows, length, model, cut, cached)

    def _by_bucket(
        self, indices: npt.NDArray[np.int64], rows: int, bucket: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        buckets, units = bucket[indices], None
        if self.units is not None:
            _, units = np.unique(self.units[indices], return_inverse=True)
            longest = np.zeros(len(indices), np.int64)
            np.maximum.at(longest, units, buckets)
            buckets = longest[units]
        for length in np.unique(buckets):
            inside = indices[buckets == length]
            if units is None:
                for start in range(0, len(inside), rows):
                    yield int(length), inside[start : start + rows]
            else:
                for packed in _packed(units[buckets == length], rows):
                    yield int(length), inside[packed]

    def _by_length(self, rows: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """All examples, each in its own bucket, whichever unit it belongs to."""
        for length in np.unique(self.bucket):
            inside = np.flatnonzero(self.bucket == length)
            for start in range(0, len(inside), rows):
                yield int(length), inside[start : start + rows]

    def _feature_batch(self, chosen: npt.NDArray[np.int64], rows: int, model: AdaptedModel) -> Batch:
        device = model.base.placement.device
        found = self._features(chosen, rows, model)
        features = torch.zeros(FEATURE_ROWS, found.shape[1])
        features[: len(chosen)] = found
        targets, weights = self._targets(chosen, FEATURE_ROWS, 1)
        mask = torch.ones(FEATURE_ROWS, 1, dtype=torch.long)
        return Batch(
            features.to(device), mask.to(device), targets.to(device), weights.to(device), chosen, self._units(chosen)
        )

    def _token_batch(
        self,
        chosen: npt.NDArray[np.int64],
        rows: int,
        length: int,
        model: AdaptedModel,
        cut: Cut,
        cached: Prefixes | None,
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
        hidden = None if cached is None else cached.padded(chosen, rows, length)
        if hidden is not None:
            inputs = hidden.to(device)
        elif cut != INPUT:
            inputs = prefix_by_row(model, inputs, attention, cut, len(chosen))
        return Batch(inputs, attention, targets.to(device), weights.to(device), chosen, self._units(chosen))

    def _targets(self, chosen: npt.NDArray[np.int64], rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        items = [self.encoded[index] for index in chosen]
        targets: list[npt.NDArray[np.int64] | None] = [None if item is None else item.target for item in items]
        weights = torch.zeros(rows)
        weights[: len(items)] = torch.tensor([0.0 if item is None else 1.0 for item in items])
        if (units := self._units(chosen)) is not None:
            _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
            weights[: len(items)] /= torch.from_numpy(sizes[unit])
        return self.task.collate(targets + [None] * (rows - len(items)), length), weights

    def _units(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        return None if self.units is None else self.units[chosen]

    def frozen_features(self, model: AdaptedModel, rows: int) -> torch.Tensor:
        """Pooled features of all examples without an adapter [n, levels · H], kept for later batches."""
        return self._features(np.arange(len(self)), rows, model)

    def _prefixes(self, model: AdaptedModel, cut: Cut, rows: int) -> Prefixes:
        """The frozen prefix of every example, found or computed on first use and kept for this model and cut."""
        key = (model.base.digest, model.base.placement.dtype, rows, cut)
        if key not in self._cache:
            self._cache[key] = self._compute(self._kept, model, cut, rows)
        return self._cache[key]

    def _features(self, chosen: npt.NDArray[np.int64], rows: int, model: AdaptedModel) -> torch.Tensor:
        found = self._prefixes(model, Cut(None), rows).features(chosen)
        if found is None:  # the file broke: whether a step comes about must not depend on a disk
            key = (model.base.digest, model.base.placement.dtype, rows, Cut(None))
            self._cache[key] = self._compute(PrefixCache(0), model, Cut(None), rows)
            found = self._cache[key].features(chosen)
            assert found is not None, "features are always kept in memory"
        return found

    def _compute(self, kept: PrefixCache, model: AdaptedModel, cut: Cut, rows: int) -> Prefixes:
        lengths = self._lengths if cut.layer is not None else np.ones(len(self), np.int64)
        width = model.width if cut.layer is not None else model.feature_width
        layout = Layout(lengths, width, model.base.placement.dtype)
        origin = self._origin(model, rows)
        if (found := kept.find(cut, origin, layout)) is not None:
            return found
        below = model.layer_cut if cut.layer is None else INPUT
        shared = None if below == INPUT else self._prefixes(model, below, rows)
        return kept.make(cut, origin, layout, lambda prefixes: self._fill(prefixes, model, cut, rows, shared))

    def _fill(self, prefixes: Prefixes, model: AdaptedModel, cut: Cut, rows: int, shared: Prefixes | None) -> None:
        for length, chosen in self._by_length(rows):
            if shared is not None and shared.stored:  # features then cost the top layers alone
                below = model.layer_cut
                batch = self._token_batch(chosen, rows, length, model, below, shared)
                try:
                    prefixes.put(chosen, model.features(batch.inputs, batch.mask, below))
                    continue
                except RuntimeError:
                    log.warning("a batch failed in the frozen layers; its rows are computed one by one")
            batch = self._token_batch(chosen, rows, length, model, INPUT, None)
            prefixes.put(chosen, prefix_by_row(model, batch.inputs, batch.mask, cut, len(chosen)))

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example; none where it is void."""
        if isinstance(self.encoded, Tokenised):
            return self.encoded.lengths
        return np.array([0 if item is None else len(item.ids) for item in self.encoded], np.int64)

    @cached_property
    def _content(self) -> str:
        """Digest of all token ids."""
        state = hashlib.sha256(self._lengths.tobytes())
        for item in self.encoded:
            if item is not None:
                state.update(np.ascontiguousarray(item.ids, np.int32).tobytes())
        return state.hexdigest()

    def _origin(self, model: AdaptedModel, rows: int) -> str:
        """Digest of all that decides the frozen activations, to the last bit, but for the cut."""
        placement = model.base.placement
        values = [model.base.digest, self.task.name, model.base.pooling, self.task.settings.max_length, rows]
        values += [
            model.levels,
            str(placement.dtype),
            placement.device.type,
            torch.__version__,
            frozen_linear.available(),
            transformers.__version__,
        ]
        return hashlib.sha256(json.dumps([*values, self._content]).encode()).hexdigest()


def _packed(units: npt.NDArray[np.int64], rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of the rows of each physical batch: units in order of number, none of them cut in two."""
    order = np.argsort(units, kind="stable")
    starts = np.flatnonzero(np.diff(units[order], prepend=-1))
    batch = 0
    for start, stop in zip(starts, [*starts[1:], len(units)], strict=True):
        assert stop - start <= rows, "a unit's chosen examples fit one batch"
        if stop - batch > rows:
            yield order[batch:start]
            batch = int(start)
    if len(units):
        yield order[batch:]
