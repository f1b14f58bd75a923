"""What a site answers to a plan and to a round."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from torch import nn

from client.audit_log import AuditLog
from client.privacy.ledger import Decision, Ledger
from client.site import Site
from common.adapted import AdaptedModel
from common.examples import Examples
from common.messages import (
    DescribeRequest,
    Pending,
    PlanStatus,
    Refusal,
    RefusalReason,
    Release,
    TrainReply,
    TrainRequest,
)
from common.plan import Plan
from common.sections import PrivacySection
from common.tensor_groups import layer_of


def reason(reply: TrainReply) -> RefusalReason:
    assert isinstance(reply, Refusal)
    return reply.reason


def no_data() -> Examples:
    raise AssertionError("nothing but training may look at the data")


@pytest.fixture
def plan(model: AdaptedModel) -> Plan:
    return plan_for(model)


@pytest.fixture
def site(model: AdaptedModel, tmp_path: Path) -> Site:
    return site_for(tmp_path, model, encoded(model, 12))


@pytest.fixture
def ready(site: Site, plan: Plan) -> Site:
    assert site.describe(shown(plan)).status is PlanStatus.READY
    return site


def events(site: Site) -> list[str]:
    return [json.loads(line)["event"] for line in site.audit.path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ describe


def test_a_welcome_plan_is_approved_and_its_cost_stated(site: Site, plan: Plan) -> None:
    description = site.describe(shown(plan))
    assert (description.site, description.status, description.refusal) == ("north", PlanStatus.READY, None)
    assert description.public_size == 40
    assert description.privacy is not None and description.privacy.epsilon is not None
    assert 7.9 < description.privacy.epsilon <= 8.0
    assert events(site) == ["plan received", "plan decided"]


def test_asking_again_answers_the_same_and_charges_once(ready: Site, plan: Plan) -> None:
    reserved = ready.ledger.reserved("site")
    assert ready.describe(shown(plan)) == ready.describe(shown(plan))
    assert ready.ledger.reserved("site") == reserved
    assert events(ready) == ["plan received", "plan decided"]


def _without_the_code(plan: Plan) -> DescribeRequest:
    return shown(plan, code_digest="1" * 64)


def _not_json(plan: Plan) -> DescribeRequest:
    return DescribeRequest(plan.run_id, "{", "0" * 64)


def _not_canonical(plan: Plan) -> DescribeRequest:
    return DescribeRequest(plan.run_id, plan.canonical() + " ", "0" * 64)


def _newer(plan: Plan) -> DescribeRequest:
    tables = {**json.loads(plan.canonical()), "schema_version": 2}
    return DescribeRequest(plan.run_id, json.dumps(tables, sort_keys=True, separators=(",", ":")), "0" * 64)


def _one_name_twice(plan: Plan) -> DescribeRequest:
    tables = json.loads(plan.canonical())
    tables["phases"] *= 2
    return DescribeRequest(plan.run_id, json.dumps(tables, sort_keys=True, separators=(",", ":")), "0" * 64)


def _of_another_run(plan: Plan) -> DescribeRequest:
    return replace(shown(plan), run_id="other")


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        (_without_the_code, RefusalReason.CODE_MISMATCH),
        (_not_json, RefusalReason.UNKNOWN_PLAN),
        (_not_canonical, RefusalReason.UNKNOWN_PLAN),
        (_newer, RefusalReason.UNKNOWN_PLAN),
        (_one_name_twice, RefusalReason.UNKNOWN_PLAN),
        (_of_another_run, RefusalReason.PLAN_CHANGED),
    ],
)
def test_what_is_not_this_runs_plan_is_refused_and_leaves_nothing_behind(
    site: Site, plan: Plan, request_of: Callable[[Plan], DescribeRequest], expected: RefusalReason
) -> None:
    description = site.describe(request_of(plan))
    assert (description.status, description.refusal) == (PlanStatus.REFUSED, expected)
    assert description.privacy is None
    assert site.ledger.plans() == []


def test_another_plan_under_a_known_run_is_refused(ready: Site, model: AdaptedModel, plan: Plan) -> None:
    changed = plan_for(model, [phase(rounds=4)])
    assert ready.describe(shown(changed)).refusal is RefusalReason.PLAN_CHANGED
    assert reason(ready.train(request_for(changed, random_state(model)))) is RefusalReason.UNKNOWN_PLAN
    assert ready.describe(shown(plan)).status is PlanStatus.READY


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"max_epsilon": 7.0}, RefusalReason.POLICY),
        ({"lifetime_epsilon": 7.0}, RefusalReason.BUDGET),
        ({"public_size": 3}, RefusalReason.TOO_SMALL),
    ],
)
def test_a_refused_plan_stays_refused_for_the_same_reason(
    model: AdaptedModel, plan: Plan, tmp_path: Path, policy: dict[str, Any], expected: RefusalReason
) -> None:
    site = site_for(tmp_path, model, no_data, policy_for(model, **policy))
    for _ in range(2):
        assert site.describe(shown(plan)).refusal is expected
        assert reason(site.train(request_for(plan, random_state(model)))) is expected
    assert site.ledger.reserved("site") == []


def test_a_target_that_no_noise_reaches_is_against_the_policy(model: AdaptedModel, site: Site) -> None:
    plan = plan_for(model, privacy=PrivacySection(epsilon=0.001))
    assert site.describe(shown(plan)).refusal is RefusalReason.POLICY


def test_with_fixed_keys_the_site_claims_no_epsilon(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    site = site_for(tmp_path, model, fixed_seed=1, claims_epsilon=False)
    privacy = site.describe(shown(plan)).privacy
    assert privacy is not None and privacy.epsilon is None and privacy.phases[0].noise_multiplier > 0


def test_without_a_mechanism_a_site_that_allows_it_trains_and_claims_nothing(
    model: AdaptedModel, tmp_path: Path
) -> None:
    plan = plan_for(model, privacy=PrivacySection(mechanism="none", epsilon=None))
    site = site_for(tmp_path, model, encoded(model, 12), policy_for(model, allow_no_privacy=True))
    privacy = site.describe(shown(plan)).privacy
    assert privacy is not None and (privacy.epsilon, privacy.delta) == (None, None)
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)


def test_a_plan_received_before_a_crash_is_decided_when_it_is_shown_again(
    site: Site, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: str) -> Decision:
        raise RuntimeError("killed between receiving and deciding")

    with monkeypatch.context() as patch:
        patch.setattr(site.ledger, "approve", killed)
        with pytest.raises(RuntimeError):
            site.describe(shown(plan))
    assert site.describe(shown(plan)).status is PlanStatus.READY
    assert events(site) == ["plan received", "plan decided"]


# ----------------------------------------------------------------------------------------------------- manual approval


def test_a_plan_waits_for_a_person_and_then_runs(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    site = site_for(tmp_path, model, encoded(model, 12), policy_for(model, approval="manual"))
    description = site.describe(shown(plan))
    assert (description.status, description.privacy) == (PlanStatus.WAITING, None)
    assert site.train(request_for(plan, random_state(model))) == Pending("north")
    assert site.ledger.charges(plan.digest()) == []

    person = Ledger(tmp_path)  # another process: consilium site approve
    assert person.approve(plan.digest()) is Decision.APPROVED
    AuditLog(tmp_path / "audit.jsonl").append("plan decided", plan=plan.digest(), by="person")
    person.close()
    assert site.describe(shown(plan)).status is PlanStatus.READY
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    AuditLog(site.audit.path)
    assert events(site) == ["plan received", "plan decided", "round reserved", "round released"]


def test_a_plan_that_a_person_rejects_is_refused(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    site = site_for(tmp_path, model, no_data, policy_for(model, approval="manual"))
    site.describe(shown(plan))
    site.ledger.reject(plan.digest())
    assert site.describe(shown(plan)).refusal is RefusalReason.POLICY
    assert reason(site.train(request_for(plan, random_state(model)))) is RefusalReason.POLICY


def test_waiting_plans_are_decided_by_the_policy_of_the_day(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    waiting = site_for(tmp_path, model, no_data, policy_for(model, approval="manual"))
    waiting.describe(shown(plan))
    stricter = site_for(tmp_path, model, no_data, policy_for(model, max_epsilon=1.0))
    assert stricter.describe(shown(plan)).refusal is RefusalReason.POLICY
    noisier = site_for(tmp_path, model, no_data, policy_for(model, min_noise_multiplier=50.0))
    assert noisier.describe(shown(plan)).refusal is RefusalReason.POLICY
    automatic = site_for(tmp_path, model, no_data)
    assert automatic.describe(shown(plan)).status is PlanStatus.READY


# --------------------------------------------------------------------------------------------------------------- train


def test_a_round_releases_exactly_the_tensors_it_trains(model: AdaptedModel, tmp_path: Path) -> None:
    phases = [
        phase("head", rounds=1, train=("head",)),
        phase("lora", rounds=1, train=("lora",)),
        phase("both", rounds=1, train=("head", "lora"), algorithm="fedit", layers=1),
    ]
    plan = plan_for(model, phases)
    site = site_for(tmp_path, model, encoded(model, 12))
    site.describe(shown(plan))
    sent = []
    for round in (1, 2, 3):
        reply = site.train(request_for(plan, random_state(model), round))
        assert isinstance(reply, Release)
        assert (reply.site, reply.run_id, reply.round) == ("north", "run", round)
        assert reply.request_digest == request_for(plan, random_state(model), round).digest()
        sent.append({(model.group_of(name), layer_of(name)) for name in reply.update})
    assert sent == [
        {("head", None)},
        {("B", 2), ("B", 3)},
        {("head", None), ("A", 3), ("B", 3)},
    ]


def test_the_same_request_gets_the_same_bytes_and_is_charged_once(
    ready: Site, model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    request = request_for(plan, random_state(model))
    first = ready.train(request)
    ready.ledger.close()
    restarted = site_for(tmp_path, model, no_data)
    again = restarted.train(request_for(plan, random_state(model)))
    assert isinstance(first, Release) and isinstance(again, Release)
    assert np.array_equal(flat(first.update), flat(again.update))
    assert len(restarted.ledger.charges(plan.digest())) == 1


def test_the_same_round_with_another_adapter_is_refused(ready: Site, model: AdaptedModel, plan: Plan) -> None:
    ready.train(request_for(plan, random_state(model)))
    other = request_for(plan, random_state(model, seed=2))
    assert reason(ready.train(other)) is RefusalReason.REQUEST_CHANGED


@pytest.mark.parametrize("round", [0, 4, 2**32 - 1])
def test_a_round_outside_the_plan_is_refused(ready: Site, model: AdaptedModel, plan: Plan, round: int) -> None:
    assert reason(ready.train(request_for(plan, random_state(model), round))) is RefusalReason.OUT_OF_ORDER
    assert ready.ledger.charges(plan.digest()) == []


def test_rounds_may_be_left_out_but_not_come_back(ready: Site, model: AdaptedModel, plan: Plan) -> None:
    assert isinstance(ready.train(request_for(plan, random_state(model), 2)), Release)
    assert reason(ready.train(request_for(plan, random_state(model), 1))) is RefusalReason.OUT_OF_ORDER
    assert isinstance(ready.train(request_for(plan, random_state(model), 3)), Release)


def test_two_runs_go_on_side_by_side(ready: Site, model: AdaptedModel, plan: Plan) -> None:
    other = plan_for(model, run_id="other")
    ready.describe(shown(other))
    for each, round in ((plan, 1), (other, 1), (other, 2), (plan, 2)):
        assert isinstance(ready.train(request_for(each, random_state(model), round)), Release)


def test_a_plan_that_was_never_shown_or_belongs_to_another_run_is_unknown(
    ready: Site, model: AdaptedModel, plan: Plan
) -> None:
    never = plan_for(model, run_id="never")
    assert reason(ready.train(request_for(never, random_state(model)))) is RefusalReason.UNKNOWN_PLAN
    borrowed = TrainRequest("never", 1, plan.digest(), random_state(model))
    assert reason(ready.train(borrowed)) is RefusalReason.UNKNOWN_PLAN


def _one_missing(state: dict[str, Any]) -> dict[str, Any]:
    return dict(list(state.items())[1:])


def _one_too_many(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "extra": np.zeros(1, np.float32)}


def _double(state: dict[str, Any]) -> dict[str, Any]:
    return {name: array.astype(np.float64) for name, array in state.items()}


def _flattened(state: dict[str, Any]) -> dict[str, Any]:
    return {name: array.ravel() for name, array in state.items()}


def _nothing(state: dict[str, Any]) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (_one_too_many, RefusalReason.ADAPTER_LAYOUT),
        (_double, RefusalReason.ADAPTER_LAYOUT),
        (_flattened, RefusalReason.ADAPTER_LAYOUT),
        (_one_missing, RefusalReason.ADAPTER_MISSING),
        (_nothing, RefusalReason.ADAPTER_MISSING),
    ],
)
def test_an_adapter_of_another_layout_is_refused_before_anything_is_charged(
    ready: Site,
    model: AdaptedModel,
    plan: Plan,
    changed: Callable[[dict[str, Any]], dict[str, Any]],
    expected: RefusalReason,
) -> None:
    request = request_for(plan, changed(random_state(model)))
    assert reason(ready.train(request)) is expected
    assert ready.ledger.charges(plan.digest()) == []
    assert isinstance(ready.train(request_for(plan, random_state(model))), Release)


def test_a_plan_of_another_layout_than_the_sites_model_is_refused(site: Site, model: AdaptedModel) -> None:
    plan = plan_for(model, adapter_digest="0" * 64)
    site.describe(shown(plan))
    assert reason(site.train(request_for(plan, random_state(model)))) is RefusalReason.ADAPTER_LAYOUT
    assert site.ledger.charges(plan.digest()) == []


def test_a_model_that_mixes_rows_is_refused_before_anything_is_charged(tiny_bert: Path, tmp_path: Path) -> None:
    class Centred(nn.Module):
        """Takes the batch's mean off, as a normalisation over rows would."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden - hidden.mean(dim=0, keepdim=True)

    model = classifier(tiny_bert)
    model.network.bert.encoder.layer[3].output.dropout = Centred()
    plan, site = plan_for(model), site_for(tmp_path, model, encoded(model, 12))
    site.describe(shown(plan))
    assert reason(site.train(request_for(plan, random_state(model)))) is RefusalReason.MODEL
    assert site.ledger.charges(plan.digest()) == []


