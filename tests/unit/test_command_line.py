"""How ``consilium`` ends: one message and an exit code, whatever happened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from site_files import site_tables, write_site

import client.cli
import consilium
import simulations.simulate
from common.errors import RunFailed

End = tuple[Any, str, str]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., End]:
    """Runs ``consilium`` with these arguments: exit code, stdout, stderr."""

    def call(*arguments: str) -> End:
        monkeypatch.setattr(sys, "argv", ["consilium", *arguments])
        with pytest.raises(SystemExit) as ended:
            consilium.main()
        output = capsys.readouterr()
        return ended.value.code or 0, output.out, output.err

    return call


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["simulate", "--nope"], "error: No such option '--nope'. See 'consilium simulate --help'."),
        (["nonsense"], "error: No such command 'nonsense'. See 'consilium --help'."),
        (["site", "approve"], "error: Missing argument 'DIGEST'. See 'consilium site approve --help'."),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_code_2(
    ends: Callable[..., End], arguments: list[str], problem: str
) -> None:
    assert ends(*arguments) == (2, "", f"{problem}\n")


@pytest.mark.parametrize("arguments", [[], ["site"], ["server"]])
def test_without_a_command_the_help_is_shown_and_nothing_else(ends: Callable[..., End], arguments: list[str]) -> None:
    code, stdout, stderr = ends(*arguments)
    assert code == 2 and "Usage: consilium" in stdout and stderr == ""


def test_help_is_not_an_error(ends: Callable[..., End]) -> None:
    code, stdout, stderr = ends("simulate", "--help")
    assert code == 0 and "--resume" in stdout and stderr == ""


def test_an_error_of_the_user_is_one_message_and_its_own_exit_code(
    ends: Callable[..., End], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: object) -> None:
        raise RunFailed("round 3: 1 replies were admitted, server.min_replies = 2")

    monkeypatch.setattr(simulations.simulate, "simulate", failing)
    code, stdout, stderr = ends("simulate", "--out", str(tmp_path / "out"))
    assert (code, stdout) == (3, "") and stderr == "error: round 3: 1 replies were admitted, server.min_replies = 2\n"
    assert ends("simulate", "--config", "missing.toml")[0] == 2


def test_an_interrupt_is_one_line_and_exit_code_130(ends: Callable[..., End], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.cli, "_ledger", interrupted)
    message = "interrupted; what was finished is kept, continue with --resume\n"
    assert ends("site", "ledger") == (130, "", message)


def test_an_exit_code_that_a_command_chooses_is_kept(ends: Callable[..., End], tmp_path: Path, tiny_bert: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n,routine\nmild cough,routine\n")
    config = write_site(tmp_path, site_tables(tiny_bert))
    code, stdout, stderr = ends("site", "check", "--config", str(config), "--labels", "urgent,routine")
    assert (code, stderr) == (2, "") and "1 rows cannot be learnt from" in stdout
