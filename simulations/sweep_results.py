"""What came of a sweep: one row a cell, and mean and spread of each group of cells that differ in their seed alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from server.evaluation import LOWER_IS_BETTER
from simulations.records import read_record
from simulations.sweep_grid import Cell

SPREAD = "mean ± standard deviation over the seeds (n − 1 in the denominator)"
SPLITS = ("validation", "test")

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """One cell and its result."""

    cell: str
    choices: Mapping[str, str]
    """Axis → value, as written."""
    seed: int
    status: str
    """``completed``, ``failed`` or ``missing``."""
    why: str = ""
    """Of a failure."""
    metric: str = ""
    """That chose the best round."""
    best_round: int | None = None
    validation: Metrics = field(default_factory=dict)
    """At the best round."""
    test: Metrics = field(default_factory=dict)
    bytes_down: int | None = None
    bytes_up: int | None = None
    seconds: float | None = None
    epsilon: float | None = None
    """The largest of all sites for this run alone, the selection among runs not charged; ``None``: no privacy."""
    delta: float | None = None
    """Of the site with that ε."""

    def metrics(self, split: str) -> Metrics:
        """Of ``validation`` or ``test``."""
        return self.validation if split == "validation" else self.test


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one figure."""

    n: int
    mean: float
    deviation: float | None
    """``None`` of a single value."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; ``None`` where there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(len(known), fmean(known), stdev(known) if len(known) > 1 else None)

    def text(self, digits: int = 4) -> str:
        """``0.8123 ± 0.0045``."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Group:
    """The finished cells of the same choices."""

    choices: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """``epsilon 1, algorithm ffa``."""
        return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.choices.items()) or "all"

    def figure(self, split: str, name: str) -> Spread | None:
        """Mean and spread of a metric over the seeds."""
        return Spread.of(row.metrics(split).get(name) for row in self.rows)


def row_of(cell: Cell, folder: Path, failure: str = "") -> Row:
    """What the cell's folder says.

    Args:
        failure: why it failed, if it did.

    Raises:
        OutputError: its result is damaged.
    """
    choices = dict(cell.choices)
    if not (folder / "summary.json").is_file():
        return Row(cell.name, choices, cell.seed, "failed" if failure else "missing", failure)
    summary = read_record(
        folder / "summary.json", "sites", "metric", "best_round", *SPLITS, "bytes_down", "bytes_up", "seconds"
    )
    stated = [site["privacy"] for site in summary["sites"].values() if site["privacy"]]
    private = [one for one in stated if one["epsilon"] is not None]
    worst = max(private, key=lambda one: float(one["epsilon"])) if len(private) == len(stated) and private else None
    return Row(
        cell.name,
        choices,
        cell.seed,
        "completed",
        metric=summary["metric"],
        best_round=summary["best_round"],
        validation=_without_count(summary["validation"]),
        test=_without_count(summary["test"] or {}),
        bytes_down=summary["bytes_down"],
        bytes_up=summary["bytes_up"],
        seconds=round(sum(summary["seconds"].values()), 3),
        epsilon=worst["epsilon"] if worst else None,
        delta=worst["delta"] if worst else None,
    )


def _without_count(metrics: Metrics) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if name != "examples"}


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Finished rows by their choices, in the order of the grid."""
    found: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if row.status == "completed":
            found.setdefault(tuple(row.choices.items()), []).append(row)
    return [Group(dict(choices), tuple(members)) for choices, members in found.items()]


def best_of(groups: Sequence[Group]) -> Group | None:
    """The group with the best mean of the metric on validation data, where all groups have the same metric."""
    metrics = {row.metric for group in groups for row in group.rows}
    if len(metrics) != 1:
        return None
    metric = metrics.pop()
    sign = -1 if metric in LOWER_IS_BETTER else 1
    known = [(spread.mean, group) for group in groups if (spread := group.figure("validation", metric))]
    return max(known, key=lambda one: sign * one[0])[1] if known else None


def table_of(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table: the choices, n, ε, the metrics of both splits, megabytes and seconds.

    The group that is best on validation data is marked by an asterisk. Where there are test figures, of validation only
    the metric that chose the round is shown.
    """
    axes = list(groups[0].choices) if groups else []
    rows = [row for group in groups for row in group.rows]
    tested = any(row.test for row in rows)
    figures = [
        (split, name)
        for split in SPLITS
        for name in dict.fromkeys(name for row in rows for name in row.metrics(split))
        if split == "test" or not tested or name in {row.metric for row in rows}
    ]
    head = [*axes, "n", "ε of a run", *(f"{split} {name.replace('_', '-')}" for split, name in figures)]
    best = best_of(groups)
    lines = []
    for group in groups:
        epsilons = [row.epsilon for row in group.rows]
        lines.append(
            [
                *group.choices.values(),
                f"{len(group.rows)}{' *' if group is best and len(groups) > 1 else ''}",
                "no privacy" if None in epsilons else f"{max(one for one in epsilons if one is not None):.3f}",
                *(_text(group.figure(split, name), 4) for split, name in figures),
                f"{fmean((row.bytes_up or 0) / 2**20 for row in group.rows):.2f}",
                f"{fmean(row.seconds or 0.0 for row in group.rows):.1f}",
            ]
        )
    return [*head, "MiB up", "seconds"], lines


def _text(spread: Spread | None, digits: int) -> str:
    return "" if spread is None else spread.text(digits)


def to_markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|").replace("*", "\\*") for value in values) + " |\n"

    return line(head) + line(["---"] * len(head)) + "".join(map(line, lines))


def to_csv(rows: Sequence[Row]) -> str:
    """One line a cell; the metrics in columns of their own."""
    metrics = {f"{split}_{name}": (split, name) for row in rows for split in SPLITS for name in row.metrics(split)}
    axes = dict.fromkeys(key for row in rows for key in row.choices)
    plain = [
        "cell", *axes, "seed", "status", "why", "metric", "best_round", *metrics, "bytes_down", "bytes_up", "seconds",
        "epsilon_of_run_selection_not_charged", "delta",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, plain, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        values = {**asdict(row), **row.choices, "epsilon_of_run_selection_not_charged": row.epsilon}
        writer.writerow({**values, **{name: row.metrics(split).get(one) for name, (split, one) in metrics.items()}})
    return text.getvalue()
