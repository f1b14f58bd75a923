"""The site's privacy ledger: charge before spend, nothing refunded, one release per reserved round.

One SQLite file outlives all runs; its tables are described in :mod:`client.privacy.schema`. Approving a plan reserves
its whole cost under the lifetime limit of its population, or refuses it. Reserving a round writes its secret seed
durably (0600, in a folder of its own that belongs outside backups) before the first gradient, so that after a crash the
*same* release is computed again; the seed is deleted in the moment the release is stored.

An older copy of the file is told by a counter outside it (:mod:`client.privacy.ledger_file`), and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from sqlite3 import Connection

from client.privacy import plans, populations, rounds
from client.privacy.agent_lock import agent_lock
from client.privacy.budget import Balance as Balance
from client.privacy.clock import LedgerClock
from client.privacy.counter import Counter
from client.privacy.ledger_entries import Decision as Decision
from client.privacy.ledger_entries import PlanEntry as PlanEntry
from client.privacy.ledger_entries import Population as Population
from client.privacy.ledger_entries import Reservation as Reservation
from client.privacy.ledger_entries import StoredRelease as StoredRelease
from client.privacy.ledger_file import LedgerFile
from client.privacy.sampling import RoundSecret
from client.privacy.schema import count, read_meta, sequence_of, write_meta
from client.privacy.secret_files import SecretFiles
from common.errors import LedgerError
from common.messages import PrivacyStatement, RefusalReason
from common.privacy.accounting import Segment

CLOCK_IS_STORED_EVERY = timedelta(hours=1)
"""So much of an expiry can a clock that is set back delay, whenever the agent is started again."""


class Ledger:
    """See the module's description. Safe for several threads of one process, and beside other processes.

    Args:
        folder: holds ``ledger.sqlite`` and ``secrets/``.
        durable: ``False`` in simulations, whose ledgers are fresh: written, but not forced to the disk.
        counter: a small file in another folder, which is never restored together with this one: it holds the ledger's
            sequence number, and so tells an older copy. ``None`` in simulations.
        accept_copy: takes the file for its newest copy, whatever the counter says. Only a person can know that, and
            only :meth:`unblock` may follow.

    Raises:
        LedgerError: the file is damaged, an older copy, or was written by a newer version; or it cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        durable: bool = True,
        counter: Path | None = None,
        accept_copy: bool = False,
    ) -> None:
        if counter is not None and counter.resolve().is_relative_to(folder.resolve()):
            raise LedgerError(
                f"counter {counter}: lies in the ledger's folder {folder} and would be restored together with it; "
                "give site.counter a path elsewhere"
            )
        self.folder, self.path = folder, folder / "ledger.sqlite"
        self._file = LedgerFile(self.path, durable, None if counter is None else Counter(counter, durable), accept_copy)
        self._clock = LedgerClock()
        self._secrets = SecretFiles(folder / "secrets", durable)
        with self._file.writing() as db:
            self._clock.read(db)  # it runs from here on
            self._delete_spent_secrets(db)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @contextmanager
    def serve_alone(self) -> Iterator[None]:
        """While this lasts, no other agent serves from this ledger; commands of a person work beside it.

        Raises:
            LedgerError: one does.
        """
        with agent_lock(self.folder / "agent.lock"):
            yield

    @property
    def sequence(self) -> int:
        """Grows by one in each transaction that spends or decides."""
        with self._file.reading() as db:
            return sequence_of(db)

    @property
    def clock_ahead(self) -> timedelta:
        """How far the ledger's clock is ahead of the system's; more than a moment where that one was changed."""
        with self._file.reading() as db:
            return self._clock.ahead(db)

    # ---- populations ------------------------------------------------------------------------------------------

    def declare(self, population: Population) -> None:
        """Makes a population known. Its unit, public size and δ are fixed from then on.

        A new limit holds from the next plan on; what was approved before stays approved.

        Raises:
            LedgerError: a fixed field differs from what was declared before.
        """
        with self._file.writing() as db:
            populations.declare(db, population, self._clock.stamp(db))

    def populations(self) -> list[Population]:
        """All that were ever declared, also those that ``site.toml`` no longer names."""
        with self._file.reading() as db:
            return populations.listed(db)

    def bind_data(self, name: str, population: str) -> None:
        """Binds a data set to the population its rows belong to. The first binding is for ever.

        Raises:
            LedgerError: it is bound to another population, which its rows have been charged to.
        """
        with self._file.writing() as db:
            populations.bind(db, name, population, self._clock.stamp(db))

    def reserved(self, population: str) -> list[Segment]:
        """Everything ever reserved by approved plans of a population. Nothing leaves this list."""
        with self._file.reading() as db:
            return populations.reserved(db, population)

    def balance(self, population: str) -> Balance:
        """What is gone of a population's budget.

        Raises:
            LedgerError: there is no such population.
        """
        with self._file.reading() as db:
            return populations.balance(db, population)

    # ---- plans ------------------------------------------------------------------------------------------------

    def plan(self, digest: str) -> PlanEntry | None:
        """The plan with this digest, if it was ever shown."""
        with self._file.reading() as db:
            return plans.found(db, "digest", digest)

    def plan_of_run(self, run_id: str) -> PlanEntry | None:
        """The plan a run id is bound to."""
        with self._file.reading() as db:
            return plans.found(db, "run_id", run_id)

    def plans(self, decision: Decision | None = None) -> list[PlanEntry]:
        """All plans in the order they came, or those with one decision."""
        with self._file.reading() as db:
            return [entry for entry in plans.listed(db) if decision in (None, entry.decision)]

    def receive(
        self,
        digest: str,
        run_id: str,
        body: str,
        population: str,
        statement: PrivacyStatement | None,
        refusal: RefusalReason | None,
        signature: str = "",
    ) -> None:
        """Records a plan that was shown: waiting for a decision, or refused by policy."""
        decision = Decision.WAITING if refusal is None else Decision.REFUSED
        with self._file.writing() as db:
            now = self._clock.stamp(db)
            entry = PlanEntry(
                digest, run_id, body, decision, refusal, statement, now, population=population, signature=signature
            )
            plans.receive(db, entry)

    def approve(self, digest: str) -> Decision:
        """Reserves the plan's whole cost under the population's lifetime limit, atomically, or refuses the plan.

        The limit is a Rényi filter over all steps ever reserved: plans are chosen after seeing earlier releases. What
        is executed is part of what is reserved, so it holds for that too (:mod:`common.privacy.renyi`).

        Raises:
            LedgerError: the plan does not wait for a decision, or the site is blocked.
        """
        with self._file.writing() as db:
            return plans.approve(db, digest, self._clock.stamp(db))

    def reject(self, digest: str) -> None:
        """A person at the site says no. Only a waiting plan can be rejected."""
        with self._file.writing() as db:
            plans.reject(db, digest, self._clock.stamp(db))

    def close_plan(self, digest: str, why: str) -> None:
        """Ends a plan for good. Its releases and secrets are deleted; its charges and reservations stay for ever.

        Raises:
            LedgerError: it was never shown, or was refused.
        """
        with self._file.writing() as db:
            if plans.close(db, digest, why, self._clock.stamp(db)):
                count(db)
        self._forget([digest])

    def expire(self, days: float) -> list[str]:
        """Closes plans whose decision, or receipt where nothing is decided, is older; returns their digests."""
        with self._file.reading() as db:
            idle = self._clock.unstored(db) < CLOCK_IS_STORED_EVERY
            if idle and not plans.undecided_or_decided_before(db, self._days_ago(self._clock.read(db), days)):
                return []
        with self._file.writing() as db:
            now = self._clock.stamp(db)
            expired = plans.undecided_or_decided_before(db, self._days_ago(self._clock.read(db), days))
            for digest in expired:
                plans.close(db, digest, "expired", now)
            if expired:
                count(db)
        self._forget(expired)
        return expired

    def same_data(self, plan_digest: str, fingerprint: str) -> bool:
        """Whether the plan's data are those it began with. The first call binds the plan to them.

        Raises:
            LedgerError: the plan was never shown.
        """
        with self._file.reading() as db:
            bound = plans.fingerprint(db, plan_digest)
            if bound is None:
                with self._file.writing():
                    bound = plans.bind(db, plan_digest, fingerprint)
            return bound == fingerprint

    # ---- the whole site ---------------------------------------------------------------------------------------

    @property
    def blocked(self) -> str | None:
        """Why the site has stopped itself, if it has: nothing is approved, trained or sent until a person looked."""
        with self._file.reading() as db:
            return read_meta(db, "blocked")

    def block(self, why: str) -> None:
        """Stops the site, durably. The first reason stays."""
        with self._file.writing() as db:
            if read_meta(db, "blocked") is None:
                write_meta(db, "blocked", why)
                self._clock.stamp(db)
                count(db)

    def unblock(self, why: str) -> list[str]:
        """A person has looked and answers for it that this ledger is the newest there is; returns the plans closed.

        Every open plan is closed: a copy that was older has forgotten which of their rounds were released, and would
        release them again. What they reserved stays reserved, which covers those releases.
        """
        with self._file.writing() as db:
            now = self._clock.stamp(db)
            write_meta(db, "blocked", None)
            closed = [entry.digest for entry in plans.listed(db) if entry.decision in plans.OPEN]
            for digest in closed:
                plans.close(db, digest, why, now)
            count(db)
        self._forget(closed)
        return closed

    def note(self, name: str) -> str | None:
        """What :meth:`remember` kept."""
        with self._file.reading() as db:
            return read_meta(db, f"note {name}")

    def remember(self, name: str, value: str) -> None:
        """Keeps a note about the site, in the place of an older one."""
        with self._file.writing() as db:
            write_meta(db, f"note {name}", value)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def release(self, plan: str, round: int, request_digest: str) -> StoredRelease | RefusalReason | None:
        """The stored release of this very request; ``None`` if the round is free.

        A reason if the round was funded for another request or lies before one already funded, the plan is closed, or
        the site blocked.

        Raises:
            LedgerError: the stored bytes are damaged.
        """
        with self._file.writing() as db:  # what is sent must be of the newest copy, and counted
            return rounds.release(db, plan, round, request_digest)

    def reserve(
        self, plan: str, round: int, request_digest: str, phase: str, steps: int, fresh: Callable[[], RoundSecret]
    ) -> Reservation | RefusalReason:
        """Funds one release of one request, with its secret on disk before this returns.

        A round that is already funded for the same request gives the same reservation again (after a crash); if its
        secret is gone it can never be executed again.

        Raises:
            LedgerError: the phase would execute more steps than its plan has reserved.
        """
        with self._file.writing() as db:
            now = self._clock.stamp(db)
            return rounds.reserve(db, self._secrets, plan, round, request_digest, phase, steps, fresh, now)

    def residual(self, plan: str, phase: str) -> bytes | None:
        """What rounding has taken away from the releases of a phase, as the newest of them left it."""
        with self._file.reading() as db:
            return rounds.residual(db, plan, phase)

    def record(self, reservation: Reservation, payload: bytes, head: str = "", residual: bytes | None = None) -> None:
        """Stores the release and the residual, both or none, and only then deletes the round's secret.

        Args:
            head: the signed head of the audit log that leaves with it.
            residual: what rounding has taken away so far; ``None``: the plan's older one is dropped too.

        Raises:
            LedgerError: it must not leave: meanwhile the plan was closed, the site blocked, or another release of this
                round stored.
        """
        with self._file.writing() as db:
            rounds.record(db, reservation, payload, head, residual, self._clock.stamp(db))
        self._secrets.delete(reservation.plan, reservation.round)

    def charges(self, plan: str) -> list[tuple[int, str, float, float, int]]:
        """(round, phase, q, σ, steps) of every funded round, in order."""
        with self._file.reading() as db:
            return rounds.charges(db, plan)

    def _delete_spent_secrets(self, db: Connection) -> None:
        """What a crash has left: secrets of rounds that were never funded, are released, or belong to an ended plan.

        Within a write transaction nobody else is between a secret and its charge.
        """
        for key in self._secrets.rounds():
            if not rounds.unfinished(db, *key):
                self._secrets.delete(*key)

    def _forget(self, closed: list[str]) -> None:
        """What closed plans leave on the disk beside the ledger's pages."""
        for plan, round in self._secrets.rounds():
            if plan in closed:
                self._secrets.delete(plan, round)
        if closed:
            self._file.forget_deleted()

    @staticmethod
    def _days_ago(now: datetime, days: float) -> str:
        return (now - timedelta(days=days)).isoformat(timespec="seconds")


@contextmanager
def existing_ledger(folder: Path, counter: Path | None) -> Iterator[Ledger | None]:
    """A site's ledger for as long as this lasts; ``None``: there never was one, and none is made.

    Raises:
        LedgerError: as :class:`Ledger`; also where only the counter is left of one.
    """
    if not (folder / "ledger.sqlite").exists() and (counter is None or not counter.exists()):
        yield None
        return
    with closing(Ledger(folder, counter=counter)) as ledger:
        yield ledger
