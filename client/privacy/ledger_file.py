"""The file behind the ledger: whole transactions on the newest copy, and one clear message for whatever is wrong.

A transaction that spends or decides is first committed (WAL, synchronous=FULL), then counted outside the file, and only
then does anything leave the site. So a crash in between leaves the file ahead of its counter, which the next
transaction mends; a file behind its counter is an older copy, and is refused.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from client.privacy.counter import REMEDY, Count, Counter
from client.privacy.schema import VERSION, migrate, read_meta, rows_of, sequence_of, version_of, write_meta
from common.durable import sync_folder
from common.errors import LedgerError

PATIENCE = 30.0
"""Seconds to wait for another process's transaction."""

FAULTS = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space. What was to be stored now is not; all else is as it was",
    sqlite3.SQLITE_READONLY: "is read-only; give the site's user write access to the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; give the site's user read and write access to the file and its folder",
    sqlite3.SQLITE_IOERR: "the disk cannot be read or written; see that it is healthy and not full",
    sqlite3.SQLITE_BUSY: f"another process has held it for {PATIENCE:.0f} seconds; try again when that one is done",
    sqlite3.SQLITE_PROTOCOL: "other processes kept it busy; try again when they are done",
    sqlite3.SQLITE_CONSTRAINT: "cannot hold what contradicts it",
}
"""SQLite's primary error codes → what is wrong, and the remedy."""
DAMAGED = (
    "cannot be used; do not delete it, and put no older copy in its place, which would forget what was spent. "
    "Put the newest copy back, if there is one"
)


class LedgerFile:
    """One SQLite file, for several threads of one process, beside other processes.

    Args:
        durable: each transaction is on disk before it ends.
        counter: where transactions are counted; ``None``: older copies are not told.
        accept_copy: takes the file for its newest copy, whatever the counter says.

    Raises:
        LedgerError: the file is damaged, an older copy, or of a newer version, or cannot be used.
    """

    def __init__(self, path: Path, durable: bool, counter: Counter | None, accept_copy: bool = False) -> None:
        self.path, self.durable, self.counter = path, durable, counter
        self._lock = threading.RLock()
        self._open: sqlite3.Connection | None = None
        existed = self._create()
        try:
            with self.reading() as db:
                if existed:
                    self._check_pages(db)
                self._prepare(db, accept_copy)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; it opens again when it is used."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The open file, for one thread at a time."""
        with self._lock:
            try:
                if self._open is None:
                    self._open = self._connect()
                yield self._open
            except sqlite3.DatabaseError as error:
                raise self._fault(error) from None

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A write transaction on the newest copy. It excludes every other writer, also of other processes.

        If the transaction counts (:func:`client.privacy.schema.count`), it has been counted outside when this ends.
        """
        with self.reading() as db:
            with self._transaction(db):
                counted = self._counted(db)
                yield db
                count = _count_of(db)
            if self.counter is not None and counted < count.number:
                self.counter.advance(count)

    def forget_deleted(self) -> None:
        """What was deleted is overwritten with zeros in the file (secure_delete); this clears the journal of it too."""
        with self.reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk has ended it already
                db.execute("ROLLBACK")
            raise

    def _counted(self, db: sqlite3.Connection) -> int:
        """The number outside. While a transaction is open nobody else's is, so the file cannot rightly be behind."""
        if self.counter is None:
            return 0
        count, known = _count_of(db), self.counter.read()
        if known is None or (known.number == 0 and known.ledger != count.ledger):
            if count.number:
                raise LedgerError(
                    f"counter {self.counter.path}: is missing, so nobody can tell whether ledger {self.path} is its "
                    f"newest copy; put the counter back. If that is lost for good, {REMEDY}"
                )
            self.counter.put(count)  # nothing was ever spent, here or there
            return 0
        self.counter.check_owner(known, count.ledger)
        if known.number > count.number:
            raise LedgerError(
                f"ledger {self.path}: is an older copy, and knows nothing of what was spent since (it holds "
                f"{count.number} decisions and charges; {self.counter.path} has counted {known.number}); put the "
                f"newest copy back. If that is lost for good, {REMEDY}"
            )
        return known.number

    def _prepare(self, db: sqlite3.Connection, accept_copy: bool) -> None:
        """Brings an older file to today's tables, unless it is an older copy, which stays as it is."""
        if (version := version_of(db)) > VERSION:
            raise LedgerError(
                f"ledger {self.path}: schema_version {version} is newer than this installation knows ({VERSION}); "
                "update it"
            )
        with self._transaction(db):
            migrate(db)
            if (rows := rows_of(db)) != read_meta(db, "rows"):
                raise LedgerError(
                    f"ledger {self.path}: {DAMAGED} (it holds {rows}, and should hold {read_meta(db, 'rows')}: part of "
                    "it is an older copy)"
                )
            if accept_copy:
                self._outnumber(db)
            else:
                self._counted(db)
        if accept_copy and self.counter is not None:
            self.counter.put(_count_of(db))

    def _outnumber(self, db: sqlite3.Connection) -> None:
        """Gives the file a number that no copy ever had: whatever other copy turns up later is an older one.

        The site is blocked until its open plans are closed too (:meth:`client.privacy.ledger.Ledger.unblock`).
        """
        known = None
        with suppress(LedgerError):  # damaged
            known = self.counter.read() if self.counter else None
        write_meta(db, "sequence", str(max(sequence_of(db), known.number if known else 0) + 1))
        write_meta(db, "blocked", "the ledger was taken for its newest copy, and its open plans are not closed yet")

    def _create(self) -> bool:
        """Whether there was a file; a new one is the site's alone from the first moment on."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.path.exists():
                # Never opened but by SQLite: closing any other descriptor would drop the locks of this process.
                if self.path.stat().st_mode & 0o077:
                    self.path.chmod(0o600)
                return self.path.stat().st_size > 0
            with suppress(FileExistsError):  # another process was faster
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            if self.durable:
                sync_folder(self.path.parent)
            return False
        except OSError as error:
            raise LedgerError(f"ledger {self.path}: {FAULTS[sqlite3.SQLITE_CANTOPEN]} ({error.strerror})") from None

    def _connect(self) -> sqlite3.Connection:
        """Journal and index of SQLite get the file's own mode."""
        db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            # Of a simulation's thousands of ledgers each is written a few times: a plain journal is half the work.
            db.execute(f"PRAGMA journal_mode={'WAL' if self.durable else 'TRUNCATE'}")
            db.execute(f"PRAGMA synchronous={'FULL' if self.durable else 'OFF'}")
            db.execute("PRAGMA foreign_keys=ON")
            db.execute("PRAGMA secure_delete=ON")
        except BaseException:
            db.close()
            raise
        return db

    def _check_pages(self, db: sqlite3.Connection) -> None:
        """All of them, and that each index holds what its table does: which quick_check would not look at."""
        found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
        if found != "ok":
            raise LedgerError(f"ledger {self.path}: {DAMAGED} ({' '.join(found.split())})")

    def _fault(self, error: sqlite3.DatabaseError) -> LedgerError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # what is above that is detail
        return LedgerError(f"ledger {self.path}: {FAULTS.get(code, DAMAGED)} ({error})")


def _count_of(db: sqlite3.Connection) -> Count:
    return Count(read_meta(db, "ledger") or "", sequence_of(db))
