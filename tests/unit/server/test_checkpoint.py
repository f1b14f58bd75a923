"""The run's folder: whatever happens in between, it holds either the old or the new state, and resumes from it."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import OutputError
from server.checkpoint import SCHEMA_VERSION, Checkpoint, RunFolder, to_json, write_atomically

MANIFEST = {"schema_version": SCHEMA_VERSION, "run_id": "run-1", "plan_digest": "p" * 64}


def tensors(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"x.weight": generator.standard_normal((3, 2)).astype(np.float32), "y": np.zeros((0, 2), np.float32)}


def state(round: int, **changes: Any) -> Checkpoint:
    history = tuple(
        {"round": index, "phase": "head", "metrics": {"accuracy": 0.1 * index, "loss": math.pi / (index + 1)}}
        for index in range(round + 1)
    )
    aggregator = {f"adapter/{name}": array for name, array in tensors(round).items()}
    aggregator |= {f"velocity/{name}": array for name, array in tensors(round + 50).items()}
    found = Checkpoint(round, round + 1, "head", max(0, round - 1), history, aggregator, tensors(round + 100))
    return replace(found, **changes)


def same(left: Checkpoint | None, right: Checkpoint) -> bool:
    """Equal in every field; arrays bit for bit."""
    if left is None:
        return False
    for one in fields(Checkpoint):
        mine, other = getattr(left, one.name), getattr(right, one.name)
        if one.name in ("aggregator", "best"):
            if mine.keys() != other.keys():
                return False
            if not all(
                mine[k].tobytes() == other[k].tobytes()
                and mine[k].shape == other[k].shape
                and mine[k].dtype == np.float32
                for k in mine
            ):
                return False
        elif mine != other:
            return False
    return True


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "out", 'name = "x"\n', MANIFEST)


def contents(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


# ---- atomic writes --------------------------------------------------------------------------------------------------


def test_a_write_that_fails_on_the_way_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, b"old")

    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, failing, full)
            with pytest.raises(OutputError, match=r"state\.json: cannot be written \(No space left on device\)"):
                write_atomically(file, b"new")
        assert file.read_bytes() == b"old"
        assert contents(tmp_path) == {"state.json"}
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, move = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        calls.append("replace")
        move(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomically(tmp_path / "deep" / "file", b"x")
    assert calls == ["file", "replace", "folder"]


def test_json_can_be_parsed_by_any_reader() -> None:
    content = to_json({"loss": float("nan"), "list": (1, float("inf"), np.float32(0.5)), 3: "später"})
    assert json.loads(content, parse_constant=lambda _: pytest.fail("not JSON")) == {
        "loss": None,
        "list": [1, None, 0.5],
        "3": "später",
    }
    assert "später".encode() in content


# ---- a folder for one run -------------------------------------------------------------------------------------------


def test_a_folder_that_already_holds_a_run_is_refused_untouched(folder: RunFolder) -> None:
    before = {name: (folder.path / name).read_bytes() for name in contents(folder.path)}
    for attempt in (folder.refuse_other_run, lambda: RunFolder.create(folder.path, "other", {"run_id": "run-2"})):
        with pytest.raises(OutputError, match=r"already holds a run \(run\.toml\); give a new folder, or --resume"):
            attempt()
    assert {name: (folder.path / name).read_bytes() for name in contents(folder.path)} == before


@pytest.mark.parametrize("name", ["run.toml", "manifest.json", "rounds.jsonl"])
def test_any_trace_of_a_run_makes_a_folder_another_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match=f"already holds a run \\({name}\\)"):
        RunFolder.create(tmp_path, "", MANIFEST)
    assert contents(tmp_path) == {name}


def test_a_folder_with_other_files_can_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    RunFolder.create(tmp_path, "", MANIFEST)
    assert contents(tmp_path) == {"notes.txt", "run.toml", "manifest.json"}


def test_a_path_that_cannot_become_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; give a new folder"):
        RunFolder.create(tmp_path / "file", "", MANIFEST)
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\)"):
        RunFolder.create(tmp_path / "file" / "out", "", MANIFEST)


def test_there_is_nothing_to_resume_where_no_run_is(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OutputError, match=r"holds no run \(manifest\.json or run\.toml is missing\)"):
            RunFolder(path).manifest()
    assert RunFolder(tmp_path).latest() is None


def test_the_manifest_is_read_back_and_a_newer_or_damaged_one_refused(folder: RunFolder) -> None:
    assert folder.manifest() == MANIFEST
    (folder.path / "manifest.json").write_text(json.dumps({**MANIFEST, "schema_version": 99}), encoding="utf-8")
    with pytest.raises(OutputError, match="was written by a newer version; update this installation"):
        folder.manifest()
    for damaged in ("", "{", "[1]", "7", "\x00"):
        (folder.path / "manifest.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(OutputError, match=r"manifest\.json is damaged"):
            folder.manifest()


# ---- between rounds -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_back_equal_in_every_field(folder: RunFolder) -> None:
    for round in range(3):
        folder.save(state(round))
        assert same(RunFolder(folder.path).latest(), state(round))


def test_a_metric_that_is_not_a_number_is_still_none_after_resuming(folder: RunFolder) -> None:
    history = ({"round": 0, "phase": "base", "metrics": {"loss": float("nan"), "accuracy": 0.5}},)
    folder.save(state(0, history=history))
    again = folder.latest()
    assert again is not None
    metrics = again.history[0]["metrics"]
    assert math.isnan(metrics["loss"]) and metrics["accuracy"] == 0.5


def test_only_the_current_checkpoint_is_kept_and_the_closed_round_is_tidied_away(folder: RunFolder) -> None:
    folder.save(state(0))
    folder.store_cohort(1, ("a", "b"))
    folder.store_reply(1, "a", "digest", tensors(0))
    folder.store_outcome(1, {"admitted": ["a"]})
    folder.store_cohort(2, ("a",))
    folder.save(state(1))
    assert contents(folder.path) == {
        "run.toml",
        "manifest.json",
        "rounds.jsonl",
        "checkpoint/LATEST",
        "checkpoint/1/state.json",
        "checkpoint/1/state.safetensors",
        "rounds/2/cohort.json",
    }
    lines = (folder.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(state(1).history)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_killed_anywhere_while_saving_the_folder_holds_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write, rename and removal is once the last thing that happens."""
    steps = 0
    while True:
        folder = RunFolder.create(tmp_path / str(steps), "", MANIFEST)
        folder.save(state(0))
        folder.store_reply(1, "a", "digest", tensors(0))
        left = steps
        with monkeypatch.context() as patch:

            def counted(name: str, patch: pytest.MonkeyPatch = patch) -> None:
                module = shutil if name == "rmtree" else os
                real = getattr(module, name)

                def step(*arguments: Any, **keywords: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise Killed
                    left -= 1
                    return real(*arguments, **keywords)

                patch.setattr(module, name, step)

            for name in ("fsync", "replace", "rmtree"):
                counted(name)
            try:
                folder.save(state(1))
            except Killed:
                pass
            else:
                break
        found = RunFolder(folder.path).latest()
        assert same(found, state(0)) or same(found, state(1)), steps
        if same(found, state(0)):  # then the round goes on with the reply that was admitted
            assert folder.replies(1) == {"a"}
        folder.save(state(1))  # and whatever was left behind is no hindrance
        assert same(folder.latest(), state(1))
        steps += 1
    assert steps > 10


def test_a_checkpoint_of_a_newer_version_is_refused(folder: RunFolder) -> None:
    folder.save(state(1))
    file = folder.path / "checkpoint" / "1" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 99}), encoding="utf-8")
    with pytest.raises(OutputError, match="its checkpoint was written by a newer version; update"):
        folder.latest()


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_is_one_message(folder: RunFolder, name: str, damage: str) -> None:
    folder.save(state(1))
    file = folder.path / "checkpoint" / "1" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"")
    with pytest.raises(
        OutputError, match=r"checkpoint/1 is damaged .*; restore the folder from a copy, or start a new"
    ):
        folder.latest()


