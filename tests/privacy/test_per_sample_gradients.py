"""The clipped sum that DP-SGD adds noise to, against brute force: one example at a time, clipped by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_sites import (
    SECRET,
    classifier,
    clipped_sum,
    encoded,
    flat,
    language_model,
    names_of,
    phase,
    random_state,
)
from torch import nn

from client.privacy.mechanism import DPSGD, NoPrivacy
from client.privacy.per_sample import check_coverage
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.cuts import INPUT, Cut
from common.errors import CoverageError
from common.examples import Examples
from common.messages import PhaseStatement, Tensors
from common.model import Placement, layer_stack
from common.privacy.noise import Grid, rounded_gaussian
from common.sections import LoraSection
from common.tasks.base import Encoded

Build = Callable[..., AdaptedModel]
Gradients = npt.NDArray[np.float64]

CASES = [
    pytest.param("classifier", ("head", "B"), id="classification, head and B"),
    pytest.param("classifier", ("head", "A", "B"), id="classification, head, A and B"),
    pytest.param("language_model", ("B",), id="language model, B"),
    pytest.param("language_model", ("A", "B"), id="language model, A and B"),
]


@pytest.fixture
def build(tiny_bert: Path, tiny_llama: Path) -> Build:
    def built(kind: str, **settings: Any) -> AdaptedModel:
        return classifier(tiny_bert, **settings) if kind == "classifier" else language_model(tiny_llama, **settings)

    return built


def gradients_one_by_one(
    model: AdaptedModel, items: Sequence[Encoded | None], received: Tensors, names: Sequence[str]
) -> Gradients:
    """Each example's gradient [n, d] by plain autograd on a batch of one without padding, in double precision."""
    model.load(received)
    parameters = [dict(_named(model))[name] for name in sorted(names)]
    precision = parameters[0].dtype
    model.peft.double()
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = [
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(_loss_alone(model, item), parameters)])
        for item in items
        if item is not None
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    model.peft.to(precision)
    return torch.stack(rows).numpy()


