"""Which rounds are evaluated, and where a phase stops early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.adapted import AdaptedModel
from common.config import RunConfig
from common.plan import plan_of
from common.toml_settings import validate
from server.evaluation import Evaluator
from server.schedule import Schedule
from server.selection import Selection

Load = Callable[..., AdaptedModel]
Make = Callable[..., Schedule]
HEAD, LORA = 5, 4
"""Rounds of the two phases: 1 to 5 and 6 to 9."""


@pytest.fixture(scope="module")
def make(adapted_model: Load, tiny_bert: Path) -> Make:
    """A schedule by the settings of ``[evaluation]``."""
    selection = Selection(Evaluator(adapted_model(tiny_bert), {}, "accuracy"), "best", False)

    def schedule(**settings: Any) -> Schedule:
        phases = [
            {"name": "head", "rounds": HEAD, "sample_rate": 1.0, "train": ["head"]},
            {"name": "lora", "rounds": LORA, "sample_rate": 1.0, "train": ["lora"]},
        ]
        tables = {"task": {"labels": ["a", "b"]}, "phase": phases, "evaluation": settings}
        config = validate(RunConfig, tables, "test")
        plan = plan_of(config, "run-1", *(digit * 64 for digit in "abc"))
        return Schedule(plan, config.evaluation, selection)

    return schedule


def ended(schedule: Schedule, accuracies: Sequence[float]) -> list[int]:
    """The rounds that are played where each round's accuracy is the one listed for it (from round 0)."""
    history: list[dict[str, Any]] = [{"round": 0, "phase": "base", "metrics": {"accuracy": accuracies[0]}}]
    round, played = 1, []
    while round <= HEAD + LORA:
        metrics = {"accuracy": accuracies[round]} if schedule.evaluates(round) else {}
        history.append({"round": round, "phase": schedule.plan.phase_of(round).name, "metrics": metrics})
        played.append(round)
        round = schedule.next_round(history)
    return played


@pytest.mark.parametrize(
    ("every", "evaluated"),
    [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, [2, 4, 5, 7, 9]), (3, [3, 5, 8, 9]), (4, [4, 5, 9]), (100, [5, 9])],
)
def test_each_phase_counts_from_its_own_first_round_and_its_last_is_always_evaluated(
    make: Make, every: int, evaluated: list[int]
) -> None:
    schedule = make(every=every)
    assert [round for round in range(1, HEAD + LORA + 1) if schedule.evaluates(round)] == evaluated


def test_every_round_is_evaluated_unless_asked_otherwise(make: Make) -> None:
    assert all(make().evaluates(round) for round in range(1, HEAD + LORA + 1))


def test_without_patience_no_phase_stops(make: Make) -> None:
    assert ended(make(every=2), [0.9] + [0.1] * 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_phase_stops_after_an_evaluated_round_only(make: Make) -> None:
    """Patience runs out after rounds 1 and 6, which nobody has measured: 2 and 7 are the first that can be last."""
    never_better = [0.9] + [0.1] * 9
    assert ended(make(patience=1), never_better) == [1, 6]
    assert ended(make(patience=1, every=2), never_better) == [1, 2, 6, 7]
    assert ended(make(patience=1, every=3), never_better) == [1, 2, 3, 6, 7, 8]
    assert ended(make(patience=1, every=100), never_better) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_patience_counts_rounds_whether_evaluated_or_not(make: Make) -> None:
    never_better = [0.9] + [0.1] * 9
    assert ended(make(patience=2, every=2), never_better) == [1, 2, 6, 7]
    assert ended(make(patience=3, every=2), never_better) == [1, 2, 3, 4, 6, 7, 8, 9]


def test_a_better_round_starts_the_count_anew(make: Make) -> None:
    """Round 2 is the best; 4 is two rounds later. With a patience of 3 the phase goes on to its end."""
    best_at_two = [0.1, 0.0, 0.5, 0.0, 0.2, 0.2, 0.6, 0.6, 0.6, 0.6]
    assert ended(make(patience=2, every=2), best_at_two)[:5] == [1, 2, 3, 4, 6]
    assert ended(make(patience=3, every=2), best_at_two)[:5] == [1, 2, 3, 4, 5]


def test_the_last_phase_can_stop_the_run(make: Make) -> None:
    schedule = make(patience=1)
    history = [{"round": 0, "phase": "base", "metrics": {"accuracy": 0.9}}]
    assert schedule.next_round([*history, {"round": 6, "phase": "lora", "metrics": {"accuracy": 0.1}}]) == 10
