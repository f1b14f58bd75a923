"""Files of records that lose some rows while the others stay as they are.

Which rows there are, and whose, is told by the very reader that training uses (:mod:`common.data.read`). Records of csv
and jsonl files are then copied as bytes. A scanner of its own finds where they begin and end; so the finished copy is
read back, and must hold exactly the ids that are to stay.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.data.read import count_rows, read_rows
from common.errors import DataError

Rows = npt.NDArray[np.bool_]
"""Which rows of a file are meant, in the file's order."""

_END = rb"(?:\r\n|\n|\r|\Z)"
# A quote opens a field only at its beginning; one that never ends takes the rest of the file.
_FIELD = rb'(?:"[^"]*+(?:""[^"]*+)*+(?:"|\Z))?+[^,\r\n]*+'
_CSV_RECORD = re.compile(_FIELD + rb"(?:," + _FIELD + rb")*+" + _END)
_LINE = re.compile(rb"[^\r\n]*+" + _END)


def copy_name(file: Path) -> Path:
    """Where a copy of a file is prepared: beside it, so that it can take its place, and read as the same kind."""
    return file.with_name(f".{file.stem}.withdrawal{file.suffix}")


def is_copy(file: Path) -> bool:
    """Whether this is such a copy."""
    return file.name == f".{file.stem.removeprefix('.').removesuffix('.withdrawal')}.withdrawal{file.suffix}"


def count(file: Path) -> int:
    """Number of rows, also of a file that has none.

    Raises:
        DataError: it cannot be read.
    """
    return 0 if _is_blank(file) else count_rows(str(file), "")


def ids_in(file: Path, column: str) -> list[Any]:
    """The value of a column in each row.

    Raises:
        DataError: the file cannot be read, or has no such column.
    """
    return list(read_rows(str(file), "", [column], {})[column]) if count(file) else []


def copy_without(file: Path, gone: Rows, column: str | None) -> None:
    """Prepares a copy without some rows, for its owner alone first, then with the file's own owner, mode and ACL.

    Args:
        column: holds the ids by which the copy is compared with the file; ``None``: only the rows are counted.

    Raises:
        DataError: the copy would not hold exactly the other rows, or the file is of a kind that cannot be copied so.
        OSError: it cannot be written.
    """
    copy = copy_name(file)
    copy.unlink(missing_ok=True)
    with open(copy, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as stream:
        if file.suffix == ".parquet":
            _copy_table(file, gone, stream)
        else:
            _copy_records(file, gone, stream)
        stream.flush()
        _give_access_as(file, copy)
        os.fsync(stream.fileno())
    ids = ids_in(file, column) if column is not None else [None] * len(gone)
    if not _holds(copy, [name for name, out in zip(ids, gone, strict=True) if not out], column):
        raise DataError(
            f"{file}: its records could not be told apart safely, so nothing was changed; write the file anew with a "
            "program that quotes its fields as RFC 4180 says"
        )


def _holds(copy: Path, ids: list[Any], column: str | None) -> bool:
    """Whether these rows are left, and no other; a column that none of them fills is no column of a jsonl file."""
    try:
        filled = column is not None and any(name is not None for name in ids)
        return ids_in(copy, column or "") == ids if filled else count(copy) == len(ids)
    except DataError:
        return False


def _give_access_as(file: Path, copy: Path) -> None:
    """Owner first: changing it takes some mode bits away."""
    owner = file.stat()
    os.chown(copy, owner.st_uid, owner.st_gid)
    shutil.copystat(file, copy)  # mode, ACL and other extended attributes
    os.utime(copy)  # but it was changed now


def _is_blank(file: Path) -> bool:
    """Whether a text file holds nothing but blank lines: it has no rows, which its reader takes for a fault."""
    if file.suffix == ".parquet":
        return False
    with file.open("rb") as lines:
        return not any(line.strip() for line in lines)


def _copy_records(file: Path, gone: Rows, stream: IO[bytes]) -> None:
    row = -1 if file.suffix == ".csv" else 0  # the header is the first record
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for record in _records(content, file.suffix):
            blank = not (record.strip(b"\r\n") if file.suffix == ".csv" else record.decode().strip())
            if blank or row < 0 or (row < len(gone) and not gone[row]):
                stream.write(record)
            row += not blank
    if row != len(gone):
        raise DataError(f"{file}: holds {row} records where {len(gone)} rows are read; write it anew as plain csv")


def _records(content: mmap.mmap, suffix: str) -> Iterator[bytes]:
    for record in (_CSV_RECORD if suffix == ".csv" else _LINE).finditer(content):
        if record.end() > record.start():
            yield record.group()


def _copy_table(file: Path, gone: Rows, stream: IO[bytes]) -> None:
    """Same schema, compression and size of row groups. Statistics, and dictionaries of values, are made anew."""
    import pyarrow.parquet

    source = pyarrow.parquet.ParquetFile(file)
    table = source.read().filter(pa.array(~gone))
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field, _without_unused(table.column(index)))
        elif "dictionary<" in str(field.type):  # would keep the values of the rows that go
            raise DataError(
                f"{file}: column '{field.name}' holds categories inside of lists or structs, whose values cannot be "
                "removed safely; write it anew with plain values"
            )
    groups = [source.metadata.row_group(index) for index in range(source.metadata.num_row_groups)]
    kinds = {
        one.path_in_schema: one.compression if one.compression != "UNCOMPRESSED" else "NONE"
        for one in (groups[0].column(index) for index in range(source.metadata.num_columns))
    }
    size = max(group.num_rows for group in groups)
    pyarrow.parquet.write_table(table, stream, compression=kinds, row_group_size=max(size, 1))


def _without_unused(column: pa.ChunkedArray) -> pa.Array:
    """The categories that are left, in their order: a dictionary otherwise keeps those that no row has any more."""
    import pyarrow.compute

    whole = column.unify_dictionaries().combine_chunks()
    used = pyarrow.compute.drop_null(pyarrow.compute.unique(whole.indices)).sort()
    indices = pyarrow.compute.index_in(whole.indices, value_set=used).cast(whole.indices.type)
    return pa.DictionaryArray.from_arrays(indices, whole.dictionary.take(used), ordered=column.type.ordered)
