"""Partitions: every row at one site, units whole, and the shares that each method promises."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Iterator
from math import exp, floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from common.data.split import dealt
from common.data.units import NO_UNIT, units_of
from common.errors import ConfigError, ConsiliumError, DataError
from common.sections import DataSection
from simulations.partition import sites_of

METHODS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 1.0},
    "pathological": {"classes_per_site": 2},
    "linear": {},
    "square": {},
    "exponential": {},
}


def split(labels: list[Any], seed: int = 0, units: Any = None, **settings: Any) -> dict[str, list[int]]:
    return sites_of(DataSection(**settings), seed, len(labels), labels=labels, units=units)


def labels_of(n: int, classes: int, seed: int = 0) -> list[str]:
    return [f"label {number}" for number in np.random.default_rng(seed).integers(0, classes, n)]


@pytest.fixture(autouse=True)
def nothing_is_said_or_sent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """No output, no warning (these are errors here) and no connection, whatever the library does."""

    def refused(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refused)
    yield
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@effort(max_examples=40, deadline=None)
@given(
    method=st.sampled_from([*METHODS]),
    sites=st.integers(1, 6),
    classes=st.integers(2, 4),
    rows=st.integers(1, 120),
    people=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**40),
)
def test_every_row_is_at_exactly_one_site_and_no_unit_is_split(
    method: str, sites: int, classes: int, rows: int, people: int | None, seed: int
) -> None:
    labels = labels_of(rows, classes, seed)
    ids = None if people is None else np.random.default_rng(seed + 1).integers(0, people, rows).tolist()
    settings = {"sites": sites, "partition": method, "privacy_unit": None if ids is None else "id", **METHODS[method]}
    units = None if ids is None else units_of(ids)
    try:
        parts = split(labels, seed, units, **settings)
    except ConsiliumError as refused:
        assert "data." in str(refused)  # one clear error, whose conditions have tests of their own
        return
    assert len(parts) == sites and all(parts.values())
    assert sorted(row for part in parts.values() for row in part) == list(range(rows))
    assert all(part == sorted(part) for part in parts.values())
    assert parts == split(labels, seed, units, **settings)
    if ids is not None:
        met = [{ids[row] for row in part} for part in parts.values()]
        assert sum(map(len, met)) == len(set(ids))


def test_with_the_number_of_sites_alone_rows_are_dealt_out_as_ever() -> None:
    assert split(labels_of(100, 3), seed=5, sites=7) == dealt(100, 7, seed=5)
    assert dealt(10, 3, seed=0) == {"site-1": [1, 4, 7, 9], "site-2": [0, 3, 6], "site-3": [2, 5, 8]}  # since 0.1


def test_units_are_dealt_out_as_ever_and_rows_without_one_are_at_no_site() -> None:
    ids = ["b", "a", "", "b", "c", None, "d", "a"]
    units = units_of(ids)
    parts = split(["x"] * 8, seed=3, units=units, sites=2, privacy_unit="id")
    expected = {
        site: [row for row, unit in enumerate(units) if unit in chosen] for site, chosen in dealt(4, 2, seed=3).items()
    }
    assert parts == expected
    assert units[2] == NO_UNIT and 2 not in [row for part in parts.values() for row in part]


@pytest.mark.parametrize("method", [*METHODS])
def test_another_seed_is_another_partition(method: str) -> None:
    labels = labels_of(400, 4)
    settings = {"sites": 5, "partition": method, **METHODS[method]}
    assert split(labels, 1, **settings) != split(labels, 2, **settings)


@pytest.mark.parametrize(
    ("method", "growth"), [("linear", lambda k: k), ("square", lambda k: k**2), ("exponential", exp)]
)
def test_sizes_grow_as_promised_and_the_last_site_gets_the_rest(method: str, growth: Any) -> None:
    shares = [growth(k) / sum(map(growth, (1, 2, 3, 4))) for k in (1, 2, 3, 4)]
    sizes = [floor(1001 * share) for share in shares]
    sizes[3] = 1001 - sum(sizes[:3])
    assert [len(part) for part in split(labels_of(1001, 3), sites=4, partition=method).values()] == sizes
    if method == "linear":
        assert sizes == [100, 200, 300, 401]  # a tenth, and so on
    if method == "square":
        assert sizes == [33, 133, 300, 535]  # 1, 4, 9 and 16 of 30


@pytest.mark.parametrize("method", ["linear", "exponential", "dirichlet", "pathological"])
def test_the_order_of_the_file_makes_no_difference_between_sites(method: str) -> None:
    """Of a sorted file each site gets rows from all over it, and not a piece."""
    labels = ["a", "b"] * 2000
    settings = {**METHODS[method], "alpha": 100.0} if method == "dirichlet" else METHODS[method]
    for part in split(labels, sites=3, partition=method, **settings).values():
        assert abs(np.mean(part) / 2000 - 1) < 0.15


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_the_shares_of_a_label_have_the_mean_and_the_variance_of_a_dirichlet_distribution(alpha: float) -> None:
    """Each of K shares has the mean 1/K and the variance (1/K)(1 - 1/K) / (K α + 1); 300 labels are 300 draws."""
    sites, classes, rows = 5, 300, 200
    labels = [f"{number:03d}" for number in range(classes) for _ in range(rows)]
    parts = split(labels, sites=sites, partition="dirichlet", alpha=alpha)
    counts = [Counter(labels[row] for row in part) for part in parts.values()]
    shares = np.array([[count[f"{number:03d}"] / rows for number in range(classes)] for count in counts])
    expected = (1 / sites) * (1 - 1 / sites) / (sites * alpha + 1)
    assert np.allclose(shares.sum(axis=0), 1)
    assert np.abs(shares.mean(axis=1) - 1 / sites).max() < 4 * np.sqrt(expected / classes)
    assert shares.var() == pytest.approx(expected, rel=0.15)


def test_a_large_alpha_is_nearly_iid_and_a_small_one_nearly_one_label_a_site() -> None:
    labels = labels_of(6000, 6)

    def largest_share(alpha: float) -> float:
        parts = split(labels, sites=6, partition="dirichlet", alpha=alpha, min_size=1)
        return float(np.mean([Counter(labels[row] for row in part).most_common(1)[0][1] / len(part)
                              for part in parts.values()]))  # fmt: skip

    assert largest_share(1000.0) < 0.25 < 0.6 < largest_share(0.05)


@pytest.mark.parametrize(("sites", "each"), [(4, 2), (9, 2), (3, 4), (6, 1)])
def test_a_pathological_site_has_so_many_labels_and_every_label_a_site(sites: int, each: int) -> None:
    labels = labels_of(600, 6)
    parts = split(labels, sites=sites, partition="pathological", classes_per_site=each)
    held = [{labels[row] for row in part} for part in parts.values()]
    assert [len(one) for one in held] == [each] * sites
    assert len(set().union(*held)) == 6
    for label in set(labels):
        shares = [sum(labels[row] == label for row in part) for part, one in zip(parts.values(), held, strict=True)
                  if label in one]  # fmt: skip
        assert max(shares) - min(shares) <= 1  # split evenly among those that have it


def test_a_unit_counts_under_its_most_frequent_label_and_of_equal_ones_under_the_first() -> None:
    rows = [("p", "b"), ("p", "b"), ("p", "a"), ("q", "b"), ("q", "a"), ("r", "c"), ("s", "b"), ("t", "a")]
    units = units_of([unit for unit, _ in rows])
    labels = [label for _, label in rows]
    parts = split(labels, 0, units, sites=3, partition="pathological", classes_per_site=1, privacy_unit="id")
    people = [{rows[row][0] for row in part} for part in parts.values()]
    assert people == [{"q", "t"}, {"p", "s"}, {"r"}]  # a: q and t; b: p and s; c: r


def test_each_site_has_its_least_size_in_units() -> None:
    labels = labels_of(400, 4)
    units = units_of([row // 2 for row in range(400)])
    settings = {"sites": 8, "partition": "dirichlet", "alpha": 0.5, "min_size": 12, "privacy_unit": "id"}
    parts = split(labels, 0, units, **settings)
    assert min(len({int(units[row]) for row in part}) for part in parts.values()) >= 12
    assert any(
        min(map(len, split(labels, seed, units, **{**settings, "min_size": 1}).values())) < 24 for seed in range(5)
    )  # it would not hold by itself


def test_ten_thousand_sites_take_seconds() -> None:
    labels = labels_of(100_000, 5)
    parts = split(labels, sites=10_000, partition="dirichlet", alpha=100.0)
    assert len(parts) == 10_000 and [*parts][:2] == ["site-00001", "site-00002"]


def test_labels_count_by_their_text_so_that_a_file_of_text_gives_the_same_sites() -> None:
    numbers = np.random.default_rng(0).integers(0, 12, 300).tolist()
    settings = {"sites": 4, "partition": "dirichlet", "alpha": 0.5}
    assert split(numbers, **settings) == split([str(number) for number in numbers], **settings)


@pytest.mark.parametrize(
    ("settings", "rows", "problem"),
    [
        ({}, 10, "data.site_column or data.sites: one is needed"),
        ({"sites": 11}, 10, "data.sites = 11: there are only 10 rows; use fewer sites"),
        ({"sites": 11, "partition": "linear"}, 10, "data.sites = 11: there are only 10 rows; use fewer sites"),
        ({"sites": 4, "min_size": 3}, 10, "data.min_size = 3: 4 sites of that size need 12 rows, and there are 10"),
        (
            {"sites": 4, "partition": "exponential"},
            20,
            "data.partition = 'exponential': would leave one of 4 sites with fewer than 1 of 20 rows; lower",
        ),
        ({"sites": 1000, "partition": "exponential"}, 5000, "use fewer sites"),
        (
            {"sites": 2, "partition": "pathological", "classes_per_site": 4},
            60,
            "data.classes_per_site = 4: the data have 3 labels; lower it",
        ),
        (
            {"sites": 2, "partition": "pathological", "classes_per_site": 1},
            60,
            "data.classes_per_site = 1: 2 sites have 2 of the 3 labels at most, and the others would belong to no site",
        ),
        (
            {"sites": 30, "partition": "pathological", "classes_per_site": 3},
            60,
            "data.classes_per_site = 3: 100 draws all leave one of 30 sites with fewer than 1 of 60 rows, or a label",
        ),
        (
            {"sites": 20, "partition": "dirichlet", "alpha": 0.01, "min_size": 3},
            60,
            "data.alpha = 0.01: 110 draws all leave one of 20 sites with fewer than 3 of 60 rows; raise it, lower",
        ),
    ],
)
def test_what_the_data_do_not_allow_is_one_error_with_field_value_and_remedy(
    settings: dict[str, Any], rows: int, problem: str
) -> None:
    with pytest.raises(ConsiliumError) as refused:
        split([f"label {row % 3}" for row in range(rows)], **settings)
    assert problem in str(refused.value) and refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


def test_without_labels_what_goes_by_them_says_what_does_not() -> None:
    data = DataSection(sites=2, partition="dirichlet", alpha=1.0)
    with pytest.raises(ConfigError, match=r"this task has none; use iid, linear.*--label COLUMN"):
        sites_of(data, 0, 10)
    with pytest.raises(DataError, match="row 2 has no label; fill it in or drop the row"):
        sites_of(data, 0, 4, labels=["a", "b", " ", "a"])


def test_by_column_sites_have_names_for_paths_in_their_order() -> None:
    column = ["b/2", "a", "b/2", "_x", "a"]
    assert sites_of(DataSection(site_column="c"), 0, 5, column=column) == {"s_x": [3], "a": [1, 4], "b-2": [0, 2]}
    with pytest.raises(DataError, match=r"two sites would both be called 'b-2'"):
        sites_of(DataSection(site_column="c"), 0, 2, column=["b/2", "b 2"])
    with pytest.raises(DataError, match="row 1 names no site"):
        sites_of(DataSection(site_column="c"), 0, 2, column=["b", None])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sites": 3, "partition": "dirichlet"}, "alpha: is missing; partition = 'dirichlet' needs it"),
        ({"sites": 3, "partition": "pathological"}, "classes_per_site: is missing"),
        ({"sites": 3, "alpha": 1.0}, "alpha = 1.0: belongs to partition = 'dirichlet'; set that, or leave it out"),
        ({"sites": 3, "partition": "linear", "classes_per_site": 2}, "classes_per_site = 2: belongs to partition"),
        ({"partition": "linear"}, "sites: is missing; partition = 'linear' needs the number of sites"),
        ({"site_column": "c", "sites": 3}, "site_column = 'c': says which rows belong to which site; leave it out"),
        ({"site_column": "c", "partition": "square"}, "site_column = 'c'"),
        ({"sites": 3, "partition": "dirichlet", "alpha": 0.0}, "greater than 0"),
        ({"sites": 3, "partition": "dirichlet", "alpha": float("nan")}, "finite number"),
        ({"sites": 3, "partition": "pathological", "classes_per_site": 0}, "greater than or equal to 1"),
        ({"sites": 3, "min_size": 0}, "greater than or equal to 1"),
        ({"sites": 3, "partition": "shards"}, "'iid', 'dirichlet'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        DataSection(**settings)
    assert problem in str(refused.value)


def test_an_empty_site_column_is_none_so_that_a_setting_can_take_it_back() -> None:
    assert DataSection(site_column="", sites=3).site_column is None
