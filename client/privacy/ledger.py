"""The site's privacy ledger: charge before spend, nothing refunded, one release per reserved round.

One SQLite file (WAL, synchronous=FULL) outlives all runs. Approving a plan reserves its whole cost under the lifetime
limit of its population, or refuses it. Reserving a round writes its secret seed durably (0600, in a folder of its own
that belongs outside backups) before the first gradient, so that after a crash the *same* release is computed again; the
seed is deleted in the moment the release is stored.

==============  ====================================================================================================
populations     who the budget belongs to, and its lifetime limit
plans           every plan ever shown, its decision and its calibrated statement
reservations    per plan and phase: q, σ, C and steps reserved at approval, all of them at once
charges         per round: which request was funded, and whether its release is stored
releases        the exact bytes that left, to be sent again unchanged
==============  ====================================================================================================
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from client.privacy.budget import segments_of
from client.privacy.sampling import RoundSecret
from client.privacy.secret_files import SecretFiles
from common.errors import LedgerError
from common.messages import PhaseStatement, PrivacyStatement, RefusalReason
from common.privacy.accounting import Segment, filter_epsilon

SCHEMA_VERSION = 1

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE populations (
  name TEXT PRIMARY KEY, unit TEXT NOT NULL, public_size INTEGER NOT NULL,
  lifetime_epsilon REAL NOT NULL, lifetime_delta REAL NOT NULL, created_at TEXT NOT NULL) STRICT;
CREATE TABLE plans (
  digest TEXT PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, population TEXT NOT NULL REFERENCES populations(name),
  body TEXT NOT NULL, signature BLOB, status TEXT NOT NULL, refusal TEXT, statement TEXT,
  received_at TEXT NOT NULL, decided_at TEXT) STRICT;
CREATE TABLE reservations (
  plan TEXT NOT NULL REFERENCES plans(digest), phase INTEGER NOT NULL, name TEXT NOT NULL,
  sample_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, steps INTEGER NOT NULL,
  PRIMARY KEY (plan, phase), UNIQUE (plan, name)) STRICT;
CREATE TABLE charges (
  plan TEXT NOT NULL REFERENCES plans(digest), round INTEGER NOT NULL, phase TEXT NOT NULL,
  request_digest TEXT NOT NULL, sample_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, steps INTEGER NOT NULL,
  reserved_at TEXT NOT NULL, released_at TEXT, PRIMARY KEY (plan, round)) STRICT;
CREATE TABLE releases (
  plan TEXT NOT NULL, round INTEGER NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (plan, round),
  FOREIGN KEY (plan, round) REFERENCES charges(plan, round)) STRICT;
"""


class Decision(StrEnum):
    """Where a plan stands at this site."""

    WAITING = "waiting"
    APPROVED = "approved"
    REFUSED = "refused"


@dataclass(frozen=True)
class Population:
    """Whose budget it is."""

    name: str
    unit: str
    public_size: int
    lifetime_epsilon: float
    lifetime_delta: float


@dataclass(frozen=True)
class PlanEntry:
    """A plan as the ledger knows it."""

    digest: str
    run_id: str
    body: str
    decision: Decision
    refusal: RefusalReason | None
    statement: PrivacyStatement | None
    received_at: str


@dataclass(frozen=True)
class Reservation:
    """A funded round: exactly one release of exactly this request, with exactly this secret."""

    plan: str
    round: int
    request_digest: str
    phase: PhaseStatement
    """q, σ and C as reserved; ``steps`` are those of this round."""
    secret: RoundSecret


