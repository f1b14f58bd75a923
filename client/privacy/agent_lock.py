"""One agent per ledger: the lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import LedgerError


@contextmanager
def agent_lock(path: Path) -> Iterator[None]:
    """Holds the lock.

    Args:
        path: a file that is made if need be, and stays. It tells the holder's process id.

    Raises:
        LedgerError: another process holds it, or it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LedgerError(
            f"agent lock {path}: cannot be made ({error.strerror}); give the site's user write access"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LedgerError(
                f"ledger {path.parent}: an agent or a withdrawal uses it (process {holder}); stop that one first"
            ) from None
        os.pwrite(descriptor, str(os.getpid()).ljust(32).encode(), 0)
        yield
    finally:
        os.close(descriptor)
