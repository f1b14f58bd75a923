"""The audit log: every line is bound to the one before, whoever writes it, and a signed head tells where it ended."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client.audit_log
from client.audit_chain import GENESIS
from client.audit_head import Head, head_file, read_head
from client.audit_log import SPACING, AuditLog, Verdict, verify
from common.errors import LedgerError
from common.signing import AUDIT_HEAD, PLAN, SigningKey

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "site.key"


@pytest.fixture(scope="module")
def key(key_file: Path) -> SigningKey:
    return SigningKey.create(key_file)


@pytest.fixture(scope="module")
def other_key(key_file: Path) -> SigningKey:
    return SigningKey.create(key_file.with_name("other.key"))


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(path: Path, lines: int, key: SigningKey | None = None) -> AuditLog:
    log = AuditLog(path, site="north", key=key)
    for number in range(lines):
        log.append("round released", run="run", round=number)
    return log


def head_of(path: Path) -> Head:
    return read_head(head_file(path))


def forced_by(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is forced to the disk, in order."""
    order: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        action()
    return [Path(name).name for name in order]


def chained_anew(lines: list[dict[str, Any]]) -> str:
    """The same events as a chain without a fault, as an attacker who knows the format writes it."""
    previous, text = GENESIS, ""
    for line in lines:
        written = json.dumps({**line, "previous": previous}, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(written.encode()).hexdigest()
        text += written + "\n"
    return text


@contextmanager
def in_child(source: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A process and what it prints; killed at the end, if it still runs."""
    child = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        try:
            yield child, child.stdout
        finally:
            child.kill()


# ------------------------------------------------------------------------------------------------------------ the chain


def test_each_line_holds_the_hash_of_the_line_before(path: Path) -> None:
    log_of(path, 3)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    expected = [GENESIS, *(hashlib.sha256(line).hexdigest() for line in lines[:-1])]
    assert [line["previous"] for line in written(path)] == expected
    assert [line["round"] for line in written(path)] == [0, 1, 2]


def test_a_restarted_log_goes_on_where_it_ended(path: Path) -> None:
    log_of(path, 3)
    AuditLog(path).append("plan received", plan="digest")
    AuditLog(path)
    assert [line["event"] for line in written(path)] == ["round released"] * 3 + ["plan received"]


def test_two_writers_go_on_from_each_others_lines(path: Path) -> None:
    agent, person = log_of(path, 3), AuditLog(path)
    person.append("plan decided", by="person")
    agent.append("round reserved")
    person.append("plan decided", by="person")
    agent.append("round released")
    AuditLog(path)
    assert len(written(path)) == 7


def test_processes_that_write_at_the_same_time_leave_one_whole_chain(path: Path, key: SigningKey) -> None:
    source = """if True:
        import sys
        from pathlib import Path
        from client.audit_log import AuditLog
        log = AuditLog(Path(sys.argv[1]), durable=False)
        print("ready", flush=True)
        for number in range(300):
            log.append("round reserved", writer=sys.argv[2], number=number)
    """
    log = AuditLog(path, site="north", key=key)
    with in_child(source, path, "agent") as (agent, first), in_child(source, path, "person") as (person, second):
        assert [first.readline(), second.readline()] == ["ready\n", "ready\n"]
        for _ in range(20):
            assert verify(path, Head.parse(log.sign_head())).intact
        assert [agent.wait(60), person.wait(60)] == [0, 0]
    log.sign_head()
    assert verify(path) == Verdict(600, (head_of(path),))
    for name in ("agent", "person"):
        assert [line["number"] for line in written(path) if line["writer"] == name] == list(range(300))


FOREIGN = "is not a line of an audit log"
CHANGED = "one of the two was changed, or lines between them were dropped"
MOVED = "lines were dropped, added, repeated or put in another order"


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def swapped(text: str) -> str:
    first, second, third, fourth = lines_of(text)
    return first + third + second + fourth


def inserted(text: str) -> str:
    """A line that continues the second one, before the third that does so too."""
    first, second, *rest = lines_of(text)
    forged = json.loads(rest[0]) | {"event": "plan decided"}
    return "".join([first, second, json.dumps(forged) + "\n", *rest])


DAMAGES: dict[str, tuple[Callable[[str], str], int, str]] = {
    "changed": (lambda text: text.replace('"round":1', '"round":9'), 3, f"does not follow line 2: {CHANGED}"),
    "middle gone": (lambda text: "".join(lines_of(text)[:1] + lines_of(text)[2:]), 2, f"not follow line 1: {CHANGED}"),
    "first gone": (
        lambda text: "".join(lines_of(text)[1:]),
        1,
        "does not begin a log: it was changed, or lines before it were dropped",
    ),
    "swapped": (swapped, 2, f"follows line 3, not line 1: {MOVED}"),
    "reversed": (lambda text: "".join(lines_of(text)[::-1]), 1, f"follows line 2, not the beginning: {MOVED}"),
    "inserted": (inserted, 4, f"follows line 2, not line 3: {MOVED}"),
    "twice": (lambda text: lines_of(text)[0] + text, 2, f"follows the beginning, not line 1: {MOVED}"),
    "foreign line": (lambda text: text.replace("\n", "\nnot json\n", 1), 2, FOREIGN),
    "foreign json": (lambda text: text.replace("\n", "\n[]\n", 1), 2, FOREIGN),
    "empty line": (lambda text: text.replace("\n", "\n\n", 1), 2, FOREIGN),
    "no hash": (lambda text: text.replace("\n", "\n{}\n", 1), 2, FOREIGN),
    "other time": (lambda text: text.replace('"time":"2', '"time":"z', 1), 1, FOREIGN),
    "nested": (lambda text: "[" * 50_000 + "\n" + text, 1, FOREIGN),
    "huge number": (lambda text: '{"round":' + "9" * 50_000 + "}\n" + text, 1, FOREIGN),
    "huge line": (lambda text: "x" * 200_000 + "\n" + text, 1, "is longer than any line of an audit log"),
}


@pytest.mark.parametrize(("damage", "line", "what"), DAMAGES.values(), ids=DAMAGES)
def test_a_broken_chain_is_found_at_its_line(
    path: Path, damage: Callable[[str], str], line: int, what: str, key: SigningKey
) -> None:
    log_of(path, 4)
    path.write_text(damage(path.read_text()))
    with pytest.raises(LedgerError, match=rf"audit\.jsonl: line {line} .*{what}; keep the file and find out who"):
        AuditLog(path, site="north", key=key)
    verdict = verify(path)
    assert (verdict.lines, verdict.line, verdict.intact) == (line - 1, line, False)
    assert what in verdict.fault


def test_a_change_while_the_agent_runs_is_found_at_its_next_line(path: Path) -> None:
    log = log_of(path, 3)
    forged = json.dumps({"event": "forged", "time": written(path)[0]["time"], "previous": GENESIS})
    path.write_text(path.read_text() + forged + "\n")
    with pytest.raises(LedgerError, match="line 4 follows the beginning, not line 3"):
        log.append("round released")
    assert len(written(path)) == 4


def test_lines_that_vanish_while_the_agent_runs_are_missed(path: Path, key: SigningKey) -> None:
    log = log_of(path, 3, key)
    path.write_text("".join(lines_of(path.read_text())[:2]))
    for use in (lambda: log.append("round released"), log.sign_head):
        with pytest.raises(LedgerError, match="line 3 is gone"):
            use()


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_clock_that_is_set_back_does_not_turn_the_log_s_time_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([datetime(2026, 5, day, tzinfo=UTC) for day in (10, 1, 11, 3)])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return next(readings)

    monkeypatch.setattr(client.audit_log, "datetime", Clock)
    log = AuditLog(path)
    for event in ("a", "b", "c"):
        log.append(event)
    AuditLog(path).append("after a restart")
    assert [line["time"][:10] for line in written(path)] == ["2026-05-10", "2026-05-10", "2026-05-11", "2026-05-11"]


class Reason(StrEnum):
    BUDGET = "budget"


def test_plain_details_are_written_as_they_are(path: Path) -> None:
    details = {"a": "ü" * 200, "b": 3, "c": 0.25, "d": True, "e": None, "f": Reason.BUDGET}
    AuditLog(path).append("round refused", **details)
    (line,) = written(path)
    assert {name: line[name] for name in details} == {**details, "f": "budget"}


@pytest.mark.parametrize(
    ("details", "what"),
    [
        ({"rows": ["note"]}, "'rows' is a list"),
        ({"row": {"text": "note"}}, "'row' is a dict"),
        ({"row": b"note"}, "'row' is a bytes"),
        ({"row": datetime.now(UTC)}, "'row' is a datetime"),
        ({"text": "cough " * 34}, "'text' has more than 200 characters"),
        ({"loss": float("nan")}, "'loss' is not finite"),
        ({"loss": float("-inf")}, "'loss' is not finite"),
        ({"seed": -(1 << 53)}, "'seed' is not finite, or has more than 53 bits"),
        ({"previous": "0"}, "'previous' is written by the log itself"),
        ({"salt": "0"}, "'salt' is written by the log itself"),
        ({"time": "now"}, "'time' is written by the log itself"),
        ({f"field{n}": "\N{HOSPITAL}" * 200 for n in range(40)}, "longer than 65536 bytes together"),
    ],
)
def test_what_could_hold_a_patients_data_is_no_detail(path: Path, details: dict[str, Any], what: str) -> None:
    log = log_of(path, 1)
    with pytest.raises(TypeError, match=what) as caught:
        log.append("round released", **details)
    assert "cough" not in str(caught.value)
    with pytest.raises(TypeError, match="'event' has more than 200 characters"):
        log.append("cough " * 34)
    log.append("round released")
    assert verify(path) == Verdict(2, ())


def test_a_line_is_on_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(path, 1)
    forced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(path.read_bytes()))
    log.append("plan received")
    assert forced == [path.read_bytes()]
    AuditLog(path, durable=False).append("plan received")
    assert len(forced) == 1


def test_the_file_of_the_first_line_is_durable_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)
    assert forced_by(lambda: log.append("agent started"), monkeypatch) == ["audit.jsonl", "state"]
    assert forced_by(lambda: log.append("plan received"), monkeypatch) == ["audit.jsonl"]


def test_only_the_site_can_read_it(path: Path, key: SigningKey) -> None:
    log_of(path, 1, key).sign_head()
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, head_file(path))] == [0o600, 0o600]
    assert sorted(file.name for file in path.parent.iterdir()) == ["audit.jsonl", "audit.jsonl.head"]


def test_the_cost_of_a_line_does_not_grow_with_the_log(path: Path, key: SigningKey) -> None:
    """Counted in bytes that are read from the file."""
    log = AuditLog(path, durable=False, site="north", key=key)
    for number in range(SPACING + 10):
        log.append("round released", round=number)
    old = Head.parse(log.sign_head())
    for number in range(SPACING):
        log.append("round released", round=number)

    def read_by(action: Callable[[], object]) -> int:
        def so_far() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        cost_of_asking = -(so_far() - so_far())
        before = so_far()
        action()
        return so_far() - before - cost_of_asking

    assert read_by(lambda: log.append("round released")) < 2_000
    assert read_by(log.sign_head) < 2_000
    assert not log.contradicts(old)
    assert path.stat().st_size > 300_000
    assert read_by(lambda: log.contradicts(old)) < 40_000  # it lies ten lines behind one that is remembered


# ----------------------------------------------------------------------------------------------- crashes and full disks


def test_a_last_line_that_a_power_cut_tore_is_told_and_removed(path: Path, key: SigningKey) -> None:
    log_of(path, 3, key).sign_head()
    with path.open("ab") as stream:
        stream.write(b'{"event":"round rel')
    assert verify(path) == Verdict(3, (head_of(path),), unfinished=True)
    AuditLog(path, site="north", key=key).append("round released", round=3)
    assert [line["round"] for line in written(path)] == [0, 1, 2, 3]
    assert verify(path) == Verdict(4, (head_of(path),))


def test_a_signed_line_whose_end_was_cut_is_no_power_cut(path: Path, key: SigningKey) -> None:
    log_of(path, 3, key).sign_head()
    path.write_bytes(path.read_bytes()[:-1])
    assert (verify(path).line, verify(path).intact) == (3, False)
    with pytest.raises(LedgerError, match="has 2 lines, and the site signed 3 lines"):
        AuditLog(path, site="north", key=key)


WRITES_FOR_EVER = """if True:
    import sys
    from pathlib import Path
    from client.audit_log import AuditLog
    from common.signing import SigningKey
    log = AuditLog(Path(sys.argv[1]), site="north", key=SigningKey.load(Path(sys.argv[2])))
    while True:
        log.append("round released", run="run")
        print(log.sign_head(), flush=True)
"""


def test_a_killed_writer_leaves_a_log_that_goes_on_from_every_head_it_showed(
    path: Path, key: SigningKey, key_file: Path
) -> None:
    shown: list[Head] = []
    for heads in (1, 2, 5, 9):
        with in_child(WRITES_FOR_EVER, path, key_file) as (child, printed):
            shown += [Head.parse(printed.readline().strip()) for _ in range(heads)]
        assert child.returncode == -signal.SIGKILL
        log = AuditLog(path, site="north", key=key)
        assert not any(log.contradicts(head) for head in shown)
        assert all(verify(path, head).intact for head in shown)


def test_a_writer_killed_in_the_middle_of_a_line_costs_only_that_line(path: Path) -> None:
    """The kernel writes as far as the limit, and kills at the next byte."""
    source = """if True:
        import resource, signal, sys
        from pathlib import Path
        from client.audit_log import AuditLog
        log = AuditLog(Path(sys.argv[1]))
        log.append("round released", round=0)
        size = Path(sys.argv[1]).stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        log.append("round released", round=1)
    """
    with in_child(source, path) as (child, _):
        child.wait(60)
    assert child.returncode == -signal.SIGXFSZ
    assert verify(path) == Verdict(1, (), unfinished=True)
    AuditLog(path).append("round released", round=2)
    assert [line["round"] for line in written(path)] == [0, 2]


def test_a_full_disk_is_told_and_the_log_goes_on_when_there_is_room_again(path: Path, key: SigningKey) -> None:
    log = log_of(path, 4, key)
    head = log.sign_head()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))  # Python ignores the signal
    try:
        with pytest.raises(LedgerError, match=r"audit\.jsonl: cannot be written \(File too large\)"):
            log.append("round released", round=4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        with pytest.raises(LedgerError, match="cannot be written"):
            log.sign_head()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert verify(path, Head.parse(head)).intact
    assert head_of(path).text() == head
    log.append("round released", round=5)
    assert [line["round"] for line in written(path)] == [0, 1, 2, 3, 5]
    assert Head.parse(log.sign_head()).lines == 5


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_crash_while_the_head_is_stored_leaves_the_older_one(
    path: Path, key: SigningKey, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    log = log_of(path, 2, key)
    log.sign_head()
    log.append("round released")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, point, lambda *_: (_ for _ in ()).throw(Crash()))
        log.sign_head()
    assert verify(path) == Verdict(3, (head_of(path),)) and head_of(path).lines == 2
    assert Head.parse(AuditLog(path, site="north", key=key).sign_head()).lines == 3
    assert head_of(path).lines == 3


def test_a_head_never_gets_to_the_disk_before_the_lines_it_vouches_for(
    path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line may come from a process that was killed before it had forced it to the disk."""
    log = AuditLog(path, site="north", key=key)
    AuditLog(path, durable=False).append("round released")
    forced = forced_by(log.sign_head, monkeypatch)
    assert forced == ["audit.jsonl", "audit.jsonl.head.part", "state"]


# ------------------------------------------------------------------------------------------------------ the signed head


def test_a_head_states_the_number_of_lines_and_the_hash_of_the_last(path: Path, key: SigningKey) -> None:
    log = log_of(path, 3, key)
    text = log.sign_head()
    last = path.read_bytes().split(b"\n")[2]
    head = Head.parse(text)
    assert (head.site, head.lines, head.hash, head.key) == (
        "north",
        3,
        hashlib.sha256(last).hexdigest(),
        key.public,
    )
    assert head.authentic()
    signed = f'{{"hash":"{head.hash}","lines":3,"site":"north"}}'
    assert head.signature == key.sign(AUDIT_HEAD, signed.encode())
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert head_file(path).read_text() == text + "\n"


def test_a_log_without_a_key_signs_nothing(path: Path) -> None:
    log = log_of(path, 1)
    with pytest.raises(LedgerError, match=r"site\.key: is missing"):
        log.sign_head()
    assert not head_file(path).exists()


def test_a_simulated_log_signs_but_stores_no_head(path: Path, key: SigningKey) -> None:
    log = AuditLog(path, durable=False, site="north", key=key)
    assert Head.parse(log.sign_head()).lines == 0
    assert not head_file(path).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"lines": 4},
        {"hash": "f" * 64},
        {"site": "south"},
        {"key": "the other's"},
        {"signature": "for another purpose"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_head_that_was_not_signed_so_is_false(
    path: Path, key: SigningKey, other_key: SigningKey, change: dict[str, Any]
) -> None:
    log = log_of(path, 3, key)
    fields = json.loads(log.sign_head())
    statement = json.dumps({name: fields[name] for name in ("hash", "lines", "site")}, separators=(",", ":"))
    values = {"the other's": other_key.public, "for another purpose": key.sign(PLAN, statement.encode())}
    forged = Head(**{**fields, **{name: values.get(str(value), value) for name, value in change.items()}})
    assert Head(**fields).authentic() and not forged.authentic()
    assert not log.contradicts(forged)
    assert verify(path, forged).fault == f"the signature of a head of {forged.lines} lines is false"


def changed(text: str, **fields: Any) -> str:
    body = {name: value for name, value in {**json.loads(text), **fields}.items() if value != "gone"}
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "null",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "[" * 4000,
        lambda text: " " + text,
        lambda text: text + "\n",
        lambda text: text.replace(",", ", ", 1),
        lambda text: text.replace("{", '{"hash":"0",', 1),
        lambda text: changed(text, extra=1),
        lambda text: changed(text, signature="gone"),
        lambda text: changed(text, lines="3"),
        lambda text: changed(text, lines=True),
        lambda text: changed(text, lines=3.0),
        lambda text: changed(text, lines=None),
        lambda text: changed(text, lines=-1),
        lambda text: changed(text, lines=(1 << 53) + 1),
        lambda text: changed(text, lines=10**3000),
        lambda text: changed(text, hash="F" * 64),
        lambda text: changed(text, hash="0" * 63),
        lambda text: changed(text, hash=0),
        lambda text: changed(text, site="no\u001bspace"),
        lambda text: changed(text, site="\ud800"),
        lambda text: changed(text, site="x" * 65),
        lambda text: changed(text, site=["north"]),
        lambda text: changed(text, key="ed25519:short"),
        lambda text: changed(text, key={}),
        lambda text: changed(text, signature="é"),
        lambda text: changed(text, signature=[]),
        lambda text: text + " " * 5000,
    ],
)
def test_a_malformed_head_is_refused_with_one_message(
    path: Path, key: SigningKey, damage: Callable[[str], str]
) -> None:
    log = log_of(path, 3, key)
    text = log.sign_head()
    with pytest.raises(LedgerError, match=r"signed head: is not what .* prints; copy its one line unchanged"):
        Head.parse(damage(text))


