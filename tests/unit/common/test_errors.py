"""The exceptions a user can cause."""

from __future__ import annotations

import inspect

import pytest

from common import errors
from common.errors import ConfigError, ConsiliumError, RunFailed, did_you_mean

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ConsiliumError)]


def test_one_problem_is_one_line_and_several_are_a_list() -> None:
    assert str(ConfigError("a: wrong")) == "a: wrong"
    assert str(ConfigError("a: wrong", "run.toml")) == "setting in run.toml: a: wrong"
    assert str(ConfigError(["a: wrong", "b: wrong"], "run.toml")) == (
        "2 settings in run.toml are wrong:\n  - a: wrong\n  - b: wrong"
    )
    assert ConfigError(["a: wrong", "b: wrong"]).problems == ["a: wrong", "b: wrong"]


@pytest.mark.parametrize(
    ("value", "known", "expected"),
    [
        ("epsilom", ["epsilon", "delta"], " (did you mean 'epsilon'?)"),
        ("zzz", ["epsilon", "delta"], " (known: delta, epsilon)"),
        ("zzz", [], ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_known_one(value: str, known: list[str], expected: str) -> None:
    assert did_you_mean(value, known) == expected


def test_bad_input_exits_with_2_and_a_failed_run_with_3() -> None:
    assert {kind: kind.exit_code for kind in KINDS} == {kind: 3 if kind is RunFailed else 2 for kind in KINDS}


def test_every_exception_stands_in_the_tree_of_the_modules_docstring() -> None:
    drawn = [line.strip(" │├└─").split() for line in (errors.__doc__ or "").splitlines()]
    assert {kind.__name__ for kind in KINDS} == {words[0] for words in drawn if words and words[0] in dir(errors)}
