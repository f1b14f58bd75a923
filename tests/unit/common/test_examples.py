"""Physical batches: always of one shape, padded by dummies, and the same from the cache as without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.cuts import INPUT, Cut
from common.examples import BUCKETS, FEATURE_ROWS, Batch, Examples
from common.tasks.base import Encoded

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

SHORT = "child with mild cough"
LONG = "man with severe bleeding " * 6
LABELS = {SHORT: 0, LONG: 1}


def examples_of(model: AdaptedModel, texts: list[str], **options: Any) -> Examples:
    """Encoded texts; an empty one becomes a void row."""
    rows = {"text": texts, "label": [LABELS.get(text, 2) for text in texts]}
    encoded, _ = model.task.encode(rows, model.base.tokenizer)
    return Examples(encoded, model.task, **options)


def batches(examples: Examples, model: AdaptedModel, cut: Cut, rows: int = 4, chosen: Any = None) -> list[Batch]:
    indices = np.arange(len(examples)) if chosen is None else np.asarray(chosen)
    return list(examples.batches(indices, rows, model, cut))


def logits_by_index(examples: Examples, model: AdaptedModel, cut: Cut, rows: int = 4) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        return {
            int(index): logits
            for batch in batches(examples, model, cut, rows)
            for index, logits in zip(batch.indices, model.top(batch.inputs, batch.mask, cut), strict=False)
        }


@pytest.fixture(scope="module")
def model(tiny_bert: Path, adapted_model: Load) -> AdaptedModel:
    return adapted_model(tiny_bert, lora={"layers": 2}, max_length=96)


def test_a_bucket_depends_on_the_examples_own_length_alone(model: AdaptedModel) -> None:
    def buckets(*lengths: int) -> list[int]:
        rows = [Encoded(np.ones(length, np.int32), np.int64(0)) for length in lengths]  # type: ignore[arg-type]
        return Examples(rows, model.task).bucket.tolist()

    lengths = (1, 16, 17, 32, 33, 48, 49, 64, 65, 96)
    assert buckets(*lengths) == [16, 16, 32, 32, 48, 48, 64, 64, 96, 96]
    assert [buckets(length)[0] for length in lengths] == buckets(*lengths)


def test_no_batch_is_longer_than_max_length(tiny_bert: Path, adapted_model: Load) -> None:
    """A model has no positions beyond it: 100 lies between two buckets, and the tiny BERT has 128 positions."""
    assert 100 not in BUCKETS
    model = adapted_model(tiny_bert, max_length=100)
    examples = examples_of(model, [LONG * 9, SHORT])
    assert examples.bucket.tolist() == [100, 16]
    assert examples.encoded[0] is not None and len(examples.encoded[0].ids) == 100
    assert len(logits_by_index(examples, model, INPUT)) == 2


def test_every_batch_has_the_same_number_of_rows_and_dummies_fill_it_up(model: AdaptedModel) -> None:
    examples = examples_of(model, [SHORT] * 5 + [LONG] * 2)
    got = batches(examples, model, INPUT)
    assert [tuple(batch.inputs.shape) for batch in got] == [(4, 16), (4, 16), (4, 32)]
    assert [batch.indices.tolist() for batch in got] == [[0, 1, 2, 3], [4], [5, 6]]
    assert [batch.weights.tolist() for batch in got] == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert [batch.targets.tolist() for batch in got] == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    pad = model.base.tokenizer.pad_token_id
    for batch in got:
        assert batch.weights.dtype == torch.float32
        for row in range(len(batch.indices), 4):  # attention over nothing would be NaN: one pad token is attended to
            assert batch.mask[row].tolist() == [1] + [0] * (batch.mask.shape[1] - 1)
            assert (batch.inputs[row] == pad).all()


def test_only_the_chosen_examples_are_batched_and_none_is_none(model: AdaptedModel) -> None:
    examples = examples_of(model, [SHORT, LONG, SHORT, LONG])
    got = batches(examples, model, INPUT, chosen=[3, 2, 0])
    assert [batch.indices.tolist() for batch in got] == [[2, 0], [3]]
    for cut in (INPUT, model.layer_cut, Cut(None)):
        assert batches(examples, model, cut, chosen=np.array([], np.int64)) == []


def test_no_examples_at_all_make_no_batches(model: AdaptedModel) -> None:
    assert len(Examples([], model.task)) == 0
    for cut in (INPUT, model.layer_cut, Cut(None)):
        assert batches(Examples([], model.task), model, cut) == []


@pytest.mark.parametrize("kind", ["input", "layer", "features"])
def test_a_void_row_keeps_its_place_and_has_weight_zero(model: AdaptedModel, kind: str) -> None:
    cut = {"input": INPUT, "layer": model.layer_cut, "features": Cut(None)}[kind]
    examples = examples_of(model, [SHORT, "", SHORT])
    assert examples.encoded[1] is None
    (batch,) = batches(examples, model, cut)
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.weights[:4].tolist() == [1, 0, 1, 0]
    with torch.no_grad():
        assert model.top(batch.inputs, batch.mask, cut).isfinite().all()


def test_a_rows_result_does_not_depend_on_the_other_rows_at_all(model: AdaptedModel, random_adapter: Draw) -> None:
    """Bit for bit, at a fixed shape: alone among dummies, beside a void row, or in a full batch."""
    model.load(random_adapter(model))
    with torch.no_grad():
        for cut in (INPUT, model.layer_cut):
            alone = examples_of(model, [SHORT])
            (batch,) = batches(alone, model, cut)
            expected = model.top(batch.inputs, batch.mask, cut)[0]
            for others in (["woman with sore throat"] * 3, ["", "", ""], ["visitor with small rash today"]):
                (batch,) = batches(examples_of(model, [SHORT, *others]), model, cut)
                assert torch.equal(model.top(batch.inputs, batch.mask, cut)[0], expected)


@pytest.mark.parametrize("family", ["bert", "llama", "causal-lm"])
def test_a_cached_prefix_gives_the_same_logits_as_one_computed_anew_and_as_none(
    family: str, tiny_bert: Path, tiny_llama: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    if family == "causal-lm":
        model = adapted_model(tiny_llama, lora={"layers": 1}, name="causal-lm", labels=())
        rows = {"prompt": [SHORT, LONG, "", SHORT], "completion": [LONG, SHORT, SHORT, "yes"]}
        encoded, _ = model.task.encode(rows, model.base.tokenizer)
    else:
        model = adapted_model({"bert": tiny_bert, "llama": tiny_llama}[family], lora={"layers": 1})
        encoded = examples_of(model, [SHORT, LONG, "", SHORT]).encoded
    model.load(random_adapter(model))
    cached, anew = Examples(encoded, model.task), Examples(encoded, model.task, cache_limit=0)
    whole = logits_by_index(cached, model, INPUT)
    for examples in (cached, anew):
        cut = logits_by_index(examples, model, model.layer_cut)
        assert cut.keys() == whole.keys() == {0, 1, 2, 3}
        for index in (0, 1, 3):
            length = len(encoded[index].ids) if family == "causal-lm" else 1
            rows_of = (slice(0, length),) if family == "causal-lm" else ()
            torch.testing.assert_close(cut[index][rows_of], whole[index][rows_of], atol=1e-5, rtol=1e-5)


def test_cached_features_give_the_same_logits_as_the_whole_model(model: AdaptedModel, random_adapter: Draw) -> None:
    state = {
        name: array if model.group_of(name) != "B" else np.zeros_like(array)
        for name, array in random_adapter(model).items()
    }
    model.load(state)
    texts = [SHORT, LONG, "", SHORT] * 3
    examples = examples_of(model, texts)
    by_features, whole = logits_by_index(examples, model, Cut(None)), logits_by_index(examples, model, INPUT)
    for index in (i for i, text in enumerate(texts) if text):
        torch.testing.assert_close(by_features[index], whole[index], atol=1e-5, rtol=1e-5)


def test_features_come_in_one_shape_whatever_the_lengths(model: AdaptedModel) -> None:
    examples = examples_of(model, [SHORT, LONG] * 130)
    got = batches(examples, model, Cut(None), rows=4)
    assert [tuple(batch.inputs.shape) for batch in got] == [(FEATURE_ROWS, 32)] * 2
    assert [len(batch.indices) for batch in got] == [256, 4]
    assert got[1].weights.sum() == 4


def test_the_frozen_part_runs_once_per_example_however_often_batches_are_asked_for(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    examples = examples_of(model, [SHORT, LONG] * 4)
    batches(examples, model, model.layer_cut)
    calls: list[int] = []
    bottom, top = model.base.encoder.encoder.layer[0], model.base.encoder.encoder.layer[3]  # type: ignore[union-attr, index]
    bottom.register_forward_hook(lambda *_: calls.append(0))
    top.register_forward_hook(lambda *_: calls.append(3))
    for seed in range(3):
        model.load(random_adapter(model, seed))
        batches(examples, model, model.layer_cut)
    assert calls == []
    batches(examples, model, Cut(None))  # features start from the cached layer, not from the tokens
    assert calls == [3, 3]
    batches(examples, model, Cut(None))
    assert calls == [3, 3]


def test_a_cache_is_kept_apart_by_cut(model: AdaptedModel) -> None:
    examples = examples_of(model, [SHORT, LONG])
    shapes = [tuple(batches(examples, model, cut)[0].inputs.shape) for cut in (Cut(1), Cut(2), Cut(None), Cut(1))]
    assert shapes == [(4, 16, 32), (4, 16, 32), (FEATURE_ROWS, 32), (4, 16, 32)]
    first, second = (batches(examples, model, cut)[0].inputs for cut in (Cut(1), Cut(2)))
    assert not torch.equal(first, second)


def test_a_bfloat16_model_takes_its_cached_prefix_in_bfloat16(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2}, dtype="bfloat16")
    model.load(random_adapter(model))
    encoded = examples_of(model, [SHORT, LONG]).encoded
    cached = logits_by_index(Examples(encoded, model.task), model, model.layer_cut)
    anew = logits_by_index(Examples(encoded, model.task, cache_limit=0), model, model.layer_cut)
    assert all(torch.equal(cached[index], anew[index]) for index in (0, 1))
