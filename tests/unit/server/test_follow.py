"""Submitting, following, resuming and interrupting a run, with the SuperLink played by the test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import server.follow as follow
from common.config import RunConfig
from common.errors import ConfigError, ConnectionFailed, ConsiliumError, OutputError, RunFailed
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.follow import run_deployment
from server.lock import RunLock
from server.progress import Bars
from server.settings import Submission, absolute, resolved_toml

FLOWER_RUN = 5
REPOSITORY = Path(__file__).parents[3]


class Watcher:
    """Remembers which rounds it was told of."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def round(self, record: Mapping[str, Any]) -> None:
        self.rounds.append(record["round"])


class SuperLink:
    """Stands in for submission, status and stop."""

    def __init__(self) -> None:
        self.submitted: list[Submission] = []
        self.stopped: list[int] = []
        self.begins: Callable[[Submission], None] = lambda submission: None
        self.status: Callable[[], str] = lambda: "running"

    def submit(self, superlink: object, text: str) -> int:
        self.submitted.append(Submission.from_json(text))
        self.begins(self.submitted[-1])
        return FLOWER_RUN


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    played = SuperLink()
    monkeypatch.setattr(follow, "submit", played.submit)
    monkeypatch.setattr(follow, "run_status", lambda link, run: played.status())
    monkeypatch.setattr(follow, "stop", lambda link, run: played.stopped.append(run))
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(follow, "signing_key", lambda config: None)
    return played


def _config(**server: Any) -> RunConfig:
    return validate(RunConfig, {"task": {"labels": ["a", "b"]}, "server": {"insecure": True, **server}}, "test")


def _run(out: Path, resume: bool = False, watcher: Watcher | None = None, **server: Any) -> dict[str, Any]:
    return run_deployment(_config(**server), out, resume, watcher or Watcher())  # type: ignore[arg-type]


def _made(out: Path, kind: str = "deployment") -> None:
    RunFolder.create(out, resolved_toml(absolute(_config())), {"run_id": "run-1", "kind": kind, "schema_version": 1})


def _finish(out: Path) -> None:
    (out / "rounds.jsonl").write_text("".join(json.dumps({"round": round}) + "\n" for round in range(3)))
    (out / "summary.json").write_text('{"status": "completed"}')


def test_a_run_is_submitted_with_its_settings_and_shown_to_its_end(superlink: SuperLink, tmp_path: Path) -> None:
    def begins(submission: Submission) -> None:
        _made(Path(submission.out))
        _finish(Path(submission.out))

    superlink.begins, watcher = begins, Watcher()
    assert _run(tmp_path / "out", watcher=watcher) == {"status": "completed"}
    (submission,) = superlink.submitted
    assert submission.run_id.startswith("consilium-") and not submission.resume
    assert submission.out == str(tmp_path / "out") and json.loads(submission.config)["server"]["insecure"]
    assert watcher.rounds == [0, 1, 2]


def test_rounds_that_were_not_evaluated_are_followed_too(superlink: SuperLink, tmp_path: Path) -> None:
    metrics: list[dict[str, float | None]] = [{"loss": 0.5}, {}, {"loss": None}, {"loss": 0.25}]
    records = [{"round": round, "metrics": measured} for round, measured in enumerate(metrics)]

    def begins(submission: Submission) -> None:
        _made(Path(submission.out))
        _finish(Path(submission.out))
        (Path(submission.out) / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))

    superlink.begins = begins
    stream = StringIO()
    with Bars("run", 3, Console(file=stream, force_terminal=True, width=120)) as bars:
        run_deployment(_config(), tmp_path / "out", False, bars)
        assert bars._progress.tasks[0].completed == 3
    assert "loss 0.250" in stream.getvalue()


def test_a_submission_that_fails_leaves_no_folder(superlink: SuperLink, tmp_path: Path) -> None:
    def unreachable(submission: Submission) -> None:
        raise ConnectionFailed("the SuperLink cannot be reached")

    superlink.begins = unreachable
    with pytest.raises(ConnectionFailed):
        _run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_before_the_run_began_is_told_and_leaves_no_folder(superlink: SuperLink, tmp_path: Path) -> None:
    def begins(submission: Submission) -> None:
        with RunLock(Path(submission.out)).hold(FLOWER_RUN):
            (Path(submission.out) / "error.json").write_text('{"message": "model: no such folder", "exit_code": 2}')

    superlink.begins = begins
    with pytest.raises(ConsiliumError, match="model: no such folder") as raised:
        _run(tmp_path / "out")
    assert raised.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_an_error_of_a_run_that_had_begun_keeps_its_folder(superlink: SuperLink, tmp_path: Path) -> None:
    def begins(submission: Submission) -> None:
        _made(Path(submission.out))
        (Path(submission.out) / "error.json").write_text('{"message": "too few replies", "exit_code": 3}')

    superlink.begins = begins
    with pytest.raises(RunFailed, match="too few replies") as raised:
        _run(tmp_path / "out")
    assert raised.value.exit_code == 3 and (tmp_path / "out" / "manifest.json").is_file()


def test_a_resumed_run_keeps_its_name_and_forgets_its_error(superlink: SuperLink, tmp_path: Path) -> None:
    _made(tmp_path)
    (tmp_path / "error.json").write_text('{"message": "too few replies", "exit_code": 3}')
    superlink.begins = lambda submission: _finish(tmp_path)
    assert _run(tmp_path, resume=True) == {"status": "completed"}
    assert superlink.submitted[0].run_id == "run-1" and superlink.submitted[0].resume


