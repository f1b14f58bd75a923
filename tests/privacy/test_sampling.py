"""Who takes part in a step, and the noise added to it: as the accountant assumes, and as the ledger says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from small_sites import (
    classifier,
    encoded,
    flat,
    names_of,
    phase,
    plan_for,
    random_state,
    request_for,
    shown,
    site_for,
)

import client.privacy.mechanism
import client.privacy.noisy_sum
from client.privacy.mechanism import DPSGD
from client.privacy.noisy_sum import GridSum, rounded_gaussian
from client.privacy.sampling import RoundSecret, poisson_sample
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.examples import Examples
from common.messages import PhaseStatement, Release

UNITS = 40
ROUNDS, STEPS = 400, 5
DRAWS = ROUNDS * STEPS
RATE = 0.15
CERTAIN = 1e-4
"""Significance of every test below; seeds are fixed, so each passes always or never."""


@dataclass
class Executed:
    """What the mechanism really did, in order."""

    drawn: list[tuple[float, list[int]]] = field(default_factory=list)
    """Rate and indices of each draw."""
    trained: list[list[int]] = field(default_factory=list)
    """Indices that reached the model in each step."""
    noise: list[float] = field(default_factory=list)
    """Standard deviation of each addition of noise."""
    normal: list[npt.NDArray[np.float64]] = field(default_factory=list)


@contextmanager
def instrumented(monkeypatch: pytest.MonkeyPatch) -> Iterator[Executed]:
    """Watches the sampler, the physical batches and the noise of the real mechanism."""
    executed = Executed()
    batches, take = Examples.batches, GridSum.take

    def sample(n: int, rate: float, secret: RoundSecret, step: int) -> npt.NDArray[np.int64]:
        chosen = poisson_sample(n, rate, secret, step)
        executed.drawn.append((rate, chosen.tolist()))
        executed.trained.append([])
        return chosen

    def watched(self: Examples, *arguments: Any) -> Iterator[Any]:
        for batch in batches(self, *arguments):
            executed.trained[-1] += batch.indices.tolist()
            yield batch

    def taken(self: GridSum, *arguments: Any) -> list[torch.Tensor]:
        def drawn(key: bytes, deviation: float, n: int) -> npt.NDArray[np.int64]:
            values = rounded_gaussian(key, deviation, n)
            executed.noise.append(deviation * self.grid.spacing)
            executed.normal.append(values / deviation)
            return values

        with monkeypatch.context() as patch:
            patch.setattr(client.privacy.noisy_sum, "rounded_gaussian", drawn)
            return take(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(client.privacy.mechanism, "poisson_sample", sample)
        patch.setattr(Examples, "batches", watched)
        patch.setattr(GridSum, "take", taken)
        yield executed


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdaptedModel:
    return classifier(tiny_bert)


@pytest.fixture(scope="module")
def included(model: AdaptedModel) -> npt.NDArray[np.float64]:
    """Who was trained on in each of 2,000 real steps: [draws, units] of 0 and 1."""
    examples = Examples(encoded(model, UNITS), model.task)
    state = {name: array * (model.group_of(name) == "head") for name, array in random_state(model).items()}
    statement = PhaseStatement("head", RATE, 1.0, 1.0, DRAWS)
    table = np.zeros((DRAWS, UNITS))
    with pytest.MonkeyPatch.context() as monkeypatch, instrumented(monkeypatch) as executed:
        for round in range(1, ROUNDS + 1):
            secret = RoundSecret.fixed(11, "north", round)
            settings = phase("head", steps=STEPS, train=("head",))
            mechanism = DPSGD(statement, UNITS, secret)
            train_round(model, examples, state, settings, names_of(model, ["head"]), mechanism, secret, 8)
    assert len(executed.trained) == DRAWS
    for step, indices in enumerate(executed.trained):
        assert indices == executed.drawn[step][1], "exactly those who were drawn are trained on"
        assert len(set(indices)) == len(indices), "nobody twice"
        table[step, indices] = 1
    return table


def standardised(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (table - RATE) / np.sqrt(RATE * (1 - RATE))


def test_each_unit_is_included_with_the_stated_rate(included: npt.NDArray[np.float64]) -> None:
    counts = included.sum(axis=0)
    chi_square = ((counts - DRAWS * RATE) ** 2 / (DRAWS * RATE * (1 - RATE))).sum()
    assert CERTAIN < stats.chi2.sf(chi_square, UNITS) < 1 - CERTAIN
    low, high = stats.binom.ppf([CERTAIN / UNITS, 1 - CERTAIN / UNITS], DRAWS, RATE)
    assert low <= counts.min() and counts.max() <= high


def test_the_size_of_a_batch_is_binomial_and_not_fixed(included: npt.NDArray[np.float64]) -> None:
    sizes = included.sum(axis=1)
    dispersion = ((sizes - UNITS * RATE) ** 2).sum() / (UNITS * RATE * (1 - RATE))
    assert CERTAIN < stats.chi2.sf(dispersion, DRAWS) < 1 - CERTAIN
    expected = DRAWS * stats.binom.pmf(np.arange(UNITS + 1), UNITS, RATE)
    common = expected > 5
    found = np.bincount(sizes.astype(int), minlength=UNITS + 1)
    observed = [*found[common], found[~common].sum()]
    assert stats.chisquare(observed, [*expected[common], expected[~common].sum()]).pvalue > CERTAIN


def test_any_two_units_are_included_independently(included: npt.NDArray[np.float64]) -> None:
    deviations = standardised(included)
    correlations = (deviations.T @ deviations / np.sqrt(DRAWS))[np.triu_indices(UNITS, 1)]
    assert _like_standard_normal(correlations)


@pytest.mark.parametrize("lag", [1, STEPS], ids=["the next step", "the same step of the next round"])
def test_steps_and_rounds_are_independent_of_each_other(included: npt.NDArray[np.float64], lag: int) -> None:
    deviations = standardised(included)
    correlations = deviations[:-lag].T @ deviations[lag:] / np.sqrt(DRAWS - lag)
    assert _like_standard_normal(correlations.ravel())
    assert _like_standard_normal(np.diag(correlations))


def _like_standard_normal(values: npt.NDArray[np.float64]) -> bool:
    largest = stats.norm.isf(CERTAIN / len(values) / 2)
    spread = stats.chi2.sf((values**2).sum(), len(values))
    return bool(np.abs(values).max() < largest and CERTAIN < spread < 1 - CERTAIN)


@pytest.mark.parametrize("rate", [1e-4, 0.5, 1.0])
def test_extreme_rates_are_kept(rate: float) -> None:
    counts = [len(poisson_sample(5000, rate, RoundSecret.fixed(3, "north", round), 0)) for round in range(100)]
    low, high = stats.binom.ppf([CERTAIN, 1 - CERTAIN], 100 * 5000, rate)
    assert low <= sum(counts) <= high


def test_the_number_of_units_does_not_change_who_else_is_drawn() -> None:
    secret = RoundSecret.fixed(0, "north", 1)
    fewer, more = poisson_sample(50, 0.3, secret, 0), poisson_sample(51, 0.3, secret, 0)
    assert more[more < 50].tolist() == fewer.tolist()


# ------------------------------------------------------------------------------------------------ ledger and execution


def test_the_executed_rates_noise_and_steps_equal_the_ledgers_rows(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [
        phase("head", rounds=2, steps=1, sample_rate=1.0, train=("head",), clip_norm=0.7),
        phase("lora", rounds=2, steps=3, sample_rate=None, batch_size=8, clip_norm=1.3, budget_share=2.0),
    ]
    plan = plan_for(model, phases)
    site = site_for(tmp_path, model, encoded(model, 33))
    statement = site.describe(shown(plan)).privacy
    assert statement is not None
    per_round = []
    with instrumented(monkeypatch) as executed:
        for round in range(1, plan.rounds + 1):
            start = len(executed.drawn), len(executed.noise)
            assert isinstance(site.train(request_for(plan, random_state(model), round)), Release)
            rates = {rate for rate, _ in executed.drawn[start[0] :]}
            per_round.append((*rates, *set(executed.noise[start[1] :]), len(executed.noise) - start[1]))
            assert len(executed.drawn) == len(executed.noise), "each step draws once and adds noise once"
    charged = site.ledger.charges(plan.digest())
    clip_norms = {each.name: each.clip_norm for each in plan.phases}
    assert per_round == [(q, sigma * clip_norms[name], steps) for _, name, q, sigma, steps in charged]
    assert [row[0] for row in charged] == [1, 2, 3, 4]
    for stated in statement.phases:
        rows = [row for row in charged if row[1] == stated.name]
        assert sum(row[4] for row in rows) == stated.steps
        assert {row[2:4] for row in rows} == {(stated.sample_rate, stated.noise_multiplier)}
    assert [stated.sample_rate for stated in statement.phases] == [1.0, 8 / 40]


def test_each_step_of_a_site_adds_fresh_noise_and_a_round_executed_again_adds_the_same(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model, [phase(rounds=3, steps=2)])
    runs = []
    for _ in range(2):
        site = site_for(tmp_path / str(len(runs)), model, encoded(model, 20), fixed_seed=5)
        site.describe(shown(plan))
        with instrumented(monkeypatch) as executed:
            releases = [site.train(request_for(plan, random_state(model), round)) for round in (1, 2, 3)]
        assert all(isinstance(release, Release) for release in releases)
        runs.append(np.stack(executed.normal))
    assert np.array_equal(runs[0], runs[1])
    correlations = np.corrcoef(runs[0])[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(runs[0].shape[1])


def test_two_sites_with_secrets_of_their_own_add_different_noise(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model)
    with instrumented(monkeypatch) as executed:
        for name in ("a", "b"):
            site = site_for(tmp_path / name, model)
            site.describe(shown(plan))
            site.train(request_for(plan, random_state(model)))
    first, _, second, _ = executed.normal
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


# --------------------------------------------------------------------------------------------------------------- noise


def test_the_released_noise_is_normal_with_standard_deviation_sigma_times_clip_norm(model: AdaptedModel) -> None:
    names = names_of(model, ("head", "A", "B"))
    state = {name: np.zeros(shape, np.float32) for name, shape in model.spec.shapes}
    sigma, clip_norm, expected_batch = 1.7, 0.6, 8.0
    sums = []
    for round in range(1, 11):
        secret = RoundSecret.fixed(1, "north", round)
        mechanism = DPSGD(PhaseStatement("phase", 0.2, sigma, clip_norm, 1), 40, secret)
        settings = phase(steps=1, learning_rate=1.0)
        update = train_round(model, Examples([], model.task), state, settings, names, mechanism, secret, 4)
        sums.append(flat(update) * -expected_batch)
    noise = np.concatenate(sums) / (sigma * clip_norm)
    assert stats.kstest(noise, "norm").pvalue > CERTAIN
    assert CERTAIN < stats.chi2.sf((noise**2).sum(), len(noise)) < 1 - CERTAIN
    assert abs(noise.mean()) < 4 / np.sqrt(len(noise))
    neighbours = noise[1:] @ noise[:-1] / np.sqrt(len(noise))
    assert abs(neighbours) < 4


def test_noise_depends_on_the_whole_secret_and_not_on_the_seed_of_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7 + 2**32)
    assert torch.equal(*(torch.randn(4, generator=each) for each in same)), "torch keeps 32 bits: why it is not used"
    monkeypatch.setattr(RoundSecret, "torch_seed", lambda *_: 7)
    keys = [RoundSecret(bytes(31) + last).derive("noise", 0) for last in (b"\0", b"\1")]
    first, second = (rounded_gaussian(key, 2.0**20, 1000) for key in keys)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_labels_and_steps_have_randomness_of_their_own() -> None:
    secret = RoundSecret.from_system()
    keys = {secret.derive(label, step) for label in ("sample", "noise", "dropout") for step in range(10)}
    assert len(keys) == 30 and secret.value not in keys
    assert RoundSecret.fixed(1, "north", 2).value != RoundSecret.fixed(1, "north", 1).value
    assert len({RoundSecret.from_system().value for _ in range(10)}) == 10


def test_a_secret_does_not_show_itself() -> None:
    secret = RoundSecret.from_system()
    for text in (repr(secret), str(secret), f"{secret}"):
        assert secret.value.hex() not in text and repr(secret.value) not in text
