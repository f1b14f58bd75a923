"""A small file that tells the newest copy of the ledger from older ones.

Whoever puts an older copy of the ledger in its place (a backup, mostly, and in good faith) has the site forget what it
spent. So the ledger counts its transactions, and the number is written here too, in a folder that is not restored
together with the ledger's: a ledger with a smaller number is an older copy.

The number is written in place: one line, well inside one sector of a disk, which is written whole or not at all. A file
put in the place of the old one would need three calls to the disk instead of one, take five times as long, and change
its owner when a person decides about a plan as another user.
"""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import durable
from common.errors import LedgerError

LINE = re.compile(rb"consilium ledger (?P<ledger>[0-9a-f]{32}) sequence (?P<number>\d{20}) check [0-9a-f]{8}\n")
LONGEST = 512
"""Bytes that are read of a file: more than a line has."""
REMEDY = "run 'consilium site unblock', which tells what that means"


@dataclass(frozen=True)
class Count:
    """What a counter holds."""

    ledger: str
    """Identity of the ledger it belongs to."""
    number: int

    def line(self) -> bytes:
        """The file's whole content, of a length that never changes."""
        text = f"consilium ledger {self.ledger} sequence {self.number:020d} check "
        return f"{text}{zlib.crc32(text.encode()):08x}\n".encode()


class Counter:
    """The file; each new number is on disk before the methods return.

    Args:
        path: outside the ledger's folder.
        durable: ``False``: written, but not forced to the disk.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.durable = path, durable

    def read(self) -> Count | None:
        """The count; ``None`` if there is no file.

        Raises:
            LedgerError: the file cannot be read, or holds something else.
        """
        try:
            with self._locked(os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
                return self._parsed(os.pread(descriptor, LONGEST, 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._fault(error) from None

    def advance(self, count: Count) -> None:
        """Raises the number, and never lowers it: another process may have gone further meanwhile.

        Raises:
            LedgerError: the file is gone, belongs to another ledger or cannot be written. What was stored in the
                ledger stays there.
        """
        try:
            with self._locked(os.O_RDWR, fcntl.LOCK_EX) as descriptor:
                known = self._parsed(os.pread(descriptor, LONGEST, 0))
                self.check_owner(known, count.ledger)
                if known.number < count.number:
                    os.pwrite(descriptor, count.line(), 0)
                    if self.durable:
                        os.fdatasync(descriptor)
        except OSError as error:
            raise self._fault(error) from None

    def check_owner(self, known: Count, ledger: str) -> None:
        """Raises:
        LedgerError: the count is not that of this ledger.
        """
        if known.ledger != ledger:
            raise LedgerError(
                f"counter {self.path}: belongs to another ledger. If this site's ledger was deleted or replaced, put "
                "the newest copy back; if another site uses this counter too, give each a file of its own "
                f"(site.counter). If the newest copy is lost for good, {REMEDY}"
            )

    def put(self, count: Count) -> None:
        """A counter with this count, in place of whatever is there.

        Raises:
            LedgerError: it cannot be written.
        """
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                durable.put(self.path, count.line(), 0o600)
                return
            with self._locked(os.O_RDWR, fcntl.LOCK_EX) as descriptor:  # whose owner it keeps
                os.pwrite(descriptor, count.line(), 0)
                os.ftruncate(descriptor, len(count.line()))
                os.fsync(descriptor)
        except OSError as error:
            raise self._fault(error) from None

    @contextmanager
    def _locked(self, flags: int, lock: int) -> Iterator[int]:
        descriptor = os.open(self.path, flags)
        try:
            fcntl.flock(descriptor, lock)  # until it is closed
            yield descriptor
        finally:
            os.close(descriptor)

    def _parsed(self, content: bytes) -> Count:
        found = LINE.fullmatch(content)
        count = Count(found["ledger"].decode(), int(found["number"])) if found else None
        if count is None or count.line() != content:
            raise LedgerError(
                f"counter {self.path}: is damaged, so nobody can tell whether the ledger is its newest copy; {REMEDY}"
            )
        return count

    def _fault(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"counter {self.path}: cannot be read and written ({error.strerror}); the site's user needs a writable "
            "file there (site.counter), and nothing is released without it"
        )
