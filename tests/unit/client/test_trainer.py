"""Local training: which tensors a step clips, noises and moves, and what is done to its noised gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from small_sites import SECRET, encoded, names_of, random_state
from torch import nn

from client.noised_gradient import smoothed
from client.privacy.mechanism import DPSGD, NoPrivacy
from client.privacy.noisy_sum import GridSum
from client.privacy.sampling import RoundSecret
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.examples import Examples
from common.messages import PhaseStatement, Tensors
from common.sections import PhaseSection

ALL = ("head", "A", "B")
METRICS = ("loss", "accuracy")


def phase(algorithm: str = "la-lora", steps: int = 4, **settings: Any) -> PhaseSection:
    fixed = {"name": "phase", "rounds": 1, "sample_rate": 0.5, "train": ("head", "lora")}
    return PhaseSection(**{**fixed, "algorithm": algorithm, "steps": steps, "learning_rate": 0.5, **settings})


class Watched(DPSGD):
    """DP-SGD that remembers what each step of a round with these tensors clipped, gave to the optimiser and moved."""

    def __init__(self, model: AdaptedModel, names: Sequence[str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.model, self.names, self.attached = model, tuple(names), 0
        self.clipped: list[tuple[str, ...]] = []
        self.gradients: list[AdapterState] = []
        self.states: list[AdapterState] = []

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        self.attached += 1
        with super().attach(model, parameters, optimizer):
            yield

    def step(self, step: int) -> None:
        self.clipped.append(tuple(self.parameters))
        hook = self.optimizer.register_step_pre_hook(lambda *_: self._keep())
        super().step(step)
        hook.remove()
        self.states.append(self.model.state())

    def _keep(self) -> None:
        """What the optimiser is given, of every tensor of the round."""
        ordered = zip(self.names, self.optimizer.param_groups[0]["params"], strict=True)
        self.gradients.append({name: p.grad.numpy().copy() for name, p in ordered if p.grad is not None})


def train(
    model: AdaptedModel,
    settings: PhaseSection,
    received: Tensors | None = None,
    secret: RoundSecret = SECRET,
    items: Sequence[Any] | None = None,
    noise: float = 1.0,
    kind: str = "secure",
    metrics: Sequence[str] = (),
    groups: Sequence[str] = ALL,
) -> tuple[AdapterState, Watched]:
    """The round's update, and the mechanism that watched it."""
    names, promised = names_of(model, groups), PhaseStatement("phase", 0.5, noise, 0.5, settings.steps)
    mechanism = Watched(model, names, promised, 24, secret, kind, metrics, 0.05 if metrics else 0.0)
    examples = Examples(encoded(model, 24) if items is None else items, model.task)
    received = random_state(model) if received is None else received
    update = train_round(model, examples, received, settings, names, mechanism, secret, 4)
    return update, mechanism


# ---- la-lora: B and A in turn, step by step -------------------------------------------------------------------------


def test_in_la_lora_a_step_clips_noises_and_moves_b_or_a_in_turn_and_the_head_always(model: AdaptedModel) -> None:
    received = random_state(model)
    _, watched = train(model, phase(steps=5), received)
    before: Tensors = received
    for index, after in enumerate(watched.states):
        moving = set(names_of(model, ("head", "A" if index % 2 else "B")))
        assert set(watched.clipped[index]) == moving, "the clipped vector has only the moving matrices"
        assert set(watched.gradients[index]) == moving, "noise falls on these only"
        assert {name for name in after if not np.array_equal(after[name], before[name])} == moving
        before = after


def test_of_an_algorithm_that_moves_both_matrices_every_step_has_both(model: AdaptedModel) -> None:
    _, watched = train(model, phase("fedit", steps=3))
    assert [set(names) for names in watched.clipped] == [set(names_of(model, ALL))] * 3
    assert watched.attached == 1


def test_the_moving_matrices_alone_are_clipped_to_the_norm(model: AdaptedModel) -> None:
    """One unit whose gradient is far longer than C: in a step of B, that of A does not take up any of the norm."""
    promised = PhaseStatement("phase", 1.0, 1e-30, 1e-4, 1)
    lengths = {}
    for algorithm in ("la-lora", "fedit"):
        names = names_of(model, ("A", "B"))
        mechanism = Watched(model, names, promised, 1, SECRET, "fast")
        settings = phase(algorithm, steps=1, sample_rate=1.0, train=("lora",))
        examples = Examples(encoded(model, 1), model.task)
        train_round(model, examples, random_state(model), settings, names, mechanism, SECRET, 4)
        gradients = mechanism.gradients[0].items()
        lengths[algorithm] = {
            matrix: np.linalg.norm([np.linalg.norm(g.astype(np.float64)) for name, g in gradients if matrix in name])
            for matrix in ("lora_A", "lora_B")
        }
    assert lengths["la-lora"] == {"lora_A": 0.0, "lora_B": pytest.approx(1e-4, rel=1e-4)}
    both = lengths["fedit"]
    assert np.hypot(both["lora_A"], both["lora_B"]) == pytest.approx(1e-4, rel=1e-4)
    assert both["lora_B"] < 0.95e-4


