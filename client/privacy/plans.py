"""Plans and what was decided about them. Everything here is part of a transaction of the ledger."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict

from client.privacy import populations
from client.privacy.ledger_entries import Decision, PlanEntry
from client.privacy.schema import count, read_meta
from common.errors import LedgerError
from common.messages import PhaseStatement, PrivacyStatement, RefusalReason

COLUMNS = (
    "digest, run_id, body, status, refusal, statement, received_at, decided_at, population, signature, closed_because"
)
OPEN = (Decision.WAITING, Decision.APPROVED)


def found(db: sqlite3.Connection, field: str, value: str) -> PlanEntry | None:
    """The plan whose ``digest`` or ``run_id`` this is."""
    row = db.execute(f"SELECT {COLUMNS} FROM plans WHERE {field}=?", (value,)).fetchone()
    return None if row is None else _entry(row)


def listed(db: sqlite3.Connection) -> list[PlanEntry]:
    """All plans in the order they came."""
    return [_entry(row) for row in db.execute(f"SELECT {COLUMNS} FROM plans ORDER BY rowid").fetchall()]


def known(db: sqlite3.Connection, digest: str) -> PlanEntry:
    """The plan with this digest.

    Raises:
        LedgerError: it was never shown.
    """
    entry = found(db, "digest", digest)
    if entry is None:
        raise LedgerError(f"plan {digest[:12]}: was never shown to this site; see 'consilium site ledger'")
    return entry


def receive(db: sqlite3.Connection, entry: PlanEntry) -> None:
    """Stores a plan that was shown."""
    stated = json.dumps(asdict(entry.statement)) if entry.statement else None
    db.execute(
        "INSERT INTO plans (digest, run_id, population, body, signature, status, refusal, statement, received_at) "
        "VALUES (?,?,?,?,?,?,?,?,?)",
        (
            *(entry.digest, entry.run_id, entry.population, entry.body, entry.signature.encode()),
            *(entry.decision, entry.refusal, stated, entry.received_at),
        ),
    )


def approve(db: sqlite3.Connection, digest: str, now: str) -> Decision:
    """Reserves the plan's whole cost, or refuses the plan."""
    entry = _waiting(db, digest)
    if why := read_meta(db, "blocked"):
        raise LedgerError(f"plan {digest[:12]}: nothing is approved while the site is blocked ({why})")
    balance = populations.balance(db, entry.population)
    if entry.statement is None or balance.after(entry.statement) > balance.limit:
        _decide(db, digest, Decision.REFUSED, RefusalReason.BUDGET, now)
        return Decision.REFUSED
    for index, phase in enumerate(entry.statement.phases):
        db.execute("INSERT INTO reservations VALUES (?,?,?,?,?,?,?)", (digest, index, *asdict(phase).values()))
    _decide(db, digest, Decision.APPROVED, None, now)
    return Decision.APPROVED


def reject(db: sqlite3.Connection, digest: str, now: str) -> None:
    """Refuses a plan that waits."""
    _waiting(db, digest)
    _decide(db, digest, Decision.REFUSED, RefusalReason.POLICY, now)


def close(db: sqlite3.Connection, digest: str, why: str, now: str) -> bool:
    """Ends a plan: what it released is deleted, what it reserved and spent stays. Whether it was open until now.

    Raises:
        LedgerError: it was refused, so there is nothing to end.
    """
    entry = known(db, digest)
    if entry.decision is Decision.REFUSED:
        raise LedgerError(f"plan {digest[:12]}: was refused ({entry.refusal}), so there is nothing to close")
    if entry.decision is Decision.CLOSED:
        return False
    db.execute("DELETE FROM releases WHERE plan=?", (digest,))
    db.execute("DELETE FROM residuals WHERE plan=?", (digest,))
    db.execute(
        "UPDATE plans SET status=?, refusal=?, closed_at=?, closed_because=?, fingerprint=NULL WHERE digest=?",
        (Decision.CLOSED, RefusalReason.CLOSED, now, why, digest),
    )
    return True


def undecided_or_decided_before(db: sqlite3.Connection, time: str) -> list[str]:
    """Open plans whose decision, or receipt where nothing is decided, is older."""
    rows = db.execute(
        "SELECT digest FROM plans WHERE status IN (?,?) AND COALESCE(decided_at, received_at) < ? ORDER BY rowid",
        (*OPEN, time),
    ).fetchall()
    return [digest for (digest,) in rows]


def fingerprint(db: sqlite3.Connection, digest: str) -> str | None:
    """Of the data a plan is bound to, once it is."""
    known(db, digest)
    value = db.execute("SELECT fingerprint FROM plans WHERE digest=?", (digest,)).fetchone()[0]
    return None if value is None else str(value)


def bind(db: sqlite3.Connection, digest: str, value: str) -> str:
    """Binds a plan to its data, unless another process has; returns what it is bound to."""
    db.execute("UPDATE plans SET fingerprint=? WHERE digest=? AND fingerprint IS NULL", (value, digest))
    return fingerprint(db, digest) or ""


def _waiting(db: sqlite3.Connection, digest: str) -> PlanEntry:
    entry = found(db, "digest", digest)
    if entry is None or entry.decision is not Decision.WAITING:
        raise LedgerError(f"plan {digest[:12]}: is not waiting for a decision")
    return entry


def _decide(db: sqlite3.Connection, digest: str, decision: Decision, refusal: RefusalReason | None, now: str) -> None:
    db.execute("UPDATE plans SET status=?, refusal=?, decided_at=? WHERE digest=?", (decision, refusal, now, digest))
    count(db)


def _entry(
    row: tuple[str, str, str, str, str | None, str | None, str, str | None, str, bytes | None, str],
) -> PlanEntry:
    digest, run_id, body, status, refusal, statement, received, decided, population, signature, closed = row
    return PlanEntry(
        digest,
        run_id,
        body,
        Decision(status),
        RefusalReason(refusal) if refusal else None,
        _statement(statement) if statement else None,
        received,
        decided,
        population,
        (signature or b"").decode(),
        closed or "",
    )


def _statement(text: str) -> PrivacyStatement:
    fields = json.loads(text)
    fields["phases"] = tuple(PhaseStatement(**phase) for phase in fields["phases"])
    return PrivacyStatement(**fields)
