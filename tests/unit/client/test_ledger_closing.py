"""How a plan ends (closed, expired, blocked, with other data), whose budget it was, and what time it is meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small_ledgers import COST, SEGMENTS, SITE, STATEMENT, approved, fund, open_ledger, receive, rows, secrets_in

from client.privacy import clock
from client.privacy.ledger import Decision, Ledger, Population
from client.privacy.sampling import RoundSecret
from common.errors import LedgerError
from common.messages import PhaseStatement, RefusalReason
from common.privacy.accounting import Segment, filter_epsilon

PAYLOAD = b"what a site has released " * 400


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path)
    yield opened
    opened.close()


def served(ledger: Ledger) -> Ledger:
    """One round is released, another runs."""
    ledger.record(fund(approved(ledger), 1), PAYLOAD)
    fund(ledger, 2, "second")
    return ledger


def on_disk(folder: Path, text: bytes) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.is_file() and text in file.read_bytes()]


# -------------------------------------------------------------------------------------------------------------- closing


def test_a_closed_plan_serves_nothing_and_gives_nothing_back(ledger: Ledger) -> None:
    served(ledger)
    before = (ledger.reserved("site"), ledger.charges("plan"), ledger.balance("site"))
    ledger.close_plan("plan", "the patients withdrew")
    entry = ledger.plan("plan")
    assert entry is not None
    assert (entry.decision, entry.refusal, entry.closed_because) == (
        Decision.CLOSED,
        RefusalReason.CLOSED,
        "the patients withdrew",
    )
    for round, request in ((1, "request"), (2, "second"), (3, "third")):
        assert ledger.release("plan", round, request) is RefusalReason.CLOSED
        refused = ledger.reserve("plan", round, request, "head", 1, RoundSecret.from_system)
        assert refused is RefusalReason.CLOSED
    assert (ledger.reserved("site"), ledger.charges("plan"), ledger.balance("site")) == before


def test_nothing_of_a_closed_plans_releases_and_secrets_stays_on_the_disk(ledger: Ledger, tmp_path: Path) -> None:
    receive(served(ledger), "other")
    ledger.approve("other")
    kept = fund(ledger, plan="other")
    assert on_disk(tmp_path, PAYLOAD[:100]) and set(secrets_in(tmp_path)) == {"plan-2", "other-1"}
    ledger.close_plan("plan", "a test")
    assert on_disk(tmp_path, PAYLOAD[:100]) == []
    assert secrets_in(tmp_path) == {"other-1": kept.secret.value}
    assert rows(tmp_path, "SELECT COUNT(*) FROM charges WHERE plan='plan' AND released_at IS NOT NULL") == [(1,)]


def test_a_plan_closed_while_it_is_trained_is_not_released(ledger: Ledger, tmp_path: Path) -> None:
    running = fund(approved(ledger))
    with closing(Ledger(tmp_path)) as person:
        person.close_plan("plan", "stop")
    with pytest.raises(LedgerError, match="plan plan, round 1: is not released, since meanwhile it is closed"):
        ledger.record(running, PAYLOAD)
    assert rows(tmp_path, "SELECT * FROM releases") == [] and secrets_in(tmp_path) == {}


def test_secrets_that_a_crash_left_of_a_closed_plan_are_deleted_at_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(served(open_ledger(tmp_path))) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "_forget", lambda *_: None)
            ledger.close_plan("plan", "a test")
        assert set(secrets_in(tmp_path)) == {"plan-2"}
    Ledger(tmp_path).close()
    assert secrets_in(tmp_path) == {}


def test_a_waiting_plan_can_be_closed_and_is_then_not_approved(ledger: Ledger) -> None:
    receive(ledger)
    ledger.close_plan("plan", "nobody wants it")
    with pytest.raises(LedgerError, match="is not waiting for a decision"):
        ledger.approve("plan")
    assert ledger.reserved("site") == []


def test_what_was_never_shown_or_was_refused_cannot_be_closed(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="was never shown to this site; see 'consilium site ledger'"):
        ledger.close_plan("plan", "a test")
    receive(ledger)
    ledger.reject("plan")
    with pytest.raises(LedgerError, match=r"was refused \(policy\), so there is nothing to close"):
        ledger.close_plan("plan", "a test")
    entry = ledger.plan("plan")
    assert entry is not None and entry.decision is Decision.REFUSED


# ----------------------------------------------------------------------------------------------------- expiry and clock


class Time:
    """The system's clocks, in a test's hands. What nobody can set goes on by what passes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.system, self.passed = datetime(2030, 1, 1, tzinfo=UTC), 0.0
        patch.setattr(clock, "system_time", lambda: self.system)
        patch.setattr(clock, "monotonic_time", lambda: self.passed)

    def passes(self, **time: float) -> None:
        self.system += timedelta(**time)
        self.passed += timedelta(**time).total_seconds()

    def is_set(self, **by: float) -> None:
        self.system += timedelta(**by)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_plans_expire_by_their_decision_or_else_by_their_receipt(time: Time, tmp_path: Path) -> None:
    with closing(open_ledger(tmp_path, limit=100.0)) as ledger:
        for digest in ("undecided", "early", "late", "refused"):
            receive(ledger, digest)
        ledger.reject("refused")
        ledger.approve("early")
        time.passes(days=2)
        ledger.approve("late")
        time.passes(days=8)
        assert ledger.expire(10.0) == []
        time.passes(seconds=1)
        assert ledger.expire(10.0) == ["undecided", "early"]
        assert ledger.expire(10.0) == []
        time.passes(days=2)
        assert ledger.expire(10.0) == ["late"]
        assert {entry.digest: entry.decision for entry in ledger.plans()} == {
            "undecided": Decision.CLOSED,
            "early": Decision.CLOSED,
            "late": Decision.CLOSED,
            "refused": Decision.REFUSED,
        }
        assert len(ledger.reserved("site")) == 4, "two plans of two phases"


