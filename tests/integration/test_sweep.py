"""`consilium sweep` and `consilium compare` as a user calls them: real processes, killed and continued."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from agents import ENVIRONMENT, PROGRAM
from safetensors.numpy import load_file

import consilium
import simulations.sweep_cli
from common.config import RunConfig
from common.toml_settings import apply_overrides, read_toml, validate
from server.watcher import Silent
from simulations.simulate import simulate

LABELS = ["urgent", "routine", "review"]
CELLS = ("epsilon-8_seed-0", "epsilon-none_seed-0", "epsilon-8_seed-1", "epsilon-none_seed-1")
ROUNDS = 10

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_toml(tmp_path: Path, tiny_bert: Path, triage_data: Path) -> Path:
    """Settings of a small run: three sites, one phase."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
[model]
name = "{tiny_bert}"
[task]
labels = {json.dumps(LABELS)}
max_length = 32
[data]
path = "{triage_data}"
site_column = "hospital"
[lora]
r = 4
layers = 1
[[phase]]
name = "lora"
rounds = {ROUNDS}
sample_rate = 0.5
train = ["head", "lora"]
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `consilium` in this process: exit code, stdout, stderr. No child of its own may be left."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(simulations.sweep_cli, "_cores", lambda: 1)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        before = set(psutil.Process().children())
        try:
            consilium.main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code or 0
        assert set(psutil.Process().children()) <= before
        output = capsys.readouterr()
        return int(code), output.out, output.err

    return call


@contextmanager
def unwatched(title: str, rounds: int) -> Iterator[Silent]:
    yield Silent()


def adapter_of(folder: Path) -> Mapping[str, Any]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def finished_rounds(folder: Path) -> int:
    with suppress(OSError):
        return len((folder / "rounds.jsonl").read_text().splitlines())
    return 0


def test_a_killed_sweep_leaves_no_process_and_continues_to_what_single_runs_give(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    arguments = [
        "sweep",
        "--config",
        str(run_toml),
        "--over",
        "privacy.epsilon=8,none",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [str(PROGRAM), *arguments, "--jobs", "2"],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),  # one thread each
    )
    folders = {name: out / "cells" / name for name in CELLS}

    def amid() -> list[str]:
        return [name for name, folder in folders.items() if 3 <= finished_rounds(folder) < ROUNDS - 2]

    def done() -> list[str]:
        return [name for name, folder in folders.items() if (folder / "summary.json").exists()]

    while not (done() and amid()):
        assert process.poll() is None and len(done()) < len(CELLS)
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 2 and not alive
    assert 0 < len(done()) < len(CELLS) and not (out / "sweep.json").exists()
    before = {name: (folders[name] / "summary.json").stat().st_mtime_ns for name in done()}

    code, stdout, stderr = command(*arguments, "--json")
    assert code == 0, stderr
    content = json.loads(stdout)
    assert {name: (folders[name] / "summary.json").stat().st_mtime_ns for name in before} == before
    assert [row["cell"] for row in content["cells"]] == list(CELLS)
    base = read_toml(run_toml)
    for row in content["cells"]:
        if row["cell"] in before:
            continue
        mechanism = "dp-sgd" if "epsilon-8" in row["cell"] else "none"
        seeds = [f"{key}={row['seed']}" for key in ("run.seed", "simulation.seed")]
        config = validate(RunConfig, apply_overrides(base, [f"privacy.mechanism={mechanism}", *seeds]), "")
        alone = simulate(config, tmp_path / "alone" / row["cell"], False, unwatched)
        assert row["best_round"] == alone["best_round"]
        for split in ("validation", "test"):
            expected = {name: value for name, value in alone[split].items() if name != "examples"}
            assert row[split] == pytest.approx(expected, nan_ok=True)
        here, there = (adapter_of(folder) for folder in (folders[row["cell"]], tmp_path / "alone" / row["cell"]))
        assert all(np.array_equal(here[name], there[name]) for name in there), row["cell"]
        answers = json.loads((folders[row["cell"]] / "answers.json").read_text())
        assert answers["split"] == "test" and np.mean(answers["right"]) == pytest.approx(row["test"]["accuracy"])
    _says_what_it_cost(content, out)
    _is_refused_or_left_alone(command, arguments, out)


