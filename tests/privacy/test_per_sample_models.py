"""Per-example gradients of five model families against brute force and against Opacus's hooks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from tiny_networks import LENGTHS, NETWORKS, Family, disagreement, family, in_one_batch, one_by_one
from torch import nn
from transformers.pytorch_utils import Conv1D

FAMILIES = ["bert", "llama", "gpt2", "t5", "vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_the_gradient_of_one_example_alone(name: str) -> None:
    case = family(name)
    assert disagreement(in_one_batch(case.model, case.losses), one_by_one(case.model, case.losses)) < 3e-5


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "lora",
    [{"use_rslora": True, "r": 3}, {"lora_bias": True}, {"r": 32}],
    ids=["rank-stabilised", "with a bias", "rank above the width"],
)
def test_variants_of_lora_are_exact(name: str, lora: dict[str, Any]) -> None:
    case = family(name, **lora)
    assert disagreement(in_one_batch(case.model, case.losses), one_by_one(case.model, case.losses)) < 3e-5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_either_matrix_of_a_pair_may_be_frozen(name: str, frozen: str) -> None:
    case = family(name)
    for parameter_name, parameter in case.model.named_parameters():
        if frozen in parameter_name:
            parameter.requires_grad_(False)
    assert disagreement(in_one_batch(case.model, case.losses), one_by_one(case.model, case.losses)) < 3e-5


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_base_weights_and_norms_that_train_are_exact(name: str) -> None:
    """Among them GPT-2's Conv1D with weight and bias; not the embeddings, nor Llama's own kind of norm."""
    model = NETWORKS[name]()
    for place, module in model.named_modules():
        wanted = isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm))
        for kind, parameter in module.named_parameters(recurse=False):
            without = kind == "bias" and place.endswith((".key", ".k_proj"))  # softmax ignores it
            parameter.requires_grad_(wanted and not without)
    tied = model.get_output_embeddings()
    if tied is not None:
        tied.weight.requires_grad_(False)
    losses = family(name).losses
    assert disagreement(in_one_batch(model, losses), one_by_one(model, losses)) < 3e-5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_it_agrees_with_the_hooks_of_opacus(name: str) -> None:
    case = family(name)
    assert disagreement(in_one_batch(case.model, case.losses), by_hooks(case)) < 1e-5


def by_hooks(case: Family) -> dict[str, Any]:
    """``grad_sample`` as Opacus's hooks find it on a copy in training mode."""
    model = copy.deepcopy(case.model)
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)
    case.losses(model, range(len(LENGTHS))).sum().backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad_sample.double().numpy() for n, p in model.named_parameters() if p.requires_grad}
    hooks.cleanup()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_add_up_to_the_gradient_of_the_batch(name: str) -> None:
    case = family(name)
    plain = copy.deepcopy(case.model)
    case.losses(plain, range(len(LENGTHS))).sum().backward()  # type: ignore[no-untyped-call]
    whole = {n: p.grad.double().numpy() for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: rows.sum(axis=0) for n, rows in in_one_batch(case.model, case.losses).items()}
    assert disagreement(found, whole) < 3e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_an_example_alone_in_its_batch_is_exact_too(name: str) -> None:
    case = family(name)
    found = in_one_batch(case.model, case.losses, n=1)
    assert disagreement(found, one_by_one(case.model, case.losses, n=1)) < 3e-5


def test_a_training_flag_decides_nothing() -> None:
    """Opacus's hooks leave out what is in eval mode; a gradient that flows has to be clipped all the same."""
    case = family("bert")
    evaluated = in_one_batch(case.model.eval(), case.losses)
    trained = family("bert")
    for module in trained.model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    assert all(np.array_equal(evaluated[n], rows) for n, rows in in_one_batch(trained.model, case.losses).items())


def test_dropout_before_an_adapter_is_seen_by_its_gradients() -> None:
    """With fixed masks the rows still add up to what autograd finds with the same masks."""
    case = family("bert", lora_dropout=0.5)
    for module in case.model.modules():
        module.training = isinstance(module, nn.Dropout) and module.p == 0.5
    plain = copy.deepcopy(case.model)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        case.losses(plain, range(len(LENGTHS))).sum().backward()  # type: ignore[no-untyped-call]
        torch.manual_seed(5)
        found = {n: rows.sum(axis=0) for n, rows in in_one_batch(case.model, case.losses).items()}
    whole = {n: p.grad.double().numpy() for n, p in plain.named_parameters() if p.requires_grad}
    assert disagreement(found, whole) < 3e-5
