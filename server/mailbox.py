"""Messages to Flower nodes and their replies. Nothing here knows what they say, or waits for one particular node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import RecordDict
from flwr.serverapp import Grid

log = logging.getLogger(__name__)


class Mailbox:
    """One run's messages over a ``Grid``.

    Args:
        grid: Flower's grid, of a deployment or of a simulation.
        run_id: goes along as the messages' group.
        poll_seconds: pause between two looks for replies.
    """

    def __init__(self, grid: Grid, run_id: str, poll_seconds: float) -> None:
        self.grid, self.run_id, self.poll_seconds = grid, run_id, poll_seconds

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

        They are pulled one by one: one is in memory at a time, and a reply that cannot be read takes no other along.

        Yields:
            Node and content; ``None`` for an error of the node, or a reply that is no Flower message.
        """
        for identity, node in list(waiting.items()):
            try:
                replies = list(self.grid.pull_messages([identity]))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                log.warning("node %d: its reply is no Flower message (%s)", node, type(error).__name__)
                del waiting[identity]
                yield node, None
                continue
            for reply in replies:
                del waiting[identity]
                yield node, reply.content if reply.has_content() else None

    def ask(
        self,
        contents: Mapping[int, RecordDict],
        message_type: str,
        deadline: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Sends one message to each node and yields each reply as it comes, until all have answered or the deadline.

        Args:
            deadline: as of ``time.monotonic``.
            meanwhile: called between two looks for replies.
        """
        waiting = self.send(contents, message_type, deadline - time.monotonic())
        for node in set(contents) - set(waiting.values()):
            yield node, None
        while waiting and time.monotonic() < deadline:
            yield from self.received(waiting)
            meanwhile()
            if waiting:
                time.sleep(self.poll_seconds)
