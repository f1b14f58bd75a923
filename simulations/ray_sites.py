"""What runs inside a Ray actor: one resident base model, and the sites that are served by it.

The actor is Flower's, and so is the way of a message through it: :meth:`VirtualClientEngineActor.run` calls a
``ClientApp`` with a context that names the site. The app is our own and hands the message to the same relay functions
as in a deployment, with the site itself in place of the gRPC stub.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor

from client.app import relay_describe, relay_train
from common.code import code_digest
from common.config import RunConfig
from common.messages import SiteService
from common.plan import Plan
from simulations.federation import Arm, Federation

SITE = "site"
"""Key of a context's node config: which site a message is for."""


@dataclass(frozen=True)
class Footing:
    """What driver and actors must have in common, else a run would mix models, data or versions."""

    code: str
    torch: str
    model: str
    adapter: str
    data: str

    @classmethod
    def of(cls, federation: Federation) -> Footing:
        """What a process stands on that has loaded this federation."""
        model = federation.model
        return cls(code_digest(), torch.__version__, model.base.digest, model.spec.digest(), federation.digest())

    def differs_in(self, other: Footing) -> list[str]:
        """Names of what differs."""
        return [one.name for one in fields(self) if getattr(self, one.name) != getattr(other, one.name)]


@dataclass(frozen=True)
class Introduction:
    """An actor that has loaded everything."""

    host: str
    pid: int
    footing: Footing
    sees_mark: bool
    """Whether the driver's file in the run's folder is there."""

    def __str__(self) -> str:
        return f"actor {self.pid} on {self.host}"


@dataclass(frozen=True)
class Assignment:
    """An arm, as far as one actor has to do with it."""

    arm: Arm
    """With the actor's own sites alone."""
    plan: Plan
    coordinator: str
    """Public key of whoever signs the plan."""


@dataclass(frozen=True)
class Served:
    """A reply, and what was logged on the way to it: an actor's own output stays in Ray's files."""

    reply: Message
    logged: tuple[logging.LogRecord, ...]


class SiteActor(VirtualClientEngineActor):
    """Flower's actor with a federation in it. Serves one message at a time."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._app = ClientApp()
        self._logged: SimpleQueue[logging.LogRecord] = SimpleQueue()

    def load(self, config: RunConfig, mark: Path, threads: int) -> Introduction:
        """Loads the base model and the data, once.

        Args:
            config: with absolute paths.
            mark: a file that the driver has put into the run's folder.
            threads: of torch.

        Raises:
            ConsiliumError: model or data cannot be loaded here.
        """
        logging.getLogger().addHandler(QueueHandler(self._logged))
        torch.set_num_threads(threads)
        self._federation = Federation(config)
        return Introduction(socket.gethostname(), os.getpid(), Footing.of(self._federation), mark.is_file())

    def open(self, assignment: Assignment) -> None:
        """Makes the sites of an arm, in the place of those that were open before."""
        self.close()
        sites = self._federation.sites(assignment.arm, assignment.plan, assignment.coordinator)
        self._app = client_app(self._open.enter_context(sites))

    def close(self) -> None:
        """Closes the ledgers of the sites."""
        self._open.close()

    def serve(self, message: Message, site: str) -> Served:
        """A message's way through Flower's engine.

        Raises:
            ClientAppException: the site failed; holds the text of the error.
        """
        context = Context(0, message.metadata.dst_node_id, {SITE: site}, RecordDict(), {})
        _, reply, _ = self.run(lambda: self._app, message, site, context)
        return Served(reply, tuple(self._logged.get() for _ in range(self._logged.qsize())))


def client_app(sites: Mapping[str, SiteService]) -> ClientApp:
    """A Flower app that relays each message to the site that its context names."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return Message(relay_describe(message.content, _site(context)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(relay_train(message.content, _site(context)), reply_to=message)

    def _site(context: Context) -> SiteService:
        return sites[str(context.node_config[SITE])]

    return app
