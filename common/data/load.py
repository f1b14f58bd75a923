"""From a source to encoded examples: read, split, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from common.data.read import Rows, is_file, read_rows
from common.data.split import draw_split
from common.data.units import units_of
from common.errors import DataError
from common.examples import Examples
from common.tasks.base import Fault, Task
from common.tokenised import Tokenised, tokenise


@dataclass(frozen=True)
class Loaded:
    """One split, row by row."""

    rows: Rows
    """The task's fields."""
    sites: list[object]
    """Value of the site column; empty without one."""
    units: npt.NDArray[np.int64] | None
    """Number of the privacy unit (:func:`common.data.units.units_of`); ``None``: each row is a unit of its own."""


def load_rows(
    source: str,
    split: str,
    task: Task,
    columns: Mapping[str, str],
    site_column: str | None = None,
    unit_column: str | None = None,
    sites_needed: bool = True,
) -> Loaded:
    """The task's fields of one split, with what the site and unit columns say.

    Of a single file, all rows of a unit fall into the same split.

    Args:
        sites_needed: whether the site column must be there.

    Raises:
        DataError: file, split or column missing, or without rows.
    """
    named = {"site_column": site_column, "privacy_unit": unit_column}
    beside = {field: column for field, column in named.items() if column is not None}
    optional = () if sites_needed else ("site_column",)
    rows = read_rows(source, split, [*task.fields, *beside], {**columns, **beside}, optional)
    if is_file(source):
        rows = draw_split(rows, split, task.fields if unit_column is None else ["privacy_unit"])
    sites = rows.pop("site_column", [])
    units = None if unit_column is None else units_of(rows.pop("privacy_unit"))
    return Loaded(rows, sites, units)


def tokenise_all(
    rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, where: str, folder: Path | None = None
) -> Tokenised:
    """As :func:`encode_all`, into a memory-mapped file (:func:`common.tokenised.tokenise`).

    Raises:
        DataError: some row cannot be learnt from, or there is no room for the file.
    """
    try:
        tokenised, faults = tokenise(rows, task, tokenizer, folder)
    except OSError as error:
        raise DataError(
            f"data: {where}: the tokens cannot be stored ({error.strerror}); free some space where temporary files "
            "and simulation.cache lie"
        ) from None
    if faults:
        raise DataError(f"data: {where}: {describe(faults)}; mend or drop these rows")
    return tokenised


def encode_all(rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, where: str) -> Examples:
    """Examples of rows the caller may look at: the first faults are raised, none is passed over.

    Raises:
        DataError: some row cannot be learnt from.
    """
    encoded, faults = task.encode(rows, tokenizer)
    if faults:
        raise DataError(f"data: {where}: {describe(faults)}; mend or drop these rows")
    return Examples(encoded, task)


def describe(faults: Sequence[Fault], shown: int = 3) -> str:
    """The first faults in one line. For the owner of the data only."""
    listed = "; ".join(f"row {fault.row}: {fault.field} {fault.reason}" for fault in faults[:shown])
    more = f" (and {len(faults) - shown} more)" if len(faults) > shown else ""
    return f"{len({fault.row for fault in faults})} rows cannot be learnt from: {listed}{more}"
