"""What happened at the site, one JSON object a line, each line bound to the one before by its hash.

Holds run ids, rounds, digests, decisions and ε; never data, losses or counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from common.errors import LedgerError

GENESIS = "0" * 64


class AuditLog:
    """Append-only and hash-chained; every line is on disk before ``append`` returns.

    Several processes may write (the agent, and a person who approves a plan meanwhile): each takes the file's lock and
    goes on from the line that really is the last. A last line without its end, left by a power cut, is removed.

    Args:
        durable: ``False`` in simulations: written, but not forced to the disk.

    Raises:
        LedgerError: an existing log's chain is broken.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.durable = path, durable
        self._lock = threading.Lock()
        self._head, self._number, self._size = GENESIS, 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with self._locked() as stream:
                self._follow(stream)

    def append(self, event: str, **details: Any) -> None:
        """Writes one line, durably.

        Raises:
            LedgerError: somebody changed the log meanwhile.
        """
        with self._lock, self._locked() as stream:
            self._follow(stream)
            body = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **details}
            body["previous"] = self._head
            line = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
            stream.write(line + b"\n")
            stream.flush()
            if self.durable:
                os.fsync(stream.fileno())
            self._accept(line)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with open(self.path, "a+b", opener=_private) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # until the file is closed
            yield stream

    def _follow(self, stream: IO[bytes]) -> None:
        """Checks the lines that were added since this process looked last."""
        stream.seek(0, os.SEEK_END)
        if stream.tell() < self._size:
            raise self._broken(self._number, "is gone")
        stream.seek(self._size)
        *lines, unfinished = stream.read().split(b"\n")
        for line in lines:
            try:
                previous = json.loads(line)["previous"]
            except (ValueError, KeyError, TypeError):
                previous = None
            if previous != self._head:
                raise self._broken(self._number + 1, "does not follow the one before")
            self._accept(line)
        if unfinished:
            stream.truncate(self._size)

    def _accept(self, line: bytes) -> None:
        self._head = hashlib.sha256(line).hexdigest()
        self._number += 1
        self._size += len(line) + 1

    def _broken(self, number: int, what: str) -> LedgerError:
        return LedgerError(f"audit log {self.path}: line {number} {what}; keep the file and find out who changed it")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
