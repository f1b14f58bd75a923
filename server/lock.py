"""One coordinator per run folder: whoever works in it holds a lock that ends with its process, however that ends.

The lock also tells ``consilium server run``, at no cost, whether the coordinator it follows is still alive; asking the
SuperLink costs a second of a core and hears of a killed process a minute late.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunLock:
    """The lock of a run's folder.

    Args:
        folder: the run's folder. Both sides must see the same file system.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".lock"

    @contextmanager
    def hold(self, flower_run: int) -> Iterator[None]:
        """Waits until nobody else works in the folder (which is made if need be), and then is the one who does.

        Args:
            flower_run: shown to those who ask for :meth:`holder`.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Of one length, so that a reader never finds half of it.
            os.pwrite(descriptor, json.dumps({"flower_run": flower_run}).ljust(64).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The Flower run that works in the folder at this moment, if one does."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            while not (text := os.pread(descriptor, 64, 0)):
                time.sleep(0.01)
            return int(json.loads(text)["flower_run"])
        else:
            return None
        finally:
            os.close(descriptor)
