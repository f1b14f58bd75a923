"""Evaluation at the server: the metrics are those of the stock model's predictions, and frozen work is done once."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModelForCausalLM

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.data import read as reading
from common.data.read import read_rows
from common.errors import ConfigError, DataError
from server import evaluation
from server.evaluation import Evaluator, held_out

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

LABELS = ("urgent", "routine", "review")
COLUMNS: dict[str, str] = {}


def evaluator(model: AdaptedModel, source: Path, **settings: Any) -> Evaluator:
    splits = {split: held_out(model, str(source), split, COLUMNS, None) for split in ("validation", "test")}
    return Evaluator(model, splits, **settings)


def with_b_zero(model: AdaptedModel, state: AdapterState) -> AdapterState:
    return {name: np.zeros_like(array) if model.group_of(name) == "B" else array for name, array in state.items()}


def predictions(model: AdaptedModel, source: Path, split: str) -> tuple[list[int], np.ndarray]:
    """Labels and probabilities [n, 3], text by text through the model's own forward pass and pooling by hand."""
    rows = read_rows(str(source), split, ("text", "label"), {})
    chances = []
    network: Any = model.network
    with torch.no_grad():
        for text in rows["text"]:
            states = network.bert(**model.base.tokenizer(text, return_tensors="pt")).last_hidden_state
            logits = network.classifier(states.mean(dim=1))
            chances.append(torch.softmax(logits.double(), dim=1)[0].numpy())
    return [LABELS.index(label) for label in rows["label"]], np.stack(chances)


@pytest.fixture(scope="module")
def qa_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    rows = [("why do i cough?", "you have a cold."), ("what is a rash?", "a sign on the skin"), ("fever?", "rest")]
    for split in ("validation", "test"):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt", "completion"), *rows])
    return folder


# ---- classification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_zero", [True, False], ids=["from-features", "from-a-layer"])
def test_metrics_are_those_of_scikit_learn_on_the_same_predictions(
    b_zero: bool, tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    state = random_adapter(model, 4)
    state = with_b_zero(model, state) if b_zero else state
    subject = evaluator(model, triage_data)
    for split in ("validation", "test"):
        metrics = subject.evaluate(state, split)
        labels, chances = predictions(model, triage_data, split)
        predicted = chances.argmax(axis=1)
        assert metrics == {
            "loss": pytest.approx(log_loss(labels, chances, labels=[0, 1, 2]), rel=1e-5),
            "accuracy": pytest.approx(accuracy_score(labels, predicted)),
            "macro_f1": pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0)),
            "examples": 30.0,
        }


