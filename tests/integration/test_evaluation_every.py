"""A run that evaluates every second round is the run that evaluates each, with fewer evaluations."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import Stopped, StopsAfter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config import RunConfig
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.evaluation import Evaluator
from server.report_page.page import content_of_folder, render
from server.rounds import VALIDATION
from simulations.simulate import simulate

EVALUATED = [0, 2, 3, 5, 6]
"""Of two phases of three rounds each: before round 1, the second of each, the last of each."""


@dataclass
class Setup:
    """Runs the same federation with different evaluations."""

    model: Path
    data: Path

    def run(self, out: Path, resume: bool = False, last: int | None = None, **evaluation: Any) -> dict[str, Any]:
        phase = {"rounds": 3, "sample_rate": 1.0, "server_momentum": 0.5}
        tables: dict[str, Any] = {
            "model": {"name": str(self.model)},
            "task": {"labels": ("urgent", "routine", "review"), "max_length": 32},
            "data": {"path": str(self.data), "site_column": "hospital"},
            "lora": {"r": 4, "layers": 1},
            "privacy": {"mechanism": "none"},
            "evaluation": evaluation,
            "phase": [
                {**phase, "name": "head", "train": ["head"], "learning_rate": 3.0},
                {**phase, "name": "lora", "train": ["head", "lora"], "learning_rate": 1.0},
            ],
        }
        config = validate(RunConfig, tables, "test")
        return simulate(config, out, resume, lambda title, rounds: nullcontext(StopsAfter(last)))


@pytest.fixture
def setup(tiny_bert: Path, triage_data: Path) -> Setup:
    return Setup(tiny_bert, triage_data)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The split of each evaluation so far."""
    asked: list[str] = []
    scores = Evaluator.scores

    def counting(self: Evaluator, adapter: Any, split: str, *more: Any, **named: Any) -> Any:
        asked.append(split)
        return scores(self, adapter, split, *more, **named)

    monkeypatch.setattr(Evaluator, "scores", counting)
    return asked


def global_model(out: Path) -> dict[str, bytes]:
    """What the aggregator holds after the last round."""
    checkpoint = RunFolder(out).latest()
    assert checkpoint is not None and checkpoint.round == 6
    return {name: array.tobytes() for name, array in checkpoint.aggregator.items()}


def without_times(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_the_model_is_the_same_bit_for_bit_and_is_evaluated_less_often(
    setup: Setup, tmp_path: Path, evaluations: list[str]
) -> None:
    setup.run(tmp_path / "each", every=1)
    often = evaluations.count(VALIDATION)
    evaluations.clear()
    summary = setup.run(tmp_path / "second", every=2)
    assert often - evaluations.count(VALIDATION) == 2  # rounds 1 and 4

    assert global_model(tmp_path / "second") == global_model(tmp_path / "each")
    each, second = (without_times(tmp_path / name) for name in ("each", "second"))
    for one, other in zip(each, second, strict=True):
        assert one["metrics"] and one["by_site"]
        if one["round"] not in EVALUATED:
            one = {name: value for name, value in one.items() if name != "by_site"} | {"metrics": {}}
        assert other == one
    assert [record["round"] for record in second if record["metrics"]] == EVALUATED
    assert summary["best_round"] in EVALUATED
    assert summary["validation"] == second[summary["best_round"]]["metrics"]
    unevaluated = summary["rounds"][1]
    assert unevaluated["metrics"] == {} and "evaluate" not in unevaluated["seconds"]


def test_a_resumed_run_evaluates_the_same_rounds(setup: Setup, tmp_path: Path) -> None:
    setup.run(tmp_path / "whole", every=2)
    for last in (1, 4):
        out = tmp_path / f"stopped-{last}"
        with pytest.raises(Stopped):
            setup.run(out, every=2, last=last)
        setup.run(out, resume=True, every=2)
        assert without_times(out) == without_times(tmp_path / "whole")
        assert global_model(out) == global_model(tmp_path / "whole")


def test_events_and_page_have_the_evaluated_rounds_alone(setup: Setup, tmp_path: Path) -> None:
    setup.run(tmp_path / "run", every=2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/accuracy")] == EVALUATED
    assert [event.step for event in events.Scalars("wire/bytes_up")] == [1, 2, 3, 4, 5, 6]
    html = render(content_of_folder(tmp_path / "run"))
    assert "not evaluated, as <code>evaluation.every = 2</code> asks" in html
