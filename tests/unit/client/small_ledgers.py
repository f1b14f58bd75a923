"""Ledgers of one population for the tests beside this file, and what another process would read of them."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.privacy.ledger import Decision, Ledger, Population, Reservation
from client.privacy.sampling import RoundSecret
from common.messages import PhaseStatement, PrivacyStatement
from common.privacy.accounting import Segment, filter_epsilon

SITE = Population("site", "example", 40, 4.0, 1e-5)
STATEMENT = PrivacyStatement(
    epsilon=2.0,
    delta=1e-5,
    unit="example",
    neighbouring="add-remove-one",
    accountant="prv",
    steps=30,
    phases=(PhaseStatement("head", 1.0, 8.0, 1.0, 10), PhaseStatement("lora", 0.1, 2.0, 0.5, 20)),
)
SEGMENTS = [Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)]
COST = filter_epsilon(SEGMENTS, 1e-5)


def open_ledger(folder: Path, limit: float = 4.0, **settings: Any) -> Ledger:
    ledger = Ledger(folder, **settings)
    ledger.declare(replace(SITE, lifetime_epsilon=limit))
    return ledger


def receive(ledger: Ledger, digest: str = "plan", statement: PrivacyStatement | None = STATEMENT) -> None:
    ledger.receive(digest, f"run of {digest}", "{}", "site", statement, None)


def approved(ledger: Ledger, digest: str = "plan") -> Ledger:
    receive(ledger, digest)
    assert ledger.approve(digest) is Decision.APPROVED
    return ledger


def fund(
    ledger: Ledger, round: int = 1, request: str = "request", phase: str = "head", plan: str = "plan"
) -> Reservation:
    reservation = ledger.reserve(plan, round, request, phase, 1, RoundSecret.from_system)
    assert isinstance(reservation, Reservation)
    return reservation


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What another process would read: committed rows only."""
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def secrets_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "secrets").iterdir()}
