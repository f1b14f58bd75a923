"""The relay is shipped by the coordinator: it sees no data, imports no model, and says one constant word when it has
no answer."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import DEFAULT_TTL, Context, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto, recorddict_to_proto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import client.app
from client.agent import Agent
from common import wire
from common.code import code_digest
from common.errors import LedgerError, WireError
from common.messages import (
    DescribeRequest,
    Pending,
    PlanStatus,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    TrainReply,
    TrainRequest,
)
from common.protos import site_pb2 as pb

REPOSITORY = Path(__file__).parents[2]
SECRET = "patient Jane Roe, row 17"
REQUESTS = {
    "describe": wire.describe_request_to_record(DescribeRequest("run", "{}", "")),
    "train": wire.train_request_to_record(TrainRequest("run", 1, "plan", {"a": np.ones(3, np.float32)})),
}
CALLS = {"describe": client.app.describe, "train": client.app.train}
KINDS = {"describe": wire.DESCRIBE_TYPE, "train": wire.TRAIN_TYPE}


class Answering:
    """A site with one answer, or one fault, for everything."""

    def __init__(self, reply: TrainReply | Exception) -> None:
        self.reply = reply
        self.asked: list[DescribeRequest | TrainRequest] = []

    def describe(self, request: DescribeRequest) -> SiteDescription:
        self.asked.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return SiteDescription("north", PlanStatus.READY, None, "code", ("causal-lm",), 8, 40, None)

    def train(self, request: TrainRequest) -> TrainReply:
        self.asked.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@contextmanager
def serving(listen: str, reply: TrainReply | Exception) -> Iterator[Answering]:
    site = Answering(reply)
    agent = Agent(site, listen)
    agent.start()
    try:
        yield site
    finally:
        agent.stop(grace=0)


@pytest.fixture
def listen(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'agent.sock'}"


def relayed(call: str, node_config: Mapping[str, Any], content: RecordDict | None = None) -> Message:
    """What Flower sends back for one message."""
    metadata = Metadata(1, "id", 1, 2, "", "", time.time(), DEFAULT_TTL, KINDS[call])
    message = Message(content=REQUESTS[call] if content is None else content, metadata=metadata)
    return CALLS[call](message, Context(1, 2, {wire.NODE_AGENT_TIMEOUT: 0.3, **node_config}, RecordDict(), {}))


def sent(message: Message) -> bytes:
    """The reply's content and error, as Flower serialises them."""
    proto = message_to_proto(message)
    assert not proto.HasField("error")
    return proto.content.SerializeToString(deterministic=True)


