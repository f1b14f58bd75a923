"""``consilium site audit-log``: whether the trail is whole, what it says, and the signed head to keep elsewhere."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from client.audit_chain import Entry
    from client.audit_log import Verdict

app = typer.Typer(
    help="The audit trail: check that no line was changed or lost, read it, keep its signed head.", no_args_is_help=True
)
Config = Annotated[Path, typer.Option("--config", help="The site's own settings (site.toml).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FAULT = 2


@app.command("verify")
def verify_command(
    config: Config = Path("site.toml"),
    head: Annotated[
        Path | None, typer.Option("--head", help="A signed head that was kept elsewhere; the log must go on from it.")
    ] = None,
    key: Annotated[
        str, typer.Option("--key", help="The site's public key (ed25519:…), which must have signed a head.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Read the whole trail and name the first line that was changed, dropped, added or moved (exit code 2).

    Example: consilium site audit-log verify --config site.toml --head kept.json --key ed25519:…
    """
    from client.audit_head import read_head
    from client.audit_log import verify

    log = _log(config)
    pinned = _pinned(key) or _own_key(log.with_name("site.key"))
    verdict = verify(log, read_head(head) if head else None, pinned)
    unsigned = bool(key) and verdict.intact and not verdict.heads
    if as_json:
        _print_json(_as_json(verdict, unsigned, pinned))
    else:
        _print_verdict(verdict, unsigned, pinned)
    if unsigned or not verdict.intact:
        raise typer.Exit(FAULT)


@app.command("show")
def show_command(
    config: Config = Path("site.toml"),
    last: Annotated[int | None, typer.Option("--last", min=1, help="Only so many lines, the newest ones.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what happened: time, event, details. Stops where a line does not follow the one before (exit code 2).

    Example: consilium site audit-log show --last 20
    """
    from client.audit_chain import read_entries

    log = _log(config)
    try:
        with log.open("rb") as stream:
            entries = read_entries(stream)
            (_print_array if as_json else _print_lines)(entries if last is None else deque(entries, maxlen=last))
    except OSError as error:
        raise LedgerError(f"audit log {log}: cannot be read ({error.strerror}); has the site's agent run?") from None


@app.command("head")
def head_command(config: Config = Path("site.toml")) -> None:
    """Print the newest signed head. Keep it outside the site's machine: it tells later that no line was cut off.

    Example: consilium site audit-log head --config site.toml > kept.json
    """
    from client.audit_head import head_file, stored_head

    log = _log(config)
    head = stored_head(log)
    if head is None:
        raise LedgerError(f"{head_file(log)}: does not exist; the site signs a head with each release")
    if not head.authentic():
        raise LedgerError(f"{head_file(log)}: its signature is false; see 'consilium site audit-log verify'")
    print(head.text())


def _log(config: Path) -> Path:
    from client.config import read_site_config

    return read_site_config(config).site.state / "audit.jsonl"


def _pinned(key: str) -> str | None:
    from common.signing import is_public_key

    if key and not is_public_key(key):
        raise ConfigError(f"--key = '{key}': is not a public key; give it as 'ed25519:' and 43 characters")
    return key or None


def _own_key(file: Path) -> str | None:
    """The public part of the site's key, where it is and may be read; a copy of the log is checked without."""
    from common.signing import SigningKey

    try:
        return SigningKey.load(file).public
    except ConfigError:
        return None


def _print_verdict(verdict: Verdict, unsigned: bool, pinned: str | None) -> None:
    if verdict.fault:
        print(f"line {verdict.line} {verdict.fault}" if verdict.line is not None else verdict.fault)
        return
    signed = [f"head signed by {head.key} at line {head.lines}" for head in dict.fromkeys(verdict.heads)]
    print(", ".join([f"{verdict.lines} lines, chain intact", *(signed or ["no signed head"])]))
    if verdict.unfinished:
        print("the last line has no end, as after a power cut; the site removes it when it writes next")
    if unsigned:
        print("no head signed by the key that was given: whether the end was cut off cannot be told")
    elif not signed:
        print("whether the end was cut off cannot be told: give --head with a head that was kept elsewhere")
    elif pinned is None:
        print("nobody said whose key this is: give --key with the site's public key")


def _as_json(verdict: Verdict, unsigned: bool, pinned: str | None) -> dict[str, Any]:
    return {
        "intact": verdict.intact and not unsigned,
        "lines": verdict.lines,
        "line": verdict.line,
        "fault": "no signed head" if unsigned else verdict.fault,
        "unfinished": verdict.unfinished,
        "heads": [vars(head) for head in dict.fromkeys(verdict.heads)],
        "key": pinned,
    }


def _print_lines(entries: Iterable[Entry]) -> None:
    for entry in entries:
        event = entry.event if entry.event.isprintable() else json.dumps(entry.event)
        details = "  ".join(
            f"{_word(name)}={_word(value)}" for name, value in sorted(entry.details.items()) if value is not None
        )
        print(f"{entry.number:>6}  {entry.time}  {event:<22}  {details}".rstrip())


def _print_array(entries: Iterable[Entry]) -> None:
    """One JSON array, written piece by piece."""
    sys.stdout.write("[")
    for index, entry in enumerate(entries):
        fields = {"line": entry.number, "time": entry.time, "event": entry.event, "details": entry.details}
        sys.stdout.write((",\n " if index else "\n ") + json.dumps(fields))
    sys.stdout.write("\n]\n")


def _word(value: Any) -> str:
    """Run ids come from the coordinator: what could steer a terminal, or look like two details, is written as JSON."""
    return value if isinstance(value, str) and value.isprintable() and " " not in value else json.dumps(value)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
