"""The adapted model: what is trained, where it may be cut, and that it computes what the stock classes compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from common.adapted import AdaptedModel
from common.adapter import AdapterState, save_adapter
from common.cuts import INPUT, Cut
from common.errors import AdapterError, ModelError
from common.sections import PhaseSection

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

TEXTS = (
    "severe bleeding since this morning",
    "child with mild cough",
    "man with high fever and chest pain for three weeks",
)
CAUSAL = {"name": "causal-lm", "labels": ()}


def phase(**settings: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "rounds": 1, "sample_rate": 1.0, **settings})


def encoded(model: AdaptedModel, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [3, length] of texts of different lengths."""
    rows = [model.base.tokenizer(text)["input_ids"][:length] for text in TEXTS]
    ids = torch.full((len(rows), length), model.base.tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def logits_of(model: AdaptedModel, cut: Cut = INPUT) -> torch.Tensor:
    ids, mask = encoded(model)
    with torch.no_grad():
        return model.top(ids if cut == INPUT else model.prefix(ids, mask, cut), mask, cut)


def modules(names: tuple[str, ...]) -> set[str]:
    """``layer.matrix`` of LoRA tensors, the bare name of others."""
    return {
        f"{next(part for part in name.split('.') if part.isdigit())}.{name.split('.')[-2]}" if "lora" in name else name
        for name in names
    }


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_the_adapter_covers_query_value_and_the_head_of_all_layers(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    head = {name for name in model.spec.names if "classifier" in name}
    assert head == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    stem = "base_model.model.bert.encoder.layer.{}.attention.self.{}.lora_{}.weight"
    pairs = {stem.format(layer, m, matrix) for layer in range(4) for m in ("query", "value") for matrix in "AB"}
    assert set(model.spec.names) == head | pairs


def test_lora_layers_restricts_the_adapter_to_the_top_layers(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 1})
    assert modules(model.spec.names) == {"3.lora_A", "3.lora_B"} | {n for n in model.spec.names if "classifier" in n}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": ("head",)}, {"head"}),
        ({"train": ("lora",), "algorithm": "ffa"}, {"2.lora_B", "3.lora_B"}),
        ({"train": ("lora",), "algorithm": "fedit"}, {"2.lora_A", "2.lora_B", "3.lora_A", "3.lora_B"}),
        ({"train": ("lora",), "algorithm": "ffa", "layers": 1}, {"3.lora_B"}),
        ({"train": ("head", "lora"), "algorithm": "fedit", "layers": 1}, {"head", "3.lora_A", "3.lora_B"}),
        ({"train": ("head", "lora"), "algorithm": "ffa"}, {"head", "2.lora_B", "3.lora_B"}),
    ],
)
def test_phase_and_algorithm_decide_which_tensors_train(
    tiny_bert: Path, adapted_model: Load, settings: dict[str, Any], expected: set[str]
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    names = model.trained_in(phase(**settings), round=1)
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert list(names) == sorted(names)
    assert modules(names) == (expected - {"head"}) | (heads if "head" in expected else set())


def test_exactly_the_trained_tensors_get_gradients_and_only_within_training(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    model.load(random_adapter(model))
    names = model.trained_in(phase(train=("lora",)), 1)
    ids, mask = encoded(model)
    with model.training(names) as parameters:
        model.top(ids, mask, INPUT).sum().backward()
        assert set(parameters) == set(names)
        with_gradient = [p for p in model.peft.parameters() if p.grad is not None and bool(p.grad.any())]
        assert {id(p) for p in with_gradient} == {id(p) for p in parameters.values()}
    assert not any(p.requires_grad or p.grad is not None for p in model.peft.parameters())


def test_a_prefix_computed_during_training_makes_nothing_else_trainable(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    ids, mask = encoded(model)
    with model.training(model.trained_in(phase(), 1)) as parameters:
        for cut in (model.layer_cut, Cut(None)):
            model.prefix(ids, mask, cut)
            trainable = {id(p) for p in model.peft.parameters() if p.requires_grad}
            assert trainable == {id(p) for p in parameters.values()}


def test_training_leaves_every_dropout_of_the_base_switched_off(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert, lora={"dropout": 0.5})
    with model.training(model.trained_in(phase(train=("head", "lora")), 1)):
        active = {
            name for name, m in model.peft.named_modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0
        }
        assert active and all(".lora_dropout." in name for name in active)
    assert not any(m.training for m in model.peft.modules())


# ---- state ----------------------------------------------------------------------------------------------------------


def test_a_loaded_state_comes_back_bit_for_bit(tiny_bert: Path, adapted_model: Load, random_adapter: Draw) -> None:
    model = adapted_model(tiny_bert)
    state = random_adapter(model, 3)
    model.load(state)
    again = model.state()
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)
    chosen = model.spec.names[:2]
    assert tuple(model.state(chosen)) == chosen


def test_a_state_of_another_layout_is_refused(tiny_bert: Path, adapted_model: Load, random_adapter: Draw) -> None:
    model = adapted_model(tiny_bert)
    with pytest.raises(AdapterError, match="adapter: another layout than the plan's"):
        model.load(random_adapter(adapted_model(tiny_bert, lora={"layers": 1})))


def test_the_adapter_before_round_1_is_a_function_of_the_public_seed(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    first, again, other = (model.initial_state(seed, orthonormal=True) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for name in first:
        if model.group_of(name) == "A":
            assert not np.array_equal(first[name], other[name])
            np.testing.assert_allclose(first[name] @ first[name].T, np.eye(4), atol=1e-6)
        elif model.group_of(name) == "B":
            assert not first[name].any()
    uniform = model.initial_state(5, orthonormal=False)
    bound = 1 / np.sqrt(32)
    assert all(np.abs(uniform[name]).max() <= bound for name in uniform if model.group_of(name) == "A")


def test_the_head_starts_from_the_centred_embeddings_of_the_label_names(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert, head_scale=2.0)
    state = model.initial_state(0, orthonormal=True)
    # by hand, with the stock encoder and mean pooling
    encoder, tokenizer = BertModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    with torch.no_grad():
        rows = [
            encoder(**tokenizer(label, return_tensors="pt")).last_hidden_state.mean(dim=1)[0]
            for label in ("urgent", "routine", "review")
        ]
    centred = torch.stack(rows) - torch.stack(rows).mean(dim=0)
    expected = 2.0 * centred / centred.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(state["base_model.model.classifier.weight"], expected.numpy(), atol=1e-5)
    assert not state["base_model.model.classifier.bias"].any()
    zero = adapted_model(tiny_bert, head_init="zero").initial_state(0, orthonormal=True)
    assert not zero["base_model.model.classifier.weight"].any()


# ---- prefix and top -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_prefix_and_top_of_bert_equal_the_full_forward_pass_at_every_cut(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw, layers: int
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": layers})
    model.load(random_adapter(model))
    assert model.layer_cut == Cut(4 - layers)
    torch.testing.assert_close(logits_of(model, model.layer_cut), logits_of(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("task", [{}, CAUSAL], ids=["classification", "causal-lm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_prefix_and_top_of_llama_equal_the_full_forward_pass_at_every_cut(
    tiny_llama: Path, adapted_model: Load, random_adapter: Draw, layers: int, task: dict[str, Any]
) -> None:
    model = adapted_model(tiny_llama, lora={"layers": layers}, **task)
    model.load(random_adapter(model))
    assert model.layer_cut == Cut(3 - layers)
    torch.testing.assert_close(logits_of(model, model.layer_cut), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_layer_view_changes_nothing_in_the_model_it_is_cut_from(
    family: str, tiny_bert: Path, tiny_llama: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model({"bert": tiny_bert, "llama": tiny_llama}[family], lora={"layers": 1})
    model.load(random_adapter(model))
    before = logits_of(model)
    logits_of(model, model.layer_cut)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "last")])
def test_features_by_way_of_a_layer_cut_equal_features_computed_directly(
    family: str, pooling: str, tiny_bert: Path, tiny_llama: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model({"bert": tiny_bert, "llama": tiny_llama}[family], lora={"layers": 2}, pooling=pooling)
    model.load(random_adapter(model))  # features are the frozen model's whatever the adapter is
    ids, mask = encoded(model)
    direct = model.prefix(ids, mask, Cut(None))
    by_layer = model.features(model.prefix(ids, mask, model.layer_cut), mask, model.layer_cut)
    torch.testing.assert_close(by_layer, direct, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_rows_logits(tiny_bert: Path, adapted_model: Load, random_adapter: Draw) -> None:
    model = adapted_model(tiny_bert)
    model.load(random_adapter(model))
    ids, mask = encoded(model, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.top(ids[:2, :16], mask[:2, :16], INPUT), model.top(ids, mask, INPUT)[:2], atol=1e-5, rtol=1e-5
        )


def test_the_head_alone_is_cut_after_pooling_as_long_as_every_b_is_zero(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    head = model.trained_in(phase(train=("head",)), 1)
    both = model.trained_in(phase(train=("head", "lora")), 1)
    start = model.initial_state(0, orthonormal=True)
    assert model.cut_for(head, start) == Cut(None)
    assert model.cut_for(both, start) == Cut(2)
    assert model.cut_for(head, random_adapter(model)) == Cut(2)
    stock = adapted_model(tiny_bert, pooling="model")
    assert stock.cut_for(stock.trained_in(phase(train=("head",)), 1), start) == INPUT


def test_logits_after_pooling_equal_the_full_forward_pass_while_b_is_zero(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    model.load(model.initial_state(0, orthonormal=True))
    torch.testing.assert_close(logits_of(model, Cut(None)), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["granite-embeddings", "granite-logits", "qwen2-with-sliding-layers"])
def test_a_family_that_cannot_be_cut_exactly_is_run_whole(
    family: str, tiny_llama: Path, tmp_path: Path, adapted_model: Load
) -> None:
    """Granite scales embeddings and logits; in a hybrid Qwen the kind of attention depends on a layer's own index."""
    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    if family.startswith("granite"):
        scale = {"embedding_multiplier": 3.0} if family == "granite-embeddings" else {"logits_scaling": 4.0}
        GraniteForCausalLM(GraniteConfig(**shape, **scale)).save_pretrained(tmp_path)
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Qwen2Config(**shape, use_sliding_window=True, sliding_window=4, layer_types=kinds)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    model = adapted_model(tmp_path, lora={"layers": 2}, **CAUSAL)
    model.load(model.initial_state(0, orthonormal=True))
    assert model.layer_cut == INPUT
    ids, mask = encoded(model)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(model), stock, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs_from_every_cut(tiny_bert: Path, adapted_model: Load, random_adapter: Draw) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2}, dtype="bfloat16")
    model.load(random_adapter(model))
    assert all(p.dtype == torch.float32 for p in model._parameters.values())
    torch.testing.assert_close(logits_of(model, model.layer_cut), logits_of(model), atol=0, rtol=0)
    ids, mask = encoded(model)
    with torch.no_grad():
        assert model.top(model.prefix(ids, mask, Cut(None)), mask, Cut(None)).isfinite().all()


# ---- as the stock classes -------------------------------------------------------------------------------------------


def with_stock_head(model: AdaptedModel, stock: Any) -> AdapterState:
    """The adapter before round 1 with the head of a stock model."""
    state = model.initial_state(0, orthonormal=True)
    weights = stock.state_dict()
    for name in state:
        if model.group_of(name) == "head":
            state[name] = weights[name.removeprefix("base_model.model.")].numpy()
    return state


@pytest.mark.parametrize(("family", "pooling"), [("bert", "model"), ("llama", "last")])
def test_with_b_zero_the_logits_are_those_of_the_stock_classifier(
    family: str, pooling: str, tiny_bert: Path, tiny_llama: Path, adapted_model: Load
) -> None:
    folder = {"bert": tiny_bert, "llama": tiny_llama}[family]
    model = adapted_model(folder, pooling=pooling)
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    stock.config.pad_token_id = model.base.tokenizer.pad_token_id
    model.load(with_stock_head(model, stock))
    ids, mask = encoded(model)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model), stock(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_with_b_zero_the_logits_are_those_of_the_stock_language_model(tiny_llama: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_llama, **CAUSAL)
    model.load(model.initial_state(0, orthonormal=True))
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids, mask = encoded(model)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model), stock(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_the_adapter_adds_alpha_over_r_times_ba(tiny_bert: Path, adapted_model: Load, random_adapter: Draw) -> None:
    """Against a stock BERT whose weights have alpha/r·BA, or alpha/√r·BA with rsLoRA, added by hand."""
    for rslora, factor in ((False, 6.0 / 4), (True, 6.0 / 2)):
        model = adapted_model(tiny_bert, lora={"r": 4, "alpha": 6.0, "use_rslora": rslora}, pooling="model")
        state = random_adapter(model)
        model.load(state)
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
        weights = stock.state_dict()
        for name in state:
            if model.group_of(name) == "head":
                weights[name.removeprefix("base_model.model.")].copy_(torch.from_numpy(state[name]))
            elif model.group_of(name) == "B":
                change = factor * state[name] @ state[name.replace("lora_B", "lora_A")]
                target = name.removeprefix("base_model.model.").replace(".lora_B", "")
                weights[target].add_(torch.from_numpy(change))
        ids, mask = encoded(model)
        with torch.no_grad():
            expected = stock(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


# ---- the saved folder -----------------------------------------------------------------------------------------------


def saved(model: AdaptedModel, state: AdapterState, folder: Path) -> Path:
    save_adapter(folder, state, model.peft_config(), {"task": "test"})
    return folder


@pytest.mark.parametrize(("family", "pooling"), [("bert", "model"), ("llama", "last")])
def test_peft_loads_a_saved_classifier_onto_the_stock_model_and_gives_the_same_logits(
    family: str,
    pooling: str,
    tiny_bert: Path,
    tiny_llama: Path,
    tmp_path: Path,
    adapted_model: Load,
    random_adapter: Draw,
) -> None:
    folder = {"bert": tiny_bert, "llama": tiny_llama}[family]
    model = adapted_model(folder, lora={"layers": 2, "alpha": 5.0}, pooling=pooling)
    state = random_adapter(model, 1)
    model.load(state)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    stock.config.pad_token_id = model.base.tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(stock, str(saved(model, state, tmp_path / "adapter"))).eval()
    ids, mask = encoded(model)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model), loaded(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_peft_loads_a_saved_mean_pooled_classifier_and_its_head_on_mean_states_gives_the_same_logits(
    tiny_bert: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    assert model.base.pooling == "mean"
    state = random_adapter(model, 1)
    model.load(state)
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    loaded = PeftModel.from_pretrained(stock, str(saved(model, state, tmp_path / "adapter"))).eval()
    ids, mask = encoded(model)
    with torch.no_grad():
        states = loaded.base_model.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = torch.stack([row[: int(valid.sum())].mean(dim=0) for row, valid in zip(states, mask, strict=True)])
        torch.testing.assert_close(logits_of(model), loaded.base_model.model.classifier(mean), atol=1e-5, rtol=1e-5)


def test_peft_loads_a_saved_language_model_adapter_and_gives_the_same_logits(
    tiny_llama: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_llama, **CAUSAL)
    state = random_adapter(model, 1)
    model.load(state)
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = PeftModel.from_pretrained(stock, str(saved(model, state, tmp_path / "adapter"))).eval()
    ids, mask = encoded(model)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model), loaded(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
        )


def test_the_saved_folder_names_no_path_and_holds_exactly_the_adapters_tensors(
    tiny_bert: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    folder = saved(model, random_adapter(model), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 16.0, "SEQ_CLS")
    assert set(config["target_modules"]) == {"query", "value"}
    assert str(tiny_bert) not in (folder / "adapter_config.json").read_text()
    assert set(load_file(folder / "adapter_model.safetensors")) == set(model.spec.names)


# ---- models that do not fit the settings ----------------------------------------------------------------------------


def test_a_missing_target_module_names_the_nearest(tiny_bert: Path, adapted_model: Load) -> None:
    with pytest.raises(ModelError, match=r"no linear module 'qery' \(did you mean 'query'\?\)"):
        adapted_model(tiny_bert, lora={"target_modules": ("qery",)})


def test_more_adapted_layers_than_the_model_has_are_refused(tiny_bert: Path, adapted_model: Load) -> None:
    with pytest.raises(ModelError, match=r"lora\.layers = 9: the model has only 4 layers"):
        adapted_model(tiny_bert, lora={"layers": 9})


def test_a_rank_above_the_width_is_refused_where_a_must_be_orthonormal(tiny_bert: Path, adapted_model: Load) -> None:
    with pytest.raises(AdapterError, match=r"lora\.r = 33 exceeds the input width 32"):
        adapted_model(tiny_bert, lora={"r": 33}).initial_state(0, orthonormal=True)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_head_of_several_modules_takes_only_the_stock_pooling(
    family: str, tiny_bert: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    network: PreTrainedModel
    if family == "roberta":
        network = RobertaModel(
            RobertaConfig(
                vocab_size=246,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=130,
                pad_token_id=0,
            )
        )
    else:
        sizes = {"vocab_size": 246, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        network = DistilBertModel(DistilBertConfig(**sizes, max_position_embeddings=128))
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"task\.pooling = 'mean'.*task\.pooling = 'model'"):
        adapted_model(tmp_path, pooling="mean")
    model = adapted_model(tmp_path)
    assert model.base.pooling == "model"
    model.load(random_adapter(model))
    assert logits_of(model).shape == (3, 3)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
        ),
        "c_attn",
    ),
    "gpt-neox": (
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=300,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=256,
            )
        ),
        "query_key_value",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_have_defaults_and_compute_what_their_stock_classes_compute(
    family: str, tiny_llama: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    make, target = FAMILIES[family]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    model = adapted_model(tmp_path, lora={"layers": 2}, **CAUSAL)
    assert {name.split(".")[-3] for name in model.spec.names} == {target}
    state = random_adapter(model)
    model.load(state)
    torch.testing.assert_close(logits_of(model, model.layer_cut), logits_of(model), atol=1e-5, rtol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock, str(saved(model, state, tmp_path / "adapter"))).eval()
    ids, mask = encoded(model)
    with torch.no_grad():
        expected = loaded(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_defaults_is_answered_with_its_linear_modules(
    tiny_bert: Path, adapted_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.targets.ATTENTION_DEFAULTS", (("nowhere",),))
    with pytest.raises(ModelError, match=r"lora\.target_modules: no default for this model; name some of dense, key"):
        adapted_model(tiny_bert)


def test_top_layers_cannot_be_chosen_where_all_layers_are_one(
    tiny_bert: Path, tmp_path: Path, adapted_model: Load
) -> None:
    shape = {"vocab_size": 246, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4}
    AlbertModel(AlbertConfig(**shape, intermediate_size=64, num_hidden_layers=3)).save_pretrained(tmp_path)
    for file in tiny_bert.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ModelError, match=r"lora\.layers: this model has no plain stack of layers to choose from"):
        adapted_model(tmp_path, lora={"layers": 2})
    assert adapted_model(tmp_path).layer_cut == INPUT


def test_the_stock_pooling_is_never_cut(tiny_bert: Path, adapted_model: Load) -> None:
    assert adapted_model(tiny_bert, lora={"layers": 2}, pooling="model").layer_cut == INPUT


def test_a_shallow_bert_has_no_prefix_when_all_layers_are_adapted(
    tiny_bert: Path, tmp_path: Path, adapted_model: Load
) -> None:
    shape = {"vocab_size": 246, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**shape, num_hidden_layers=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    assert adapted_model(tmp_path, lora={"layers": 1}).layer_cut == INPUT
