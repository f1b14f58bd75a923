"""Progress bars on stderr and result tables on stdout. Public figures only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.messages import SiteDescription

WIDE = 132
"""Columns of a table that is written to a file or a pipe."""


def result_console() -> Console:
    """Tables go to stdout; where that is not a terminal, wide enough that no figure is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


class Bars:
    """One bar over the rounds of a run; nothing where stderr is not a terminal.

    Args:
        title: what is running.
        rounds: rounds of the plan.
    """

    def __init__(self, title: str, rounds: int, console: Console) -> None:
        self.rounds = rounds
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(title, total=rounds, note="preparing")

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def sites(self, described: Mapping[str, SiteDescription]) -> None:
        """Shows how many sites take part."""
        self._progress.update(self._task, note=f"{len(described)} sites")

    def reply(self, round: int, site: str, outcome: str) -> None:
        """Shows who answered last."""
        self._progress.update(self._task, note=f"round {round}: {site} {outcome}")

    def round(self, record: Mapping[str, Any]) -> None:
        """Moves the bar, and shows the metrics of a round that was evaluated."""
        metrics = {name: value for name, value in record["metrics"].items() if name != "examples" and value is not None}
        self._progress.update(self._task, completed=record["round"])
        if metrics:
            self._progress.update(self._task, note="  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


def rounds_table(history: Sequence[Mapping[str, Any]], best_round: int, most: int = 60) -> Table:
    """Per round: the global model's metrics, the sites' own with the noise in them, bytes, seconds.

    Long runs show every n-th evaluated round and the best one.
    """
    metrics = [name for name in history[0]["metrics"] if name != "examples"]
    own = list(dict.fromkeys(name for record in history for name in record.get("site_metrics", ())))
    table = Table(title="Global model by round (the server's validation data)")
    figures = [*metrics, *(f"sites' {name}" for name in own)]
    for name in ("round", "phase", *figures, "sites", "KiB down", "KiB up", "seconds"):
        table.add_column(name.replace("_", "-"), justify="left" if name == "phase" else "right")
    rows = history if len(history) <= most else [record for record in history if record["metrics"]]
    every = -(-len(rows) // most)
    for index, record in enumerate(rows):
        if index % every and record["round"] != best_round and index != len(rows) - 1:
            continue
        mark = " *" if record["round"] == best_round else ""
        table.add_row(
            f"{record['round']}{mark}",
            record["phase"],
            *(_figure(record["metrics"].get(name)) if record["metrics"] else "–" for name in metrics),
            *(_noisy_figure(record, name) for name in own),
            f"{len(record['admitted'])}/{len(record['cohort'])}" if "cohort" in record else "",
            f"{record['bytes_down'] / 1024:.1f}" if "bytes_down" in record else "",
            f"{record['bytes_up'] / 1024:.1f}" if "bytes_up" in record else "",
            f"{sum(record['seconds'].values()):.2f}",
        )
    table.caption = "* the saved adapter"
    if own:
        table.caption += "; sites': mean over their training examples in the round ± deviation of the privacy noise"
    return table


def sites_table(sites: Mapping[str, Mapping[str, Any]]) -> Table:
    """Per site: what was promised for the whole plan, and in how many rounds its reply counted."""
    table = Table(title="Privacy by site (full participation in the whole plan)")
    for name in ("site", "public size", "epsilon", "delta", "unit", "noise multiplier", "steps", "rounds"):
        table.add_column(name, justify="left" if name in ("site", "unit") else "right")
    for site, entry in sites.items():
        privacy = entry["privacy"] or {}
        phases = privacy.get("phases", ())
        noise = ", ".join(f"{phase['noise_multiplier']:.2f}" for phase in phases)
        table.add_row(
            site,
            str(entry["public_size"]),
            _epsilon(privacy.get("epsilon")),
            _delta(privacy.get("delta")),
            str(privacy.get("unit", "")),
            noise,
            str(privacy.get("steps", "")),
            str(entry["rounds_admitted"]),
        )
    return table


def _epsilon(value: float | None) -> str:
    return "no privacy claimed" if value is None else f"{value:.3f}"


def _delta(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _noisy_figure(record: Mapping[str, Any], name: str) -> str:
    value, noise = (record.get(key, {}).get(name) for key in ("site_metrics", "site_metrics_noise"))
    return _figure(value) if value is None or noise is None else f"{value:.3f} ± {noise:.3f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
