"""What has no exact per-example gradient is refused, by the names of parameter and module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from tiny_networks import LOSSES, NETWORKS, adapted, disagreement, in_one_batch, one_by_one, unchanged
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from client.privacy.per_sample import check_coverage, per_sample_gradients
from common.errors import CoverageError

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "prompt tuning": (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4), "Embedding"),
    "prefix tuning": (PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4), "Embedding"),
    "p-tuning": (PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4), "Embedding"),
    "IA3": (IA3Config(**ATTENTION, feedforward_modules=[]), "ParameterDict"),
    "DoRA": (LoraConfig(**ATTENTION, use_dora=True), "DoraLinearLayer"),
    "VeRA": (VeraConfig(target_modules=["q_proj"], r=4), "ParameterDict"),
    "AdaLoRA": (AdaLoraConfig(**ATTENTION, total_step=10), "ParameterDict"),
    "LoHa": (LoHaConfig(**ATTENTION), "ParameterDict"),
    "LoKr": (LoKrConfig(**ATTENTION), "ParameterDict"),
    "OFT": (OFTConfig(**ATTENTION, r=2, oft_block_size=0), "OFTRotationModule"),
    "BOFT": (BOFTConfig(**ATTENTION, boft_block_size=4), "ParameterDict"),
    "VB-LoRA": (VBLoRAConfig(**ATTENTION, num_vectors=8, vector_length=4), "ParameterDict"),
    "LoRA of an embedding": (LoraConfig(target_modules=["embed_tokens"]), "ParameterDict"),
    "a trained embedding": (LoraConfig(**ATTENTION, modules_to_save=["embed_tokens"]), "Embedding"),
    "trained tokens": (LoraConfig(**ATTENTION, trainable_token_indices=[1, 2]), "ParameterDict"),
    "norms of Llama": (LNTuningConfig(target_modules=["input_layernorm"]), "LlamaRMSNorm"),
}


def under(config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(NETWORKS["llama"](), config)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_of_peft_without_an_exact_rule_are_refused_by_name_before_anything_runs(method: str) -> None:
    config, kind = REFUSED[method]
    model = under(config)
    parameters = trained(model)
    with pytest.raises(CoverageError, match=r"'[\w.]+' in [\w.]+ \((\w+)\) has no exact") as refused:
        check_coverage(model, parameters)
    named = str(refused.value).split("'")[1]
    assert named in parameters and f"({kind})" in str(refused.value)
    with unchanged(model), pytest.raises(CoverageError), per_sample_gradients(model, parameters):
        raise AssertionError("never entered")


def test_adapters_of_fused_attention_are_refused_in_their_first_pass() -> None:
    """PEFT adds them to the weights of nn.MultiheadAttention; their own modules never run as they are trained."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, data: torch.Tensor) -> torch.Tensor:
            return self.mha(data, data, data, need_weights=False)[0]  # type: ignore[no-any-return]

    model = adapted(Attention(), LoraConfig(target_modules=["mha"], r=2))
    with pytest.raises(CoverageError, match=r"'\S+lora_[AB]\S+' in \S+ \(Linear\) is also used past its module"):
        in_one_batch(model, lambda model, chosen: model(torch.ones(6, 3, 8)).square().sum((1, 2)))


class Penalised(nn.Module):
    """A linear map whose weight takes part a second time, outside of it."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3)
        self.recompute = recompute

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        if self.recompute:
            again = checkpoint(self.twice, data.requires_grad_(), use_reentrant=True)
        else:
            again = self.twice(data)
        return again  # type: ignore[no-any-return]

    def twice(self, data: torch.Tensor) -> torch.Tensor:
        return self.map(data) + functional.linear(data, self.map.weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize("recompute", [False, True], ids=["plainly", "in a reentrant checkpoint"])
def test_a_weight_that_is_used_past_its_module_is_refused(recompute: bool) -> None:
    model = Penalised(recompute)
    with pytest.raises(CoverageError, match=r"'map\.weight' in map \(Linear\) is also used past its module"):
        in_one_batch(model, lambda model, chosen: model(torch.ones(6, 4)).square().sum(1))
    with torch.no_grad():
        assert model(torch.ones(6, 4)).shape == (6, 3)


@pytest.mark.parametrize(
    "run",
    [
        lambda first, second, data: second(first(data).flatten(0, 1)).view(6, 5, 3),
        lambda first, second, data: second(first(data).mean(0, keepdim=True)).expand(6, 5, 3),
        lambda first, second, data: second(first(data).transpose(0, 1)).transpose(0, 1),
        lambda first, second, data: second(first(data)[0, 0]).expand(6, 5, 3),
    ],
    ids=["tokens of all examples in a row", "one row for all", "positions first", "no rows"],
)
@pytest.mark.parametrize("second", [lambda: nn.Linear(4, 3), lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))])
def test_a_module_whose_rows_are_not_the_examples_is_refused(
    run: Callable[..., torch.Tensor], second: Callable[[], nn.Module]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), second()

        def forward(self, data: torch.Tensor) -> torch.Tensor:
            return run(self.first, self.second, data)

    with pytest.raises(CoverageError, match=r"'(first|second)\S+' in .*(rows|row per example)"):
        in_one_batch(Model(), lambda model, chosen: model(torch.ones(6, 5, 4)).square().sum((1, 2)))


def test_a_forward_pass_that_somebody_replaced_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = lambda data: data * model[0].weight.sum()  # type: ignore[method-assign, assignment]
    with pytest.raises(CoverageError, match=r"'0\.\w+' in 0 \(Linear\)"):
        check_coverage(model, dict(model.named_parameters()))


def test_a_convolution_that_pads_with_something_else_than_zeros_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"))
    with pytest.raises(CoverageError, match=r"'0\.\w+' in 0 \(Conv1d\)"):
        check_coverage(model, dict(model.named_parameters()))


def test_a_second_context_on_the_same_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    parameters = dict(model.named_parameters())
    with per_sample_gradients(model, parameters):
        with pytest.raises(CoverageError), per_sample_gradients(model, parameters):
            raise AssertionError("never entered")
        model(torch.ones(4, 3)).sum().backward()
        assert parameters["0.weight"].grad_sample.shape == (4, 3, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("normed", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_from_others_is_refused(normed: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(normed(nn.Linear(3, 3)))
    with pytest.raises(CoverageError, match=r"'0\.[\w.]+' in 0\S* \(\w+\)"):
        check_coverage(model, dict(model.named_parameters()))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_norms_that_an_adapter_trains_are_exact() -> None:
    model = adapted(NETWORKS["bert"](), LNTuningConfig(target_modules=["LayerNorm"]))
    assert len(trained(model)) == 10
    assert disagreement(in_one_batch(model, LOSSES["bert"]), one_by_one(model, LOSSES["bert"])) < 3e-5
