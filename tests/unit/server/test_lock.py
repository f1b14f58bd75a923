"""One coordinator per folder, and how the others know."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from server.lock import RunLock

HOLD = """
import pathlib, sys, time
from server.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])).hold(77):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_nobody_works_in_has_no_holder(tmp_path: Path) -> None:
    assert RunLock(tmp_path / "missing").holder() is None
    with RunLock(tmp_path).hold(1):
        pass
    assert RunLock(tmp_path).holder() is None


def test_the_holder_is_known_by_its_flower_run(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new").hold(14319675979018060946):
        assert RunLock(tmp_path / "new").holder() == 14319675979018060946


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, encoding="utf-8"
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert RunLock(tmp_path).holder() == 77
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert RunLock(tmp_path).holder() is None


def test_a_second_coordinator_waits_for_the_first(tmp_path: Path) -> None:
    order = []
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def second() -> None:
        first_is_in.wait()
        with RunLock(tmp_path).hold(2):
            order.append("second")
            second_is_in.set()

    thread = threading.Thread(target=second)
    thread.start()
    with RunLock(tmp_path).hold(1):
        first_is_in.set()
        assert not second_is_in.wait(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
