"""``consilium site``: what a hospital's IT and data-protection officer use."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import client.audit_cli
from client import setup_cli
from common.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from client.audit_log import AuditLog
    from client.config import SiteConfig
    from client.privacy.ledger import Balance, Ledger, PlanEntry

app = typer.Typer(
    help="The site: serve the agent, check the data, decide about plans, read the ledger.", no_args_is_help=True
)
app.add_typer(client.audit_cli.app, name="audit-log")
setup_cli.register(app)
Config = Annotated[Path, typer.Option("--config", help="The site's own settings (site.toml).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Digest = Annotated[str, typer.Argument(help="The plan's digest, or its first characters.")]

SHORTEST_DIGEST = 6
NEVER_RUN = "the agent has never run here ('consilium site agent')"

AGENT_HELP = """Serve this site: the long-lived process that alone touches the data, the GPU and the privacy ledger.

Examples:

  consilium site agent --config site.toml

  consilium --log-format json site agent --config /etc/consilium/site.toml
"""


@app.command("agent", help=AGENT_HELP)
def agent_command(config: Config = Path("site.toml")) -> None:
    """Serves until SIGTERM or SIGINT."""
    from client.config import read_site_config

    settings = read_site_config(config)  # before what takes seconds to import
    from client.exposure import admit_relay

    peers = admit_relay(settings, config)
    from client.agent import Agent, forbid_inspection
    from client.announce import announce
    from client.assemble import build_site
    from client.log_limit import limit_log
    from client.withdrawal_journal import refuse_interrupted

    forbid_inspection()
    limit_log()
    site, resident = build_site(settings)
    with site.ledger.serve_alone():
        refuse_interrupted(settings)
        resident.warm_up()
        announce(site, settings)
        agent = Agent(site, settings.site.listen, settings.tls, peers)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.ask_to_stop())
        agent.start()
        if settings.testing:
            print("warning: [testing] fixed keys are in use; no privacy is claimed", file=sys.stderr, flush=True)
        print(f"site '{settings.site.name}' serves at {settings.site.listen}", file=sys.stderr, flush=True)
        agent.wait()
        agent.stop()
    site.ledger.close()


@app.command("check")
def check_command(
    config: Config = Path("site.toml"),
    task: Annotated[str, typer.Option("--task", help="Task to check the rows for; else the first one allowed.")] = "",
    labels: Annotated[
        str, typer.Option("--labels", help="Comma-separated label names of the plan; else those that occur.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Check site.toml and the data, here and only here: every row that cannot be learnt from is named.

    Examples:

      consilium site check --config site.toml

      consilium site check --config site.toml --labels "cardiac,respiratory"
    """
    from client.check import check_site, print_report

    names = tuple(filter(None, (name.strip() for name in labels.split(","))))
    report = check_site(_settings(config), task, names, config)
    if as_json:
        _print_json(report)
    else:
        print_report(report)
    if any(entry["faults"] for entry in report["data"].values()):
        raise typer.Exit(2)