@settings(deadline=None)
@given(
    st.text(max_size=60)
    | st.dictionaries(
        st.sampled_from(["site", "lines", "hash", "key", "signature", "more"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=90) | st.lists(st.none()),
    ).map(lambda fields: json.dumps(fields, sort_keys=True, separators=(",", ":")))
)
def test_no_text_makes_reading_a_head_fail_in_another_way(text: str) -> None:
    with pytest.raises(LedgerError):
        Head.parse(text)


def test_a_head_from_the_log_s_own_past_is_part_of_it(path: Path, key: SigningKey) -> None:
    log = AuditLog(path, durable=False, site="north", key=key)
    heads = [Head.parse(log.sign_head())]
    for number in range(2 * SPACING + 3):
        if (number + 1) % SPACING == 0:  # as long as the log will be with one more line
            assert log.contradicts(Head.sign("north", number + 1, heads[-1].hash, key))
        log.append("round released", round=number)
        if number % 101 == 0 or (number + 1) % SPACING in (0, 1, SPACING - 1):
            heads.append(Head.parse(log.sign_head()))
    fresh = AuditLog(path, site="north", key=key)
    assert not any(reader.contradicts(head) for reader in (log, fresh) for head in heads)
    assert all(verify(path, head).intact for head in heads[::7])


def test_a_newer_head_from_elsewhere_contradicts_an_older_copy(path: Path, key: SigningKey, tmp_path: Path) -> None:
    log = log_of(path, 3, key)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    log.append("round released")
    newer = Head.parse(log.sign_head())
    older = AuditLog(copy, site="north", key=key)
    assert older.contradicts(newer) and not log.contradicts(newer)
    assert verify(copy, newer).line == 4
    assert verify(copy, newer).fault == "is gone: the site signed 4 lines, and the log ends after 3"
    older.append("plan received")  # as long, and other than what was signed
    assert older.contradicts(newer)
    assert verify(copy, newer).line == 4
    assert "among lines 1 to 4 some were changed" in verify(copy, newer).fault


def test_a_stranger_s_head_blocks_nobody(path: Path, key: SigningKey, other_key: SigningKey) -> None:
    log = log_of(path, 3, key)
    assert not log.contradicts(Head.sign("north", 99, "a" * 64, other_key))
    assert not log.contradicts(Head.sign("south", 99, "a" * 64, key))
    assert log.contradicts(Head.sign("north", 99, "a" * 64, key))
    assert not AuditLog(path, site="north").contradicts(Head.sign("north", 99, "a" * 64, key))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"round":0', '"round":9'),
        lambda text: text.replace('"round":1', '"round":9'),
        lambda text: text.replace("\n", " ", 1),
    ],
    ids=["a line before", "the line itself", "fewer lines"],
)
def test_a_head_is_looked_up_in_the_file_as_it_is_now(
    path: Path, key: SigningKey, damage: Callable[[str], str]
) -> None:
    log = log_of(path, 2, key)
    head = Head.parse(log.sign_head())
    log.append("round released")
    assert not log.contradicts(head)
    path.write_text(damage(path.read_text()))
    assert log.contradicts(head)


