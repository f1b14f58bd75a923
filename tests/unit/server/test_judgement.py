"""What is said of a finished adapter comes from one pass over the held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from server.evaluation import Evaluator, held_out
from server.judgement import judge
from server.prepare import TEST, Prepared
from server.rounds import VALIDATION, Result

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]
ROWS = 30
"""Of each split."""


@pytest.fixture
def evaluator(tiny_bert: Path, triage_data: Path, adapted_model: Load) -> Evaluator:
    """Of a validation and a test split whose rows name their sites."""
    model = adapted_model(tiny_bert, lora={"layers": 2})
    splits = (VALIDATION, TEST)
    return Evaluator(
        model, {one: held_out(model, str(triage_data), one, {}, None, site_column="hospital") for one in splits}
    )


@pytest.fixture
def base(evaluator: Evaluator, random_adapter: Draw) -> AdapterState:
    return random_adapter(evaluator.model, 1)


@pytest.fixture
def best(evaluator: Evaluator, random_adapter: Draw) -> AdapterState:
    return random_adapter(evaluator.model, 4)


def of(evaluator: Evaluator, base: AdapterState, best: AdapterState) -> tuple[Prepared, Result]:
    """A run that has ended with that adapter."""
    settings: Any = None  # not looked at
    return Prepared(settings, evaluator.model, settings, base, evaluator), Result(best, 1, (), {}, {})


def scored(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each batch that is scored from now on."""
    found: list[int] = []
    score = evaluator.model.task.score

    def counted(logits: Any, targets: Any) -> Any:
        found.append(len(targets))
        return score(logits, targets)

    monkeypatch.setattr(evaluator.model.task, "score", counted)
    return found


def test_base_and_best_adapter_are_scored_once_each_on_the_test_split(
    evaluator: Evaluator, base: AdapterState, best: AdapterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluator.evaluate(best, TEST)
    before = evaluator.by_site(evaluator.scores(base, TEST), TEST)
    rows = scored(evaluator, monkeypatch)
    found = judge(*of(evaluator, base, best))
    assert sum(rows) == 2 * ROWS
    assert (found.split, found.test) == (TEST, expected)
    assert list(found.by_site) == ["north", "south", "west"]
    assert {site: one["base"] for site, one in found.by_site.items()} == before
    assert sum(one["best"]["examples"] for one in found.by_site.values()) == ROWS
    assert sum(one["best"]["accuracy"] * one["best"]["examples"] for one in found.by_site.values()) == pytest.approx(
        expected["accuracy"] * ROWS
    )
    assert found.right is not None and sum(found.right) == pytest.approx(expected["accuracy"] * ROWS)


def test_without_a_site_column_the_base_is_not_scored(
    evaluator: Evaluator, base: AdapterState, best: AdapterState, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {name: replace(split, sites=()) for name, split in evaluator.splits.items()}
    rows = scored(evaluator, monkeypatch)
    found = judge(*of(Evaluator(evaluator.model, whole), base, best))
    assert sum(rows) == ROWS and found.by_site == {} and found.test is not None


def test_without_a_test_split_the_validation_split_tells_rows_and_sites_and_no_test_metrics(
    evaluator: Evaluator, base: AdapterState, best: AdapterState
) -> None:
    alone = Evaluator(evaluator.model, {VALIDATION: evaluator.splits[VALIDATION]})
    found = judge(*of(alone, base, best))
    assert (found.split, found.test) == (VALIDATION, None)
    assert found.right == alone.right(alone.scores(best, VALIDATION))
    assert set(found.by_site) == {"north", "south", "west"}


def test_answers_in_free_text_are_judged_beside_the_scores(
    tiny_llama: Path, tmp_path: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    rows = "prompt,completion\nwhy?,a cold\nwhat?,the skin\n"
    for split in (VALIDATION, TEST):
        (tmp_path / f"{split}.csv").write_text(rows, encoding="utf-8")
    model = adapted_model(tiny_llama, name="causal-lm", labels=(), max_length=64)
    evaluator = Evaluator(model, {TEST: held_out(model, str(tmp_path), TEST, {}, None)}, generate=1)
    best = random_adapter(model, 1)
    found = judge(*of(evaluator, random_adapter(model, 2), best))
    assert found.test == evaluator.evaluate(best, TEST) and {"rouge_l", "perplexity"} <= found.test.keys()
    assert list(found.test)[-1] == "examples" and found.test["examples"] == 2
    assert found.right is None
