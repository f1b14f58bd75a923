"""How ``consilium`` ends: one message and an exit code, whatever happened."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from site_files import site_tables, write_site

import client.cli
import consilium
import simulations.simulate
from common.config import RunConfig
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


@pytest.mark.parametrize(
    ("command", "module", "runs"),
    [(["simulate"], "simulations.simulate", "simulate"), (["server", "run"], "server.follow", "run_deployment")],
)
def test_phases_of_the_default_recipe_are_set_by_name_by_index_and_all_at_once(
    ends: Callable[..., End],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: list[str],
    module: str,
    runs: str,
) -> None:
    rounds: list[tuple[int, ...]] = []

    def seen(config: RunConfig, *_: object) -> None:
        rounds.append(tuple(phase.rounds for phase in config.phases))
        raise RunFailed("seen")

    monkeypatch.setattr(importlib.import_module(module), runs, seen)
    config, out = tmp_path / "run.toml", str(tmp_path / "out")
    config.write_text('[task]\nname = "sequence-classification"\nlabels = ["a", "b"]\n[privacy]\nepsilon = 8.0\n')
    for setting in ("phase.head.rounds=7", "phase.0.rounds=7", "phase.rounds=7"):
        assert ends(*command, "--config", str(config), "--set", setting, "--out", out)[0] == 3
    assert rounds == [(7, 4), (7, 4), (7, 7)]
    code, _, stderr = ends(*command, "--config", str(config), "--set", "phase.haed.rounds=7", "--out", out)
    assert (code, stderr) == (2, "error: phase.haed.rounds: there is no such phase (did you mean 'head'?)\n")


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


# ---- where the output goes ------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path: Path) -> list[str]:
    """Arguments that print what is no ASCII: two runs whose metric has a Greek name."""
    for name, value in (("first", 0.5), ("second", 0.75)):
        folder = tmp_path / name
        folder.mkdir()
        metrics = {"épsilon_ε": value, "examples": 30.0}
        summary = {"metric": "épsilon_ε", "validation": metrics, "test": None}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps({"evaluation_data_digests": {"validation": "v"}}))
    return ["compare", str(tmp_path / "first"), str(tmp_path / "second")]


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A terminal that shows ASCII alone."""


def test_what_a_terminal_cannot_show_is_replaced(compared: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | PLAIN
    command = [sys.executable, consilium.__file__]
    done = subprocess.run([*command, *compared], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"") and b"?psilon-?" in done.stdout
    missing = subprocess.run([*command, "report", "/nöwhere"], env=environment, capture_output=True, timeout=60)
    assert missing.returncode == 2 and missing.stderr.startswith(b"error: report /n") and missing.stdout == b""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_quietly_as_other_programs_do(
    compared: list[str], arguments: list[str], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, consilium.__file__, *compared, *arguments],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (consilium.UNREAD, b"")


def test_a_table_that_nobody_reads_ends_quietly_too(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text,label\nmild cough,a\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, consilium.__file__, "data", "look", str(tmp_path / "notes.csv")]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (consilium.UNREAD, b"")


def test_an_input_that_is_not_there_is_named_by_its_option(ends: Callable[..., End], tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.csv")
    code, stdout, stderr = ends("predict", "--adapter", str(tmp_path), "--input", absent)
    assert (code, stdout) == (2, "")
    assert stderr == f"error: --input {absent}: no such file; give an existing csv, jsonl or parquet file\n"
