"""What a person sees of rounds that were not evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from server.progress import Bars, rounds_table


def record(round: int, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"round": round, "phase": "lora", "metrics": metrics, "seconds": {"exchange": 1.0}}


def every(k: int, rounds: int) -> list[dict[str, Any]]:
    """A history whose every k-th round and last one are evaluated; round n reaches n / 1000."""
    measured = [round % k == 0 or round == rounds for round in range(rounds + 1)]
    return [record(round, {"loss": round / 1000} if measured[round] else {}) for round in range(rounds + 1)]


def rows(history: list[dict[str, Any]], best: int) -> list[list[str]]:
    """The table's cells."""
    table = rounds_table(history, best)
    return [list(row) for row in zip(*([*column.cells] for column in table.columns), strict=True)]


def test_a_round_that_was_not_evaluated_has_dashes() -> None:
    assert [row[:3] for row in rows(every(2, 3), 2)] == [
        ["0", "lora", "0.0000"],
        ["1", "lora", "–"],
        ["2 *", "lora", "0.0020"],
        ["3", "lora", "0.0030"],
    ]


def test_a_metric_that_is_no_number_is_blank_and_no_dash() -> None:
    assert rows([record(0, {"loss": 0.5}), record(1, {"loss": None})], 0)[1][2] == ""


def test_a_long_run_shows_evaluated_rounds_alone_the_best_and_the_last_among_them() -> None:
    """Of rounds 0, 3, ..., 297 and 299, which are 101, every second one."""
    shown = rows(every(3, 299), 297)
    assert [row[0] for row in shown] == [*(str(round) for round in range(0, 297, 6)), "297 *", "299"]
    assert all(row[2] != "–" for row in shown)


@pytest.fixture
def terminal() -> Iterator[tuple[Bars, StringIO]]:
    """A bar of three rounds, and what it writes."""
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with Bars("run", 3, console) as bars:
        yield bars, stream


def test_the_bar_moves_on_after_a_round_that_was_not_evaluated_and_shows_what_it_showed(
    terminal: tuple[Bars, StringIO],
) -> None:
    bars, stream = terminal
    bars.round(record(1, {"loss": 0.5, "examples": 9.0, "perplexity": None}))
    bars.round(record(2, {}))
    bars._progress.refresh()
    last = stream.getvalue().split("\r")[-1]
    assert "2/3" in last and "loss 0.500" in last and "examples" not in last and "perplexity" not in last
