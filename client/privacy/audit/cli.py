"""``consilium privacy audit``: does this installation keep what a plan promises?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError

if TYPE_CHECKING:
    from client.privacy.audit.run import Audit
    from common.config import RunConfig

FAILED = 1
"""Exit code where a check fails: neither bad input nor a failed run."""

_PARAGRAPHS = (
    "Attack the installed engine under a run's settings, and compare what it gives away with what it claims.",
    "Real sites are built around synthetic data in a temporary folder; no data of yours are read, and no ledger of "
    "yours is touched. Checked are: what one unit can change (also outliers, NaN, failures, empty and ragged batches); "
    "scale and independence of the noise; Poisson sampling; a lower bound on epsilon from a thousand canaries and more "
    "through all rounds, beside the claimed epsilon; and that the ledger holds the steps that are executed.",
    "Exit code 0: all checks hold. 1: a check fails, and the report says which one and what it suspects. 2: bad input. "
    "A correct engine fails with probability 0.0001 at most.",
    "Examples:",
    "  consilium privacy audit --config run.toml --quick",
    "  consilium privacy audit --config run.toml --public-size 4000 --json > audit.json",
)
HELP = "\n\n".join(_PARAGRAPHS)


def audit_command(
    config: Annotated[Path, typer.Option("--config", help="The run's settings (run.toml); its plan is audited.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer releases and canaries: under two minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    public_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Declared units of the audited sites. Default: 1000, and ten times a larger batch_size."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeats the coins and replays of an earlier report; noise stays fresh.")
    ] = None,
) -> None:
    """Runs the audit and prints its report."""
    from common.config import RunConfig
    from common.toml_settings import read_toml, validate

    settings = validate(RunConfig, read_toml(config), str(config))
    if settings.privacy.mechanism == "none":
        raise ConfigError("privacy.mechanism = 'none': makes no promise, so there is nothing to audit; use 'dp-sgd'")
    size = public_size or max(1000, *(10 * (phase.batch_size or 0) for phase in settings.phases))
    found = _with_progress(settings, size, quick, seed)
    from rich.console import Console

    from client.privacy.audit.report import as_json as json_of
    from client.privacy.audit.report import show

    if as_json:
        json.dump(json_of(found, settings, str(config), quick), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        # A pipe has no width of its own, and a table cut to 80 columns loses its figures.
        show(found, settings, Console() if sys.stdout.isatty() else Console(width=120))
    if not found.passed:
        raise typer.Exit(FAILED)


def _with_progress(settings: RunConfig, public_size: int, quick: bool, seed: int | None) -> Audit:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("loading", total=None)
        from client.privacy.audit.run import FULL, PARTS, QUICK, audit

        def started(part: str) -> None:
            progress.update(bar, description=part, total=len(PARTS), completed=PARTS.index(part))

        return audit(settings, public_size, QUICK if quick else FULL, seed, started=started, done=progress.refresh)
