"""What happened at the site, one JSON object a line, each line bound to the one before by its hash.

Holds run ids, rounds, digests, decisions and ε; never data, losses or counts. The chain tells a changed, dropped or
moved line; the signed head (:mod:`client.audit_head`) tells an end that was cut off and a chain that was written anew.
Heads leave with releases, so each line holds a salt: without it whoever has two heads could try out the few words and
times that may stand between them, and learn when a training began and ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import IO

from client.audit_chain import (
    BEGINNING,
    LONGEST_LINE,
    BrokenChain,
    Detail,
    Entry,
    check_details,
    entry_of,
    read_entries,
)
from client.audit_head import Head, head_file, store_head, stored_head
from common.durable import sync_folder
from common.errors import LedgerError
from common.signing import SigningKey

SPACING = 1024
"""One in so many entries stays in memory, so that any line is found without reading the log from its beginning."""


class AuditLog:
    """Append-only and hash-chained; every line is on disk before ``append`` returns.

    Several processes may write (the agent, and a person who approves a plan meanwhile): each takes the file's lock and
    goes on from the line that really is the last. A last line without its end, left by a power cut, is removed.

    Args:
        durable: ``False`` in simulations: written, but not forced to the disk; signed heads are not stored.
        site: the name under which heads are signed.
        key: signs heads.

    Raises:
        LedgerError: an existing log's chain is broken, or the head beside it, signed with this key, tells that the
            log was longer or another one.
    """

    def __init__(self, path: Path, durable: bool = True, site: str = "", key: SigningKey | None = None) -> None:
        self.path, self.durable, self.site, self.key = path, durable, site, key
        self._lock = threading.Lock()
        self._last = BEGINNING
        self._marks = [BEGINNING]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() or head_file(path).exists():
            with self._locked() as stream:
                self._check_head(stream)

    def append(self, event: str, **details: Detail) -> None:
        """Writes one line, durably.

        Raises:
            TypeError: a detail is no plain value, or so long that it could hold a patient's data.
            LedgerError: somebody changed the log meanwhile, or it cannot be written.
        """
        check_details(event, details)
        with self._locked() as stream:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            own = {"time": max(now, self._last.time), "previous": self._last.hash, "salt": fresh_salt()}
            body = {**details, "event": event, **own}
            line = json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
            if len(line) > LONGEST_LINE:
                raise TypeError(f"audit log: the details of '{event}' are longer than {LONGEST_LINE} bytes together")
            stream.write(line)
            stream.flush()
            if self.durable:
                os.fsync(stream.fileno())
                if self._last is BEGINNING:
                    sync_folder(self.path.parent)
            self._accept(entry_of(line, self._last, body))

    def sign_head(self) -> str:
        """The text of a signed head of the log as it stands; stored beside it, if the log is durable.

        Raises:
            LedgerError: there is no key, somebody changed the log meanwhile, or the head cannot be written.
        """
        if self.key is None:
            raise LedgerError("site.key: is missing, so the head of the audit log cannot be signed; make one first")
        with self._locked() as stream:
            head = Head.sign(self.site, self._last.number, self._last.hash, self.key)
            if self.durable:
                os.fsync(stream.fileno())  # the last line may come from a process that was killed before it did this
                store_head(self.path, head)
        return head.text()

    def contradicts(self, head: Head) -> bool:
        """Whether this site signed ``head`` and the log is not one that goes on from there, but an older or other copy.

        A head that this site did not sign never does: a stranger must not be able to block a site.

        Raises:
            LedgerError: somebody changed the log meanwhile, or it cannot be read.
        """
        if head.site != self.site or not self._signed(head):
            return False
        with self._locked() as stream:
            return not self._contains(stream, head)

    def _check_head(self, stream: IO[bytes]) -> None:
        head = stored_head(self.path) if self.key is not None else None
        if head is not None and self._signed(head) and not self._contains(stream, head):
            raise LedgerError(
                f"audit log {self.path}: has {self._last.number} lines, and the site signed {head.lines} lines that "
                f"end otherwise ({head_file(self.path)}): the log is an older copy, or lines were cut off or changed. "
                "What was released since may be missing in the ledger too: bring back the newest state folder, and "
                "keep this one; 'consilium site audit-log verify' tells more"
            )

    def _signed(self, head: Head) -> bool:
        return self.key is not None and head.key == self.key.public and head.authentic()

    def _contains(self, stream: IO[bytes], head: Head) -> bool:
        if head.lines > self._last.number:
            return False
        mark = self._marks[head.lines // SPACING]
        try:
            near = chain([mark], read_entries(stream, mark))
            return any(entry.hash == head.hash for entry in near if entry.number == head.lines)
        except BrokenChain:  # changed after it was read first
            return False

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        try:
            with self._lock, open(self.path, "a+b", opener=_private) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)  # until the file is closed
                self._follow(stream)
                yield stream
        except OSError as error:
            raise LedgerError(
                f"audit log {self.path}: cannot be written ({error.strerror}); nothing is released before it can"
            ) from None

    def _follow(self, stream: IO[bytes]) -> None:
        """Checks the lines that were added since this process looked last."""
        size = stream.seek(0, os.SEEK_END)
        if size < self._last.end:
            raise BrokenChain(self.path, self._last.number, "is gone")
        for entry in read_entries(stream, self._last):
            self._accept(entry)
        if size > self._last.end:
            stream.truncate(self._last.end)

    def _accept(self, entry: Entry) -> None:
        self._last = entry
        if entry.number % SPACING == 0:
            self._marks.append(entry)


@dataclass(frozen=True)
class Verdict:
    """What reading a whole log showed."""

    lines: int
    """How many were read: all of an intact log, else those before the fault."""
    heads: tuple[Head, ...]
    """What the log was checked against: the head that was given, and the one beside the log."""
    line: int | None = None
    """Where the first fault is; ``None``: nowhere, or not in a line."""
    fault: str = ""
    """What is wrong there; empty: nothing."""
    unfinished: bool = False
    """The last line has no end, as after a power cut; the site removes it when it writes next."""

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.fault


def verify(path: Path, head: Head | None = None, key: str | None = None) -> Verdict:
    """Reads a whole log, and says what is wrong first.

    The head beside it is read before the log, which may grow meanwhile.

    Args:
        head: one that was kept elsewhere; checked as well as that in ``<path>.head``.
        key: the public key that must have signed them; without it, that of ``head``.

    Raises:
        LedgerError: the log cannot be read.
    """
    try:
        stored = stored_head(path)
    except LedgerError as error:
        return Verdict(0, (), fault=str(error))
    heads = tuple(entry for entry in (head, stored) if entry is not None)
    if fault := _untrusted(heads, key or (head.key if head else None)):
        return Verdict(0, heads, fault=fault)
    try:
        with path.open("rb") as stream:
            return _compared(stream, heads)
    except FileNotFoundError:
        return Verdict(0, heads, fault="the log is gone" if heads else "there is no log")
    except OSError as error:
        raise LedgerError(f"audit log {path}: cannot be read ({error.strerror}); run this as the site's user") from None


def _untrusted(heads: tuple[Head, ...], key: str | None) -> str:
    for head in heads:
        if not head.authentic():
            return f"the signature of a head of {head.lines} lines is false"
        if key not in (None, head.key):
            return f"a head of {head.lines} lines is signed by {head.key}, not by {key}"
    return ""


def _compared(stream: IO[bytes], heads: tuple[Head, ...]) -> Verdict:
    last, sound = BEGINNING, 0
    try:
        for last in read_entries(stream):
            here = [head for head in heads if head.lines == last.number]
            if any(head.hash != last.hash for head in here):
                what = (
                    f"is not what the site signed: among lines {sound + 1} to {last.number} some were changed, added "
                )
                return Verdict(last.number - 1, heads, last.number, what + "or dropped, though the chain holds so far")
            sound = last.number if here else sound
    except BrokenChain as error:
        return Verdict(last.number, heads, error.line, error.what)
    longest = max((head.lines for head in heads), default=0)
    if longest > last.number:
        what = f"is gone: the site signed {longest} lines, and the log ends after {last.number}"
        return Verdict(last.number, heads, last.number + 1, what)
    return Verdict(last.number, heads, unfinished=stream.tell() > last.end)


def fresh_salt() -> str:
    """128 random bits for a line, so that its hash tells nothing of what the line says."""
    return secrets.token_hex(16)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
