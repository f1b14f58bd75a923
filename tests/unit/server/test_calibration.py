"""A head is made as sure as it is right on the server's own labels, answers as before, and else stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.examples import Examples
from common.sections import PhaseSection
from common.tasks.base import Encoded
from server.calibration import MOST, Calibrator, best_temperature, log_losses
from server.linear_head import HeldOutFeatures

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]
WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"


def phase(*train: str) -> PhaseSection:
    return PhaseSection.model_validate({"name": "p", "rounds": 1, "sample_rate": 1.0, "train": train})


# ---- the temperature ------------------------------------------------------------------------------------------------


def test_two_classes_by_hand() -> None:
    """Three of four texts right, each by a margin of 1: best is p = 3/4, so b·1 = log 3 and T = 1/log 3."""
    logits = np.array([[1.0, 0.0]] * 4)
    labels = np.array([0, 0, 0, 1])
    assert best_temperature(logits, labels) == pytest.approx(1 / np.log(3), rel=1e-9)


@pytest.mark.parametrize("scale", [0.01, 1.0, 64.0])
def test_no_other_temperature_of_a_fine_grid_has_a_smaller_loss(scale: float) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 300)
    logits = scale * (2 * np.eye(5)[labels] + generator.standard_normal((300, 5)))
    found = best_temperature(logits, labels)
    assert found is not None
    grid = found * np.geomspace(0.2, 5, 2001)  # found itself is the middle one
    other = torch.nn.functional.cross_entropy
    losses = [float(other(torch.from_numpy(logits / one), torch.from_numpy(labels))) for one in grid]
    assert np.argmin(losses) == 1000
    assert log_losses(logits / found, labels).mean() == pytest.approx(min(losses), rel=1e-12)


def test_a_temperature_is_the_same_every_time() -> None:
    generator = np.random.default_rng(1)
    logits, labels = generator.standard_normal((50, 3)), generator.integers(0, 3, 50)
    logits[np.arange(50), labels] += 1
    assert best_temperature(logits, labels) == best_temperature(logits.copy(), labels.copy())


def test_where_no_temperature_is_best_there_is_none() -> None:
    right = np.eye(3)
    for logits, labels in (
        (right, np.arange(3)),  # all right: the smaller the better
        (right, np.array([1, 2, 0])),  # all wrong: the larger the better
        (np.ones((3, 3)), np.arange(3)),  # says nothing
        (np.zeros((0, 3)), np.arange(0)),
        (MOST * 100 * np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1])),  # beyond what is allowed
    ):
        assert best_temperature(logits, labels) is None


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(adapted_model: Load, tiny_bert: Path) -> AdaptedModel:
    settings = {"feature_map": "held-out-texts", "feature_levels": 3, "feature_rank": 6}
    return adapted_model(tiny_bert, lora={"r": 4, "layers": 2}, **settings)


@pytest.fixture
def adapter(model: AdaptedModel, random_adapter: Draw) -> AdapterState:
    """Before any LoRA phase: every B is zero."""
    drawn = random_adapter(model)
    return {name: np.zeros_like(array) if "lora_B" in name else array for name, array in drawn.items()}


def texts_of(model: AdaptedModel, labels: list[int]) -> Examples:
    """A text for each label, the same ones whatever the labels are."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(3, 30, len(labels))
    ids = [generator.integers(5, 40, length).astype(np.int32) for length in lengths]
    return Examples(
        [Encoded(one, np.asarray(label, np.int64)) for one, label in zip(ids, labels, strict=True)], model.task
    )


def logits_of(model: AdaptedModel, adapter: AdapterState, examples: Examples) -> torch.Tensor:
    """As the model itself computes them, in the order of the texts."""
    model.load(adapter)
    cut = model.cut_for([WEIGHT, BIAS], adapter)
    with torch.no_grad():
        (batch,) = examples.batches(np.arange(len(examples)), 32, model, cut)
        return model.top(batch.inputs, batch.mask, cut)[: len(examples)]


@pytest.fixture
def examples(model: AdaptedModel, adapter: AdapterState) -> Examples:
    """Sixty texts, of which the adapter answers two thirds rightly."""
    answers = logits_of(model, adapter, texts_of(model, [0] * 60)).argmax(dim=1).tolist()
    return texts_of(model, [(answer + (row % 3 == 0)) % 3 for row, answer in enumerate(answers)])


