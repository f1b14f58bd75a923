"""The ledger's file: durable, private, told when it is damaged, and brought from version 1 to today's."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from ledger_v1 import write_version_1
from small_ledgers import SEGMENTS, STATEMENT, approved, fund, open_ledger, receive, rows, secrets_in

from client.privacy.ledger import Decision, Ledger, StoredRelease
from client.privacy.sampling import RoundSecret
from client.privacy.secret_files import SecretFiles
from common.errors import LedgerError
from common.messages import RefusalReason


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path)
    yield opened
    opened.close()


# ---------------------------------------------------------------------------------------------------------- on the disk


def test_writes_are_on_disk_before_anything_goes_on(ledger: Ledger) -> None:
    with ledger._file.reading() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert db.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_secret_and_folder_are_forced_to_disk_before_the_charge(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved(ledger)
    forced = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        forced.append((os.fstat(descriptor).st_ino, rows(tmp_path, "SELECT COUNT(*) FROM charges")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    fund(ledger)
    file, folder = (tmp_path / "secrets" / "plan-1").stat(), (tmp_path / "secrets").stat()
    assert forced == [(file.st_ino, [(0,)]), (folder.st_ino, [(0,)])]


def test_a_closed_ledger_holds_no_file_and_opens_again_when_it_is_used(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path))
    ledger.close()
    ledger.record(fund(ledger), b"release")
    ledger.close()
    opened = [Path(file.path) for file in psutil.Process().open_files()]
    assert not [file for file in opened if file.is_relative_to(tmp_path.resolve())]
    assert ledger.release("plan", 1, "request") == StoredRelease(b"release", "")
    assert [entry.digest for entry in ledger.plans(Decision.APPROVED)] == ["plan"]
    assert secrets_in(tmp_path) == {}


def test_folder_files_and_journal_are_readable_by_the_site_alone_whatever_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        ledger = open_ledger(tmp_path / "state", counter=tmp_path / "elsewhere" / "counter")
        fund(approved(ledger))
        with ledger.serve_alone():
            found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
        ledger.close()
    finally:
        os.umask(mask)
    assert found.pop("state") == found.pop("secrets") == found.pop("elsewhere") == 0o700
    private = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "plan-1", "counter", "agent.lock")
    assert found == dict.fromkeys(private, 0o600)


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    (tmp_path / "ledger.sqlite").chmod(0o644)
    open_ledger(tmp_path).close()
    assert stat.S_IMODE((tmp_path / "ledger.sqlite").stat().st_mode) == 0o600


# -------------------------------------------------------------------------------------------------------------- damages


def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, but a long enough line of text" * 30)
    with pytest.raises(LedgerError, match=r"cannot be used; do not delete it, and put no older copy in its place"):
        Ledger(tmp_path)
    assert (tmp_path / "ledger.sqlite").read_bytes().startswith(b"not a database")


def lived_in(folder: Path) -> Path:
    """A ledger of some plans and rounds, closed; its releases fill pages of their own."""
    with closing(open_ledger(folder / "state", counter=folder / "counter")) as ledger:
        approved(ledger)
        for round in (1, 2, 3):
            ledger.record(fund(ledger, round, str(round)), bytes(range(1, 256)) * 40)
        receive(ledger, "waiting")
    return folder / "state" / "ledger.sqlite"


def serve_all(folder: Path) -> None:
    """Opens that ledger again and asks for every release."""
    with closing(Ledger(folder / "state", counter=folder / "counter")) as ledger:
        for round in (1, 2, 3):
            stored = ledger.release("plan", round, str(round))
            assert stored == StoredRelease(bytes(range(1, 256)) * 40, "")


def zeros(page: bytes) -> bytes:
    return bytes(len(page))


def noise(page: bytes) -> bytes:
    return bytes(0xFF & (77 * place + 13) for place in range(len(page)))


@pytest.mark.parametrize("damage", [zeros, noise])
def test_each_page_that_is_damaged_is_told_before_anything_of_it_is_used(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = lived_in(tmp_path)
    whole = file.read_bytes()
    assert len(whole) // 4096 > 15
    for start in range(0, len(whole), 4096):
        file.write_bytes(whole[:start] + damage(whole[start : start + 4096]) + whole[start + 4096 :])
        with pytest.raises(LedgerError) as told:
            serve_all(tmp_path)
        assert "newest copy" in str(told.value) and "\n" not in str(told.value)
        for journal in file.parent.glob("ledger.sqlite-*"):
            journal.unlink()
    file.write_bytes(whole)
    serve_all(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 99, 100, 512, 4095, 4096, 5000, 8192, 40_960, -4096, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    file = lived_in(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(LedgerError, match="newest copy"):
        Ledger(file.parent, counter=tmp_path / "counter")


def test_a_stored_release_of_which_one_bit_changed_is_not_sent(tmp_path: Path) -> None:
    file = lived_in(tmp_path)
    content = bytearray(file.read_bytes())
    content[content.index(bytes(range(1, 256)) * 3) + 300] ^= 1
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=r"plan plan, round \d: the stored release is damaged and is not sent"):
        serve_all(tmp_path)


def test_a_file_put_beside_the_journal_of_a_newer_copy_is_refused(tmp_path: Path) -> None:
    """SQLite would mix the pages of both: here a reservation is lost, and the sequence number is the newest."""
    state, backup = tmp_path / "state", tmp_path / "backup"
    with closing(open_ledger(state, limit=100)) as ledger:
        approved(ledger, "first")
    backup.write_bytes((state / "ledger.sqlite").read_bytes())
    with closing(Ledger(state)) as ledger:
        approved(ledger, "second")
    with closing(Ledger(state)) as ledger:
        fund(ledger, plan="second")
        files = {file.name: file.read_bytes() for file in state.glob("ledger.sqlite*")}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():  # as a power cut leaves them
        (copy / name).write_bytes(content)
    (copy / "ledger.sqlite").write_bytes(backup.read_bytes())
    (copy / "ledger.sqlite-shm").unlink()
    with pytest.raises(LedgerError, match="put no older copy in its place"):
        Ledger(copy)


# ------------------------------------------------------------------------------------------------------------- versions


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        db.execute("UPDATE meta SET value='4' WHERE key='schema_version'")
        db.commit()
    with pytest.raises(LedgerError, match=r"schema_version 4 is newer .* \(3\); update it"):
        Ledger(tmp_path)


def test_a_ledger_of_version_1_is_taken_over_with_all_it_holds(tmp_path: Path) -> None:
    secret = write_version_1(tmp_path)
    with closing(open_ledger(tmp_path, limit=50.0, counter=tmp_path.parent / f"{tmp_path.name}.counter")) as ledger:
        assert rows(tmp_path, "SELECT value FROM meta WHERE key='schema_version'") == [("3",)]
        assert [(entry.digest, entry.decision) for entry in ledger.plans()] == [
            ("plan", Decision.APPROVED),
            ("waiting", Decision.WAITING),
            ("no", Decision.REFUSED),
        ]
        assert ledger.plan("plan") == ledger.plan_of_run("run of plan")
        entry = ledger.plan("plan")
        assert entry is not None and (entry.statement, entry.population) == (STATEMENT, "site")
        assert (entry.signature, entry.closed_because) == ("", "")
        assert ledger.reserved("site") == SEGMENTS
        assert ledger.release("plan", 1, "first") == StoredRelease(b"an old release", "")
        assert fund(ledger, 2, "second").secret == RoundSecret(secret)
        assert ledger.sequence == 0
        fund(ledger, 3, "third")
        assert ledger.sequence == 1


def test_a_takeover_that_is_interrupted_leaves_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version_1(tmp_path)
    before = rows(tmp_path, "SELECT sql FROM sqlite_master")
    with monkeypatch.context() as patch:
        patch.setattr("client.privacy.ledger_file.rows_of", _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            Ledger(tmp_path)
    assert rows(tmp_path, "SELECT sql FROM sqlite_master") == before
    assert rows(tmp_path, "SELECT value FROM meta WHERE key='schema_version'") == [("1",)]
    Ledger(tmp_path).close()


def _power_cut(*_: object) -> str:
    raise RuntimeError("power cut")


# -------------------------------------------------------------------------------------------------------------- secrets


def test_a_secret_that_cannot_be_stored_is_told_and_nothing_is_left_of_it(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.raises(LedgerError, match=r"secrets of rounds .*: cannot be read and written \(No space left"):
            ledger.reserve("plan", 1, "request", "head", 1, RoundSecret.from_system)
    assert secrets_in(tmp_path) == {} and ledger.charges("plan") == []
    fund(ledger)


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_secrets_that_no_charge_needs_are_deleted_at_the_next_opening(tmp_path: Path) -> None:
    with closing(approved(open_ledger(tmp_path))) as ledger:
        running = fund(ledger)
    stray = SecretFiles(tmp_path / "secrets", durable=False)
    stray.write("plan", 7, running.secret)
    stray.write("unknown", 1, running.secret)
    with closing(Ledger(tmp_path)) as again:
        assert set(secrets_in(tmp_path)) == {"plan-1"}
        refused = again.reserve("plan", 1, "other", "head", 1, RoundSecret.from_system)
        assert refused is RefusalReason.REQUEST_CHANGED