def test_a_head_of_a_line_that_another_process_wrote_is_part_of_the_log(path: Path, key: SigningKey) -> None:
    agent = log_of(path, 3, key)
    person = AuditLog(path, site="north", key=key)
    person.append("plan decided")
    assert not agent.contradicts(Head.parse(person.sign_head()))


# -------------------------------------------------------------------------------------------- what only a head can find


def test_a_tail_that_was_cut_off_is_found_by_the_head(path: Path, key: SigningKey) -> None:
    log_of(path, 5, key).sign_head()
    path.write_text("".join(lines_of(path.read_text())[:3]))
    assert verify(path) == Verdict(3, (head_of(path),), 4, "is gone: the site signed 5 lines, and the log ends after 3")
    with pytest.raises(LedgerError, match=r"has 3 lines, and the site signed 5 .* bring back the newest state folder"):
        AuditLog(path, site="north", key=key)


def test_a_log_that_is_gone_is_found_by_the_head(path: Path, key: SigningKey) -> None:
    log_of(path, 5, key).sign_head()
    path.unlink()
    assert verify(path).fault == "the log is gone"
    with pytest.raises(LedgerError, match="has 0 lines, and the site signed 5"):
        AuditLog(path, site="north", key=key)


def test_a_tail_cut_off_together_with_the_head_is_found_by_one_that_was_kept_elsewhere(
    path: Path, key: SigningKey
) -> None:
    kept = Head.parse(log_of(path, 5, key).sign_head())
    path.write_text("".join(lines_of(path.read_text())[:3]))
    head_file(path).unlink()
    assert verify(path) == Verdict(3, ())  # nobody can tell from the files alone
    assert verify(path, kept).line == 4
    assert AuditLog(path, site="north", key=key).contradicts(kept)


