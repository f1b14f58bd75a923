"""The ledger: charge before spend, nothing refunded, one release per reserved round, across crashes and restarts."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from small_sites import (
    classifier,
    encoded,
    flat,
    phase,
    plan_for,
    policy_for,
    random_state,
    request_for,
    shown,
    site_for,
)

import client.site
from client.privacy.ledger import Decision, Ledger, Population, Reservation
from client.privacy.sampling import RoundSecret
from client.privacy.secret_files import SecretFiles
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.errors import LedgerError
from common.messages import PhaseStatement, PrivacyStatement, RefusalReason, Release
from common.privacy.accounting import Segment, filter_epsilon

REPOSITORY = Path(__file__).parents[3]
SITE = Population("site", "example", 40, 4.0, 1e-5)
STATEMENT = PrivacyStatement(
    epsilon=2.0,
    delta=1e-5,
    unit="example",
    neighbouring="add-remove-one",
    accountant="prv",
    steps=30,
    phases=(PhaseStatement("head", 1.0, 8.0, 1.0, 10), PhaseStatement("lora", 0.1, 2.0, 0.5, 20)),
)
COST = filter_epsilon([Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)], 1e-5)


def open_ledger(folder: Path, limit: float = 4.0, **settings: Any) -> Ledger:
    ledger = Ledger(folder, **settings)
    ledger.declare(replace(SITE, lifetime_epsilon=limit))
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path)
    yield opened
    opened.close()


def receive(ledger: Ledger, digest: str, statement: PrivacyStatement | None = STATEMENT) -> None:
    ledger.receive(digest, f"run of {digest}", "{}", "site", statement, None)


def approved(ledger: Ledger, digest: str = "plan") -> Ledger:
    receive(ledger, digest)
    assert ledger.approve(digest) is Decision.APPROVED
    return ledger


def fund(ledger: Ledger, round: int = 1, request: str = "request", phase: str = "head") -> Reservation:
    reservation = ledger.reserve("plan", round, request, phase, 1, RoundSecret.from_system)
    assert isinstance(reservation, Reservation)
    return reservation


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What another process would read: committed rows only."""
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def secrets_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "secrets").iterdir()}


# ------------------------------------------------------------------------------------------------------------ approval


def test_approving_reserves_the_whole_cost_of_every_phase(ledger: Ledger, tmp_path: Path) -> None:
    approved(ledger)
    assert rows(tmp_path, "SELECT * FROM reservations") == [
        ("plan", 0, "head", 1.0, 8.0, 1.0, 10),
        ("plan", 1, "lora", 0.1, 2.0, 0.5, 20),
    ]
    assert ledger.reserved("site") == [Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)]


def test_a_plan_beyond_the_lifetime_limit_is_refused_and_reserves_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, limit=COST * 0.99)
    receive(ledger, "plan")
    assert ledger.approve("plan") is Decision.REFUSED
    entry = ledger.plan("plan")
    assert entry is not None and entry.refusal is RefusalReason.BUDGET
    assert ledger.reserved("site") == []
    ledger.close()


def test_what_was_reserved_before_counts_against_the_limit(tmp_path: Path) -> None:
    both = [Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)] * 2
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
    assert again.reserved("site") == [Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)]
    again.close()


def test_a_plan_is_decided_once(ledger: Ledger) -> None:
    approved(ledger)
    for decide in (ledger.approve, ledger.reject):
        with pytest.raises(LedgerError, match="is not waiting for a decision"):
            decide("plan")
        with pytest.raises(LedgerError, match="is not waiting for a decision"):
            decide("unknown")
    assert ledger.reserved("site") == [Segment(1.0, 8.0, 10), Segment(0.1, 2.0, 20)]


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
    ledger.record(fund(ledger), b"\0release\xff")
    assert ledger.release("plan", 1, "request") == b"\0release\xff"
    ledger.close()
    again = open_ledger(tmp_path)
    assert again.release("plan", 1, "request") == b"\0release\xff"
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
    assert again.release("plan", 1, "request") == b"release"
    again.close()


# ---------------------------------------------------------------------------------------------------------------- file


def test_writes_are_on_disk_before_anything_goes_on(ledger: Ledger) -> None:
    with ledger._connection() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


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


def test_a_ledger_of_a_newer_version_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with ledger._transaction() as db:
        db.execute("UPDATE meta SET value='2' WHERE key='schema_version'")
    with pytest.raises(LedgerError, match=r"schema_version 2 is newer .* \(1\); update it"):
        Ledger(tmp_path)


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, but a long enough line of text" * 30)
    with pytest.raises(LedgerError, match=r"cannot be used .*; do not delete it, and put no older copy in its place"):
        Ledger(tmp_path)
    assert (tmp_path / "ledger.sqlite").read_bytes().startswith(b"not a database")


def test_a_ledger_that_is_closed_between_uses_does_the_same(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path, keep_open=False))
    ledger.record(fund(ledger), b"release")
    assert ledger._open is None
    opened = [Path(file.path) for file in psutil.Process().open_files()]
    assert not [file for file in opened if file.is_relative_to(tmp_path.resolve())]
    assert ledger.release("plan", 1, "request") == b"release"
    assert [entry.digest for entry in ledger.plans(Decision.APPROVED)] == ["plan"]
    assert secrets_in(tmp_path) == {}