class Ledger:
    """See the module's description. Safe for several threads of one process.

    Args:
        folder: holds ``ledger.sqlite`` and ``secrets/``.
        durable: ``False`` in simulations, whose ledgers are fresh: written, but not forced to the disk.
        keep_open: ``False`` closes the file between uses, for simulations of very many sites.

    Raises:
        LedgerError: the file is damaged, or was written by a newer version.
    """

    def __init__(self, folder: Path, durable: bool = True, keep_open: bool = True) -> None:
        self.folder, self.durable, self.keep_open = folder, durable, keep_open
        self._secrets = SecretFiles(folder / "secrets", durable)
        self.path = folder / "ledger.sqlite"
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        with self._connection() as db:
            self._prepare(db)
            self._delete_used_secrets(db)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The open file, for one thread at a time."""
        with self._lock:
            outermost = self._open is None
            try:
                if self._open is None:
                    self._open = self._connect()
                yield self._open
            except sqlite3.DatabaseError as error:
                raise LedgerError(
                    f"ledger {self.path}: cannot be used ({error}); do not delete it, and put no older copy in its "
                    "place, which would forget what was spent"
                ) from None
            finally:
                if outermost and not self.keep_open:
                    self.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        os.chmod(self.path, 0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if self.durable else 'OFF'}")
        db.execute("PRAGMA foreign_keys=ON")
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        with self._transaction():
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                for statement in TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
            version = int(db.execute("SELECT value FROM meta WHERE key='schema_version'").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"ledger {self.path}: schema_version {version} is newer than this installation knows "
                f"({SCHEMA_VERSION}); update it"
            )

    def _delete_used_secrets(self, db: sqlite3.Connection) -> None:
        """What a crash between storing a release and deleting its secret has left."""
        for key in self._secrets.rounds():
            if db.execute("SELECT 1 FROM releases WHERE plan=? AND round=?", key).fetchone():
                self._secrets.delete(*key)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction that excludes every other writer, also of other processes."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    # ---- plans ------------------------------------------------------------------------------------------------

    def declare(self, population: Population) -> None:
        """Makes a population known. Its unit, public size and δ are fixed from then on.

        A new limit holds from the next plan on; what was approved before stays approved.

        Raises:
            LedgerError: a fixed field differs from what was declared before.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT unit, public_size, lifetime_delta FROM populations WHERE name=?", (population.name,)
            ).fetchone()
            if row is None:
                values = (*asdict(population).values(), _now())
                db.execute("INSERT INTO populations VALUES (?,?,?,?,?,?)", values)
                return
            for field, known in zip(("unit", "public_size", "lifetime_delta"), row, strict=True):
                if (value := getattr(population, field)) != known:
                    raise LedgerError(
                        f"policy.{field} = {value}: population '{population.name}' was declared with {known}, which is "
                        "fixed for its lifetime; put the old value back"
                    )
            db.execute(
                "UPDATE populations SET lifetime_epsilon=? WHERE name=?", (population.lifetime_epsilon, population.name)
            )

    def plan(self, digest: str) -> PlanEntry | None:
        """The plan with this digest, if it was ever shown."""
        return self._entry("digest", digest)

    def plan_of_run(self, run_id: str) -> PlanEntry | None:
        """The plan a run id is bound to."""
        return self._entry("run_id", run_id)

    def plans(self, decision: Decision | None = None) -> list[PlanEntry]:
        """All plans in the order they came, or those with one decision."""
        with self._connection() as db:
            rows = db.execute("SELECT digest FROM plans ORDER BY rowid").fetchall()
        entries = [entry for (digest,) in rows if (entry := self.plan(digest)) is not None]
        return [entry for entry in entries if decision in (None, entry.decision)]

    def _entry(self, field: str, value: str) -> PlanEntry | None:
        with self._connection() as db:
            row = db.execute(
                f"SELECT digest, run_id, body, status, refusal, statement, received_at FROM plans WHERE {field}=?",
                (value,),
            ).fetchone()
        if row is None:
            return None
        statement = _statement(row[5]) if row[5] else None
        refusal = RefusalReason(row[4]) if row[4] else None
        return PlanEntry(row[0], row[1], row[2], Decision(row[3]), refusal, statement, row[6])

    def receive(
        self,
        digest: str,
        run_id: str,
        body: str,
        population: str,
        statement: PrivacyStatement | None,
        refusal: RefusalReason | None,
    ) -> None:
        """Records a plan that was shown: waiting for a decision, or refused by policy."""
        status = Decision.WAITING if refusal is None else Decision.REFUSED
        stated = json.dumps(asdict(statement)) if statement else None
        with self._transaction() as db:
            db.execute(
                "INSERT INTO plans VALUES (?,?,?,?,NULL,?,?,?,?,NULL)",
                (digest, run_id, population, body, status, refusal, stated, _now()),
            )

    def approve(self, digest: str) -> Decision:
        """Reserves the plan's whole cost under the population's lifetime limit, atomically, or refuses the plan.

        The limit is a Rényi filter over all steps ever reserved: plans are chosen after seeing earlier releases. What
        is executed is part of what is reserved, so it holds for that too (:mod:`common.privacy.renyi`).
        """
        with self._transaction() as db:
            entry = self.plan(digest)
            if entry is None or entry.decision is not Decision.WAITING:
                raise LedgerError(f"plan {digest[:12]}: is not waiting for a decision")
            if entry.statement is None or not self._affordable(db, digest, entry.statement):
                self._decide(db, digest, Decision.REFUSED, RefusalReason.BUDGET)
                return Decision.REFUSED
            for index, phase in enumerate(entry.statement.phases):
                db.execute("INSERT INTO reservations VALUES (?,?,?,?,?,?,?)", (digest, index, *asdict(phase).values()))
            self._decide(db, digest, Decision.APPROVED, None)
            return Decision.APPROVED

    def reject(self, digest: str) -> None:
        """A person at the site says no. Only a waiting plan can be rejected."""
        with self._transaction() as db:
            entry = self.plan(digest)
            if entry is None or entry.decision is not Decision.WAITING:
                raise LedgerError(f"plan {digest[:12]}: is not waiting for a decision")
            self._decide(db, digest, Decision.REFUSED, RefusalReason.POLICY)

    @staticmethod
    def _decide(db: sqlite3.Connection, digest: str, decision: Decision, refusal: RefusalReason | None) -> None:
        db.execute(
            "UPDATE plans SET status=?, refusal=?, decided_at=? WHERE digest=?", (decision, refusal, _now(), digest)
        )

    def _affordable(self, db: sqlite3.Connection, digest: str, statement: PrivacyStatement) -> bool:
        population, limit, delta = db.execute(
            "SELECT name, lifetime_epsilon, lifetime_delta FROM populations JOIN plans ON population=name "
            "WHERE digest=?",
            (digest,),
        ).fetchone()
        return bool(filter_epsilon([*self.reserved(population), *segments_of(statement)], delta) <= limit)

    def reserved(self, population: str) -> list[Segment]:
        """Everything ever reserved by approved plans of a population. Nothing leaves this list."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT sample_rate, noise_multiplier, steps FROM reservations JOIN plans ON plan = digest "
                "WHERE population=? AND noise_multiplier > 0",
                (population,),
            ).fetchall()
        return [Segment(*row) for row in rows]

    # ---- rounds -----------------------------------------------------------------------------------------------

    def release(self, plan: str, round: int, request_digest: str) -> bytes | RefusalReason | None:
        """The stored release of this very request; a reason if the round was funded for another request or lies before
        one already funded; ``None`` if the round is free."""
        with self._connection() as db:
            row = db.execute(
                "SELECT request_digest, payload FROM charges LEFT JOIN releases USING (plan, round) "
                "WHERE plan=? AND round=?",
                (plan, round),
            ).fetchone()
            if row is not None:
                if row[0] != request_digest:
                    return RefusalReason.REQUEST_CHANGED
                return bytes(row[1]) if row[1] is not None else None
            return RefusalReason.OUT_OF_ORDER if round < self._last_round(db, plan) else None

    @staticmethod
    def _last_round(db: sqlite3.Connection, plan: str) -> int:
        return int(db.execute("SELECT COALESCE(MAX(round), 0) FROM charges WHERE plan=?", (plan,)).fetchone()[0])

    def reserve(
        self, plan: str, round: int, request_digest: str, phase: str, steps: int, fresh: Callable[[], RoundSecret]
    ) -> Reservation | RefusalReason:
        """Funds one release of one request, with its secret on disk before this returns.

        A round that is already funded for the same request gives the same reservation again (after a crash); if its
        secret is gone it can never be executed again.

        Raises:
            LedgerError: the phase would execute more steps than its plan has reserved.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT sample_rate, noise_multiplier, clip_norm, steps - (SELECT COALESCE(SUM(steps), 0) FROM charges "
                "WHERE plan=? AND phase=name) FROM reservations WHERE plan=? AND name=?",
                (plan, plan, phase),
            ).fetchone()
            if row is None:
                return RefusalReason.UNKNOWN_PLAN
            funded = PhaseStatement(phase, row[0], row[1], row[2], steps)
            charge = db.execute("SELECT request_digest FROM charges WHERE plan=? AND round=?", (plan, round)).fetchone()
            if charge is not None:
                if charge[0] != request_digest:
                    return RefusalReason.REQUEST_CHANGED
                secret = self._secrets.read(plan, round)
                return Reservation(plan, round, request_digest, funded, secret) if secret else RefusalReason.SEED_LOST
            if round < self._last_round(db, plan):
                return RefusalReason.OUT_OF_ORDER
            if steps > row[3]:
                raise LedgerError(f"plan {plan[:12]}: phase '{phase}' has {row[3]} reserved steps left, not {steps}")
            secret = fresh()
            self._secrets.write(plan, round, secret)
            db.execute(
                "INSERT INTO charges VALUES (?,?,?,?,?,?,?,?,NULL)",
                (plan, round, phase, request_digest, row[0], row[1], steps, _now()),
            )
        return Reservation(plan, round, request_digest, funded, secret)

    def record(self, reservation: Reservation, payload: bytes) -> None:
        """Stores the release and only then deletes its secret."""
        with self._transaction() as db:
            key = (reservation.plan, reservation.round)
            db.execute("INSERT INTO releases VALUES (?,?,?)", (*key, payload))
            db.execute("UPDATE charges SET released_at=? WHERE plan=? AND round=?", (_now(), *key))
        self._secrets.delete(*key)

    def charges(self, plan: str) -> list[tuple[int, str, float, float, int]]:
        """(round, phase, q, σ, steps) of every funded round, in order."""
        with self._connection() as db:
            return db.execute(
                "SELECT round, phase, sample_rate, noise_multiplier, steps FROM charges WHERE plan=? ORDER BY round",
                (plan,),
            ).fetchall()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _statement(text: str) -> PrivacyStatement:
    fields = json.loads(text)
    fields["phases"] = tuple(PhaseStatement(**phase) for phase in fields["phases"])
    return PrivacyStatement(**fields)
