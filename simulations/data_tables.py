"""What ``consilium data`` prints: the sites of a partition, and what a look found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.progress import result_console
from simulations.look import NOTICE, Lengths, Look, shown

MOST_SHOWN = 60
"""Lines of a table; --json lists all."""
MOST_LABELS = 3
"""Labels of a site that a table names."""

Sizes = Mapping[str, tuple[int, int | None, Mapping[str, int]]]
"""Site → rows, privacy units (``None``: not told apart from rows) and label → rows."""


def show_partition(record: Mapping[str, Any], out: Path) -> None:
    """What :func:`simulations.site_files.write_sites` did."""
    console = result_console()
    parameters = ", ".join(f"{name} = {value}" for name, value in record["parameters"].items())
    seed = "" if record["seed"] is None else f", seed = {record['seed']}"
    units = record["privacy_unit"] is not None
    sizes = {
        site: (entry["rows"], entry["units"] if units else None, entry.get("labels", {}))
        for site, entry in record["sites"].items()
    }
    _print(
        console, _sizes_table(f"{record['rows']:,} rows by {record['method']}: {parameters}{seed}", sizes), len(sizes)
    )
    if record["units_at_several_sites"]:
        _say(
            console,
            f"{record['units_at_several_sites']:,} ids of '{record['privacy_unit']}' occur at several sites. If they "
            "mean the same person there, what each of these sites spends adds up for that person.",
        )
    _say(console, f"raw rows, for their owner alone: {out}")
    _say(console, f'a site.toml takes one as: path = "{out / next(iter(sizes))}"')


def show_look(found: Look, out: Path | None) -> None:
    """What :func:`simulations.look.look` found."""
    console = result_console()
    sizes = {name: (site.rows, site.units, site.labels) for name, site in found.sites.items()}
    _print(console, _sizes_table(f"Sites ({found.split})", sizes), len(sizes))
    _print(console, _texts_table(found), len(sizes))
    if found.labels:
        _print(console, _labels_table(found), len(found.labels))
    _print(console, _splits_table(found), 0)
    if out is not None:
        _say(console, f"picture: {out / 'look.png'}")
    _say(console, NOTICE)


def _sizes_table(title: str, sites: Sizes) -> Table:
    units = any(each is not None for _, each, _ in sites.values())
    labelled = any(labels for _, _, labels in sites.values())
    columns = ["rows", *(["units"] if units else []), *(["labels"] if labelled else [])]
    table = _table(title, "site", columns, "most frequent" if labelled else None)
    for site, (rows, united, labels) in list(sites.items())[:MOST_SHOWN]:
        figures = [rows, *([united or 0] if units else []), *([len(labels)] if labelled else [])]
        _row(table, shown(site), figures, *([_most_frequent(labels)] if labelled else []))
    return table


def _texts_table(found: Look) -> Table:
    counted = any(site.tokens is not None for site in found.sites.values())
    lengths = [f"{unit}\nmedian · 95 % · all up to" for unit in ("characters", *(["tokens"] if counted else []))]
    faults = ["without\ntext", "without\nlabel", "same text\nat this site", "same text\nat another"]
    table = _table(f"Texts ({found.split})", "site", [*faults, *lengths])
    for name, site in list(found.sites.items())[:MOST_SHOWN]:
        figures = [site.without_text, site.without_label, site.repeated, site.elsewhere]
        texts = [_lengths(site.characters), *([_lengths(site.tokens)] if counted else [])]
        _row(table, shown(name), figures, *texts)
    table.caption = "rows; the first row with a text does not count as 'same text at this site'"
    return table


def _labels_table(found: Look) -> Table:
    """Of each label: how many rows, at how many sites, and in which shares."""
    table = _table(f"Labels ({found.split})", "label", ["rows", "share", "sites with it", "least and most at a site"])
    total = sum(found.labels.values())
    for label, rows in list(found.labels.items())[:MOST_SHOWN]:
        shares = [site.labels.get(label, 0) / max(1, sum(site.labels.values())) for site in found.sites.values()]
        held = f"{sum(share > 0 for share in shares)} of {len(shares)}"
        _row(table, shown(label), [rows], f"{rows / total:.1%}", held, f"{min(shares):.0%} … {max(shares):.0%}")
    return table


def _splits_table(found: Look) -> Table:
    table = _table("Splits", "split", ["rows", "same text\nearlier in it"])
    for name in ("text also in", "unit also in", "missing values"):
        table.add_column(name)
    for name, split in found.splits.items():
        named = (_named(each) for each in (split.leaked, split.leaked_units, split.missing))
        _row(table, name, [split.rows, split.repeated], *named)
    table.caption = "also in: what is learnt from is tested on"
    return table


def _table(title: str, first: str, figures: Iterable[str], last: str | None = None) -> Table:
    table = Table(title=Text(title))
    table.add_column(first)
    for name in figures:
        table.add_column(name, justify="right")
    if last is not None:
        table.add_column(last)
    return table


def _row(table: Table, name: str, figures: Iterable[int], *texts: str) -> None:
    """A line; what comes from the data is no markup."""
    table.add_row(Text(name), *(f"{figure:,}" for figure in figures), *map(Text, texts))


def _lengths(lengths: Lengths | None) -> str:
    return "" if lengths is None else f"{lengths.median:,} · {lengths.most:,} · {lengths.longest:,}"


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{shown(name)}: {rows:,}" for name, rows in counts.items() if rows)


def _most_frequent(labels: Mapping[str, int]) -> str:
    total = sum(labels.values())
    ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{shown(label)} {rows / total:.0%}" for label, rows in ordered[:MOST_LABELS])


def _print(console: Console, table: Table, lines: int) -> None:
    console.print(table)
    if lines > MOST_SHOWN:
        _say(console, f"… and {lines - MOST_SHOWN:,} more: --json lists all")


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, soft_wrap=True, markup=False, highlight=False)
