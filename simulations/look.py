"""What a data set is like, counted exactly: for its owner alone, before anything is trained.

Nothing here is private and nothing here is sent: the figures are of raw rows, without noise. They show what makes a run
fail or flatter itself: labels that a site lacks, texts that occur twice, at two sites, or in training and test data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from common.data.read import SUFFIXES, Table, has_split, is_missing
from common.data.units import NO_UNIT, units_of
from common.errors import ConfigError, DataError
from simulations.site_files import column_of, read_source

SPLITS = ("train", "validation", "test")
NOTICE = (
    "These figures are of the raw rows, exact and without any privacy: they are for the owner of the data alone. "
    "Nothing of them is sent anywhere; do not pass them on."
)
ONE_SITE = "all rows"
"""What stands for the sites where none are told apart."""

LONGEST_NAME = 28

CountTokens = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Columns:
    """Which columns are looked at."""

    text: str = "text"
    label: str | None = None
    """``None``: ``label``, where there is such a column."""
    site: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Lengths:
    """Of the texts that are not missing; 0 where there are none."""

    median: int
    most: int
    """95 % of the texts are not longer."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """The median and 95 % as lengths that occur."""
        if not lengths:
            return cls(0, 0, 0)
        median, most = np.percentile(lengths, [50, 95], method="inverted_cdf")
        return cls(int(median), int(most), max(lengths))


@dataclass(frozen=True)
class SiteView:
    """A site's rows of the split that is learnt from."""

    rows: int
    units: int | None
    """Privacy units; rows without an id do not count. ``None``: no column of them was named."""
    labels: dict[str, int]
    """Label → rows, the most frequent one first; rows without a label do not count."""
    without_text: int
    without_label: int
    repeated: int
    """Rows whose text occurs earlier at this site."""
    elsewhere: int
    """Rows whose text occurs at another site too."""
    characters: Lengths
    tokens: Lengths | None


@dataclass(frozen=True)
class SplitView:
    """A split, all sites together."""

    rows: int
    missing: dict[str, int]
    """Column → rows without a value, of the columns that have any."""
    repeated: int
    """Rows whose text occurs earlier in this split."""
    leaked: dict[str, int]
    """Earlier split → rows of this one whose text occurs there too."""
    leaked_units: dict[str, int]
    """Earlier split → rows of this one whose privacy unit occurs there too."""


@dataclass(frozen=True)
class Look:
    """What was found."""

    split: str
    """What the figures by site are of."""
    sites: dict[str, SiteView]
    splits: dict[str, SplitView]
    lengths: tuple[int, ...] = field(repr=False)
    """Of each text of ``split``: tokens where they were counted, else characters."""
    in_tokens: bool

    @property
    def labels(self) -> dict[str, int]:
        """Label → rows of all sites, the most frequent one first."""
        total: Counter[str] = Counter()
        for site in self.sites.values():
            total.update(site.labels)
        return _by_frequency(total)

    def as_json(self) -> dict[str, Any]:
        """Everything but the single lengths."""
        found = asdict(self)
        del found["lengths"], found["in_tokens"]
        return {"schema_version": 1, "notice": NOTICE, "labels": self.labels, **found}


@dataclass(frozen=True)
class _Rows:
    """What is looked at of each row of a split."""

    sites: list[str]
    texts: list[str | None]
    labels: list[str | None] | None
    units: list[str | None] | None
    missing: dict[str, int]

    def keys(self) -> list[bytes | None]:
        """Equal for texts that differ in case and blanks alone; ``None`` without a text."""
        return [None if text is None else _key(text) for text in self.texts]


def look(source: Path, columns: Columns, split: str = "train", count_tokens: CountTokens | None = None) -> Look:
    """Reads everything and counts.

    Args:
        source: a file; a folder with one file per split; or a folder of such folders, one per site.
        split: of which the figures by site are; a single file is taken as a whole.
        count_tokens: texts → the number of tokens of each.

    Raises:
        DataError: a file or column is missing or cannot be read.
        ConfigError: the sites are given twice.
    """
    source = source.expanduser()
    splits = {name: _joined(parts) for name, parts in _read(source, columns, split).items()}
    split = split if split in splits else next(iter(splits))
    keys = {name: rows.keys() for name, rows in splits.items()}
    tokens = None
    if count_tokens is not None:
        tokens = count_tokens([text for text in splits[split].texts if text is not None])
    characters = [len(text) for text in splits[split].texts if text is not None]
    return Look(
        split,
        _by_site(splits[split], keys[split], tokens),
        {name: _split_view(name, splits, keys) for name in splits},
        tuple(characters if tokens is None else tokens),
        tokens is not None,
    )


def _read(source: Path, columns: Columns, split: str) -> dict[str, list[_Rows]]:
    """Split → its rows, file by file."""
    wanted = [*SPLITS, *([split] if split not in SPLITS else [])]
    found: dict[str, list[_Rows]] = {}
    if source.is_dir() and not _splits_in(source, wanted):
        folders = [folder for folder in sorted(source.iterdir()) if folder.is_dir() and _splits_in(folder, wanted)]
        if folders and columns.site is not None:
            raise ConfigError(
                f"--site-column {columns.site}: the folders of {source} are the sites already; leave it out, or look "
                "at one of them"
            )
        for folder in folders:
            for name in _splits_in(folder, wanted):
                found.setdefault(name, []).append(_rows_of(folder, name, columns, folder.name))
    elif source.is_dir():
        found = {name: [_rows_of(source, name, columns)] for name in _splits_in(source, wanted)}
    else:
        found = {source.stem: [_rows_of(source, split, columns)]}
    if not found:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"'{source}': neither it nor its folders hold a file of {', '.join(wanted)} ({kinds})")
    if source.is_dir() and split not in found:
        raise DataError(f"--split {split}: {source} has no such file; found: {', '.join(found)}")
    return {name: found[name] for name in sorted(found, key=[*SPLITS, *found].index)}


