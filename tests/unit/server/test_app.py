"""The ServerApp as Flower calls it, over sites in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import server.app as server_app
from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError
from common.signing import SigningKey
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.lock import RunLock
from server.settings import Submission

FLOWER_RUN = 7


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Calls the ServerApp with a submission for ``tmp_path / "out"``, as Flower does."""
    monkeypatch.setattr(server_app, "set_up_logging", lambda *_, **__: None)
    SigningKey.create(tmp_path / "key.pem")
    tables = {"task": {"labels": ["a", "b"]}, "server": {"signing_key": tmp_path / "key.pem"}}
    config = validate(RunConfig, tables, "test")

    def run(resume: bool = False) -> None:
        submission = Submission("run-1", str(tmp_path / "out"), resume, config.model_dump_json())
        context: Any = SimpleNamespace(run_config={"config": submission.to_json()}, run_id=FLOWER_RUN)
        server_app.main(SimpleNamespace(), context)

    yield run


def _report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "error.json").read_text()))


def test_a_named_error_is_reported_in_the_folder_with_its_exit_code(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise ConfigError("lora.layers = 99: the model has only 4 layers")

    monkeypatch.setattr(server_app, "prepare", wrong)
    with pytest.raises(ConsiliumError):
        call()
    assert _report(tmp_path / "out") == {"message": "lora.layers = 99: the model has only 4 layers", "exit_code": 2}
    assert RunLock(tmp_path / "out").holder() is None
    RunFolder(tmp_path / "out").refuse_other_run()  # nothing there keeps a run from being started


def test_an_unexpected_error_is_reported_as_a_failed_run_with_where_to_look(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()
    report = _report(tmp_path / "out")
    assert report["exit_code"] == 3
    assert "ZeroDivisionError" in report["message"] and f"flwr log {FLOWER_RUN}" in report["message"]


def test_the_folder_is_held_while_the_run_is_worked_on(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders = []
    monkeypatch.setattr(server_app, "coordinate", lambda *_: holders.append(RunLock(tmp_path / "out").holder()))
    call()
    assert holders == [FLOWER_RUN]


def test_a_coordinator_that_waited_for_another_does_not_repeat_a_finished_run(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated: list[object] = []
    monkeypatch.setattr(server_app, "coordinate", lambda *_: repeated.append(1))
    second = threading.Thread(target=call)
    with RunLock(tmp_path / "out").hold(1):
        second.start()
        (tmp_path / "out" / "summary.json").write_text("{}")
    second.join()
    assert repeated == []


def test_another_plan_cannot_take_over_a_run(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.create(tmp_path / "out", "", {"run_id": "run-1", "plan_digest": "old", "schema_version": 1})
    prepared = SimpleNamespace(plan=SimpleNamespace(digest=lambda: "new"))
    monkeypatch.setattr(server_app, "prepare", lambda *_: prepared)
    with pytest.raises(ConsiliumError, match="started with other settings"):
        call(resume=True)
    assert "other settings" in _report(tmp_path / "out")["message"]


def test_what_a_deployment_receives_is_forced_to_the_disk_whether_new_or_resumed(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation may lose what sites would send again; a deployment's folder is the only witness of their heads."""
    folders: list[RunFolder] = []

    def coordinator(*arguments: Any, **_: Any) -> Any:
        folders.extend(one for one in arguments if isinstance(one, RunFolder))
        return SimpleNamespace(run=lambda initial: SimpleNamespace(adapter={}))

    plan = SimpleNamespace(digest=lambda: "p")
    prepared = SimpleNamespace(plan=plan, config=None, model=None, evaluator=None, initial={})
    monkeypatch.setattr(server_app, "prepare", lambda *_: prepared)
    monkeypatch.setattr(server_app, "resolved_toml", lambda config: "")
    monkeypatch.setattr(server_app, "manifest", lambda *_: {"run_id": "run-1", "plan_digest": "p", "schema_version": 1})
    monkeypatch.setattr(server_app, "judge", lambda *_: None)
    monkeypatch.setattr(server_app, "finish", lambda *_: None)
    monkeypatch.setattr(server_app, "Coordinator", coordinator)
    call()
    call(resume=True)
    assert [folder.durable for folder in folders] == [True, True]
