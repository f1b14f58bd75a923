"""The noise a site puts on a plan meets the plan's ε, by a second library's account, from its public size alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution
from small_sites import classifier, encoded, phase, plan_for, policy_for, shown, site_for

from client.privacy.budget import fits, sample_rates, segments_of, state_privacy
from common.errors import PrivacyError
from common.messages import PhaseStatement
from common.plan import Plan
from common.privacy.accounting import Segment
from common.recipes import default_phases
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection

PHASES = {
    "the default recipe": default_phases(TaskSection(labels=("a", "b")), PrivacySection()),
    "the default recipe of a language model": default_phases(TaskSection(name="causal-lm"), PrivacySection()),
    "one phase of expected batches": (phase("only", rounds=10, steps=2, sample_rate=None, batch_size=16),),
    "three unequal phases": (
        phase("head", rounds=5, steps=1, sample_rate=1.0, budget_share=0.2),
        phase("lora", rounds=10, steps=4, sample_rate=0.1, budget_share=0.5),
        phase("polish", rounds=3, steps=2, sample_rate=0.05, budget_share=0.3),
    ),
}


def plan_of(phases: Sequence[PhaseSection], **privacy: object) -> Plan:
    return Plan(
        run_id="run",
        seed=0,
        data="default",
        model_digest="m",
        task=TaskSection(name="sequence-classification", labels=("a", "b")),
        lora=LoraSection(),
        privacy=PrivacySection(**privacy),  # type: ignore[arg-type]
        phases=tuple(phases),
        adapter_digest="a",
        code_digest="c",
    )


def epsilon_by_dp_accounting(phases: Sequence[PhaseStatement], delta: float) -> float:
    """Composes every step of every phase, under add/remove of one unit."""
    total = privacy_loss_distribution.identity(value_discretization_interval=1e-3)
    for each in phases:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            each.noise_multiplier, sampling_prob=each.sample_rate, value_discretization_interval=1e-3
        )
        total = total.compose(one.self_compose(each.steps))
    return float(total.get_epsilon_for_delta(delta))


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("public_size", [250, 4200])
@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_the_calibrated_noise_meets_the_target_by_a_second_librarys_account(
    phases: Sequence[PhaseSection], public_size: int, epsilon: float
) -> None:
    statement = state_privacy(plan_of(phases, epsilon=epsilon), public_size)
    assert statement.epsilon is not None and statement.delta is not None
    assert epsilon - 0.05 <= statement.epsilon <= epsilon
    pld = epsilon_by_dp_accounting(statement.phases, statement.delta)
    assert pld <= epsilon, "the promise"
    assert abs(statement.epsilon - pld) <= 0.02, "and what is stated is close to it"


def test_the_statement_covers_every_step_of_every_planned_round() -> None:
    statement = state_privacy(plan_of(PHASES["three unequal phases"]), 500)
    assert [(each.name, each.sample_rate, each.steps) for each in statement.phases] == [
        ("head", 1.0, 5),
        ("lora", 0.1, 40),
        ("polish", 0.05, 6),
    ]
    assert statement.steps == 51
    assert (statement.unit, statement.neighbouring, statement.accountant) == ("example", "add-remove-one", "prv")
    assert segments_of(statement) == tuple(
        Segment(each.sample_rate, each.noise_multiplier, each.steps) for each in statement.phases
    )


def test_phases_are_composed_in_one_budget_and_not_each_within_it() -> None:
    statement = state_privacy(plan_of(PHASES["three unequal phases"], epsilon=3.0), 500)
    assert statement.delta is not None
    alone = [epsilon_by_dp_accounting([each], statement.delta) for each in statement.phases]
    assert max(alone) < 2.7 and sum(alone) > 3.0


def test_a_larger_share_buys_a_phase_less_noise_at_the_others_cost() -> None:
    def noise(share: float) -> list[float]:
        phases = [phase("one", budget_share=share), phase("two")]
        return [each.noise_multiplier for each in state_privacy(plan_of(phases), 500).phases]

    small, large = noise(0.5), noise(2.0)
    assert large[0] < small[0] and large[1] > small[1]


@pytest.mark.parametrize(
    ("public_size", "delta"), [(50, 1e-5), (9_999, 1e-5), (10_000, 1e-5), (10_001, 1e-6), (224_000, 1e-7)]
)
def test_delta_follows_the_public_size(public_size: int, delta: float) -> None:
    plan = plan_of([phase(sample_rate=0.1)])
    assert state_privacy(plan, public_size).delta == pytest.approx(delta)
    assert state_privacy(plan_of([phase()], delta=1e-6), public_size).delta == 1e-6


def test_two_sites_of_the_same_public_size_state_the_same_whatever_their_true_sizes(
    tiny_bert: Path, tmp_path: Path
) -> None:
    model = classifier(tiny_bert)
    plan = plan_for(model, [phase(sample_rate=None, batch_size=10)])
    descriptions = [
        site_for(tmp_path / str(n), model, encoded(model, n), policy_for(model, public_size=40)).describe(shown(plan))
        for n in (0, 3, 40, 57)
    ]
    assert all(description == descriptions[0] for description in descriptions)
    assert descriptions[0].privacy is not None and descriptions[0].public_size == 40


def test_other_runs_do_not_change_a_plans_noise(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    site = site_for(tmp_path, model)
    first, second = (site.describe(shown(plan_for(model, run_id=run))).privacy for run in ("first", "second"))
    assert first is not None and first == second


def test_an_expected_batch_becomes_a_rate_by_the_public_size() -> None:
    plan = plan_of([phase(sample_rate=None, batch_size=16), phase("other", sample_rate=0.5)])
    assert sample_rates(plan, 64) == (0.25, 0.5)
    assert fits(plan, 64) and fits(plan, 16)
    assert not fits(plan, 15), "no batch can be larger than the site"
    assert not fits(plan_of([phase(sample_rate=0.01)]), 99), "less than one unit is expected in a batch"


def test_without_a_mechanism_nothing_is_claimed() -> None:
    statement = state_privacy(plan_of([phase()], mechanism="none", epsilon=None), 500)
    assert statement.epsilon is None and statement.delta is None
    assert [each.noise_multiplier for each in statement.phases] == [0.0]
    assert segments_of(statement) == ()
    assert statement == state_privacy(plan_of([phase()], mechanism="none", epsilon=8.0), 500)


def test_a_target_that_no_noise_reaches_is_an_error() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon = 0\.001"):
        state_privacy(plan_of([phase()], epsilon=0.001), 500)


def test_every_other_clip_norm_and_learning_rate_leaves_the_noise_multiplier_alone() -> None:
    plain = state_privacy(plan_of([phase()]), 500)
    other = state_privacy(plan_of([phase(clip_norm=0.1, learning_rate=7.0, server_momentum=0.9)]), 500)
    assert replace(other.phases[0], clip_norm=1.0) == plain.phases[0]
