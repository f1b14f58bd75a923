"""What is trained in an audit: tiny random models made here, and synthetic examples of which everything is known.

The guarantee is a property of the engine around the model (sampler, clipping, noise, ledger), not of the model. A tiny
one makes exact replays and thousands of canaries affordable; nothing is downloaded and no private data are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from client.privacy.audit.verdicts import FloatArray
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.config import RunConfig
from common.examples import Examples
from common.model import BaseModel, Placement
from common.sections import LoraSection, TaskSection
from common.tasks.base import Encoded, Task
from common.tasks.registry import task_of

VOCABULARY = 64
OUTLIER, NOT_A_NUMBER, OUTSIDE = VOCABULARY - 1, VOCABULARY, VOCABULARY + 7
"""Tokens whose embedding is huge, is NaN, and does not exist. The last two are beyond the table, so that nothing that
draws tokens of the model meets them by chance."""
LENGTH = 48
HIDDEN, DEPTH = 32, 3
CANARIES = 1024
"""Canaries of one canary model; each has a direction of its own."""

Unit = tuple[Encoded | None, ...]
"""The examples of one privacy unit."""


def small_model(config: RunConfig, clip_norm: float) -> AdaptedModel:
    """A transformer of the plan's task with a LoRA adapter like the plan's, so loud that gradients exceed C.

    Its final normalisation is scaled up in proportion to ``clip_norm``; features and gradients grow with it.
    """
    causal = config.task.name == "causal-lm"
    labels = list(config.task.labels[:16]) + [f"label {index}" for index in range(len(config.task.labels), 8)]
    settings = config.task.model_copy(update={"max_length": min(config.task.max_length, LENGTH)})
    if not causal:
        pooling = "mean" if config.task.pooling == "auto" else config.task.pooling
        settings = settings.model_copy(update={"labels": tuple(labels), "pooling": pooling})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network, norm = _llama() if causal else _bert(len(labels))
        norm.weight *= 8 * max(1.0, clip_norm)
        table = _Embedding(network.get_input_embeddings())
        table.weight[OUTLIER] *= 1e3
        network.set_input_embeddings(table)
    return _adapted("small", network, 0, task_of(settings), _small_lora(config.lora, network))


class _Embedding(torch.nn.Embedding):
    """A table in which one token more is not a number."""

    def __init__(self, table: Any) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hostile = ids == NOT_A_NUMBER
        return super().forward(ids.masked_fill(hostile, 0)).masked_fill(hostile.unsqueeze(-1), torch.nan)


def _bert(labels: int) -> tuple[PreTrainedModel, Any]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    network = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            initializer_range=0.2,
            num_labels=labels,  # type: ignore[call-arg]  # of every configuration
            **sizes,  # type: ignore[arg-type]
        )
    )
    return network, cast(Any, network.bert.encoder.layer[-1]).output.LayerNorm


def _llama() -> tuple[PreTrainedModel, Any]:
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=DEPTH,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    return network, network.model.norm


def _small_lora(lora: LoraSection, network: PreTrainedModel) -> LoraSection:
    """The plan's adapter as far as the small model carries it, without dropout.

    Dropout draws a mask for each physical batch in turn, so a replay would see the masks of other units change although
    their distribution does not; the account does not rely on it.
    """
    linears = {name.rsplit(".", 1)[-1] for name, part in network.base_model.named_modules() if _is_linear(part)}
    targets = lora.target_modules if set(lora.target_modules) <= linears else ()
    layers = None if lora.layers is None else min(lora.layers, DEPTH - 1)
    return lora.model_copy(update={"r": min(lora.r, 8), "dropout": 0.0, "target_modules": targets, "layers": layers})


def _is_linear(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)


def canary_model(clip_norm: float) -> AdaptedModel:
    """A model whose frozen features are one-hot: token k yields √H in coordinate k, so that the head's gradients of two
    different tokens are orthogonal, each with norm above 4 · ``clip_norm``.

    One Llama layer whose outputs are zero, on an identity embedding: the residual stream carries the token through to
    the final RMS norm unchanged.
    """
    config = LlamaConfig(
        vocab_size=CANARIES + 1,
        hidden_size=CANARIES,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=LENGTH,
        num_labels=2,  # type: ignore[call-arg]  # of every configuration
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network: PreTrainedModel = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
        body = cast(Any, network.model)
        body.embed_tokens.weight.copy_(torch.eye(CANARIES + 1, CANARIES))
        body.layers[0].self_attn.o_proj.weight.zero_()
        body.layers[0].mlp.down_proj.weight.zero_()
        body.norm.weight.fill_(max(1.0, clip_norm / 4))
    settings = TaskSection(labels=("no", "yes"), pooling="mean", max_length=LENGTH)
    return _adapted("canaries", network, CANARIES, task_of(settings), LoraSection(r=1))


def _adapted(name: str, network: PreTrainedModel, pad: int, task: Task, lora: LoraSection) -> AdaptedModel:
    """What :func:`common.model.load_base` does, without files."""
    network.config.pad_token_id = pad
    network.config.use_cache = False
    network.requires_grad_(False)
    network.train(False)
    # Only its padding id is ever asked for: all examples are made of token ids.
    words = Tokenizer(WordLevel({"[PAD]": pad}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, pad_token="[PAD]", unk_token="[PAD]"
    )
    digest = hashlib.sha256(f"audit {name}".encode()).hexdigest()
    base = BaseModel(network, tokenizer, digest, Placement.choose("cpu", "float32"), task.settings.pooling)
    return AdaptedModel(base, task, lora)


def example(model: AdaptedModel, generator: np.random.Generator, length: int, token: int | None = None) -> Encoded:
    """Random tokens and target; ``token`` stands in the middle of them."""
    ids = generator.integers(4, OUTLIER, min(length, model.task.settings.max_length)).astype(np.int32)
    if token is not None:
        ids[len(ids) // 2] = token
    if model.task.name == "causal-lm":
        target = np.where(ids < VOCABULARY, ids, 0).astype(np.int64)
        target[: len(ids) // 2] = -100
        return Encoded(ids, target)
    return Encoded(ids, np.asarray(generator.integers(0, len(model.task.settings.labels)), np.int64))


def failing(item: Encoded) -> Encoded:
    """The example with a target that does not exist, so that its loss raises."""
    return Encoded(item.ids, np.full_like(item.target, 1 << 20))


def canary(index: int) -> Encoded:
    """The canary whose gradient has the direction of that number (:func:`coordinates`)."""
    return Encoded(np.array([index], np.int32), np.asarray(0, np.int64))


def coordinates(sums: FloatArray) -> FloatArray:
    """What each canary's own direction holds of a sum over the head [2, CANARIES]: the head's gradient at zero weights
    is (p − y) ⊗ features = (−½, ½) ⊗ √H·e_k for label 0, that is the unit vector (−1, 1)/√2 ⊗ e_k but for its length.
    """
    own: FloatArray = (sums[1] - sums[0]) / np.sqrt(2.0)
    return own


def examples_of_units(model: AdaptedModel, units: Sequence[Unit], grouped: bool) -> Examples:
    """The units' examples; where a unit is one example each, as a plan for examples holds them."""
    if not grouped:
        return Examples([item for unit in units for item in unit], model.task)
    numbers = np.repeat(np.arange(len(units)), [len(unit) for unit in units]).astype(np.int64)
    return Examples([item for unit in units for item in unit], model.task, units=numbers)


def random_adapter(model: AdaptedModel) -> AdapterState:
    """An adapter that is zero nowhere, as after some rounds; always the same."""
    generator = np.random.default_rng(1)
    return {name: 0.3 * generator.standard_normal(shape).astype(np.float32) for name, shape in model.spec.shapes}


def zero_adapter(model: AdaptedModel) -> AdapterState:
    """All zero: an update is then exact in fp32, however small."""
    return {name: np.zeros(shape, np.float32) for name, shape in model.spec.shapes}
