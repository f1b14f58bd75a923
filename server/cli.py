"""``consilium server run``, ``consilium report`` and ``consilium predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConfigError

app = typer.Typer(help="The coordinator: run a plan on a Flower deployment.", no_args_is_help=True)

RUN_HELP = """Run a plan on the sites connected to a SuperLink, and wait for its end.

Examples:

  consilium server run --config run.toml --out runs/first

  consilium server run --config run.toml --set server.superlink=flower.example.org:443 --out runs/first

  consilium server run --resume runs/first
"""

REPORT_HELP = """Write one HTML page about a run: quality, privacy, participation, cost, settings.

The page needs no network and can be printed or mailed as it is. It works for unfinished and failed runs too.

Examples:

  consilium report runs/first

  consilium report runs/first --out first.html

  consilium report runs/first --json | jq .scores
"""

PREDICT_HELP = """Apply a finished run's adapter to a file.

Examples:

  consilium predict --adapter runs/first/adapter --input notes.csv

  consilium predict --adapter runs/first/adapter --input notes.csv --column text=note > predicted.jsonl
"""


@app.callback()
def _group() -> None:
    """The coordinator: run a plan on a Flower deployment."""


@app.command("run", help=RUN_HELP)
def run_command(
    config: Annotated[Path | None, typer.Option("--config", help="The run's settings (TOML).")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the results.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue the run in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of tables.")] = False,
) -> None:
    """Submits the run and follows it to its end."""
    from rich.console import Console

    from common.config import RunConfig
    from common.toml_settings import apply_overrides, read_toml, validate
    from server.follow import run_deployment
    from server.progress import Bars, result_console, rounds_table, sites_table
    from server.settings import read_run

    if resume is not None:
        if config or out:
            raise ConfigError("--resume: takes the run's own settings and folder; leave out --config and --out")
        tables = read_run(resume).model_dump(mode="json", exclude_none=True)
        folder, source = resume, str(resume)
    else:
        if config is None or out is None:
            raise ConfigError("--config and --out: both are needed, or --resume DIR")
        tables, folder, source = read_toml(config), out, str(config)
    run = validate(RunConfig, apply_overrides(tables, settings or []), source)
    log = Console(stderr=True)
    if run.privacy.mechanism == "none":
        log.print("[bold red]privacy.mechanism = 'none': this run makes NO privacy promise at all.[/]")
    with Bars(run.run.name, sum(phase.rounds for phase in run.phases), log) as bars:
        summary = run_deployment(run, folder, resume is not None, bars)
    if as_json:
        json.dump(summary, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    console = result_console()
    console.print(rounds_table(summary["rounds"], summary["best_round"]))
    console.print(sites_table(summary["sites"]))
    if summary["test"]:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in summary["test"].items() if name != "examples")
        console.print(f"test: {shown}")
    console.print(f"adapter: {summary['adapter']}", soft_wrap=True)
    console.print(f"page: consilium report {Path(summary['adapter']).parent}", soft_wrap=True, highlight=False)


KEYGEN_HELP = """Make the key that signs this coordinator's plans, and print its public half for the sites.

Example:

  consilium server keygen coordinator.pem
"""


@app.command("keygen", help=KEYGEN_HELP)
def keygen_command(path: Annotated[Path, typer.Argument(metavar="FILE", help="New file for the private key.")]) -> None:
    """Writes the private key and prints the public one."""
    from common.signing import SigningKey

    public = SigningKey.create(path).public
    print(f"{path} holds the private key: show it to nobody, and name it in server.signing_key", file=sys.stderr)
    print(public)


def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page's file. [default: DIR/report.html]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content as JSON instead of writing.")] = False,
) -> None:
    """Writes the page and prints where it is."""
    from server.report_page.page import content_of_folder, write_page

    content = content_of_folder(folder)
    if as_json:
        from server.checkpoint import to_json
        from server.report_page.content import as_object

        sys.stdout.buffer.write(to_json(as_object(content)))  # JSON is UTF-8, whatever a terminal can show
        return
    page = out or folder / "report.html"
    write_page(content, page)
    print(page)


def predict_command(
    adapter: Annotated[Path, typer.Option("--adapter", help="DIR/adapter of a finished run.")],
    source: Annotated[Path, typer.Option("--input", help="csv, jsonl or parquet file.")],
    columns: Annotated[list[str] | None, typer.Option("--column", help="field=column, e.g. text=note.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Base model, if not the one of the run.")] = None,
) -> None:
    """Prints one JSON object per row to stdout."""
    from server.predict import predict

    pairs = dict(entry.split("=", 1) for entry in columns or [] if "=" in entry)
    if len(pairs) != len(columns or []):
        raise ConfigError("--column: expected field=column, e.g. --column text=note")
    for answer in predict(adapter, source, pairs, model):
        sys.stdout.write(json.dumps(answer) + "\n")
