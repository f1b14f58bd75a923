"""A signed head leaves with each release. Who holds two of them, and all that left in between, learns by how many lines
the site's audit log has grown, and nothing of what those lines say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import client.audit_log
from client.audit_head import Head
from client.audit_log import AuditLog
from common.signing import SigningKey

BEGAN = datetime(2026, 5, 3, 12, 0, 7, tzinfo=UTC)
ENDED = BEGAN + timedelta(seconds=23)
WINDOW = [BEGAN + timedelta(seconds=second) for second in range(-20, 40)]
"""Before ``policy.reply_after`` has passed, training may have begun and ended at any of these moments."""

KNOWN: dict[str, Any] = {"run": "run", "round": 2, "request": "ab" * 32}
RELEASED: dict[str, Any] = {**KNOWN, "release": "cd" * 32, "size": 1000}
"""What the coordinator knows of the round's two lines: it sent the one and received the other."""


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of the four lines that :func:`two_heads` writes."""
    told = iter([BEGAN - timedelta(minutes=5), BEGAN - timedelta(minutes=4), BEGAN, ENDED])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return next(told)

    monkeypatch.setattr(client.audit_log, "datetime", Clock)


def two_heads(path: Path) -> tuple[Head, Head]:
    """Those that left with rounds 1 and 2."""
    log = AuditLog(path, site="north", key=SigningKey.fresh())
    heads = []
    for round in (1, 2):
        log.append("round reserved", **{**KNOWN, "round": round})
        log.append("round released", **{**RELEASED, "round": round})
        heads.append(Head.parse(log.sign_head()))
    return heads[0], heads[1]


def when_training_ran(first: Head, second: Head) -> Iterator[tuple[datetime, datetime]]:
    """All beginnings and ends that explain both heads, tried one by one: 3600 hashes."""
    for began, ended in product(WINDOW, WINDOW):
        middle = line("round reserved", KNOWN, began, first.hash)
        if line("round released", RELEASED, ended, middle) == second.hash:
            yield began, ended


def line(event: str, details: dict[str, Any], time: datetime, previous: str) -> str:
    """Hash of a line as the log writes it, as far as a stranger can know it."""
    body = {**details, "event": event, "time": time.isoformat(timespec="seconds"), "previous": previous, "salt": ""}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.usefixtures("times")
def test_two_heads_do_not_tell_when_training_began_and_ended(tmp_path: Path) -> None:
    assert list(when_training_ran(*two_heads(tmp_path / "audit.jsonl"))) == []


@pytest.mark.usefixtures("times")
def test_without_the_salt_they_would_tell_it_to_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.audit_log, "fresh_salt", lambda: "")
    assert list(when_training_ran(*two_heads(tmp_path / "audit.jsonl"))) == [(BEGAN, ENDED)]


def test_no_two_lines_have_the_same_salt_and_each_has_128_bits(tmp_path: Path) -> None:
    two_heads(tmp_path / "audit.jsonl")
    salts = {json.loads(text)["salt"] for text in (tmp_path / "audit.jsonl").read_text().splitlines()}
    assert len(salts) == 4 and all(len(bytes.fromhex(salt)) == 16 for salt in salts)


def test_a_log_from_before_lines_had_salts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = tmp_path / "audit.jsonl", SigningKey.fresh()
    previous = "0" * 64
    old = {"event": "agent started", "time": "2026-01-01T00:00:00+00:00", "previous": previous}
    path.write_text(json.dumps(old, sort_keys=True, separators=(",", ":")) + "\n")
    log = AuditLog(path, site="north", key=key)
    log.append("agent started")
    head = Head.parse(log.sign_head())
    assert head.lines == 2 and client.audit_log.verify(path, head).intact
