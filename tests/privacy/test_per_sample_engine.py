"""How per-example gradients are collected: several uses, recomputation, number formats, failures, and what is left."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from tiny_networks import (
    LENGTHS,
    WORDS,
    collected,
    disagreement,
    family,
    in_one_batch,
    one_by_one,
    unchanged,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from client.privacy.clipping import clip_factors, unit_gradients
from client.privacy.per_sample import per_sample_gradients
from common.errors import CoverageError

# ------------------------------------------------------------------------------------------------------ small networks


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def losses_on(data: torch.Tensor) -> Callable[[nn.Module, Sequence[int]], torch.Tensor]:
    """The sum of squared outputs of each row of ``data``."""

    def losses(model: nn.Module, chosen: Sequence[int]) -> torch.Tensor:
        rows = data[list(chosen)].to(next(model.parameters()).dtype)
        squares: torch.Tensor = model(rows).square().flatten(1).sum(1)
        return squares

    return losses


class Applied(nn.Module):
    """Runs modules in the order of a function's choosing."""

    def __init__(self, run: Callable[..., torch.Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.run(self, data)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 3, 4, 5), (6, 2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 40), lambda: nn.Linear(5, 1), lambda: Conv1D(3, 5)]
)
def test_inputs_may_have_any_number_of_dimensions_behind_the_batch(
    build: Callable[[], nn.Module], shape: Sequence[int]
) -> None:
    model, losses = seeded(build), losses_on(inputs(*shape))
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)], ids=str)
def test_weight_or_bias_may_train_alone(trained: str, shape: Sequence[int]) -> None:
    model, losses = seeded(lambda: nn.Linear(5, 3)), losses_on(inputs(*shape))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)
    found = in_one_batch(model, losses)
    assert list(found) == [trained]
    assert disagreement(found, one_by_one(model, losses)) < 1e-5


def test_inputs_that_lie_otherwise_in_memory_are_read_in_their_order() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)))
    data = inputs(5, 4, 6).permute(2, 1, 0)
    losses = losses_on(data)
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.LayerNorm(5), (6, 5)),
        (lambda: nn.LayerNorm(5), (6, 4, 5)),
        (lambda: nn.LayerNorm((4, 5)), (6, 4, 5)),
        (lambda: nn.LayerNorm(5, bias=False), (6, 4, 5)),
        (lambda: nn.RMSNorm(5), (6, 4, 5)),
        (lambda: nn.GroupNorm(2, 4), (6, 4, 5)),
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (6, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (6, 4, 9, 8)),
    ],
    ids=["vector", "sequence", "matrix", "without bias", "root mean square", "groups", "conv1d", "conv2d"],
)
def test_norms_and_convolutions_are_exact(build: Callable[[], nn.Module], shape: Sequence[int]) -> None:
    before = nn.Linear(shape[-1], shape[-1])
    model = seeded(lambda: nn.Sequential(copy.deepcopy(before), build(), nn.Tanh()))
    weighted = losses_on(inputs(*shape))
    nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(3))  # type: ignore[index, union-attr, arg-type]
    assert disagreement(in_one_batch(model, weighted), one_by_one(model, weighted)) < 1e-5


# --------------------------------------------------------------------------------------------------------- several uses


def twice(model: Any, data: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = torch.tanh(model.shared(torch.tanh(model.shared(data))))
    return states


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 5), lambda: Conv1D(5, 5), lambda: nn.LayerNorm(5)])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)], ids=str)
def test_a_module_that_runs_twice_gathers_both_runs(build: Callable[[], nn.Module], shape: Sequence[int]) -> None:
    model, losses = seeded(lambda: Applied(twice, shared=build())), losses_on(inputs(*shape))
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


def test_runs_of_a_module_may_differ_in_length() -> None:
    def run(model: Any, data: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.shared(data), model.shared(data[:, :2] + 1)], dim=1)

    model, losses = seeded(lambda: Applied(run, shared=nn.Linear(5, 3))), losses_on(inputs(6, 4, 5))
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


