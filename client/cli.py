"""``consilium site``: what a hospital's IT and data-protection officer use."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError

if TYPE_CHECKING:
    from client.config import SiteConfig
    from client.privacy.ledger import Ledger

app = typer.Typer(
    help="The site: serve the agent, check the data, decide about plans, read the ledger.", no_args_is_help=True
)
Config = Annotated[Path, typer.Option("--config", help="The site's own settings (site.toml).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

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
    from client.agent import Agent
    from client.assemble import build_site

    site, resident = build_site(settings)
    resident.warm_up()
    agent = Agent(site, settings.site.listen, settings.tls)
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
    task: Annotated[str, typer.Option("--task", help="Task to check the rows for.")] = "sequence-classification",
    labels: Annotated[str, typer.Option("--labels", help="Comma-separated label names of the plan.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check site.toml and the data, here and only here: every row that cannot be learnt from is named.

    Example: consilium site check --config site.toml --labels "cardiac,respiratory"
    """
    from client.check import check_site
    from client.config import read_site_config

    report = check_site(read_site_config(config), task, tuple(filter(None, (x.strip() for x in labels.split(",")))))
    if as_json:
        _print_json(report)
    else:
        for name, entry in report["data"].items():
            print(
                f"data '{name}': {entry['rows']} rows, {entry['units']} privacy units ({report['shared']['unit']}); "
                f"{entry['faults']} rows cannot be learnt from (they contribute zero)"
            )
            for fault in entry["first_faults"]:
                print(f"  row {fault['row']}: {fault['field']} {fault['reason']}")
        print(f"what this site shows the coordinator: {json.dumps(report['shared'])}")
    if any(entry["faults"] for entry in report["data"].values()):
        raise typer.Exit(2)


@app.command("pending")
def pending_command(config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """List plans that wait for a decision."""
    from client.privacy.ledger import Decision

    with _ledger(config) as ledger:
        waiting = [
            {
                "digest": entry.digest,
                "run": entry.run_id,
                "received": entry.received_at,
                "epsilon": entry.statement.epsilon if entry.statement else None,
                "delta": entry.statement.delta if entry.statement else None,
            }
            for entry in ledger.plans(Decision.WAITING)
        ]
    if as_json:
        _print_json(waiting)
        return
    for plan in waiting:
        print(f"{plan['digest']}  run {plan['run']}  epsilon {plan['epsilon']}  delta {plan['delta']}")
    if not waiting:
        print("no plan waits for a decision")


@app.command("approve")
def approve_command(
    digest: Annotated[str, typer.Argument(help="The plan's digest, or its first characters.")],
    config: Config = Path("site.toml"),
) -> None:
    """Approve a plan: reserves its whole epsilon now, or refuses it if the lifetime budget does not carry it."""
    with _ledger(config) as ledger:
        full = _one_plan(ledger, digest)
        decision = ledger.approve(full)
    _record_decision(config, full, decision)
    print(f"plan {full[:12]}: {decision}")


@app.command("reject")
def reject_command(
    digest: Annotated[str, typer.Argument(help="The plan's digest, or its first characters.")],
    config: Config = Path("site.toml"),
) -> None:
    """Reject a plan."""
    with _ledger(config) as ledger:
        full = _one_plan(ledger, digest)
        ledger.reject(full)
    _record_decision(config, full, "refused")
    print(f"plan {full[:12]}: refused")


def _record_decision(config: Path, digest: str, decision: str) -> None:
    from client.audit_log import AuditLog

    audit = AuditLog(_settings(config).site.state / "audit.jsonl")
    audit.append("plan decided", plan=digest, decision=decision, by="person")


@app.command("ledger")
def ledger_command(config: Config = Path("site.toml"), as_json: AsJson = False) -> None:
    """What was reserved and spent, by plan and round."""
    with _ledger(config) as ledger:
        plans = [
            {
                "digest": entry.digest,
                "run": entry.run_id,
                "decision": entry.decision,
                "epsilon": entry.statement.epsilon if entry.statement else None,
                "delta": entry.statement.delta if entry.statement else None,
                "rounds": [
                    {"round": r, "phase": p, "sample_rate": q, "noise_multiplier": s, "steps": t}
                    for r, p, q, s, t in ledger.charges(entry.digest)
                ],
            }
            for entry in ledger.plans()
        ]
    if as_json:
        _print_json(plans)
        return
    for plan in plans:
        print(
            f"{plan['digest'][:12]}  run {plan['run']}  {plan['decision']}  epsilon {plan['epsilon']}  "
            f"rounds funded {len(plan['rounds'])}"
        )
    if not plans:
        print("no plan was ever shown to this site")


def _settings(config: Path) -> SiteConfig:
    from client.config import read_site_config

    return read_site_config(config)


def _ledger(config: Path) -> Any:
    from contextlib import closing

    from client.privacy.ledger import Ledger

    return closing(Ledger(_settings(config).site.state))


def _one_plan(ledger: Ledger, prefix: str) -> str:
    found = [entry.digest for entry in ledger.plans() if entry.digest.startswith(prefix)]
    if len(found) != 1:
        raise ConfigError(f"DIGEST = '{prefix}': {len(found)} plans start with it; see 'consilium site pending'")
    return found[0]


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
