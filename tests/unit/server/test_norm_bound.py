"""No honest update is longer than the bound; what is much longer than its noise is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2

from client.noised_gradient import smoothed
from client.privacy.budget import state_privacy
from client.privacy.mechanism import DPSGD
from client.privacy.sampling import RoundSecret
from common import number_formats
from common.adapter import AdapterSpec
from common.config import RunConfig
from common.messages import PhaseStatement, PlanStatus, PrivacyStatement, SiteDescription
from common.plan import Plan, plan_of
from common.toml_settings import validate
from server import norm_bound
from server.norm_bound import FALSE_ALARM, LARGEST_NORM, agrees, largest_norm

SPEC = AdapterSpec.of("base", {"x": (4, 20), "y": (20,)})


def planned(*phases: dict[str, Any], **tables: Any) -> Plan:
    defaults = {"rounds": 3, "sample_rate": 1.0, "learning_rate": 0.5, "clip_norm": 2.0}
    written = [{"name": f"p{index}", **defaults, **phase} for index, phase in enumerate(phases or ({},))]
    config = validate(RunConfig, {"task": {"labels": ["a", "b"]}, "phase": written, **tables}, "test")
    return plan_of(config, "run-1", "m" * 64, "a" * 64, "c" * 64)


def bound(plan: Plan, size: int = 100, sigma: float = 0.0, rate: float = 1.0, start: float = 0.0) -> float:
    phase = plan.phases[0]
    stated = PhaseStatement(phase.name, rate, sigma, phase.clip_norm, phase.rounds * phase.steps)
    privacy = PrivacyStatement(1.0, 1e-5, "example", "add-remove-one", "prv", stated.steps, (stated,))
    site = SiteDescription("north", PlanStatus.READY, None, "code", (), 8, size, privacy)
    return largest_norm(plan, 1, site, SPEC, start)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_without_noise_and_sampling_it_is_every_gradient_at_the_clip_norm() -> None:
    """η C T n'/n = 0.5 · 2 · 3 · 110/100 = 3.3, and a thousandth for arithmetic."""
    assert bound(planned({"steps": 3})) == pytest.approx(3.3 * 1.001, rel=1e-5)


def test_the_noise_adds_its_tail() -> None:
    """x = ln(2·3/1e-9) = 22.515; √(100 + 2√(100x) + 2x) = 15.50; with σ = 4: η C σ/n · that = 0.62 beside 1.1."""
    x = math.log(6e9)
    expected = 0.5 * 2 * (110 + 4 * math.sqrt(100 + 2 * math.sqrt(100 * x) + 2 * x)) / 100
    assert expected == pytest.approx(1.1 + 0.62, abs=0.001)
    assert bound(planned(), sigma=4.0) == pytest.approx(expected * 1.001, rel=1e-5)


def test_metrics_and_their_share_of_the_noise_count() -> None:
    quiet, measured = planned(), planned(privacy={"metrics": ["loss"], "metrics_share": 0.5})
    difference = bound(measured, sigma=4.0) - bound(quiet, sigma=4.0)
    assert difference == pytest.approx((math.sqrt(2) - 1) * (bound(quiet, sigma=4.0) - bound(quiet)), rel=1e-4)


def test_a_pull_that_overshoots_and_a_filter_stretch_it() -> None:
    """ημ = 3: |1 - 3|² = 4 times the last but one step's; a pull of up to 2/η shortens."""
    assert bound(planned({"steps": 3, "proximal": 6.0})) == pytest.approx(4 * bound(planned({"steps": 3})), rel=1e-5)
    assert bound(planned({"steps": 3, "proximal": 4.0})) == bound(planned({"steps": 3}))
    assert bound(planned({"smoothing": 2.0})) == pytest.approx(math.sqrt(2) * bound(planned()), rel=1e-5)


def test_a_large_adapter_leaves_room_for_its_rounding() -> None:
    """2⁻²³ of a norm of 1e7 for each of two steps is 2.38."""
    large = {"x": np.full((4, 20), 1e6), "y": np.full(20, 1e6)}
    plan = planned({"steps": 2})
    assert norm_bound.norm(large) == pytest.approx(1e7)
    assert bound(plan, start=1e7) - bound(plan) == pytest.approx(2 * 1e7 * 2.0**-23, rel=1e-5)


def test_without_clipping_only_what_would_overflow_is_too_long() -> None:
    plan = planned(privacy={"mechanism": "none"})
    assert bound(plan) == LARGEST_NORM == 1e6
    assert bound(planned({"learning_rate": 1e9})) == LARGEST_NORM


def test_adamw_is_bounded_by_its_steps_without_privacy_too() -> None:
    """One step moves each of 100 entries by η = 0.5 at most."""
    for privacy in ({"mechanism": "none"}, {}):
        assert bound(planned({"optimizer": "adamw"}, privacy=privacy)) == pytest.approx(0.5 * 10 * 1.001, rel=1e-5)


