"""Privacy units: which rows belong to one person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NO_UNIT = -1
"""A row without an id. It could be anybody's, so it is never learnt from; ``consilium site check`` tells."""


def units_of(ids: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Number of each row's unit, from 0 in order of first appearance; ``NO_UNIT`` for a row without an id.

    Ids are compared as text without surrounding blanks, so that ``7``, ``"7"`` and ``" 7"`` are one person.
    """
    numbers: dict[str, int] = {}
    units = np.full(len(ids), NO_UNIT, np.int64)
    for row, value in enumerate(ids):
        name = "" if value is None else str(value).strip()
        if name:
            units[row] = numbers.setdefault(name, len(numbers))
    return units


def count_units(units: npt.NDArray[np.int64]) -> int:
    """Number of units; rows without one do not count."""
    return int(units.max(initial=NO_UNIT)) + 1


def renumbered(units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The units of a part of the rows, numbered from 0 again; rows without one stay without."""
    result = np.full(len(units), NO_UNIT, np.int64)
    known = units != NO_UNIT
    _, result[known] = np.unique(units[known], return_inverse=True)
    return result
