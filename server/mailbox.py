"""Messages to Flower nodes and their replies. Nothing here knows what they say, or waits for one particular node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

TOGETHER = 8
"""Replies pulled in one call."""
GARBLED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, DecodeError)
"""What Flower's HTTP grid raises when it cannot make a message of what a node sent."""


class Mailbox:
    """One run's messages over a ``Grid``.

    Args:
        grid: Flower's grid, of a deployment or of a simulation.
        run_id: goes along as the messages' group.
        poll_seconds: pause between two looks for replies.
        garbled: what pulling raises where a node has sent garbage; nothing in a simulation, whose errors are real.
    """

    def __init__(self, grid: Grid, run_id: str, poll_seconds: float, garbled: tuple[type[Exception], ...] = ()) -> None:
        self.grid, self.run_id, self.poll_seconds, self.garbled = grid, run_id, poll_seconds, garbled
        self._together = TOGETHER

    def nodes(self) -> dict[int, str]:
        """The nodes that are online, with the names they were registered under (empty: none was given)."""
        return {node.node_id: node.name or "" for node in self.grid.get_nodes()}

    def send(self, contents: Mapping[int, RecordDict], message_type: str, lifetime: float) -> dict[str, int]:
        """One message to each node.

        Args:
            lifetime: seconds after which a message or its reply is void.

        Returns:
            Message id → node, without the nodes that the SuperLink would not accept a message for.
        """
        messages = [
            self.grid.create_message(content, message_type, node, group_id=self.run_id, ttl=max(1.0, lifetime))
            for node, content in contents.items()
        ]
        # Flower returns no ids at all where the whole push was too large for it.
        pairs = zip(self.grid.push_messages(messages), contents, strict=False)
        return {identity: node for identity, node in pairs if identity}

    def received(self, waiting: dict[str, int]) -> Iterator[tuple[int, RecordDict | None]]:
        """The replies that have come; each is taken out of ``waiting``.

        A few are pulled at a time: each pull costs the SuperLink some 20 ms, and what is pulled at once is in memory at
        once. Flower loses what it pulled together with a reply it cannot read, so after the first such reply they are
        pulled one by one, and a node that sends garbage harms nobody else again.

        Yields:
            Node and content; ``None`` for an error of the node, or a reply that is no Flower message.
        """
        identities = list(waiting)
        while identities:
            together, identities = identities[: self._together], identities[self._together :]
            try:
                while together and (replies := list(self.grid.pull_messages(together))):
                    for reply in replies:
                        node = waiting.pop(reply.metadata.reply_to_message_id)
                        yield node, reply.content if reply.has_content() else None
                    together = [identity for identity in together if identity in waiting]
            except self.garbled as error:
                log.warning("a reply is no Flower message (%s: %s)", type(error).__name__, error)
                if len(together) == 1:
                    yield waiting.pop(together[0]), None
                self._together = 1

    def ask(
        self,
        contents: Mapping[int, RecordDict],
        message_type: str,
        deadline: float,
        meanwhile: Callable[[], None] = lambda: None,
        again: dict[int, RecordDict] | None = None,
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Sends one message to each node and yields each reply as it comes, until all have answered or the deadline.

        Args:
            deadline: as of ``time.monotonic``.
            meanwhile: called between two looks for replies.
            again: where the caller puts what a node is to be asked next, while it is busy with that node's reply.
        """
        waiting: dict[str, int] = {}
        due = {} if again is None else again
        due.update(contents)
        while due or (waiting and time.monotonic() < deadline):
            if due:
                asked, sent = set(due), self.send(due, message_type, deadline - time.monotonic())
                due.clear()
                waiting.update(sent)
                for node in asked - set(sent.values()):
                    yield node, None
            yield from self.received(waiting)
            meanwhile()
            if waiting:
                time.sleep(self.poll_seconds)