def test_an_expired_plan_keeps_none_of_its_releases(time: Time, tmp_path: Path) -> None:
    with closing(served(open_ledger(tmp_path))) as ledger:
        time.passes(days=31)
        assert ledger.expire(30) == ["plan"]
        assert on_disk(tmp_path, PAYLOAD[:100]) == [] and secrets_in(tmp_path) == {}
        entry = ledger.plan("plan")
        assert entry is not None and entry.closed_because == "expired"


def test_a_clock_set_back_does_not_delay_an_expiry(time: Time, tmp_path: Path) -> None:
    with closing(approved(open_ledger(tmp_path))) as ledger:
        time.passes(days=5)
        time.is_set(days=-3000)
        time.passes(days=4.99)
        assert ledger.expire(10) == []
        time.passes(days=0.02)
        assert ledger.expire(10) == ["plan"]
        assert ledger.clock_ahead == timedelta(days=3000)


def test_an_agent_that_is_started_again_goes_on_from_what_the_ledger_knows(time: Time, tmp_path: Path) -> None:
    with closing(approved(open_ledger(tmp_path))) as ledger:
        time.passes(days=5)
        assert ledger.expire(10) == []  # an agent asks with each request
        time.passes(minutes=59)
        assert ledger.expire(10) == []
    time.is_set(days=-3000)
    with closing(Ledger(tmp_path)) as again:
        time.passes(days=5, minutes=1)
        assert again.expire(10) == ["plan"], "no more than an hour was lost"


def test_what_has_expired_stays_so_when_the_clock_is_set_back(time: Time, tmp_path: Path) -> None:
    with closing(served(open_ledger(tmp_path))) as ledger:
        time.passes(days=11)
        assert ledger.expire(10) == ["plan"]
    time.is_set(days=-3000)
    with closing(Ledger(tmp_path)) as again:
        assert again.release("plan", 1, "request") is RefusalReason.CLOSED
        receive(again, "later")
        assert [entry.received_at for entry in again.plans()] == [
            "2030-01-01T00:00:00+00:00",
            "2030-01-12T00:00:00+00:00",
        ]


def test_a_clock_set_forward_is_believed_and_shows_once_it_is_set_right(time: Time, tmp_path: Path) -> None:
    with closing(approved(open_ledger(tmp_path))) as ledger:
        assert ledger.clock_ahead == timedelta(0)
        time.is_set(days=400)
        assert ledger.expire(30) == ["plan"]
        time.is_set(days=-400)
        assert ledger.clock_ahead == timedelta(days=400)
    with closing(Ledger(tmp_path)) as again:
        assert again.clock_ahead == timedelta(days=400)


# ------------------------------------------------------------------------------------------------------------- blocking


def test_a_blocked_site_approves_funds_stores_and_sends_nothing(tmp_path: Path) -> None:
    with closing(served(open_ledger(tmp_path))) as ledger:
        running = fund(ledger, 2, "second")
        receive(ledger, "second")
        assert ledger.blocked is None
        ledger.block("somebody showed a newer head")
        ledger.block("a later reason")
    with closing(Ledger(tmp_path)) as again:
        assert again.blocked == "somebody showed a newer head"
        assert again.release("plan", 1, "request") is RefusalReason.BLOCKED
        refused = again.reserve("plan", 3, "third", "head", 1, RoundSecret.from_system)
        assert refused is RefusalReason.BLOCKED
        with pytest.raises(LedgerError, match="nothing is approved while the site is blocked"):
            again.approve("second")
        with pytest.raises(LedgerError, match="is not released, since meanwhile it is blocked"):
            again.record(running, PAYLOAD)
        assert set(secrets_in(tmp_path)) == {"plan-2"} and len(again.charges("plan")) == 2
        again.reject("second")


