"""Pairs of sweeps and of runs: differences by hand, tests against textbook figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import stdtr

from common.errors import ConfigError, ConsiliumError, DataError, OutputError
from simulations.compare import compare, in_words, mcnemar, paired_test


def write_sweep(folder: Path, figures: dict[str, float], digest: str = "same") -> Path:
    """A sweep with one metric: cell → test accuracy."""
    rows = []
    for cell, value in figures.items():
        (folder / "cells" / cell).mkdir(parents=True)
        digests = {"validation": digest, "test": digest}
        (folder / "cells" / cell / "manifest.json").write_text(json.dumps({"evaluation_data_digests": digests}))
        choices = {"privacy.epsilon": cell.split("_")[0].removeprefix("epsilon-")}
        metrics = {"accuracy": value, "loss": 1 - value}
        rows.append(
            {"cell": cell, "choices": choices, "status": "completed", "metric": "accuracy", "validation": metrics}
            | {"test": metrics}
        )
    rows.append({"cell": "epsilon-1_seed-9", "status": "failed"})
    (folder / "sweep.json").write_text(json.dumps({"cells": rows}))
    return folder


def write_run(folder: Path, accuracy: float, test: bool = True, right: str = "", split: str = "test") -> Path:
    """A run; with ``right``, one character an example, 1 where it is answered rightly."""
    folder.mkdir()
    if right:
        answers = {"split": split, "right": [one == "1" for one in right]}
        (folder / "answers.json").write_text(json.dumps(answers))
    metrics = {"accuracy": accuracy, "examples": 30.0}
    summary = {"metric": "accuracy", "validation": metrics, "test": metrics if test else None}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "manifest.json").write_text(json.dumps({"evaluation_data_digests": {"validation": "v", "test": "t"}}))
    return folder


def test_the_paired_test_is_students() -> None:
    # Student's own sleep data (1908), differences of two drugs: t = 4.0621 on 9 degrees of freedom, p = 0.00283.
    found = paired_test([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (found["n"], found["difference"]) == (10, pytest.approx(1.58))
    assert found["standard_deviation"] == pytest.approx(1.229995, abs=1e-6)
    assert found["t_test_p"] == pytest.approx(0.002833, abs=1e-6)
    assert found["confidence_interval"] == pytest.approx([0.7001142, 2.4598858], abs=1e-5)


def test_p_and_interval_of_two_pairs_are_those_of_one_degree_of_freedom() -> None:
    found = paired_test([0.1, 0.3])  # mean 0.2, standard error 0.1: t = 2
    assert found["t_test_p"] == pytest.approx(2 * stdtr(1, -2.0))
    assert found["confidence_interval"] == pytest.approx([0.2 - 1.27062, 0.2 + 1.27062], abs=1e-5)
    assert found["wilcoxon_p"] is None


def test_wilcoxons_test_counts_the_signs_of_ranks_from_six_pairs_on() -> None:
    assert paired_test([1.0, 2.0, 3.0, 4.0, 5.0])["wilcoxon_p"] is None
    # All six positive: one of the 2⁶ ways for each tail.
    assert paired_test([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["wilcoxon_p"] == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("differences", [[0.3], [0.2, 0.2, 0.2]])
def test_where_there_is_no_spread_nothing_is_tested(differences: list[float]) -> None:
    found = paired_test(differences)
    assert found["t_test_p"] is found["confidence_interval"] is None


def test_sweeps_are_paired_cell_by_cell_and_what_has_no_twin_is_left_out(tmp_path: Path) -> None:
    first = write_sweep(tmp_path / "a", {"epsilon-1_seed-0": 0.50, "epsilon-1_seed-1": 0.60, "epsilon-8_seed-0": 0.70})
    second = write_sweep(tmp_path / "b", {"epsilon-1_seed-1": 0.63, "epsilon-1_seed-0": 0.51, "epsilon-3_seed-0": 0.9})
    found = compare(first, second)
    assert [(pair["cell"], round(pair["difference"], 9)) for pair in found["pairs"]] == [
        ("epsilon-1_seed-0", 0.01),
        ("epsilon-1_seed-1", 0.03),
    ]
    assert (found["n"], found["difference"]) == (2, pytest.approx(0.02))
    assert found["left_out"] == ["epsilon-3_seed-0", "epsilon-8_seed-0"]
    assert compare(first, second, metric="loss")["difference"] == pytest.approx(-0.02)
    said = in_words(found)
    assert "n = 2, difference +0.0200, 95% confidence interval" in said and "epsilon-8_seed-0" in said


def test_two_runs_show_their_differences_and_prove_nothing(tmp_path: Path) -> None:
    found = compare(write_run(tmp_path / "a", 0.5), write_run(tmp_path / "b", 0.75))
    assert found["metrics"] == {"accuracy": {"first": 0.5, "second": 0.75, "difference": 0.25}}
    assert "One pair of runs proves nothing" in in_words(found) and "+0.2500" in in_words(found)


def test_two_runs_that_kept_their_answers_are_compared_example_by_example(tmp_path: Path) -> None:
    # 12 examples, 10 answered rightly by one run alone, 1 of them by the first: p = 2 (1 + 10) / 2¹⁰.
    first = write_run(tmp_path / "a", 2 / 12, right="110000000000")
    second = write_run(tmp_path / "b", 10 / 12, right="101111111110")
    found = compare(first, second)
    assert found["mcnemar"] == {
        "examples": 12, "only_first_right": 1, "only_second_right": 9, "p": pytest.approx(22 / 1024)
    }  # fmt: skip
    said = in_words(found)
    assert "1 are right in the first run alone, 9 in the second alone; McNemar's exact test p = 0.0215" in said
    assert "covers which examples the split happens to hold, not the seed" in said and "proves nothing" not in said


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ("1111", "1111", 1.0),  # nothing divides them
        ("1100", "0011", 1.0),  # two against two
        ("0000", "1111", 2 / 2**4),
        ("00000001", "11111110", 2 * (1 + 8) / 2**8),
    ],
)
def test_mcnemars_p_counts_the_divisions_that_are_as_uneven(first: str, second: str, p: float) -> None:
    sides = ([one == "1" for one in side] for side in (first, second))
    assert mcnemar(*sides)["p"] == pytest.approx(p)


def test_answers_of_another_split_or_of_one_run_alone_prove_nothing(tmp_path: Path) -> None:
    with_answers = write_run(tmp_path / "a", 0.5, right="10")
    for other in (write_run(tmp_path / "b", 0.5), write_run(tmp_path / "c", 0.5, right="10", split="validation")):
        found = compare(with_answers, other)
        assert found["mcnemar"] is None and "One pair of runs proves nothing" in in_words(found)
    assert compare(with_answers, tmp_path / "c", split="validation")["mcnemar"] is None
    with pytest.raises(OutputError, match=r"answers\.json: 2 answers cannot be paired with 3"):
        compare(with_answers, write_run(tmp_path / "d", 0.5, right="101"))


def test_without_test_figures_validation_is_compared(tmp_path: Path) -> None:
    sides = write_run(tmp_path / "a", 0.5, test=False), write_run(tmp_path / "b", 0.75)
    assert compare(*sides)["split"] == "validation"
    with pytest.raises(ConfigError, match="--split validation"):
        compare(*sides, split="test")


def test_a_single_pair_of_a_sweep_proves_nothing_either(tmp_path: Path) -> None:
    first, second = (write_sweep(tmp_path / f"{value}", {"epsilon-1_seed-0": value}) for value in (0.5, 0.7))
    assert "One pair proves nothing" in in_words(compare(first, second))


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "a", {"epsilon-1_seed-0": 0.5})
    refused: list[tuple[Path, type[ConsiliumError], str, dict[str, Any]]] = [
        (write_sweep(tmp_path / "b", {"epsilon-1_seed-0": 0.5}, "other"), DataError, "different test data", {}),
        (write_sweep(tmp_path / "c", {"epsilon-8_seed-0": 0.5}), DataError, "no finished cell in common", {}),
        (write_run(tmp_path / "d", 0.5), OutputError, "compare two of one kind", {}),
        (tmp_path / "nothing", OutputError, "holds no finished run or sweep", {}),
        (sweep, ConfigError, "did you mean 'accuracy'", {"metric": "acuracy"}),
    ]
    for other, kind, said, more in refused:
        with pytest.raises(kind, match=said):
            compare(sweep, other, **more)


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        low, high = paired_test(list(generator.normal(0.3, 1.0, 5)))["confidence_interval"]
        held += low <= 0.3 <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "answers.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}', "[1, 2]"])
def test_a_damaged_file_of_a_run_is_named_with_the_remedy(tmp_path: Path, name: str, content: str) -> None:
    first, second = (write_run(tmp_path / one, 0.5, right="1") for one in ("first", "second"))
    (first / name).write_text(content)
    with pytest.raises(OutputError, match=rf"first/{name}: .*restore it from a copy"):
        compare(first, second)


def test_a_damaged_table_of_a_sweep_is_named_with_the_remedy(tmp_path: Path) -> None:
    first, second = (write_sweep(tmp_path / one, {"epsilon-1_seed-0": 0.5}) for one in ("first", "second"))
    (first / "sweep.json").write_text("{}")
    with pytest.raises(OutputError, match=r"sweep.json: is damaged \('cells' is missing\); restore it from a copy"):
        compare(first, second)
