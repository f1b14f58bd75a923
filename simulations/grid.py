"""Flower's ``Grid`` over sites in this process: the real server loop, the real relay, no processes and no sockets.

A message to a site is handed to the same relay functions as in a deployment, with the site itself in place of the gRPC
stub. Without workers the sites are worked on one after the other, when replies are pulled; with workers, so many at the
same time from the moment the messages are pushed. Replies are handed over in the order of the messages either way, so
that a run does not depend on which site was faster. Training messages that are pushed together can be worked on
together, so many sites in each forward pass (:mod:`simulations.together`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property, partial

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import RELAYS
from common import wire
from common.messages import SiteService
from simulations.together.serving import train_sites


class SimulatedGrid(Grid):
    """What all grids of simulated sites have in common: one node for each site, registered under its name.

    Args:
        names: of the sites; node ids are 1, 2, … in name order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict(enumerate(sorted(names), 1))
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Not needed: there is one run."""

    @property
    def run(self) -> Run:
        """Not known to a simulation."""
        raise AttributeError("a simulation has no Flower run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node, with an id of its own (a SuperLink would give it one when it is pushed)."""
        self._count += 1
        metadata = Metadata(
            run_id=0,
            message_id=f"message-{self._count}",
            src_node_id=0,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
        )
        message: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
        return message

    def get_node_ids(self) -> Iterable[int]:
        """1 … number of sites."""
        return list(self.names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Every node, registered under its site's name."""
        return [NodeInfo(node_id=node, name=name) for node, name in self.names.items()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """All replies, in order."""
        return [reply for identity in self.push_messages(messages) for reply in self.pull_messages([identity])]


class InProcessGrid(SimulatedGrid):
    """A grid whose nodes are sites in this process.

    Args:
        sites: site name → service; node ids are 1, 2, … in name order.
        served: called with the site's name before a message is worked on.
        workers: where messages are worked on; ``None``: in the thread that pulls the replies.
        sites_per_pass: training messages that one worker answers at a time.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteService],
        served: Callable[[str], None] = lambda site: None,
        workers: Executor | None = None,
        sites_per_pass: int = 1,
    ) -> None:
        super().__init__(sites)
        self.sites = sites
        self._served, self._workers, self._together = served, workers, sites_per_pass
        self._jobs: dict[str, _Job] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages, and gives them to the workers; returns their ids."""
        identities = []
        for group in self._groups(messages):
            job = _Job(partial(self._serve, group), self._workers)
            for message in group:
                identities.append(message.metadata.message_id)
                self._jobs[message.metadata.message_id] = job
        return identities

    def _groups(self, messages: Iterable[Message]) -> Iterator[list[Message]]:
        """Messages that are worked on together: training at different sites."""
        group: dict[int, Message] = {}
        for message in messages:
            node, trains = message.metadata.dst_node_id, message.metadata.message_type == wire.TRAIN_TYPE
            if group and (len(group) == self._together or not trains or node in group):
                yield list(group.values())
                group = {}
            if trains:
                group[node] = message
            else:
                yield [message]
        if group:
            yield list(group.values())

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply to the first of the queued messages, once it is there.

        Raises:
            Exception: what the site raised.
        """
        for identity in message_ids:
            job = self._jobs.pop(identity, None)
            if job is not None:
                reply = job.replies[identity]
                if isinstance(reply, Exception):
                    raise reply
                return [reply]
        return []

    def _serve(self, messages: Sequence[Message]) -> Replies:
        names = [self.names[message.metadata.dst_node_id] for message in messages]
        for name in names:
            self._served(name)
        if len(messages) == 1:
            relay = RELAYS[messages[0].metadata.message_type]
            contents: Sequence[RecordDict | Exception] = [relay(messages[0].content, self.sites[names[0]])]
        else:
            requests = [wire.train_request_from_record(message.content) for message in messages]
            replies = train_sites([(self.sites[name], request) for name, request in zip(names, requests, strict=True)])
            contents = [one if isinstance(one, Exception) else wire.train_reply_to_record(one) for one in replies]
        return {
            message.metadata.message_id: one if isinstance(one, Exception) else Message(one, reply_to=message)
            for message, one in zip(messages, contents, strict=True)
        }


Replies = dict[str, Message | Exception]
"""Message id → its reply, or what the site raised."""


class _Job:
    """Messages that are worked on together: by a worker at once, or else when the first of their replies is asked for.

    A job is forgotten with the last of its messages.
    """

    def __init__(self, work: Callable[[], Replies], workers: Executor | None) -> None:
        self._work = work if workers is None else workers.submit(work).result

    @cached_property
    def replies(self) -> Replies:
        """All of them.

        Raises:
            Exception: what the site of a message that is worked on alone has raised.
        """
        return self._work()
