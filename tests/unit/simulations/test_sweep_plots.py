"""The pictures of a sweep: what is drawn where, read back from the figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.sweep import histories_of
from simulations.sweep_plots import COLOURS, convergence, draw, frontier
from simulations.sweep_results import Group, Row

SEEDS = 3


def groups(epsilons: tuple[str, ...], algorithms: tuple[str, ...]) -> list[Group]:
    """Better with more ε; each algorithm a little worse than the one before."""
    found = []
    for epsilon in epsilons:
        for place, algorithm in enumerate(algorithms):
            choices = {"privacy.epsilon": epsilon, "phase.algorithm": algorithm}
            level = {"1": 0.6, "3": 0.7, "8": 0.75, "none": 0.8}[epsilon] - 0.02 * place
            rows = tuple(
                Row(
                    f"{epsilon}-{algorithm}-{seed}",
                    choices,
                    seed,
                    "completed",
                    metric="accuracy",
                    validation={"accuracy": level},
                    test={"accuracy": level + 0.01 * seed},
                )
                for seed in range(SEEDS)
            )
            found.append(Group(choices, rows))
    return found


def histories(of: list[Group], skipped: int | None = None) -> dict[str, list[tuple[int, float | None]]]:
    found: dict[str, list[tuple[int, float | None]]] = {}
    for group in of:
        for row in group.rows:
            curve = [(round, 0.5 + 0.01 * round + 0.01 * row.seed) for round in range(6)]
            found[row.cell] = [one for one in curve if not (row.seed == 1 and one[0] == skipped)]
    return found


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label → x and y of the curves in a panel."""
    return {
        str(line.get_label()): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))  # type: ignore[arg-type]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_the_frontier_has_a_point_for_each_epsilon_and_no_privacy_stands_apart() -> None:
    axes = (figure := frontier(groups(("1", "3", "8", "none"), ("ffa",)), "ε 11.2 composed")).axes[0]
    bars = axes.containers[-1]
    x, y = (np.asarray(values, float) for values in bars.lines[0].get_data())  # type: ignore[attr-defined]
    assert x == pytest.approx([1, 3, 8]) and y == pytest.approx([0.61, 0.71, 0.76])  # means of +0, +0.01, +0.02
    apart, top = (np.asarray(values, float) for values in axes.containers[0].lines[0].get_data())  # type: ignore[attr-defined]
    assert apart[0] > 8 and top == pytest.approx([0.81])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3", "8", "no\nprivacy"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "ε of a run (log scale)"
    assert axes.get_ylabel() == "test accuracy"
    assert "± 1 standard deviation" in texts(figure) and "ε 11.2 composed" in texts(figure)


def test_eight_lines_have_eight_colours_and_markers_and_a_legend_beside_the_curves() -> None:
    figure = frontier(groups(("1", "8"), tuple("abcdefgh")), "")
    axes = figure.axes[0]
    drawn = [container.lines[0] for container in axes.containers if len(container.lines[0].get_xdata()) == 2]  # type: ignore[attr-defined]
    assert {line.get_color() for line in drawn} == set(COLOURS)
    assert len({line.get_marker() for line in drawn}) == 8
    assert (legend := axes.get_legend()) is not None and len(legend.get_texts()) == 8


def test_convergence_is_the_mean_by_round_over_the_rounds_that_every_seed_has() -> None:
    of = groups(("1",), ("ffa",))
    figure = convergence(of, histories(of, skipped=3))
    (curve,) = lines(figure.axes[0]).values()
    assert curve[0] == [0, 1, 2, 4, 5]
    assert curve[1] == pytest.approx([0.51, 0.52, 0.53, 0.55, 0.56])
    assert len(figure.axes[0].collections) == 1  # the band
    assert figure.axes[0].get_ylabel() == "validation accuracy"


def test_rounds_that_were_not_evaluated_are_no_points_of_the_curve(tmp_path: Path) -> None:
    """Rounds 0, 2, 4 and 5 are evaluated, and seed 1 stopped after round 4."""
    (group,) = of = groups(("1",), ("ffa",))
    folders = {row.cell: tmp_path / row.cell for row in group.rows}
    for row in group.rows:
        folders[row.cell].mkdir()
        records = [
            {"round": round, "metrics": {"accuracy": 0.5 + 0.01 * round} if round in (0, 2, 4, 5) else {}}
            for round in range(5 if row.seed == 1 else 6)
        ]
        (folders[row.cell] / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (curve,) = lines(convergence(of, histories_of(group.rows, folders)).axes[0]).values()
    assert curve[0] == [0, 2, 4] and curve[1] == pytest.approx([0.5, 0.52, 0.54])


def test_more_than_eight_curves_are_parted_into_panels() -> None:
    of = groups(("1", "3", "8", "none"), ("ffa", "fedsvd", "rolora"))
    shown = [axes for axes in convergence(of, histories(of)).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["ε 1", "ε 3", "ε 8", "no privacy"]
    assert all(len(lines(axes)) == 3 for axes in shown)


def test_pictures_are_written_in_both_forms_and_the_frontier_only_over_epsilon(tmp_path: Path) -> None:
    of = groups(("1", "none"), ("ffa",))
    files = draw(of, histories(of), "", tmp_path)
    assert sorted(file.name for file in files) == ["convergence.png", "convergence.svg", "frontier.png", "frontier.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
    plain = [Group({"lora.r": "4"}, group.rows) for group in of[:1]]
    assert {file.name for file in draw(plain, histories(of), "", tmp_path)} == {"convergence.png", "convergence.svg"}
