"""Splits rows of a single file, and deals rows out to sites."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.read import Rows
from common.errors import DataError

SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


def select(rows: Rows, indices: Sequence[int]) -> Rows:
    """The chosen rows."""
    return {field: [values[index] for index in indices] for field, values in rows.items()}


def count(rows: Rows) -> int:
    """Number of rows."""
    return len(next(iter(rows.values()), []))


def draw_split(rows: Rows, split: str, fields: Sequence[str]) -> Rows:
    """80 % train, 10 % validation, 10 % test of a single file, by the hash of each row's own content: equal rows fall
    into the same split, and adding rows moves none.

    Args:
        fields: what counts as content. Whoever draws another split of the same file must name the same fields, or a
            row could be learnt from and tested on.

    Raises:
        DataError: unknown split, or no row falls into it.
    """
    if split not in SPLITS:
        raise DataError(
            f"split '{split}': a single file is split into {', '.join(SPLITS)} only; give a folder of files"
        )
    low, high = SPLITS[split]
    columns = [rows[field] for field in sorted(fields)]
    chosen = [index for index, values in enumerate(zip(*columns, strict=True)) if low <= _position(values) < high]
    if not chosen:
        raise DataError(
            f"split '{split}': no row of {count(rows)} falls into it; give more rows, or one file per split"
        )
    return select(rows, chosen)


def _position(values: tuple[Any, ...]) -> float:
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def by_column(values: Sequence[Any]) -> dict[str, list[int]]:
    """Row indices of each site, by the value of the site column; in name order.

    Raises:
        DataError: a value is missing.
    """
    sites: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        if value is None or str(value) == "":
            raise DataError(f"data.site_column: row {index} names no site; fill the column or drop the row")
        sites.setdefault(str(value), []).append(index)
    return dict(sorted(sites.items()))


def dealt(n: int, sites: int, seed: int) -> dict[str, list[int]]:
    """Row indices of ``sites`` sites of (nearly) equal size, dealt out at random (IID).

    Raises:
        DataError: fewer rows than sites.
    """
    if n < sites:
        raise DataError(f"data.sites = {sites}: there are only {n} rows; use fewer sites")
    order = shuffled(n, seed)
    return {name: sorted(order[k::sites].tolist()) for k, name in enumerate(site_names(sites))}


def shuffled(n: int, seed: int) -> npt.NDArray[np.int64]:
    """The row indices 0 … n - 1 in an order that the seed decides."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n)


def site_names(sites: int) -> list[str]:
    """``site-1`` …, with leading zeros, so that they sort as their numbers."""
    width = len(str(sites))
    return [f"site-{k + 1:0{width}d}" for k in range(sites)]
