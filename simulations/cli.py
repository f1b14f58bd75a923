"""``consilium simulate``: a whole federation on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

DEMO_DATA = "data"
"""Where the embedded default's notes are generated, under the output folder."""

HELP = """Simulate a federation of sites on this machine.

Without --config: five synthetic hospitals whose triage notes are generated here, DP at epsilon 8.

Examples:

  consilium simulate

  consilium simulate --config examples/medquad_qtype.toml --set data.path=DATA --out runs/medquad

  consilium simulate --config run.toml --set privacy.epsilon=3 --set phase.head.rounds=20

  consilium simulate --resume runs/medquad
"""


def simulate_command(
    config: Annotated[Path | None, typer.Option("--config", help="The run's settings (TOML).")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the results.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue the run in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of tables.")] = False,
) -> None:
    """Runs a simulation and prints its tables."""
    from rich.console import Console

    from common.config import RunConfig
    from common.toml_settings import apply_overrides, read_toml, validate
    from server.progress import Bars, result_console
    from server.settings import read_run
    from simulations.simulate import simulate

    if resume is not None:
        if config or settings or out:
            raise ConfigError("--resume: takes the run's own settings and folder; leave out --config, --set and --out")
        run, folder = read_run(resume), resume
    else:
        folder = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        tables = apply_overrides(read_toml(config) if config else demo_tables(folder), settings or [])
        run = validate(RunConfig, tables, str(config or "the embedded default"))
        if config is None and run.data.path == str(folder / DEMO_DATA):
            _write_demo_data(folder)
    log = Console(stderr=True)
    if run.privacy.mechanism == "none":
        log.print("[bold red]privacy.mechanism = 'none': this run makes NO privacy promise at all.[/]")
    summary = simulate(run, folder, resume is not None, lambda title, rounds: Bars(title, rounds, log))
    if as_json:
        json.dump(summary, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        show(summary, result_console())


def demo_tables(folder: Path) -> dict[str, Any]:
    """The embedded default, with its data under the output folder."""
    from common.toml_settings import read_toml

    tables = read_toml(Path(__file__).with_name("demo.toml"))
    tables["data"]["path"] = str(folder / DEMO_DATA)
    return tables


def _write_demo_data(folder: Path) -> None:
    from server.checkpoint import RunFolder
    from simulations.demo import write_demo_data

    RunFolder(folder).refuse_other_run()
    write_demo_data(folder / DEMO_DATA)


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The tables of a finished simulation."""
    from rich.table import Table

    from server.progress import rounds_table, sites_table

    console.print(rounds_table(summary["rounds"], summary["best_round"]))
    console.print(sites_table(summary["sites"]))
    comparison: Mapping[str, Mapping[str, Any]] = summary.get("comparison", {})
    if comparison:
        table = Table(title="Side by side")
        names = [name for name in next(iter(comparison.values()))["validation"] if name != "examples"]
        splits = [split for split in ("validation", "test") if split in comparison["federated"]]
        table.add_column("model")
        for split in splits:
            for name in names:
                table.add_column(f"{split}\n{name.replace('_', '-')}", justify="right")
        for row, entry in comparison.items():
            title = row.replace("_", " ") + (f" ({entry['site']})" if "site" in entry else "")
            table.add_row(title, *(f"{entry[split][name]:.4f}" for split in splits for name in names))
        console.print(table)
    elif summary.get("test"):
        shown = "  ".join(f"{k} {v:.4f}" for k, v in summary["test"].items() if k != "examples")
        console.print(f"test: {shown}")
    console.print("ε is per run: a simulation's ledgers are fresh.")
    console.print(f"adapter: {summary['adapter']}", soft_wrap=True)
    console.print(f"page: consilium report {Path(summary['adapter']).parent}", soft_wrap=True, highlight=False)
