"""Sites that are trained at the same time: threads of this process, each with a replica of the resident model.

Torch lets go of Python's lock in every operation, so threads keep as many cores busy as there are workers, as long as
the operations are larger than what Python does between them. All replicas share the base model's weights, so one more
worker costs an adapter and the activations of a batch. Every worker has one thread of torch, also if it is the only
one: then a site's numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from common.adapted import AdaptedModel
from common.config import RunConfig
from common.errors import ConfigError


class Workers:
    """Where the messages of a simulation are worked on.

    Args:
        model: the resident one.
    """

    executor: Executor | None = None
    """Of the workers; ``None``: there are none, and everything is done where it is asked for."""

    def __init__(self, model: AdaptedModel) -> None:
        self._resident, self._local = model, threading.local()

    @property
    def model(self) -> AdaptedModel:
        """The replica of the thread that asks; elsewhere the resident model."""
        found: AdaptedModel = getattr(self._local, "model", self._resident)
        return found

    def begin(self, replicas: SimpleQueue[AdaptedModel]) -> None:
        """Takes a replica for this thread, for good."""
        torch.set_num_threads(1)
        self._local.model = replicas.get_nowait()


@contextmanager
def workers_for(config: RunConfig, model: AdaptedModel) -> Iterator[Workers]:
    """As many as ``simulation.workers`` says, as long as this lasts.

    Raises:
        ConfigError: dropout, whose random numbers are torch's own and one stream for the whole process.
    """
    count = config.simulation.workers
    if count is None:
        yield Workers(model)
        return
    if config.lora.dropout and count > 1:
        raise ConfigError(
            f"simulation.workers = {count}: lora.dropout = {config.lora.dropout:g} draws from one stream of random "
            "numbers for all of them; set workers = 1, or dropout = 0"
        )
    replicas: SimpleQueue[AdaptedModel] = SimpleQueue()
    for _ in range(count):
        replicas.put(model.replica())
    threads, workers = torch.get_num_threads(), Workers(model)
    executor = ThreadPoolExecutor(count, "site", workers.begin, (replicas,))
    workers.executor = executor
    try:
        yield workers
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's setting is in part the whole process's
