"""Funded rounds and their releases. Everything here is part of a transaction of the ledger."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable

from client.privacy.ledger_entries import Decision, Reservation, StoredRelease
from client.privacy.sampling import RoundSecret
from client.privacy.schema import count, read_meta
from client.privacy.secret_files import SecretFiles
from common.errors import LedgerError
from common.messages import PhaseStatement, RefusalReason


def release(db: sqlite3.Connection, plan: str, round: int, request_digest: str) -> StoredRelease | RefusalReason | None:
    """What is stored for this very request, why nothing is served, or ``None`` if the round is free."""
    if ended := _ended(db, plan):
        return ended
    row = db.execute(
        "SELECT request_digest, payload, head, digest FROM charges LEFT JOIN releases USING (plan, round) "
        "WHERE plan=? AND round=?",
        (plan, round),
    ).fetchone()
    if row is None:
        return RefusalReason.OUT_OF_ORDER if round < _last_round(db, plan) else None
    asked_before, payload, head, digest = row
    if asked_before != request_digest:
        return RefusalReason.REQUEST_CHANGED
    if payload is None:
        return None
    if digest and hashlib.sha256(payload).hexdigest() != digest:
        raise LedgerError(
            f"plan {plan[:12]}, round {round}: the stored release is damaged and is not sent; put the newest copy of "
            "the ledger back, or close the plan ('consilium site close')"
        )
    return StoredRelease(bytes(payload), head)


def reserve(
    db: sqlite3.Connection,
    secrets: SecretFiles,
    plan: str,
    round: int,
    request_digest: str,
    phase: str,
    steps: int,
    fresh: Callable[[], RoundSecret],
    now: str,
) -> Reservation | RefusalReason:
    """Charges a round, with its secret on disk before that is committed; or gives the same reservation again."""
    if ended := _ended(db, plan):
        return ended
    row = db.execute(
        "SELECT sample_rate, noise_multiplier, clip_norm, steps - (SELECT COALESCE(SUM(steps), 0) FROM charges "
        "WHERE plan=? AND phase=name) FROM reservations WHERE plan=? AND name=?",
        (plan, plan, phase),
    ).fetchone()
    if row is None:
        return RefusalReason.UNKNOWN_PLAN
    rate, noise, clip_norm, left = row
    funded = PhaseStatement(phase, rate, noise, clip_norm, steps)
    charge = db.execute("SELECT request_digest FROM charges WHERE plan=? AND round=?", (plan, round)).fetchone()
    if charge is not None:
        if charge[0] != request_digest:
            return RefusalReason.REQUEST_CHANGED
        secret = secrets.read(plan, round)
        return Reservation(plan, round, request_digest, funded, secret) if secret else RefusalReason.SEED_LOST
    if round < _last_round(db, plan):
        return RefusalReason.OUT_OF_ORDER
    if steps > left:
        raise LedgerError(f"plan {plan[:12]}: phase '{phase}' has {left} reserved steps left, not {steps}")
    secret = fresh()
    secrets.write(plan, round, secret)
    db.execute(
        "INSERT INTO charges VALUES (?,?,?,?,?,?,?,?,NULL)",
        (plan, round, phase, request_digest, rate, noise, steps, now),
    )
    count(db)
    return Reservation(plan, round, request_digest, funded, secret)


def residual(db: sqlite3.Connection, plan: str, phase: str) -> bytes | None:
    """What rounding took away from the phase's releases so far; ``None``: nothing, or of another phase."""
    row = db.execute("SELECT payload FROM residuals WHERE plan=? AND phase=?", (plan, phase)).fetchone()
    return None if row is None else bytes(row[0])


def record(
    db: sqlite3.Connection, reservation: Reservation, payload: bytes, head: str, residual: bytes | None, now: str
) -> None:
    """Stores what is about to leave, and what rounding has taken away from it in the place of what it had before.

    Raises:
        LedgerError: it must not leave: the plan was closed, or the site blocked, while it was computed.
    """
    plan, round = reservation.plan, reservation.round
    if ended := _ended(db, plan):
        raise LedgerError(f"plan {plan[:12]}, round {round}: is not released, since meanwhile it is {ended}")
    db.execute(
        "INSERT INTO releases (plan, round, payload, head, digest) VALUES (?,?,?,?,?)",
        (plan, round, payload, head, hashlib.sha256(payload).hexdigest()),
    )
    db.execute("UPDATE charges SET released_at=? WHERE plan=? AND round=?", (now, plan, round))
    db.execute("DELETE FROM residuals WHERE plan=?", (plan,))
    if residual is not None:
        db.execute("INSERT INTO residuals VALUES (?,?,?)", (plan, reservation.phase.name, residual))
    count(db)


def charges(db: sqlite3.Connection, plan: str) -> list[tuple[int, str, float, float, int]]:
    """(round, phase, q, σ, steps) of every funded round, in order."""
    return db.execute(
        "SELECT round, phase, sample_rate, noise_multiplier, steps FROM charges WHERE plan=? ORDER BY round", (plan,)
    ).fetchall()


def unfinished(db: sqlite3.Connection, plan: str, round: int) -> bool:
    """Whether the round's secret is still needed: it is funded, not released, and its plan goes on."""
    row = db.execute(
        "SELECT 1 FROM charges JOIN plans ON plan = digest "
        "WHERE plan=? AND round=? AND released_at IS NULL AND status=?",
        (plan, round, Decision.APPROVED),
    ).fetchone()
    return row is not None


def _ended(db: sqlite3.Connection, plan: str) -> RefusalReason | None:
    if read_meta(db, "blocked"):
        return RefusalReason.BLOCKED
    closed = db.execute("SELECT 1 FROM plans WHERE digest=? AND status=?", (plan, Decision.CLOSED)).fetchone()
    return RefusalReason.CLOSED if closed else None


def _last_round(db: sqlite3.Connection, plan: str) -> int:
    return int(db.execute("SELECT COALESCE(MAX(round), 0) FROM charges WHERE plan=?", (plan,)).fetchone()[0])
