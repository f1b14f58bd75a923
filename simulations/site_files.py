"""Splits one file into ordinary files, one folder a site, that a simulation's and a hospital's reader both take.

::

    DIR/partition.json      how it was split, and the sizes
    DIR/SITE/train.csv      that site's rows, in the order and with the columns of the source
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.data.read import SUFFIXES, Table, is_missing, read_table
from common.data.units import NO_UNIT, units_of
from common.errors import DataError, OutputError, did_you_mean
from common.sections import DataSection
from simulations.partition import BY_LABEL, sites_of

SCHEMA_VERSION = 1
RECORD = "partition.json"

Write = Callable[[Path, Sequence[int]], None]
"""(file, row indices) → writes these rows there."""


def write_sites(
    source: Path, split: str, data: DataSection, seed: int, label: str | None, kind: str | None, out: Path
) -> dict[str, Any]:
    """Writes the sites' folders; either all of them stand under ``out`` in the end, or nothing does.

    Args:
        source: a folder with a file for ``split``, or a file, which is split as a whole.
        data: how it is split; ``data.privacy_unit`` names the column whose values are kept together.
        label: the column of labels; ``None``: ``label``, where there is such a column.
        kind: ``csv``, ``jsonl`` or ``parquet``; ``None``: the source's own.
        out: new, or an empty folder.

    Returns:
        What ``partition.json`` holds: the method, its parameters, and each site's rows, units and labels.

    Raises:
        ConsiliumError: source, settings or folder do not fit.
    """
    _refuse_used(out)
    table, file = read_source(source, split)
    labels = _labels(table, file, label, data)
    units = _units(table, file, data.privacy_unit)
    parts = sites_of(
        data,
        seed,
        table.rows,
        column=column_of(table, file, data.site_column, "--column") if data.site_column else (),
        labels=labels,
        units=units,
    )
    kind = kind or _kind(file)
    record = {
        "schema_version": SCHEMA_VERSION,
        "input": file.name,
        "split": split,
        "format": kind,
        **_method(data, seed),
        "label": None if labels is None else label or "label",
        "privacy_unit": data.privacy_unit,
        "rows": table.rows,
        "units_at_several_sites": None if units is None else _shared_units(parts, units),
        "sites": {site: _sizes(rows, labels, units) for site, rows in parts.items()},
    }
    _write_all(out, f"{split}.{kind}", parts, _WRITERS[kind](table), record)
    return record


def read_source(source: Path, split: str) -> tuple[Table, Path]:
    """All columns of a file, or of a folder's file for the split, and which file that is.

    Raises:
        DataError: there is none, it has no rows, or a column twice.
    """
    source = source.expanduser()
    if not source.exists():
        raise DataError(f"'{source}': no such file or folder; give a csv, jsonl or parquet file, or a folder of them")
    table, where = read_table(str(source), split)
    twice = [name for name, times in Counter(table.names).items() if times > 1]
    if twice:
        raise DataError(f"{where}: has several columns called '{twice[0]}'; rename them")
    if not table.rows:
        raise DataError(f"{where}: has no rows; give a file with at least one example")
    return table, Path(where)


def column_of(table: Table, file: Path, name: str, option: str) -> list[Any]:
    """A column's values.

    Raises:
        DataError: there is no such column.
    """
    if name not in table.names:
        raise DataError(f"{option} {name}: {file} has no such column{did_you_mean(name, table.names)}")
    return table.values(name)


def _kind(file: Path) -> str:
    return "jsonl" if file.suffix == ".json" else file.suffix[1:]


def _labels(table: Table, file: Path, name: str | None, data: DataSection) -> list[Any] | None:
    if name is None and data.partition not in BY_LABEL and "label" not in table.names:
        return None
    return column_of(table, file, name or "label", "--label")


def _units(table: Table, file: Path, name: str | None) -> Any:
    if name is None:
        return None
    units = units_of(column_of(table, file, name, "--unit"))
    if NO_UNIT in units:
        row = int((units == NO_UNIT).argmax())
        raise DataError(f"--unit {name}: row {row} of {file} names no unit; fill the column or drop the row")
    return units


def _method(data: DataSection, seed: int) -> dict[str, Any]:
    if data.site_column is not None:
        return {"method": "column", "parameters": {"site_column": data.site_column}, "seed": None}
    names = ("sites", "alpha", "classes_per_site", "min_size")
    given = {name: value for name in names if (value := getattr(data, name)) is not None}
    return {"method": data.partition, "parameters": given, "seed": seed}


def _sizes(rows: Sequence[int], labels: Sequence[Any] | None, units: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"rows": len(rows), "units": len(rows) if units is None else len({*units[rows].tolist()})}
    if labels is not None:
        counts = Counter(str(labels[row]) for row in rows if not is_missing(labels[row]))
        sizes["labels"] = dict(sorted(counts.items()))
    return sizes


def _shared_units(parts: Mapping[str, Sequence[int]], units: Any) -> int:
    """Units with rows at several sites; only a column can cause that."""
    met = Counter(unit for rows in parts.values() for unit in {*units[rows].tolist()})
    return sum(sites > 1 for sites in met.values())


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: exists and is not an empty folder; give a new one")


def _write_all(out: Path, name: str, parts: Mapping[str, Sequence[int]], write: Write, record: Any) -> None:
    """Into a folder beside ``out``, which takes its name once it is complete."""
    unfinished = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        unfinished.mkdir(parents=True)
        for site, rows in parts.items():
            (unfinished / site).mkdir()
            write(unfinished / site / name, rows)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (unfinished / RECORD).write_text(text, encoding="utf-8")
        os.replace(unfinished, out)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _csv(table: Table) -> Write:
    columns = [[_text(value, name, "jsonl or parquet") for value in table.values(name)] for name in table.names]

    def write(path: Path, rows: Sequence[int]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table.names)
            writer.writerows([column[row] for column in columns] for row in rows)

    return write


def _text(value: Any, name: str, remedy: str) -> str:
    """A cell of a csv file, which knows text only."""
    if isinstance(value, list | dict | bytes):
        raise DataError(f"--format csv: column '{name}' holds more than text and numbers; use --format {remedy}")
    return "" if value is None else str(value)


def _json_lines(table: Table) -> Write:
    columns = [table.values(name) for name in table.names]

    def write(path: Path, rows: Sequence[int]) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                values = {name: column[row] for name, column in zip(table.names, columns, strict=True)}
                file.write(json.dumps(values, ensure_ascii=False, default=_plain) + "\n")

    return write


def _plain(value: Any) -> str:
    """What JSON has no form for, but text has."""
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise DataError(f"--format jsonl: a column holds {type(value).__name__} values; use --format parquet")


def _parquet(table: Table) -> Write:
    import pyarrow.parquet

    try:
        whole = table.arrow if table.arrow is not None else pa.table({name: table.values(name) for name in table.names})
    except pa.ArrowException as error:
        first = str(error).splitlines()[0]
        raise DataError(f"--format parquet: a column mixes kinds of values ({first}); use --format jsonl") from None

    def write(path: Path, rows: Sequence[int]) -> None:
        pyarrow.parquet.write_table(whole.take(pa.array(rows, pa.int64())), path)

    return write


_WRITERS: dict[str, Callable[[Table], Write]] = {"csv": _csv, "jsonl": _json_lines, "parquet": _parquet}

assert all(f".{kind}" in SUFFIXES for kind in _WRITERS), "what is written can be read"
