"""A file is there after a power cut only if its content and its name were forced to the disk, in this order."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from common.durable import put, sync_folder


def test_content_is_on_disk_before_it_gets_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, Any]] = []
    move = os.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(("folder", path) if path.is_dir() else ("content", path.read_bytes()))

    def replace(source: Path, target: Path) -> None:
        order.append(("name", target))
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    put(tmp_path / "file", b"new", 0o600)
    assert order == [("content", b"new"), ("name", tmp_path / "file"), ("folder", tmp_path)]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    sync_folder(tmp_path)
    assert order[-1] == ("folder", tmp_path)


def test_what_a_crash_left_of_an_earlier_attempt_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"half of an older and longer content")
    put(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def test_where_it_cannot_be_stored_the_old_content_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        put(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
