"""The audit passes the engine as it is, and names every planted fault; its statistics are what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from planted_faults import FAULTS, seeded_secrets
from scipy import stats

import consilium
from client.privacy.audit import run
from client.privacy.audit.canaries import Shift, expected_shift
from client.privacy.audit.probe import Subject, audited_phase
from client.privacy.audit.run import QUICK, Audit, audit
from client.privacy.audit.subjects import canary_model
from client.privacy.audit.verdicts import (
    LEVEL,
    STATISTICAL_CHECKS,
    binomial_range,
    correlation,
    correlation_limit,
    deviation_range,
    dispersion_range,
    within,
)
from common.config import RunConfig
from common.messages import PhaseStatement, PrivacyStatement
from common.privacy.privacy_loss import gaussian_epsilon
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection

HEAD = PhaseSection(name="head", rounds=4, sample_rate=1.0, train=("head",), clip_norm=0.5, budget_share=0.7)
LORA = PhaseSection(name="lora", rounds=4, steps=2, sample_rate=0.25, train=("head", "lora"), budget_share=0.3)
CLASSES = TaskSection(labels=("urgent", "routine", "review"))


def settings(task: TaskSection = CLASSES, phases: tuple[PhaseSection, ...] = (HEAD, LORA), **privacy: Any) -> RunConfig:
    """A small run."""
    return RunConfig(task=task, lora=LoraSection(r=4, layers=2), phase=phases, privacy=PrivacySection(**privacy))


def audited(config: RunConfig, *parts: str) -> Audit:
    """A quick audit that is the same every time."""
    with seeded_secrets(1):
        return audit(config, 1000, QUICK, seed=1, parts=parts or run.PARTS)


# ------------------------------------------------------------------------------------------------------ correct engine


def test_the_engine_as_it_is_passes_every_check() -> None:
    found = audited(settings())
    assert [verdict.name for verdict in found.failed] == []
    assert found.estimate is not None
    assert found.estimate.epsilon_low < found.estimate.claimed_epsilon
    assert {verdict.part for verdict in found.verdicts} == set(run.PARTS)
    statistical = [verdict for verdict in found.verdicts if verdict.false_alarm]
    assert len(statistical) <= STATISTICAL_CHECKS and {verdict.false_alarm for verdict in statistical} == {LEVEL}
    assert sum(verdict.false_alarm for verdict in statistical) <= 1e-4


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("algorithm", ["la-lora", "rolora", "fedsvd"])
def test_algorithms_that_move_a_and_b_in_turn_pass(algorithm: str, steps: int) -> None:
    phase = PhaseSection(
        name="lora",
        rounds=4,
        steps=steps,
        sample_rate=0.25,
        train=("head", "lora"),
        algorithm=algorithm,
        smoothing=1.0,
        proximal=0.1,
    )
    found = audited(settings(phases=(phase,)), "replay", "noise")
    assert [verdict.name for verdict in found.failed] == []


def test_an_engine_for_patients_passes() -> None:
    found = audited(settings(phases=(LORA,), unit="patient", max_examples_per_unit=4), "replay", "sampling")
    assert [verdict.name for verdict in found.failed] == []
    assert "unit-is-a-mean" in {verdict.name for verdict in found.verdicts}


def test_fast_noise_and_a_language_model_pass() -> None:
    phase = PhaseSection(name="lora", rounds=3, steps=2, batch_size=50, train=("lora",), algorithm="fedit")
    config = settings(TaskSection(name="causal-lm"), (phase,), noise="fast", epsilon=2.0)
    assert [verdict.name for verdict in audited(config, "replay", "noise").failed] == []


def test_at_q_1_the_canaries_find_what_is_claimed() -> None:
    """There the mechanism is Gaussian, so nothing is lost between the claim and what an attacker can see."""
    found = audited(settings(phases=(HEAD,), epsilon=4.0), "canaries").estimate
    assert found is not None and found.epsilon_low <= 4.0 <= found.epsilon_high
    assert found.epsilon_high - found.epsilon_low < 3.0


# ------------------------------------------------------------------------------------------------------ planted faults


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    planted = FAULTS[name]
    privacy: dict[str, Any] = {"unit": "patient", "max_examples_per_unit": 4} if planted.by_patient else {}
    phases = (LORA,) if planted.part == "noise" else (HEAD, LORA)
    parts = ("canaries", "ledger") if planted.part == "ledger" else (planted.part,)
    with planted.plant():
        found = audited(settings(phases=phases, noise=planted.noise, **privacy), *parts)
    named = {verdict.name: verdict.suspects for verdict in found.failed}
    assert planted.check in named, f"only {named}"
    assert planted.suspected in named[planted.check]


# ---------------------------------------------------------------------------------------------------------- statistics


def test_bounds_have_the_levels_they_are_asked_for() -> None:
    """At level 0.02, 4000 times: 80 expected, and within five of their standard deviations."""
    generator = np.random.default_rng(0)
    low, high = deviation_range(50, 0.02)
    scales = np.sqrt(np.mean(generator.standard_normal((4000, 50)) ** 2, axis=1))
    one, other = generator.standard_normal((2, 4000, 20))
    cosines = [abs(correlation(3 * x, y)) for x, y in zip(one, other, strict=True)]
    counts = generator.binomial(40, 0.3, 4000)
    least, most = binomial_range(40, 0.3, 0.02)
    outside = [
        int(np.sum((scales < low) | (scales > high))),
        int(np.sum(np.array(cosines) > correlation_limit(20, 0.02))),
    ]
    assert all(abs(each - 80) < 45 for each in outside)
    assert np.sum((counts < least) | (counts > most)) <= 80 + 45  # discrete: at most the level


def test_scatter_of_binomial_counts_stays_within_its_bounds_and_a_fixed_size_does_not() -> None:
    generator = np.random.default_rng(0)
    for trials, rate, counts in ((1024, 0.25, 16), (32, 0.25, 1024), (12, 0.01, 1024)):
        low, high = dispersion_range(trials, rate, counts, 0.05)
        drawn = generator.binomial(trials, rate, (2000, counts))
        scatter = np.mean((drawn - trials * rate) ** 2, axis=1) / (trials * rate * (1 - rate))
        assert np.mean((scatter < low) | (scatter > high)) <= 0.05
        assert low < 1 < high
    assert dispersion_range(1024, 0.25, 16, LEVEL)[0] > 0, "batches of one size have no scatter at all"


def test_the_interval_of_mu_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        shift = Shift(1.5 + generator.standard_normal(120), generator.standard_normal(130))
        low, high = shift.bounds(0.05)
        missed += not low <= 1.5 <= high
    assert abs(missed - 200) < 5 * math.sqrt(2000 * 0.1 * 0.9)


def test_without_sampling_the_expected_shift_is_that_of_the_gaussian_mechanism() -> None:
    """T steps at noise σ: μ = √T/σ, whose ε is the claim."""
    model = canary_model(0.5)
    config = settings(phases=(HEAD,))
    from client.privacy.audit.sampling import canary_subject

    subject: Subject = canary_subject(config, model, 1000)
    stated = PhaseStatement("head", 1.0, 3.0, 0.5, 4)
    statement = PrivacyStatement(None, None, "example", "add-remove-one", "prv", 4, (stated,))
    assert expected_shift(subject, statement, [1, 2, 3, 4]) == pytest.approx(2 / 3, rel=1e-12)
    assert gaussian_epsilon(2 / 3, 1e-5) == pytest.approx(2.8, abs=0.1)  # Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) = 1e-5
    assert stats.norm.cdf(1 / 3 - 4.2) < 1e-4


def test_a_figure_that_is_no_number_never_holds() -> None:
    assert not within("noise", "check", "claim", math.nan, 0.0, 1.0, suspects="fault").held
    assert within("noise", "check", "claim", 1.0, 0.0, 1.0, suspects="fault").suspects == ""


def test_the_audited_phase_differs_in_its_optimiser_alone() -> None:
    phase = audited_phase(PhaseSection(name="p", rounds=3, steps=2, batch_size=7, optimizer="adamw", clip_norm=0.3))
    assert (phase.optimizer, phase.steps, phase.batch_size, phase.clip_norm, phase.rounds) == ("sgd", 2, 7, 0.3, 3)


# -------------------------------------------------------------------------------------------------------- command line

TOML = """
[task]
labels = ["a", "b"]
[lora]
r = 2
[privacy]
epsilon = 4.0
[[phase]]
name = "head"
rounds = 2
sample_rate = 1.0
train = ["head"]
"""


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["consilium", "privacy", "audit", *arguments])
    with pytest.raises(SystemExit) as left:
        consilium.main()
    return int(left.value.code or 0)


def test_the_command_reports_and_its_exit_code_tells_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML, encoding="utf-8")
    small = run.Thoroughness(noise_values=2000, sampled_rounds=2, canary_runs=(1, 1), canary_steps=100)
    with patch.object(run, "QUICK", small), seeded_secrets(1):
        assert called(monkeypatch, "--config", str(file), "--quick", "--json", "--seed", "1") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] and report["false_alarm"] == 1e-4 and report["quick"]
        assert report["canaries"]["epsilon_low"] <= report["canaries"]["epsilon_high"]
        with FAULTS["half noise"].plant():
            assert called(monkeypatch, "--config", str(file), "--quick", "--seed", "1") == 1
    printed = capsys.readouterr().out
    assert "noise-scale" in printed and "suspected: the noise has half its scale" in printed
    assert "99 % interval" in printed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epsilon = 4.0", 'mechanism = "none"', "makes no promise"),
        ("sample_rate = 1.0", "batch_size = 0", "batch_size"),
        ("epsilon = 4.0", "epsilon = 4.0\ndelta = 0.5", "refuses the plan"),
    ],
)
def test_bad_input_is_told_with_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    message: str,
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML.replace(old, new), encoding="utf-8")
    assert called(monkeypatch, "--config", str(file), "--quick") == 2
    assert message in capsys.readouterr().err
