"""The ledger's clock: it never goes back, whatever the system's clock is set to."""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime, timedelta

from client.privacy.schema import read_meta, write_meta


class LedgerClock:
    """The latest of: the system's clock, the newest time in the ledger, and what has passed since this process looked.

    So a plan expires in time though the system's clock was set back: what was stored holds across restarts, and while
    a process runs, its monotonic clock goes on. A system clock set forward, on the other hand, is believed: plans
    expire too early, which costs no privacy, and :meth:`ahead` tells for as long as it lasts.
    """

    def __init__(self) -> None:
        self._reading: datetime | None = None
        self._looked = 0.0

    def read(self, db: sqlite3.Connection) -> datetime:
        """The time of an open ledger."""
        times = [system_time()]
        if stored := read_meta(db, "clock"):
            times.append(datetime.fromisoformat(stored))
        looked = monotonic_time()
        if self._reading is not None:
            times.append(self._reading + timedelta(seconds=looked - self._looked))
        self._reading, self._looked = max(times), looked
        return self._reading

    def stamp(self, db: sqlite3.Connection) -> str:
        """The time, stored as the newest, inside the caller's transaction."""
        now = self.read(db).isoformat(timespec="seconds")
        write_meta(db, "clock", now)
        return now

    def unstored(self, db: sqlite3.Connection) -> timedelta:
        """How far the clock has gone on since a time was stored."""
        stored = read_meta(db, "clock")
        return self.read(db) - datetime.fromisoformat(stored) if stored else timedelta(0)

    def ahead(self, db: sqlite3.Connection) -> timedelta:
        """How far the ledger's clock is ahead of the system's: that one was set back, or had been set forward."""
        return self.read(db) - system_time()


def system_time() -> datetime:
    """What the system's clock shows."""
    return datetime.now(UTC)


def monotonic_time() -> float:
    """Seconds that nobody can set, from some moment on."""
    return time.monotonic()
