"""Sites of different rank (flexlora) and adapters of a higher one (fedex), through whole simulated runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from stopped_runs import Stopped, StopsAfter
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.adapter import rank_of
from common.config import RunConfig
from common.errors import ConfigError
from common.model import pool
from common.toml_settings import validate
from server.predict import predict
from simulations.simulate import simulate

LABELS = ("urgent", "routine", "review")
SITES = ["north", "south", "west"]


@pytest.fixture
def settings(tiny_bert: Path, triage_data: Path) -> dict[str, Any]:
    """Three sites without noise; LoRA of rank 8 and the head in the top two layers."""
    return {
        "model": {"name": str(tiny_bert)},
        "task": {"name": "sequence-classification", "labels": LABELS, "max_length": 32},
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"r": 8, "alpha": 12.0, "layers": 2},
        "privacy": {"mechanism": "none"},
        "evaluation": {"metric": "loss"},
        "phase": [
            {
                "name": "lora",
                "rounds": 3,
                "steps": 3,
                "sample_rate": 1.0,
                "train": ["lora", "head"],
                "algorithm": "flexlora",
                "learning_rate": 0.1,
            }
        ],
    }


def with_phase(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, "phase": [{**settings["phase"][0], **changes}]}


def run(settings: Mapping[str, Any], out: Path, resume: bool = False, stop_after: int | None = None) -> dict[str, Any]:
    """The summary of a run."""

    @contextmanager
    def watch(title: str, rounds: int) -> Iterator[StopsAfter]:
        yield StopsAfter(stop_after)

    return simulate(validate(RunConfig, dict(settings), "test"), out, resume, watch)


def adapter_of(out: Path) -> dict[str, np.ndarray]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


# ---- flexlora: sites of different rank ------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_sites_of_rank_8_4_and_2_train_one_adapter_of_rank_8(
    settings: dict[str, Any], tmp_path: Path, mechanism: str
) -> None:
    settings["privacy"] = {"mechanism": mechanism}
    equal = run(settings, tmp_path / "equal")
    unequal = run({**settings, "simulation": {"ranks": [8, 4, 2]}}, tmp_path / "unequal")
    assert rank_of(adapter_of(tmp_path / "unequal")) == 8
    saved = 4 * (3 * 8 - 8 - 4 - 2) * 2 * 2 * (32 + 32)  # fp32; two layers × (query, value) × (A, B)
    for record, other in zip(unequal["rounds"][1:], equal["rounds"][1:], strict=True):
        assert record["admitted"] == SITES
        assert other["bytes_up"] - record["bytes_up"] == saved
        if record["round"] > 1:  # before that a site makes the adapter of the public seed
            assert other["bytes_down"] - record["bytes_down"] == saved
    epsilons = [entry["privacy"]["epsilon"] for entry in unequal["sites"].values()]
    assert epsilons == [entry["privacy"]["epsilon"] for entry in equal["sites"].values()]
    assert unequal["best_round"] > 0 and unequal["validation"]["loss"] < unequal["base"]["loss"] - 0.1


def test_a_site_that_allows_more_than_the_plans_rank_takes_the_plans(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path / "plan")
    run({**settings, "simulation": {"ranks": [8, 64]}}, tmp_path / "more")
    for name, array in adapter_of(tmp_path / "plan").items():
        assert np.array_equal(array, adapter_of(tmp_path / "more")[name])


def test_ranks_are_dealt_out_in_the_order_of_the_sites_names(settings: dict[str, Any], tmp_path: Path) -> None:
    run({**settings, "simulation": {"ranks": [8, 2]}}, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "sites.json").read_text())
    assert {site: one["max_rank"] for site, one in described.items()} == {"north": 8, "south": 2, "west": 8}


def test_an_interrupted_run_of_unequal_ranks_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["simulation"] = {"ranks": [8, 4, 2]}
    run(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(settings, tmp_path / "resumed", stop_after=2)
    run(settings, tmp_path / "resumed", resume=True)
    resumed = adapter_of(tmp_path / "resumed")
    assert all(np.array_equal(resumed[name], array) for name, array in adapter_of(tmp_path / "whole").items())


def test_ranks_below_the_plans_are_refused_where_an_algorithm_needs_one_rank(settings: dict[str, Any]) -> None:
    unequal = {**with_phase(settings, algorithm="ffa"), "simulation": {"ranks": [8, 4]}}
    with pytest.raises(ConfigError, match=r"simulation\.ranks: a site of rank 4 refuses phase 'lora'.*'ffa'.*flexlora"):
        validate(RunConfig, unequal, "test")


# ---- fedex: an adapter of a higher rank -----------------------------------------------------------------------------


def test_the_corrected_adapter_is_evaluated_exported_and_used_alike(
    settings: dict[str, Any], tmp_path: Path, tiny_bert: Path, triage_data: Path
) -> None:
    """What the summary says of the test split, what ``predict`` answers, and what plain PEFT computes."""
    out = tmp_path / "out"
    summary = run(with_phase(settings, algorithm="fedex"), out)
    assert summary["best_round"] > 0
    state, card = adapter_of(out), json.loads((out / "adapter" / "consilium.json").read_text())
    assert rank_of(state) == card["lora"]["r"] == 24  # three sites of rank 8
    assert card["lora"]["alpha"] / 24 == pytest.approx(12.0 / 8)

    answers = list(predict(out / "adapter", triage_data / "test.csv", {}))
    rows = [line.rsplit(",", 2) for line in (triage_data / "test.csv").read_text().splitlines()[1:]]
    correct = [answer["label"] == label for answer, (_, label, _) in zip(answers, rows, strict=True)]
    assert np.mean(correct) == pytest.approx(summary["test"]["accuracy"])
    losses = [-np.log(answer["probabilities"][label]) for answer, (_, label, _) in zip(answers, rows, strict=True)]
    assert np.mean(losses) == pytest.approx(summary["test"]["loss"], abs=1e-5)

    texts = [text for text, _, _ in rows]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=len(LABELS))
    plain = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    batch = AutoTokenizer.from_pretrained(tiny_bert)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = plain.base_model.model.bert(**batch).last_hidden_state
        logits = plain.base_model.model.classifier(pool(states, batch["attention_mask"], "mean"))
    for answer, row in zip(answers, logits.softmax(-1).tolist(), strict=True):
        assert [answer["probabilities"][label] for label in LABELS] == pytest.approx(row, abs=1e-5)


def test_the_sites_train_as_in_fedit_and_only_the_result_differs(settings: dict[str, Any], tmp_path: Path) -> None:
    fedex = run(with_phase(settings, algorithm="fedex"), tmp_path / "fedex")
    fedit = run(with_phase(settings, algorithm="fedit"), tmp_path / "fedit")
    for key in ("bytes_down", "bytes_up"):
        assert [record[key] for record in fedex["rounds"][1:]] == [record[key] for record in fedit["rounds"][1:]]
    assert fedex["rounds"][1]["metrics"]["loss"] != fedit["rounds"][1]["metrics"]["loss"]
    kept, plain = (load_file(tmp_path / name / "checkpoint" / "3" / "state.safetensors") for name in ("fedex", "fedit"))
    for name in plain:
        if name.startswith("aggregator/adapter/"):
            np.testing.assert_allclose(kept[name], plain[name], atol=1e-5)


def test_the_best_rounds_correction_outlives_later_rounds_and_an_interruption(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A step so long that later rounds are worse; the run is stopped between the best round and the last."""
    settings = with_phase(settings, algorithm="fedex", learning_rate=0.3, rounds=5)
    whole = run(settings, tmp_path / "whole")
    assert 0 < whole["best_round"] < 5
    with pytest.raises(Stopped):
        run(settings, tmp_path / "resumed", stop_after=whole["best_round"])
    resumed = run(settings, tmp_path / "resumed", resume=True)
    assert resumed["best_round"] == whole["best_round"] and resumed["test"] == whole["test"]
    adapter = adapter_of(tmp_path / "resumed")
    assert rank_of(adapter) == 24
    assert all(np.array_equal(adapter[name], array) for name, array in adapter_of(tmp_path / "whole").items())


@pytest.mark.parametrize("algorithm", ["fedex", "flexlora"])
def test_settings_that_make_no_mean_of_products_are_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, algorithm: str
) -> None:
    with pytest.raises(ConfigError, match=r"phase\.lora\.server_momentum = 0\.9"):
        run(with_phase(settings, algorithm=algorithm, server_momentum=0.9), tmp_path / "out")
    assert not (tmp_path / "out").exists()
