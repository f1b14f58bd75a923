"""The agent's own log does not grow with what a relay asks."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from client.agent import MALFORMED, Agent
from client.log_limit import BURST, PERIOD, FewOfEachKind, limit_log
from common.messages import DescribeRequest, SiteDescription, TrainReply, TrainRequest
from common.protos import site_pb2 as pb
from common.protos import site_pb2_grpc


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Written(logging.Handler):
    """Keeps every line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> Iterator[tuple[logging.Logger, list[str]]]:
    logger, handler = logging.getLogger("test of the limit"), Written()
    handler.addFilter(FewOfEachKind(clock))
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, handler.lines
    logger.removeHandler(handler)


def asked(logger: logging.Logger, what: object) -> None:
    logger.warning("a caller asked for %s", what)


def test_of_each_kind_a_few_are_written_and_of_another_kind_too(log: tuple[logging.Logger, list[str]]) -> None:
    logger, lines = log
    for number in range(1000):
        asked(logger, number)
    logger.warning("another matter")
    assert lines == [*(f"a caller asked for {number}" for number in range(BURST)), "another matter"]


def test_after_a_while_it_goes_on_and_tells_what_was_left_out(
    log: tuple[logging.Logger, list[str]], clock: Clock
) -> None:
    logger, lines = log
    for number in range(BURST + 7):
        asked(logger, number)
    clock.time = PERIOD
    asked(logger, "again")
    asked(logger, "once more")
    assert lines[BURST:] == [
        "a caller asked for again (7 more like it were left out)",
        "a caller asked for once more",
    ]


def test_percent_signs_that_a_caller_chose_stay_what_they_are(
    log: tuple[logging.Logger, list[str]], clock: Clock
) -> None:
    logger, lines = log
    for _ in range(BURST + 1):
        asked(logger, "%s%d")
    clock.time = PERIOD
    asked(logger, "%s%d")
    assert lines[-1] == "a caller asked for %s%d (1 more like it were left out)"


class Nobody:
    """A site that is never asked."""

    def describe(self, request: DescribeRequest) -> SiteDescription:
        raise NotImplementedError

    def train(self, request: TrainRequest) -> TrainReply:
        raise NotImplementedError


def test_a_relay_that_calls_thousands_of_times_cannot_fill_the_agents_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(stream)])
    limit_log()
    agent = Agent(Nobody(), listen := f"unix:{tmp_path / 'agent.sock'}")
    agent.start()
    try:
        with grpc.insecure_channel(listen) as channel:
            stub = site_pb2_grpc.SiteAgentStub(channel)
            for _ in range(300):
                with pytest.raises(grpc.RpcError, match=MALFORMED):
                    list(stub.Train(iter([pb.TrainRequestFrame(chunk=b"1234")]), timeout=5))
                with pytest.raises(grpc.RpcError):
                    stub.Describe(pb.DescribeRequest(run_id="run"), timeout=5)
    finally:
        agent.stop(grace=0)
    text = stream.getvalue()
    assert text.count("refused a malformed request") == text.count("a request could not be served") == BURST