# ---- what the derivation says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [1.0, 5.0, 25.0])
def test_the_tails_are_no_more_probable_than_stated(tail: float) -> None:
    """Exact distributions of scipy; with e⁻²⁵ the tails are 1.4e-11."""
    for entries in (1, 2, 10, 400, 4235, 300_000):
        assert chi2.sf(norm_bound._longest_gaussian(entries, tail) ** 2, entries) <= math.exp(-tail)
    for trials in (1, 30, 246, 4678 * 8):
        for rate in (1e-4, 0.01, 0.05, 0.5, 0.999, 1.0):
            most = norm_bound._most_units(trials, rate, tail)
            assert most <= trials and binom.sf(math.floor(most), trials, rate) <= math.exp(-tail)


def test_an_honest_site_is_turned_away_in_a_whole_run_less_often_than_stated() -> None:
    """Both tails of every round, from the exact distributions, at the bound as it is put together."""
    plan = planned({"rounds": 40}, {"rounds": 4, "sample_rate": 0.05, "steps": 3})
    tail = math.log(2 * plan.rounds / FALSE_ALARM)
    total = 0.0
    for round in range(1, plan.rounds + 1):
        phase = plan.phase_of(round)
        trials = phase.steps * 246
        assert phase.sample_rate is not None
        most = norm_bound._most_units(trials, phase.sample_rate, tail)
        total += float(binom.sf(math.floor(most), trials, phase.sample_rate))
        total += float(chi2.sf(norm_bound._longest_gaussian(4235, tail) ** 2, 4235))
    assert 0 < total < FALSE_ALARM == 1e-9


class Aligned:
    """Sites whose units all have the same long gradient: their updates are as long as honest ones get."""

    def __init__(self, plan: Plan, declared: int, true: int, rate: float, sigma: float) -> None:
        self.phase, self.declared, self.true = plan.phases[0], declared, true
        self.stated = PhaseStatement("p0", rate, sigma, self.phase.clip_norm, self.phase.rounds * self.phase.steps)

    def update(self, seed: int) -> float:
        """Norm of one round's update, by the sites' own mechanism."""
        layer = torch.nn.Linear(100, 1, bias=False)
        torch.nn.init.zeros_(layer.weight)
        secret = RoundSecret.fixed(seed, "north", 1)
        mechanism = DPSGD(self.stated, self.declared, secret, "fast")
        optimizer = torch.optim.SGD(layer.parameters(), lr=self.phase.learning_rate)
        with mechanism.attach(layer, dict(layer.named_parameters()), optimizer):
            for step in range(self.phase.steps):
                drawn = len(mechanism.sample(self.true, step))
                if drawn:
                    rows = torch.full((drawn, 100), 3.0)
                    mechanism.accumulate(lambda rows=rows: -layer(rows)[:, 0])  # type: ignore[misc]
                mechanism.step(step)
        return float(layer.weight.detach().norm())


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(1.0, 4.0, 1), (0.1, 0.6, 4), (0.3, 0.05, 2), (0.02, 30.0, 3)])
def test_the_longest_honest_updates_pass_and_the_bound_is_of_their_size(rate: float, sigma: float, steps: int) -> None:
    """A site that declares 100 of its 109 units, and 150 rounds of each kind."""
    plan = planned({"steps": steps})
    site = Aligned(plan, 100, 109, rate, sigma)
    norms = [site.update(seed) for seed in range(150)]
    most = bound(plan, 100, sigma, rate)
    assert max(norms) < most
    assert max(norms) > most / 3


def test_with_a_tail_that_is_not_rare_it_is_exceeded_as_rarely_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({"steps": 2, "rounds": 1})
    site = Aligned(plan, 100, 110, 0.3, 2.0)
    norms = np.array([site.update(seed) for seed in range(200)])
    monkeypatch.setattr(norm_bound, "FALSE_ALARM", 0.2)
    assert np.mean(norms > bound(plan, 100, 2.0, 0.3)) < 0.2


def test_what_is_mostly_noise_cannot_be_scaled_up() -> None:
    """ε = 1 at 224 units of 4235 numbers: three times an update without any gradient is too long."""
    plan = planned({"rounds": 40, "learning_rate": 32.0, "clip_norm": 0.25}, privacy={"epsilon": 1.0})
    site = described(plan, 224)
    assert site.privacy is not None
    deviation = 32 * 0.25 * site.privacy.phases[0].noise_multiplier / 224
    noise = np.random.default_rng(0).normal(0, deviation, 4235)
    most = largest_norm(plan, 1, site, AdapterSpec.of("base", {"x": (11, 385)}), 1.0)
    assert np.linalg.norm(noise) < most < 3 * np.linalg.norm(noise)