def test_a_chain_written_anew_is_found_by_the_head(path: Path, key: SigningKey) -> None:
    log = log_of(path, 2, key)
    first = Head.parse(log.sign_head())
    for number in range(4):
        log.append("round reserved", round=number)
    log.sign_head()
    lines = written(path)
    path.write_text(chained_anew([*lines[:3], lines[3] | {"event": "inserted"}, *lines[3:]]))
    AuditLog(path)  # the chain alone is whole
    found = (
        "is not what the site signed: among lines {} to 6 some were changed, added or dropped, though the chain holds "
        "so far"
    )
    assert (verify(path).line, verify(path).fault) == (6, found.format(1))
    assert (verify(path, first).line, verify(path, first).fault) == (6, found.format(3))
    with pytest.raises(LedgerError, match="has 7 lines, and the site signed 6 lines that end otherwise"):
        AuditLog(path, site="north", key=key)


def test_a_forged_head_of_another_key_is_told_apart_by_the_key(
    path: Path, key: SigningKey, other_key: SigningKey
) -> None:
    kept = Head.parse(log_of(path, 5, key).sign_head())
    path.write_text("".join(lines_of(path.read_text())[:3]))
    head_file(path).unlink()
    AuditLog(path, site="north", key=other_key).sign_head()
    assert verify(path) == Verdict(3, (head_of(path),))  # the key is named: a person has to know it
    message = f"a head of 3 lines is signed by {other_key.public}, not by {key.public}"
    assert verify(path, key=key.public).fault == message
    assert verify(path, kept).fault == message
    AuditLog(path, site="north", key=key)  # a stranger's head does not stop the agent


