"""Rows, mean and spread, by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from common.errors import OutputError
from simulations.sweep import Sweep, run_sweep
from simulations.sweep_grid import cells_of
from simulations.sweep_results import Row, Spread, best_of, groups_of, table_of, to_csv, to_markdown


def row(epsilon: str, seed: int, accuracy: float | None, **more: Any) -> Row:
    usual: dict[str, Any] = {
        "metric": "accuracy",
        "best_round": 2,
        "validation": {"accuracy": accuracy, "loss": 1.0},
        "test": {"accuracy": accuracy},
        "bytes_down": 1,
        "bytes_up": 2**20 * (seed + 1),
        "seconds": 2.0 + seed,
        "epsilon": None if epsilon == "none" else float(epsilon) - 0.01 * seed,
        "delta": None if epsilon == "none" else 1e-5,
    }
    choices = {"privacy.epsilon": epsilon}
    return Row(f"epsilon-{epsilon}_seed-{seed}", choices, seed, "completed", **{**usual, **more})


ROWS = [row("1", 0, 0.5), row("none", 0, 0.8), row("1", 1, 0.7), row("none", 1, 0.9), row("1", 2, 0.9)]


def test_the_spread_is_the_sample_standard_deviation() -> None:
    spread = Spread.of([0.5, 0.7, 0.9])  # deviations -0.2, 0, 0.2: sqrt((0.04 + 0.04) / 2) = 0.2
    assert spread is not None
    assert spread.n == 3 and [spread.mean, spread.deviation] == pytest.approx([0.7, 0.2])
    assert spread.text(3) == "0.700 ± 0.200"
    assert Spread.of([None, 0.25]) == Spread(1, 0.25, None) and Spread(1, 0.25, None).text(2) == "0.25"
    assert Spread.of([None]) is None


def test_the_table_has_a_line_for_each_choice_over_all_its_seeds() -> None:
    head, lines = table_of(groups_of(ROWS))
    assert head == ["privacy.epsilon", "n", "ε of a run", "validation accuracy", "test accuracy", "MiB up", "seconds"]
    # none: mean 0.85, deviation sqrt(2 * 0.05²) = 0.0707; MiB 1 and 2, seconds 2 and 3
    assert lines == [
        ["1", "3", "1.000", "0.7000 ± 0.2000", "0.7000 ± 0.2000", "2.00", "3.0"],
        ["none", "2 *", "no privacy", "0.8500 ± 0.0707", "0.8500 ± 0.0707", "1.50", "2.5"],
    ]
    assert to_markdown(head, lines).splitlines()[1:3] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 3 | 1.000 | 0.7000 ± 0.2000 | 0.7000 ± 0.2000 | 2.00 | 3.0 |",
    ]


def test_without_test_figures_all_of_validation_is_shown() -> None:
    head, _ = table_of(groups_of([row("1", 0, 0.5, test={})]))
    assert head[3:5] == ["validation accuracy", "validation loss"]


def test_the_best_is_chosen_on_validation_and_the_smaller_loss_wins() -> None:
    assert (best := best_of(groups_of(ROWS))) is not None and best.choices == {"privacy.epsilon": "none"}
    losses = [
        row("1", 0, None, metric="loss", validation={"loss": 0.3}, test={"loss": 0.9}),
        row("8", 0, None, metric="loss", validation={"loss": 0.4}, test={"loss": 0.1}),
    ]
    assert (best := best_of(groups_of(losses))) is not None and best.choices == {"privacy.epsilon": "1"}


def test_failed_runs_have_a_row_and_no_part_in_the_means() -> None:
    rows = [*ROWS, Row("epsilon-1_seed-3", {"privacy.epsilon": "1"}, 3, "failed", "out of memory")]
    assert [len(group.rows) for group in groups_of(rows)] == [3, 2]
    found = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert len(found) == 6 and found[-1]["status"] == "failed" and found[-1]["why"] == "out of memory"
    assert found[0]["test_accuracy"] == "0.5" and found[0]["privacy.epsilon"] == "1"
    assert found[0]["epsilon_of_run_selection_not_charged"] == "1.0"


@pytest.mark.parametrize("content", ["", "{}", '{"metric": '])
def test_a_damaged_result_is_said_before_anything_is_run(tmp_path: Path, content: str) -> None:
    tables = {"task": {"name": "sequence-classification", "labels": ["a", "b"]}}
    cells = tuple(cells_of(tables, [], [], 2, ""))
    summary = tmp_path / "cells" / "seed-1" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(content)
    with pytest.raises(OutputError, match=r"seed-1/summary.json: .*restore it from a copy"):
        run_sweep(Sweep(tmp_path, (), cells, 1, 1), lambda cell, event: None)
    assert [one.name for one in tmp_path.iterdir()] == ["cells"]
