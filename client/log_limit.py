"""No caller can fill the agent's log: of each kind of line a few are written, and later how many there were."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST = 10
"""Lines of one kind that are written in each period."""
PERIOD = 60.0
"""Seconds; the first line of a kind after them tells how many were left out."""


@dataclass
class _Kind:
    began: float
    written: int = 0
    left_out: int = 0


class FewOfEachKind(logging.Filter):
    """For a log handler. Lines are of one kind if the same statement of the program writes them at the same level.

    What a caller chose stands in a line's arguments, and not in its template; so callers cannot make kinds.

    Args:
        now: seconds that nobody can set.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now, self._kinds, self._lock = now, dict[tuple[str, int], _Kind](), threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; the first one after a gap says how many were not."""
        with self._lock:
            now = self._now()
            kind = self._kinds.setdefault((record.pathname, record.lineno), _Kind(now))
            left_out = 0
            if now - kind.began >= PERIOD:
                left_out, kind.began, kind.written, kind.left_out = kind.left_out, now, 0, 0
            if kind.written >= BURST:
                kind.left_out += 1
                return False
            kind.written += 1
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were left out)", None
        return True


def limit_log() -> None:
    """From now on, for everything that this process logs."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(FewOfEachKind())