def test_unblocking_ends_the_plans_that_an_older_copy_may_have_forgotten_rounds_of(ledger: Ledger) -> None:
    receive(served(ledger), "waiting")
    ledger.block("somebody showed a newer head")
    assert ledger.unblock("looked into it") == ["plan", "waiting"]
    assert ledger.blocked is None and ledger.reserved("site") == SEGMENTS
    assert ledger.release("plan", 1, "request") is RefusalReason.CLOSED
    fund(approved(ledger, "new"), plan="new")


# -------------------------------------------------------------------------------------------- data, populations, budget


def test_a_plan_is_bound_to_the_data_it_began_with(tmp_path: Path) -> None:
    with closing(approved(open_ledger(tmp_path))) as ledger:
        assert ledger.same_data("plan", "the rows")
    with closing(Ledger(tmp_path)) as again:
        assert again.same_data("plan", "the rows")
        assert not again.same_data("plan", "other rows") and not again.same_data("plan", "")
        with pytest.raises(LedgerError, match="was never shown"):
            again.same_data("unknown", "the rows")


def test_data_without_a_fingerprint_are_not_those_of_any_other(ledger: Ledger) -> None:
    approved(ledger)
    assert ledger.same_data("plan", "") and not ledger.same_data("plan", "the rows")


def test_a_data_set_cannot_be_moved_to_a_fresh_budget(tmp_path: Path) -> None:
    other = Population("other", "patient", 70, 1.0, 1e-6)
    with closing(open_ledger(tmp_path)) as ledger:
        ledger.bind_data("notes", "site")
    with closing(open_ledger(tmp_path)) as again:
        again.declare(other)
        again.bind_data("notes", "site")
        with pytest.raises(
            LedgerError, match=r"data\.notes\.population = 'other': .* charged to 'site' from the begin"
        ):
            again.bind_data("notes", "other")
        with pytest.raises(LedgerError, match="population 'nobody': was never declared"):
            again.bind_data("images", "nobody")
        assert again.populations() == [SITE, other]


def test_each_population_pays_for_its_own_plans_alone(ledger: Ledger) -> None:
    ledger.declare(Population("other", "example", 70, COST * 1.05, 1e-5))
    approved(ledger)
    for digest, decision in (("first", Decision.APPROVED), ("second", Decision.REFUSED)):
        ledger.receive(digest, digest, "{}", "other", STATEMENT, None)
        assert ledger.approve(digest) is decision
    assert ledger.reserved("site") == ledger.reserved("other") == SEGMENTS


def test_the_balance_is_the_filter_over_what_was_executed_and_over_all_that_was_approved(ledger: Ledger) -> None:
    empty = ledger.balance("site")
    assert (empty.limit, empty.delta, empty.spent, empty.reserved, empty.left) == (4.0, 1e-5, 0.0, 0.0, 4.0)
    assert empty.after(STATEMENT) == COST
    fund(approved(ledger), 1)
    fund(ledger, 11, "lora round", "lora")
    balance = ledger.balance("site")
    assert balance.spent == filter_epsilon([Segment(1.0, 8.0, 1), Segment(0.1, 2.0, 1)], 1e-5)
    assert balance.spent < balance.reserved == COST and balance.left == 4.0 - COST
    assert balance.after(STATEMENT) == filter_epsilon(SEGMENTS * 2, 1e-5) < 2 * COST
    free = replace(STATEMENT, epsilon=None, phases=(PhaseStatement("head", 1.0, 0.0, 1.0, 10),))
    assert balance.after(free) == COST
    ledger.declare(replace(SITE, lifetime_epsilon=COST / 2))
    assert ledger.balance("site").left == 0.0
    with pytest.raises(LedgerError, match="population 'other': was never declared"):
        ledger.balance("other")


def test_a_plan_is_kept_with_its_signature(ledger: Ledger) -> None:
    ledger.receive("plan", "run", "{}", "site", None, RefusalReason.POLICY, signature="c2lnbmVk")
    entry = ledger.plan_of_run("run")
    assert entry is not None and (entry.signature, entry.decided_at) == ("c2lnbmVk", None)
    assert ledger.release("plan", 1, "request") is None, "it is for the caller to know that it is refused"