def test_every_step_draws_noise_of_its_own_though_the_mechanism_is_attached_again(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without examples a gradient is noise alone: σC/(q·n) on each coordinate, independent from step to step."""
    keys: list[tuple[bytes, int]] = []
    take = GridSum.take

    def recorded(self: GridSum, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        keys.append((secret.value, step))
        return take(self, secret, step)

    monkeypatch.setattr(GridSum, "take", recorded)
    _, watched = train(model, phase(steps=6), items=[])
    assert watched.attached == 6
    assert keys == [(SECRET.value, step) for step in range(6)], "no step's key is used twice"
    scale = 1.0 * 0.5 / (0.5 * 24)
    drawn = [np.concatenate([array.ravel() / scale for array in each.values()]) for each in watched.gradients]
    for noise in drawn:
        assert np.sqrt(np.mean(noise**2)) == pytest.approx(1.0, abs=5 / np.sqrt(2 * noise.size))
    for index, one in enumerate(drawn):
        for other in drawn[index + 1 :]:
            size = min(one.size, other.size)
            assert abs(np.corrcoef(one[:size], other[:size])[0, 1]) < 5 / np.sqrt(size)


def test_every_step_samples_units_of_its_own_though_the_mechanism_is_attached_again(model: AdaptedModel) -> None:
    _, watched = train(model, phase(steps=6))
    drawn = [tuple(watched.sample(24, step)) for step in range(6)]
    assert len(set(drawn)) == 6


def test_a_round_that_is_run_again_is_the_same_release_and_another_secret_is_another(model: AdaptedModel) -> None:
    one, _ = train(model, phase(steps=3))
    again, _ = train(model, phase(steps=3))
    other, _ = train(model, phase(steps=3), secret=RoundSecret.fixed(0, "site", 2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)


def test_metrics_are_means_over_all_steps_though_the_mechanism_is_attached_again(model: AdaptedModel) -> None:
    """At learning rate 1e-12 nothing moves, so the metrics of each step depend on its sample and its noise alone."""
    means = {}
    for algorithm in ("fedit", "la-lora"):
        _, watched = train(
            model, phase(algorithm, steps=4, learning_rate=1e-12), noise=1e-9, kind="fast", metrics=METRICS
        )
        means[algorithm] = watched.means()
    assert means["la-lora"] == pytest.approx(means["fedit"], abs=1e-4)
    assert 0 < means["la-lora"]["loss"] < 1


def test_without_privacy_steps_alternate_too_and_the_metrics_are_kept(model: AdaptedModel) -> None:
    received, settings = random_state(model), phase(steps=1, sample_rate=1.0)
    promised = PhaseStatement("phase", 1.0, 0.0, 0.5, 1)
    mechanism = NoPrivacy(promised, 24, SECRET, METRICS)
    examples = Examples(encoded(model, 24), model.task)
    update = train_round(model, examples, received, settings, names_of(model, ALL), mechanism, SECRET, 4)
    assert {name for name in update if update[name].any()} == set(names_of(model, ("head", "B")))
    twice = NoPrivacy(promised, 24, SECRET, METRICS)
    section = settings.model_copy(update={"steps": 2, "learning_rate": 1e-12})
    train_round(model, examples, received, section, names_of(model, ALL), twice, SECRET, 4)
    assert twice.means() == pytest.approx(mechanism.means(), abs=1e-5)


def test_adamw_keeps_its_moments_of_a_matrix_over_the_steps_that_move_the_other(model: AdaptedModel) -> None:
    """Step 2 moves A and may not move B; for B, step 3 is Adam's second, from the noise of steps 1 and 3 alone."""
    settings = phase(steps=3, optimizer="adamw", learning_rate=0.125)
    received = random_state(model)
    _, watched = train(model, settings, received, items=[])
    names = names_of(model, ("B",))
    first, second, third = watched.states
    for name in names:
        assert np.array_equal(first[name], second[name])
        assert not np.array_equal(second[name], third[name])
        # By hand (Kingma & Ba 2015, Algorithm 1): β₁ = 0.9, β₂ = 0.999, both with bias correction.
        g1, g2 = (watched.gradients[step][name].astype(np.float64) for step in (0, 2))
        m = 0.1 * (0.9 * g1 + g2) / (1 - 0.9**2)
        v = 0.001 * (0.999 * g1**2 + g2**2) / (1 - 0.999**2)
        expected = second[name] - 0.125 * m / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(third[name], expected, atol=1e-5)


# ---- FedProx --------------------------------------------------------------------------------------------------------


def test_the_proximal_term_pulls_towards_what_was_received_by_hand(model: AdaptedModel) -> None:
    """Without examples, with noise n₁, n₂ and η = 1/2, μ = 1/4: θ₁ = θ - n₁/2, θ₂ = θ₁ - n₂/2 - (1/8)(θ₁ - θ)."""
    plain, watched = train(model, phase("ffa", steps=2), items=[], groups=("head", "B"))
    pulled, _ = train(model, phase("ffa", steps=2, proximal=0.25), items=[], groups=("head", "B"))
    for name in plain:
        first, second = (-0.5 * watched.gradients[step][name].astype(np.float64) for step in (0, 1))
        np.testing.assert_allclose(plain[name], first + second, atol=1e-6)
        np.testing.assert_allclose(pulled[name], first + second - first / 8, atol=1e-6)


def test_the_first_step_has_no_proximal_term(model: AdaptedModel) -> None:
    plain, _ = train(model, phase("ffa", steps=1), groups=("head", "B"))
    pulled, _ = train(model, phase("ffa", steps=1, proximal=4.0), groups=("head", "B"))
    assert all(np.array_equal(plain[name], pulled[name]) for name in plain)


def test_the_proximal_term_leaves_a_matrix_alone_in_a_step_that_does_not_move_it(model: AdaptedModel) -> None:
    _, watched = train(model, phase(steps=2, proximal=0.25))
    first, second = watched.states
    for name in names_of(model, ("B",)):
        assert np.array_equal(first[name], second[name])


# ---- smoothing ------------------------------------------------------------------------------------------------------

TAPS = np.exp(-0.5 * np.arange(-2, 3) ** 2.0)
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def test_a_is_smoothed_along_its_inputs_b_along_its_outputs_and_the_head_not_at_all() -> None:
    impulse = torch.zeros(3, 9)
    impulse[1, 4] = 1.0
    expected = np.zeros((3, 9))
    expected[1, 2:7] = TAPS / TAPS.sum()
    np.testing.assert_allclose(smoothed(A, impulse, 1.0).numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(smoothed(B, impulse.T, 1.0).numpy(), expected.T, atol=1e-7)
    assert torch.equal(smoothed("classifier.weight", impulse, 1.0), impulse)


def test_at_width_one_the_filter_is_within_three_hundredths_of_the_papers() -> None:
    assert np.abs(TAPS / TAPS.sum() - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.03


@pytest.mark.parametrize("width", [0.5, 1.0, 16.0])
def test_a_constant_and_a_zero_stay_what_they_are_up_to_the_border(width: float) -> None:
    np.testing.assert_allclose(smoothed(A, torch.full((2, 7), 3.0), width).numpy(), 3.0, rtol=1e-6)
    assert not smoothed(B, torch.zeros(7, 2), width).any()


def test_smoothing_is_what_the_reference_computes_at_the_border_too() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 11)).astype(np.float32)
    offsets = np.arange(11)[:, None] - np.arange(11)
    weights = np.where(np.abs(offsets) <= 5, np.exp(-0.5 * (offsets / 2.5) ** 2.0), 0.0)
    expected = rows @ (weights / weights.sum(axis=1, keepdims=True)).T
    np.testing.assert_allclose(smoothed(A, torch.from_numpy(rows), 2.5).numpy(), expected, atol=1e-6)


def test_smoothing_acts_on_the_noised_gradient_and_before_the_optimiser(model: AdaptedModel) -> None:
    plain, watched = train(model, phase(steps=2))
    filtered, _ = train(model, phase(steps=2, smoothing=1.0))
    for name in names_of(model, ("B",)):
        expected = -0.5 * smoothed(name, torch.from_numpy(watched.gradients[0][name]), 1.0).numpy()
        np.testing.assert_allclose(filtered[name], expected, atol=1e-6)
        assert not np.allclose(filtered[name], plain[name], atol=1e-3)


def test_smoothing_and_the_proximal_term_leave_the_noise_of_a_step_as_it_is(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Post-processing: without examples, what leaves the mechanism in each step is bit for bit the same."""
    released: list[list[torch.Tensor]] = []
    take = GridSum.take

    def kept(self: GridSum, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        released.append([tensor.clone() for tensor in take(self, secret, step)])
        return [tensor.clone() for tensor in released[-1]]

    monkeypatch.setattr(GridSum, "take", kept)
    for settings in ({}, {"smoothing": 2.0, "proximal": 0.5}):
        train(model, phase(steps=3, **settings), items=[])
    for one, other in zip(released[:3], released[3:], strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
