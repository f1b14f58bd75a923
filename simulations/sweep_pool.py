"""Worker processes for the cells of a sweep. None outlives it, not even where it is killed."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import ConsiliumError, RunFailed
from simulations.sweep_grid import Cell

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Heard = Callable[[Cell, dict[str, Any]], None]
"""(cell, event): ``started``; ``round`` with ``round`` and ``rounds``; ``done``; ``failed`` with ``why``."""


class RefusedInput(ConsiliumError):
    """The very first cell does not fit its data, its model or its own settings."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[str]
    reader: threading.Thread | None = None
    cell: Cell | None = None
    resident: str = field(default="", repr=False)

    def order(self, order: str, cell: Cell, folder: Path) -> None:
        """Sends an order; a worker that is gone shows when it is read from."""
        self.cell, self.resident = cell, cell.resident
        assert self.process.stdin is not None
        content = {
            "order": order,
            "name": cell.name,
            "folder": str(folder),
            "config": cell.config.model_dump_json(),
            "resident": self.resident,
        }
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()


class Pool:
    """Runs cells in so many processes at a time.

    Args:
        jobs: processes.
        threads: of each process.
        folder: where the cells' folders are.
    """

    def __init__(self, jobs: int, threads: int, folder: Path) -> None:
        self.jobs, self.threads, self.folder = jobs, threads, folder
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends all workers at once: what they leave can be continued."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            if worker.reader is not None:
                worker.reader.join()
            for stream in (worker.process.stdin, worker.process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()

    def check(self, cell: Cell) -> None:
        """Has one worker load the cell's model and data and prepare its run, before anything is written.

        Raises:
            RefusedInput: they do not fit.
            RunFailed: the worker failed otherwise.
        """
        worker = self._start()
        worker.order("check", cell, self.folder / cell.name)
        _, event = self._events.get()
        if event is None:
            raise RunFailed(f"the first worker {_ended(worker)} while it loaded model and data")
        if event["event"] == "failed":
            raise RefusedInput(event["why"]) if event["code"] == 2 else RunFailed(event["why"])
        worker.cell = None

    def run(self, cells: Iterable[Cell], heard: Heard) -> None:
        """Runs all cells; one that fails does not keep the others from running."""
        pending = list(cells)
        while len(self._workers) < min(self.jobs, len(pending)):
            self._start()
        for worker in self._workers:
            self._next(worker, pending, heard)
        while any(worker.cell for worker in self._workers):
            worker, event = self._events.get()
            cell = worker.cell
            if event is None:
                self._workers.remove(worker)
                if cell is not None:
                    heard(cell, {"event": "failed", "why": f"its process {_ended(worker)}"})
                if pending:
                    self._next(self._start(), pending, heard)
            elif cell is not None:
                heard(cell, event)
                if event["event"] != "round":
                    worker.cell = None
                    self._next(worker, pending, heard)

    def _next(self, worker: _Worker, pending: list[Cell], heard: Heard) -> None:
        """Hands over the next cell, by preference one for which the worker need not load anything."""
        if not pending:
            return
        chosen = next((cell for cell in pending if cell.resident == worker.resident), pending[0])
        pending.remove(chosen)
        worker.order("run", chosen, self.folder / chosen.name)
        heard(chosen, {"event": "started"})

    def _start(self) -> _Worker:
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads)), "PYTHONUNBUFFERED": "1"}
        # The folder above this one: in the command line's process it may be known by another way than an installation.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "simulations.sweep_worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the parent's to hear
        )
        worker = _Worker(process)
        worker.reader = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        worker.reader.start()
        self._workers.append(worker)
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._events.put((worker, json.loads(line)))
        worker.process.wait()
        self._events.put((worker, None))


def _ended(worker: _Worker) -> str:
    code = worker.process.returncode
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name} (memory may have run out; try fewer --jobs)"
    return f"ended with code {code}"
