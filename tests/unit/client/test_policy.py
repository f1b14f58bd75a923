"""The policy: what is not allowed is refused, from plan, policy and declared size alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from site_files import COORDINATOR
from small_sites import phase, plan_for, policy_for

from client.policy import Policy, rounded
from client.policy import policy_for as policy_of_a_simulation
from common.adapted import AdaptedModel
from common.messages import RefusalReason
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection


def refusal(model: AdaptedModel, policy: dict[str, Any] | None = None, **plan: Any) -> RefusalReason | None:
    return policy_for(model, **(policy or {})).refusal(plan_for(model, **plan))


def test_a_plan_within_all_bounds_is_allowed(model: AdaptedModel) -> None:
    assert refusal(model) is None


@pytest.mark.parametrize(
    "plan",
    [
        {"data": "other"},
        {"model_digest": "other"},
        {"task": TaskSection(name="causal-lm")},
        {"lora": LoraSection(r=65)},
        {"lora": LoraSection(dropout=0.1)},
        {"privacy": PrivacySection(epsilon=10.01)},
        {"privacy": PrivacySection(delta=1.1e-5)},
        {"privacy": PrivacySection(mechanism="none")},
        {"privacy": PrivacySection(metrics=("loss",))},
    ],
    ids=lambda plan: str(*plan),
)
def test_each_bound_is_kept(model: AdaptedModel, plan: dict[str, Any]) -> None:
    allowed = {"tasks": ("sequence-classification",)}
    assert refusal(model, allowed, **plan) is RefusalReason.POLICY


@pytest.mark.parametrize(
    ("policy", "plan"),
    [
        ({"max_rank": 65}, {"lora": LoraSection(r=65)}),
        ({"max_epsilon": 10.01}, {"privacy": PrivacySection(epsilon=10.01)}),
        ({"max_delta": 1e-4}, {"privacy": PrivacySection(delta=1e-4)}),
        ({"allow_no_privacy": True}, {"privacy": PrivacySection(mechanism="none", epsilon=None)}),
        ({"data": ("default", "other")}, {"data": "other"}),
    ],
)
def test_a_site_may_set_each_bound_otherwise(model: AdaptedModel, policy: dict[str, Any], plan: dict[str, Any]) -> None:
    assert refusal(model, policy, **plan) is None


def test_without_privacy_a_plan_may_drop_out(model: AdaptedModel) -> None:
    none = PrivacySection(mechanism="none", epsilon=None)
    assert refusal(model, {"allow_no_privacy": True}, privacy=none, lora=LoraSection(dropout=0.1)) is None


LOSS, ACCURACY = ("loss",), ("accuracy",)


@pytest.mark.parametrize(
    ("listed", "asked", "reason"),
    [
        ((), (), None),
        (LOSS, (), None),
        (LOSS, LOSS, None),
        (LOSS + ACCURACY, ACCURACY + LOSS, None),
        ((), ACCURACY, RefusalReason.POLICY),
        (LOSS, ACCURACY, RefusalReason.POLICY),
        (LOSS, LOSS + ACCURACY, RefusalReason.POLICY),
    ],
)
@pytest.mark.parametrize("mechanism", ["dp-sgd", "none"])
def test_a_plan_may_ask_for_the_metrics_that_are_listed_and_for_no_others(
    model: AdaptedModel, listed: tuple[str, ...], asked: Any, reason: RefusalReason | None, mechanism: Any
) -> None:
    policy = {"metrics": listed, "allow_no_privacy": True}
    assert refusal(model, policy, privacy=PrivacySection(mechanism=mechanism, metrics=asked)) is reason


def test_a_simulated_site_allows_exactly_the_plans_metrics(model: AdaptedModel) -> None:
    asked = plan_for(model, privacy=PrivacySection(metrics=LOSS))
    policy = policy_of_a_simulation(asked, 40, COORDINATOR.public)
    assert policy.section.metrics == LOSS and policy.refusal(asked) is None
    more = plan_for(model, privacy=PrivacySection(metrics=(*LOSS, *ACCURACY)))
    assert policy.refusal(more) is RefusalReason.POLICY


def test_the_default_delta_is_bounded_too(model: AdaptedModel) -> None:
    assert refusal(model, {"max_delta": 9e-6}) is RefusalReason.POLICY


@pytest.mark.parametrize(
    ("batch_size", "reason"), [(40, None), (41, RefusalReason.TOO_SMALL), (4000, RefusalReason.TOO_SMALL)]
)
def test_a_declared_size_below_an_expected_batch_is_too_small(
    model: AdaptedModel, batch_size: int, reason: RefusalReason | None
) -> None:
    assert refusal(model, phases=[phase(sample_rate=None, batch_size=batch_size)]) is reason


def test_a_plan_that_breaks_the_policy_too_is_not_told_about_the_size(model: AdaptedModel) -> None:
    too_large = [phase(sample_rate=None, batch_size=41)]
    assert refusal(model, phases=too_large, data="other") is RefusalReason.POLICY


@pytest.mark.parametrize("clip_norm", [1e-40, 1e-7, 1e7, 1e300])
def test_a_clip_norm_that_fp32_cannot_hold_well_is_refused(model: AdaptedModel, clip_norm: float) -> None:
    assert refusal(model, phases=[phase(), phase("odd", clip_norm=clip_norm)]) is RefusalReason.POLICY


def test_what_a_plan_leaves_open_to_the_coordinator_does_not_matter(model: AdaptedModel) -> None:
    free: list[PhaseSection] = [phase(learning_rate=100.0, optimizer="adamw", server_momentum=0.9, algorithm="fedit")]
    assert refusal(model, phases=free, seed=99, adapter_digest="any", run_id="any") is None


def test_the_answer_depends_on_nothing_but_policy_plan_and_declared_size(model: AdaptedModel) -> None:
    assert {field.name for field in fields(Policy)} == {"section", "populations", "data"}
    assert policy_for(model, public_size=2).refusal(plan_for(model)) is RefusalReason.TOO_SMALL


@pytest.mark.parametrize(
    ("size", "declared"), [(1, 1), (9, 9), (10, 10), (99, 99), (100, 100), (224, 220), (4253, 4200), (99_999, 99_000)]
)
def test_rounding_keeps_two_digits_and_never_exceeds_the_size(size: int, declared: int) -> None:
    assert rounded(size) == declared
