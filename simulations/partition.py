"""Which rows belong to which site: by a column of the data, or by one of flwr-datasets' partitioners.

The same settings and the same seed give the same sites in a simulation and in the files that ``consilium data
partition`` writes.

All rows of a privacy unit go to one site. What is split is units: without ``data.privacy_unit`` each row is one.

=============  ========================================================================================================
partition      which site a unit goes to
=============  ========================================================================================================
iid            dealt out in random order, one after the other
dirichlet      each label's units in proportions p ~ Dir(α, …, α) over the sites (Yurochkin et al. 2019, arXiv
               1905.12022; ``DirichletPartitioner`` without balancing)
pathological   the k-th site has the k-th label, further ones drawn at random; each label's units are split evenly
               among the sites that have it (``PathologicalPartitioner``, "first-deterministic"; after McMahan et al.
               2017, arXiv 1602.05629)
linear         at random; the k-th of K sites gets the share k / Σk, rounded down, the last one also the rest
square         as linear, with k²
exponential    as linear, with eᵏ
=============  ========================================================================================================

The partitioners cut their input into consecutive pieces, so they are given the units in an order drawn from the seed: a
file that is sorted by date or place would otherwise make that the difference between sites.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.data.read import is_missing
from common.data.split import by_column, dealt, shuffled, site_names
from common.data.units import NO_UNIT, count_units
from common.errors import ConfigError, DataError
from common.sections import DataSection

Numbers = npt.NDArray[np.int64]

BY_LABEL = ("dirichlet", "pathological")
"""What cannot be done without labels."""

DRAWS = {"dirichlet": 10, "pathological": 100}
"""How often a draw that does not meet the conditions is repeated. A Dirichlet partitioner itself draws eleven times."""


def sites_of(
    data: DataSection,
    seed: int,
    rows: int,
    *,
    column: Sequence[Any] = (),
    labels: Sequence[Any] | None = None,
    units: Numbers | None = None,
) -> dict[str, list[int]]:
    """Site → indices of its rows, in ascending order.

    Every row is at exactly one site, except that one without a unit, which nobody learns from, is at none (by column:
    at the one that the column names).

    Args:
        seed: the public ``run.seed``.
        rows: how many there are.
        column: the site column's value of each row, where ``data.site_column`` is set.
        labels: the label of each row; ``None`` where the task has none.
        units: number of each row's privacy unit (:func:`common.data.units.units_of`); ``None``: each row is one.

    Raises:
        ConfigError: the settings cannot be met by these data.
        DataError: there are too few rows, or one names no site or no label.
    """
    if data.site_column is not None:
        return _named(by_column(column))
    if data.sites is None:
        raise ConfigError("data.site_column or data.sites: one is needed, to say which rows belong to which site")
    size = rows if units is None else count_units(units)
    _check_number(data, size)
    classes = _classes(data, labels, units) if data.partition in BY_LABEL else None
    parts = _split(data, seed, size, classes)
    return parts if units is None else _rows_of(parts, units)


def _check_number(data: DataSection, size: int) -> None:
    what = _what(data)
    assert data.sites is not None, "checked by the caller"
    if size < data.sites:
        raise DataError(f"data.sites = {data.sites}: there are only {size} {what}; use fewer sites")
    if size < data.sites * data.min_size:
        raise ConfigError(
            f"data.min_size = {data.min_size}: {data.sites} sites of that size need {data.sites * data.min_size} "
            f"{what}, and there are {size}; lower it, or use fewer sites"
        )


def _what(data: DataSection) -> str:
    return "rows" if data.privacy_unit is None else "privacy units"


def _classes(data: DataSection, labels: Sequence[Any] | None, units: Numbers | None) -> Numbers:
    """Number of each unit's label, in the order of the labels as text; of several labels the most frequent one, of
    equally frequent ones the first."""
    if labels is None:
        raise ConfigError(
            f"data.partition = '{data.partition}': goes by labels, and this task has none; use iid, linear, square, "
            "exponential or data.site_column, or write the sites with 'consilium data partition --label COLUMN'"
        )
    for row, label in enumerate(labels):
        if is_missing(label):
            raise DataError(f"data.partition = '{data.partition}': row {row} has no label; fill it in or drop the row")
    numbers = {name: number for number, name in enumerate(sorted({str(label) for label in labels}))}
    classes = np.array([numbers[str(label)] for label in labels], np.int64)
    return classes if units is None else _most_frequent(classes, units)


def _most_frequent(classes: Numbers, units: Numbers) -> Numbers:
    known = units != NO_UNIT
    pairs, counts = np.unique(np.stack([units[known], classes[known]], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    chosen: Numbers = pairs[order][first, 1]
    return np.unique(chosen, return_inverse=True)[1].astype(np.int64)


def _rows_of(parts: Mapping[str, Sequence[int]], units: Numbers) -> dict[str, list[int]]:
    """The rows of each site's units."""
    site_of = np.empty(count_units(units), np.int64)
    for site, chosen in enumerate(parts.values()):
        site_of[chosen] = site
    rows = np.flatnonzero(units != NO_UNIT)
    sites = site_of[units[rows]]
    order = np.argsort(sites, kind="stable")
    ends = np.cumsum(np.bincount(sites, minlength=len(parts)))
    return {site: each.tolist() for site, each in zip(parts, np.split(rows[order], ends[:-1]), strict=True)}


