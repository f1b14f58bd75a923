"""The ledger: charge before spend, nothing refunded, one release per reserved round, across crashes and restarts."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_ledgers import COST, SEGMENTS, SITE, STATEMENT, approved, fund, open_ledger, receive, rows, secrets_in

from client.privacy.ledger import Decision, Ledger, StoredRelease
from client.privacy.sampling import RoundSecret
from client.privacy.secret_files import SecretFiles
from common.errors import LedgerError
from common.messages import PhaseStatement, RefusalReason
from common.privacy.accounting import filter_epsilon

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path)
    yield opened
    opened.close()


# ------------------------------------------------------------------------------------------------------------ approval


def test_approving_reserves_the_whole_cost_of_every_phase(ledger: Ledger, tmp_path: Path) -> None:
    approved(ledger)
    assert rows(tmp_path, "SELECT * FROM reservations") == [
        ("plan", 0, "head", 1.0, 8.0, 1.0, 10),
        ("plan", 1, "lora", 0.1, 2.0, 0.5, 20),
    ]
    assert ledger.reserved("site") == SEGMENTS


def test_a_plan_beyond_the_lifetime_limit_is_refused_and_reserves_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, limit=COST * 0.99)
    receive(ledger, "plan")
    assert ledger.approve("plan") is Decision.REFUSED
    entry = ledger.plan("plan")
    assert entry is not None and entry.refusal is RefusalReason.BUDGET
    assert ledger.reserved("site") == []
    ledger.close()


def test_what_was_reserved_before_counts_against_the_limit(tmp_path: Path) -> None:
    both = SEGMENTS * 2
    ledger = open_ledger(tmp_path, limit=filter_epsilon(both, 1e-5) * 0.999)
    receive(approved(ledger), "second")
    assert ledger.approve("second") is Decision.REFUSED
    ledger.close()
    exactly = open_ledger(tmp_path / "other", limit=filter_epsilon(both, 1e-5))
    receive(approved(exactly), "second")
    assert exactly.approve("second") is Decision.APPROVED
    exactly.close()


def test_nothing_is_refunded_when_a_plan_is_never_executed_or_the_site_restarts(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path, limit=COST * 1.1))
    ledger.close()
    again = open_ledger(tmp_path, limit=COST * 1.1)
    receive(again, "second")
    assert again.approve("second") is Decision.REFUSED
    with pytest.raises(LedgerError, match="not waiting"):
        again.reject("plan")
    assert again.reserved("site") == SEGMENTS
    again.close()


def test_a_plan_is_decided_once(ledger: Ledger) -> None:
    approved(ledger)
    for decide in (ledger.approve, ledger.reject):
        with pytest.raises(LedgerError, match="is not waiting for a decision"):
            decide("plan")
        with pytest.raises(LedgerError, match="is not waiting for a decision"):
            decide("unknown")
    assert ledger.reserved("site") == SEGMENTS


def test_a_rejected_plan_costs_nothing_and_stays_rejected(ledger: Ledger) -> None:
    receive(ledger, "plan")
    ledger.reject("plan")
    entry = ledger.plan("plan")
    assert entry is not None and (entry.decision, entry.refusal) == (Decision.REFUSED, RefusalReason.POLICY)
    assert ledger.reserved("site") == []
    with pytest.raises(LedgerError):
        ledger.approve("plan")


def test_two_phases_of_one_name_cannot_be_reserved(ledger: Ledger) -> None:
    twice = replace(STATEMENT, phases=(STATEMENT.phases[0], replace(STATEMENT.phases[1], name="head")))
    receive(ledger, "plan", twice)
    with pytest.raises(LedgerError):
        ledger.approve("plan")
    assert ledger.reserved("site") == []


def test_a_run_id_is_bound_to_one_plan(ledger: Ledger) -> None:
    receive(ledger, "plan")
    with pytest.raises(LedgerError):
        ledger.receive("other", "run of plan", "{}", "site", STATEMENT, None)
    bound = ledger.plan_of_run("run of plan")
    assert bound is not None and bound.digest == "plan"


def test_two_threads_cannot_both_take_the_last_of_the_budget(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, limit=COST * 1.3, durable=False)
    for index in range(6):
        receive(ledger, f"plan-{index}")
    others = [Ledger(tmp_path, durable=False) for _ in range(5)]
    start = threading.Barrier(6)
    decisions: list[Decision] = []

    def approve(index: int, opened: Ledger) -> None:
        start.wait()
        decisions.append(opened.approve(f"plan-{index}"))

    threads = [threading.Thread(target=approve, args=pair) for pair in enumerate([ledger, *others])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decisions) == [Decision.APPROVED] + [Decision.REFUSED] * 5
    assert len(ledger.reserved("site")) == 2
    for opened in (ledger, *others):
        opened.close()


APPROVE = """
import sys
from pathlib import Path
from client.privacy.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(ledger.approve(sys.argv[2]), flush=True)
ledger.close()
"""


def test_two_processes_cannot_both_take_the_last_of_the_budget(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, limit=COST * 1.3)
    processes = []
    for digest in ("one", "two"):
        receive(ledger, digest)
        command = [sys.executable, "-c", APPROVE, str(tmp_path), digest]
        processes.append(
            subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(outputs) == ["approved", "refused"]
    ledger.close()


# ---------------------------------------------------------------------------------------------------------- population


@pytest.mark.parametrize("changed", [{"unit": "patient"}, {"public_size": 41}, {"lifetime_delta": 1e-6}])
def test_what_is_fixed_for_a_populations_lifetime_cannot_change(ledger: Ledger, changed: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match=f"{next(iter(changed))} = .*fixed for its lifetime; put the old value back"):
        ledger.declare(replace(SITE, **changed))


def test_another_lifetime_limit_holds_from_the_next_plan_on(ledger: Ledger) -> None:
    approved(ledger)
    ledger.declare(replace(SITE, lifetime_epsilon=COST / 2))
    receive(ledger, "second")
    assert ledger.approve("second") is Decision.REFUSED


# -------------------------------------------------------------------------------------------------------------- rounds


def test_a_round_is_funded_with_what_its_phase_reserved(ledger: Ledger) -> None:
    reservation = fund(approved(ledger), round=4, phase="lora")
    assert reservation.phase == PhaseStatement("lora", 0.1, 2.0, 0.5, 1)
    assert ledger.charges("plan") == [(4, "lora", 0.1, 2.0, 1)]


def test_only_an_approved_plan_funds_a_round(ledger: Ledger) -> None:
    receive(ledger, "plan")
    for plan, name in (("plan", "head"), ("unknown", "head")):
        refused = ledger.reserve(plan, 1, "request", name, 1, RoundSecret.from_system)
        assert refused is RefusalReason.UNKNOWN_PLAN
    ledger.approve("plan")
    assert ledger.reserve("plan", 1, "request", "other", 1, RoundSecret.from_system) is RefusalReason.UNKNOWN_PLAN
    assert ledger.charges("plan") == []


def test_the_secret_is_on_disk_when_the_charge_is_committed_and_gone_when_the_release_is(
    ledger: Ledger, tmp_path: Path
) -> None:
    reservation = fund(approved(ledger))
    assert secrets_in(tmp_path) == {"plan-1": reservation.secret.value}
    assert rows(tmp_path, "SELECT round, released_at IS NULL FROM charges") == [(1, 1)]
    ledger.record(reservation, b"release")
    assert secrets_in(tmp_path) == {}
    assert rows(tmp_path, "SELECT round, released_at IS NULL FROM charges") == [(1, 0)]


def test_secrets_are_readable_by_the_site_alone(ledger: Ledger, tmp_path: Path) -> None:
    fund(approved(ledger))
    modes = {path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("secrets", "secrets/plan-1")}
    assert modes == {"secrets": 0o700, "secrets/plan-1": 0o600}
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_folder_of_secrets_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    open_ledger(tmp_path).close()
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700


def test_the_same_request_gets_the_same_bytes_also_after_a_restart(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path))
    ledger.record(fund(ledger), b"\0release\xff", "head")
    assert ledger.release("plan", 1, "request") == StoredRelease(b"\0release\xff", "head")
    ledger.close()
    again = open_ledger(tmp_path)
    assert again.release("plan", 1, "request") == StoredRelease(b"\0release\xff", "head")
    assert again.charges("plan") == [(1, "head", 1.0, 8.0, 1)]
    assert [entry.digest for entry in again.plans()] == ["plan"]
    assert again.plan("plan") == replace(again.plans(Decision.APPROVED)[0], statement=STATEMENT)
    again.close()


def test_another_request_for_a_funded_round_is_refused_before_and_after_its_release(ledger: Ledger) -> None:
    reservation = fund(approved(ledger))
    for what_comes_next in (lambda: ledger.record(reservation, b"release"), lambda: None):
        assert ledger.release("plan", 1, "other") is RefusalReason.REQUEST_CHANGED
        refused = ledger.reserve("plan", 1, "other", "head", 1, RoundSecret.from_system)
        assert refused is RefusalReason.REQUEST_CHANGED
        what_comes_next()
    assert len(ledger.charges("plan")) == 1


def test_a_round_before_the_last_funded_one_is_refused_and_not_charged(ledger: Ledger) -> None:
    fund(approved(ledger), round=3)
    assert ledger.release("plan", 2, "request") is RefusalReason.OUT_OF_ORDER
    refused = ledger.reserve("plan", 2, "request", "head", 1, RoundSecret.from_system)
    assert refused is RefusalReason.OUT_OF_ORDER
    assert ledger.release("plan", 4, "request") is None, "rounds may be left out"
    assert [row[0] for row in ledger.charges("plan")] == [3]


def test_an_earlier_round_that_was_funded_can_still_be_finished(ledger: Ledger) -> None:
    first = fund(approved(ledger), round=1)
    fund(ledger, round=2, request="second")
    assert ledger.release("plan", 1, "request") is None
    assert fund(ledger, round=1).secret == first.secret


def test_a_funded_round_gets_the_same_secret_again_and_no_second_charge(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path))
    first = fund(ledger)
    ledger.close()
    again = open_ledger(tmp_path)
    assert fund(again) == first
    assert len(again.charges("plan")) == 1
    again.close()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"torn")], ids=["gone", "torn"])
def test_a_round_whose_secret_is_lost_is_never_executed_again(
    ledger: Ledger, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    fund(approved(ledger))
    damage(tmp_path / "secrets" / "plan-1")
    assert ledger.reserve("plan", 1, "request", "head", 1, RoundSecret.from_system) is RefusalReason.SEED_LOST
    assert len(ledger.charges("plan")) == 1


def test_a_charge_that_is_not_committed_leaves_no_round_behind(ledger: Ledger, tmp_path: Path) -> None:
    def no_entropy() -> RoundSecret:
        raise OSError("the system gave no entropy")

    approved(ledger)
    with pytest.raises(OSError, match="no entropy"):
        ledger.reserve("plan", 1, "request", "head", 1, no_entropy)
    assert ledger.charges("plan") == [] and secrets_in(tmp_path) == {}
    fund(ledger)


def test_a_secret_that_a_crash_left_beside_its_release_is_deleted_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = approved(open_ledger(tmp_path))
    reservation = fund(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(SecretFiles, "delete", lambda *_: None)
        ledger.record(reservation, b"release")
    running = fund(ledger, round=2, request="second")
    assert set(secrets_in(tmp_path)) == {"plan-1", "plan-2"}
    ledger.close()
    again = open_ledger(tmp_path)
    assert secrets_in(tmp_path) == {"plan-2": running.secret.value}, "a round that is not finished keeps its secret"
    assert again.release("plan", 1, "request") == StoredRelease(b"release", "")
    again.close()
