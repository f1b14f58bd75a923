"""Frozen activations of all examples at one cut: computed once, since nothing below the first adapted layer changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.adapted import AdaptedModel
from common.cuts import Cut

log = logging.getLogger(__name__)

CACHE_LIMIT = 4 << 30
"""Largest prefix cache of one split in bytes, unless set otherwise; above it the prefix is computed anew."""

Indices = npt.NDArray[np.int64]
Values = npt.NDArray[Any]
"""[rows, width] fp32, or the bits of bfloat16 as uint16."""


def prefix_by_row(model: AdaptedModel, ids: torch.Tensor, mask: torch.Tensor, cut: Cut, examples: int) -> torch.Tensor:
    """The frozen prefix [B, …]; NaN in the rows of examples that fail, so that they fail alone.

    Args:
        examples: how many of the first rows are examples; the others are dummies.
    """
    try:
        return model.prefix(ids, mask, cut)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        log.warning("a batch failed in the frozen prefix; its rows are computed one by one")
    shape = (len(ids), model.feature_width) if cut.layer is None else (*ids.shape, model.width)
    hidden = torch.full(shape, torch.nan, device=ids.device, dtype=model.base.placement.dtype)
    for row in range(examples):
        alone = torch.arange(len(ids), device=ids.device).unsqueeze(1) == row
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        pads = torch.full_like(ids, model.base.tokenizer.pad_token_id or 0)
        try:
            hidden[row] = model.prefix(torch.where(alone, ids, pads), torch.where(alone, mask, first), cut)[row]
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.warning("an example failed in the frozen prefix and contributes zero")
    return hidden


@dataclass(frozen=True)
class Layout:
    """How the values of all examples lie one after the other, in index order: [Σ lengths, width]."""

    lengths: Indices
    """Rows of each example: its tokens, or 1 for pooled features."""
    width: int
    dtype: torch.dtype
    """float32 or bfloat16."""

    @cached_property
    def offsets(self) -> Indices:
        """First row of each example, and last the number of all rows."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @property
    def rows(self) -> int:
        """Rows of all examples together."""
        return int(self.offsets[-1])

    @property
    def bits(self) -> type[np.generic]:
        """The values' numpy type."""
        return np.uint16 if self.dtype == torch.bfloat16 else np.float32

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return self.rows * self.width * np.dtype(self.bits).itemsize

    def to_bits(self, values: torch.Tensor) -> Values:
        """The values as they are stored."""
        values = values.detach().to("cpu", self.dtype).contiguous()
        return (values.view(torch.uint16) if self.dtype == torch.bfloat16 else values).numpy()

    def from_bits(self, bits: Values) -> torch.Tensor:
        """Stored values as a tensor, without a copy."""
        tensor = torch.from_numpy(bits)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


class Store(Protocol):
    """Where rows of values lie."""

    def read(self, start: int, into: Values) -> None:
        """Fills ``into`` (contiguous) with the rows from ``start`` on.

        Raises:
            OSError: they cannot be read, or not all of them are there.
        """
        ...

    def write(self, start: int, values: Values) -> None:
        """Puts rows (contiguous) from ``start`` on.

        Raises:
            OSError: they cannot be written.
        """
        ...


class Memory:
    """Rows in memory."""

    def __init__(self, layout: Layout) -> None:
        self.values: Values = np.zeros((layout.rows, layout.width), layout.bits)

    def read(self, start: int, into: Values) -> None:
        """As :class:`Store`."""
        into[:] = self.values[start : start + len(into)]

    def write(self, start: int, values: Values) -> None:
        """As :class:`Store`."""
        self.values[start : start + len(values)] = values


class Prefixes:
    """Frozen activations of all examples at one cut."""

    def __init__(self, layout: Layout, store: Store | None) -> None:
        self.layout, self.store = layout, store
        self.flawed = False
        """Whether some values are not finite: an example may have failed by chance."""

    @property
    def stored(self) -> bool:
        """Whether they are kept at all."""
        return self.store is not None

    def put(self, chosen: Indices, hidden: torch.Tensor) -> None:
        """Stores rows of features [B, H] or hidden states [B, T, H].

        Raises:
            OSError: they cannot be written.
        """
        assert self.store is not None
        hidden = hidden[: len(chosen)]
        self.flawed |= not bool(torch.isfinite(hidden).all())
        bits = self.layout.to_bits(hidden).reshape(len(chosen), -1, self.layout.width)
        for row, index in enumerate(chosen.tolist()):
            if length := int(self.layout.lengths[index]):
                self.store.write(int(self.layout.offsets[index]), bits[row, :length])

    def features(self, chosen: Indices) -> torch.Tensor | None:
        """Pooled features [b, H]; ``None`` where they can no longer be read."""
        if not self.stored:
            return None
        bits = np.zeros((len(chosen), self.layout.width), self.layout.bits)
        # Neighbours lie side by side: a full batch is one read.
        ends = np.append(np.flatnonzero(np.diff(chosen) != 1) + 1, len(chosen)).tolist()
        pieces = ((int(chosen[first]), bits[first:last]) for first, last in pairwise([0, *ends]) if first < last)
        return self.layout.from_bits(bits) if self._read(pieces) else None

    def padded(self, chosen: Indices, rows: int, length: int) -> torch.Tensor | None:
        """Hidden states [rows, length, H], zero where there is no token; ``None`` where they are not to be had."""
        if not self.stored:
            return None
        bits = np.zeros((rows, length, self.layout.width), self.layout.bits)
        starts, lengths = self.layout.offsets[chosen].tolist(), self.layout.lengths[chosen].tolist()
        pieces = ((starts[row], bits[row, : lengths[row]]) for row in range(len(chosen)) if lengths[row])
        return self.layout.from_bits(bits) if self._read(pieces) else None

    def _read(self, pieces: Iterator[tuple[int, Values]]) -> bool:
        assert self.store is not None
        try:
            for start, into in pieces:
                self.store.read(start, into)
        except OSError as error:
            log.warning("the frozen activations can no longer be read (%s) and are computed anew", reason(error))
            self.store = None
            return False
        return True


def reason(error: OSError) -> str:
    """What went wrong, without the path."""
    return error.strerror or type(error).__name__
