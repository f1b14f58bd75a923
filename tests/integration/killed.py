"""Runs ``consilium`` with arguments again and again, and kills it before its n-th change to a file below a folder.

A program of its own, started by a test: the libraries are imported once, and each attempt is a fork of it. Reads one
JSON object a line from stdin, ``{"arguments": [...], "below": FOLDER, "fatal": N or null}``, and answers with one,
``{"code": exit code, "changes": how many there were, "at": what the last of them was}``; -9 is a SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

import torch

import consilium
import simulations.simulate  # noqa: F401

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    """Answers until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _attempt(request["arguments"], request["below"], request["fatal"], writer)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, encoding="utf-8") as stream:
            *_, last = [{"changes": 0, "at": ""}, *map(json.loads, stream)]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **last}), flush=True)


def _attempt(arguments: list[str], below: str, fatal: int | None, writer: int) -> NoReturn:
    changes = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
            return
        path = str(details[1] if event == "os.rename" else details[0])
        if not path.startswith(below) or (event == "open" and not details[2] & WRITES):
            return
        changes += 1
        os.write(writer, (json.dumps({"changes": changes, "at": f"{event} {path[len(below) :]}"}) + "\n").encode())
        if changes == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = ["consilium", *arguments]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        consilium.main()
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    os._exit(0)


if __name__ == "__main__":
    main()