def test_which_rows_are_right_is_told_in_the_splits_order_and_adds_up_to_the_accuracy(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    state, subject = random_adapter(model, 4), evaluator(model, triage_data)
    right = subject.right(subject.scores(state, "test"))
    labels, chances = predictions(model, triage_data, "test")
    assert right == [label == guess for label, guess in zip(labels, chances.argmax(axis=1), strict=True)]
    assert right is not None and 0 < sum(right) < 30
    assert sum(right) / 30 == pytest.approx(subject.evaluate(state, "test")["accuracy"])


def test_the_same_adapter_gives_bitwise_the_same_metrics_again(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    subject = evaluator(model, triage_data)
    first, other = random_adapter(model, 1), random_adapter(model, 2)
    once = subject.evaluate(first, "validation")
    subject.evaluate(other, "validation")
    assert subject.evaluate(first, "validation") == once
    assert subject.evaluate(other, "validation") != once


def test_the_frozen_part_of_each_split_runs_once_for_all_evaluations(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    subject = evaluator(model, triage_data)
    layers: Any = model.base.encoder
    calls: dict[int, int] = {}

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[index] = calls.get(index, 0) + 1

        return hook

    model.layer_cut  # noqa: B018  # the check that the model can be cut runs the layers too
    for index in (0, 3):
        layers.encoder.layer[index].register_forward_hook(count(index))
    heads_only = with_b_zero(model, random_adapter(model, 1))
    for seed in range(3):
        head = with_b_zero(model, random_adapter(model, seed))
        subject.evaluate(head, "validation")
    assert calls == {0: 1, 3: 1}  # 30 short texts are one batch
    for seed in range(3):
        subject.evaluate(random_adapter(model, seed), "validation")
    assert calls == {0: 1, 3: 4}
    subject.evaluate(heads_only, "test")
    assert calls == {0: 2, 3: 5}


def test_a_metric_this_task_does_not_have_is_refused_before_anything_is_evaluated(
    tiny_bert: Path, tiny_llama: Path, adapted_model: Load
) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.metric = 'f1': .* \(known: accuracy, loss, macro_f1\)"):
        Evaluator(adapted_model(tiny_bert), {}, "f1")
    language_model = adapted_model(tiny_llama, name="causal-lm", labels=())
    with pytest.raises(ConfigError, match=r"evaluation\.metric = 'rouge_l': .* \(known: loss, perplexity\)"):
        Evaluator(language_model, {}, "rouge_l", generate=0)


# ---- language models ------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_stock_models_own_loss_and_rouge_is_of_the_first_examples(
    tiny_llama: Path, qa_data: Path, adapted_model: Load
) -> None:
    model = adapted_model(tiny_llama, name="causal-lm", labels=(), prompt_template="Q: {prompt}\nA: ", max_length=96)
    subject = evaluator(model, qa_data, generate=2)
    metrics = subject.evaluate(model.initial_state(0, orthonormal=True), "validation")
    stock: Any = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    total, tokens = 0.0, 0
    for item in subject.splits["validation"].examples.encoded:
        assert item is not None
        labels = torch.from_numpy(item.target).unsqueeze(0)
        with torch.no_grad():
            loss = stock(input_ids=torch.from_numpy(item.ids).long().unsqueeze(0), labels=labels).loss
        learnt = int((labels != -100).sum())
        total, tokens = total + float(loss) * learnt, tokens + learnt
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert 0 <= metrics["rouge_l"] <= 1
    assert subject.right(subject.scores(model.state(), "validation")) is None
    assert "rouge_l" not in evaluator(model, qa_data).evaluate(model.state(), "validation")


# ---- which round is better ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "new", "best", "expected"),
    [
        ("", 0.6, 0.5, True),
        ("", 0.5, 0.5, False),
        ("", 0.4, 0.5, False),
        ("macro_f1", 0.6, 0.5, True),
        ("loss", 0.6, 0.5, False),
        ("loss", 0.4, 0.5, True),
        ("", 0.1, None, True),
        ("", float("nan"), 0.5, False),
        ("", float("nan"), None, False),
        ("", float("nan"), float("nan"), False),
        ("", 0.1, float("nan"), True),
        ("loss", 9.0, float("nan"), True),
    ],
)
def test_better_follows_the_metric_and_nan_never_is(
    metric: str, new: float, best: float | None, expected: bool, tiny_bert: Path, adapted_model: Load
) -> None:
    assert Evaluator(adapted_model(tiny_bert), {}, metric).better(new, best) is expected


def test_a_language_model_is_better_with_less_perplexity_and_more_rouge(tiny_llama: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_llama, name="causal-lm", labels=())
    assert Evaluator(model, {}).better(3.0, 4.0)
    assert Evaluator(model, {}, "rouge_l", generate=1).better(0.4, 0.3)


# ---- the server's own data ------------------------------------------------------------------------------------------


def test_a_limit_takes_the_first_examples(tiny_bert: Path, triage_data: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    few, all_of_them = (held_out(model, str(triage_data), "test", COLUMNS, limit) for limit in (7, 1000))
    assert len(few.examples) == 7 and len(all_of_them.examples) == 30
    assert few.rows["text"] == all_of_them.rows["text"][:7]


def test_the_digest_is_of_the_rows_contents(tiny_bert: Path, triage_data: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    test, again, other = (
        held_out(model, str(triage_data), split, COLUMNS, None) for split in ("test", "test", "validation")
    )
    assert test.digest() == again.digest() != other.digest()


def test_data_that_cannot_be_evaluated_is_refused(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, adapted_model: Load
) -> None:
    model = adapted_model(tiny_bert)
    with pytest.raises(DataError, match="no file for split 'dev'"):
        held_out(model, str(triage_data), "dev", COLUMNS, None)
    (tmp_path / "test.csv").write_text("text,label\nrash,unheard-of\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\(test\): 1 rows cannot be learnt from: row 0: label 'unheard-of'"):
        held_out(model, str(tmp_path), "test", COLUMNS, None)


def test_a_test_split_is_optional_in_a_folder_and_always_drawn_from_a_single_file(
    triage_data: Path, tmp_path: Path
) -> None:
    assert evaluation.test_exists(str(triage_data), "test")
    assert not evaluation.test_exists(str(triage_data), "absent")
    assert not evaluation.test_exists(str(tmp_path), "test")
    assert not evaluation.test_exists(str(triage_data), None)
    assert not evaluation.test_exists(str(triage_data), "")
    assert evaluation.test_exists(str(triage_data / "train.csv"), "test")


# ---- site by site ---------------------------------------------------------------------------------------------------


def test_each_sites_metrics_are_those_of_its_own_rows(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    data = held_out(model, str(triage_data), "test", COLUMNS, 20, site_column="hospital")
    subject = Evaluator(model, {"test": data})
    state = random_adapter(model, 4)
    found = subject.by_site(subject.scores(state, "test"), "test")
    labels, chances = predictions(model, triage_data, "test")
    sites = read_rows(str(triage_data), "test", ("hospital",), {})["hospital"]
    assert list(found) == ["north", "south", "west"]
    for site in found:
        own = [row for row in range(20) if sites[row] == site]
        truth, guess = [labels[row] for row in own], chances[own].argmax(axis=1)
        assert found[site] == {
            "loss": pytest.approx(log_loss(truth, chances[own], labels=[0, 1, 2]), rel=1e-5),
            "accuracy": pytest.approx(accuracy_score(truth, guess)),
            "macro_f1": pytest.approx(f1_score(truth, guess, average="macro", zero_division=0)),
            "examples": len(own),
        }
    assert sum(one["examples"] for one in found.values()) == 20


def test_a_split_without_a_site_column_is_evaluated_as_a_whole(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    data = held_out(model, str(triage_data), "test", COLUMNS, None, site_column="clinic")
    subject = Evaluator(model, {"test": data})
    assert subject.by_site(subject.scores(random_adapter(model, 1), "test"), "test") == {}
    assert subject.evaluate(random_adapter(model, 1), "test")["examples"] == 30
    with pytest.raises(DataError, match="no file for split"):
        held_out(model, str(triage_data), "dev", COLUMNS, None, site_column="clinic")


def test_a_split_is_read_once_whether_or_not_its_rows_name_sites(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    table = reading.read_table

    def noted(source: str, split: str) -> Any:
        read.append(split)
        return table(source, split)

    monkeypatch.setattr(reading, "read_table", noted)
    model = adapted_model(tiny_bert)
    sites = [
        held_out(model, str(triage_data), "test", COLUMNS, None, site_column=one).sites
        for one in ("hospital", "clinic")
    ]
    assert read == ["test", "test"] and len(sites[0]) == 30 and sites[1] == ()


def test_rows_that_name_no_site_are_left_out_and_too_many_sites_are_not_told_apart(
    tiny_bert: Path, triage_data: Path, adapted_model: Load, random_adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model(tiny_bert)
    data = held_out(model, str(triage_data), "test", COLUMNS, None, site_column="hospital")
    unnamed = replace(data, sites=tuple("" if site == "west" else site for site in data.sites))
    subject = Evaluator(model, {"test": unnamed})
    scores = subject.scores(random_adapter(model, 1), "test")
    assert list(subject.by_site(scores, "test")) == list(subject.sites("test")) == ["north", "south"]
    monkeypatch.setattr(evaluation, "MOST_SITES", 1)
    assert subject.by_site(scores, "test") == {} and subject.sites("test") == ()


def six_rows(model: AdaptedModel, source: Path, metric: str, sites: tuple[str, ...]) -> Evaluator:
    """Of the first six validation rows, which are like those sites."""
    data = held_out(model, str(source), "validation", COLUMNS, 6)
    return Evaluator(model, {"validation": replace(data, sites=sites)}, metric)


SIX_SITES = ("north", "south", "north", "west", "", "north")
SIX = {
    "predicted": np.array([0, 1, 2, 1, 0, 0]),
    "label": np.array([0, 1, 0, 2, 0, 0]),
    "loss": np.array([0.1, 0.4, 1.4, 3.0, 0.2, 0.5]),
}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", {"north": 0.6667, "south": 1.0, "west": 0.0}),  # 2 of 3, 1 of 1, 0 of 1
        ("loss", {"north": 0.6667, "south": 0.4, "west": 3.0}),  # (0.1 + 1.4 + 0.5) / 3
        ("macro_f1", {"north": 0.4, "south": 1.0, "west": 0.0}),  # north: 2·1·(2/3) / (1 + 2/3) = 0.8, and 0
    ],
)
def test_a_rounds_metric_by_site_is_that_of_the_sites_rows_to_four_digits(
    metric: str, expected: dict[str, float], tiny_bert: Path, triage_data: Path, adapted_model: Load
) -> None:
    subject = six_rows(adapted_model(tiny_bert), triage_data, metric, SIX_SITES)
    assert subject.metric_by_site(SIX, "validation") == expected


def test_more_sites_than_a_record_may_hold_give_none_by_round(
    tiny_bert: Path, triage_data: Path, adapted_model: Load
) -> None:
    most = evaluation.MOST_SITES_BY_ROUND
    model = adapted_model(tiny_bert)
    for sites, told in ((most, most), (most + 1, 0)):
        names = tuple(f"site-{number:03d}" for number in range(sites))
        subject = six_rows(model, triage_data, "accuracy", names)
        scores = {key: np.tile(values, 9)[:sites] for key, values in SIX.items()}
        assert len(subject.metric_by_site(scores, "validation")) == told
        assert len(subject.by_site(scores, "validation")) == sites  # at the end they are told apart all the same


def test_what_a_round_records_is_measured_in_one_pass_and_its_sites_add_up_to_the_metric(
    tiny_bert: Path,
    triage_data: Path,
    adapted_model: Load,
    random_adapter: Draw,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 2})
    state = random_adapter(model, 4)
    splits = {
        split: held_out(model, str(triage_data), split, COLUMNS, None, site_column=column)
        for split, column in (("validation", "hospital"), ("test", "clinic"))
    }
    subject = Evaluator(model, splits)
    plain = {split: subject.evaluate(state, split) for split in splits}
    passes: list[int] = []
    score = model.task.score

    def counted(logits: torch.Tensor, targets: torch.Tensor) -> Any:
        passes.append(len(targets))
        return score(logits, targets)

    monkeypatch.setattr(model.task, "score", counted)
    found = subject.measured(state, "validation")
    assert sum(passes) == 30 and found["metrics"] == plain["validation"]
    rows = splits["validation"].sites
    assert set(found["by_site"]) == set(rows) == {"north", "south", "west"}
    together = sum(found["by_site"][site] for site in rows) / 30
    assert together == pytest.approx(plain["validation"]["accuracy"], abs=5e-5)
    assert subject.measured(state, "test") == {"metrics": plain["test"]}  # no such column