def test_two_requests_at_once_are_served_one_after_the_other(ready: Site, model: AdaptedModel, plan: Plan) -> None:
    replies: list[TrainReply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(ready.train(request_for(plan, random_state(model)))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    updates = [flat(reply.update) for reply in replies if isinstance(reply, Release)]
    assert len(updates) == 3 and all(np.array_equal(update, updates[0]) for update in updates)
    assert len(ready.ledger.charges(plan.digest())) == 1


# ------------------------------------------------------------------------------------------------- what must not matter


def test_data_that_cannot_be_read_yield_a_release_of_noise_like_a_site_without_data(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    updates = []
    for name, items in (("broken", no_data), ("empty", [])):
        site = site_for(tmp_path / name, model, items, fixed_seed=3)
        site.describe(shown(plan))
        reply = site.train(request_for(plan, random_state(model)))
        assert isinstance(reply, Release)
        updates.append(flat(reply.update))
    assert np.array_equal(*updates) and np.any(updates[0])


def test_with_keys_from_the_system_no_two_sites_release_the_same(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    updates = []
    for name in ("a", "b"):
        site = site_for(tmp_path / name, model, encoded(model, 12))
        site.describe(shown(plan))
        reply = site.train(request_for(plan, random_state(model)))
        assert isinstance(reply, Release)
        updates.append(flat(reply.update))
    assert abs(np.corrcoef(updates[0], updates[1])[0, 1]) < 0.5


def test_with_a_fixed_seed_the_release_depends_on_seed_site_and_round_not_on_the_run(
    model: AdaptedModel, tmp_path: Path
) -> None:
    def update(seed: int, run: str) -> Any:
        plan = plan_for(model, run_id=run)
        site = site_for(tmp_path / f"{seed}{run}", model, encoded(model, 12), fixed_seed=seed)
        site.describe(shown(plan))
        reply = site.train(request_for(plan, random_state(model)))
        assert isinstance(reply, Release)
        return flat(reply.update)

    assert np.array_equal(update(1, "run"), update(1, "other"))
    assert not np.array_equal(update(1, "run2"), update(2, "run2"))


def test_the_audit_log_tells_what_happened_and_nothing_about_the_data(
    ready: Site, model: AdaptedModel, plan: Plan
) -> None:
    ready.train(request_for(plan, random_state(model), 1))
    ready.train(request_for(plan, random_state(model), 9))
    assert events(ready) == ["plan received", "plan decided", "round reserved", "round released", "round refused"]
    keys = {key for line in ready.audit.path.read_text().splitlines() for key in json.loads(line)}
    assert keys == {
        "time",
        "event",
        "previous",
        "salt",
        "run",
        "plan",
        "refusal",
        "decision",
        "by",
        "round",
        "request",
        "reason",
        "release",
        "size",
    }
