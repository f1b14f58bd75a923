"""What stops a site: strangers' plans, other code, too little noise, changed data, the end of a plan, an older copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from small_sites import encoded, plan_for, policy_for, random_state, request_for, shown, site_for

import client.site
from client.privacy import clock
from client.privacy.ledger import Decision
from client.site import Site
from common.adapted import AdaptedModel
from common.messages import PlanStatus, Refusal, RefusalReason, Release, TrainReply
from common.plan import Plan
from common.sections import LoraSection, PrivacySection
from common.signing import AUDIT_HEAD, SigningKey


def refusal(reply: TrainReply) -> RefusalReason:
    assert isinstance(reply, Refusal)
    return reply.reason


def events(site: Site, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in site.audit.path.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def plan(model: AdaptedModel) -> Plan:
    return plan_for(model)


@pytest.fixture
def site(model: AdaptedModel, tmp_path: Path) -> Site:
    return site_for(tmp_path, model, encoded(model, 12))


# ----------------------------------------------------------------------------------------------------- whose plan it is


def test_a_plan_that_no_pinned_key_signed_is_refused_and_not_kept(site: Site, plan: Plan, model: AdaptedModel) -> None:
    stranger = SigningKey.fresh()
    other = plan_for(model, privacy=PrivacySection(epsilon=9.0))
    unsigned = replace(shown(plan), signature="")
    borrowed = replace(shown(plan), signature=shown(other).signature)
    for request in (unsigned, borrowed, shown(plan, key=stranger)):
        assert site.describe(request).refusal is RefusalReason.SIGNATURE
    assert site.ledger.plans() == []
    assert site.describe(shown(plan)).status is PlanStatus.READY


def test_a_signature_for_another_purpose_is_none(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    key = SigningKey.fresh()
    site = site_for(tmp_path, model, policy=policy_for(model, coordinator_keys=(key.public,)))
    request = replace(shown(plan), signature=key.sign(AUDIT_HEAD, plan.digest().encode()))
    assert site.describe(request).refusal is RefusalReason.SIGNATURE
    assert site.describe(shown(plan, key=key)).status is PlanStatus.READY


def test_without_pinned_keys_no_plan_is_taken(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    site = site_for(tmp_path, model, policy=policy_for(model, coordinator_keys=()))
    assert site.describe(shown(plan)).refusal is RefusalReason.SIGNATURE


def test_a_plan_made_for_other_code_is_refused_even_where_the_relay_runs_the_sites(
    site: Site, model: AdaptedModel
) -> None:
    assert site.describe(shown(plan_for(model, code_digest="1" * 64))).refusal is RefusalReason.CODE_MISMATCH
    assert site.ledger.plans() == []


# ----------------------------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize(
    ("policy", "lora"),
    [
        ({"lora_targets": ()}, {}),
        ({"lora_targets": ("query", "value")}, {}),
        ({"lora_targets": ("attention",)}, {"target_modules": ("query",)}),
        ({"lora_targets": ("query",)}, {"target_modules": ("query", "dense")}),
    ],
)
def test_modules_that_the_site_does_not_name_get_no_adapter(
    model: AdaptedModel, policy: dict[str, Any], lora: dict[str, Any]
) -> None:
    plan = plan_for(model, lora=LoraSection(r=4, alpha=8.0, layers=2, **lora))
    assert policy_for(model, **policy).refusal(plan) is RefusalReason.POLICY


def test_a_plan_whose_noise_would_be_below_the_sites_least_is_refused(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    site = site_for(tmp_path / "one", model)
    privacy = site.describe(shown(plan)).privacy
    assert privacy is not None
    sigma = min(phase.noise_multiplier for phase in privacy.phases)
    for name, least, status in (
        ("two", sigma, PlanStatus.READY),
        ("three", sigma * (1 + 1e-12), PlanStatus.REFUSED),
    ):
        stricter = site_for(tmp_path / name, model, policy=policy_for(model, min_noise_multiplier=least))
        assert stricter.describe(shown(plan)).status is status


# ------------------------------------------------------------------------------------------------------- data that move


def test_data_that_change_during_a_run_end_it_here(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    state = random_state(model)
    before = site_for(tmp_path, model, encoded(model, 12), fingerprint=lambda plan: "before")
    before.describe(shown(plan))
    assert isinstance(before.train(request_for(plan, state)), Release)
    before.ledger.close()
    after = site_for(tmp_path, model, encoded(model, 13), fingerprint=lambda plan: "after")
    assert refusal(after.train(request_for(plan, state, 2))) is RefusalReason.CLOSED
    assert after.describe(shown(plan)).refusal is RefusalReason.CLOSED
    assert after.ledger.plan(plan.digest()).decision is Decision.CLOSED  # type: ignore[union-attr]
    assert events(after, "plan closed")[0]["why"] == "its data were changed"
    after.ledger.close()
    back = site_for(tmp_path, model, encoded(model, 12), fingerprint=lambda plan: "before")
    assert refusal(back.train(request_for(plan, state, 2))) is RefusalReason.CLOSED


def test_what_was_spent_on_a_closed_plan_stays_spent(model: AdaptedModel, plan: Plan, site: Site) -> None:
    site.describe(shown(plan))
    site.train(request_for(plan, random_state(model)))
    reserved, charges = site.ledger.reserved("site"), site.ledger.charges(plan.digest())
    site.ledger.close_plan(plan.digest(), "a person said so")
    assert (site.ledger.reserved("site"), site.ledger.charges(plan.digest())) == (reserved, charges)
    assert refusal(site.train(request_for(plan, random_state(model)))) is RefusalReason.CLOSED


def test_a_plan_ends_when_its_days_are_over(
    model: AdaptedModel, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_for(tmp_path, model, encoded(model, 12), policy_for(model, plan_days=2.0))
    site.describe(shown(plan))
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    monkeypatch.setattr(clock, "system_time", lambda: datetime.now(UTC) + timedelta(days=2, seconds=2))
    assert refusal(site.train(request_for(plan, random_state(model)))) is RefusalReason.CLOSED
    assert [event["why"] for event in events(site, "plan closed")] == ["expired"]
    monkeypatch.undo()  # setting the clock back brings nothing back
    assert refusal(site.train(request_for(plan, random_state(model)))) is RefusalReason.CLOSED


# --------------------------------------------------------------------------------------------------------- older copies


def test_a_release_carries_the_signed_head_of_the_log_and_keeps_it(site: Site, model: AdaptedModel, plan: Plan) -> None:
    site.describe(shown(plan))
    first, again = (site.train(request_for(plan, random_state(model))) for _ in range(2))
    assert isinstance(first, Release) and isinstance(again, Release)
    head = json.loads(first.head)
    assert (head["site"], head["lines"]) == ("north", len(site.audit.path.read_text().splitlines()))
    assert first.head == again.head
    released = events(site, "round released")[0]
    assert released["size"] > 0 and len(released["release"]) == 64


def test_a_head_that_the_log_does_not_hold_blocks_the_site_for_good(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    key = SigningKey.fresh()
    ahead = site_for(tmp_path / "ahead", model, encoded(model, 12), key=key)
    ahead.describe(shown(plan))
    reply = ahead.train(request_for(plan, random_state(model)))
    assert isinstance(reply, Release)

    older = site_for(tmp_path / "older", model, encoded(model, 12), key=key)  # as after a snapshot was put back
    assert older.describe(shown(plan)).status is PlanStatus.READY
    assert older.describe(shown(plan, witness=reply.head)).refusal is RefusalReason.BLOCKED
    assert older.describe(shown(plan)).refusal is RefusalReason.BLOCKED
    assert refusal(older.train(request_for(plan, random_state(model)))) is RefusalReason.BLOCKED
    assert older.ledger.charges(plan.digest()) == []
    older.ledger.close()
    restarted = site_for(tmp_path / "older", model, encoded(model, 12), key=key)
    assert restarted.describe(shown(plan)).refusal is RefusalReason.BLOCKED
    assert len(events(restarted, "site blocked")) == 1


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda head: "",
        lambda head: "nonsense",
        lambda head: head.replace('"lines":', '"lines":9'),
        lambda head: head.replace('"north"', '"south"'),
        lambda head: head[:-3],
    ],
    ids=["none", "nonsense", "longer", "another site's", "cut"],
)
def test_a_head_that_the_site_did_not_sign_blocks_nothing(
    site: Site, model: AdaptedModel, plan: Plan, spoilt: Callable[[str], str]
) -> None:
    site.describe(shown(plan))
    reply = site.train(request_for(plan, random_state(model)))
    assert isinstance(reply, Release)
    assert site.describe(shown(plan, witness=spoilt(reply.head))).status is PlanStatus.READY
    assert site.describe(shown(plan, witness=reply.head)).status is PlanStatus.READY


@pytest.mark.parametrize("known", [True, False], ids=["a release", "a refusal"])
def test_no_answer_comes_before_its_time(
    model: AdaptedModel, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client.site.time, "sleep", slept.append)
    monkeypatch.setattr(client.site.time, "monotonic", lambda: 100.0)
    site = site_for(tmp_path, model, encoded(model, 12), policy_for(model, reply_after=7.5))
    if known:
        site.describe(shown(plan))
    reply = site.train(request_for(plan, random_state(model)))
    assert isinstance(reply, Release if known else Refusal) and slept == [7.5]
