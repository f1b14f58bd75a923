"""``consilium site init | keygen | separate | withdraw``: what is set up once, and who withdraws."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from client.config import SiteConfig
    from client.withdrawal import Change, Intent, Outcome, Request

Config = Annotated[Path, typer.Option("--config", help="The site's own settings (site.toml).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    """Adds these commands to ``consilium site``."""
    app.command("init", help=INIT_HELP)(init_command)
    app.command("keygen", help=KEYGEN_HELP)(keygen_command)
    app.command("separate", help=SEPARATE_HELP)(separate_command)
    app.command("withdraw", help=WITHDRAW_HELP)(withdraw_command)


# ---- init -----------------------------------------------------------------------------------------------------------

INIT_HELP = """Write a complete site.toml, every setting explained, with cautious bounds. It never overwrites one.

Examples:

  consilium site init --name north --data notes.csv --public-size 1200

  consilium site init /srv/consilium --name north --data notes.csv --public-size 400 --unit patient
  --privacy-unit patient_id
"""


def init_command(
    name: Annotated[str, typer.Option("--name", help="The site's public name.")],
    data: Annotated[Path, typer.Option("--data", help="A file, or a folder with one file per split.")],
    public_size: Annotated[
        int,
        typer.Option(
            "--public-size", help="How many examples, or persons with --unit, this site says it has: rounded, public."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where site.toml is written.")] = Path("."),
    model: Annotated[str, typer.Option("--model", help="Base model: 'minilm', a folder or a hub id.")] = "minilm",
    unit: Annotated[str, typer.Option("--unit", help="What the budget protects, e.g. patient.")] = "example",
    privacy_unit: Annotated[
        str | None, typer.Option("--privacy-unit", help="Column that names each row's unit, e.g. patient_id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Writes ``site.toml`` and says what is left to fill in."""
    from client.config import WHOLE_SITE
    from client.template import write_template
    from common.model import digest_of, locate

    if not data.expanduser().exists():
        raise DataError(f"--data = '{data}': no such file or folder; give one that this site can read")
    digest = digest_of(locate(model))
    data_settings = {"path": _beside(data, folder)}
    if privacy_unit is not None:
        data_settings["privacy_unit"] = privacy_unit
    settings: Mapping[str, Mapping[str, Any]] = {
        "site": {"name": name},
        f"populations.{WHOLE_SITE}": {"public_size": public_size, "unit": unit},
        "data.default": data_settings,
        "policy": {"base_models": [digest]},
    }
    local = Path(model).expanduser()
    path = write_template(folder, settings, (_beside(local, folder) if local.is_dir() else model,))
    left = [
        "policy.coordinator_keys: the public key of the coordinator",
        "site.relay_user: who the relay runs as",
        "data.default.columns: what the columns are called that the task needs, unless 'text' and 'label'",
    ]
    if as_json:
        _print_json({"file": str(path), "base_model": digest, "left": left})
        return
    print(f"{path} is written; base model '{model}' has the digest {digest}")
    print("Read it through, and fill in:")
    for entry in left:
        print(f"  {entry}")
    print(f"Then: consilium site check --config {path}")


def _beside(path: Path, folder: Path) -> str:
    """Relative to the folder where it lies in it, so that the folder can be moved."""
    whole, base = path.expanduser().resolve(), folder.expanduser().resolve()
    return str(whole.relative_to(base)) if whole.is_relative_to(base) and whole != base else str(whole)


# ---- separate -------------------------------------------------------------------------------------------------------

KEYGEN_HELP = """Make a key for the person who vouches for this site, and print its public half for site.toml.

Example:

  consilium site keygen officer.pem
"""

SEPARATE_HELP = """Sign, as a person of this site, that populations share no persons: each then has a budget of its own.

Example:

  consilium site separate adults children --key officer.pem --config site.toml
"""


def keygen_command(path: Annotated[Path, typer.Argument(metavar="FILE", help="New file for the private key.")]) -> None:
    """Writes the private key and prints the public one."""
    from common.signing import SigningKey

    public = SigningKey.create(path).public
    print(
        f"{path} holds the private key: its owner alone keeps it, away from this machine; site.toml names the public "
        "one in separation.key",
        file=sys.stderr,
    )
    print(public)


