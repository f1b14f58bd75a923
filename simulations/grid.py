"""Flower's ``Grid`` over sites in this process: the real server loop, the real relay, no processes and no sockets.

A message to a site is handed to the same relay functions as in a deployment, with the site itself in place of the gRPC
stub. Sites are worked on one after the other, when replies are pulled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import RELAYS
from common.messages import SiteService


class InProcessGrid(Grid):
    """A grid whose nodes are sites in this process.

    Args:
        sites: site name → service; node ids are 1, 2, … in name order.
        served: called with the site's name before a training message is worked on.
    """

    def __init__(self, sites: Mapping[str, SiteService], served: Callable[[str], None] = lambda site: None) -> None:
        self.sites = dict(sorted(sites.items()))
        self._names = dict(enumerate(self.sites, 1))
        self._served = served
        self._queue: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Not needed: there is one run."""

    @property
    def run(self) -> Run:
        """Not known to a simulation."""
        raise AttributeError("an in-process simulation has no Flower run")

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
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queues messages; returns their ids."""
        identities = []
        for message in messages:
            self._queue[message.metadata.message_id] = message
            identities.append(message.metadata.message_id)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Works on the first of the queued messages and returns its reply."""
        for identity in message_ids:
            message = self._queue.pop(identity, None)
            if message is not None:
                return [self._serve(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """All replies, in order."""
        return [reply for identity in self.push_messages(messages) for reply in self.pull_messages([identity])]

    def _serve(self, message: Message) -> Message:
        name = self._names[message.metadata.dst_node_id]
        relay = RELAYS[message.metadata.message_type]
        self._served(name)
        return Message(relay(message.content, self.sites[name]), reply_to=message)
