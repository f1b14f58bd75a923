"""``consilium sweep`` and ``consilium compare``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.sweep import Sweep
    from simulations.sweep_grid import Cell

SWEEP_HELP = """Simulate every combination of some settings, with several seeds, and show mean and spread.

privacy.epsilon=none is the run without a privacy mechanism. phase.KEY varies every phase, phase.NAME.KEY one of \
them, phase.algorithm (or server.algorithm) those that train lora. The same command again continues where it was \
stopped; further values and seeds may be added.

Examples:

  consilium sweep --over privacy.epsilon=1,8,none --seeds 3 --out sweeps/demo

  consilium sweep --config run.toml --over privacy.epsilon=1,3,8,none --over server.algorithm=ffa,fedsvd --seeds 3 \
--out sweeps/frontier

  consilium sweep --config run.toml --over phase.lora.rounds=4,8 --over lora.r=4,8 --out sweeps/shape --dry-run
"""

COMPARE_HELP = """Compare two sweeps pair by pair (same choices, same seed), or two single runs.

Differences are SECOND - FIRST.

Examples:

  consilium compare sweeps/ffa sweeps/fedsvd

  consilium compare sweeps/ffa sweeps/fedsvd --metric macro_f1 --split validation --json

  consilium compare runs/a runs/b