def test_a_finished_run_is_shown_and_not_submitted(superlink: SuperLink, tmp_path: Path) -> None:
    _made(tmp_path)
    _finish(tmp_path)
    watcher = Watcher()
    assert _run(tmp_path, resume=True, watcher=watcher) == {"status": "completed"}
    assert superlink.submitted == [] and watcher.rounds == [0, 1, 2]


def test_a_run_that_is_still_going_is_followed_and_not_submitted(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made(tmp_path)
    with RunLock(tmp_path).hold(FLOWER_RUN):
        with pytest.raises(OutputError, match="still going"):
            _run(tmp_path, resume=True, round_timeout=5.0)
        monkeypatch.setattr(follow, "_show", lambda *_: _finish(tmp_path))
        assert _run(tmp_path, resume=True) == {"status": "completed"}
    assert superlink.submitted == []


def test_a_coordinator_that_dies_is_noticed_and_can_be_resumed(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made(tmp_path)
    with ExitStack() as stack:
        stack.enter_context(RunLock(tmp_path).hold(FLOWER_RUN))
        looks = iter(range(100))
        monkeypatch.setattr(follow, "_show", lambda *_: stack.close() if next(looks) == 3 else 0)
        with pytest.raises(RunFailed, match=r"ended without a result; continue with --resume"):
            _run(tmp_path, resume=True)


def test_a_run_that_never_began_is_told_with_the_superlinks_reason(superlink: SuperLink, tmp_path: Path) -> None:
    superlink.status = lambda: "finished:failed: No module named 'torch'"
    with pytest.raises(RunFailed, match="No module named 'torch'"):
        _run(tmp_path / "out")


def test_a_superlink_that_is_away_for_a_moment_is_forgiven(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([ConnectionFailed("away"), ConnectionFailed("away"), "finished:failed: no"])

    def status() -> str:
        answer = next(answers)
        if isinstance(answer, ConnectionFailed):
            raise answer
        return str(answer)

    superlink.status = status
    with pytest.raises(RunFailed, match="finished:failed: no"):
        _run(tmp_path / "out")
    monkeypatch.setattr(follow, "LOST_SECONDS", 0.0)
    answers = iter([ConnectionFailed("away for good")])
    with pytest.raises(ConnectionFailed, match="away for good"):
        _run(tmp_path / "out")


def test_a_superlink_that_goes_away_while_the_run_is_worked_on_is_told_once_and_when_it_is_back(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _made(tmp_path)
    monkeypatch.setattr(follow, "REACH_SECONDS", 0.0)
    looks = iter(["there", "away", "away", "there", "there"])

    def connect(*_: object, **__: object) -> socket.socket:
        look = next(looks, None)
        if look is None:
            _finish(tmp_path)
        if look == "away":
            raise ConnectionRefusedError
        return socket.socket()

    monkeypatch.setattr("server.follow.socket.create_connection", connect)
    with RunLock(tmp_path).hold(FLOWER_RUN):
        assert _run(tmp_path, resume=True) == {"status": "completed"}
    assert [record.getMessage().split(" ", 4)[4] for record in caplog.records] == [
        "cannot be reached; the run waits for it",
        "is back",
    ]


def test_an_interrupt_stops_the_run_at_the_superlink(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "_show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out")
    assert superlink.stopped == [FLOWER_RUN]


def test_folders_that_cannot_take_the_run_are_refused(superlink: SuperLink, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        _run(tmp_path, resume=True)
    with RunLock(tmp_path).hold(9), pytest.raises(OutputError, match="being prepared"):
        _run(tmp_path)
    _made(tmp_path / "simulated", kind="simulation")
    with pytest.raises(OutputError, match="consilium simulate --resume"):
        _run(tmp_path / "simulated", resume=True)
    with pytest.raises(OutputError, match="already holds a run"):
        _run(tmp_path / "simulated")
    assert superlink.submitted == []


def test_paths_are_made_absolute_where_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "held-out", "minilm"):
        (tmp_path / name).mkdir()
    (tmp_path / "ca.pem").write_text("certificate")
    tables = {
        "task": {"labels": ["a", "b"]},
        "model": {"name": "model"},
        "data": {"path": "owner/data-set"},
        "evaluation": {"path": "held-out"},
        "server": {"root_certificates": "ca.pem"},
        "simulation": {"cache": "kept/here"},
    }
    config = absolute(validate(RunConfig, tables, "test"))
    assert config.model.name == str(tmp_path / "model") and config.evaluation.path == str(tmp_path / "held-out")
    assert config.server.root_certificates == tmp_path / "ca.pem" and config.data.path == "owner/data-set"
    assert config.simulation.cache == tmp_path / "kept" / "here" and config.server.signing_key is None
    named = validate(RunConfig, {**tables, "model": {"name": "minilm"}}, "test")
    assert absolute(named).model.name == "minilm"  # the model of that name, whatever lies beside


def test_a_run_that_no_key_would_sign_is_not_submitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.signing_key: is missing"):
        _run(tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be read"):
        _run(tmp_path / "out", signing_key=str(tmp_path / "nowhere.pem"))
    assert not (tmp_path / "out").exists()


def test_following_a_run_needs_no_torch() -> None:
    """The command waits for hours beside the coordinator; what that one loads is no use to it."""
    source = "import sys, server.follow; print(sorted({'torch', 'transformers', 'flwr'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ran.stdout == "[]\n"
