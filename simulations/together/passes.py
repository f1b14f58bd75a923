"""Rows of several sites in one physical batch.

A site's physical batch has a fixed number of rows, and a length that its examples alone decide; dummy rows fill it up.
With few examples in a step and several lengths among them, most of its rows are dummies. A site's full batches stay as
they are; the rows of those that are not full, of all sites, fill the batches of one length, next fit: a privacy unit
goes into the batch at hand, or opens another if it does not fit as a whole. The shapes are those of one site's batches,
and there are never more of them than the sites would need one after the other: a batch that starts later in the row of
units also ends later.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat

import numpy as np
import numpy.typing as npt
import torch

from client.privacy.linear_maps import Rows
from common.adapted import AdaptedModel
from common.cuts import INPUT, Cut
from common.examples import Batch


@dataclass(frozen=True)
class Piece:
    """Rows of whole privacy units out of one site's physical batch."""

    site: int
    batch: Batch
    rows: npt.NDArray[np.int64]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece's rows of a tensor of its batch."""
        if self.batch.units is None:  # side by side
            return tensor[int(self.rows[0]) : int(self.rows[-1]) + 1]
        return tensor[torch.from_numpy(self.rows).to(tensor.device)]

    def slots(self) -> npt.NDArray[np.int64] | None:
        """Number of each row's unit within the piece; ``None``: each row is a unit of its own."""
        if self.batch.units is None:
            return None
        slots: npt.NDArray[np.int64] = np.unique(self.batch.units[self.rows], return_inverse=True)[1]
        return slots

    def by_unit(self) -> list[Piece]:
        """A piece for each unit."""
        own = self.slots()
        slots = np.arange(len(self.rows)) if own is None else own
        return [Piece(self.site, self.batch, self.rows[slots == unit]) for unit in np.unique(slots)]


@dataclass(frozen=True)
class SharedPass:
    """One physical batch of several sites: the pieces' rows one after the other, then dummies."""

    pieces: Sequence[Piece]
    batch: Batch
    rows: Rows
    slots: torch.Tensor | None
    """[B] which unit of the batch a row belongs to, none below the first row of its piece."""

    def parts(self) -> Iterator[tuple[Piece, slice]]:
        """Each piece with its rows of the batch."""
        first = 0
        for piece in self.pieces:
            yield piece, slice(first, first + len(piece.rows))
            first += len(piece.rows)


def filled(batches: Sequence[Iterable[Batch]]) -> Iterator[list[Piece]]:
    """What goes into each pass, the shortest first. Reads ahead by one batch of each site.

    Args:
        batches: of each site, the shortest first.
    """
    numbered = [zip(repeat(site), one, strict=False) for site, one in enumerate(batches)]
    ordered = heapq.merge(*numbered, key=lambda each: each[1].mask.shape[1])
    for _, of_one_length in groupby(ordered, key=lambda each: each[1].mask.shape[1]):
        yield from _next_fit(of_one_length)


def _next_fit(batches: Iterable[tuple[int, Batch]]) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    room = 0
    for site, batch in batches:
        if len(batch.indices) == len(batch.weights):  # full as it is
            yield [Piece(site, batch, np.arange(len(batch.indices)))]
            continue
        order, ends = _units(batch)
        start = 0
        while start < len(order):
            fitting = ends[: np.searchsorted(ends, start + room, side="right")]
            if pieces and (not len(fitting) or fitting[-1] <= start):
                yield pieces
                pieces, room = [], 0
            if not pieces:
                room = len(batch.weights)
                fitting = ends[: np.searchsorted(ends, start + room, side="right")]
            stop = int(fitting[-1])
            pieces.append(Piece(site, batch, order[start:stop]))
            start, room = stop, room - (stop - start)
    if pieces:
        yield pieces


def _units(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows of a batch by unit, and where in that order each unit ends."""
    if batch.units is None:
        return np.arange(len(batch.indices)), np.arange(1, len(batch.indices) + 1)
    order = np.argsort(batch.units, kind="stable")
    return order, np.append(np.flatnonzero(np.diff(batch.units[order])) + 1, len(order))


def joined(pieces: Sequence[Piece], model: AdaptedModel, cut: Cut) -> SharedPass:
    """The pass of these pieces."""
    first = pieces[0].batch
    if len(pieces[0].rows) == len(first.weights):
        rows = Rows.of([(pieces[0].site, len(first.weights))], first.mask.device)
        return SharedPass(pieces, first, rows, first.slots())
    filled_rows = sum(len(piece.rows) for piece in pieces)
    dummies = _dummies(first, len(first.weights) - filled_rows, model, cut)
    batch = Batch(
        torch.cat([*(piece.of(piece.batch.inputs) for piece in pieces), dummies.inputs]),
        torch.cat([*(piece.of(piece.batch.mask) for piece in pieces), dummies.mask]),
        torch.cat([*(piece.of(piece.batch.targets) for piece in pieces), dummies.targets]),
        torch.cat([*(piece.of(piece.batch.weights) for piece in pieces), dummies.weights]),
        np.arange(filled_rows),
    )
    stretches = [(piece.site, len(piece.rows)) for piece in pieces]
    stretches[-1] = pieces[-1].site, stretches[-1][1] + len(dummies.weights)  # whose gradients are zero
    return SharedPass(pieces, batch, Rows.of(stretches, batch.mask.device), _slots(pieces, batch))


def _slots(pieces: Sequence[Piece], batch: Batch) -> torch.Tensor | None:
    """A piece's units have the numbers of its own rows, so that what is theirs lies where the piece lies."""
    if all(piece.batch.units is None for piece in pieces):
        return None
    slots = np.arange(len(batch.weights))
    first = 0
    for piece in pieces:
        if (own := piece.slots()) is not None:
            slots[first : first + len(own)] = first + own
        first += len(piece.rows)
    return torch.from_numpy(slots).to(batch.mask.device)


def _dummies(like: Batch, count: int, model: AdaptedModel, cut: Cut) -> Batch:
    """Rows of weight zero that attend to one pad token."""
    pad = (model.base.tokenizer.pad_token_id or 0) if cut == INPUT else 0
    mask = like.mask.new_zeros(count, *like.mask.shape[1:])
    mask[:, 0] = 1
    return Batch(
        like.inputs.new_full((count, *like.inputs.shape[1:]), pad),
        mask,
        model.task.collate([None] * count, like.mask.shape[1]).to(like.targets.device),
        like.weights.new_zeros(count),
        np.arange(0),
    )