def _splits_in(folder: Path, wanted: Sequence[str]) -> list[str]:
    return [split for split in wanted if has_split(str(folder), split)]


def _rows_of(source: Path, split: str, columns: Columns, site: str | None = None) -> _Rows:
    table, file = read_source(source, split)
    texts = column_of(table, file, columns.text, "--text")
    label = columns.label or ("label" if "label" in table.names else None)
    if columns.site is None:
        sites = [site or ONE_SITE] * table.rows
    else:
        values = column_of(table, file, columns.site, "--site-column")
        sites = ["(none)" if is_missing(value) else str(value) for value in values]
    return _Rows(
        sites,
        _present(texts),
        None if label is None else _present(column_of(table, file, label, "--label")),
        None if columns.unit is None else _present(column_of(table, file, columns.unit, "--unit")),
        dict(_missing(table)),
    )


def _present(values: Sequence[Any]) -> list[str | None]:
    return [None if is_missing(value) else str(value) for value in values]


def _missing(table: Table) -> Iterator[tuple[str, int]]:
    for name in table.names:
        rows = sum(map(is_missing, table.values(name)))
        if rows:
            yield name, rows


def _joined(parts: Sequence[_Rows]) -> _Rows:
    missing: Counter[str] = Counter()
    for part in parts:
        missing.update(part.missing)
    labelled = [part.labels for part in parts if part.labels is not None]
    united = [part.units for part in parts if part.units is not None]
    return _Rows(
        [site for part in parts for site in part.sites],
        [text for part in parts for text in part.texts],
        [label for each in labelled for label in each] if len(labelled) == len(parts) else None,
        [unit for each in united for unit in each] if len(united) == len(parts) else None,
        dict(missing),
    )


def _key(text: str) -> bytes:
    return blake2b(" ".join(text.casefold().split()).encode(errors="surrogatepass"), digest_size=16).digest()


def _by_site(rows: _Rows, keys: Sequence[bytes | None], tokens: Sequence[int] | None) -> dict[str, SiteView]:
    places: dict[bytes, set[str]] = {}
    for key, site in zip(keys, rows.sites, strict=True):
        if key is not None:
            places.setdefault(key, set()).add(site)
    chosen: dict[str, list[int]] = {}
    for index, site in enumerate(rows.sites):
        chosen.setdefault(site, []).append(index)
    present = iter(tokens or ())
    counted = [None if text is None or tokens is None else next(present) for text in rows.texts]
    return {site: _site_view(rows, keys, places, counted, chosen[site]) for site in sorted(chosen)}


def _site_view(
    rows: _Rows,
    keys: Sequence[bytes | None],
    places: Mapping[bytes, set[str]],
    tokens: Sequence[int | None],
    chosen: Sequence[int],
) -> SiteView:
    texts = [text for index in chosen if (text := rows.texts[index]) is not None]
    known = [key for index in chosen if (key := keys[index]) is not None]
    counted = [number for index in chosen if (number := tokens[index]) is not None]
    labels = Counter() if rows.labels is None else Counter(rows.labels[index] for index in chosen)
    without_label = labels.pop(None, 0)
    units = None if rows.units is None else units_of([rows.units[index] for index in chosen])
    return SiteView(
        rows=len(chosen),
        units=None if units is None else len({*units.tolist()} - {NO_UNIT}),
        labels=_by_frequency({str(label): number for label, number in labels.items()}),
        without_text=len(chosen) - len(texts),
        without_label=without_label,
        repeated=len(known) - len(set(known)),
        elsewhere=sum(len(places[key]) > 1 for key in known),
        characters=Lengths.of([len(text) for text in texts]),
        tokens=Lengths.of(counted) if counted else None,
    )


def _split_view(name: str, splits: Mapping[str, _Rows], keys: Mapping[str, Sequence[bytes | None]]) -> SplitView:
    known = [key for key in keys[name] if key is not None]
    earlier = list(splits)[: list(splits).index(name)]
    return SplitView(
        rows=len(splits[name].sites),
        missing=splits[name].missing,
        repeated=len(known) - len(set(known)),
        leaked={other: sum(map({*keys[other]}.__contains__, known)) for other in earlier},
        leaked_units={
            other: _met(mine, theirs)
            for other in earlier
            if (mine := splits[name].units) is not None and (theirs := splits[other].units) is not None
        },
    )


def _met(units: Sequence[str | None], others: Sequence[str | None]) -> int:
    known = {unit.strip() for unit in others if unit is not None}
    return sum(unit is not None and unit.strip() in known for unit in units)


def _by_frequency(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def shown(name: str) -> str:
    """A name from the data as it may be drawn or printed: no control characters, not too long, and no underscore in
    front, which a legend would take for a mark of its own."""
    plain = "".join(char if char.isprintable() else " " for char in name)
    plain = plain if len(plain) <= LONGEST_NAME else plain[: LONGEST_NAME - 1] + "…"
    return f" {plain}" if plain.startswith("_") else plain