def _named(model: AdaptedModel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.peft.named_parameters():
        yield name.replace(".modules_to_save.default", "").replace(".default", ""), parameter


def _loss_alone(model: AdaptedModel, item: Encoded) -> torch.Tensor:
    ids = torch.from_numpy(item.ids.astype(np.int64))
    if model.task.name == "causal-lm":
        logits = model.network(input_ids=ids[None]).logits[0]
        learnt = [position for position in range(1, len(ids)) if item.target[position] != -100]
        chances = torch.log_softmax(logits, dim=-1)
        return -sum(chances[position - 1, ids[position]] for position in learnt) / len(learnt)  # type: ignore[return-value]
    states = model.network.base_model(input_ids=ids[None]).last_hidden_state[0]
    logits = model.network.classifier(states.mean(dim=0))
    return torch.logsumexp(logits, dim=-1) - logits[int(item.target)]


def clipped_by_hand(gradients: Gradients, clip_norm: float) -> Gradients:
    """Each example's own contribution [n, d]."""
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return np.asarray(gradients * np.minimum(1, clip_norm / norms))


def sharpened(model: AdaptedModel) -> AdaptedModel:
    """The model with so large logits that a right answer has next to no gradient and a wrong one a huge gradient."""
    if model.task.name == "causal-lm":
        with torch.no_grad():
            model.network.get_output_embeddings().weight *= 8  # type: ignore[operator]
    return model


def with_outlier(model: AdaptedModel, n: int, received: Tensors) -> list[Encoded | None]:
    """Ragged examples, most of which the model is sure of and right about; one it is sure of and wrong about."""
    model.load(received)
    wrong = n // 2
    return [
        item if item is None else _answered(model, item, best=index != wrong)
        for index, item in enumerate(encoded(model, n))
    ]


def _answered(model: AdaptedModel, item: Encoded, best: bool) -> Encoded:
    """The example with the label (or last token) that the model thinks most or least likely."""
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model.top(ids, torch.ones_like(ids), INPUT)[0]
    if model.task.name != "causal-lm":
        return Encoded(item.ids, np.asarray(int(logits.argmax() if best else logits.argmin()), np.int64))
    chosen = int(logits[-2].argmax() if best else logits[-2].argmin())
    ids_changed, target = item.ids.copy(), np.full(len(item.ids), -100, np.int64)
    ids_changed[-1] = target[-1] = chosen
    return Encoded(ids_changed, target)


def disagreement(found: Tensors, contributions: Gradients) -> float:
    """Distance of a sum from what it should be, relative to the size of everything that went into it."""
    size = np.linalg.norm(contributions, axis=1).sum()
    return float(np.linalg.norm(flat(found) - contributions.sum(axis=0)) / size)


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_the_clipped_sum_equals_brute_force_with_ragged_lengths_an_outlier_and_void_rows(
    build: Build, kind: str, groups: Sequence[str]
) -> None:
    model = sharpened(build(kind))
    names, received = names_of(model, groups), random_state(model)
    items = [None, *with_outlier(model, 14, received), None]
    gradients = gradients_one_by_one(model, items, received, names)
    norms = np.linalg.norm(gradients, axis=1)
    clip_norm = float(norms.max()) / 10
    assert (norms < clip_norm / 2).any() and (norms > clip_norm).sum() > 1
    found = clipped_sum(model, items, received, names, clip_norm)
    assert disagreement(found, clipped_by_hand(gradients, clip_norm)) < 1e-6


def test_in_double_precision_the_clipped_sum_is_exact_to_the_rounding_of_the_release(build: Build) -> None:
    model = build(
        "language_model",
        placement=Placement(torch.device("cpu"), torch.float64),
        lora=LoraSection(r=4, target_modules=("q_proj", "v_proj", "o_proj", "up_proj")),
    )
    model.peft.double()
    names, received = names_of(model, "AB"), random_state(model)
    items = encoded(model, 9)
    gradients = gradients_one_by_one(model, items, received, names)
    found = clipped_sum(model, items, received, names, clip_norm=2.0)
    assert disagreement(found, clipped_by_hand(gradients, clip_norm=2.0)) < 2e-7


def test_a_head_on_cached_features_equals_brute_force(build: Build) -> None:
    model = build("classifier")
    names = names_of(model, ["head"])
    received = {n: array * (model.group_of(n) != "B") for n, array in random_state(model).items()}
    assert model.cut_for(names, received) == Cut(None)
    items = encoded(model, 20)
    gradients = gradients_one_by_one(model, items, received, names)
    found = clipped_sum(model, items, received, names, clip_norm=1.0)
    assert disagreement(found, clipped_by_hand(gradients, clip_norm=1.0)) < 1e-6


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_the_physical_batch_size_changes_nothing_but_rounding(build: Build, kind: str, groups: Sequence[str]) -> None:
    model = build(kind)
    names, received, items = names_of(model, groups), random_state(model), encoded(model, 11)
    one, three, many = (flat(clipped_sum(model, items, received, names, rows=rows)) for rows in (1, 3, 64))
    assert np.linalg.norm(three - one) < 2e-6 * np.linalg.norm(one)
    assert np.linalg.norm(many - one) < 2e-6 * np.linalg.norm(one)


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_a_cached_prefix_changes_nothing(build: Build, kind: str, groups: Sequence[str]) -> None:
    model = build(kind)
    names, received, items = names_of(model, groups), random_state(model), encoded(model, 9)
    assert model.cut_for(names, received).layer not in (0, None)
    cached = clipped_sum(model, Examples(items, model.task), received, names)
    anew = clipped_sum(model, Examples(items, model.task, cache_limit=0), received, names)
    assert np.array_equal(flat(cached), flat(anew))


@pytest.mark.parametrize("layers", [2, None], ids=["top two layers", "all layers, from token ids"])
@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_gradient_checkpointing_recomputes_the_trained_layers_and_changes_nothing(
    build: Build, kind: str, groups: Sequence[str], layers: int | None
) -> None:
    lora = LoraSection(r=4, layers=layers)
    plain = build(kind, lora=lora)
    frugal = build(
        kind, lora=lora, placement=Placement(torch.device("cpu"), torch.float32, gradient_checkpointing=True)
    )
    names, received, items = names_of(plain, groups), random_state(plain), encoded(plain, 7)
    assert frugal.layer_cut == plain.layer_cut  # found out once, by a run of the top layers
    with counted_calls(frugal) as calls:
        found = clipped_sum(frugal, items, received, names, rows=8)
    expected = clipped_sum(plain, items, received, names, rows=8)
    assert np.linalg.norm(flat(found) - flat(expected)) < 1e-6 * np.linalg.norm(flat(expected))
    batches = len(list(Examples(items, plain.task).batches(np.arange(7), 8, plain, INPUT)))
    assert calls["with gradients"] == calls["without"] == batches, "each batch runs once, and once more going back"
    assert not any(module.training for module in frugal.peft.modules())


@contextmanager
def counted_calls(model: AdaptedModel) -> Iterator[Counter[str]]:
    """Counts how often the last layer's attention runs, and whether the modules around it stay in eval mode."""
    calls: Counter[str] = Counter()
    layer = layer_stack(model.base.encoder)[-1]  # type: ignore[index]

    def count(module: nn.Module, _: Any, __: Any) -> None:
        assert not module.training
        calls["with gradients" if torch.is_grad_enabled() else "without"] += 1

    inner = next(child for name, child in layer.named_children() if "att" in name)
    hook = inner.register_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def test_gradient_checkpointing_also_trains_without_privacy(build: Build) -> None:
    plain = build("classifier")
    frugal = build("classifier", placement=Placement(torch.device("cpu"), torch.float32, gradient_checkpointing=True))
    names, received, items = names_of(plain, ["head", "B"]), random_state(plain), encoded(plain, 7)
    statement = PhaseStatement("phase", 1.0, 0.0, 1.0, 1)
    found, expected = (
        clipped_sum(model, items, received, names, mechanism=NoPrivacy(statement, 1, SECRET))
        for model in (frugal, plain)
    )
    assert np.linalg.norm(flat(found) - flat(expected)) < 1e-6 * np.linalg.norm(flat(expected))


def test_without_privacy_the_sum_is_that_of_the_whole_gradients(build: Build) -> None:
    model = build("language_model")
    names, received, items = names_of(model, ["B"]), random_state(model), encoded(model, 7)
    gradients = gradients_one_by_one(model, items, received, names)
    mechanism = NoPrivacy(PhaseStatement("phase", 1.0, 0.0, 1.0, 1), 1, SECRET)
    found = clipped_sum(model, items, received, names, mechanism=mechanism)
    assert disagreement(found, gradients) < 1e-6


@pytest.mark.parametrize("kind", ["classifier", "language_model"])
@pytest.mark.parametrize("items", [0, 5], ids=["no examples at all", "none was drawn"])
def test_an_empty_batch_is_a_step_of_noise_alone(build: Build, kind: str, items: int) -> None:
    model = build(kind)
    names, received = names_of(model, "AB"), random_state(model)
    statement = PhaseStatement("phase", 1e-9, 2.0, 0.5, 1)
    update = train_round(
        model,
        Examples(encoded(model, items), model.task),
        received,
        phase(steps=1, learning_rate=1e-9 * 40),
        names,
        DPSGD(statement, 40, SECRET),
        SECRET,
        4,
    )
    spacing = Grid.of(1.0).spacing
    drawn = rounded_gaussian(SECRET.derive("noise", 0), 1 / spacing, len(flat(update)))
    assert np.allclose(flat(update), -spacing * drawn, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bfloat16_groups", [("head", "B"), ("head", "A", "B")])
def test_in_bfloat16_no_example_moves_the_others(build: Build, bfloat16_groups: Sequence[str]) -> None:
    model = build("classifier", placement=Placement.choose("cpu", "bfloat16"))
    names, received = names_of(model, bfloat16_groups), random_state(model)
    items = encoded(model, 9)
    whole = flat(clipped_sum(model, items, received, names, rows=9))
    assert np.linalg.norm(whole) > 0.5, "the frozen prefix's activations fit the layers above"
    for index in range(9):
        without = flat(clipped_sum(model, [*items[:index], *items[index + 1 :]], received, names, rows=9))
        assert np.linalg.norm(whole - without) <= 1.0 + 1e-5


# ----------------------------------------------------------------------------------------------------------- coverage


def test_a_parameter_that_trains_beside_those_of_the_phase_is_refused_by_name(build: Build) -> None:
    model = build("classifier")
    stray = model.network.bert.encoder.layer[3].output.LayerNorm.weight
    stray.requires_grad_(True)
    with pytest.raises(CoverageError, match=r"layer\.3\.output\.LayerNorm\.weight' trains beside"):
        clipped_sum(model, encoded(model, 3), random_state(model), names_of(model, ["B"]))


def test_a_parameter_of_the_phase_that_is_frozen_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    with pytest.raises(CoverageError, match=r"'0\.bias' is frozen"):
        check_coverage(model, dict(model.named_parameters()))


class Scale(nn.Module):
    """A module with a parameter of its own, for which nobody has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


class ScaledLinear(nn.Linear):
    """Looks like a linear map and computes something else."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * self.weight.sum()


@pytest.mark.parametrize("module", [Scale(), ScaledLinear(3, 3)], ids=["own parameter", "subclass of a linear map"])
def test_a_module_without_an_exact_rule_is_refused_by_name(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), module)
    with pytest.raises(CoverageError, match=rf"'1\.\w+' in 1 \({type(module).__name__}\)"):
        check_coverage(model, dict(model.named_parameters()))


def test_a_parameter_that_a_second_module_uses_in_its_own_way_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Scale())
    model[1].factor = model[0].bias
    with pytest.raises(CoverageError, match=r"'0\.bias' in 1 \(Scale\)"):
        check_coverage(model, dict(model.named_parameters()))


