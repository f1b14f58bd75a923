"""What an audit prints: a table of verdicts for people, one JSON object for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from client.privacy.audit.run import Audit
from client.privacy.audit.verdicts import FAMILY, LEVEL, Verdict
from common.config import RunConfig

SCHEMA_VERSION = 1

METHOD = (
    "Audited is the engine of this installation (Site.train with policy, ledger, sampling, clipping, noise and egress) "
    "under the plan's mechanism, unit, clip norms, rates, steps and noise. Replay and noise checks train a tiny random "
    "model of the plan's task with the plan's adapter; canaries train a linear head on one-hot features. The guarantee "
    "does not rest on the model, and tiny ones make exact replays and a thousand canaries a run affordable. Sites of "
    "the audit use plain SGD with their own learning rate and no dropout, which cost no privacy either way. Replays "
    "execute one step at q = 1. They and the sampling checks use known keys, so that the noise can be taken off; all "
    "else uses keys of the operating system. No data of yours are read."
)
SOURCES = (
    "Canaries: Nasr et al. 2023 (arXiv 2302.07956), Steinke et al. 2023 (arXiv 2305.08846), Andrew et al. 2023 (arXiv "
    "2302.03098). A lower bound cannot prove the claim; it can refute it."
)


def as_json(found: Audit, config: RunConfig, source: str, quick: bool) -> Mapping[str, Any]:
    """The whole report as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": source,
        "passed": found.passed,
        "quick": quick,
        "noise": config.privacy.noise,
        "unit": config.unit,
        "public_size": found.public_size,
        "seed": found.seed,
        "seconds": round(found.seconds, 1),
        "false_alarm": FAMILY,
        "canaries": asdict(found.estimate) if found.estimate else None,
        "checks": [asdict(verdict) for verdict in found.verdicts],
        "method": METHOD,
        "sources": SOURCES,
    }


def show(found: Audit, config: RunConfig, console: Console) -> None:
    """The table, what failed checks look like, and ε claimed and found."""
    table = Table(title=f"Audit of '{config.run.name}': unit {config.unit}, noise {config.privacy.noise}")
    table.add_column("part")
    table.add_column("check", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("allowed", no_wrap=True)
    table.add_column("false alarm", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in found.verdicts:
        word = "[green]holds[/]" if verdict.held else "[bold red]FAILS[/]"
        chance = f"{verdict.false_alarm:.1g}" if verdict.false_alarm else "0"
        table.add_row(verdict.part, verdict.name, _number(verdict.figure), _allowed(verdict), chance, word)
    console.print(table)
    for verdict in found.failed:
        console.print(f"[bold red]{verdict.name}[/]: {verdict.claim}", highlight=False)
        console.print(f"  measured {_number(verdict.figure)}, {verdict.where}", highlight=False, markup=False)
        console.print(f"  suspected: {verdict.suspects}", highlight=False, markup=False)
    _show_estimate(found, console)
    console.print(METHOD, highlight=False)
    console.print(
        f"A correct engine fails with probability {FAMILY:g} at most: each statistical check has level {LEVEL:.3g} "
        f"(Bonferroni), the others are exact. Public size {found.public_size}, seed {found.seed}, "
        f"{found.seconds:.0f} s.",
        highlight=False,
    )
    console.print(SOURCES, highlight=False)
    outcome = f"{len(found.failed)} of {len(found.verdicts)} checks fail" if found.failed else "all checks hold"
    console.print(f"[bold]{outcome}[/]", highlight=False)


def _show_estimate(found: Audit, console: Console) -> None:
    estimate = found.estimate
    if estimate is None:
        return
    console.print(
        f"[bold]ε claimed {estimate.claimed_epsilon:.3f}; canaries show {estimate.epsilon:.3f}, 99 % interval "
        f"{estimate.epsilon_low:.3f} to {estimate.epsilon_high:.3f}[/] (δ = {estimate.delta:g}; "
        f"{estimate.canaries} canaries through {estimate.rounds} of {estimate.planned_rounds} rounds).",
        highlight=False,
    )
    console.print(
        f"Canaries alone would show noise of half the scale with probability {estimate.power_half_noise:.3f}, and "
        f"noise that pays for one round with probability {estimate.power_one_round:.3f}.",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _allowed(verdict: Verdict) -> str:
    if verdict.least is None and verdict.most is None:
        return ""
    if verdict.least is None:
        return f"≤ {_number(verdict.most)}"
    if verdict.most is None:
        return f"≥ {_number(verdict.least)}"
    return f"{_number(verdict.least)} … {_number(verdict.most)}"