UNAVAILABLE = recorddict_to_proto(wire.unavailable_record()).SerializeToString(deterministic=True)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "fault",
    [
        ValueError(SECRET),
        LedgerError(SECRET),
        WireError(SECRET),
        MemoryError(SECRET),
        ExceptionGroup(SECRET, [OSError()]),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_whatever_the_agent_raises_the_relay_says_unavailable(
    listen: str, call: str, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(listen, fault) as site, caplog.at_level(logging.DEBUG, "client.app"):
        assert sent(relayed(call, {"agent": listen})) == UNAVAILABLE
    assert len(site.asked) == 1
    own = "".join(f"{r.getMessage()}{r.exc_text}" for r in caplog.records if r.name == "client.app")
    assert "no answer from the site agent" in own and "Jane" not in own


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "node_config",
    [
        {},
        {"agent": 7},
        {"agent": "unix:/nowhere/agent.sock"},
        {"agent": "127.0.0.1:1"},
        {"agent": "127.0.0.1:1", "agent-authority": "/a", "agent-certificate": "/b", "agent-key": "/c"},
        {"agent": "\0"},
        {"agent": "unix:/nowhere/agent.sock", "agent-timeout": "soon"},
    ],
    ids=["no address", "no text", "nobody there", "no certificates", "no such files", "nonsense", "no patience"],
)
def test_without_an_agent_the_relay_says_unavailable(call: str, node_config: dict[str, Any]) -> None:
    assert sent(relayed(call, node_config)) == UNAVAILABLE


@pytest.mark.parametrize("call", CALLS)
def test_a_message_that_is_no_request_gets_the_same_answer(listen: str, call: str) -> None:
    other = REQUESTS["train" if call == "describe" else "describe"]
    with serving(listen, Pending("north")):
        for content in (RecordDict(), other, wire.unavailable_record()):
            assert sent(relayed(call, {"agent": listen}, content)) == UNAVAILABLE


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff\xff",
        pb.TrainReplyFrame(chunk=b"1234").SerializeToString(),
        pb.TrainReplyFrame(refusal=pb.Refusal(site="north", reason=SECRET)).SerializeToString(),
        pb.TrainReplyFrame(release=pb.ReleaseHeader(schema_version=99)).SerializeToString(),
    ],
    ids=["nothing", "no frame", "no header", "unknown reason", "newer"],
)
def test_an_answer_that_is_none_gets_the_same_answer(listen: str, answer: bytes) -> None:
    asked = []

    def train(frames: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        asked.append(list(frames))
        yield answer

    handler = grpc.stream_stream_rpc_method_handler(train)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("consilium.site.v1.SiteAgent", {"Train": handler})]
    )
    well = health.HealthServicer()
    well.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(well, server)
    server.add_insecure_port(listen)
    server.start()
    try:
        assert sent(relayed("train", {"agent": listen})) == UNAVAILABLE
    finally:
        server.stop(0).wait()
    assert len(asked) == 1


def test_every_answer_of_the_agent_is_passed_on_as_it_is(listen: str) -> None:
    release = Release("north", "run", 1, "digest", {"a": np.array([1.5, -2.0, 0.0], np.float32)})
    for reply in (release, Pending("north"), *(Refusal("north", reason) for reason in RefusalReason)):
        with serving(listen, reply):
            answer = relayed("train", {"agent": listen})
        expected = recorddict_to_proto(wire.train_reply_to_record(reply)).SerializeToString(deterministic=True)
        assert sent(answer) == expected


def test_the_agent_is_told_the_digest_of_the_code_that_really_runs(listen: str) -> None:
    claimed = wire.describe_request_to_record(DescribeRequest("run", "{}", "what the coordinator says"))
    with serving(listen, Pending("north")) as site:
        assert sent(relayed("describe", {"agent": listen}, claimed)) != UNAVAILABLE
    assert site.asked == [DescribeRequest("run", "{}", code_digest())]


RELAYING = """
import json, sys, time
import client.app
from flwr.app import Context, Message, Metadata, RecordDict
from common import wire
from common.messages import DescribeRequest, TrainRequest
import numpy as np
imported = sorted(sys.modules)
context = Context(1, 2, {"agent": sys.argv[1]}, RecordDict(), {})
def message(kind, content):
    return Message(content=content, metadata=Metadata(1, "id", 1, 2, "", "", time.time(), 3600.0, kind))
describe = wire.describe_request_to_record(DescribeRequest("run", "{}", ""))
described = client.app.describe(message("query.describe", describe), context)
train = wire.train_request_to_record(TrainRequest("run", 1, "plan", {"a": np.ones(3, np.float32)}))
trained = client.app.train(message("train", train), context)
assert not wire.is_unavailable(described.content) and not wire.is_unavailable(trained.content)
print(json.dumps([imported, sorted(sys.modules)]))
"""


def test_the_relay_imports_neither_torch_nor_transformers_not_even_when_it_works(listen: str) -> None:
    release = Release("north", "run", 1, "digest", {"a": np.ones(3, np.float32)})
    with serving(listen, release):
        done = subprocess.run(
            [sys.executable, "-c", RELAYING, listen], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    for modules in json.loads(done.stdout):
        heavy = {"torch", "transformers", "peft", "opacus", "datasets", "sklearn", "scipy", "pyarrow", "pydantic"}
        assert not heavy & set(modules)
        assert not [name for name in modules if name.startswith(("server", "client.site", "client.privacy"))]
