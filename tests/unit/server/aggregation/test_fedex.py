"""FedEx-LoRA: FedIT goes on, and what is evaluated and exported is the mean of the sites' own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from common.adapted import AdaptedModel
from common.adapter import AdapterState, rank_of, save_adapter
from common.cuts import INPUT
from common.sections import PhaseSection
from server.aggregation.registry import aggregator_for

State = dict[str, np.ndarray]
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def phase(algorithm: str = "fedex") -> PhaseSection:
    return PhaseSection(name="p", rounds=2, sample_rate=1.0, algorithm=algorithm)


def drawn(seed: int, rows: int = 9, columns: int = 8, rank: int = 2) -> State:
    generator = np.random.default_rng(seed)
    shapes = {A: (rank, columns), B: (rows, rank), "head": (3,)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def product(state: Any) -> np.ndarray:
    return np.asarray(state[B], np.float64) @ np.asarray(state[A], np.float64)


def fold(start: State, updates: list[tuple[State, float]], algorithm: str = "fedex") -> tuple[State, State]:
    """One round: the adapter that goes on, and the one to evaluate and keep."""
    aggregator = aggregator_for(phase(algorithm))
    state = aggregator.init(start)
    for update, weight in updates:
        state = aggregator.accumulate(state, update, weight)
    after, result = aggregator.finish(state)
    kept = {name.removeprefix("adapter/"): array for name, array in aggregator.save(after).items()}
    return kept, result


def test_two_sites_by_hand() -> None:
    """Sites (B, A) = (1, 1) and (3, 2): FedIT has 2 · 1.5 = 3, the exact mean is (1 + 6) / 2 = 3.5.

    In two dimensions there is room for the residual: B = (1, 0)ᵀ and (0, 1)ᵀ with A = (1, 0) and (0, 1) give the mean
    ½·I, of which the means' product has ¼ everywhere and the residual ± ¼.
    """
    zero = {A: np.zeros((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}
    sites = [{B: np.full((1, 1), b, np.float32), A: np.full((1, 1), a, np.float32)} for b, a in ((1, 1), (3, 2))]
    kept, result = fold(zero, [(site, 1.0) for site in sites])
    assert (kept[B].item(), kept[A].item()) == (2.0, 1.5)
    assert product(result).item() == pytest.approx(3.5, abs=1e-6)
    assert rank_of(result) == 1  # there is only one dimension

    zero = {A: np.zeros((1, 2), np.float32), B: np.zeros((2, 1), np.float32)}
    unit = np.eye(2, dtype=np.float32)
    kept, result = fold(zero, [({B: unit[:, [k]], A: unit[[k]]}, 1.0) for k in (0, 1)])
    np.testing.assert_allclose(product(kept), np.full((2, 2), 0.25))
    np.testing.assert_allclose(product(result), 0.5 * np.eye(2), atol=1e-7)
    np.testing.assert_allclose(product(result) - product(kept), [[0.25, -0.25], [-0.25, 0.25]], atol=1e-7)
    assert rank_of(result) == 2


def test_the_result_is_the_weighted_mean_of_the_sites_products() -> None:
    start, weights = drawn(0), (1.0, 4.0, 2.5)
    updates = [drawn(seed) for seed in (1, 2, 3)]
    kept, result = fold(start, list(zip(updates, weights, strict=True)))
    products = [product({name: start[name] + one[name] for name in (A, B)}) for one in updates]
    np.testing.assert_allclose(product(result), np.average(products, 0, weights), atol=2e-6)
    assert rank_of(result) == 6  # three sites of rank 2
    assert np.abs(product(kept) - product(result)).max() > 0.1  # there is something to correct


def test_training_goes_on_as_in_fedit() -> None:
    start, updates = drawn(0), [(drawn(1), 1.0), (drawn(2), 3.0)]
    kept, _ = fold(start, updates)
    fedit, _ = fold(start, updates, "fedit")
    assert kept.keys() == fedit.keys()
    for name in kept:
        np.testing.assert_allclose(kept[name], fedit[name], rtol=1e-6, atol=1e-7)


def test_a_round_of_one_site_has_no_residual_and_keeps_the_rank() -> None:
    kept, result = fold(drawn(0), [(drawn(1), 3.0)])
    assert rank_of(result) == 2
    assert all(np.array_equal(result[name], kept[name]) for name in kept)


def test_a_correction_is_that_rounds_alone() -> None:
    """After a round with a residual, one in which nobody changes anything has none."""
    aggregator = aggregator_for(phase())
    state = aggregator.init(drawn(0))
    for seed in (1, 2):
        state = aggregator.accumulate(state, drawn(seed), 1.0)
    state, corrected = aggregator.finish(state)
    zeros = {name: np.zeros_like(array) for name, array in drawn(0).items()}
    state, result = aggregator.finish(aggregator.accumulate(state, zeros, 1.0))
    assert rank_of(corrected) == 4 and rank_of(result) == 2


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (8, 5)])
def test_the_rank_never_exceeds_the_smaller_side_and_nothing_is_lost(rows: int, columns: int) -> None:
    start = drawn(0, rows, columns)
    updates = [drawn(seed, rows, columns) for seed in range(1, 10)]
    _, result = fold(start, [(one, 1.0) for one in updates])
    assert rank_of(result) == 5
    products = [product({name: start[name] + one[name] for name in (A, B)}) for one in updates]
    np.testing.assert_allclose(product(result), np.mean(products, 0), atol=2e-6)


def test_pairs_of_unequal_need_share_one_rank() -> None:
    """A narrow pair, a wide one, and one that nobody trains."""
    narrow, wide, still = drawn(0, 3, 4), drawn(0), drawn(5)
    named = lambda state, name: {f"{name}.{key}": array for key, array in state.items() if key != "head"}  # noqa: E731
    start = {**named(narrow, "narrow"), **named(wide, "wide"), **named(still, "still")}
    updates = [{**named(drawn(k, 3, 4), "narrow"), **named(drawn(k), "wide")} for k in (1, 2, 3)]
    _, result = fold(start, [(one, 1.0) for one in updates])
    for name, before, size in (("narrow", narrow, (3, 4)), ("wide", wide, (9, 8))):
        pair = {key: result[f"{name}.{key}"] for key in (A, B)}
        assert pair[A].shape[0] == pair[B].shape[1] == 6
        local = [{key: before[key] + drawn(k, *size)[key] for key in (A, B)} for k in (1, 2, 3)]
        np.testing.assert_allclose(product(pair), np.mean([product(one) for one in local], 0), atol=2e-6)
    pair = {key: result[f"still.{key}"] for key in (A, B)}
    np.testing.assert_allclose(product(pair), product(still), atol=1e-6)
    assert pair[A].shape[0] == 6


def test_the_exported_adapter_is_the_mean_of_the_merged_models(
    tiny_bert: Path,
    adapted_model: Callable[..., AdaptedModel],
    random_adapter: Callable[..., AdapterState],
    tmp_path: Path,
) -> None:
    """Logits of the evaluated, of the exported (plain PEFT) and of a stock model whose weights are the fp64 mean."""
    for rslora in (False, True):
        model = adapted_model(tiny_bert, lora={"r": 3, "alpha": 5.0, "use_rslora": rslora}, pooling="model")
        start = random_adapter(model, seed=0)
        updates = [random_adapter(model, seed=seed) for seed in (1, 2, 3)]
        _, result = fold(start, [(update, weight) for update, weight in zip(updates, (1.0, 2.0, 4.0), strict=True)])
        assert rank_of(result) == 9
        model.load(result)
        ids = torch.arange(1, 13).reshape(2, 6)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            evaluated = model.top(ids, mask, INPUT)

        save_adapter(tmp_path / str(rslora), result, model.peft_config(model.lora.at_rank(9)), {"task": "test"})
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        exported = PeftModel.from_pretrained(stock, str(tmp_path / str(rslora))).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(ids, mask).logits, evaluated, atol=1e-5, rtol=1e-5)

        merged = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).double().eval()
        scale = 5.0 / (np.sqrt(3) if rslora else 3)
        weights = merged.state_dict()
        for name in start:
            local = [start[name].astype(np.float64) + update[name] for update in updates]
            plain = name.removeprefix("base_model.model.")
            if ".lora_B." in name:
                down = name.replace("lora_B", "lora_A")
                downs = [start[down].astype(np.float64) + update[down] for update in updates]
                products = [scale * b @ a for b, a in zip(local, downs, strict=True)]
                weights[plain.replace(".lora_B", "")] += torch.from_numpy(np.average(products, 0, (1, 2, 4)))
            elif ".lora_A." not in name:
                weights[plain].copy_(torch.from_numpy(np.average(local, 0, (1, 2, 4))))
        with torch.no_grad():
            torch.testing.assert_close(merged(ids, mask).logits.float(), evaluated, atol=1e-5, rtol=1e-4)
