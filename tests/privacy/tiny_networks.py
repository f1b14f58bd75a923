"""Tiny random networks of five families under PEFT, and each example's gradient by plain autograd on it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from client.privacy.per_sample import per_sample_gradients

Gradients = npt.NDArray[np.float64]
Losses = Callable[[Any, Sequence[int]], torch.Tensor]
"""(model, which examples) → their losses, as one padded batch."""

CLASSES, WORDS, LENGTHS = 3, 50, (7, 3, 9, 5, 8, 4)


@dataclass(frozen=True)
class Family:
    """A network with an adapter, and the losses of six ragged examples."""

    model: Any
    losses: Losses

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def adapted(network: Any, config: PeftConfig, seed: int = 3) -> Any:
    """The network under PEFT in eval mode; no trained tensor is zero."""
    model = get_peft_model(network, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def family(name: str, network: Any = None, **lora: Any) -> Family:
    """``bert``, ``llama``, ``gpt2``, ``t5`` or ``vit``; settings of LoRA beside its defaults here."""
    targets, heads = TARGETS[name]
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": targets, "modules_to_save": heads}
    config = LoraConfig(fan_in_fan_out=name == "gpt2", **{**settings, **lora})
    return Family(adapted(network or NETWORKS[name](), config), LOSSES[name])


def _seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    def built() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return build().eval()

    return built


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NETWORKS: Mapping[str, Callable[[], Any]] = {
    "bert": _seeded(
        lambda: BertForSequenceClassification(
            BertConfig(**SIZES, vocab_size=WORDS, num_labels=CLASSES, initializer_range=0.2)
        )
    ),
    "llama": _seeded(
        lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=WORDS, initializer_range=0.2, use_cache=False)
        )
    ),
    "gpt2": _seeded(
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=16, use_cache=False)
        )
    ),
    "t5": _seeded(
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=WORDS, use_cache=False)
        )
    ),
    "vit": _seeded(
        lambda: ViTForImageClassification(
            ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=CLASSES, initializer_range=0.2)
        )
    ),
}
TARGETS: Mapping[str, tuple[list[str], list[str] | None]] = {
    "bert": (["query", "value", "dense"], ["classifier"]),
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], None),
    "gpt2": (["c_attn", "c_proj", "c_fc"], None),
    "t5": (["q", "v", "o", "wi", "wo"], None),
    "vit": (["q_proj", "v_proj", "o_proj", "fc1", "fc2"], ["classifier"]),
}


def texts(chosen: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, T] of the chosen examples, padded on the right to the longest of them."""
    rows = [torch.from_numpy(np.random.default_rng([seed, i]).integers(5, WORDS, LENGTHS[i])) for i in chosen]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (ids > 0).long()


def labels(chosen: Sequence[int]) -> torch.Tensor:
    """Class of each example."""
    return torch.tensor([i % CLASSES for i in chosen])


def _classified(model: Any, chosen: Sequence[int]) -> torch.Tensor:
    ids, mask = texts(chosen)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return functional.cross_entropy(logits, labels(chosen), reduction="none")


def per_token(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each sequence's own tokens [B]."""
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def _continued(model: Any, chosen: Sequence[int]) -> torch.Tensor:
    ids, mask = texts(chosen)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return per_token(logits[:, :-1], ids[:, 1:], mask[:, 1:])


def _translated(model: Any, chosen: Sequence[int]) -> torch.Tensor:
    ids, mask = texts(chosen)
    targets, learnt = texts(chosen, seed=1)
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits
    return per_token(logits[:, :-1], targets[:, 1:], learnt[:, 1:])


def _seen(model: Any, chosen: Sequence[int]) -> torch.Tensor:
    precision = next(model.parameters()).dtype
    images = np.stack([np.random.default_rng(i).normal(size=(3, 8, 8)) for i in chosen])
    logits = model(pixel_values=torch.from_numpy(images).to(precision)).logits
    return functional.cross_entropy(logits, labels(chosen), reduction="none")


LOSSES: Mapping[str, Losses] = {
    "bert": _classified,
    "llama": _continued,
    "gpt2": _continued,
    "t5": _translated,
    "vit": _seen,
}


# ------------------------------------------------------------------------------------------------------- the reference


def one_by_one(model: nn.Module, losses: Losses, n: int = len(LENGTHS)) -> dict[str, Gradients]:
    """Each example's gradient [n, *shape] by name: plain autograd, a batch of one, no padding, double precision."""
    double = copy.deepcopy(model).double()
    parameters = {name: p for name, p in double.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(losses(double, [i]).sum(), list(parameters.values())) for i in range(n)]
    return {name: np.stack([row[index].numpy() for row in rows]) for index, name in enumerate(parameters)}


def collected(parameters: Mapping[str, nn.Parameter]) -> dict[str, Gradients]:
    """``grad_sample`` of each parameter, which has to be fp32."""
    for name, parameter in parameters.items():
        assert parameter.grad_sample is not None, name  # type: ignore[attr-defined]
        assert parameter.grad_sample.dtype == torch.float32  # type: ignore[attr-defined]
        assert parameter.grad is None
    return {name: p.grad_sample.double().numpy().copy() for name, p in parameters.items()}  # type: ignore[attr-defined]


def in_one_batch(model: nn.Module, losses: Losses, n: int = len(LENGTHS)) -> dict[str, Gradients]:
    """The same by the product, all examples in one padded batch."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with per_sample_gradients(model, parameters):
        losses(model, range(n)).sum().backward()  # type: ignore[no-untyped-call]
        return collected(parameters)


def disagreement(found: Mapping[str, Gradients], expected: Mapping[str, Gradients]) -> float:
    """Largest deviation of any tensor, relative to the largest entry of what it should be."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape, name
        assert np.abs(gradient).max() > 1e-6, f"{name} has no gradient to compare"
    return max(float(np.abs(found[name] - each).max() / np.abs(each).max()) for name, each in expected.items())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Nothing of the model's modules and parameters is different after it."""
    before = _traces(model)
    yield
    assert _traces(model) == before


def _traces(model: nn.Module) -> list[Any]:
    modules = [(name, sorted(m.__dict__), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
    parameters = [
        (name, sorted(p.__dict__), p.requires_grad, p.grad, list(p._backward_hooks or ()))
        for name, p in model.named_parameters()
    ]
    return [modules, parameters]
