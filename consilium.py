"""The command line: assembles the sub-commands of the folders, and turns errors into one message and an exit code.

Exit codes: 0 done, 1 an audit found a fault, 2 bad input, 3 the run failed (it can be resumed), 130 interrupted, 141
nobody reads the output any more (``consilium … | head -1``).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import click
import typer

import client.cli
import client.privacy.audit.cli
import common.privacy.cli
import server.cli
import simulations.cli
import simulations.data_cli
import simulations.sweep_cli
from common.errors import ConsiliumError
from common.logs import LogFormat, set_up_logging

INTERRUPTED = 130
"""Typer turns KeyboardInterrupt into this code."""
UNREAD = 141
"""What a shell reports of any program that writes to a pipe nobody reads: 128 + SIGPIPE. The signal itself would also
end a program whose network connection breaks, so it stays ignored, as Python has it."""

app = typer.Typer(
    name="consilium",
    help="Private, federated fine-tuning: only differentially private adapters leave a site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    log_format: LogFormat = typer.Option(LogFormat.TEXT, "--log-format", help="Logs on stderr as text or JSON lines."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="More logs."),
) -> None:
    """Private, federated fine-tuning: only differentially private adapters leave a site."""
    set_up_logging(log_format, verbose)


app.command("simulate", help=simulations.cli.HELP)(simulations.cli.simulate_command)
app.command("sweep", help=simulations.sweep_cli.SWEEP_HELP)(simulations.sweep_cli.sweep_command)
app.command("compare", help=simulations.sweep_cli.COMPARE_HELP)(simulations.sweep_cli.compare_command)
app.command("predict", help=server.cli.PREDICT_HELP)(server.cli.predict_command)
app.command("report", help=server.cli.REPORT_HELP)(server.cli.report_command)
app.add_typer(server.cli.app, name="server")
app.add_typer(client.cli.app, name="site")
app.add_typer(simulations.data_cli.app, name="data")
common.privacy.cli.app.command("audit", help=client.privacy.audit.cli.HELP)(client.privacy.audit.cli.audit_command)
app.add_typer(common.privacy.cli.app, name="privacy")


def main() -> None:
    """Entry point of ``consilium``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a pipe that is open for reading too cannot be set up anew
                stream.reconfigure(errors="replace")  # a terminal without Greek shows "?" for ε
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    except SystemExit as ended:
        # click and rich leave with code 1 where a pipe is closed, which here says that an audit found a fault.
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = _unread()
    sys.exit(code)


def _run() -> int | None:
    """Runs the command that was asked for; tells of an error in one message."""
    try:
        # Outside its standalone mode, click hands over what it would otherwise swallow or print in its own way.
        code: int | None = app(prog_name="consilium", standalone_mode=False)
    except ConsiliumError as error:
        return _told(f"error: {error}", error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        return error.exit_code  # the help is on the screen
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "consilium"
        return _told(f"error: {error.format_message()} See '{command} --help'.", error.exit_code)
    except click.ClickException as error:
        return _told(f"error: {error.format_message()}", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        return _told("interrupted; what was finished is kept, continue with --resume", INTERRUPTED)
    return code


def _told(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _unread() -> int:
    """Python writes what is left when it ends, and would complain: now it goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    return UNREAD


if __name__ == "__main__":
    main()