def test_adamws_largest_steps_are_attained_and_never_exceeded() -> None:
    def moved(gradients: list[float]) -> list[float]:
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)
        places = [0.0]
        for gradient in gradients:
            parameter.grad = torch.tensor([gradient], dtype=torch.float64)
            optimizer.step()
            places.append(parameter.item())
        return [abs(after - before) for before, after in pairwise(places)]

    for steps in (1, 2, 5, 20, 100):
        worst = [1e6 * (0.9 / 0.999) ** (steps - step) for step in range(1, steps + 1)]  # equality in Cauchy-Schwarz
        assert moved(worst)[-1] == pytest.approx(norm_bound._adam_step(steps), rel=1e-5)
    generator = np.random.default_rng(0)
    for scale in (0.0, 2.0, 5.0):
        gradients = generator.standard_normal(60) * np.exp(scale * generator.standard_normal(60))
        for step, length in enumerate(moved(gradients.tolist()), 1):
            assert length <= norm_bound._adam_step(step) * (1 + 1e-9)
    assert norm_bound._adam_step(100_000) < 7.3


def test_the_filter_lengthens_by_less_than_the_root_of_two() -> None:
    largest = 0.0
    for width in (0.2, 0.5, 1.0, 3.0, 16.0):
        for length in (1, 2, 3, 5, 9, 20, 40, 90):
            matrix = smoothed("x.lora_A.weight", torch.eye(length, dtype=torch.float64), width)
            largest = max(largest, float(torch.linalg.matrix_norm(matrix, 2)))
    assert 1.005 < largest <= math.sqrt(2)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_the_journey_lengthens_by_no_more_than_stated(form: Any) -> None:
    """Thirty rounds with error feedback and updates of norm 1, spiky ones too."""
    spec = AdapterSpec.of("base", {"x": (3, 400)})
    generator = np.random.default_rng(0)
    kept = np.zeros((3, 400), np.float32)
    most = norm_bound._journey(form, spec)
    for round in range(30):
        update = generator.standard_normal((3, 400)) ** (1 + 2 * (round % 3))
        wanted = (update / np.linalg.norm(update)).astype(np.float32) + kept
        encoded = number_formats.encode({"x": wanted}, form, lambda name, n: generator.random(n))
        sent = number_formats.decode(encoded, spec, form)["x"]
        kept = wanted - sent
        assert np.linalg.norm(sent) <= most
    assert norm_bound._journey("fp32", spec) == 1.0
    assert most == pytest.approx({"bf16": 1.0039, "int8": (127 + 20) / (127 - 20)}[form], abs=1e-3)
    assert norm_bound._journey("int8", AdapterSpec.of("base", {"x": (2, 127**2)})) == math.inf


# ---- what a site states ---------------------------------------------------------------------------------------------


def described(plan: Plan, size: int = 200) -> SiteDescription:
    statement = state_privacy(plan, size)
    return SiteDescription("north", PlanStatus.READY, None, "code", (), 8, size, statement)


def altered(description: SiteDescription, **changes: Any) -> SiteDescription:
    assert description.privacy is not None
    first, *others = description.privacy.phases
    return replace(description, privacy=replace(description.privacy, phases=(replace(first, **changes), *others)))


PLAN = planned({}, {"sample_rate": None, "batch_size": 20, "steps": 2}, privacy={"epsilon": 3.0})


def test_what_a_site_calibrates_agrees_with_the_plan() -> None:
    assert agrees(PLAN, described(PLAN))
    assert agrees(PLAN, described(PLAN, 7310))
    open_plan = planned(privacy={"mechanism": "none"})
    assert agrees(open_plan, described(open_plan))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"sample_rate": 0.5},
        {"clip_norm": 2.5},
        {"steps": 4},
        {"noise_multiplier": 1e6},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": -1.0},
    ],
)
def test_other_terms_are_told(changes: dict[str, Any]) -> None:
    assert not agrees(PLAN, altered(described(PLAN), **changes))


def test_more_noise_than_the_plan_needs_is_told_in_each_phase_and_less_is_the_sites_own_loss() -> None:
    honest = described(PLAN)
    assert honest.privacy is not None
    needed = [phase.noise_multiplier for phase in honest.privacy.phases]
    for place, sigma in enumerate(needed):
        for share, fine in ((1.03, False), (1.005, True), (0.5, True)):
            phases = list(honest.privacy.phases)
            phases[place] = replace(phases[place], noise_multiplier=share * sigma)
            assert agrees(PLAN, replace(honest, privacy=replace(honest.privacy, phases=tuple(phases)))) is fine


def test_another_size_or_no_statement_is_told() -> None:
    assert not agrees(PLAN, replace(described(PLAN), public_size=100))  # q is 20/100 then
    assert not agrees(PLAN, replace(described(PLAN), privacy=None))
    open_plan = planned(privacy={"mechanism": "none"})
    assert not agrees(open_plan, altered(described(open_plan), noise_multiplier=1.0))
