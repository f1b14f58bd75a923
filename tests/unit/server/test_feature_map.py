"""The public feature map: what it computes, by hand and by numpy, and that it is public and travels once."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from common.adapted import AdaptedModel
from common.adapter import MAP_FILE, AdapterState, load_adapter, save_adapter
from common.config import RunConfig
from common.cuts import INPUT, Cut
from common.errors import ModelError
from common.examples import Examples
from common.messages import TrainRequest
from common.plan import Plan
from common.requests import RoundRequest, received
from common.sections import PhaseSection, PrivacySection, WireSection
from common.tasks.base import Encoded
from common.toml_settings import validate
from server.feature_map import RIDGE, fitted
from server.prepare import initial_adapter, with_feature_map
from server.settings import resolved_toml

Load = Callable[..., AdaptedModel]
MAP = {"feature_map": "held-out-texts", "feature_levels": 3, "feature_rank": 6}
WEIGHT, BIAS = "feature_map.weight", "feature_map.bias"
HEAD = "base_model.model.classifier."


@pytest.fixture(scope="module")
def model(adapted_model: Load, tiny_bert: Path) -> AdaptedModel:
    return adapted_model(tiny_bert, lora={"r": 4, "layers": 2}, **MAP)


def texts(model: AdaptedModel, number: int, target: int = 0) -> Examples:
    generator = np.random.default_rng(number)
    encoded = [
        Encoded(generator.integers(5, 40, length).astype(np.int32), np.asarray(target, np.int64))
        for length in generator.integers(3, 30, number)
    ]
    return Examples(encoded, model.task)


def batch(model: AdaptedModel) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return ids, mask


def logits(model: AdaptedModel, cut: Cut) -> torch.Tensor:
    ids, mask = batch(model)
    with torch.no_grad():
        return model.top(ids if cut == INPUT else model.prefix(ids, mask, cut), mask, cut)


def config(model: AdaptedModel, **settings: Any) -> RunConfig:
    return RunConfig(task=model.task.settings, lora=model.lora, **settings)  # type: ignore[attr-defined]


# ---- the map --------------------------------------------------------------------------------------------------------


def test_two_components_by_hand() -> None:
    """Points (±2, 0) and (0, ±1) about (5, 7): variances 8/3 and 2/3 along the axes, and their mean is 5/3."""
    points = np.array([[7, 7], [3, 7], [5, 8], [5, 6]], np.float32)
    found = fitted(points, 2)
    scales = 1 / np.sqrt(np.array([8 / 3, 2 / 3]) + RIDGE * 5 / 3)
    norm = (2 * 2 * scales[0] + 2 * 1 * scales[1]) / 4
    np.testing.assert_allclose(np.abs(found[WEIGHT]), np.diag(scales / norm), atol=1e-6)
    mapped = points @ found[WEIGHT].T + found[BIAS]
    np.testing.assert_allclose(mapped.sum(axis=0), 0, atol=1e-5)
    assert np.linalg.norm(mapped, axis=1).mean() == pytest.approx(1, abs=1e-6)


def test_rows_that_are_not_finite_are_left_out_and_missing_directions_are_zero() -> None:
    generator = np.random.default_rng(0)
    few = generator.standard_normal((4, 10)).astype(np.float32)
    broken = np.vstack([few, np.full((1, 10), np.nan, np.float32)])
    found = fitted(broken, 6)
    np.testing.assert_array_equal(found[WEIGHT], fitted(few, 6)[WEIGHT])
    assert found[WEIGHT].shape == (6, 10) and not found[WEIGHT][4:].any() and np.isfinite(found[BIAS]).all()
    assert not fitted(few[:1], 6)[WEIGHT].any() and not fitted(broken[4:], 6)[WEIGHT].any()


def test_labels_are_not_looked_at(model: AdaptedModel) -> None:
    one, other = (initial_adapter(config(model), model, texts(model, 40, target)) for target in (0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one[WEIGHT].any() and one[HEAD + "weight"].any()


# ---- the model with it ----------------------------------------------------------------------------------------------


def test_the_head_sees_the_mapped_means_of_the_top_levels(
    model: AdaptedModel, tiny_bert: Path, random_adapter: Callable[..., AdapterState]
) -> None:
    state = {name: np.zeros_like(array) if "lora_B" in name else array for name, array in random_adapter(model).items()}
    model.load(state)
    ids, mask = batch(model)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(tiny_bert).eval()(ids, mask, output_hidden_states=True).hidden_states[2:]
    weights = mask.unsqueeze(-1).float()
    joined = torch.cat([(one * weights).sum(1) / weights.sum(1) for one in stock], dim=1).numpy()
    mapped = joined @ state[WEIGHT].T + state[BIAS]
    expected = mapped @ state[HEAD + "weight"][:, :6].T + state[HEAD + "bias"]
    for cut in (INPUT, Cut(2), Cut(None)):
        np.testing.assert_allclose(logits(model, cut).numpy(), expected, atol=1e-5)


def test_the_cut_lies_below_all_pooled_levels(adapted_model: Load, tiny_bert: Path) -> None:
    """Four layers: three levels are what enters layer 2 and what leaves layers 2 and 3."""
    assert adapted_model(tiny_bert, lora={"layers": 1}, **MAP).layer_cut == Cut(2)
    assert adapted_model(tiny_bert, lora={"layers": 1}, **{**MAP, "feature_levels": 2}).layer_cut == Cut(3)
    assert adapted_model(tiny_bert, lora={"layers": 3}, **MAP).layer_cut == Cut(1)
    assert adapted_model(tiny_bert, **MAP).layer_cut == INPUT


def test_with_an_adapter_the_cut_model_is_the_whole_model(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    model.load(random_adapter(model, seed=3))
    np.testing.assert_allclose(logits(model, Cut(2)).numpy(), logits(model, INPUT).numpy(), atol=1e-5)


def test_the_map_is_never_trained(model: AdaptedModel) -> None:
    phase = PhaseSection(name="p", rounds=1, sample_rate=1.0, train=("head", "lora"), algorithm="fedit")
    names = model.trained_in(phase, 1)
    assert not {WEIGHT, BIAS} & set(names) and {WEIGHT, BIAS} < set(model.spec.names)
    with model.training(names):
        trainable = {name for name, one in model._parameters.items() if one.requires_grad}
    assert trainable == set(names)


def test_a_map_that_does_not_fit_the_model_is_an_error(adapted_model: Load, tiny_bert: Path) -> None:
    for wrong in ({"feature_levels": 5}, {"feature_rank": 33}):
        with pytest.raises(ModelError, match=r"task\.feature_levels = .*the model has 4 layers of width 32"):
            adapted_model(tiny_bert, **{**MAP, **wrong})


def test_auto_takes_the_map_with_the_default_recipe_where_it_fits(adapted_model: Load, tiny_bert: Path) -> None:
    def decided(pooling: str = "mean", **settings: Any) -> str:
        model = adapted_model(tiny_bert, pooling=pooling, **{**MAP, "feature_map": "auto", **settings})
        assert not model.maps_features
        return with_feature_map(config(model), model.base).feature_map

    assert decided() == "held-out-texts"
    assert decided(feature_rank=128) == decided(feature_levels=4) == decided(pooling="model") == "none"
    model = adapted_model(tiny_bert, **{**MAP, "feature_map": "auto"})
    own = PhaseSection(name="p", rounds=1, sample_rate=1.0, train=("head",))
    assert with_feature_map(config(model, phase=(own,)), model.base).feature_map == "none"


def test_a_resumed_run_has_the_map_that_it_started_with(adapted_model: Load, tiny_bert: Path) -> None:
    """Its folder holds the settings as they were decided, with the recipe written out."""
    model = adapted_model(tiny_bert, **{**MAP, "feature_map": "auto"})
    started = config(model)
    decided = started.model_copy(update={"task": with_feature_map(started, model.base)})
    resumed = validate(RunConfig, tomllib.loads(resolved_toml(decided)), "run.toml")
    assert resumed.phase == started.phases
    assert with_feature_map(resumed, model.base) == decided.task
    assert decided.task.maps_features


def test_without_privacy_more_coordinates_are_kept(adapted_model: Load, tiny_bert: Path) -> None:
    model = adapted_model(tiny_bert)
    for mechanism, rank in (("none", 192), ("dp-sgd", 128)):
        decided = with_feature_map(config(model, privacy=PrivacySection(mechanism=mechanism)), model.base)
        assert (decided.feature_rank, decided.feature_map) == (rank, "none")  # too many for this model


# ---- on its way -----------------------------------------------------------------------------------------------------


def test_the_map_travels_once_and_is_kept_by_the_site(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    phases = (PhaseSection(name="p", rounds=3, sample_rate=1.0, train=("head",)),)
    plan = Plan(
        run_id="run",
        seed=0,
        data="default",
        model_digest=model.base.digest,
        task=model.task.settings,  # type: ignore[attr-defined]
        lora=model.lora,
        privacy=PrivacySection(epsilon=8.0),
        phases=phases,
        wire=WireSection(),
        adapter_digest=model.spec.digest(),
        code_digest="0" * 64,
    )
    state = {**random_adapter(model), **{n: a for n, a in model.initial_state(0, True).items() if "lora" in n}}
    first = RoundRequest.of(plan, model, 1, state)
    assert set(first.to({}).adapter) == {WEIGHT, BIAS, HEAD + "weight", HEAD + "bias"}
    got = received(plan, model, model.spec, first.to({}))
    assert got is not None
    held = got.held(first.kept)
    second = RoundRequest.of(plan, model, 2, {**state, HEAD + "bias": state[HEAD + "bias"] + 1})
    request: TrainRequest = second.to(first.confirmed)
    assert set(request.adapter) == {HEAD + "weight", HEAD + "bias"}
    again = received(plan, model, model.spec, request, held)
    assert again is not None
    np.testing.assert_array_equal(again.adapter[WEIGHT], state[WEIGHT])


def test_the_adapter_folder_keeps_the_map_beside_pefts_own_file(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState], tmp_path: Path
) -> None:
    state = random_adapter(model)
    save_adapter(tmp_path, state, model.peft_config(), {})
    assert (tmp_path / MAP_FILE).is_file()
    again, _ = load_adapter(tmp_path)
    assert again.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(again[name], state[name])