@app.command("pending")
def pending_command(config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """List the plans that wait for a decision, with what they cost.

    Example: consilium site pending --config site.toml
    """
    from client.ledger_report import as_waiting, print_table, waiting_row, warnings
    from client.privacy.ledger import Decision

    settings = _settings(config)
    with _ledger(config) as ledger:
        entries = ledger.plans(Decision.WAITING) if ledger else []
        waiting = [as_waiting(ledger, _as_claimed(settings, entry)) for entry in entries] if ledger else []
        notes = list(warnings(ledger, settings.testing is not None)) if ledger else []
    if as_json:
        _print_json(waiting)
        return
    _warn(notes)
    if not waiting:
        print("no plan waits for a decision" if ledger else f"no plan waits for a decision; {NEVER_RUN}")
        return
    columns = ("plan", "run", "population", "epsilon", "reserved if approved", "limit")
    print_table("Plans that wait for a decision", columns, [waiting_row(plan) for plan in waiting])
    print("see 'consilium site show PLAN', then 'consilium site approve PLAN' or 'consilium site reject PLAN'")


@app.command("show")
def show_command(digest: Digest, config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """Explain a plan in plain words: what is trained, what leaves the site, what it costs and what would be left.

    Examples:

      consilium site show 3f9c21aa --config site.toml

      consilium site show 3f9c21aa --json
    """
    from client.ledger_report import warnings
    from client.plan_in_words import as_object, in_words, signer_of
    from common.plan import read_plan

    settings = _settings(config)
    with _ledger(config) as ledger:
        ledger, entry = _one_plan(ledger, digest)
        notes = list(warnings(ledger, settings.testing is not None))
        population = next(each for each in ledger.populations() if each.name == entry.population)
        balance = ledger.balance(entry.population)
    entry = _as_claimed(settings, entry)
    about = (entry, read_plan(entry.body), population, balance, signer_of(entry, settings.policy.coordinator_keys))
    if as_json:
        _print_json(as_object(*about))
        return
    _warn(notes)
    print(in_words(*about))


@app.command("approve")
def approve_command(digest: Digest, config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """Approve a plan: reserves its whole epsilon now, or refuses it if the lifetime budget does not carry it.

    Example: consilium site approve 3f9c21aa --config site.toml
    """
    audit = _audit(config)  # a broken trail stops here, before anything is decided
    with _ledger(config) as ledger:
        ledger, entry = _one_plan(ledger, digest)
        _refuse_forbidden(config, entry, ledger.balance(entry.population).limit)
        decision = ledger.approve(entry.digest)
        audit.append("plan decided", plan=entry.digest, decision=decision, by="person")
        balance = ledger.balance(entry.population)
    _tell_decision(entry.digest, decision, entry.population, balance, as_json)
    if decision != "approved":
        raise typer.Exit(2)


@app.command("reject")
def reject_command(digest: Digest, config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """Reject a plan that waits. It costs nothing, and stays rejected.

    Example: consilium site reject 3f9c21aa --config site.toml
    """
    audit = _audit(config)
    with _ledger(config) as ledger:
        ledger, entry = _one_plan(ledger, digest)
        ledger.reject(entry.digest)
        audit.append("plan decided", plan=entry.digest, decision="refused", by="person")
        balance = ledger.balance(entry.population)
    _tell_decision(entry.digest, "refused", entry.population, balance, as_json)


@app.command("close")
def close_command(
    digest: Digest,
    config: Config = Path("site.toml"),
    why: Annotated[str, typer.Option("--why", help="For the record: a few words, no names of patients.")] = "",
    as_json: AsJson = False,
) -> None:
    """End a plan for good: no further round, and its stored releases are deleted. Nothing it reserved is given back.

    Example: consilium site close 3f9c21aa --why "study ended" --config site.toml
    """
    audit, reason = _audit(config), _reason(why or "a person closed it")
    with _ledger(config) as ledger:
        ledger, entry = _one_plan(ledger, digest)
        ledger.close_plan(entry.digest, reason)
        audit.append("plan closed", plan=entry.digest, why=reason, by="person")
        balance = ledger.balance(entry.population)
    _tell_decision(entry.digest, "closed", entry.population, balance, as_json)


@app.command("ledger")
def ledger_command(config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """What of each budget is spent, reserved and left, and every charge by plan and round.

    Examples:

      consilium site ledger --config site.toml

      consilium site ledger --json > account.json
    """
    from client.ledger_report import EMPTY, account, print_account, warnings

    with _ledger(config) as ledger:
        fixed_keys = _settings(config).testing is not None
        found = account(ledger, not fixed_keys) if ledger else EMPTY
        notes = list(warnings(ledger, fixed_keys)) if ledger else []
    if as_json:
        _print_json(found)
        return
    _warn(notes)
    print_account(found)


UNBLOCK_HELP = """Let a site go on that has stopped itself, because its ledger may be an older copy.

First look for the newest copy of the state folder and put it back; then nothing of this is needed. What an older copy
has forgotten cannot be known: plans that were approved since, and what they revealed. This command closes every open
plan, so that no round is released a second time; what they reserved stays reserved. It writes a line to the audit log.

Example:

  consilium site unblock --why "disk failed on 3 May, restored from 2 May" --this-is-the-newest-copy
"""


@app.command("unblock", help=UNBLOCK_HELP)
def unblock_command(
    config: Config = Path("site.toml"),
    why: Annotated[str, typer.Option("--why", help="What happened, for the record.")] = "",
    sure: Annotated[
        bool, typer.Option("--this-is-the-newest-copy", help="You answer for it: no newer copy of the ledger exists.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Lifts a block, or takes the ledger for its newest copy."""
    from contextlib import closing

    from client.privacy.ledger import Ledger

    settings = _settings(config).site
    fault = None
    try:
        with _ledger(config) as ledger:
            stopped = ledger.blocked if ledger else None
    except LedgerError as error:
        stopped, fault = str(error), error
    if stopped is None:
        print("this site is not blocked; there is nothing to lift")
        return
    if not (sure and why):
        raise ConfigError(
            f"this site has stopped: {stopped}\nRead 'consilium site unblock --help'; if no newer copy exists, give "
            "--this-is-the-newest-copy and --why"
        )
    audit, reason = _audit(config), _reason(why)
    with closing(Ledger(settings.state, counter=settings.counter, accept_copy=fault is not None)) as ledger:
        closed = ledger.unblock(reason)
    audit.append("site unblocked", why=reason, by="person")
    for digest in closed:
        audit.append("plan closed", plan=digest, why=reason, by="person")
    if as_json:
        _print_json({"closed": closed})
    else:
        print(f"the site goes on; {len(closed)} open plans were closed")


def _settings(config: Path) -> SiteConfig:
    from client.config import read_site_config

    return read_site_config(config)


def _ledger(config: Path) -> AbstractContextManager[Ledger | None]:
    """The site's ledger; ``None``: no agent has run here yet."""
    from client.privacy.ledger import existing_ledger

    site = _settings(config).site
    return existing_ledger(site.state, site.counter)


def _audit(config: Path) -> AuditLog:
    """Decisions stand in the ledger first: after a crash the log says less than the ledger, and never more."""
    from client.audit_log import AuditLog

    return AuditLog(_settings(config).site.state / "audit.jsonl")


def _one_plan(ledger: Ledger | None, prefix: str) -> tuple[Ledger, PlanEntry]:
    if ledger is None:
        raise ConfigError(f"DIGEST = '{prefix}': no plan was shown yet; {NEVER_RUN}")
    found = [entry for entry in ledger.plans() if entry.digest.startswith(prefix)]
    if len(found) != 1:
        raise ConfigError(f"DIGEST = '{prefix}': {len(found)} plans start with it; see 'consilium site pending'")
    if len(prefix) < SHORTEST_DIGEST:
        raise ConfigError(f"DIGEST = '{prefix}': is too short; give at least {SHORTEST_DIGEST} characters")
    return ledger, found[0]


def _refuse_forbidden(config: Path, entry: PlanEntry, limit: float) -> None:
    """The policy may have become stricter since the plan came.

    Args:
        limit: the population's lifetime ε, as it was when the agent last started.
    """
    from client.assemble import policy_of
    from client.plan_in_words import signer_of
    from common.plan import read_plan

    policy, plan = policy_of(_settings(config)), f"plan {entry.digest[:12]}"
    if signer_of(entry, policy.section.coordinator_keys) is None:
        raise ConfigError(f"{plan}: no key that policy.coordinator_keys names now has signed it; reject it")
    declared = policy.populations.get(entry.population)
    if declared is None or declared.lifetime_epsilon != limit:
        raise ConfigError(
            f"{plan}: site.toml does not declare populations.{entry.population} with a lifetime_epsilon of {limit:g}, "
            "as it did when the agent last started; start the agent again, then decide"
        )
    refusal = policy.refusal(read_plan(entry.body))
    if refusal or (entry.statement and policy.too_quiet(entry.statement)):
        raise ConfigError(
            f"{plan}: site.toml does not allow it any more ({refusal or 'policy'}); reject it, or "
            "widen the bounds that it exceeds"
        )


def _as_claimed(settings: SiteConfig, entry: PlanEntry) -> PlanEntry:
    """With fixed keys the site claims no ε, whatever the noise would be worth."""
    if settings.testing is None or entry.statement is None:
        return entry
    return replace(entry, statement=replace(entry.statement, epsilon=None))


def _reason(why: str) -> str:
    if len(why) > 200 or not why.isprintable():
        raise ConfigError("--why: must be one line of at most 200 characters")
    return why


def _tell_decision(digest: str, decision: str, population: str, balance: Balance, as_json: bool) -> None:
    if as_json:
        figures = {"limit": balance.limit, "reserved": balance.reserved, "left": balance.left}
        _print_json({"digest": digest, "decision": decision, "population": population, **figures})
        return
    print(f"plan {digest[:12]}: {decision}")
    print(
        f"population '{population}': epsilon {balance.reserved:.4f} of {balance.limit:.4f} is reserved, "
        f"{balance.left:.4f} is left"
    )


def _warn(notes: list[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