"""

INTERRUPTED = 130
WIDE = 200
"""Columns of a table that is written to a file or a pipe: some more than other tables need."""


def sweep_command(
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep, new or to be continued.")],
    over: Annotated[
        list[str] | None, typer.Option("--over", help="section.key=value,value to vary; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The runs' settings (TOML); else the demo's.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each combination: seeds 0, 1, …")] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Runs at a time. Default: one a core (or simulation.workers); with a GPU or Ray, one."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs, start and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Runs a sweep, or what is left of it, and prints its table."""
    from rich.console import Console

    from server.progress import result_console
    from simulations.sweep import run_sweep

    sweep = _sweep(config, over or [], settings or [], seeds, out, jobs)
    sweep.refuse_other()
    if dry_run:
        _show_plan(sweep, as_json)
        return
    if config is None:
        _write_demo_data(sweep)
    try:
        with _Bar(sweep, Console(stderr=True)) as bar:
            content = run_sweep(sweep, bar.heard)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, continue with the same command", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if as_json:
        json.dump(content, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        console = result_console()
        _show(content, console if console.is_terminal else Console(width=WIDE))
    failed = [f"{row['cell']} ({row['why']})" for row in content["cells"] if row["status"] != "completed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(sweep.cells)} runs failed: {'; '.join(failed)}; mend the cause, and give the same "
            "command again"
        )


def _sweep(
    config: Path | None, over: Sequence[str], settings: Sequence[str], seeds: int, out: Path, jobs: int | None
) -> Sweep:
    """The sweep that is asked for, checked."""
    from common.toml_settings import read_toml
    from simulations.cli import demo_tables
    from simulations.sweep import Sweep
    from simulations.sweep_grid import cells_of, read_axis

    axes = tuple(read_axis(text) for text in over)
    if config is None:
        tables = demo_tables(out.resolve())
        tables["simulation"]["compare"] = False
    else:
        tables = read_toml(config)
    cells = cells_of(tables, settings, axes, seeds, str(config or "the embedded default"))
    jobs, threads = _shares(cells, jobs)
    return Sweep(out, axes, tuple(cells), jobs, threads)


def _shares(cells: Sequence[Cell], jobs: int | None) -> tuple[int, int]:
    """Processes, and threads of each."""
    from common.model import Placement

    cores, simulation = _cores(), cells[0].config.simulation
    if jobs is None:  # one at a time where a run by itself takes the whole machine
        whole = simulation.engine == "ray" or Placement.choose(simulation.device).device.type != "cpu"
        jobs = 1 if whole else max(1, cores // (simulation.workers or 1))
    jobs = min(jobs, len(cells))
    return jobs, max(1, cores // jobs)


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_demo_data(sweep: Sweep) -> None:
    from simulations.cli import DEMO_DATA
    from simulations.demo import write_demo_data

    data = sweep.folder.resolve() / DEMO_DATA
    if not data.exists() and all(cell.config.data.path == str(data) for cell in sweep.cells):
        write_demo_data(data)


class _Bar:
    """One bar over the cells; a part of a cell counts as far as its rounds are done."""

    def __init__(self, sweep: Sweep, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._running: dict[str, str] = {}
        self._parts: dict[str, float] = {}
        self._before = len(sweep.cells) - len(sweep.unfinished())
        self._total = len(sweep.cells)
        self._console = console
        self._failed = 0
        self._progress = Progress(
            TextColumn("[bold]sweep"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("sweep", total=self._total, completed=self._before, note="loading")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def heard(self, cell: Cell, event: Mapping[str, Any]) -> None:
        """Moves the bar."""
        kind = event["event"]
        if kind == "started":
            self._running[cell.name] = "…"
        elif kind == "round":
            self._running[cell.name] = f"{event['round']}/{event['rounds']}"
            self._parts[cell.name] = event["round"] / event["rounds"]
        else:
            self._running.pop(cell.name, None)
            self._parts[cell.name] = 1.0
            if kind == "failed":
                self._failed += 1
                self._console.print(
                    f"{cell.name} failed: {event['why']}", markup=False, highlight=False, soft_wrap=True
                )
        ended = self._before + sum(part == 1.0 for part in self._parts.values())
        failed = f", {self._failed} failed" if self._failed else ""
        running = "  ".join(f"{name} {note}" for name, note in self._running.items())
        self._progress.update(
            self._task,
            completed=self._before + sum(self._parts.values()),
            note=f"{ended}/{self._total}{failed}  {running}",
        )


def _show_plan(sweep: Sweep, as_json: bool) -> None:
    """What would be run."""
    left = {cell.name for cell in sweep.unfinished()}
    if as_json:
        cells = [
            {"cell": cell.name, "choices": dict(cell.choices), "seed": cell.seed, "finished": cell.name not in left}
            for cell in sweep.cells
        ]
        json.dump({"jobs": sweep.jobs, "threads": sweep.threads, "cells": cells}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    for cell in sweep.cells:
        print(cell.name if cell.name in left else f"{cell.name}  (finished)")
    print(
        f"{len(sweep.cells)} runs, {len(left)} of them left, {sweep.jobs} at a time with {sweep.threads} "
        f"thread{'s' if sweep.threads > 1 else ''} each"
    )


def _show(content: Mapping[str, Any], console: Console) -> None:
    """The table of a sweep and its account of privacy."""
    from rich.table import Table

    from simulations.sweep import caption

    if content["groups"]:
        table = Table(caption=caption(content), caption_justify="left")
        for name in content["table"]["head"]:
            table.add_column(name, justify="left" if name in content["axes"] else "right")
        for line in content["table"]["lines"]:
            table.add_row(*line)
        console.print(table)
    for sentence in content["privacy"]["statements"]:
        console.print(sentence, highlight=False)
    console.print("files: " + ", ".join(content["files"]), soft_wrap=True, highlight=False)


def compare_command(
    first: Annotated[Path, typer.Argument(help="A sweep's or run's folder.")],
    second: Annotated[Path, typer.Argument(help="Another one's.")],
    metric: Annotated[str | None, typer.Option("--metric", help="Default: the one that chose the best round.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="test or validation. Default: test, where both have it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compares two folders and prints what can be concluded."""
    from simulations.compare import compare, in_words

    if split not in (None, "test", "validation"):
        raise ConfigError(f"--split {split}: is not a split; give test or validation")
    content = compare(first, second, metric, split)
    if as_json:
        json.dump(content, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print(in_words(content))
