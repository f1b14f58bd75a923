"""A simulation that is killed at any moment, or interrupted, continues to the same result."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import ENVIRONMENT, INTERRUPTIBLE

HEAD = {
    "name": "head",
    "rounds": 1,
    "sample_rate": 1.0,
    "train": ["head"],
    "learning_rate": 1.0,
    "server_refinement": True,
}
LORA = {"name": "lora", "rounds": 2, "sample_rate": 0.5, "train": ["head", "lora"], "learning_rate": 0.5}
ROUNDS = 3
KILLS = 8
ONCE = {site: [(1, 1), (2, 1), (3, 1)] for site in ("north", "south", "west")}
"""Each round charged once at each site."""
RESULT = (f"checkpoint/{ROUNDS}/state.safetensors", "adapter/adapter_model.safetensors")


class Killer:
    """``killed.py`` at work."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py"))],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def attempt(self, *arguments: str, below: Path, fatal: int | None = None) -> dict[str, Any]:
        """One start of ``consilium``; what came of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": arguments, "below": str(below), "fatal": fatal}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    """One process with everything imported, for all attempts."""
    killer = Killer()
    with killer.process:
        yield killer
        killer.process.kill()


@pytest.fixture
def settings(tmp_path: Path, tiny_bert: Path, triage_data: Path) -> list[str]:
    """The run: three sites, three rounds in two phases."""
    values: dict[str, Any] = {
        "model.name": str(tiny_bert),
        "task.labels": ["urgent", "routine", "review"],
        "task.max_length": 32,
        "data.path": str(triage_data),
        "data.site_column": "hospital",
        "lora.layers": 2,
    }
    phases = "\n".join(
        "[[phase]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in phase.items())
        for phase in (HEAD, LORA)
    )
    (tmp_path / "run.toml").write_text("[task]\n" + phases, encoding="utf-8")
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return ["--config", str(tmp_path / "run.toml"), *(part for one in overrides for part in ("--set", one))]


def _histories(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def _charges(out: Path) -> dict[str, list[tuple[int, int]]]:
    """Site → how often each round was charged."""
    found = {}
    for folder in sorted((out / "sites").iterdir()):
        with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
            found[folder.name] = db.execute("SELECT round, COUNT(*) FROM charges GROUP BY round").fetchall()
    return found


def test_a_simulation_killed_at_any_moment_resumes_to_the_same_result_and_is_charged_once(
    killer: Killer, settings: list[str], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    uninterrupted = killer.attempt("simulate", *settings, "--out", str(whole), below=whole)
    assert uninterrupted["code"] == 0
    first = 12  # before, there is no run to resume yet
    moments = [first + (uninterrupted["changes"] - first) * kill // KILLS for kill in range(KILLS)]
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        killed = killer.attempt("simulate", *settings, "--out", str(out), below=out, fatal=moment)
        assert killed["code"] == -signal.SIGKILL
        resumed = killer.attempt("simulate", "--resume", str(out), below=out)
        assert resumed["code"] == 0, killed
        for name in RESULT:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), killed
        assert _histories(out) == _histories(whole), killed
        assert _charges(out) == ONCE, killed
        assert not list((out / "rounds").iterdir()) and not list(out.glob("sites/*/secrets/*")), killed


def test_a_simulation_killed_again_and_again_still_comes_to_the_same_result(
    killer: Killer, settings: list[str], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert killer.attempt("simulate", *settings, "--out", str(whole), below=whole)["code"] == 0
    code, kills = killer.attempt("simulate", *settings, "--out", str(out), below=out, fatal=40)["code"], 1
    while code != 0:
        assert code == -signal.SIGKILL
        code, kills = (
            killer.attempt("simulate", "--resume", str(out), below=out, fatal=20 + 10 * kills)["code"],
            kills + 1,
        )
    assert kills > 4
    for name in RESULT:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert _charges(out) == ONCE


def test_an_interrupted_simulation_says_so_in_one_line_and_can_be_resumed(
    killer: Killer, settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*INTERRUPTIBLE, "simulate", *settings, "--set", "phase.lora.rounds=300", "--out", str(out)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    while not (out / "rounds.jsonl").exists() or len(_histories(out)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    assert stderr == "interrupted; what was finished is kept, continue with --resume\n"
    done = len(_histories(out))
    again = killer.attempt("simulate", "--resume", str(out), below=out, fatal=300)
    assert again["code"] == -signal.SIGKILL and len(_histories(out)) > done
