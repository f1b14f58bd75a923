"""Splits of a single file, and which rows belong to which site."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from common.data.split import by_column, count, dealt, draw_split, select
from common.errors import DataError

FIELDS = ("label", "text")
SPLITS = ("train", "validation", "test")


def rows(n: int) -> dict[str, list[Any]]:
    return {"text": [f"note {index}" for index in range(n)], "label": [index % 3 for index in range(n)]}


def texts(data: dict[str, list[Any]]) -> dict[str, set[str]]:
    return {split: set(draw_split(data, split, FIELDS)["text"]) for split in SPLITS}


# ---- splits of a single file ----------------------------------------------------------------------------------------


def test_the_three_splits_are_disjoint_and_together_everything() -> None:
    parts = texts(rows(2000))
    assert set.union(*parts.values()) == set(rows(2000)["text"])
    assert sum(map(len, parts.values())) == 2000
    shares = [len(parts[split]) / 2000 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_drawing_again_gives_the_same_rows_in_the_order_of_the_file() -> None:
    once, again = (draw_split(rows(300), "validation", FIELDS) for _ in range(2))
    assert once == again
    numbers = [int(text.split()[1]) for text in once["text"]]
    assert numbers == sorted(numbers)
    assert once["label"] == [number % 3 for number in numbers]


def test_a_row_falls_into_the_same_split_wherever_it_stands_and_whatever_is_added() -> None:
    few, many = texts(rows(300)), texts(rows(900))
    backwards = texts({field: values[::-1] for field, values in rows(300).items()})
    for split in SPLITS:
        assert few[split] <= many[split]
        assert backwards[split] == few[split]


def test_equal_rows_fall_into_the_same_split() -> None:
    data = {"text": ["the same note"] * 5 + ["another"], "label": [1] * 5 + [2]}
    counts = []
    for split in SPLITS:
        try:
            counts.append(draw_split(data, split, FIELDS)["text"].count("the same note"))
        except DataError:
            counts.append(0)
    assert sorted(counts) == [0, 0, 5]


def test_a_column_that_is_not_content_moves_no_row() -> None:
    """Else the sites' training rows, read with their site, would overlap the server's test rows, read without."""
    plain, with_site = rows(500), {**rows(500), "site_column": [index % 7 for index in range(500)]}
    for split in SPLITS:
        assert draw_split(with_site, split, FIELDS)["text"] == draw_split(plain, split, FIELDS)["text"]
    assert len(draw_split(with_site, "test", FIELDS)["site_column"]) == len(draw_split(plain, "test", FIELDS)["text"])


def test_a_split_that_does_not_exist_or_stays_empty_is_refused() -> None:
    with pytest.raises(DataError, match="split 'dev': a single file is split into train, validation, test only"):
        draw_split(rows(10), "dev", FIELDS)
    empty = [split for split in SPLITS if not _has_rows(split)]
    assert len(empty) == 2
    with pytest.raises(DataError, match="no row of 1 falls into it; give more rows, or one file per split"):
        draw_split(rows(1), empty[0], FIELDS)


def _has_rows(split: str) -> bool:
    try:
        return count(draw_split(rows(1), split, FIELDS)) == 1
    except DataError:
        return False


def test_selecting_keeps_the_order_asked_for_and_counting_needs_no_fields() -> None:
    assert select(rows(5), [3, 0]) == {"text": ["note 3", "note 0"], "label": [0, 0]}
    assert (count(rows(5)), count({}), count({"text": []})) == (5, 0, 0)


# ---- sites ----------------------------------------------------------------------------------------------------------


def test_sites_by_column_take_their_rows_in_order_and_stand_in_name_order() -> None:
    assert by_column(["west", "north", "west", 7, "north"]) == {"7": [3], "north": [1, 4], "west": [0, 2]}
    assert list(by_column(["b", "a", "c"])) == ["a", "b", "c"]


@pytest.mark.parametrize("missing", [None, ""])
def test_a_row_without_a_site_is_refused_by_its_number(missing: Any) -> None:
    with pytest.raises(DataError, match=r"data\.site_column: row 1 names no site; fill the column or drop the row"):
        by_column(["a", missing])


def test_dealt_rows_are_complete_disjoint_and_nearly_equal() -> None:
    sites = dealt(100, 7, seed=0)
    assert list(sites) == [f"site-{k}" for k in range(1, 8)]
    assert Counter(index for part in sites.values() for index in part) == Counter(range(100))
    assert {len(part) for part in sites.values()} == {14, 15}
    assert all(part == sorted(part) for part in sites.values())


def test_dealing_is_a_function_of_the_seed_and_mixes_the_rows() -> None:
    assert dealt(100, 3, seed=1) == dealt(100, 3, seed=1) != dealt(100, 3, seed=2)
    means = [sum(part) / len(part) for part in dealt(3000, 3, seed=0).values()]
    assert means == pytest.approx([1499.5] * 3, abs=100)


def test_names_of_many_dealt_sites_sort_as_their_numbers() -> None:
    names = list(dealt(120, 100, seed=0))
    assert names[0] == "site-001" and names == sorted(names)


def test_fewer_rows_than_sites_are_refused() -> None:
    assert len(dealt(3, 3, seed=0)) == 3
    with pytest.raises(DataError, match=r"data\.sites = 4: there are only 3 rows; use fewer sites"):
        dealt(3, 4, seed=0)