def test_two_modules_may_share_a_parameter() -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)))
    model[2].weight = model[0].weight
    losses = losses_on(inputs(6, 4, 5))
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 5), lambda: nn.LayerNorm(5), lambda: nn.GroupNorm(1, 5)])
def test_no_two_gradients_are_one_tensor_though_autograd_hands_out_one(build: Callable[[], nn.Module]) -> None:
    """Who clips may scale them in place."""

    def run(model: Any, data: torch.Tensor) -> torch.Tensor:
        return model.one(data) + model.other(data)  # type: ignore[no-any-return]

    model = seeded(lambda: Applied(run, one=build(), other=build()))
    parameters = dict(model.named_parameters())
    with per_sample_gradients(model, parameters):
        model(torch.ones(6, 5)).sum().backward()
        before = collected(parameters)
        parameters["one.bias"].grad_sample.zero_()  # type: ignore[attr-defined]
        assert np.array_equal(collected(parameters)["other.bias"], before["other.bias"])
        assert before["other.bias"].any()


def test_a_module_that_runs_twice_leaves_the_gradients_of_others_alone() -> None:
    def run(model: Any, data: torch.Tensor) -> torch.Tensor:
        states = model.first(data)
        return model.shared(states) + model.shared(states + 1) + states  # type: ignore[no-any-return]

    model = seeded(lambda: Applied(run, first=nn.Linear(5, 5), shared=nn.Linear(5, 5)))
    losses = losses_on(inputs(6, 5))
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 1e-5


# ------------------------------------------------------------------------------------------------------- recomputation


@contextlib.contextmanager
def recomputing(model: nn.Module, reentrant: bool) -> Iterator[list[int]]:
    """All transformer layers recompute their activations; yields how often a layer was run in the backward pass."""
    runs: list[int] = []

    def recompute(layer: Callable[..., Any], *arguments: Any) -> Any:
        def counted(*inner: Any) -> Any:
            runs.append(torch._C._current_graph_task_id() >= 0)
            return layer(*inner)

        return checkpoint(counted, *arguments, use_reentrant=reentrant)

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers
    if reentrant:  # wants an input that wants gradients
        model.get_input_embeddings().register_forward_hook(lambda *_: _[-1].requires_grad_())  # type: ignore[operator]
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute
    yield runs
    assert 0 < sum(runs) == len(runs) / 2


RECOMPUTED = [(name, False) for name in ("bert", "llama", "gpt2", "t5", "vit")]
# T5 and ViT hand over what wants gradients in ways that a reentrant checkpoint does not see.
RECOMPUTED += [(name, True) for name in ("bert", "llama", "gpt2")]


