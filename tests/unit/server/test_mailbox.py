"""Messages and replies over a grid, garbage included."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from server.mailbox import GARBLED, TOGETHER, Mailbox
from simulations.grid import SimulatedGrid


class Nodes(SimulatedGrid):
    """Node n answers ``{"n": n}``; some send garbage, which Flower reports for a whole pull and loses all of it."""

    def __init__(self, garbage: Iterable[int] = (), errors: Iterable[int] = (), refused: Iterable[int] = ()) -> None:
        super().__init__({})
        self.garbage, self.errors, self.refused = set(garbage), set(errors), set(refused)
        self.pulls: list[int] = []
        self._queue: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = list(messages)
        self._queue.update({one.metadata.message_id: one for one in kept})
        return ["" if one.metadata.dst_node_id in self.refused else one.metadata.message_id for one in kept]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = [self._queue.pop(identity) for identity in message_ids if identity in self._queue]
        self.pulls.append(len(wanted))
        if any(message.metadata.dst_node_id in self.garbage for message in wanted):
            raise ValueError("no message")
        return [self._reply(message) for message in wanted]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.errors:
            return Message(Error(code=1, reason="the node's own words"), reply_to=message)
        return Message(_content(node), reply_to=message)


def _content(node: int) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"n": node})})


def _ask(grid: Nodes, nodes: Iterable[int], garbled: tuple[type[Exception], ...] = GARBLED) -> dict[int, int | None]:
    mailbox = Mailbox(grid, "run-1", 0.0, garbled)
    replies = mailbox.ask(dict.fromkeys(nodes, _content(0)), "train", time.monotonic() + 0.3)
    return {node: None if reply is None else int(str(reply["header"]["n"])) for node, reply in replies}  # type: ignore[index]


def test_every_node_is_asked_once_and_its_reply_handed_over() -> None:
    assert _ask(Nodes(), range(1, 4)) == {1: 1, 2: 2, 3: 3}


def test_no_more_than_a_few_replies_are_in_memory_at_once() -> None:
    grid = Nodes()
    assert len(_ask(grid, range(1, 21))) == 20
    assert max(grid.pulls) == TOGETHER == 8


def test_an_error_of_a_node_is_no_reply_and_keeps_no_other_from_answering() -> None:
    assert _ask(Nodes(errors=[2]), range(1, 4)) == {1: 1, 2: None, 3: 3}


def test_a_node_that_the_superlink_takes_no_message_for_is_told_at_once() -> None:
    assert _ask(Nodes(refused=[2]), range(1, 4)) == {2: None, 1: 1, 3: 3}


def test_garbage_costs_others_their_replies_at_most_once() -> None:
    grid = Nodes(garbage=[3])
    mailbox = Mailbox(grid, "run-1", 0.0, GARBLED)
    first = list(mailbox.ask(dict.fromkeys(range(1, 21), _content(0)), "train", time.monotonic() + 0.1))
    assert {node for node, _ in first} == set(range(9, 21))  # what was pulled together with the garbage is lost
    second = dict(mailbox.ask(dict.fromkeys(range(1, 21), _content(0)), "train", time.monotonic() + 5.0))
    assert {node for node, reply in second.items() if reply is None} == {3}
    assert len(second) == 20


def test_an_error_of_a_simulated_site_is_not_taken_for_garbage() -> None:
    with pytest.raises(ValueError, match="no message"):
        _ask(Nodes(garbage=[1]), [1], garbled=())


def test_what_is_to_be_done_meanwhile_is_done_between_two_looks() -> None:
    calls = []
    mailbox = Mailbox(Nodes(), "run-1", 0.0)
    list(mailbox.ask({1: _content(0)}, "train", time.monotonic() + 5.0, lambda: calls.append(1)))
    assert calls == [1]