def _says_what_it_cost(content: Mapping[str, Any], out: Path) -> None:
    """ε of each run is marked, and that of all of them stands beside it; all files are there."""
    composed = content["privacy"]["composed"]
    assert (composed["runs"], composed["private_runs"], composed["infinite"]) == (4, 2, True)
    epsilons = [row["epsilon"] for row in content["cells"]]
    assert all(7.9 < epsilons[index] <= 8.0 for index in (0, 2)) and epsilons[1] is epsilons[3] is None
    assert composed["private_epsilon"] > 9
    said = (out / "sweep.md").read_text()
    assert "selection not charged" in said and f"{composed['private_epsilon']:.3f}" in said and "infinite" in said
    values = [row["test"]["accuracy"] for row in content["cells"] if row["choices"] == {"privacy.epsilon": "8"}]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert f"{mean:.4f} ± {spread:.4f}" in said
    assert len(list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))) == 4
    for name in ("frontier", "convergence"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / f"{name}.svg").read_text()


def _is_refused_or_left_alone(command: Command, arguments: list[str], out: Path) -> None:
    """A finished sweep is read again without a run; one with other settings is refused, and what differs is named."""
    held = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}
    code, stdout, _ = command(*arguments)
    assert code == 0 and "selection not charged" in stdout and "Composed over all 4 runs" in stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()} == held
    code, stdout, stderr = command(*arguments, "--set", "lora.r=8")
    assert (code, stdout) == (2, "") and "lora.r was 4 and is 8" in stderr
    fewer = [one.replace("8,none", "8") for one in arguments]
    code, stdout, stderr = command(*fewer)
    assert (code, stdout) == (2, "") and "'epsilon-none_seed-0', which this command leaves out" in stderr
    code, stdout, _ = command(*[one if one != "2" else "3" for one in arguments], "--dry-run")
    assert code == 0 and stdout.count("(finished)") == 4 and "6 runs, 2 of them left" in stdout
    code, stdout, _ = command("compare", out, out)
    assert code == 0 and "n = 4, difference +0.0000 in every pair" in stdout
    code, stdout, _ = command("compare", out / "cells" / CELLS[0], out / "cells" / CELLS[1])
    assert code == 0 and "30 examples: " in stdout and "not the seed: another one may turn it round" in stdout
    code, _, stderr = command("compare", out, out / "cells" / CELLS[1])
    assert code == 2 and "compare two of one kind" in stderr


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others_and_ctrl_c_keeps_what_was_finished(
    command: Command, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    arguments = ["sweep", "--config", run_toml, "--over", "phase.batch_size=5,1000,6", "--set", "phase.rounds=6"]
    with monkeypatch.context() as interrupting:

        def interrupt(bar: object, cell: object, event: Mapping[str, Any]) -> None:
            if event["event"] == "round" and event["round"] == 2:
                raise KeyboardInterrupt

        interrupting.setattr(simulations.sweep_cli._Bar, "heard", interrupt)
        code, stdout, stderr = command(*arguments, "--out", out)
    assert (code, stdout) == (130, "") and "continue with the same command" in stderr
    assert finished_rounds(out / "cells" / "batch_size-5_seed-0") >= 3
    code, stdout, stderr = command(*arguments, "--out", out)
    assert code == 3 and "1 of 3 runs failed: batch_size-1000_seed-0 (phase.lora: an expected batch" in stderr
    rows = json.loads((out / "sweep.json").read_text())["cells"]
    assert [row["status"] for row in rows] == ["completed", "failed", "completed"]
    assert "Composed over the 2 of 3 runs started" in stdout and not (out / "frontier.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--over", "privacy.epsilom=1,2"], "did you mean 'epsilon'?"),
        pytest.param(
            ["--over", "privacy.epsilon=1,2", "--set", "data.path=missing.csv"], "missing.csv", marks=pytest.mark.slow
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    command: Command, run_toml: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, stdout, stderr = command("sweep", "--config", run_toml, *arguments, "--out", tmp_path / "out")
    assert (code, stdout) == (2, "") and said in stderr and stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(command: Command, run_toml: Path, tmp_path: Path) -> None:
    arguments = ["--over", "server.algorithm=ffa,fedsvd", "--seeds", "2", "--out", tmp_path / "out", "--dry-run"]
    code, stdout, _ = command("sweep", "--config", run_toml, *arguments)
    assert code == 0 and stdout.splitlines()[0] == "algorithm-ffa_seed-0" and "4 runs, 4 of them left" in stdout
    assert not (tmp_path / "out").exists()
