"""The audit log: every line is bound to the one before, whoever writes it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.audit_log import GENESIS, AuditLog
from common.errors import LedgerError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def three_lines(path: Path) -> AuditLog:
    log = AuditLog(path)
    for number in range(3):
        log.append("round released", run="run", round=number)
    return log


def test_each_line_holds_the_hash_of_the_line_before(path: Path) -> None:
    three_lines(path)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    expected = [GENESIS, *(hashlib.sha256(line).hexdigest() for line in lines[:-1])]
    assert [line["previous"] for line in written(path)] == expected
    assert [line["round"] for line in written(path)] == [0, 1, 2]


def test_a_restarted_log_goes_on_where_it_ended(path: Path) -> None:
    three_lines(path)
    AuditLog(path).append("plan received", plan="digest")
    AuditLog(path)
    assert [line["event"] for line in written(path)] == ["round released"] * 3 + ["plan received"]


def test_two_processes_can_write_in_turns(path: Path) -> None:
    agent, person = three_lines(path), AuditLog(path)
    person.append("plan decided", by="person")
    agent.append("round reserved")
    person.append("plan decided", by="person")
    agent.append("round released")
    AuditLog(path)
    assert len(written(path)) == 7


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text.replace('"round":1', '"round":9'), 3),
        (lambda text: "".join(text.splitlines(keepends=True)[1:]), 1),
        (lambda text: "".join(text.splitlines(keepends=True)[::-1]), 1),
        (lambda text: text.splitlines(keepends=True)[0] * 2, 2),
        (lambda text: text.replace("\n", "\nnot json\n", 1), 2),
        (lambda text: text.replace("\n", "\n[]\n", 1), 2),
        (lambda text: text.replace("\n", "\n\n", 1), 2),
        (lambda text: text.replace("\n", "\n{}\n", 1), 2),
    ],
    ids=["changed", "first gone", "reversed", "twice", "foreign line", "foreign json", "empty line", "no hash"],
)
def test_a_broken_chain_is_found_at_its_line(path: Path, damage: Callable[[str], str], line: int) -> None:
    three_lines(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(LedgerError, match=rf"audit\.jsonl: line {line} does not follow .*find out who changed it"):
        AuditLog(path)


def test_a_change_while_the_agent_runs_is_found_at_its_next_line(path: Path) -> None:
    log = three_lines(path)
    path.write_text(path.read_text() + '{"event":"forged","previous":"' + GENESIS + '"}\n')
    with pytest.raises(LedgerError, match="line 4 does not follow"):
        log.append("round released")
    assert len(written(path)) == 4


def test_lines_that_vanish_while_the_agent_runs_are_missed(path: Path) -> None:
    log = three_lines(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(LedgerError, match="line 3 is gone"):
        log.append("round released")


def test_a_last_line_that_a_power_cut_tore_is_removed(path: Path) -> None:
    three_lines(path)
    with path.open("ab") as stream:
        stream.write(b'{"event":"round rel')
    AuditLog(path).append("round released", round=3)
    assert [line["round"] for line in written(path)] == [0, 1, 2, 3]


def test_a_line_is_on_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)
    forced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(path.read_bytes()))
    log.append("plan received")
    assert forced == [path.read_bytes()]
    AuditLog(path, durable=False).append("plan received")
    assert len(forced) == 1


def test_only_the_site_can_read_it(path: Path) -> None:
    three_lines(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
