"""A sweep: every cell of a grid as a run in a folder of its own, then one table, one account of privacy, two pictures.

::

    DIR/grid.json           the settings of every cell, as asked for
    DIR/cells/NAME/         each cell's run, as any simulation leaves it (its "consilium simulate --resume" works too)
    DIR/sweep.json          one row a cell, mean and spread of each group, what all runs together cost in privacy
    DIR/sweep.csv           the rows
    DIR/sweep.md            the table and the account of privacy, in words
    DIR/frontier.png, .svg  the metric over ε
    DIR/convergence.png, .svg
    DIR/.lock               held by the sweep at work

The same command again continues: finished cells are kept, interrupted ones resume. Further seeds and values may be
added; what was run stays part of the sweep, since its privacy was spent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import OutputError
from server.checkpoint import to_json, write_atomically
from server.lock import RunLock
from simulations import sweep_privacy as privacy
from simulations import sweep_results as results
from simulations.sweep_grid import Axis, Cell
from simulations.sweep_plots import draw
from simulations.sweep_pool import Heard, Pool

SCHEMA_VERSION = 1
GRID = "grid.json"
SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class Sweep:
    """What is to be run, and where."""

    folder: Path
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    jobs: int
    threads: int
    """Of each process."""

    def cell_folder(self, cell: Cell) -> Path:
        """Where a cell's run is kept."""
        return self.folder / "cells" / cell.name

    def unfinished(self) -> list[Cell]:
        """Cells without a result."""
        return [cell for cell in self.cells if not (self.cell_folder(cell) / "summary.json").is_file()]

    def refuse_other(self) -> None:
        """Raises OutputError if the folder holds a run, or a sweep that is not part of this one."""
        if self.folder.is_file():
            raise OutputError(f"--out {self.folder}: is a file; give a new folder")
        if (self.folder / "manifest.json").exists():
            raise OutputError(f"--out {self.folder}: holds a single run; give a new folder")
        if not (self.folder / GRID).is_file():
            return
        if RunLock(self.folder).holder() is not None:
            raise OutputError(f"--out {self.folder}: another sweep is at work in it; wait for it, or end it")
        here = {cell.name: _plain(cell.settings()) for cell in self.cells}
        for name, before in read_grid(self.folder).items():
            if name not in here:
                raise OutputError(
                    f"--out {self.folder}: its sweep has the cell '{name}', which this command leaves out; what was "
                    "run stays part of a sweep. Add values or seeds to it, or give a new folder"
                )
            if differences := _differences(before, here[name]):
                raise OutputError(
                    f"--out {self.folder}: holds a sweep with other settings: {differences}; give a new folder, or the "
                    "same settings to continue"
                )


def read_grid(folder: Path) -> dict[str, Any]:
    """Cell → settings, of the sweep in a folder.

    Raises:
        OutputError: there is none, it is damaged, or it is of a newer version.
    """
    try:
        grid = json.loads((folder / GRID).read_text(encoding="utf-8"))
        newer = grid["schema_version"] > SCHEMA_VERSION
        cells = dict(grid["cells"])
    except FileNotFoundError:
        raise OutputError(f"{folder}: holds no sweep ({GRID} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{folder}: {GRID} is damaged; restore it from a copy, or give a new folder") from None
    if newer:
        raise OutputError(f"{folder}: was written by a newer version; update this installation")
    return cells


def run_sweep(sweep: Sweep, heard: Heard) -> dict[str, Any]:
    """Runs what is left of a sweep, and writes its results.

    Args:
        heard: is told of everything that happens to a cell.

    Returns:
        What ``sweep.json`` holds, with the ``files`` that were written.

    Raises:
        ConsiliumError: the first cell does not fit its data or model, or the folder holds something else. Nothing is
            written then.
    """
    sweep.refuse_other()
    for cell in sweep.cells:  # a damaged result is said now, and not after hours of work
        results.row_of(cell, sweep.cell_folder(cell))
    failures: dict[str, str] = {}

    def hear(cell: Cell, event: dict[str, Any]) -> None:
        if event["event"] == "failed":
            failures[cell.name] = event["why"]
        heard(cell, event)

    with Pool(sweep.jobs, sweep.threads, sweep.folder / "cells") as pool:
        unfinished = sweep.unfinished()
        if unfinished and not (sweep.folder / GRID).is_file():
            pool.check(unfinished[0])
        with RunLock(sweep.folder).hold(0):
            grid = {cell.name: cell.settings() for cell in sweep.cells}
            write_atomically(sweep.folder / GRID, to_json({"schema_version": SCHEMA_VERSION, "cells": grid}))
            pool.run(unfinished, hear)
            return write_results(sweep, failures)


