"""Stored replies are read tensor by tensor, without a copy, and a damaged one is told."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import OutputError
from common.messages import joined
from server.checkpoint import RunFolder
from server.spill import SpilledReply

UPDATE = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, -0.0], np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
METRICS = {"loss": 0.25, "accuracy": 0.5}


@pytest.fixture
def stored(tmp_path: Path) -> SpilledReply:
    folder = RunFolder(tmp_path)
    folder.store_reply(3, "north", "d" * 64, joined(UPDATE, METRICS))
    return folder.reply(3, "north")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_holds_what_another_reader_of_the_format_finds(stored: SpilledReply) -> None:
    expected = load_file(stored.path)
    assert list(stored) == sorted(expected) and len(stored) == len(expected)
    for name, array in expected.items():
        assert stored[name].dtype == array.dtype and stored[name].shape == array.shape
        assert stored[name].tobytes() == array.tobytes()
    assert stored.nbytes == sum(array.nbytes for array in expected.values())


def test_update_and_metrics_come_apart(stored: SpilledReply) -> None:
    update, metrics = stored.parted()
    assert metrics == METRICS
    assert sorted(update) == sorted(UPDATE) and len(update) == len(UPDATE)
    assert all(np.array_equal(update[name], array) for name, array in UPDATE.items())
    with pytest.raises(KeyError):
        update["metrics/loss"]


def test_a_tensor_is_a_view_of_the_file_that_nobody_can_change(stored: SpilledReply) -> None:
    array = stored["b.weight"]
    assert not array.flags.owndata and not array.flags.writeable
    with stored.path.open("r+b") as file:  # what the file becomes, the view becomes
        content = stored.path.read_bytes()
        file.seek(content.index(np.float32(5).tobytes(), len(content) - stored.nbytes))
        file.write(np.float32(7).tobytes())
    assert array[1, 2] == 7


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_a_file_is_open_only_while_one_of_its_tensors_is_held(stored: SpilledReply) -> None:
    before = open_files()
    held = [stored["a"], stored["b.weight"], stored["a"][:1]]
    assert open_files() == before + 1
    del held
    assert open_files() == before


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_reply_that_was_cut_is_told_with_the_remedy(stored: SpilledReply, keep: int) -> None:
    stored.path.write_bytes(stored.path.read_bytes()[:keep])
    with pytest.raises(OutputError, match=r"north\.safetensors: is damaged or gone .* and --resume"):
        SpilledReply(stored.path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [2]}}', b"\xff"])
def test_a_header_of_another_form_is_told(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "north.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(OutputError, match="is damaged or gone"):
        SpilledReply(file)


def test_a_reply_that_is_gone_is_told_also_after_it_was_opened(stored: SpilledReply) -> None:
    stored.path.unlink()
    with pytest.raises(OutputError, match="is damaged or gone"):
        stored["a"]
    with pytest.raises(OutputError, match="is damaged or gone"):
        SpilledReply(stored.path)


def test_holding_many_replies_takes_next_to_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for site in range(100):
        folder.store_reply(1, f"s{site}", "d", {"x": np.zeros((100, 1000), np.float32)})
    before = open_files()
    tracemalloc.start()
    try:
        held = [folder.reply(1, f"s{site}") for site in range(100)]
        total = sum(float(reply["x"][0, 0]) for reply in held)
        assert total == 0.0 and tracemalloc.get_traced_memory()[1] < 400_000  # one of them is that large
    finally:
        tracemalloc.stop()
    assert open_files() == before
