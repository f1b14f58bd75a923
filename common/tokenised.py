"""Tokens of all rows of a split in one memory-mapped Arrow file; a part of them is an array of row numbers.

The file has one record batch of two columns, token ids and targets, whose arrays are used as they lie in the file. So
they count as memory only while the system's page cache has room for them, and all sites of a process share them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import transformers
from transformers import PreTrainedTokenizerBase

from common.code import code_digest
from common.data.read import Rows
from common.data.split import count, select
from common.tasks.base import Encoded, Fault, Task

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 8192
"""Rows that are encoded together; so many at most are in memory as objects of their own."""
SUFFIX = ".arrow"
SCALAR = b"consilium.scalar_targets"
CONTENT = b"consilium.content"


@dataclass(frozen=True)
class _Columns:
    """Row r: token ids ``ids[id_ends[r]:id_ends[r + 1]]``, and its target likewise."""

    ids: npt.NDArray[np.int32]
    id_ends: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    target_ends: npt.NDArray[np.int64]
    scalar: bool
    """Whether a target is one number, and not one for each token."""

    @classmethod
    def of(cls, table: pa.Table) -> _Columns:
        """Views of the table's buffers."""
        ids, targets = (table.column(name).chunk(0) for name in ("ids", "target"))
        scalar = table.schema.metadata[SCALAR] == b"1"
        return cls(
            ids.values.to_numpy(), ids.offsets.to_numpy(), targets.values.to_numpy(), targets.offsets.to_numpy(), scalar
        )


class Tokenised(Sequence[Encoded]):
    """Encoded rows, as views that cannot be written to.

    Args:
        columns: of all rows.
        rows: which of them this part has, in this order; ``None``: all.
    """

    def __init__(self, columns: _Columns, rows: npt.NDArray[np.int64] | None = None) -> None:
        self._columns = columns
        self.rows = np.arange(len(columns.id_ends) - 1) if rows is None else rows

    def part(self, rows: npt.ArrayLike) -> Tokenised:
        """The chosen rows of this part. Nothing is copied but their numbers."""
        return Tokenised(self._columns, self.rows[np.asarray(rows, np.int64)])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row [n]."""
        ends = self._columns.id_ends
        return np.asarray(ends[self.rows + 1] - ends[self.rows], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Tokenised: ...
    def __getitem__(self, index: int | slice) -> Encoded | Tokenised:
        if isinstance(index, slice):
            return Tokenised(self._columns, self.rows[index])
        row, columns = self.rows[index], self._columns
        target = columns.targets[columns.target_ends[row] : columns.target_ends[row + 1]]
        ids = columns.ids[columns.id_ends[row] : columns.id_ends[row + 1]]
        return Encoded(ids, target.reshape(()) if columns.scalar else target)


def tokenise(
    rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> tuple[Tokenised, list[Fault]]:
    """The tokens of all rows, found in ``folder`` if the very same rows were encoded before in the very same way.

    Args:
        folder: where the file is kept (0700, 0600) for the next start. ``None``: it has no name and is gone with this
            process, so that no text outlives it.

    Returns:
        The rows, none where there are faults; and the faults.

    Raises:
        OSError: there is no room for the file.
    """
    kept = None if folder is None else folder / f"{_key(rows, task, tokenizer)}{SUFFIX}"
    if kept is not None and (found := _read(kept)) is not None:
        log.info("the tokenised rows were found on disk")
        return Tokenised(_Columns.of(found)), []
    encoded, faults = _encoded(rows, task, tokenizer)
    if faults:
        return Tokenised(_Columns.of(_table([]))), faults
    return Tokenised(_Columns.of(_stored(_table(encoded), kept))), []


@dataclass(frozen=True)
class _Slice:
    """Some rows, as arrays."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    target_lengths: npt.NDArray[np.int64]
    scalar: bool


def _encoded(rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[list[_Slice], list[Fault]]:
    slices, faults = [], []
    for start in range(0, count(rows), ROWS_AT_ONCE):
        some = select(rows, range(start, min(start + ROWS_AT_ONCE, count(rows))))
        encoded, found = task.encode(some, tokenizer)
        faults += [Fault(start + fault.row, fault.field, fault.reason) for fault in found]
        slices.append(_slice_of([item for item in encoded if item is not None]))
    return slices, faults


def _slice_of(items: Sequence[Encoded]) -> _Slice:
    targets = [np.atleast_1d(item.target) for item in items]
    return _Slice(
        _joined((item.ids for item in items), np.int32),
        np.array([len(item.ids) for item in items], np.int64),
        _joined(targets, np.int64),
        np.array([len(target) for target in targets], np.int64),
        all(item.target.ndim == 0 for item in items),
    )


def _table(slices: Sequence[_Slice]) -> pa.Table:
    """All rows in one record batch, with a digest of them."""
    ids = _joined((one.ids for one in slices), np.int32)
    id_ends = _ends(_joined((one.lengths for one in slices), np.int64))
    targets = _joined((one.targets for one in slices), np.int64)
    target_ends = _ends(_joined((one.target_lengths for one in slices), np.int64))
    scalar = all(one.scalar for one in slices)
    arrays = [pa.LargeListArray.from_arrays(*pair) for pair in ((id_ends, ids), (target_ends, targets))]
    names = ["ids", "target"]
    schema = pa.schema([(name, array.type) for name, array in zip(names, arrays, strict=True)])
    metadata = {SCALAR: b"1" if scalar else b"0", CONTENT: _digest(ids, id_ends, targets, target_ends)}
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


def _stored(table: pa.Table, path: Path | None) -> pa.Table:
    """The table, mapped from a file; that gets its name when everything is in it and on disk."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, part = tempfile.mkstemp(".part", dir=path and path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
        mapped = _mapped(Path(part))
        if path is not None:
            os.replace(part, path)
        else:
            os.unlink(part)  # readable as long as it is mapped
        return mapped
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _read(path: Path) -> pa.Table | None:
    """The table in a file, if it is whole."""
    if not path.is_file():
        return None
    try:
        table = _mapped(path)
        columns = _Columns.of(table)
        digest = _digest(columns.ids, columns.id_ends, columns.targets, columns.target_ends)
        if digest == table.schema.metadata[CONTENT]:
            return table
    except (pa.ArrowException, OSError, KeyError, TypeError, IndexError):
        pass
    log.warning("the tokenised rows on disk are damaged, and are encoded anew")
    return None


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _key(rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that decides the tokens: rows, task, tokenizer, versions."""
    state = hashlib.sha256()
    for field in sorted(rows):
        state.update(repr((field, len(rows[field]))).encode())
        for value in rows[field]:
            state.update(repr(value).encode() + b"\0")
    settings = [task.name, task.settings.model_dump_json(), code_digest(), transformers.__version__]
    state.update(json.dumps([*settings, *_said_of(tokenizer)]).encode())
    return state.hexdigest()


def _said_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(rules, dict):  # what the last call has set; each call sets its own
        rules |= {"truncation": None, "padding": None}
    sides = [tokenizer.truncation_side, tokenizer.padding_side, tokenizer.model_max_length]
    return [type(tokenizer).__name__, rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template), *sides]


def _digest(*arrays: npt.NDArray[Any]) -> bytes:
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest().encode()


def _joined(arrays: Iterable[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _ends(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
