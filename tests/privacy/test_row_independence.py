"""The probe passes sound models with equality of bits, and refuses by name those that mix the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sites import classifier, language_model, names_of, random_state
from torch import nn

import client.privacy.row_independence as row_independence
from client.privacy.row_independence import check_modules, check_row_independence
from common.adapted import AdaptedModel
from common.cuts import INPUT, Cut
from common.errors import PrivacyError
from common.model import Placement
from common.sections import LoraSection

ROWS = 5


def probe(model: AdaptedModel, groups: tuple[str, ...] = ("head", "A", "B"), **settings: Any) -> None:
    check_row_independence(model, names_of(model, groups), ROWS, **settings)


def put(model: AdaptedModel, place: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces a module of the frozen base by one that wraps it."""
    parent, _, name = place.rpartition(".")
    inside: Any = model.peft.get_submodule(parent)
    setattr(inside, name, make(getattr(inside, name)).requires_grad_(False))


def place_of(model: AdaptedModel, suffix: str) -> str:
    return next(name for name, _ in model.peft.named_modules() if name.endswith(suffix))


@pytest.fixture
def by_probe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are not looked at, as for a module nobody knows yet."""
    monkeypatch.setattr(row_independence, "check_modules", lambda network: None)


# ------------------------------------------------------------------------------------------------------- sound models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sound_models_pass(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    make = {"bert": classifier, "llama": language_model}[family]
    folder: Path = request.getfixturevalue(f"tiny_{family}")
    for layers in (2, None):  # from hidden states, and from token ids
        lora = LoraSection(r=4, alpha=8.0, layers=layers, dropout=0.1)
        model = make(folder, lora, Placement.choose("cpu", dtype))
        assert (model.layer_cut == INPUT) == (layers is None)
        probe(model)


def test_a_model_that_recomputes_its_activations_passes(tiny_llama: Path) -> None:
    probe(language_model(tiny_llama, placement=Placement.choose("cpu", "float32", gradient_checkpointing=True)))


def test_the_adapter_and_the_generators_are_left_as_they_were(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    model.load(random_state(model))
    before, draws = model.state(), torch.random.get_rng_state()
    probe(model)
    assert all((model.state()[name] == value).all() for name, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert not any(parameter.requires_grad for parameter in model.peft.parameters())
    assert not any(module._forward_hooks for module in model.peft.modules())


def test_every_trained_tensor_has_a_gradient_in_the_probe(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = 0 the gradients of A would be zero, and the probe would compare zeros with zeros."""
    seen: list[row_independence.Rows] = []
    real = row_independence._rows
    monkeypatch.setattr(row_independence, "_rows", lambda *given: seen.append(real(*given)) or seen[-1])
    model = classifier(tiny_bert)
    probe(model)
    assert len(seen) == 4, "one batch and three changes of it"
    assert set(seen[0]) == {*model.spec.names, "the loss", "the frozen prefix"}
    for name, value in seen[0].items():
        assert (value.flatten(1).abs().amax(dim=1) if value.ndim > 1 else value).gt(0).all(), name


def test_a_phase_of_the_head_alone_is_probed_from_pooled_features_too(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[Cut] = []
    real = row_independence._probe
    monkeypatch.setattr(
        row_independence,
        "_probe",
        lambda model, names, cut, batches: cuts.append(cut) or real(model, names, cut, batches),
    )
    probe(classifier(tiny_bert), ("head",))
    assert cuts == [Cut(2), Cut(None)]


# ---------------------------------------------------------------------------------------------------- batch statistics


class Normalised(nn.Module):
    """Batch normalisation after a layer's own, over all tokens of the batch."""

    def __init__(self, inner: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(32, **settings)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(hidden).flatten(0, 1)).view_as(hidden)


@pytest.mark.parametrize("layer", [0, 3], ids=["in the frozen prefix", "in the top"])
def test_batch_norm_in_train_mode_is_refused_by_name(tiny_bert: Path, layer: int) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, f"layer.{layer}.output.LayerNorm")
    put(model, place, lambda inner: Normalised(inner).eval())
    probe(model)  # by running statistics each row stands alone
    model.peft.get_submodule(f"{place}.norm").train()
    with pytest.raises(PrivacyError, match=rf"{place}\.norm' \(BatchNorm1d\) normalises by statistics of the whole"):
        probe(model)


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    put(model, place_of(model, "layer.1.output.LayerNorm"), lambda inner: Normalised(inner, track_running_stats=False))
    model.peft.eval()
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        probe(model)