def test_a_head_that_is_no_head_stops_the_agent_and_fails_the_check(path: Path, key: SigningKey) -> None:
    log_of(path, 2, key).sign_head()
    head_file(path).write_bytes(b"\xff\x00")
    with pytest.raises(LedgerError, match=r"audit\.jsonl\.head: is not a signed head"):
        AuditLog(path, site="north", key=key)
    assert "is not a signed head" in verify(path).fault
    AuditLog(path)  # who signs nothing does not read it


def test_a_log_that_cannot_be_read_is_no_verdict(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(LedgerError, match=r"cannot be read \(Is a directory\)"):
        verify(path)
    assert verify(path.parent / "none.jsonl").fault == "there is no log"


# ----------------------------------------------------------------------------------------------------------- any damage


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_any_damage_to_a_signed_log_is_found(key: SigningKey, seed: int, count: int) -> None:
    """Of the file's bytes not one can be changed, taken or added before the head's line without being found."""
    coins = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.jsonl"
        log = AuditLog(path, durable=False, site="north", key=key)
        for number in range(count):
            log.append("round released", round=number)
        head = Head.parse(log.sign_head())
        whole = path.read_bytes()
        assert verify(path, head) == Verdict(count, (head,))
        damaged = coins.choice([_byte_changed, _byte_gone, _byte_added, _lines_shuffled, _line_gone, _tail_gone])(
            whole, coins
        )
        if damaged == whole:
            return
        path.write_bytes(damaged)
        verdict = verify(path, head)
        assert not verdict.intact and verdict.line is not None
        assert verdict.lines == verdict.line - 1 <= count
        shared = next((n for n, (old, new) in enumerate(zip(whole, damaged, strict=False)) if old != new), len(damaged))
        assert verdict.line > whole[:shared].count(b"\n")  # never a line before the damage


def _byte_changed(whole: bytes, coins: random.Random) -> bytes:
    place = coins.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ coins.randrange(1, 256)]) + whole[place + 1 :]


def _byte_gone(whole: bytes, coins: random.Random) -> bytes:
    place = coins.randrange(len(whole))
    return whole[:place] + whole[place + 1 :]


def _byte_added(whole: bytes, coins: random.Random) -> bytes:
    place = coins.randrange(len(whole))
    return whole[:place] + coins.randbytes(1) + whole[place:]


def _lines_shuffled(whole: bytes, coins: random.Random) -> bytes:
    lines = whole.splitlines(keepends=True)
    coins.shuffle(lines)
    return b"".join(lines)


def _line_gone(whole: bytes, coins: random.Random) -> bytes:
    lines = whole.splitlines(keepends=True)
    del lines[coins.randrange(len(lines))]
    return b"".join(lines)


def _tail_gone(whole: bytes, coins: random.Random) -> bytes:
    return whole[: coins.randrange(len(whole))]
