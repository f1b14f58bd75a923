"""Which rows belong to one privacy unit."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np

from common.data.load import load_rows
from common.data.units import NO_UNIT, count_units, renumbered, units_of
from common.sections import TaskSection
from common.tasks.registry import task_of

TASK = task_of(TaskSection(labels=("a", "b")))


def test_rows_of_one_id_are_one_unit_in_order_of_first_appearance() -> None:
    assert units_of(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    assert count_units(units_of(["b", "a", "b", "c"])) == 3


def test_an_id_is_compared_as_text_without_blanks() -> None:
    assert units_of([7, "7", " 7 ", 7.5]).tolist() == [0, 0, 0, 1]


def test_a_row_without_an_id_is_of_no_unit() -> None:
    units = units_of([None, "a", "", "  ", "a"])
    assert units.tolist() == [NO_UNIT, 0, NO_UNIT, NO_UNIT, 0]
    assert count_units(units) == 1
    assert count_units(units_of([])) == count_units(units_of([None])) == 0


def test_a_part_of_the_rows_is_numbered_from_zero_again() -> None:
    assert renumbered(np.array([5, -1, 2, 5, 9])).tolist() == [1, NO_UNIT, 0, 1, 2]
    assert renumbered(np.array([], np.int64)).tolist() == []


def test_all_rows_of_a_unit_of_a_single_file_fall_into_the_same_split(tmp_path: Path) -> None:
    source = tmp_path / "all.csv"
    with source.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "patient"])
        writer.writerows([f"note {row}", "ab"[row % 2], f"p{row % 60}"] for row in range(300))
    loaded = {
        split: load_rows(str(source), split, TASK, {}, unit_column="patient")
        for split in ("train", "validation", "test")
    }
    assert sum(len(each.rows["text"]) for each in loaded.values()) == 300
    for each in loaded.values():
        assert each.units is not None and np.bincount(each.units).tolist() == [5] * count_units(each.units)
    # By hand: sha256 of the id alone places a row.
    position = int.from_bytes(hashlib.sha256(repr(("p0",)).encode()).digest()[:8], "big") / 2**64
    expected = "train" if position < 0.8 else "validation" if position < 0.9 else "test"
    assert "note 0" in loaded[expected].rows["text"]