# ------------------------------------------------------------------------------------------- through the site's rounds


def test_no_gradient_is_computed_before_charge_and_secret_are_stored(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model)
    site = site_for(tmp_path, model, encoded(model, 8))
    site.describe(shown(plan))
    seen = []
    real = client.site.train_round

    def watched(*arguments: Any, **settings: Any) -> AdapterState:
        (charge,) = rows(tmp_path, "SELECT round, phase, sample_rate, steps, released_at FROM charges")
        seen.append((charge, [len(value) for value in secrets_in(tmp_path).values()]))
        return real(*arguments, **settings)

    monkeypatch.setattr(client.site, "train_round", watched)
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    assert seen == [((1, "lora", 0.25, 2, None), [32])]
    assert secrets_in(tmp_path) == {}


def test_after_a_crash_in_training_the_same_release_is_made_at_no_further_charge(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, items = plan_for(model), encoded(model, 20)
    request = request_for(plan, random_state(model))
    site = site_for(tmp_path / "a", model, items)
    site.describe(shown(plan))
    with monkeypatch.context() as patch:
        patch.setattr(client.site, "train_round", _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            site.train(request)
    (secret,) = secrets_in(tmp_path / "a").values()
    site.ledger.close()

    restarted = site_for(tmp_path / "a", model, items)
    release = restarted.train(request)
    assert isinstance(release, Release)
    assert len(restarted.ledger.charges(plan.digest())) == 1
    _same_update(release, _uninterrupted(tmp_path / "b", model, secret, items))
    again = restarted.train(request)
    assert isinstance(again, Release)
    _same_update(release, again)


def _power_cut(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")


def _uninterrupted(folder: Path, model: AdaptedModel, secret: bytes, items: Any) -> Release:
    """The release of a site that happens to draw the same secret and never stops."""
    site = site_for(folder, model, items)
    site._fresh_secret = lambda round: RoundSecret(secret)  # type: ignore[method-assign]
    plan = plan_for(model)
    site.describe(shown(plan))
    release = site.train(request_for(plan, random_state(model)))
    assert isinstance(release, Release)
    return release


def _same_update(found: Release, expected: Release) -> None:
    assert np.array_equal(flat(found.update), flat(expected.update))
    assert {name: array.tobytes() for name, array in found.update.items()} == {
        name: array.tobytes() for name, array in expected.update.items()
    }


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.append("tests/privacy")
import client.site
from small_sites import classifier, encoded, plan_for, random_state, request_for, shown, site_for
model = classifier(Path(sys.argv[1]))
plan = plan_for(model)
site = site_for(Path(sys.argv[2]), model, encoded(model, 20), durable=True)
real = client.site.train_round
def killed(*arguments, **settings):
    real(*arguments, **settings, step_done=lambda: os.kill(os.getpid(), signal.SIGKILL))
client.site.train_round = killed
site.describe(shown(plan))
site.train(request_for(plan, random_state(model)))
"""


def test_after_a_kill_in_mid_round_the_same_release_is_made_at_no_further_charge(
    model: AdaptedModel, tiny_bert: Path, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tiny_bert), str(tmp_path)], cwd=REPOSITORY, timeout=120)
    assert killed.returncode == -9
    plan, items = plan_for(model), encoded(model, 20)
    (secret,) = secrets_in(tmp_path).values()
    assert rows(tmp_path, "SELECT round, released_at FROM charges") == [(1, None)]

    site = site_for(tmp_path, model, items)
    release = site.train(request_for(plan, random_state(model)))
    assert isinstance(release, Release)
    assert [row[0] for row in site.ledger.charges(plan.digest())] == [1]
    assert secrets_in(tmp_path) == {}
    _same_update(release, _uninterrupted(tmp_path / "b", model, secret, items))


def test_a_site_whose_secret_was_lost_refuses_the_round_and_goes_on_with_the_next(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model)
    site = site_for(tmp_path, model, encoded(model, 8))
    site.describe(shown(plan))
    with monkeypatch.context() as patch:
        patch.setattr(client.site, "train_round", _power_cut)
        with pytest.raises(RuntimeError):
            site.train(request_for(plan, random_state(model)))
    for file in (tmp_path / "secrets").iterdir():
        file.unlink()
    refusal = site.train(request_for(plan, random_state(model)))
    assert getattr(refusal, "reason", None) is RefusalReason.SEED_LOST
    assert isinstance(site.train(request_for(plan, random_state(model), round=2)), Release)


def test_the_lifetime_budget_ends_with_the_plan_that_does_not_fit_any_more(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    policy = policy_for(model, lifetime_epsilon=12.0, max_epsilon=8.0)
    site = site_for(tmp_path, model, policy=policy)
    phases = [phase(rounds=1, steps=1)]
    refusals = [site.describe(shown(plan_for(model, phases, run_id=run))).refusal for run in ("a", "b", "c")]
    assert refusals[0] is None and refusals[-1] is RefusalReason.BUDGET
