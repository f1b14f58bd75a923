"""From a source to encoded examples: read, split, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from common.data.read import Rows, is_file, read_rows
from common.data.split import draw_split
from common.errors import DataError
from common.examples import Examples
from common.tasks.base import Fault, Task


def load_rows(
    source: str, split: str, task: Task, columns: Mapping[str, str], site_column: str | None = None
) -> tuple[Rows, list[object]]:
    """The task's fields of one split, and the values of the site column (empty without one).

    Raises:
        DataError: file, split or column missing, or without rows.
    """
    fields = [*task.fields]
    wanted = dict(columns)
    if site_column is not None:
        fields.append("site_column")
        wanted["site_column"] = site_column
    rows = read_rows(source, split, fields, wanted)
    if is_file(source):
        rows = draw_split(rows, split, task.fields)
    sites = rows.pop("site_column", [])
    return rows, sites


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
