"""An older copy of the ledger is told by the counter outside it, wherever a crash or a restored backup strikes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_ledgers import approved, fund, open_ledger, receive, rows, secrets_in

from client.privacy.counter import Count, Counter
from client.privacy.ledger import Decision, Ledger, StoredRelease
from client.privacy.sampling import RoundSecret
from common.errors import LedgerError
from common.messages import RefusalReason

REPOSITORY = Path(__file__).parents[3]


class Place:
    """A ledger's folder, its counter, and backups of either."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.counter = folder / "state", folder / "elsewhere" / "counter"

    def open(self, **settings: Any) -> Ledger:
        return open_ledger(self.state, limit=100.0, counter=self.counter, **settings)

    def backup(self, name: str = "backup") -> Callable[[], None]:
        """Copies the state folder; what is returned puts the copy in its place."""
        copy = self.folder / name
        shutil.copytree(self.state, copy)

        def restore() -> None:
            shutil.rmtree(self.state)
            shutil.copytree(copy, self.state)

        return restore

    @property
    def counted(self) -> int:
        count = Counter(self.counter).read()
        assert count is not None
        return count.number


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ------------------------------------------------------------------------------------------------------------- counting


def test_each_transaction_that_spends_or_decides_counts_once_and_no_other_does(place: Place) -> None:
    with closing(place.open()) as ledger:
        for digest in ("plan", "rejected", "expired", "expired too"):
            receive(ledger, digest)
        assert (ledger.sequence, place.counted) == (0, 0)
        running: list[Any] = []
        steps: list[tuple[Callable[[], object], int]] = [
            (lambda: ledger.approve("plan"), 1),
            (lambda: ledger.reject("rejected"), 1),
            (lambda: running.append(fund(ledger)), 1),
            (lambda: fund(ledger), 0),
            (lambda: ledger.reserve("plan", 1, "other", "head", 1, RoundSecret.from_system), 0),
            (lambda: ledger.record(running[0], b"release"), 1),
            (lambda: ledger.release("plan", 1, "request"), 0),
            (lambda: ledger.same_data("plan", "data"), 0),
            (lambda: ledger.bind_data("default", "site"), 0),
            (lambda: ledger.close_plan("plan", "a test"), 1),
            (lambda: ledger.close_plan("plan", "again"), 0),
            (lambda: ledger.expire(-1.0), 1),
            (lambda: ledger.expire(-1.0), 0),
            (lambda: ledger.block("a test"), 1),
            (lambda: ledger.block("again"), 0),
            (lambda: ledger.unblock("looked"), 1),
        ]
        for number, (step, grows) in enumerate(steps):
            before = ledger.sequence
            step()
            assert (ledger.sequence - before, place.counted) == (grows, ledger.sequence), number


def test_a_transaction_is_committed_then_counted_and_only_then_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    advance = Counter.advance

    def watched(self: Counter, count: Count) -> None:
        committed = rows(place.state, "SELECT value FROM meta WHERE key='sequence'")
        seen.append((committed, count.number, place.counted))
        advance(self, count)

    with closing(place.open()) as ledger:
        monkeypatch.setattr(Counter, "advance", watched)
        fund(approved(ledger))
    assert seen == [([("1",)], 1, 0), ([("2",)], 2, 1)]