def _split(data: DataSection, seed: int, size: int, classes: Numbers | None) -> dict[str, list[int]]:
    """Site → its units, by the settings' partitioner.

    Raises:
        ConfigError: no draw puts each unit at one site and ``min_size`` of them at each.
    """
    assert data.sites is not None, "checked by the caller"
    if data.partition == "iid":
        return dealt(size, data.sites, seed)
    if data.partition == "pathological":
        assert classes is not None, "it goes by labels"
        _check_classes(data, int(classes.max()) + 1)
    order = shuffled(size, seed)
    for drawn in np.random.SeedSequence(seed).generate_state(DRAWS.get(data.partition, 1)):
        pieces = _drawn(data, int(drawn), size, None if classes is None else classes[order])
        if pieces is not None and min(map(len, pieces)) >= data.min_size:
            return {
                name: np.sort(order[piece]).tolist() for name, piece in zip(site_names(data.sites), pieces, strict=True)
            }
    raise ConfigError(_unmet(data, size))


def _check_classes(data: DataSection, classes: int) -> None:
    assert data.sites is not None and data.classes_per_site is not None, "checked by the settings"
    if data.classes_per_site > classes:
        raise ConfigError(f"data.classes_per_site = {data.classes_per_site}: the data have {classes} labels; lower it")
    if data.sites * data.classes_per_site < classes:
        raise ConfigError(
            f"data.classes_per_site = {data.classes_per_site}: {data.sites} sites have "
            f"{data.sites * data.classes_per_site} of the {classes} labels at most, and the others would belong to no "
            "site; raise it, or use more sites"
        )


def _drawn(data: DataSection, seed: int, size: int, classes: Numbers | None) -> list[Numbers] | None:
    """The pieces, in site order, of one partitioner; ``None`` where it fails or leaves some out."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # on draws that are repeated and on labels that are left out: both end here
        partitioner = _PARTITIONERS[data.partition](data, seed)
        partitioner.dataset = _numbered(size, classes)
        try:
            pieces = [np.asarray(partitioner.load_partition(site), np.int64) for site in range(data.sites or 0)]
        except ValueError:
            return None
    return pieces if np.array_equal(np.sort(np.concatenate(pieces)), np.arange(size)) else None


def _numbered(size: int, classes: Numbers | None) -> Any:
    """A data set of labels alone. Its column is an array and a selection from it is its indices, at the cost of none of
    the lists and tables that many draws and thousands of sites would otherwise need."""
    import datasets

    column = np.zeros(size, np.int64) if classes is None else classes

    class Numbered(datasets.Dataset):  # type: ignore[misc]
        def __getitem__(self, name: str) -> Numbers:
            return column

        def select(self, indices: Sequence[int]) -> Sequence[int]:
            return indices

    return Numbered.from_dict({LABEL: column})


def _dirichlet(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    assert data.alpha is not None, "checked by the settings"
    return DirichletPartitioner(
        data.sites, LABEL, data.alpha, min_partition_size=data.min_size, self_balancing=False, shuffle=False, seed=seed
    )


def _pathological(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(
        data.sites, LABEL, data.classes_per_site, "first-deterministic", shuffle=False, seed=seed
    )


def _linear(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import LinearPartitioner

    return LinearPartitioner(data.sites)


def _square(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import SquarePartitioner

    return SquarePartitioner(data.sites)


def _exponential(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import ExponentialPartitioner

    return ExponentialPartitioner(data.sites)


LABEL = "label"

_PARTITIONERS: dict[str, Callable[[DataSection, int], Any]] = {
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "linear": _linear,
    "square": _square,
    "exponential": _exponential,
}


def _unmet(data: DataSection, size: int) -> str:
    """What was asked for, and what would make it possible."""
    few = f"leave one of {data.sites} sites with fewer than {data.min_size} of {size} {_what(data)}"
    if data.partition == "dirichlet":
        return (
            f"data.alpha = {data.alpha:g}: {11 * DRAWS['dirichlet']} draws all {few}; raise it, lower data.min_size, "
            "or use fewer sites"
        )
    if data.partition == "pathological":
        return (
            f"data.classes_per_site = {data.classes_per_site}: {DRAWS['pathological']} draws all {few}, or a label "
            "with no site, or with more sites than it has rows; change it, lower data.min_size, or change data.sites"
        )
    return f"data.partition = '{data.partition}': would {few}; lower data.min_size, or use fewer sites"


def _named(parts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The parts under names that may stand in paths.

    Raises:
        DataError: two sites would get the same name.
    """
    named: dict[str, list[int]] = {}
    for value, indices in parts.items():
        name = _site_name(value)
        if name in named:
            raise DataError(f"data.site_column: two sites would both be called '{name}' ('{value}' is one); rename one")
        named[name] = indices
    return named


def _site_name(value: str) -> str:
    """A site's name as it may stand in paths and reports."""
    name = "".join(char if char.isalnum() or char in "._-" else "-" for char in value)[:64]
    return name if name[:1].isalnum() else f"s{name}"