@pytest.fixture
def calibrator(model: AdaptedModel, examples: Examples) -> Calibrator:
    return Calibrator(HeldOutFeatures(model, examples))


def same(one: AdapterState, other: AdapterState) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_calibrated_head_answers_the_same_with_the_least_loss_and_nothing_else_changes(
    model: AdaptedModel, adapter: AdapterState, examples: Examples, calibrator: Calibrator
) -> None:
    found = calibrator.calibrated(adapter, phase("head"))
    before, after = (logits_of(model, one, examples) for one in (adapter, found))
    assert torch.equal(before.argmax(dim=1), after.argmax(dim=1))
    labels = model.task.collate([one.target for one in examples.encoded if one is not None], 1)
    grid = [model.task.per_example_loss(before / t, labels).mean().item() for t in np.geomspace(1e-3, 1e3, 6001)]
    assert model.task.per_example_loss(after, labels).mean().item() == pytest.approx(min(grid), rel=1e-5)
    assert {name for name in found if not np.array_equal(found[name], adapter[name])} == {WEIGHT, BIAS}
    assert all(array.dtype == np.float32 for array in found.values())


def test_a_head_that_is_64_times_as_sure_comes_back_to_the_same(adapter: AdapterState, calibrator: Calibrator) -> None:
    once = calibrator.calibrated(adapter, phase("head"))
    surer = {name: array * np.float32(64 if name in (WEIGHT, BIAS) else 1) for name, array in adapter.items()}
    for given in (surer, once):
        again = calibrator.calibrated(given, phase("head"))
        for name in (WEIGHT, BIAS):
            np.testing.assert_allclose(again[name], once[name], rtol=1e-5)


def test_only_a_head_that_was_trained_alone_on_frozen_features_is_calibrated(
    adapter: AdapterState, calibrator: Calibrator, model: AdaptedModel, random_adapter: Draw
) -> None:
    adapted = random_adapter(model)
    for given, trained in ((adapter, ("head", "lora")), (adapter, ("lora",)), (adapted, ("head",))):
        assert same(calibrator.calibrated(given, phase(*trained)), given)


def test_a_hostile_head_is_left_alone(adapter: AdapterState, calibrator: Calibrator) -> None:
    for value in (np.nan, np.inf, 3e38):
        wild = {**adapter, BIAS: np.full_like(adapter[BIAS], value)}
        assert same(calibrator.calibrated(wild, phase("head")), wild)


def test_texts_are_mapped_once_for_all_who_look_at_them(
    adapter: AdapterState, calibrator: Calibrator, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, frozen_features = [], Examples.frozen_features

    def counted(self: Examples, *arguments: Any) -> torch.Tensor:
        passes.append(self)
        return frozen_features(self, *arguments)

    monkeypatch.setattr(Examples, "frozen_features", counted)
    calibrator.held_out.seen(adapter)
    calibrator.calibrated(adapter, phase("head"))
    assert passes == [examples]


@pytest.mark.parametrize("loss", ["squared error", "smoothed labels"])
def test_a_task_with_another_loss_is_left_alone(
    loss: str, adapter: AdapterState, model: AdaptedModel, calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression on the first logit; and a cross-entropy whose minimum lies elsewhere."""

    def squared(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] - targets).square()

    def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

    monkeypatch.setattr(model.task, "per_example_loss", squared if loss == "squared error" else smoothed)
    assert same(calibrator.calibrated(adapter, phase("head")), adapter)


def test_a_regression_on_real_numbers_is_left_alone(
    adapter: AdapterState, model: AdaptedModel, calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.task, "collate", lambda targets, length: torch.rand(len(targets)))
    assert same(calibrator.calibrated(adapter, phase("head")), adapter)


def test_a_language_model_is_left_alone(adapted_model: Load, tiny_llama: Path, random_adapter: Draw) -> None:
    model = adapted_model(tiny_llama, name="causal-lm", labels=())
    ids = np.arange(5, 15)
    one = Encoded(ids.astype(np.int32), ids.astype(np.int64))
    given: dict[str, Any] = random_adapter(model)
    found = Calibrator(HeldOutFeatures(model, Examples([one], model.task))).calibrated(given, phase("head"))
    assert same(found, given)