def write_results(sweep: Sweep, failures: Mapping[str, str]) -> dict[str, Any]:
    """Gathers what the cells' folders hold into the sweep's own files."""
    folders = {cell.name: sweep.cell_folder(cell) for cell in sweep.cells}
    rows = [results.row_of(cell, folders[cell.name], failures.get(cell.name, "")) for cell in sweep.cells]
    groups = results.groups_of(rows)
    spent = [privacy.spent_by(folder) for folder in folders.values()]
    composed = privacy.compose(spent, privacy.same_sites(sweep.cells, sweep.axes))
    said = privacy.sentences(composed, len(sweep.cells))
    head, lines = results.table_of(groups)
    best = results.best_of(groups)
    content = {
        "schema_version": SCHEMA_VERSION,
        "axes": {axis.key: list(axis.values) for axis in sweep.axes},
        "seeds": len({cell.seed for cell in sweep.cells}),
        "threads": sweep.threads,
        "spread": results.SPREAD,
        "privacy": {
            "epsilon_of_run": "selection not charged",
            "composed": {**asdict(composed), "infinite": composed.epsilon is None},
            "statements": said,
        },
        "best_on_validation": dict(best.choices) if best else None,
        "groups": [_group(group) for group in groups],
        "table": {"head": head, "lines": lines},
        "cells": [asdict(row) for row in rows],
    }
    write_atomically(sweep.folder / "sweep.json", to_json(content))
    write_atomically(sweep.folder / "sweep.csv", results.to_csv(rows).encode())
    files = [sweep.folder / name for name in ("sweep.json", "sweep.csv", "sweep.md")]
    files += draw(groups, histories_of(rows, folders), " ".join(said[:-1]), sweep.folder)
    page = [results.to_markdown(head, lines), caption(content), *said]
    write_atomically(sweep.folder / "sweep.md", "\n".join(f"{part}\n" for part in page).encode())
    return {**content, "files": [str(file) for file in files]}


def caption(content: Mapping[str, Any]) -> str:
    """What the figures of the table are."""
    marked = " * best mean on validation data." if content["best_on_validation"] and len(content["groups"]) > 1 else ""
    return f"{results.SPREAD[:1].upper()}{results.SPREAD[1:]}.{marked}"


def _group(group: results.Group) -> dict[str, Any]:
    figures = {
        split: {name: _spread(group.figure(split, name)) for name in group.rows[0].metrics(split)}
        for split in results.SPLITS
    }
    return {"choices": dict(group.choices), "n": len(group.rows), **figures}


def _spread(spread: results.Spread | None) -> dict[str, Any] | None:
    return None if spread is None else {"mean": spread.mean, "standard_deviation": spread.deviation}


def histories_of(rows: Sequence[results.Row], folders: Mapping[str, Path]) -> dict[str, list[tuple[int, float | None]]]:
    """Round and metric of each finished cell; ``None`` where it was not evaluated, or is no number."""
    found = {}
    for row in rows:
        if row.status == "completed":
            records = map(json.loads, (folders[row.cell] / "rounds.jsonl").read_text(encoding="utf-8").splitlines())
            found[row.cell] = [(record["round"], record["metrics"].get(row.metric)) for record in records]
    return found


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(to_json(value))


def _differences(before: Any, now: Any) -> str:
    """The settings that differ, old → new; empty if none does."""
    old, new = _flat(before), _flat(now)
    found = [
        f"{name} was {json.dumps(old.get(name))} and is {json.dumps(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    more = f" (and {len(found) - SHOWN_DIFFERENCES} more)" if len(found) > SHOWN_DIFFERENCES else ""
    return ", ".join(found[:SHOWN_DIFFERENCES]) + more


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            key: one for part, inner in value.items() for key, one in _flat(inner, f"{name}.{part}".lstrip(".")).items()
        }
    return {name: value}