@pytest.mark.usefixtures("by_probe_alone")
@pytest.mark.parametrize("layer", [0, 3], ids=["in the frozen prefix", "in the top"])
def test_the_probe_alone_finds_batch_norm_and_names_where_rows_first_mix(tiny_bert: Path, layer: int) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, f"layer.{layer}.output.LayerNorm")
    put(model, place, lambda inner: Normalised(inner).train())
    with pytest.raises(PrivacyError, match=rf"'{place}' \(Normalised\) mixes the rows of a batch \('.*', one row with"):
        probe(model)
    with pytest.raises(PrivacyError, match="Normalised"):
        probe(model, ("head",))


# ------------------------------------------------------------------------------------------------ experts of capacity


class Experts(nn.Module):
    """Two experts; a token that comes when its expert is full passes unchanged (Switch Transformers)."""

    def __init__(self, inner: nn.Module, capacity: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.full = inner, capacity
        self.router = nn.Linear(32, 2)
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(*given)
        tokens = hidden.flatten(0, 1)
        chosen = nn.functional.one_hot(self.router(tokens).argmax(dim=1), 2)
        served = chosen * (chosen.cumsum(dim=0) <= self.full)
        outcome = tokens + sum(served[:, [k]] * expert(tokens) for k, expert in enumerate(self.experts))
        return outcome.view_as(hidden)


def test_experts_of_limited_capacity_are_refused_and_unlimited_ones_pass(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, "layer.2.output")
    put(model, place, lambda inner: Experts(inner, capacity=10**6))
    probe(model)
    model.peft.get_submodule(place).full = 60  # of 5 x 32 tokens
    with pytest.raises(PrivacyError, match=rf"'{place}' \(Experts\) mixes the rows of a batch"):
        probe(model)


def test_a_declared_capacity_is_refused_by_name(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, "layer.2.output")
    put(model, place, lambda inner: Experts(inner, capacity=10**6))
    model.peft.get_submodule(place).expert_capacity = 64
    with pytest.raises(PrivacyError, match=rf"'{place}' \(Experts\) limits the capacity of its experts"):
        probe(model)


def test_the_routers_of_switch_transformers_are_refused_by_name() -> None:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    router = SwitchTransformersTop1Router(SwitchTransformersConfig(d_model=8, num_experts=2))
    with pytest.raises(PrivacyError, match="SwitchTransformersTop1Router"):
        check_modules(nn.Sequential(router))


# ------------------------------------------------------------------------------------------------------- quantisation


class PerTensor(nn.Module):
    """Inputs in eight bits on one scale for the whole batch, found anew for each batch."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype, whole: bool = True) -> None:
        super().__init__()
        self.inner, self.dtype, self.whole = inner, dtype, whole

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        largest = torch.iinfo(self.dtype).max if self.dtype == torch.int8 else torch.finfo(self.dtype).max
        top = hidden.abs().amax() if self.whole else hidden.abs().amax(dim=-1, keepdim=True)
        scale = top.detach() / largest
        rounded = (hidden / scale).detach().to(self.dtype).to(hidden.dtype) * scale
        return self.inner(hidden + (rounded - hidden).detach())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_a_scale_over_the_whole_batch_is_refused_and_one_per_token_passes(tiny_llama: Path, dtype: torch.dtype) -> None:
    model = language_model(tiny_llama)
    place = place_of(model, "layers.2.mlp.up_proj")
    put(model, place, lambda inner: PerTensor(inner, dtype, whole=False))
    probe(model)
    model.peft.get_submodule(place).whole = True
    with pytest.raises(PrivacyError, match=rf"'{place}' \(PerTensor\) mixes the rows of a batch"):
        probe(model)


class Outliers:
    """What bitsandbytes keeps beside a weight."""

    threshold = 6.0


class Linear8bitLt(nn.Module):
    """LLM.int8 as published (Dettmers et al. 2022, arXiv 2208.07339): columns with an outlier in any row stay whole,
    the others are rounded on one scale per token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.state = inner, Outliers()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outlier = (hidden.abs() > self.state.threshold).flatten(0, -2).any(dim=0)
        scale = hidden.detach().abs().masked_fill(outlier, 0).amax(dim=-1, keepdim=True).clamp(min=1e-6) / 127
        rounded = (hidden / scale).round() * scale
        return self.inner(hidden + (torch.where(outlier, hidden, rounded) - hidden).detach())


def test_outlier_columns_over_the_whole_batch_are_refused_by_name(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, "layer.1.intermediate.dense")
    put(model, place, Linear8bitLt)
    with pytest.raises(PrivacyError, match=rf"'{place}' \(Linear8bitLt\) picks outlier columns over the whole batch"):
        probe(model)
    model.peft.get_submodule(place).state.threshold = 0  # type: ignore[union-attr]
    check_modules(model.peft)


@pytest.mark.usefixtures("by_probe_alone")
def test_the_probe_alone_finds_outlier_columns(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    place = place_of(model, "layer.1.intermediate.dense")
    put(model, place, Linear8bitLt)
    model.peft.get_submodule(place).state.threshold = 2.0  # type: ignore[union-attr]
    with pytest.raises(PrivacyError, match="mixes the rows of a batch"):
        probe(model)


# ------------------------------------------------------------------------------------------------------------- others


def test_a_shortcut_for_batches_without_padding_is_refused(tiny_llama: Path) -> None:
    """What transformers does of itself: with no pad token in the whole batch another attention kernel runs, and in
    bfloat16 the gradients of all rows move by half a per cent when one row becomes a dummy."""
    model = language_model(tiny_llama, placement=Placement.choose("cpu", "bfloat16"))
    model.network.set_attn_implementation("sdpa")
    with pytest.raises(PrivacyError, match=r"mixes the rows of a batch .*all other rows dummies"):
        probe(model)


class Centred(nn.Module):
    """Takes the batch's mean off in the backward pass alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = self.inner(hidden)
        if result.requires_grad:
            result.register_hook(lambda gradient: gradient - gradient.mean(dim=0))
        return result


def test_rows_that_mix_in_the_backward_pass_alone_are_found(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    put(model, place_of(model, "layer.3.output.LayerNorm"), Centred)
    with pytest.raises(PrivacyError, match="its backward pass mixes the rows of a batch"):
        probe(model)


class Restless(nn.Module):
    """Never gives the same result twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(hidden) * (1 + self.calls / 100)


def test_a_machine_that_does_not_repeat_itself_is_told_apart_from_mixed_rows(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    put(model, place_of(model, "layer.3.output.LayerNorm"), Restless)
    with pytest.raises(PrivacyError, match="does not give the same gradients twice on this machine"):
        probe(model)


def test_a_single_row_has_nothing_to_mix_with(tiny_llama: Path) -> None:
    model = language_model(tiny_llama)
    put(model, place_of(model, "layers.2.mlp.up_proj"), lambda inner: PerTensor(inner, torch.int8))
    check_row_independence(model, names_of(model, ("A", "B")), rows=1)
    with pytest.raises(PrivacyError):
        check_row_independence(model, names_of(model, ("A", "B")), rows=2)


def test_a_model_without_finite_gradients_is_not_waved_through(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    with torch.no_grad():
        embedding: Any = model.network.get_input_embeddings()
        embedding.weight[:] = torch.inf
    with pytest.raises(PrivacyError, match="no finite gradient"):
        probe(model)
