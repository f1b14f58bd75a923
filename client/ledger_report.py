"""What the ledger says, as one object and as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from client.plan_in_words import shown
from client.privacy.ledger import Ledger, PlanEntry

FIGURES = ("limit", "spent", "reserved", "left")
EMPTY: dict[str, Any] = {"blocked": None, "clock_ahead_seconds": 0, "populations": [], "plans": []}
"""The account of a site where no agent has run yet."""
NOTICEABLE = timedelta(minutes=1)
"""Clocks that are further apart are spoken of."""


def account(ledger: Ledger, claims_epsilon: bool = True) -> dict[str, Any]:
    """Populations with what is spent, reserved and left; plans with every charge.

    Args:
        claims_epsilon: ``False`` with fixed keys, under which no plan keeps what its noise would promise.
    """
    return {
        "blocked": ledger.blocked,
        "clock_ahead_seconds": max(0, round(ledger.clock_ahead.total_seconds())),
        "populations": [_population(ledger, population) for population in ledger.populations()],
        "plans": [_plan(ledger, entry, claims_epsilon) for entry in ledger.plans()],
    }


def warnings(ledger: Ledger, fixed_keys: bool = False) -> Iterator[str]:
    """What a person should look at before anything else."""
    if fixed_keys:
        yield "[testing] fixed keys are in use: no privacy is claimed, and the budget below protects nobody"
    if why := ledger.blocked:
        yield (
            f"this site is BLOCKED: {shown(why)}. Nothing is approved, trained or sent; look into it, then see "
            "'consilium site unblock --help'"
        )
    if (ahead := ledger.clock_ahead) > NOTICEABLE:
        yield (
            f"the ledger's clock is {timedelta(seconds=round(ahead.total_seconds()))} ahead of the system's: that one "
            "was set back, or had been set forward. Plans expire by the ledger's, so perhaps early"
        )


def print_account(found: dict[str, Any]) -> None:
    """The same for people: tables with lines on a terminal, aligned text elsewhere."""
    if found["populations"]:
        print_table(
            "Lifetime budgets (epsilon)",
            ("population", "unit", "delta", "limit", "spent", "reserved", "left"),
            [
                (each["name"], each["unit"], f"{each['delta']:g}", *(f"{each[name]:.4f}" for name in FIGURES))
                for each in found["populations"]
            ],
        )
    if not found["plans"]:
        print("no plan was ever shown to this site")
        return
    print_table(
        "Plans",
        ("plan", "run", "population", "decision", "epsilon", "delta", "rounds"),
        [
            (
                *(plan["digest"][:12], plan["run"], plan["population"], plan["decision"]),
                *(_figure(plan["epsilon"], ".4f"), _figure(plan["delta"], "g"), str(len(plan["rounds"]))),
            )
            for plan in found["plans"]
        ],
    )
    if charges := [row for plan in found["plans"] for row in _charges(plan)]:
        columns = ("plan", "rounds", "phase", "sample rate", "noise multiplier", "steps each")
        print_table("Charges", columns, charges)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table."""
    safe = [[shown(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, no_wrap=True)
        for row in safe:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *safe, strict=True)]
    print(title)
    for row in ([*columns], *safe):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def as_waiting(ledger: Ledger, entry: PlanEntry) -> dict[str, Any]:
    """A plan that waits, with what it would cost."""
    statement, balance = entry.statement, ledger.balance(entry.population)
    return {
        "digest": entry.digest,
        "run": entry.run_id,
        "received": entry.received_at,
        "population": entry.population,
        "epsilon": statement.epsilon if statement else None,
        "delta": statement.delta if statement else None,
        "limit": balance.limit,
        "reserved": balance.reserved,
        "reserved_after": balance.after(statement) if statement else balance.reserved,
    }


def waiting_row(plan: dict[str, Any]) -> tuple[str, ...]:
    """The same as a row of a table."""
    epsilon = "none" if plan["epsilon"] is None else f"{plan['epsilon']:.4f}"
    after = f"{plan['reserved_after']:.4f}" + (" (does not fit)" if plan["reserved_after"] > plan["limit"] else "")
    return plan["digest"], plan["run"], plan["population"], epsilon, after, f"{plan['limit']:.4f}"


def _population(ledger: Ledger, population: Any) -> dict[str, Any]:
    balance = ledger.balance(population.name)
    return {
        "name": population.name,
        "unit": population.unit,
        "public_size": population.public_size,
        "delta": balance.delta,
        **{name: getattr(balance, name) for name in FIGURES},
    }


def _plan(ledger: Ledger, entry: PlanEntry, claims_epsilon: bool) -> dict[str, Any]:
    names = ("round", "phase", "sample_rate", "noise_multiplier", "steps")
    return {
        "digest": entry.digest,
        "run": entry.run_id,
        "population": entry.population,
        "decision": entry.decision,
        "refusal": entry.refusal,
        "received": entry.received_at,
        "decided": entry.decided_at,
        "closed_because": entry.closed_because or None,
        "epsilon": entry.statement.epsilon if entry.statement and claims_epsilon else None,
        "delta": entry.statement.delta if entry.statement else None,
        "rounds": [dict(zip(names, charge, strict=True)) for charge in ledger.charges(entry.digest)],
    }


def _charges(plan: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for rounds that follow each other at the same charge."""
    runs: list[tuple[list[int], tuple[Any, ...]]] = []
    for each in plan["rounds"]:
        charge = (each["phase"], each["sample_rate"], each["noise_multiplier"], each["steps"])
        if runs and runs[-1][1] == charge and runs[-1][0][-1] + 1 == each["round"]:
            runs[-1][0].append(each["round"])
        else:
            runs.append(([each["round"]], charge))
    for rounds, (phase, rate, noise, steps) in runs:
        span = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]}-{rounds[-1]}"
        yield plan["digest"][:12], span, phase, f"{rate:.6g}", f"{noise:.6g}", str(steps)


def _figure(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