def test_the_counter_is_forced_to_the_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(place.open()) as ledger:
        receive(ledger)
        forced = []
        monkeypatch.setattr(os, "fdatasync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
        ledger.approve("plan")
        assert forced == [place.counter.stat().st_ino]


CONTEND = """
import sys
from pathlib import Path
from client.privacy.ledger import Ledger
state, counter, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ledger = Ledger(state, counter=counter)
print("ready", flush=True)
sys.stdin.readline()
for number in range(first, 60, 2):
    ledger.reject(f"plan {number}")
ledger.close()
"""


def test_two_processes_never_leave_the_counter_behind(place: Place) -> None:
    with closing(place.open()) as ledger:
        for number in range(60):
            receive(ledger, f"plan {number}")
        command = [sys.executable, "-c", CONTEND, str(place.state), str(place.counter)]
        processes = [
            subprocess.Popen(
                [*command, first], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for first in ("0", "1")
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
        assert (ledger.sequence, place.counted) == (60, 60)


# --------------------------------------------------------------------------------------------------------- older copies


def test_an_older_copy_is_refused_and_left_as_it_is(place: Place) -> None:
    with closing(place.open()) as ledger:
        fund(approved(ledger))
    restore = place.backup()
    with closing(place.open()) as ledger:
        fund(ledger, 2)
    restore()
    before = (place.state / "ledger.sqlite").read_bytes()
    for _ in range(2):
        with pytest.raises(
            LedgerError, match=r"older copy, .* \(it holds 2 .* has counted 3\); .* run 'consilium site unblock'"
        ):
            place.open()
    assert (place.state / "ledger.sqlite").read_bytes() == before and place.counted == 3


def test_a_ledger_whose_journal_was_lost_is_an_older_copy(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
        files = {name: (place.state / name).read_bytes() for name in ("ledger.sqlite", "ledger.sqlite-wal")}
    for name, content in files.items():  # as a power cut would leave them
        (place.state / name).write_bytes(content)
    (place.state / "ledger.sqlite-wal").unlink()
    with pytest.raises(LedgerError, match="put the newest copy back"):
        place.open()


def test_a_deleted_ledger_is_not_followed_by_a_fresh_one(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    shutil.rmtree(place.state)
    for _ in range(2):
        with pytest.raises(
            LedgerError,
            match=r"belongs to another ledger\. If this site's ledger was deleted .*put the newest copy back",
        ):
            place.open()


def test_a_folder_that_was_wiped_before_anything_was_decided_can_be_made_anew(place: Place) -> None:
    with closing(place.open()) as ledger:
        receive(ledger)
    shutil.rmtree(place.state)
    with closing(place.open()) as ledger:
        approved(ledger)
        assert place.counted == 1


def test_a_ledger_without_its_counter_is_refused(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    place.counter.unlink()
    with pytest.raises(LedgerError, match=r"counter .* is missing, .*put the counter back"):
        place.open()
    assert not place.counter.exists()


def test_a_counter_of_another_ledger_is_refused(place: Place, tmp_path: Path) -> None:
    with closing(place.open()) as ledger:
        fund(approved(ledger))
    for decisions in (1, 3):
        state = tmp_path / str(decisions)
        with closing(open_ledger(state, limit=100.0)) as other:
            for number in range(decisions):
                approved(other, f"plan {number}")
        with pytest.raises(LedgerError, match="belongs to another ledger"):
            Ledger(state, counter=place.counter)
    assert place.counted == 2


def test_two_sites_that_share_a_counter_are_told(place: Place, tmp_path: Path) -> None:
    first, second = place.open(), open_ledger(tmp_path / "second", limit=100.0, counter=place.counter)
    approved(second)
    with pytest.raises(LedgerError, match="if another site uses this counter too, give each a file of its own"):
        receive(first)
    approved(second, "another")
    first.close()
    second.close()


@pytest.mark.parametrize(
    "damage",
    [lambda line: b"", lambda line: line[:-1], lambda line: line.replace(b"1 check", b"9 check"), lambda line: b"7\n"],
    ids=["empty", "cut", "another number", "something else"],
)
def test_a_damaged_counter_is_refused(place: Place, damage: Callable[[bytes], bytes]) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    place.counter.write_bytes(damage(place.counter.read_bytes()))
    with pytest.raises(LedgerError, match=r"counter .*: is damaged, .* run 'consilium site unblock'"):
        place.open()


def test_a_counter_in_the_ledgers_own_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="would be restored together with it"):
        Ledger(tmp_path, counter=tmp_path / "secrets" / ".." / "counter")


def test_without_a_counter_nothing_of_this_is_asked(tmp_path: Path) -> None:
    with closing(open_ledger(tmp_path / "a")) as ledger:
        approved(ledger)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with closing(open_ledger(tmp_path / "b")) as copy:
        fund(copy)


# -------------------------------------------------------------------------------------------------------------- crashes


def test_a_crash_between_commit_and_counter_is_mended_at_the_next_opening(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(place.open()) as ledger:
        receive(ledger)
        with monkeypatch.context() as patch:
            patch.setattr(Counter, "advance", _power_cut)
            with pytest.raises(RuntimeError, match="power cut"):
                ledger.approve("plan")
    assert place.counted == 0
    with closing(place.open()) as ledger:
        assert (ledger.sequence, place.counted) == (1, 1)
        assert [entry.decision for entry in ledger.plans()] == [Decision.APPROVED]


def _power_cut(*_: object) -> None:
    raise RuntimeError("power cut")


KILLED = """
import os, signal, sys
from pathlib import Path
from client.privacy.counter import Counter
from client.privacy.ledger import Ledger
from client.privacy.sampling import RoundSecret
Counter.advance = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Ledger(Path(sys.argv[1]), counter=Path(sys.argv[2])).reserve("plan", 1, "request", "head", 1, RoundSecret.from_system)
"""


def test_after_a_kill_between_commit_and_counter_the_same_reservation_is_given(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    command = [sys.executable, "-c", KILLED, str(place.state), str(place.counter)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=60).returncode == -signal.SIGKILL
    assert place.counted == 1
    (secret,) = secrets_in(place.state).values()
    with closing(place.open()) as ledger:
        assert (place.counted, len(ledger.charges("plan"))) == (2, 1)
        assert fund(ledger).secret == RoundSecret(secret)


def test_nothing_is_sent_before_it_is_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter's disk is gone for a while; the ledger's is not."""
    with closing(place.open()) as ledger:
        reservation = fund(approved(ledger))
        gone = place.counter.with_name("gone")
        with monkeypatch.context() as patch:
            patch.setattr(Counter, "advance", lambda *_: place.counter.rename(gone) and place.counter.read_bytes())
            with pytest.raises(FileNotFoundError):
                ledger.record(reservation, b"release")
        with pytest.raises(LedgerError, match="is missing"):
            ledger.release("plan", 1, "request")
        gone.rename(place.counter)
        assert ledger.release("plan", 1, "request") == StoredRelease(b"release", "")
        assert place.counted == ledger.sequence == 3


@pytest.mark.parametrize("act", ["approve", "reserve"])
def test_where_the_counter_cannot_be_written_nothing_is_decided_or_funded(place: Place, act: str) -> None:
    with closing(place.open()) as ledger:
        receive(approved(ledger), "second")
        place.counter.rename(place.counter.with_name("gone"))
        with pytest.raises(LedgerError, match="is missing"):
            ledger.approve("second") if act == "approve" else fund(ledger)
        place.counter.mkdir()
        with pytest.raises(LedgerError, match=r"counter .*: cannot be read and written \(Is a directory\)"):
            ledger.approve("second") if act == "approve" else fund(ledger)
        assert ledger.charges("plan") == [] and secrets_in(place.state) == {}
        assert len(ledger.plans(Decision.WAITING)) == 1


def test_an_older_copy_put_in_place_under_a_running_ledger_is_told(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    restore = place.backup()
    running = place.open()
    fund(running)
    running.close()
    restore()
    with pytest.raises(LedgerError, match="older copy"):
        running.reserve("plan", 1, "request", "head", 1, RoundSecret.from_system)
    with pytest.raises(LedgerError, match="older copy"):
        running.release("plan", 1, "request")
    running.close()


# ---------------------------------------------------------------------------------------------- a person answers for it


def test_a_copy_that_a_person_accepts_can_fund_new_plans_only_and_outnumbers_the_other(place: Place) -> None:
    with closing(place.open()) as ledger:
        receive(approved(ledger), "waiting")
    restore_older = place.backup("older")
    with closing(place.open()) as ledger:
        ledger.record(fund(ledger), b"a release of which the older copy knows nothing")
    restore_newer = place.backup("newer")
    restore_older()
    with closing(Ledger(place.state, counter=place.counter, accept_copy=True)) as ledger:
        assert ledger.unblock("the newest copy burnt") == ["plan", "waiting"]
    with closing(place.open()) as ledger:
        assert place.counted == ledger.sequence > 3
        refused = ledger.reserve("plan", 1, "request", "head", 1, RoundSecret.from_system)
        assert refused is RefusalReason.CLOSED, "it would be a second release of this round"
        assert len(ledger.reserved("site")) == 2, "which pays for the first one"
        fund(approved(ledger, "new"), plan="new")
    restore_newer()
    with pytest.raises(LedgerError, match="older copy"):
        place.open()


def test_a_copy_whose_plans_are_not_closed_yet_serves_none_of_them(place: Place) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    place.counter.unlink()
    Ledger(place.state, counter=place.counter, accept_copy=True).close()  # and then the power goes off
    with closing(place.open()) as ledger:
        assert ledger.release("plan", 1, "request") is RefusalReason.BLOCKED
        assert ledger.unblock("looked") == ["plan"]


@pytest.mark.parametrize("fault", ["missing", "damaged", "deleted ledger"])
def test_whatever_was_wrong_with_the_counter_accepting_the_ledger_mends_it(place: Place, fault: str) -> None:
    with closing(place.open()) as ledger:
        approved(ledger)
    if fault == "missing":
        place.counter.unlink()
    elif fault == "damaged":
        place.counter.write_bytes(b"7\n")
    else:
        shutil.rmtree(place.state)
    with closing(Ledger(place.state, counter=place.counter, accept_copy=True)) as ledger:
        ledger.unblock("looked")
    with closing(place.open()) as ledger:
        assert place.counted == ledger.sequence == 3