# ---- inside a round -------------------------------------------------------------------------------------------------


def test_what_is_stored_inside_a_round_is_read_back(folder: RunFolder) -> None:
    assert folder.cohort(4) is None and folder.outcome(4) is None and folder.replies(4) == set()
    folder.store_cohort(4, ("north", "south.v2"))
    folder.store_reply(4, "south.v2", "digest", {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    outcome = {"cohort": ["north", "south.v2"], "admitted": ["south.v2"], "rejected": {"north": "late"}}
    folder.store_outcome(4, outcome)
    again = RunFolder(folder.path)
    assert again.cohort(4) == ("north", "south.v2")
    assert again.replies(4) == {"south.v2"}
    assert again.reply(4, "south.v2")["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert again.outcome(4) == outcome
    assert again.cohort(5) is None


# ---- heads of the sites' audit logs ---------------------------------------------------------------------------------


def forced_by(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Name of whatever is forced to the disk, and what a file holds at that moment, in order."""
    order: list[tuple[str, bytes]] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append((path.name, path.read_bytes() if path.is_file() else b""))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        action()
    return order


def test_a_head_is_on_disk_before_the_call_returns_and_the_first_ones_file_too(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = b'["north", "head 1"]\n', b'["south", "head 2"]\n'
    forced = forced_by(lambda: folder.add_head("north", "head 1"), monkeypatch)
    assert forced == [("heads.jsonl", first), ("out", b"")]
    forced = forced_by(lambda: folder.add_head("south", "head 2"), monkeypatch)
    assert forced == [("heads.jsonl", first + second)]


def test_in_a_simulation_a_head_is_written_and_not_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "out", "", MANIFEST, durable=False)
    assert forced_by(lambda: folder.add_head("north", "head 1"), monkeypatch) == []
    assert RunFolder(folder.path).heads() == {"north": "head 1"}


def test_the_newest_head_of_each_site_wins(folder: RunFolder) -> None:
    assert folder.heads() == {}
    for site, head in (("north", "head 1"), ("south", "head 1"), ("north", "head 2"), ("north", "head 3")):
        folder.add_head(site, head)
    assert RunFolder(folder.path).heads() == {"north": "head 3", "south": "head 1"}


def test_a_torn_last_head_is_ignored_wherever_it_was_cut_and_the_next_one_counts(folder: RunFolder) -> None:
    folder.add_head("north", "head 1")
    file = folder.path / "heads.jsonl"
    whole = file.read_bytes()
    folder.add_head("north", "head 2")
    line = file.read_bytes()[len(whole) :]
    for kept in range(len(line)):  # all but the end of the line is the whole of it
        file.write_bytes(whole + line[:kept])
        assert folder.heads() == {"north": "head 2" if kept == len(line) - 1 else "head 1"}
        folder.add_head("south", "head 7")
        folder.add_head("north", "head 3")
        assert folder.heads() == {"north": "head 3", "south": "head 7"}