@pytest.mark.parametrize(("name", "reentrant"), RECOMPUTED)
def test_recomputation_counts_once(name: str, reentrant: bool) -> None:
    case = family(name)
    expected = one_by_one(case.model, case.losses)
    with recomputing(case.model, reentrant):
        assert disagreement(in_one_batch(case.model, case.losses), expected) < 3e-5


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_shared_module_under_recomputation_gathers_all_its_runs(reentrant: bool) -> None:
    def layer(states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(model.norm(model.shared(states)))  # type: ignore[no-any-return, operator]

    def recomputed(_: Any, data: torch.Tensor) -> torch.Tensor:
        states = data.requires_grad_()
        for _ in range(3):
            states = checkpoint(layer, states, use_reentrant=reentrant)  # type: ignore[assignment]
        return states

    def plain(model: Any, data: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            data = torch.tanh(model.norm(model.shared(data)))
        return data

    model = seeded(lambda: Applied(plain, shared=nn.Linear(5, 5), norm=nn.LayerNorm(5)))
    losses = losses_on(inputs(6, 4, 5))
    expected = one_by_one(model, losses)
    model.run = recomputed
    assert disagreement(in_one_batch(model, losses), expected) < 1e-5


# ------------------------------------------------------------------------------------------------------ number formats


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_under_autocast_gradients_are_fp32_and_never_clipped_beyond_the_norm(name: str) -> None:
    case = family(name)
    expected = one_by_one(case.model, case.losses)
    with per_sample_gradients(case.model, case.parameters):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = case.losses(case.model, range(len(LENGTHS)))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        found = collected(case.parameters)
        gradients = unit_gradients(case.parameters, len(LENGTHS), None)
        clip_norm = float(min(torch.cat(gradients, 1).norm(dim=1))) / 3
        clipped = torch.cat(gradients, 1) * clip_factors(gradients, clip_norm)[:, None]
    norms = clipped.double().norm(dim=1)
    assert (norms <= clip_norm * (1 + 1e-6)).all()
    assert (norms >= clip_norm * (1 - 1e-5)).all()
    assert disagreement(found, expected) < 0.2  # bf16 has 8 bits


def test_under_autocast_it_agrees_with_autograd_under_autocast() -> None:
    case = family("llama")
    plain = copy.deepcopy(case.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = case.losses(plain, range(len(LENGTHS)))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    with per_sample_gradients(case.model, case.parameters):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = case.losses(case.model, range(len(LENGTHS)))
            losses.sum().backward()  # type: ignore[no-untyped-call]  # autocast must not reach the sums either
        found = collected(case.parameters)
    whole = {n: p.grad.double().numpy() for n, p in plain.named_parameters() if p.requires_grad}
    assert disagreement({n: rows.sum(axis=0) for n, rows in found.items()}, whole) < 0.03


def test_products_of_bf16_are_summed_in_fp32() -> None:
    """301 products of 1 and 1: a bf16 sum would stop at 256, and bf16 has no 301."""
    model = nn.Linear(2, 3, bias=True, dtype=torch.bfloat16)
    data = torch.ones(4, 301, 2, dtype=torch.bfloat16)
    with per_sample_gradients(model, parameters := dict(model.named_parameters())):
        model(data).sum().backward()
        assert all((each == 301).all() for each in collected(parameters).values())


def test_an_outlier_leaves_the_other_rows_alone() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    data = inputs(6, 4, 5)
    calm = in_one_batch(model, losses_on(data))
    data[2] *= 1e18
    wild = in_one_batch(model, losses_on(data))
    others = [0, 1, 3, 4, 5]
    assert all(np.array_equal(calm[name][others], wild[name][others]) for name in calm)
    data[2] = np.nan
    void = in_one_batch(model, losses_on(data))
    assert all(np.array_equal(calm[name][others], void[name][others]) for name in calm)
    assert all(np.isnan(void[name][2]).any() for name in void)


# ----------------------------------------------------------------------------------------------- Opacus's own optimiser


def expected_sum(gradients: dict[str, Any], clip_norm: float) -> dict[str, Any]:
    """Σ min(1, C/‖g‖) g, with Opacus's 1e-6 in the denominator."""
    squares = sum((rows**2).reshape(len(rows), -1).sum(1) for rows in gradients.values())
    factors = np.minimum(1, clip_norm / (np.sqrt(squares) + 1e-6))
    assert (factors < 1).any() and (factors == 1).any()
    return {name: np.tensordot(factors, rows, 1) for name, rows in gradients.items()}


@pytest.mark.parametrize("virtual", [False, True], ids=["one batch", "virtual steps"])
def test_the_optimiser_of_opacus_works_on_top_unchanged(virtual: bool) -> None:
    case = family("bert")
    gradients = one_by_one(case.model, case.losses)
    norms = np.sqrt(sum((rows**2).reshape(len(rows), -1).sum(1) for rows in gradients.values()))
    clip_norm = float(np.median(norms))
    expected = expected_sum(gradients, clip_norm)
    before = {name: parameter.detach().double().numpy().copy() for name, parameter in case.parameters.items()}
    optimizer = DPOptimizer(
        torch.optim.SGD(list(case.parameters.values()), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    batches = [[0, 1], [2, 3, 4], [5]] if virtual else [range(6)]
    with per_sample_gradients(case.model, case.parameters):
        for number, batch in enumerate(batches, 1):
            optimizer.signal_skip_step(number < len(batches))
            case.losses(case.model, batch).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    moved = {name: before[name] - parameter.detach().double().numpy() for name, parameter in case.parameters.items()}
    assert disagreement(moved, expected) < 1e-4


def test_a_second_backward_pass_makes_a_list_of_batches_as_in_opacus() -> None:
    case = family("llama")
    expected = one_by_one(case.model, case.losses)
    with per_sample_gradients(case.model, case.parameters):
        for batch in ([0, 1], [2, 3, 4], [5]):
            case.losses(case.model, batch).sum().backward()  # type: ignore[no-untyped-call]
        lists: dict[str, list[torch.Tensor]] = {n: p.grad_sample for n, p in case.parameters.items()}  # type: ignore[attr-defined]
    assert all([len(batch) for batch in each] == [2, 3, 1] for each in lists.values())
    assert disagreement({n: torch.cat(each).double().numpy() for n, each in lists.items()}, expected) < 3e-5


# --------------------------------------------------------------------------------------------- what is left afterwards


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_model_is_as_before_after_the_context(name: str) -> None:
    case = family(name)
    with unchanged(case.model):
        in_one_batch(case.model, case.losses)


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
def test_the_model_is_as_before_after_an_exception(where: str) -> None:
    case = family("bert")
    with unchanged(case.model), pytest.raises(ZeroDivisionError), per_sample_gradients(case.model, case.parameters):
        fail(case, where)


def fail(case: Any, where: str) -> None:
    """Breaks off half-way through the layers."""

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    layer = case.model.base_model.model.bert.encoder.layer[1]
    if where == "forward":
        hook = layer.register_forward_hook(stop)
    elif where == "backward":
        hook = layer.output.register_forward_hook(lambda *call: call[-1].register_hook(stop) and None)
    try:
        case.losses(case.model, range(6)).sum().backward()
        stop()
    finally:
        if where != "between":
            hook.remove()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_a_failed_pass_left_is_forgotten(where: str) -> None:
    case = family("bert")
    expected = one_by_one(case.model, case.losses)
    with per_sample_gradients(case.model, case.parameters) as forget:
        with pytest.raises(ZeroDivisionError):
            fail(case, where)
        left = [getattr(parameter, "grad_sample", None) is not None for parameter in case.parameters.values()]
        assert any(left) == (where == "backward") and not all(left)
        forget()
        case.losses(case.model, range(6)).sum().backward()  # type: ignore[no-untyped-call]
        assert disagreement(collected(case.parameters), expected) < 3e-5


def test_a_gradient_that_comes_after_the_context_is_refused() -> None:
    model = seeded(lambda: nn.Linear(5, 3))
    with per_sample_gradients(model, dict(model.named_parameters())):
        loss = model(torch.ones(4, 5)).sum()
    with pytest.raises(CoverageError, match=r"'weight' in .* after the step had ended"):
        loss.backward()


def test_the_context_keeps_no_batch_alive() -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    with per_sample_gradients(model, dict(model.named_parameters())) as forget:
        model(torch.ones(4, 7, 5)).sum().backward()
        forget()
        gc.collect()
        shapes = [each.shape for each in gc.get_objects() if type(each) is torch.Tensor and 7 in each.shape[:2]]
    assert not shapes


def test_saving_and_generating_are_the_same_within_the_context(tmp_path: Any) -> None:
    case = family("llama")
    prompt = torch.arange(5, 9).unsqueeze(0)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    plain = case.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    case.model.save_pretrained(tmp_path / "outside")
    with per_sample_gradients(case.model, case.parameters):
        within = case.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        case.model.save_pretrained(tmp_path / "within")
        assert all(parameter.grad_sample is None for parameter in case.parameters.values())  # type: ignore[attr-defined]
    assert torch.equal(plain, within) and plain.shape[1] > prompt.shape[1] and int(plain.max()) < WORDS
    files = sorted(path.name for path in (tmp_path / "outside").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        assert (tmp_path / "within" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()


def test_weights_that_change_between_two_passes_are_the_new_ones() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    losses, parameters = losses_on(inputs(6, 4, 5)), dict(model.named_parameters())
    with per_sample_gradients(model, parameters) as forget:
        losses(model, range(6)).sum().backward()  # type: ignore[no-untyped-call]
        forget()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.5)
        losses(model, range(6)).sum().backward()  # type: ignore[no-untyped-call]
        found = collected(parameters)
    assert disagreement(found, one_by_one(model, losses)) < 1e-5


def test_a_weight_that_changes_within_a_pass_is_noticed() -> None:
    model: Any = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    with per_sample_gradients(model, dict(model.named_parameters())):
        loss = model(torch.ones(4, 5)).sum()
        with torch.no_grad():
            model[1].weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
