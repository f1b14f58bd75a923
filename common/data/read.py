"""Reads a split of a data set as columns: csv, jsonl, parquet, or a hub data set, with named columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

Rows = dict[str, list[Any]]
"""Field → values, all of the same length."""

SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
UNREADABLE = (ValueError, OverflowError, pa.ArrowException)
"""What a cell raises that holds no value of its column's type: text that is not UTF-8, a date beyond the year 9999."""
DEEPEST = 100
"""Levels of lists and objects in a line of JSON: far below the interpreter's own limit, which counts callers too."""


def read_rows(
    source: str, split: str, fields: Sequence[str], columns: Mapping[str, str], optional: Sequence[str] = ()
) -> Rows:
    """The fields of one split.

    Args:
        source: a folder with one file per split, a single file (``split`` is then ignored), or a hub data set id.
        split: name of the file without its suffix, or of the hub split.
        fields: what is needed.
        columns: field → column; a field that is not listed is read from the column of its own name.
        optional: of the fields, those that are left out where there is no such column.

    Raises:
        DataError: file, split or column missing, unreadable, or without rows.
    """
    unknown = sorted(set(columns) - set(fields))
    if unknown:
        raise DataError(
            f"data.columns: '{unknown[0]}' is not a field of this task{did_you_mean(unknown[0], fields)}; "
            f"fields: {', '.join(fields)}"
        )
    table, where = read_table(source, split)
    rows: Rows = {}
    for field in fields:
        column = columns.get(field, field)
        if column not in table.names and field in optional:
            continue
        if column not in table.names:
            raise DataError(
                f"data.columns.{field} = '{column}': {where} has no such column"
                f"{did_you_mean(column, table.names)}; columns: {', '.join(table.names)}"
            )
        if table.names.count(column) > 1:
            raise DataError(f"data.columns.{field} = '{column}': {where} has several columns of that name; rename them")
        rows[field] = table.values(column)
    if table.rows == 0:
        raise DataError(f"data: {where} has no rows; give a file with at least one example")
    return rows


def is_missing(value: Any) -> bool:
    """Whether a value says nothing: empty, blank, or not a number."""
    return value is None or value != value or not str(value).strip()


def count_rows(source: str, split: str) -> int:
    """Number of rows of a split (of the whole file, if the source is one).

    Raises:
        DataError: file or split missing or unreadable.
    """
    table, _ = read_table(source, split)
    return table.rows


def has_split(source: str, split: str) -> bool:
    """Whether a local folder holds a file for the split."""
    return any((Path(source).expanduser() / f"{split}{suffix}").is_file() for suffix in SUFFIXES)


def is_file(source: str) -> bool:
    """Whether the source is a single file, from which splits must be drawn."""
    return Path(source).expanduser().is_file()


@dataclass(frozen=True)
class Table:
    """Column names, number of rows, and the values of a column; a cell that cannot be read is ``None``."""

    names: list[str]
    rows: int
    values: Callable[[str], list[Any]]
    arrow: pa.Table | None = None
    """The same with the file's own types; ``None`` for JSON lines, which have none."""

    @classmethod
    def of(cls, table: pa.Table) -> Table:
        """An Arrow table's columns."""
        return cls(list(table.column_names), int(table.num_rows), lambda name: _values(table, name), table)


def _values(table: pa.Table, name: str) -> list[Any]:
    """One row's cell never decides whether the others are read."""
    column = table.column(name)
    try:
        return list(column.to_pylist())
    except UNREADABLE:
        read = [_value(cell) for cell in column]
    unread = sum(value is None for value in read) - int(column.null_count)
    log.warning(
        "%d of %d cells of column '%s' cannot be read as %s and count as missing",
        *(unread, len(read), name, column.type),
    )
    return read


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UNREADABLE:
        return None


def read_table(source: str, split: str) -> tuple[Table, str]:
    """All columns of one split as they stand, and in words where they were read.

    Raises:
        DataError: file or split missing or unreadable.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path), str(path)
    if path.is_dir():
        for suffix in SUFFIXES:
            file = path / f"{split}{suffix}"
            if file.is_file():
                return _read_file(file), str(file)
        present = sorted(item.name for item in path.iterdir() if item.suffix in SUFFIXES)
        raise DataError(
            f"data.path = '{source}': no file for split '{split}' (looked for {split}.parquet, .csv, .jsonl, .json; "
            f"found: {', '.join(present) or 'none of these kinds'})"
        )
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.suffix in SUFFIXES:
        raise DataError(f"data.path = '{source}': no such file or folder; give an existing one, or a hub data set id")
    return _from_hub(source, split), f"hub data set {source} ({split})"


def _read_file(path: Path) -> Table:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return Table.of(pyarrow.parquet.read_table(path))
        if path.suffix == ".csv":
            return Table.of(_read_csv(path))
        if path.suffix in (".jsonl", ".json"):
            return _read_json_lines(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"data: {path} cannot be read as {path.suffix[1:]}: {first}; mend the file") from None
    raise DataError(f"data: {path} is of an unknown kind '{path.suffix}'; use csv, jsonl or parquet")


def _read_json_lines(path: Path) -> Table:
    """Line by line: a type guessed from all rows together would let one row change how the others are read."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                deep = line.count("[") + line.count("{") > DEEPEST and _is_deep(row)
            except RecursionError:
                deep = True
            except ValueError:
                raise ValueError(f"line {number} is not JSON") from None
            if deep:
                raise ValueError(f"line {number} is nested more than {DEEPEST} levels deep")
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    if not rows:
        raise ValueError("it is empty")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(names, len(rows), lambda column: [row.get(column) for row in rows])


def _is_deep(row: Any) -> bool:
    """Whether there are lists or objects below the deepest level; level by level, however deep the stack is already."""
    level = [row] if isinstance(row, dict | list) else []
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)


def _read_csv(path: Path) -> pa.Table:
    """Every column as text: a guessed type would take labels called ``1`` and ``2`` for ids, and notes for dates."""
    import pyarrow.csv

    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _from_hub(name: str, split: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"data.path = '{name}': no such file or folder, and the hub did not deliver split '{split}' "
            f"({type(error).__name__}); check the path, the id and the connection"
        ) from None
    return Table.of(loaded.with_format("arrow")[:])
