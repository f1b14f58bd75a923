"""A noisy head is brought closer to the server's own texts, the more of it is noise, and by nothing of their labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from common.adapted import AdaptedModel
from common.adapter import FEATURE_MAP, AdapterState
from common.examples import Examples
from common.sections import PhaseSection
from common.tasks.base import Encoded
from server import refinement
from server.linear_head import Head, HeldOutFeatures
from server.refinement import Refiner, accumulated, discriminant, refined, step_deviations

Load = Callable[..., AdaptedModel]
HEAD = "base_model.model.classifier."
LIKELY = 40.0
"""A logit so large that the other classes have no share."""


def phase(**settings: Any) -> PhaseSection:
    head = {"name": "p", "rounds": 1, "sample_rate": 1.0, "train": ("head",), "server_refinement": True}
    return PhaseSection(**{**head, **settings})


def clusters(number: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Texts [n, 40] around five centres, and which centre each is from; the classes are of unequal size."""
    generator = np.random.default_rng(seed)
    centres = 0.5 * np.random.default_rng(99).standard_normal((5, 40))
    classes = generator.choice(5, number, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    return centres[classes] + generator.standard_normal((number, 40)), classes


# ---- the noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.8])
def test_the_noise_adds_up_as_heavy_ball_carries_it(momentum: float) -> None:
    """Brute force: a unit of noise in one round moves the adapter so far; independent rounds add their variances."""
    deviations = [0.3, 0.1, 0.2, 0.4]
    variance = 0.0
    for struck, deviation in enumerate(deviations):
        position = velocity = 0.0
        for round in range(len(deviations)):
            velocity = momentum * velocity + (deviation if round == struck else 0.0)
            position += velocity
        variance += position**2
    assert accumulated(deviations, momentum) == pytest.approx(variance**0.5)


def test_no_round_or_no_noise_is_no_deviation() -> None:
    assert accumulated([], 0.8) == accumulated([0.0, 0.0], 0.8) == 0.0


def test_the_noise_of_a_phase_is_that_of_its_own_rounds() -> None:
    history = [{"round": 0, "phase": "base"}]
    history += [{"round": round, "phase": name, "noise": 0.1 * round} for round, name in ((1, "a"), (2, "a"), (3, "b"))]
    assert [step_deviations(history, name) for name in ("a", "b", "c")] == [[0.1, 0.2], [0.1 * 3], []]


# ---- the discriminant -----------------------------------------------------------------------------------------------


def test_two_classes_on_a_line_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points -3, -1 | 1, 3 sorted without doubt: counts 3 and 3 with the one more, means -4/3 and 4/3; total variance
    (9 + 1 + 1 + 9)/4 = 5, between 16/9, so 29/9 within; weights ±(4/3)/(29/9) = ±12/29."""
    monkeypatch.setattr(refinement, "RIDGE", 0.0)
    sorter = Head(np.array([[-LIKELY], [LIKELY]]), np.zeros(2))
    found = discriminant(sorter, np.array([[-3.0], [-1.0], [1.0], [3.0]]))
    np.testing.assert_allclose(found.weight[:, 0], [-12 / 29, 12 / 29], atol=1e-12)
    np.testing.assert_allclose(found.bias, np.log(0.5) - 0.5 * (12 / 29) * (4 / 3), atol=1e-12)


def test_texts_that_are_sorted_without_doubt_give_the_discriminant_of_another_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the one text more in each class, which moves the means by one part in its size."""
    monkeypatch.setattr(refinement, "RIDGE", 0.0)
    features, classes = clusters(4000)
    centres = np.stack([features[classes == k].mean(axis=0) for k in range(5)])
    sorter = Head(LIKELY * 2 * centres, -LIKELY * (centres**2).sum(axis=1))  # the nearest centre
    sorted_so = sorter.logits(features).argmax(axis=1)
    other = LinearDiscriminantAnalysis(solver="lsqr").fit(features, sorted_so)
    found = discriminant(sorter, features)
    for one, theirs in ((found.weight, other.coef_), (found.bias, other.intercept_)):
        np.testing.assert_allclose(one - one.mean(axis=0), theirs - theirs.mean(axis=0), rtol=0.05, atol=0.1)


def as_sure_as(head: Head, other: Head, features: np.ndarray[Any, Any]) -> Head:
    """Another head, scaled so that its logits differ within a text as much as the first one's."""
    return other.times(spread_of(head, features) / spread_of(other, features))


def spread_of(head: Head, features: np.ndarray[Any, Any]) -> float:
    """Root of the mean variance of a text's logits."""
    return float((head.logits(features).var(axis=1).mean()) ** 0.5)


# ---- the refined head -----------------------------------------------------------------------------------------------


def test_without_noise_a_head_stays_bit_by_bit() -> None:
    features, _ = clusters(100)
    head = Head(features[:5], features[5:10, 0])
    found = refined(head, features, 0.0)
    assert found is head


def test_a_head_that_is_all_noise_gives_way_to_the_discriminant() -> None:
    features, _ = clusters(100)
    head = Head(features[:5], features[5:10, 0])
    found = refined(head, features, 1e6)
    expected = as_sure_as(head, discriminant(discriminant(head, features), features), features)
    np.testing.assert_allclose(found.weight, expected.weight)
    np.testing.assert_allclose(found.bias, expected.bias)


def test_the_weight_is_the_square_of_the_share_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean square 4 and variance 1: a quarter is noise, so the discriminant counts one in sixteen."""
    monkeypatch.setattr(refinement, "PASSES", 1)
    features, _ = clusters(100)
    weight = 2.0 * np.sign(np.random.default_rng(1).standard_normal((5, 40)))  # all squares are 4
    head = Head(weight, np.full(5, 2.0))
    other = discriminant(head, features)
    mixed = Head(15 / 16 * head.weight + other.weight / 16, 15 / 16 * head.bias + other.bias / 16)
    np.testing.assert_allclose(refined(head, features, 1.0).weight, as_sure_as(head, mixed, features).weight)


@pytest.mark.parametrize(("noise", "gain"), [(0.3, 0.0), (0.6, 0.01), (1.0, 0.03)])
def test_a_noisy_head_sorts_other_texts_better_afterwards(noise: float, gain: float) -> None:
    """On texts that it has not seen; mean over 20 draws of the noise on the best head there is."""
    own, _ = clusters(500, seed=1)
    others, truth = clusters(2000, seed=2)
    best = LinearDiscriminantAnalysis().fit(others, truth)
    generator = np.random.default_rng(3)
    before, after = [], []
    for _ in range(20):
        head = Head(
            best.coef_ + noise * generator.standard_normal((5, 40)),
            best.intercept_ + noise * generator.standard_normal(5),
        )
        before.append((head.logits(others).argmax(axis=1) == truth).mean())
        after.append((refined(head, own, noise).logits(others).argmax(axis=1) == truth).mean())
    assert np.mean(after) > np.mean(before) + gain


def test_a_refined_head_is_as_sure_as_it_was_and_answers_as_the_average_does() -> None:
    features, _ = clusters(200)
    head = Head(0.1 * features[:5], features[5:10, 0])
    found, mixed = refined(head, features, 0.1), head
    share = min(1.0, 0.1**2 / np.mean(head.weight**2)) ** 2
    for _ in range(refinement.PASSES):
        mixed = head.towards(discriminant(mixed, features), share)
    assert spread_of(found, features) == pytest.approx(spread_of(head, features))
    np.testing.assert_array_equal(found.logits(features).argmax(axis=1), mixed.logits(features).argmax(axis=1))


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(adapted_model: Load, tiny_bert: Path) -> AdaptedModel:
    settings = {"feature_map": "held-out-texts", "feature_levels": 3, "feature_rank": 6}
    return adapted_model(tiny_bert, lora={"r": 4, "layers": 2}, **settings)


def texts(model: AdaptedModel, target: int = 0) -> Examples:
    generator = np.random.default_rng(5)
    lengths = generator.integers(3, 30, 60)
    encoded = [Encoded(generator.integers(5, 40, n).astype(np.int32), np.asarray(target, np.int64)) for n in lengths]
    return Examples(encoded, model.task)


def refiner_of(model: AdaptedModel, target: int = 0) -> Refiner:
    return Refiner(HeldOutFeatures(model, texts(model, target)))


@pytest.fixture
def adapter(model: AdaptedModel, random_adapter: Callable[..., AdapterState]) -> AdapterState:
    """Before any LoRA phase: every B is zero."""
    drawn = random_adapter(model)
    return {name: np.zeros_like(array) if "lora_B" in name else array for name, array in drawn.items()}


def test_labels_are_not_looked_at(model: AdaptedModel, adapter: AdapterState) -> None:
    one, other = (refiner_of(model, target).refined(adapter, phase(), [0.5]) for target in (0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_texts_are_mapped_once_for_a_feature_map_and_anew_for_another(
    model: AdaptedModel, adapter: AdapterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of one map cost one pass; whatever the order, a map gives what a refiner that knows no other gives."""
    name = f"{FEATURE_MAP}weight"
    turned = {**adapter, name: np.ascontiguousarray(adapter[name][::-1])}
    moved = {**adapter, f"{FEATURE_MAP}bias": adapter[f"{FEATURE_MAP}bias"] + np.float32(1)}
    later = {**adapter, HEAD + "weight": 2 * adapter[HEAD + "weight"]}
    refiner, passes = refiner_of(model), 0
    frozen_features = Examples.frozen_features

    def counted(self: Examples, *arguments: Any) -> Any:
        nonlocal passes
        passes += self is refiner.held_out.texts
        return frozen_features(self, *arguments)

    monkeypatch.setattr(Examples, "frozen_features", counted)
    for given, expected in ((adapter, 1), (later, 1), (turned, 2), (moved, 3), (adapter, 4), (adapter, 4)):
        found = refiner.refined(given, phase(), [0.5])
        alone = refiner_of(model).refined(given, phase(), [0.5])
        assert all(np.array_equal(found[name], alone[name]) for name in alone)
        assert passes == expected


def test_only_what_the_head_sees_of_the_features_changes(model: AdaptedModel, adapter: AdapterState) -> None:
    found = refiner_of(model).refined(adapter, phase(), [0.5])
    changed = {name for name in found if not np.array_equal(found[name], adapter[name])}
    assert changed == {HEAD + "weight", HEAD + "bias"}
    np.testing.assert_array_equal(found[HEAD + "weight"][:, 6:], adapter[HEAD + "weight"][:, 6:])
    assert all(array.dtype == np.float32 for array in found.values())


def test_a_phase_that_does_not_ask_and_a_head_on_other_features_stay_as_they_are(
    model: AdaptedModel, adapter: AdapterState, random_adapter: Callable[..., AdapterState]
) -> None:
    refiner = refiner_of(model)
    adapted = random_adapter(model)
    for given, asked in ((adapter, phase(server_refinement=False)), (adapted, phase())):
        found = refiner.refined(given, asked, [0.5])
        assert all(np.array_equal(found[name], given[name]) for name in given)


def test_a_hostile_head_is_left_alone(model: AdaptedModel, adapter: AdapterState) -> None:
    """What is not finite loses by its score, not by an error of the coordinator."""
    wild = {**adapter, HEAD + "bias": np.full_like(adapter[HEAD + "bias"], np.nan)}
    found = refiner_of(model).refined(wild, phase(), [0.5])
    np.testing.assert_array_equal(found[HEAD + "weight"], wild[HEAD + "weight"])


@pytest.mark.parametrize(
    "wrong", [{"train": ("head", "lora")}, {"server_optimizer": "adam"}, {"server_average": 0.9}], ids=str
)
def test_a_phase_whose_noise_is_not_known_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"server_refinement: needs train = \['head'\]"):
        phase(**wrong)
