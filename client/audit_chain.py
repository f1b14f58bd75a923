"""The lines of an audit log: their form, and how each is bound to the one before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from common.errors import LedgerError

Detail = str | int | float | bool | None
GENESIS = "0" * 64
LONGEST_LINE = 1 << 16
LONGEST_TEXT = 200
"""Characters of a detail: enough for a digest or a name, too few for a patient's note."""
LARGEST_NUMBER = 1 << 53
OWN = ("time", "previous", "salt")
"""What the log itself adds to each line. The salt is random: heads leave the site, and a hash over times and words that
can be guessed would give them away."""
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


class BrokenChain(LedgerError):
    """A line is not what the log wrote there.

    Args:
        log: the log's path.
        line: number of the line, from 1.
        what: what is wrong with it.
    """

    def __init__(self, log: str | Path, line: int, what: str) -> None:
        self.line, self.what = line, what
        super().__init__(f"audit log {log}: line {line} {what}; keep the file and find out who changed it")


@dataclass(frozen=True)
class Entry:
    """A line of the log; the one before the first has number 0."""

    number: int = 0
    hash: str = GENESIS
    end: int = 0
    """Bytes of the file up to here."""
    time: str = ""
    event: str = ""
    details: Mapping[str, Detail] = field(default_factory=dict)


BEGINNING = Entry()


def check_details(event: str, details: Mapping[str, Detail]) -> None:
    """Whether an event may be written so; names only what is wrong, never the value: it may be just what must not be.

    Raises:
        TypeError: a detail is no plain value, or so long that it could hold a patient's data.
    """
    for name, value in {**details, "event": event}.items():
        if name in OWN:
            raise TypeError(f"audit log: '{name}' is written by the log itself")
        if not isinstance(value, str | int | float | None):
            raise TypeError(f"audit log: '{name}' is a {type(value).__name__}, not a text, number, truth value or None")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise TypeError(f"audit log: '{name}' has more than {LONGEST_TEXT} characters; write its digest")
        if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
            raise TypeError(f"audit log: '{name}' is not finite, or has more than 53 bits")


def read_entries(stream: IO[bytes], after: Entry = BEGINNING) -> Iterator[Entry]:
    """The entries after one, each checked against the one before; stops before a last line without its end.

    Raises:
        BrokenChain: at the first line that is not the next one.
    """
    stream.seek(after.end)
    while line := stream.readline(LONGEST_LINE):
        if not line.endswith(b"\n"):
            if len(line) == LONGEST_LINE:
                raise BrokenChain(stream.name, after.number + 1, "is longer than any line of an audit log")
            return
        body = _parsed(line)
        if body is None:
            raise BrokenChain(stream.name, after.number + 1, "is not a line of an audit log")
        previous = body.pop("previous")
        if previous != after.hash:
            raise BrokenChain(stream.name, after.number + 1, _misplaced(stream, after.number, previous))
        after = entry_of(line, after, body)
        yield after


def _parsed(line: bytes) -> dict[str, Detail] | None:
    try:
        body = json.loads(line)
        if all(isinstance(body[name], str) for name in ("event", "previous")) and TIME.fullmatch(body["time"]):
            return dict(body)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def entry_of(line: bytes, after: Entry, body: Mapping[str, Detail]) -> Entry:
    """The entry that a whole line makes, behind another one; ``body`` is what the line holds."""
    details = {name: value for name, value in body.items() if name not in (*OWN, "event")}
    digest = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
    return Entry(after.number + 1, digest, after.end + len(line), str(body["time"]), str(body["event"]), details)


def _misplaced(stream: IO[bytes], before: int, previous: Detail) -> str:
    """What is wrong with a line that names ``previous`` as the hash of the line before it."""
    stream.seek(0)
    lines = iter(lambda: stream.readline(LONGEST_LINE), b"")
    hashes = (hashlib.sha256(line.removesuffix(b"\n")).hexdigest() for line in lines)
    place = 0 if previous == GENESIS else next((n for n, digest in enumerate(hashes, 1) if digest == previous), None)
    if place is not None:
        return (
            f"follows {_name(place)}, not {_name(before)}: lines were dropped, added, repeated or put in another order"
        )
    if before == 0:
        return "does not begin a log: it was changed, or lines before it were dropped"
    return f"does not follow line {before}: one of the two was changed, or lines between them were dropped"


def _name(place: int) -> str:
    return f"line {place}" if place else "the beginning"
