"""Full disks, read-only disks, busy files and second agents: one clear message, and nothing half done."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from small_ledgers import approved, fund, open_ledger, receive

from client.privacy import ledger_file
from client.privacy.ledger import Decision, Ledger
from common.errors import LedgerError

REPOSITORY = Path(__file__).parents[3]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def on_a_small_disk(folder: Path, script: str) -> str:
    """Runs a script with a disk of its own of 1 MiB mounted at ``folder``, which ends with it; returns its output.

    The script finds ``disk``, ``elsewhere`` (which is not on that disk) and what these tests import.
    """
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk for a test")
    (folder / "disk").mkdir()
    start = (
        "import os, subprocess, sys\n"
        "from contextlib import closing\n"
        "from pathlib import Path\n"
        "sys.path += ['tests/unit/client', 'tests']\n"
        "from small_ledgers import *\n"
        "from client.privacy.ledger import *\n"
        "from common.errors import LedgerError\n"
        f"disk, elsewhere = Path({str(folder / 'disk')!r}), Path({str(folder)!r})\n"
        "def mount(*options):\n"
        "    subprocess.run(['mount', *options, str(disk)], check=True)\n"
        "mount('-t', 'tmpfs', '-o', 'size=1m', 'tmpfs')\n"
        "def fill():\n"
        "    with open(disk / 'filler', 'ab', buffering=0) as stream:\n"
        "        for size in (4096, 512, 1):\n"
        "            try:\n"
        "                while stream.write(b'x' * size): pass\n"
        "            except OSError: pass\n"
    )
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", start + script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL_DISK = """
ledger = approved(open_ledger(disk / "state", counter=elsewhere / "counter"))
def told(action):
    try:
        action()
    except LedgerError as error:
        assert "\\n" not in str(error)
        return str(error)
    raise AssertionError("it was stored")
running = fund(ledger)
receive(ledger, "waiting")
fill()
before = (ledger.sequence, ledger.charges("plan"), secrets_in(disk / "state"))
for action in (
    lambda: ledger.record(running, b"x" * 500_000),
    lambda: fund(ledger, 2),
    lambda: ledger.approve("waiting"),
    lambda: ledger.block("a test"),
    lambda: receive(ledger, "another"),
):
    print(told(action))
    assert (ledger.sequence, ledger.charges("plan"), secrets_in(disk / "state")) == before
print(told(lambda: open_ledger(disk / "fresh")))
ledger.close()
(disk / "filler").unlink()
with closing(open_ledger(disk / "state", counter=elsewhere / "counter")) as ledger:
    assert (ledger.sequence, ledger.charges("plan"), secrets_in(disk / "state")) == before
    ledger.record(fund(ledger), b"release")
    fund(ledger, 2)
    assert ledger.approve("waiting") is Decision.APPROVED
"""


def test_on_a_full_disk_nothing_is_stored_half_and_all_goes_on_once_there_is_space(tmp_path: Path) -> None:
    messages = on_a_small_disk(tmp_path, FULL_DISK).splitlines()
    assert len(messages) == 6
    for message in messages:
        assert message.startswith(("ledger ", "secrets of rounds ")), message
        assert "free some space" in message or "not full" in message or "some free space" in message, message


READ_ONLY = """
with closing(approved(open_ledger(disk / "state", counter=elsewhere / "counter"))): pass
mount("-o", "remount,ro")
try:
    open_ledger(disk / "state", counter=elsewhere / "counter")
except LedgerError as error:
    print(error)
"""


def test_a_read_only_ledger_is_told_with_its_remedy(tmp_path: Path) -> None:
    message = on_a_small_disk(tmp_path, READ_ONLY)
    assert message.count("\n") == 1 and "give the site's user" in message and "write access" in message


def test_a_ledger_that_another_process_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "PATIENCE", 0.05)
    with closing(open_ledger(tmp_path)) as ledger, closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        receive(ledger)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"another process has held it .*; try again when that one is done"):
            ledger.approve("plan")
        other.rollback()
        assert ledger.approve("plan") is Decision.APPROVED


def test_a_folder_in_the_way_of_the_ledger_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(LedgerError, match=r"cannot be opened; give the site's user .* \(File exists\)"):
        Ledger(tmp_path / "state")
    (tmp_path / "other" / "ledger.sqlite").mkdir(parents=True)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "other")


# ----------------------------------------------------------------------------------------------------------- two agents

AGENT = """
import sys
from pathlib import Path
from client.privacy.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
with ledger.serve_alone():
    print("serves", flush=True)
    sys.stdin.readline()
ledger.close()
"""


def test_a_second_agent_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    with closing(open_ledger(tmp_path)) as ledger:
        for end in ("killed", "stopped"):
            first = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(tmp_path)],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert first.stdout is not None and first.stdout.readline() == "serves\n"
            with pytest.raises(LedgerError, match=rf"an agent or a withdrawal uses it \(process {first.pid}\)"):
                ledger.serve_alone().__enter__()
            fund(approved(ledger, end), plan=end)  # a person's commands work beside it
            if end == "killed":
                first.kill()
            output, _ = first.communicate("stop\n" if end == "stopped" else None, timeout=30)
            assert (output, first.returncode) == ("", 0 if end == "stopped" else -signal.SIGKILL)
            with ledger.serve_alone():
                assert (tmp_path / "agent.lock").read_text().strip() == str(os.getpid())


def test_an_agent_of_the_same_process_is_a_second_one_too(tmp_path: Path) -> None:
    with closing(open_ledger(tmp_path)) as first, closing(Ledger(tmp_path)) as second, first.serve_alone():
        with pytest.raises(LedgerError, match="stop that one first"), second.serve_alone():
            pass
        with pytest.raises(LedgerError, match="stop that one first"), first.serve_alone():
            pass
