"""What happened at the site, one JSON object a line, each line bound to the one before by its hash.

Holds run ids, rounds, digests, decisions and ε; never data, losses or counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import LedgerError

GENESIS = "0" * 64


class AuditLog:
    """Append-only and hash-chained; every line is on disk before ``append`` returns.

    Args:
        durable: ``False`` in simulations: written, but not forced to the disk.

    Raises:
        LedgerError: an existing log's chain is broken.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.durable = path, durable
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._head = self._verify() if path.exists() else GENESIS

    def append(self, event: str, **details: Any) -> None:
        """Writes one line, durably."""
        with self._lock:
            body = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **details}
            body["previous"] = self._head
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            self._head = hashlib.sha256(text.encode()).hexdigest()
            with open(self.path, "a", encoding="utf-8", opener=_private) as stream:
                stream.write(f"{text}\n")
                stream.flush()
                if self.durable:
                    os.fsync(stream.fileno())

    def _verify(self) -> str:
        head = GENESIS
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                previous = json.loads(line)["previous"]
            except (ValueError, KeyError):
                previous = None
            if previous != head:
                raise LedgerError(
                    f"audit log {self.path}: line {number} does not follow the one before; keep the file "
                    "and find out who changed it"
                )
            head = hashlib.sha256(line.encode()).hexdigest()
        return head


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
