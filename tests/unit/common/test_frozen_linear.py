"""Frozen linear maps by oneDNN give what torch's own give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import profile

from common import frozen_linear
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.cuts import INPUT
from common.frozen_linear import FEWEST_ROWS, FrozenLinear, by_onednn
from server.evaluation import Evaluator, held_out

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

needs_onednn = pytest.mark.skipif(not frozen_linear.available(), reason="oneDNN is of no use on this machine")


@pytest.fixture
def without() -> Iterator[Callable[[AdaptedModel], AdaptedModel]]:
    """A model whose maps are torch's own again, as on other machines."""
    changed: list[nn.Module] = []

    def undone(model: AdaptedModel) -> AdaptedModel:
        changed.extend(module for module in model.peft.modules() if type(module) is FrozenLinear)
        for module in changed:
            module.__class__ = nn.Linear
        return model

    yield undone
    for module in changed:
        module.__class__ = FrozenLinear


def frozen(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A map by oneDNN, and the same by torch."""
    maps = [nn.Linear(inputs, outputs, bias=bias).requires_grad_(False) for _ in range(2)]
    maps[1].load_state_dict(maps[0].state_dict())
    by_onednn(maps[:1])
    return maps[0], maps[1]


def maps_done(work: Callable[[], object]) -> int:
    """How many linear maps oneDNN does meanwhile, backward among them."""
    with profile() as told:
        work()
    return sum(one.count for one in told.key_averages() if one.key == "mkldnn::_linear_pointwise")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((3, 8, 16), 8), ((2, 64, 384), 1536), ((32, 384), 8), ((16, 8), 1)])
def test_map_and_gradient_of_its_input_are_those_of_higher_precision(
    shape: tuple[int, ...], outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    fast, plain = frozen(shape[-1], outputs, bias)
    given = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], outputs)
    exact = nn.Linear(shape[-1], outputs, bias=bias, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())

    def gradient(layer: nn.Module, of: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((layer(of) * along).sum(), of)[0]

    wide = given.detach().double().requires_grad_()
    torch.testing.assert_close(fast(given).double(), exact(wide), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(fast, given, weights).double(), gradient(exact, wide, weights.double()), rtol=1e-5, atol=1e-4
    )
    turned = given.detach().transpose(0, -2)  # not contiguous
    torch.testing.assert_close(fast(turned), plain(turned), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_row_is_the_same_to_the_last_bit_whatever_the_others_hold() -> None:
    torch.manual_seed(0)
    fast, _ = frozen(48, 40)
    given = torch.randn(4, 16, 48)
    others = given.clone()
    others[1:] = 1e6 * torch.randn(3, 16, 48)
    assert torch.equal(fast(given)[0], fast(others)[0])


@needs_onednn
def test_only_frozen_maps_in_fp32_with_enough_rows_are_done_by_onednn() -> None:
    fast, plain = frozen(8, 3)
    enough, few = torch.randn(FEWEST_ROWS, 8), torch.randn(FEWEST_ROWS - 1, 8)
    assert maps_done(lambda: fast(enough)) == 1
    assert maps_done(lambda: fast(enough.requires_grad_()).sum().backward()) == 2
    assert maps_done(lambda: fast(few)) == 0
    torch.testing.assert_close(fast(few), plain(few), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert maps_done(lambda: fast(enough)) == 0
    training, _ = frozen(8, 3)
    training.requires_grad_(True)
    assert maps_done(lambda: training(enough).sum().backward()) == 0
    assert training.weight.grad is not None
    training.requires_grad_(False).bfloat16()
    assert maps_done(lambda: training(enough.bfloat16())) == 0


@needs_onednn
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama"])
def test_logits_and_gradients_of_an_adapter_are_those_of_torchs_own_maps(
    name: str,
    request: pytest.FixtureRequest,
    adapted_model: Load,
    random_adapter: Draw,
    without: Callable[[AdaptedModel], AdaptedModel],
) -> None:
    model = adapted_model(request.getfixturevalue(name))
    model.load(random_adapter(model, 3))
    ids = torch.arange(1, 33).reshape(2, 16)
    mask = torch.ones_like(ids)

    def gradients() -> tuple[torch.Tensor, ...]:
        with model.training(model.spec.names) as parameters:
            logits = model.top(ids, mask, INPUT)
            return (logits.detach(), *torch.autograd.grad(logits.square().sum(), list(parameters.values())))

    fast = gradients()
    assert maps_done(gradients) > 2 * len(model.spec.names) / 4
    without(model)
    assert maps_done(gradients) == 0
    torch.testing.assert_close(fast, gradients(), rtol=1e-4, atol=1e-5)


@needs_onednn
def test_answers_of_an_evaluation_are_those_of_torchs_own_maps(
    tiny_bert: Path,
    triage_data: Path,
    adapted_model: Load,
    random_adapter: Draw,
    without: Callable[[AdaptedModel], AdaptedModel],
) -> None:
    model = adapted_model(tiny_bert)
    subject = Evaluator(model, {"test": held_out(model, str(triage_data), "test", {}, None)})
    state = random_adapter(model, 3)
    fast = subject.scores(state, "test")
    without(model)
    plain = subject.scores(state, "test")
    assert len(set(plain["predicted"])) > 1
    assert np.array_equal(fast["predicted"], plain["predicted"])
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-5, atol=1e-5)


def test_nothing_changes_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "available", lambda: False)
    left, _ = frozen(8, 3)
    assert type(left) is nn.Linear


@needs_onednn
def test_peft_adapts_it_as_any_linear_map() -> None:
    fast, _ = frozen(48, 40)
    network = nn.Sequential(fast, nn.Tanh())
    adapted = get_peft_model(network, LoraConfig(target_modules=["0"], r=2))  # type: ignore[arg-type]
    given = torch.randn(32, 48)
    assert torch.equal(adapted(given), torch.tanh(fast(given)))
    assert type(adapted.base_model.model[0].base_layer) is FrozenLinear
