"""The signed head of an audit log: with it a site vouches for how long its log is and how it ends.

A chain of hashes cannot tell that its end was cut off, or that all of it was written anew. A head can, and so one is
sent along with each release: a copy of the log that lacks lines of any head ever shown is an older one.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.durable import sync_folder
from common.errors import LedgerError
from common.signing import AUDIT_HEAD, SigningKey, is_public_key, verify

LARGEST = 4096
"""Bytes of a head's text; a real one has about 350."""
MOST_LINES = 1 << 53
"""Whole numbers up to here mean the same to every reader of JSON."""


@dataclass(frozen=True)
class Head:
    """A site's statement about its audit log."""

    site: str
    lines: int
    hash: str
    """SHA-256 of the last line, hexadecimal; of an empty log zeros."""
    key: str
    """The site's public key (:mod:`common.signing`)."""
    signature: str

    @classmethod
    def sign(cls, site: str, lines: int, hash: str, key: SigningKey) -> Head:
        """The statement, signed."""
        signature = key.sign(AUDIT_HEAD, _statement(site, lines, hash))
        return cls(site, lines, hash, key.public, signature)

    def text(self) -> str:
        """One line of canonical JSON: what travels and is stored."""
        return _canonical(vars(self))

    @classmethod
    def parse(cls, text: str) -> Head:
        """The head from its text; whoever wrote it, so ask :meth:`authentic` before you believe it.

        Raises:
            LedgerError: not the text of a head.
        """
        try:
            fields = json.loads(text) if len(text) <= LARGEST else None
            head = cls(**fields) if isinstance(fields, dict) else None
            if head is not None and head._plausible() and head.text() == text:
                return head
        except (ValueError, TypeError, RecursionError):
            pass
        raise LedgerError(
            "signed head: is not what 'consilium site audit-log head' prints; copy its one line unchanged"
        )

    def authentic(self) -> bool:
        """Whether the owner of ``key`` signed exactly this."""
        return verify(self.key, AUDIT_HEAD, _statement(self.site, self.lines, self.hash), self.signature)

    def _plausible(self) -> bool:
        return (
            all(isinstance(value, str) for value in (self.site, self.hash, self.key, self.signature))
            and type(self.lines) is int
            and 0 <= self.lines <= MOST_LINES
            and re.fullmatch(r"[A-Za-z0-9._-]{0,64}", self.site) is not None
            and re.fullmatch(r"[0-9a-f]{64}", self.hash) is not None
            and re.fullmatch(r"[A-Za-z0-9_-]{86}", self.signature) is not None
            and is_public_key(self.key)
        )


def head_file(log: Path) -> Path:
    """Where the newest head of a log is kept."""
    return log.with_name(log.name + ".head")


def stored_head(log: Path) -> Head | None:
    """The head beside a log; ``None`` if there is none.

    Raises:
        LedgerError: it cannot be read, or is no head.
    """
    return read_head(head_file(log)) if head_file(log).exists() else None


def read_head(file: Path) -> Head:
    """The head in a file.

    Raises:
        LedgerError: it cannot be read, or is no head.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST + 2).decode("ascii").strip()
        return Head.parse(text)
    except OSError as error:
        raise LedgerError(f"{file}: cannot be read ({error.strerror}); give the file of a signed head") from None
    except (UnicodeDecodeError, LedgerError):
        raise LedgerError(
            f"{file}: is not a signed head as 'consilium site audit-log head' prints it; check the log against one "
            "that was kept elsewhere"
        ) from None


def store_head(log: Path, head: Head) -> None:
    """Puts a head in the place of the one beside a log: after a crash either is there, whole."""
    file = head_file(log)
    part = file.with_name(file.name + ".part")
    with open(part, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        stream.write(head.text().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
    sync_folder(file.parent)


def _statement(site: str, lines: int, hash: str) -> bytes:
    return _canonical({"site": site, "lines": lines, "hash": hash}).encode()


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))
