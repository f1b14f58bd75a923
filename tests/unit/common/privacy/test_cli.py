"""``consilium privacy plan``: figures, plain words, JSON and refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import common.privacy.cli as cli
from common.errors import ConfigError, ConsiliumError, PrivacyError
from common.privacy.accounting import Segment, epsilon, pld_epsilon, rdp_epsilon

BASE = ["plan", "--examples", "4000", "--batch", "100", "--rounds", "20", "--steps", "2"]


def run_json(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(cli.app, [*BASE, *arguments, "--json"])
    assert result.exception is None, result.exception
    assert len(result.stdout.strip().splitlines()) == 1
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def failure(arguments: list[str]) -> ConsiliumError:
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ConsiliumError)
    assert result.stdout == ""
    return result.exception


def test_noise_is_turned_into_the_figures_of_all_accountants() -> None:
    answer = run_json("--noise-multiplier", "1.0")
    segments = [Segment(0.025, 1.0, 40)]
    assert answer == {
        "examples": 4000,
        "batch": 100,
        "sample_rate": 0.025,
        "rounds": 20,
        "steps_per_round": 2,
        "steps": 40,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "epsilon": epsilon(segments, 1e-5),
        "pld_epsilon": pld_epsilon(segments, 1e-5),
        "rdp_epsilon": rdp_epsilon(segments, 1e-5),
        "accountant": "prv",
        "unit": "example",
    }


def test_a_target_is_turned_into_noise_that_meets_it() -> None:
    answer = run_json("--epsilon", "3", "--delta", "1e-6")
    sigma, spent = answer["noise_multiplier"], answer["epsilon"]
    assert isinstance(sigma, float) and isinstance(spent, float)
    assert answer["delta"] == 1e-6
    assert 2.99 <= spent <= 3
    assert 2.98 <= pld_epsilon([Segment(0.025, sigma, 40)], 1e-6) <= 3


def test_a_batch_of_all_examples_is_planned_without_sampling() -> None:
    answer = run_json("--batch", "4000", "--rounds", "2", "--noise-multiplier", "2")  # mu = sqrt(2 * 2)/2 = 1
    assert answer["sample_rate"] == 1.0
    assert answer["epsilon"] == pytest.approx(4.3772, abs=1e-4)  # the known epsilon of mu = 1 at delta = 1e-5


def test_the_table_and_one_sentence_say_what_it_means() -> None:
    result = CliRunner().invoke(cli.app, [*BASE, "--noise-multiplier", "1.0"])
    assert result.exception is None
    spent = epsilon([Segment(0.025, 1.0, 40)], 1e-5)
    text = " ".join(result.stdout.split())
    assert f"{spent:.4f}" in text
    assert "20 x 2 = 40" in text
    assert f"by a factor of {math.exp(spent):.3g} at most, except with probability 1e-05." in text


def test_an_epsilon_beyond_all_meaning_is_still_printed() -> None:
    result = CliRunner().invoke(cli.app, [*BASE, "--batch", "4000", "--noise-multiplier", "0.01"])
    assert result.exception is None
    assert "by a factor of e^" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (BASE, "--epsilon E .* --noise-multiplier Z"),
        ([*BASE, "--epsilon", "3", "--noise-multiplier", "1"], "--epsilon 3 and --noise-multiplier 1"),
        ([*BASE, "--epsilon", "3", "--batch", "4001"], "--batch 4001 exceeds --examples 4000"),
        ([*BASE, "--epsilon", "3", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_contradictory_options_are_refused_by_name(arguments: list[str], named: str) -> None:
    error = failure(arguments)
    assert isinstance(error, ConfigError)
    with pytest.raises(ConfigError, match=named):
        raise error


def test_all_wrong_options_are_listed_at_once() -> None:
    error = failure([*BASE, "--rounds", "0", "--steps", "-1", "--examples", "0"])
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epsilon", "0"], "epsilon = 0.0"),
        (["--epsilon", "0.01"], "epsilon = 0.01 cannot be reached"),
        (["--noise-multiplier", "0"], "noise_multiplier = 0.0"),
        (["--noise-multiplier", "1", "--delta", "2"], "delta = 2.0"),
    ],
)
def test_impossible_privacy_is_refused_by_name(arguments: list[str], named: str) -> None:
    error = failure([*BASE, *arguments])
    assert isinstance(error, PrivacyError)
    assert named in str(error)


def test_help_gives_examples() -> None:
    result = CliRunner().invoke(cli.app, ["plan", "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "consilium privacy plan --examples 4000 --batch 100 --rounds 40 --steps 1 --epsilon 3" in result.stdout


def test_help_loads_neither_numbers_nor_tables() -> None:
    program = "import sys, common.privacy.cli; sys.exit(bool({'numpy', 'scipy', 'torch', 'opacus'} & set(sys.modules)))"
    root = Path(cli.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
