"""Sites of real processes are killed, starved, damaged and misled; afterwards charged still covers released, nothing
was released twice, the audit log is whole, and the site is back by itself or says in one line why not."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comebacks import FIRST, RUN, SECOND, Foreseen, come_back, foresee, newest_head
from kill_points import CHANGED_POLICY, PERSON, POINTS, RELAY
from mortal_sites import KILLED, Life, MortalSite, Parent, can_mount, disk, network_of, write_model
from safetensors.numpy import save_file
from site_books import Auditor, payload_of, tells_all
from site_files import COORDINATOR
from small_sites import request_for, shown

from common.code import code_digest
from common.messages import (
    DescribeRequest,
    Pending,
    PlanStatus,
    Refusal,
    RefusalReason,
    Release,
    TrainRequest,
    WireTensors,
)
from common.plan import Plan
from common.signing import PLAN, SigningKey

NewSite = Callable[..., MortalSite]


@pytest.fixture(scope="module")
def new_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewSite]:
    """``new_site(policy={…})``: a site in a folder of its own, with settings put over the usual ones."""
    folder = tmp_path_factory.mktemp("faults")
    model = write_model(folder / "model")
    network = network_of(model)
    with Parent() as parent:

        def make(**sections: Mapping[str, Any]) -> MortalSite:
            return MortalSite(parent, tmp_path_factory.mktemp("site"), model, network, sections)

        parent.rehearse(make())
        yield make


@pytest.fixture(scope="module")
def foreseen(new_site: NewSite) -> Foreseen:
    """What sites release that nobody kills."""
    return foresee(new_site(), FIRST) | foresee(new_site(), SECOND)


@pytest.fixture
def site(new_site: NewSite) -> MortalSite:
    """A site whose agent has never run."""
    return new_site()


@pytest.fixture
def plan(site: MortalSite) -> Plan:
    """A plan of three rounds."""
    return site.plan(RUN)


# ------------------------------------------------------------------------------------------------------- killed agents


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_a_site_comes_back_by_itself_and_releases_the_same_once(
    point: str, site: MortalSite, foreseen: Foreseen
) -> None:
    come_back(site, point, foreseen)


def test_killed_again_and_again_in_one_round_a_site_still_releases_the_same_once(
    site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    for point in list(POINTS)[-20:]:
        life = site.agent(point=point, entropy=FIRST)
        if life.code is None:  # some places are come by at the start already
            site.describe(plan)
            site.train(plan)
        assert life.end(signal.SIGKILL) == KILLED
        site.books()
    with site.serving(entropy=SECOND):
        assert payload_of(site.release(plan)) == foreseen[FIRST, 1]
    assert site.auditor.books is not None and site.auditor.books.sequence == 3


@pytest.mark.parametrize("point", CHANGED_POLICY)
def test_a_changed_policy_is_told_though_the_agent_was_killed(point: str, site: MortalSite) -> None:
    with site.serving():
        pass
    site.config.write_text(site.config.read_text().replace("max_epsilon = 10.0", "max_epsilon = 9.0"))
    assert site.agent(point=point).end() == KILLED
    for _ in range(2):
        with site.serving():
            pass
    told = {str(entry.details) for entry in site.books(killed=False).trail if entry.event == "policy changed"}
    assert told == {"{'after': '9.0', 'before': '10.0', 'setting': 'policy.max_epsilon'}"}


@pytest.mark.parametrize("decision", ["approve", "reject", "close"])
@pytest.mark.parametrize("point", PERSON)
def test_a_decision_of_a_person_holds_though_the_command_was_killed(
    point: str, decision: str, new_site: NewSite
) -> None:
    site = new_site(policy={"approval": "manual"})
    plan = site.plan(RUN)
    with site.serving():
        described = site.describe(plan)
        assert described is not None and described.status is PlanStatus.WAITING
        assert isinstance(site.train(plan), Pending)
        assert site.command(decision, plan.digest(), point=point).end() == KILLED
        reply = site.train(plan)
        assert isinstance(reply, Release if decision == "approve" else Refusal)
        assert site.command("approve", plan.digest()).end() == 2  # it was decided
        site.describe(site.plan("other"))
    with site.serving():
        pass
    tells_all(site.books(killed=False))


# ------------------------------------------------------------------------------------------------------- killed relays


@pytest.mark.parametrize("point", RELAY)
def test_a_relay_killed_in_the_middle_costs_the_agent_nothing(
    point: str, site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    request = site.folder / "request"
    save_file(site.adapter, request, {"run": RUN, "round": "1", "plan": plan.digest()})
    with site.serving(entropy=FIRST):
        site.describe(plan)
        assert site.parent.run("relay", site.listen, str(request), point=point).end() == KILLED
        for _ in range(2):
            assert payload_of(site.release(plan)) == foreseen[FIRST, 1]
        relay = site.parent.run("relay", site.listen, str(request))
        assert relay.end() == 0 and relay.log == "Release\n", relay.log
        assert payload_of(site.release(plan, 2)) == foreseen[FIRST, 2]
    assert len(site.books(killed=False).charged) == 2


# --------------------------------------------------------------------------------------------------------------- disks


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this system lets nobody mount a disk for a test")


@needs_mounts
def test_on_a_disk_with_ever_more_space_a_round_is_served_once_and_without_a_restart(
    site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    site.state.mkdir(mode=0o700)
    with disk(site.state, 'mount -t tmpfs -o size=1m,mode=700 tmpfs "$at"') as (holder, root):
        site.auditor.state = state = root / site.state.relative_to("/")
        for free in range(0, 1 << 20, 1 << 14):
            _fill(state, free)
            life = site.agent(entropy=FIRST, disk=holder)
            if life.code is None:
                break
            _said(life)
        faults = 0
        for free in range(0, 1 << 20, 4096):
            _fill(state, free)
            described = site.describe(plan)
            reply = site.train(plan) if described is not None else None
            site.books()
            if reply is not None:
                break
            faults += 1
        assert faults > 5 and isinstance(reply, Release) and payload_of(reply) == foreseen[FIRST, 1]
        (state / "filler").unlink()
        assert payload_of(site.release(plan, 2)) == foreseen[FIRST, 2]
        assert life.end(signal.SIGTERM) == 0
        assert len(site.books(killed=False).charged) == 2


def _fill(state: Path, free: int) -> None:
    """Takes all space of a small disk but so many bytes."""
    filler = state / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb") as stream:
        stream.write(bytes(max(0, shutil.disk_usage(state).free - free)))


@needs_mounts
def test_a_read_only_state_stops_the_agent_with_one_line_until_it_can_be_written(
    site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    with site.serving(entropy=FIRST):
        site.describe(plan)
    with disk(site.state, 'mount --bind "$at" "$at"', 'mount -o remount,bind,ro "$at"') as (holder, _):
        assert "write access" in _refusal(site, disk=holder)
    with site.serving(entropy=FIRST):
        assert payload_of(site.release(plan)) == foreseen[FIRST, 1]


def _refusal(site: MortalSite, **mortality: Any) -> str:
    """The one line with which an agent says why it does not start."""
    return _said(site.agent(**mortality))


def _said(life: Life) -> str:
    assert life.code == 2, life.log
    (said,) = [line for line in life.log.splitlines() if "site.trust_relay" not in line]
    assert said.startswith("error: ")
    return said


# -------------------------------------------------------------------------------------------------------------- damage


def _flip(file: Path, at: int, bytes_: int = 64) -> None:
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at : at + bytes_] = bytes(byte ^ 0xFF for byte in content[at : at + bytes_])
    file.write_bytes(content)


DAMAGE: Mapping[str, tuple[str, Callable[[Path], object]]] = {
    "the ledger's header": ("state/ledger.sqlite", lambda file: _flip(file, 0)),
    "a page of a table": ("state/ledger.sqlite", lambda file: _flip(file, 4096)),
    "the ledger's last page": ("state/ledger.sqlite", lambda file: _flip(file, -4096, 4096)),
    "the ledger's end is cut off": ("state/ledger.sqlite", lambda file: file.write_bytes(file.read_bytes()[:-4096])),
    "the ledger is deleted": ("state/ledger.sqlite", Path.unlink),
    "the counter": ("consilium.counter", lambda file: _flip(file, 60, 4)),
    "the counter is deleted": ("consilium.counter", Path.unlink),
    "a line of the audit log": ("state/audit.jsonl", lambda file: _flip(file, 50, 1)),
    "the audit log's end is cut off": (
        "state/audit.jsonl",
        lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:-1])),
    ),
    "the audit log is deleted": ("state/audit.jsonl", Path.unlink),
    "the head of the audit log": ("state/audit.jsonl.head", lambda file: _flip(file, 0)),
    "the site's key": ("state/site.key", lambda file: _flip(file, 40)),
    "the site's key is deleted": ("state/site.key", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_stops_the_agent_with_one_line_and_once_mended_it_goes_on(
    damage: str, site: MortalSite, plan: Plan
) -> None:
    with site.serving():
        site.describe(plan)
        first = site.release(plan)
    name, spoil = DAMAGE[damage]
    file = site.folder / name
    whole = file.read_bytes()
    spoil(file)
    assert str(site.folder) in _refusal(site)
    file.write_bytes(whole)
    file.chmod(0o600)
    with site.serving():
        assert payload_of(site.release(plan)) == payload_of(first)
        site.release(plan, 2)


def test_damaged_activations_change_no_release(site: MortalSite, plan: Plan, foreseen: Foreseen) -> None:
    with site.serving(entropy=FIRST):
        site.describe(plan)
        site.release(plan)
    kept = [file for file in (site.state / "cache").rglob("*") if file.is_file()]
    assert kept
    for at in (0, 4096):
        for file in kept:
            _flip(file, at)
        with site.serving(entropy=FIRST):
            site.release(plan, 2)
    assert all(payload_of(site.auditor.received[RUN, round]) == foreseen[FIRST, round] for round in (1, 2))


@pytest.mark.parametrize("at", [0, 32, 4096])
def test_a_journal_that_was_damaged_after_a_kill_makes_the_ledger_an_older_copy_and_is_refused(
    at: int, site: MortalSite, plan: Plan
) -> None:
    life = site.agent()
    site.describe(plan)
    release = site.release(plan)
    life.end(signal.SIGKILL)
    site.books()
    journal = site.state / "ledger.sqlite-wal"
    whole = journal.read_bytes()
    files = {file: file.read_bytes() for file in site.state.glob("ledger.sqlite*")}
    _flip(journal, at)
    assert "ledger" in _refusal(site)
    for file, content in files.items():
        file.write_bytes(content)
    assert journal.read_bytes() == whole
    with site.serving():
        assert payload_of(site.release(plan)) == payload_of(release)


# ---------------------------------------------------------------------------------------------------- clock, two agents


def test_a_clock_set_back_prolongs_no_plan_and_turns_no_record_back(site: MortalSite, plan: Plan) -> None:
    with site.serving():
        site.describe(plan)
        site.release(plan)
    with site.serving(days=-400):
        site.release(plan, 2)
    with site.serving(days=31):
        assert site.train(plan, 3) == Refusal("north", RefusalReason.CLOSED)
    with site.serving(days=-400):
        assert site.train(plan, 3) == Refusal("north", RefusalReason.CLOSED)
        other = site.plan("other")
        site.describe(other)
        site.release(other)
    times = [entry.time for entry in site.books(killed=False).trail]
    assert times == sorted(times)


def test_a_second_agent_is_refused_with_the_first_ones_number_and_the_first_goes_on(
    site: MortalSite, plan: Plan
) -> None:
    with site.serving() as first:
        site.describe(plan)
        site.release(plan)
        assert f"process {first.process}" in _refusal(site)
        site.release(plan, 2)


# ---------------------------------------------------------------------------------------- replayed, reordered, altered


def _other_bytes(request: TrainRequest) -> TrainRequest:
    return _with(request, {name: array + np.float32(1e-6) for name, array in request.adapter.items()})


def _without_a_tensor(request: TrainRequest) -> TrainRequest:
    return _with(request, dict(list(request.adapter.items())[1:]))


def _flattened(request: TrainRequest) -> TrainRequest:
    return _with(request, {name: array.ravel() for name, array in request.adapter.items()})


def _with(request: TrainRequest, adapter: WireTensors) -> TrainRequest:
    return replace(request, adapter=adapter, adapter_digest="")


ALTERED: Mapping[str, tuple[Callable[[TrainRequest], TrainRequest], RefusalReason]] = {
    "other bytes": (_other_bytes, RefusalReason.REQUEST_CHANGED),
    "a round that was left out": (lambda request: replace(request, round=1), RefusalReason.OUT_OF_ORDER),
    "round 0": (lambda request: replace(request, round=0), RefusalReason.OUT_OF_ORDER),
    "a round beyond the plan": (lambda request: replace(request, round=4), RefusalReason.OUT_OF_ORDER),
    "another plan": (lambda request: replace(request, plan_digest="0" * 64), RefusalReason.UNKNOWN_PLAN),
    "another run": (lambda request: replace(request, run_id="other"), RefusalReason.UNKNOWN_PLAN),
    "another layout": (lambda request: replace(_flattened(request), round=3), RefusalReason.ADAPTER_LAYOUT),
    "a tensor left out": (lambda request: replace(_without_a_tensor(request), round=3), RefusalReason.ADAPTER_MISSING),
}


def test_altered_and_reordered_requests_are_refused_and_cost_nothing_and_replayed_ones_get_the_same(
    site: MortalSite, plan: Plan
) -> None:
    with site.serving():
        site.describe(plan)
        second = site.release(plan, 2)
        spent = site.books(killed=False)
        request = request_for(plan, site.adapter, 2)
        for alter, reason in ALTERED.values():
            for _ in range(2):
                assert site.ask(alter(request)) == Refusal("north", reason)
        assert site.release(plan, 2).head == second.head
        books = site.books(killed=False)
        assert (books.sequence, books.charged, books.stored) == (spent.sequence, spent.charged, spent.stored)
        site.release(plan, 3)


def test_after_a_kill_in_training_only_the_very_same_request_is_served(
    site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    site.agent(point="after the first of two steps of training", entropy=FIRST)
    site.describe(plan)
    assert site.train(plan) is None
    with site.serving(entropy=SECOND):
        altered = _other_bytes(request_for(plan, site.adapter))
        assert site.ask(altered) == Refusal("north", RefusalReason.REQUEST_CHANGED)
        assert payload_of(site.release(plan)) == foreseen[FIRST, 1]


def test_plans_that_are_changed_or_not_signed_are_refused_and_not_kept(site: MortalSite, plan: Plan) -> None:
    other = site.plan("other")
    changed = site.plan(RUN, seed=1)
    question = shown(plan, code_digest())
    signed_by_another = SigningKey.fresh().sign(PLAN, plan.digest().encode())
    refused: list[tuple[DescribeRequest, RefusalReason]] = [
        (replace(question, signature=signed_by_another), RefusalReason.SIGNATURE),
        (replace(question, signature=""), RefusalReason.SIGNATURE),
        (replace(question, signature=shown(other).signature), RefusalReason.SIGNATURE),
        (replace(question, plan=other.canonical()), RefusalReason.SIGNATURE),
        (replace(shown(other, code_digest()), run_id=RUN), RefusalReason.PLAN_CHANGED),
        (shown(changed, code_digest()), RefusalReason.PLAN_CHANGED),
        (replace(question, code_digest="0" * 64), RefusalReason.CODE_MISMATCH),
        (replace(question, plan=" " + question.plan), RefusalReason.UNKNOWN_PLAN),
    ]
    with site.serving():
        assert site.tell(question).status is PlanStatus.READY
        before = site.books(killed=False)
        for altered, reason in refused:
            described = site.tell(altered)
            assert (described.status, described.refusal) == (PlanStatus.REFUSED, reason)
        assert COORDINATOR.public not in str(described)
        after = site.books(killed=False)
        assert (after.plans, after.sequence) == (before.plans, before.sequence)
        site.release(plan)


# ------------------------------------------------------------------------------------------------------ restored copies


@contextmanager
def _put_back(site: MortalSite, plan: Plan, *names: str) -> Iterator[None]:
    """As after a restored backup: these files, or folders, are what they were one round before."""
    with site.serving(entropy=FIRST):
        site.describe(plan)
        site.release(plan)
    older = site.folder / "older"
    for name in names:
        _copy(site.folder / name, older / name)
    with site.serving(entropy=FIRST):
        site.release(plan, 2)
    newest = site.folder / "newest"
    for name in names:
        _copy(site.folder / name, newest / name)
        _copy(older / name, site.folder / name)
    yield
    for name in names:
        _copy(newest / name, site.folder / name)


def _copy(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


@pytest.mark.parametrize(
    "names",
    [["state/ledger.sqlite"], ["state"], ["state/audit.jsonl"], ["state/ledger.sqlite", "state/audit.jsonl"]],
    ids=" and ".join,
)
def test_an_older_copy_is_refused_with_one_line_and_the_newest_goes_on(
    names: list[str], site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    with _put_back(site, plan, *names):
        assert "is an older copy" in _refusal(site)
    with site.serving(entropy=FIRST):
        assert payload_of(site.release(plan, 2)) == foreseen[FIRST, 2]
        assert payload_of(site.release(plan, 3)) == foreseen[FIRST, 3]


@pytest.mark.parametrize("name", ["consilium.counter", "state/secrets"])
def test_older_copies_that_can_do_no_harm_are_overcome(
    name: str, site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    with _put_back(site, plan, name), site.serving(entropy=SECOND):
        assert payload_of(site.release(plan, 2)) == foreseen[FIRST, 2]
        assert payload_of(site.release(plan, 3)) == foreseen[SECOND, 3]


@pytest.mark.parametrize("names", [["state", "consilium.counter"], ["state/audit.jsonl", "state/audit.jsonl.head"]])
def test_a_copy_with_all_its_witnesses_is_told_by_a_head_that_the_coordinator_shows(
    names: list[str], site: MortalSite, plan: Plan
) -> None:
    with _put_back(site, plan, *names):
        head = newest_head(site)
        for _ in range(2):
            with _serving_a_copy(site):
                described = site.describe(plan, witness=head)
                assert described is not None and described.refusal is RefusalReason.BLOCKED
                assert site.train(plan, 2) == Refusal("north", RefusalReason.BLOCKED)
        done = site.command("unblock", "--this-is-the-newest-copy", "--why", "a test")
        assert done.end() == 0, done.log
        with _serving_a_copy(site):
            assert site.train(plan, 2) == Refusal("north", RefusalReason.CLOSED)
            other = site.plan("other")
            site.describe(other)
            assert isinstance(site.ask(request_for(other, site.adapter)), Release)


def test_a_whole_machine_that_was_put_back_is_not_told_without_a_head(
    site: MortalSite, plan: Plan, foreseen: Foreseen
) -> None:
    """Nobody can: this is the limit that docs/reliability.md states, and why coordinators show the last head."""
    with _put_back(site, plan, "state", "consilium.counter"), _serving_a_copy(site, entropy=SECOND):
        assert payload_of(site.release(plan, 2)) == foreseen[SECOND, 2] != foreseen[FIRST, 2]


@contextmanager
def _serving_a_copy(site: MortalSite, **mortality: Any) -> Iterator[None]:
    """An agent on an older copy, whose books do not hold what was received before."""
    auditor = site.auditor
    site.auditor = Auditor(auditor.state, auditor.counter)
    life = site.agent(**mortality)
    yield
    assert life.end(signal.SIGTERM) == 0, life.log
    site.auditor = auditor
