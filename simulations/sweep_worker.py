"""One worker process of a sweep: keeps a model and encoded data resident and runs the cells it is given.

``python -m simulations.sweep_worker``, started by :mod:`simulations.sweep_pool`. One JSON object a line on stdin for
each order, and one a line on stdout for each thing that happens. Ends when its stdin does, however the sweep ended: a
cell is continued by the next one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.config import RunConfig
from common.errors import ConsiliumError, OutputError
from common.logs import LogFormat, set_up_logging
from server.prepare import prepare
from server.watcher import Silent
from simulations.federation import Federation
from simulations.simulate import simulate

log = logging.getLogger(__name__)

Tell = Callable[..., None]
"""Sends one event."""


class Rounds(Silent):
    """Tells of each finished round."""

    def __init__(self, rounds: int, tell: Tell) -> None:
        self.rounds, self.tell = rounds, tell

    def round(self, record: Mapping[str, Any]) -> None:
        """One round is finished."""
        self.tell(event="round", round=record["round"], rounds=self.rounds)


class Worker:
    """What is resident, and what is done with it."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._key = ""
        self._federation: Federation | None = None

    def serve(self, order: Mapping[str, Any]) -> None:
        """Checks or runs one cell, and tells how that ended."""
        try:
            config = RunConfig.model_validate_json(order["config"])
            federation = self._resident(order["resident"], config)
            # The task as the model has settled it; everything else is this cell's own, not the one's that loaded it.
            config = config.model_copy(update={"task": federation.config.task})
            if order["order"] == "check":
                federation.check_count(config.server)
                prepare(config, "check", federation.model, federation.evaluator)
                self.tell(event="fits")
            else:
                self._run(config, Path(order["folder"]), federation)
                self.tell(event="done")
        except ConsiliumError as error:
            self.tell(event="failed", why=str(error), code=error.exit_code)
        except Exception as error:
            log.exception("%s: failed", order["name"])
            self._key, self._federation = "", None
            self.tell(event="failed", why=f"{type(error).__name__}: {error}", code=3)

    def _resident(self, key: str, config: RunConfig) -> Federation:
        if self._federation is None or self._key != key:
            self._key, self._federation = "", None  # before the next one is loaded
            self._federation = Federation(config)
            self._key = key
        return self._federation

    def _run(self, config: RunConfig, folder: Path, federation: Federation) -> None:
        started = (folder / "manifest.json").exists() and (folder / "run.toml").exists()
        if not started:
            shutil.rmtree(folder, ignore_errors=True)  # killed before its first round: nothing is lost

        @contextmanager
        def watch(title: str, rounds: int) -> Iterator[Rounds]:
            yield Rounds(rounds, self.tell)

        try:
            simulate(config, folder, started, watch, federation)
        except OutputError as error:
            if not started:
                raise
            raise OutputError(
                f"{error}. This cell is not run anew in this sweep, which counts the ε that it has spent: mend or put "
                "back what was changed, or give the whole sweep a new --out"
            ) from None


def main() -> None:
    """Serves orders until stdin ends."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not mistaken for an event
    set_up_logging(LogFormat.TEXT, False)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def tell(**event: Any) -> None:
        told.write(json.dumps(event) + "\n")
        told.flush()

    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    worker = Worker(tell)
    while True:
        worker.serve(orders.get())


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """In a thread of its own, so that the end of the sweep is heard in the midst of a round too."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
