"""No single record moves what is summed by more than the clip norm, whatever is in it; a broken one not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from small_sites import (
    SECRET,
    classifier,
    clipped_sum,
    encoded,
    flat,
    language_model,
    names_of,
    phase,
    plan_for,
    policy_for,
    random_state,
    void_gradients,
)

from client import egress
from client.privacy.clipping import clip_factors
from client.privacy.mechanism import DPSGD, NoPrivacy, PrivacyMechanism
from client.privacy.noisy_sum import FloatSum
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.errors import CoverageError
from common.examples import Examples
from common.messages import PhaseStatement, RefusalReason
from common.sections import LoraSection
from common.tasks.base import Encoded

Build = Callable[..., AdaptedModel]
SUMMED = PhaseStatement("phase", 1.0, 1e-30, 1.0, 1)


def of_kind(mechanism: type[DPSGD] | type[NoPrivacy]) -> PrivacyMechanism:
    """The mechanism with noise too small to see; on a grid its noise could not be that small."""
    return DPSGD(SUMMED, 1, SECRET, "fast") if mechanism is DPSGD else NoPrivacy(SUMMED, 1, SECRET)


KINDS = pytest.mark.parametrize("kind", ["classifier", "mapped classifier", "language_model"])
MAP = {"feature_map": "held-out-texts", "feature_levels": 3, "feature_rank": 6}
"""The coordinator's map before the head; what it holds is the coordinator's choice, as the adapter is."""
CUTS = pytest.mark.parametrize("layers", [2, None], ids=["frozen prefix cached", "from token ids"])


@pytest.fixture
def build(tiny_bert: Path, tiny_llama: Path) -> Build:
    def built(kind: str, **settings: Any) -> AdaptedModel:
        if kind == "language_model":
            return language_model(tiny_llama, **settings)
        return classifier(tiny_bert, **settings, **(MAP if kind == "mapped classifier" else {}))

    return built


def without(items: Sequence[Encoded | None], index: int) -> list[Encoded | None]:
    return [*items[:index], *items[index + 1 :]]


def with_token(item: Encoded | None, token: int) -> Encoded:
    """The example with one of its first tokens replaced."""
    assert item is not None
    ids = item.ids.copy()
    ids[1] = token
    return Encoded(ids, item.target)


def outside_the_vocabulary(model: AdaptedModel) -> int:
    return int(model.network.config.vocab_size) + 7


@KINDS
def test_removing_any_one_example_moves_the_clipped_sum_by_at_most_the_clip_norm(build: Build, kind: str) -> None:
    model = build(kind)
    void_gradients(model, token=5)
    names, received = names_of(model, ("head", "A", "B")), random_state(model)
    items = encoded(model, 10)
    items[4] = with_token(items[4], 5)
    clip_norm = 0.5
    whole = flat(clipped_sum(model, items, received, names, clip_norm))
    moved = [
        np.linalg.norm(whole - flat(clipped_sum(model, without(items, index), received, names, clip_norm)))
        for index in range(len(items))
    ]
    assert max(moved) <= clip_norm * (1 + 1e-5)
    assert np.median(moved) > 0.99 * clip_norm, "most are clipped, so each of them moves it by nearly that much"
    assert moved[4] <= 1e-5


def test_with_dropout_one_example_would_move_what_the_others_contribute(tiny_bert: Path) -> None:
    """Which is why a policy refuses it: masks are drawn for all rows in turn."""
    model = classifier(tiny_bert, LoraSection(r=4, alpha=8.0, layers=2, dropout=0.5))
    items, received, names = encoded(model, 33), random_state(model), names_of(model, ("B",))
    moved = flat(clipped_sum(model, items, received, names)) - flat(clipped_sum(model, items[1:], received, names))
    assert np.linalg.norm(moved) > 1.5 * SUMMED.clip_norm
    assert policy_for(model).refusal(plan_for(model)) is RefusalReason.POLICY


@KINDS
@CUTS
@pytest.mark.parametrize("mechanism", [DPSGD, NoPrivacy])
def test_an_example_that_yields_nan_contributes_exactly_zero(
    build: Build, kind: str, layers: int | None, mechanism: type[DPSGD] | type[NoPrivacy]
) -> None:
    model = build(kind, lora=LoraSection(r=4, layers=layers))
    void_gradients(model, token=5)
    names, received, items = names_of(model, ("head", "B")), random_state(model), encoded(model, 8)
    broken = [*items[:3], with_token(items[3], 5), *items[4:]]
    removed = [*items[:3], None, *items[4:]]
    found, expected = (
        clipped_sum(model, each, received, names, mechanism=of_kind(mechanism)) for each in (broken, removed)
    )
    assert np.linalg.norm(flat(expected)) > 0.1
    if mechanism is DPSGD:
        assert np.array_equal(flat(found), flat(expected))
    else:  # the others of its physical batch were summed one by one
        assert np.allclose(flat(found), flat(expected), rtol=0, atol=2e-6)


@KINDS
@CUTS
@pytest.mark.parametrize("mechanism", [DPSGD, NoPrivacy])
def test_an_example_that_fails_contributes_exactly_zero_and_the_others_are_unchanged(
    build: Build, kind: str, layers: int | None, mechanism: type[DPSGD] | type[NoPrivacy]
) -> None:
    model = build(kind, lora=LoraSection(r=4, layers=layers))
    names, received, items = names_of(model, ("head", "B")), random_state(model), encoded(model, 8)
    broken = [*items[:3], with_token(items[3], outside_the_vocabulary(model)), *items[4:]]
    removed = [*items[:3], None, *items[4:]]
    found, expected = (
        clipped_sum(model, each, received, names, mechanism=of_kind(mechanism)) for each in (broken, removed)
    )
    assert np.linalg.norm(flat(expected)) > 0.1
    assert np.allclose(flat(found), flat(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("limit", [4 << 30, 0], ids=["cached", "anew in each step"])
def test_a_failing_example_does_not_even_change_how_the_others_pass_the_frozen_prefix(build: Build, limit: int) -> None:
    model = build("classifier")
    names, received, items = names_of(model, ("head", "B")), random_state(model), encoded(model, 8)
    broken = [*items[:3], with_token(items[3], outside_the_vocabulary(model)), *items[4:]]
    removed = [*items[:3], None, *items[4:]]
    found, expected = (
        clipped_sum(model, Examples(each, model.task, cache_limit=limit), received, names) for each in (broken, removed)
    )
    assert np.array_equal(flat(found), flat(expected))


@pytest.mark.parametrize(
    "error", [RuntimeError, TypeError, KeyError, AssertionError, OverflowError, MemoryError, BaseException]
)
def test_whatever_an_example_raises_it_contributes_zero(
    build: Build, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("classifier")
    names, received, items = names_of(model, ("head",)), random_state(model), encoded(model, 6)
    victim = items[2]
    assert victim is not None
    items[2] = Encoded(victim.ids, np.asarray(2, np.int64))
    for index in (0, 1, 3, 4, 5):
        other = items[index]
        assert other is not None
        items[index] = Encoded(other.ids, np.asarray(index % 2, np.int64))
    expected = clipped_sum(model, [*items[:2], None, *items[3:]], received, names)
    loss = model.task.per_example_loss

    def touchy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if (targets == 2).any():
            raise error("this label")
        return loss(logits, targets)

    monkeypatch.setattr(model.task, "per_example_loss", touchy)
    assert np.allclose(flat(clipped_sum(model, items, received, names)), flat(expected), rtol=0, atol=1e-6)


def test_what_no_example_could_train_is_still_an_error(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("classifier")

    def refuse(*_: object) -> None:
        raise CoverageError("privacy: nothing can be clipped here")

    monkeypatch.setattr("client.privacy.mechanism.unit_gradients", refuse)
    with pytest.raises(CoverageError):
        clipped_sum(model, encoded(model, 3), random_state(model), names_of(model, ("head",)))


def test_a_batch_that_fails_half_way_is_not_counted_twice(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("classifier")
    names, received, items = names_of(model, ("head", "B")), random_state(model), encoded(model, 6, longest=10)
    expected = clipped_sum(model, items, received, names)
    failures = iter([True])
    add = FloatSum.add

    class Fails(list[torch.Tensor]):
        """A gradient whose last tensors cannot be had."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            yield self[0]
            raise torch.OutOfMemoryError("in the middle of a batch's sums")

    def out_of_memory(self: FloatSum, gradients: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
        add(self, Fails(gradients) if next(failures, False) else gradients, factors)

    monkeypatch.setattr(FloatSum, "add", out_of_memory)
    found = clipped_sum(model, items, received, names)
    assert next(failures, None) is None, "it did fail"
    assert np.allclose(flat(found), flat(expected), rtol=0, atol=2e-6)


@KINDS
@pytest.mark.parametrize("size", [3e38, np.inf, np.nan, 1e-42])
def test_a_hostile_adapter_still_yields_a_finite_release_of_the_whole_layout(
    build: Build, kind: str, size: float
) -> None:
    model = build(kind)
    names = names_of(model, ("head", "B"))
    received = random_state(model)
    received = {name: (np.sign(array) * np.float32(size)).astype(np.float32) for name, array in received.items()}
    update = train_round(
        model,
        Examples(encoded(model, 8), model.task),
        received,
        phase(steps=2, learning_rate=0.1),
        names,
        DPSGD(PhaseStatement("phase", 0.5, 1.0, 1.0, 2), 8, SECRET),
        SECRET,
        4,
    )
    sent = load(egress.release(update, model.spec.part(names)).payload)
    assert sorted(sent) == sorted(names)
    assert all(np.isfinite(array).all() for array in sent.values())


@pytest.mark.parametrize("noise", ["fast", "secure"])
@pytest.mark.parametrize("norm", [1e20, 1e30])
def test_a_gradient_whose_square_is_beyond_fp32_is_clipped_like_any_other(norm: float, noise: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 1)).train()
    parameters = dict(model.named_parameters())
    inputs = torch.tensor([[3.0, 0, 0], [norm, norm, 0], [0, 4.0, 0]])
    mechanism: PrivacyMechanism = DPSGD(PhaseStatement("phase", 1.0, 1e-4, 1.0, 1), 1, SECRET, noise)
    before = torch.nn.utils.parameters_to_vector(parameters.values()).detach()
    with mechanism.attach(model, parameters, torch.optim.SGD(parameters.values(), lr=1.0)):
        mechanism.accumulate(lambda: model(inputs).squeeze(1))
        mechanism.step(0)
    found = before - torch.nn.utils.parameters_to_vector(parameters.values()).detach()
    first, third = np.array([3, 0, 0, 1]) / np.sqrt(10), np.array([0, 4, 0, 1]) / np.sqrt(17)
    second = np.array([1, 1, 0, 0]) / np.sqrt(2)
    assert np.allclose(found.numpy(), first + second + third, atol=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e10, 1e30, 1e36, 3e38])
@pytest.mark.parametrize("clip_norm", [1e-6, 1.0, 1e6])
def test_no_rounding_lets_a_contribution_exceed_the_clip_norm(size: float, clip_norm: float) -> None:
    values = np.random.default_rng(0).uniform(-size, size, (4, 5000)).astype(np.float32)
    gradients = [torch.from_numpy(values[:, :4000]), torch.from_numpy(values[:, 4000:])]
    factors = clip_factors(gradients, clip_norm)
    clipped = (torch.cat(gradients, 1) * factors[:, None]).double()
    norms = clipped.norm(dim=1).numpy()
    assert (norms <= clip_norm).all()
    true = np.linalg.norm(values.astype(np.float64), axis=1)
    enough = clip_norm / true > 2.0**-120
    assert np.allclose(norms[enough], np.minimum(true, clip_norm)[enough], rtol=1e-5)