def separate_command(
    populations: Annotated[list[str], typer.Argument(metavar="POPULATION...", help="All that site.toml declares.")],
    key: Annotated[Path, typer.Option("--key", help="Private key of the person who vouches.")],
    config: Config = Path("site.toml"),
    yes: Yes = False,
) -> None:
    """Prints the statement, asks, and signs it."""
    from client.separation import read_unsigned, sign_separation, statement_of
    from common.signing import SigningKey
    from common.toml_settings import read_toml

    officer = SigningKey.load(key)
    settings = read_unsigned(config, populations, officer)
    assert settings.separation is not None
    print(statement_of(settings), flush=True)
    _ask(yes, "Do you vouch for this?")
    sign_separation(settings, officer)
    print(f"signed: {settings.separation.statement}", file=sys.stderr)
    if "separation" not in read_toml(config):
        print(f"add to {config}:", file=sys.stderr)
        print(f'[separation]\nstatement = "{settings.separation.statement.name}"\nkey = "{officer.public}"')


# ---- withdraw -------------------------------------------------------------------------------------------------------

WITHDRAW_HELP = """Remove a person, a row or a whole data set from this site: rows, caches and open plans go.

Stop the agent first. If the machine fails meanwhile, give the same command again.

Examples:

  consilium site withdraw --data default --unit 4711 --dry-run

  consilium site withdraw --data default --unit 4711

  consilium site withdraw --data default --all
"""


def withdraw_command(
    data: Annotated[str, typer.Option("--data", help="The data set's name in site.toml.")],
    unit: Annotated[str | None, typer.Option("--unit", help="Id of the person, as in the privacy-unit column.")] = None,
    row: Annotated[
        int | None, typer.Option("--row", help="Where every row is a unit: its number, as site check counts.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole data set: its files are deleted.")] = False,
    config: Config = Path("site.toml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Asks, withdraws, and says what remains."""
    from client.config import read_site_config
    from client.withdrawal import Request, intend, withdraw

    if (unit is not None) + (row is not None) + everything != 1:
        raise ConfigError("--unit, --row and --all: give one of them, which says what withdraws")
    settings = read_site_config(config)
    request = Request(data, unit, row)
    if dry_run:
        _tell(settings, request, intend(settings, request), done=False, finished=False, as_json=as_json)
        return

    def agree(intent: Intent) -> None:
        if not yes:
            print("\n".join(_described(intent)), file=sys.stderr)
        _ask(yes, "This cannot be undone. Go on?")

    outcome: Outcome = withdraw(settings, request, agree)
    _tell(settings, request, outcome.intent, done=True, finished=outcome.finished, as_json=as_json)


def _tell(
    config: SiteConfig, request: Request, intent: Intent | None, done: bool, finished: bool, as_json: bool
) -> None:
    from client.withdrawal import remarks

    said = remarks(config, request, intent)
    if as_json:
        _print_json(
            {
                "data": request.data,
                "done": done,
                "finished_interrupted": finished,
                "files": [
                    {"file": str(change.file), "rows": None if change.gone is None else change.rows}
                    for change in (intent.changes if intent else ())
                ],
                "caches": list(intent.affected) if intent else [],
                "plans": list(intent.plans) if intent else [],
                "remarks": said,
            }
        )
        return
    if finished:
        print("a withdrawal that had been interrupted is finished")
    if intent is not None:
        print("done:" if done else "nothing was changed; what would be done:")
        print("\n".join(_described(intent)))
    for remark in said:
        print(f"note: {remark}")


def _described(intent: Intent) -> list[str]:
    plans = ", ".join(digest[:12] for digest in intent.plans)
    return [
        *(f"  {change.file}: {_loss(change)}" for change in intent.changes),
        f"  caches deleted of data set {', '.join(intent.affected)}",
        f"  plans closed: {plans or 'none is open over these data'}",
    ]


def _loss(change: Change) -> str:
    if change.gone is None:
        return "the file is deleted"
    return "1 row removed" if change.rows == 1 else f"{change.rows} rows removed"


def _ask(yes: bool, question: str) -> None:
    try:
        agreed = yes or typer.confirm(question, err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise ConfigError("confirmation: was not given, so nothing was done; answer 'y', or give --yes")


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