def test_a_parameter_that_no_gradient_reaches_is_refused_when_it_is_to_be_clipped() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    parameters = dict(model.named_parameters())
    mechanism = DPSGD(PhaseStatement("phase", 1.0, 1.0, 1.0, 1), 4, SECRET)
    with (
        mechanism.attach(model.train(), parameters, torch.optim.SGD(parameters.values(), lr=1.0)),
        pytest.raises(CoverageError, match=r"'unused\.\w+' received no per-example gradient"),
    ):
        mechanism.accumulate(lambda: model["used"](torch.ones(4, 3)).squeeze(1))


def test_other_modules_with_a_rule_are_clipped_exactly() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 1)).train()
        inputs = torch.randn(6, 5)
    parameters = dict(model.named_parameters())
    rows = [torch.autograd.grad(model(row).sum(), list(parameters.values())) for row in inputs]
    gradients = np.stack([torch.cat([part.flatten() for part in row]).double().numpy() for row in rows])
    mechanism = DPSGD(PhaseStatement("phase", 1.0, 1e-30, 1.0, 1), 1, SECRET, "fast")
    before = nn.utils.parameters_to_vector(parameters.values()).detach()
    with mechanism.attach(model, parameters, torch.optim.SGD(parameters.values(), lr=1.0)):
        mechanism.accumulate(lambda: model(inputs).squeeze(1))
        mechanism.step(0)
    found = (before - nn.utils.parameters_to_vector(parameters.values()).detach()).numpy()
    assert np.linalg.norm(gradients, axis=1).max() > 1
    assert np.allclose(found, clipped_by_hand(gradients, 1.0).sum(axis=0), atol=2e-6)
