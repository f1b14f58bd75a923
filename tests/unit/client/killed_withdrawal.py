"""Withdraws again and again, and is killed before one of its changes to files below the site's folder.

A program of its own, started by a test: the libraries are imported once, and each attempt is a fork of it. Reads one
JSON object a line from stdin, ``{"config": FILE, "request": {...}, "fatal": ...}``, where ``fatal`` is the number of a
change, the beginning of its description, or null; answers with one, ``{"code": exit code, "changes": how many there
were, "at": what the last of them was}``; -9 is a SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.compute
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401

from client.config import read_site_config
from client.withdrawal import Request, withdraw

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.utime", "open"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    """Answers until stdin ends."""
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _attempt(Path(order["config"]), Request(**order["request"]), order["fatal"], writer)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, encoding="utf-8") as stream:
            *_, last = [{"changes": 0, "at": ""}, *map(json.loads, stream)]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **last}), flush=True)


def _attempt(config: Path, request: Request, fatal: int | str | None, writer: int) -> NoReturn:
    below, changes = str(config.parent), 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or not str(details[0]).startswith(below):
            return
        if event == "open" and not details[2] & WRITES:
            return
        changes += 1
        names = " ".join(str(one)[len(below) + 1 :] for one in details[:2] if str(one).startswith(below))
        at = f"{event} {names}"
        os.write(writer, (json.dumps({"changes": changes, "at": at}) + "\n").encode())
        if changes == fatal or (isinstance(fatal, str) and at.startswith(fatal)):
            os.kill(os.getpid(), signal.SIGKILL)

    settings = read_site_config(config)
    sys.addaudithook(watch)
    try:
        withdraw(settings, request, lambda intent: None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
