"""Which round is kept: the best, or under DP the latest that is no worse than the best as far as the split can tell."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest

from common.adapted import AdaptedModel
from common.errors import ConfigError
from server.evaluation import Evaluator
from server.selection import Selection

Load = Callable[..., AdaptedModel]


@pytest.fixture(scope="module")
def evaluator(adapted_model: Load, tiny_bert: Path) -> Evaluator:
    return Evaluator(adapted_model(tiny_bert), {}, "accuracy")


def kept(
    evaluator: Evaluator, accuracies: list[float], rule: str = "auto", private: bool = True, phases: str = ""
) -> int:
    """The round that is kept of a history of 400 examples; ``phases`` has a letter for each record."""
    selection = Selection(evaluator, rule, private)
    records: list[dict[str, Any]] = [
        {"round": round, "phase": phase, "metrics": {"accuracy": value, "loss": 1 - value, "examples": 400.0}}
        for round, (value, phase) in enumerate(
            zip(accuracies, phases or "0" + "h" * (len(accuracies) - 1), strict=True)
        )
    ]
    found = 0
    for round, record in enumerate(records[1:], 1):
        if selection.keeps(record, records[:round]):
            found = round
    return found


def test_under_dp_the_latest_within_one_standard_error_of_the_best_is_kept(evaluator: Evaluator) -> None:
    """√(0.9 · 0.1 / 400) = 0.015: 0.886 is within it of 0.9 and 0.884 is not."""
    assert kept(evaluator, [0.1, 0.9, 0.886]) == 2
    assert kept(evaluator, [0.1, 0.9, 0.884]) == 1


def test_the_distance_is_to_the_best_of_all_and_does_not_creep(evaluator: Evaluator) -> None:
    assert kept(evaluator, [0.1, 0.9, 0.89, 0.88, 0.87]) == 2


def test_no_round_that_is_not_better_than_the_base_takes_its_place(evaluator: Evaluator) -> None:
    assert kept(evaluator, [0.9, 0.895, 0.9]) == 0
    assert kept(evaluator, [0.89, 0.9, 0.889]) == 1


def test_no_round_that_is_not_better_than_what_its_phase_began_with_takes_its_place(evaluator: Evaluator) -> None:
    assert kept(evaluator, [0.1, 0.9, 0.895, 0.895, 0.89], phases="0hhll") == 2
    assert kept(evaluator, [0.1, 0.9, 0.895, 0.896, 0.89], phases="0hhll") == 3


@pytest.mark.parametrize(("rule", "private"), [("best", True), ("auto", False)])
def test_otherwise_the_first_best_is_kept(evaluator: Evaluator, rule: str, private: bool) -> None:
    assert kept(evaluator, [0.1, 0.9, 0.899, 0.9], rule, private) == 1


def test_the_rule_can_be_asked_for_without_dp(evaluator: Evaluator) -> None:
    assert kept(evaluator, [0.1, 0.9, 0.899], "one-standard-error", private=False) == 2


def test_a_metric_that_is_no_proportion_has_no_doubt_and_none_can_be_asked_for(
    adapted_model: Load, tiny_bert: Path
) -> None:
    by_loss = Evaluator(adapted_model(tiny_bert), {}, "loss")
    assert kept(by_loss, [0.1, 0.9, 0.899]) == kept(by_loss, [0.1, 0.9, 0.899], "best") == 1
    with pytest.raises(ConfigError, match=r"'one-standard-error': .*'loss'.*; use evaluation\.metric = 'accuracy', or"):
        Selection(by_loss, "one-standard-error", private=True)


def test_nothing_is_kept_of_a_round_without_a_metric(evaluator: Evaluator) -> None:
    assert kept(evaluator, [0.1, 0.9, nan]) == 1
    assert kept(evaluator, [nan, 0.2]) == 1


@pytest.mark.parametrize("rule", ["best", "one-standard-error"])
def test_a_round_that_was_not_evaluated_is_never_kept_and_never_the_best(evaluator: Evaluator, rule: str) -> None:
    selection = Selection(evaluator, rule, private=True)
    base, best, plain = (
        {"round": round, "phase": phase, "metrics": {"accuracy": value, "examples": 400.0}}
        for round, phase, value in ((0, "base", 0.1), (2, "head", 0.9), (4, "head", 0.89))
    )
    for history in ([base], [base, best]):
        for round in (1, 3):
            assert not selection.keeps({"round": round, "phase": "head", "metrics": {}}, history)
    history = [base, {"round": 1, "phase": "head", "metrics": {}}, best, {"round": 3, "phase": "head", "metrics": {}}]
    assert selection.best(history) is best
    assert selection.keeps(plain, history) == (rule == "one-standard-error")
    unknown = {"round": 0, "phase": "base", "metrics": {"accuracy": nan, "examples": 400.0}}
    assert not selection.keeps({"round": 1, "phase": "head", "metrics": {}}, [unknown])


def test_early_stopping_looks_at_the_best(evaluator: Evaluator) -> None:
    accuracies = enumerate([0.1, 0.9, 0.89])
    records = [{"round": n, "metrics": {"accuracy": value, "examples": 400.0}} for n, value in accuracies]
    assert Selection(evaluator, "auto", private=True).best(records)["round"] == 1
