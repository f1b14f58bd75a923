"""The agent as a relay meets it, and as a hostile one does: a real gRPC server on a unix socket, and on TCP with
certificates on both sides."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import write_authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from small_sites import encoded, flat, plan_for, random_state, request_for, shown, site_for

from client.agent import FAULT, HEALTH, LARGEST_FRAME, LARGEST_METADATA, MALFORMED, MOST_CALLS, SERVICE, Agent
from client.config import TlsSection
from common.adapted import AdaptedModel
from common.errors import AdapterError, ConnectionFailed, LedgerError, WireError
from common.messages import (
    DescribeRequest,
    Pending,
    PhaseStatement,
    PlanStatus,
    PrivacyStatement,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    SiteService,
    TrainReply,
    TrainRequest,
)
from common.protos import site_pb2 as pb
from common.protos import site_pb2_grpc
from common.rpc import AgentAddress, RemoteSite, train_reply_of, train_request_frames

SECRET = "patient Jane Roe, row 17"
STATEMENT = PrivacyStatement(
    8.0, 1e-5, "example", "add-remove-one", "prv", 3, (PhaseStatement("lora", 0.1, 2.0, 1.0, 3),)
)
DESCRIPTION = SiteDescription("north", PlanStatus.READY, None, "code", ("causal-lm",), 8, 40, STATEMENT)


class Scripted:
    """A site that answers what it was told to and remembers what it was asked."""

    def __init__(self, description: SiteDescription = DESCRIPTION, reply: TrainReply | Exception | None = None) -> None:
        self.description, self.reply = description, reply
        self.asked: list[DescribeRequest | TrainRequest] = []

    def describe(self, request: DescribeRequest) -> SiteDescription:
        self.asked.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.description

    def train(self, request: TrainRequest) -> TrainReply:
        self.asked.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply or Release("north", request.run_id, request.round, request.digest(), request.adapter)


@contextmanager
def serving(site: SiteService, listen: str, tls: TlsSection | None = None) -> Iterator[Agent]:
    agent = Agent(site, listen, tls)
    agent.start()
    try:
        yield agent
    finally:
        agent.stop(grace=0)


@pytest.fixture
def listen(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'agent.sock'}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``ours`` and ``theirs``, each an authority with certificates for an agent and a relay."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        write_authority(folder / name, ("agent", "relay"))
    return folder


def tls_of(folder: Path, authority: Path | None = None) -> TlsSection:
    return TlsSection(
        certificate=folder / "agent.pem", key=folder / "agent.key", authority=(authority or folder) / "ca.pem"
    )


def relay_of(agent: Agent, authority: Path, own: Path) -> AgentAddress:
    return AgentAddress(f"127.0.0.1:{agent.port}", authority / "ca.pem", own / "relay.pem", own / "relay.key")


# ------------------------------------------------------------------------------------------------------------- serving


def test_a_description_arrives_as_it_was_given(listen: str) -> None:
    site = Scripted()
    request = DescribeRequest("run", '{"plan": "ü"}', "code")
    with serving(site, listen), RemoteSite(AgentAddress(listen)) as remote:
        assert remote.describe(request) == DESCRIPTION
    assert site.asked == [request]


def test_a_large_adapter_crosses_in_chunks_in_both_directions(listen: str) -> None:
    generator = np.random.default_rng(0)
    adapter = {
        "large": generator.standard_normal((1300, 1000)).astype(np.float32),  # beyond gRPC's 4 MiB for one message
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.float32(3.5).reshape(()),
    }
    request = TrainRequest("run", 2, "plan", adapter)
    site = Scripted()
    with serving(site, listen), RemoteSite(AgentAddress(listen)) as remote:
        reply = remote.train(request)
    assert isinstance(reply, Release)
    (asked,) = site.asked
    assert isinstance(asked, TrainRequest) and asked.digest() == request.digest() == reply.request_digest
    assert {name: array.tobytes() for name, array in reply.update.items()} == {
        name: array.tobytes() for name, array in adapter.items()
    }
    assert reply.update["none"].shape == (0, 3) and reply.update["scalar"].shape == ()


@pytest.mark.parametrize("reply", [Pending("north"), *(Refusal("north", reason) for reason in RefusalReason)])
def test_every_other_reply_arrives_as_it_was_given(listen: str, reply: TrainReply) -> None:
    with serving(Scripted(reply=reply), listen), RemoteSite(AgentAddress(listen)) as remote:
        assert remote.train(TrainRequest("run", 1, "plan", {})) == reply


def test_a_real_site_serves_a_round_through_its_agent(model: AdaptedModel, tmp_path: Path, listen: str) -> None:
    plan = plan_for(model)
    local = site_for(tmp_path / "local", model, encoded(model, 12), fixed_seed=1)
    local.describe(shown(plan))
    expected = local.train(request_for(plan, random_state(model)))
    remote_site = site_for(tmp_path / "remote", model, encoded(model, 12), fixed_seed=1)
    with serving(remote_site, listen), RemoteSite(AgentAddress(listen)) as remote:
        assert remote.describe(shown(plan)).status is PlanStatus.READY
        reply = remote.train(request_for(plan, random_state(model)))
    assert isinstance(reply, Release) and isinstance(expected, Release)
    assert np.array_equal(flat(reply.update), flat(expected.update))


def test_health_is_told_by_the_standard_protocol(listen: str) -> None:
    with serving(Scripted(), listen), grpc.insecure_channel(listen) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_agent_waits_until_it_is_asked_to_stop(listen: str) -> None:
    with serving(Scripted(), listen) as agent:
        waiting = threading.Thread(target=agent.wait)
        waiting.start()
        assert waiting.is_alive()
        agent.ask_to_stop()
        waiting.join(timeout=5)
        assert not waiting.is_alive()


# -------------------------------------------------------------------------------------------------------------- faults


def answer_to_fault(listen: str, fault: Exception, call: str) -> tuple[grpc.StatusCode, str, tuple[object, ...], str]:
    """All that a relay gets to see of a fault."""
    with serving(Scripted(reply=fault), listen), grpc.insecure_channel(listen) as channel:
        stub = site_pb2_grpc.SiteAgentStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            if call == "describe":
                stub.Describe(pb.DescribeRequest(run_id="run"), timeout=5)
            else:
                list(stub.Train(iter([pb.TrainRequestFrame(header=pb.TrainRequestHeader(run_id="run"))]), timeout=5))
    error = caught.value
    return error.code(), error.details(), tuple(error.trailing_metadata()), str(error)


@pytest.mark.parametrize("call", ["describe", "train"])
def test_any_fault_inside_the_site_yields_the_same_words_and_nothing_else(listen: str, call: str) -> None:
    faults = [ValueError(SECRET), KeyError(SECRET), LedgerError(SECRET), AdapterError(SECRET), MemoryError(SECRET)]
    answers = [answer_to_fault(listen, fault, call) for fault in faults]
    assert {answer[:3] for answer in answers} == {(grpc.StatusCode.INTERNAL, FAULT, ())}
    assert not any("Jane" in answer[3] or "row 17" in answer[3] for answer in answers)


@pytest.mark.parametrize("call", ["describe", "train"])
def test_a_malformed_request_is_told_so_in_the_same_words(listen: str, call: str) -> None:
    answer = answer_to_fault(listen, WireError(SECRET), call)
    assert answer[:3] == (grpc.StatusCode.INVALID_ARGUMENT, MALFORMED, ())
    assert "Jane" not in answer[3]


def test_frames_that_are_no_request_are_malformed(listen: str) -> None:
    frames = [pb.TrainRequestFrame(chunk=b"1234")]
    with (
        serving(Scripted(), listen),
        grpc.insecure_channel(listen) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(site_pb2_grpc.SiteAgentStub(channel).Train(iter(frames), timeout=5))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)


def test_a_fault_does_not_stop_the_agent(listen: str) -> None:
    site = Scripted(reply=ValueError(SECRET))
    with serving(site, listen), RemoteSite(AgentAddress(listen)) as remote:
        with pytest.raises(grpc.RpcError):
            remote.train(TrainRequest("run", 1, "plan", {}))
        site.reply = Pending("north")
        assert remote.train(TrainRequest("run", 1, "plan", {})) == Pending("north")


# ------------------------------------------------------------------------------------------------------------- strange


Answer = tuple[grpc.StatusCode, str, tuple[object, ...]]


def answer_to(
    listen: str, messages: Iterable[bytes], method: str = "Train", service: str = SERVICE, **options: Any
) -> Answer:
    """Status, details and trailing metadata for raw messages."""
    with grpc.insecure_channel(listen) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(f"/{service}/{method}")(iter(messages), timeout=10, **options))
    error = caught.value
    return error.code(), error.details(), tuple(error.trailing_metadata())


HEADER = pb.TrainRequestFrame(header=pb.TrainRequestHeader(run_id="run")).SerializeToString()
ADAPTER = {"a": np.zeros(1 << 20, np.float32)}


@pytest.mark.parametrize("call", ["Train", "Describe"])
def test_what_is_no_protobuf_gets_the_words_of_grpc(listen: str, call: str) -> None:
    site = Scripted()
    with serving(site, listen):
        answer = answer_to(listen, [b"\xff" * 50], call)
    assert answer == (grpc.StatusCode.INTERNAL, "Exception deserializing request!", ()) and site.asked == []


@pytest.mark.parametrize("call", ["Train", "Describe"])
def test_a_message_beyond_the_limit_is_not_read(listen: str, call: str) -> None:
    site = Scripted()
    with serving(site, listen):
        code, details, metadata = answer_to(listen, [bytes(LARGEST_FRAME + 1)], call)
    assert (code, metadata, site.asked) == (grpc.StatusCode.RESOURCE_EXHAUSTED, (), [])
    assert details == f"SERVER: Received message larger than max ({LARGEST_FRAME + 1} vs. {LARGEST_FRAME})"


def test_what_is_compressed_is_not_unpacked(listen: str) -> None:
    site = Scripted()
    text = "x" * (3 << 20)  # fits, were it unpacked
    with serving(site, listen), grpc.insecure_channel(listen, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            site_pb2_grpc.SiteAgentStub(channel).Describe(pb.DescribeRequest(plan=text), timeout=10)
        assert caught.value.details() == "Exception deserializing request!" and site.asked == []


@pytest.mark.parametrize("messages", [[], [b"", b""], [b""] * 100], ids=len)
def test_a_description_is_asked_for_with_one_message(listen: str, messages: list[bytes]) -> None:
    with serving(Scripted(), listen):
        assert answer_to(listen, messages, "Describe") == (grpc.StatusCode.INVALID_ARGUMENT, MALFORMED, ())


@pytest.mark.parametrize(
    ("service", "method"),
    [
        (SERVICE, "Evaluate"),
        ("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
        ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
        ("grpc.channelz.v1.Channelz", "GetServers"),
        (HEALTH, "Watch"),
        ("..", "../../etc/passwd"),
    ],
)
def test_nothing_else_can_be_called(listen: str, service: str, method: str) -> None:
    with serving(Scripted(), listen):
        answer = answer_to(listen, [b""], method, service)
    assert answer == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ())


def test_the_health_of_another_service_is_not_known(listen: str) -> None:
    request = health_pb2.HealthCheckRequest(service="../../x").SerializeToString()
    with serving(Scripted(), listen):
        assert answer_to(listen, [request], "Check", HEALTH) == (grpc.StatusCode.NOT_FOUND, MALFORMED, ())


def test_metadata_beyond_the_limit_is_refused(listen: str) -> None:
    site = Scripted()
    with serving(site, listen):
        code, *_ = answer_to(listen, [b""], "Describe", metadata=[("x", "y" * LARGEST_METADATA)])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and site.asked == []


def test_what_a_caller_chose_cannot_forge_a_line_of_the_log(listen: str, caplog: pytest.LogCaptureFixture) -> None:
    name = "a\n2030-01-01 ERROR all data were deleted" + "x" * 100_000
    layout = [pb.TensorLayout(name=name, shape=[0])] * 2
    request = pb.TrainRequestFrame(header=pb.TrainRequestHeader(run_id="run", layout=layout))
    with serving(Scripted(), listen):
        assert answer_to(listen, [request.SerializeToString()])[1] == MALFORMED
    (record,) = [record for record in caplog.records if record.name == "client.agent"]
    assert "announced" not in record.getMessage() and "\n" not in record.getMessage() and len(record.getMessage()) < 400


def test_more_calls_than_may_wait_are_refused(listen: str) -> None:
    go_on, beyond = threading.Event(), 5

    class Slow(Scripted):
        def describe(self, request: DescribeRequest) -> SiteDescription:
            assert go_on.wait(20)
            return super().describe(request)

    codes: Counter[grpc.StatusCode] = Counter()
    refused, all_ended = threading.Event(), threading.Event()

    def ended(call: grpc.Future) -> None:
        codes[call.code()] += 1
        if codes[grpc.StatusCode.RESOURCE_EXHAUSTED] == beyond:
            refused.set()
        if codes.total() == MOST_CALLS + beyond:
            all_ended.set()

    with serving(Slow(), listen), ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(listen, [("channel", i)])) for i in range(12)]
        for number in range(MOST_CALLS + beyond):
            stub = site_pb2_grpc.SiteAgentStub(channels[number % len(channels)])
            stub.Describe.future(pb.DescribeRequest(), timeout=30).add_done_callback(ended)
        assert refused.wait(20)
        go_on.set()
        assert all_ended.wait(20)
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: beyond, grpc.StatusCode.OK: MOST_CALLS}


# -------------------------------------------------------------------------------------------------------- slow and many


def trickle(stop: threading.Event, *first: bytes) -> Iterator[bytes]:
    """A request that never ends."""
    yield from first
    stop.wait(20)


@pytest.mark.parametrize(
    ("service", "method", "first"), [(SERVICE, "Train", HEADER), (SERVICE, "Describe", b""), (HEALTH, "Check", b"")]
)
def test_a_request_that_does_not_end_in_time_is_ended(
    listen: str, monkeypatch: pytest.MonkeyPatch, service: str, method: str, first: bytes
) -> None:
    monkeypatch.setattr("client.agent.TRANSFER_SECONDS", 0.2)
    site, stop = Scripted(), threading.Event()
    with serving(site, listen):
        code, details, metadata = answer_to(listen, trickle(stop, first), method, service)
        stop.set()
        assert (code, metadata) == (grpc.StatusCode.CANCELLED, ()) and details in ("", "CANCELLED", "Cancelled")
        monkeypatch.undo()
        with RemoteSite(AgentAddress(listen)) as remote:
            assert isinstance(remote.train(TrainRequest("next", 1, "plan", {})), Release)
    assert [request.run_id for request in site.asked] == ["next"]


def test_while_one_adapter_is_in_memory_no_other_is_read(listen: str) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Scripted):
        def train(self, request: TrainRequest) -> TrainReply:
            inside.set()
            assert go_on.wait(20)
            return super().train(request)

    sent, much_sent = [0], threading.Event()

    def counted() -> Iterator[pb.TrainRequestFrame]:
        for frame in train_request_frames(TrainRequest("second", 1, "plan", {"a": np.zeros(8 << 20, np.float32)})):
            yield frame
            sent[0] += len(frame.chunk)
            if sent[0] > 24 << 20:  # of 32 MiB
                much_sent.set()

    site = Slow()
    with serving(site, listen), RemoteSite(AgentAddress(listen)) as first, grpc.insecure_channel(listen) as channel:
        training = threading.Thread(target=first.train, args=(TrainRequest("first", 1, "plan", ADAPTER),))
        training.start()
        assert inside.wait(20)
        second = site_pb2_grpc.SiteAgentStub(channel).Train(counted(), timeout=20)
        assert not much_sent.wait(0.3)
        go_on.set()
        assert isinstance(train_reply_of(second), Release)
        training.join()
    assert [request.run_id for request in site.asked] == ["first", "second"]


def test_a_caller_that_does_not_take_its_reply_is_ended_and_the_next_is_served(
    listen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.agent.TRANSFER_SECONDS", 0.5)
    large = Release("north", "run", 1, "digest", {"a": np.zeros(8 << 20, np.float32)})
    site = Scripted(reply=large)
    with serving(site, listen), grpc.insecure_channel(listen) as channel:
        request = TrainRequest("run", 1, "plan", {})
        replies = site_pb2_grpc.SiteAgentStub(channel).Train(train_request_frames(request), timeout=20)
        next(replies)
        monkeypatch.undo()  # for those that come after
        site.reply = None
        with RemoteSite(AgentAddress(listen)) as other:
            assert isinstance(other.train(TrainRequest("next", 1, "plan", {})), Release)
        with pytest.raises(grpc.RpcError) as caught:
            list(replies)
        assert caught.value.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("when", ["asking", "answered"])
def test_after_a_caller_that_leaves_in_the_middle_the_next_is_served(listen: str, when: str) -> None:
    large = TrainRequest("large", 1, "plan", {"a": np.zeros(8 << 20, np.float32)})
    stop = threading.Event()

    def half() -> Iterator[pb.TrainRequestFrame]:
        yield from islice(train_request_frames(large), 4)
        stop.wait(20)

    with serving(Scripted(), listen):
        with grpc.insecure_channel(listen) as channel:
            frames = half() if when == "asking" else train_request_frames(large)
            replies = site_pb2_grpc.SiteAgentStub(channel).Train(frames, timeout=20)
            if when == "answered":
                next(replies)
            replies.cancel()
        stop.set()
        with RemoteSite(AgentAddress(listen)) as other:
            assert isinstance(other.train(TrainRequest("next", 1, "plan", {})), Release)


def test_a_fault_in_the_middle_of_a_reply_tells_no_more_than_one_before_it(
    listen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(reply: TrainReply) -> Iterator[pb.TrainReplyFrame]:
        yield pb.TrainReplyFrame(pending=pb.Pending(site="north"))
        raise ValueError(SECRET)

    monkeypatch.setattr("client.agent.train_reply_frames", breaking)
    with serving(Scripted(), listen):
        assert answer_to(listen, [HEADER]) == (grpc.StatusCode.INTERNAL, FAULT, ())


# -------------------------------------------------------------------------------------------------------------- socket


def test_unless_told_otherwise_the_own_user_alone_is_welcome(listen: str, tmp_path: Path) -> None:
    with serving(Scripted(), listen), RemoteSite(AgentAddress(listen)) as remote:
        assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600
        assert remote.describe(DescribeRequest("run", "{}", "code")) == DESCRIPTION


def test_users_that_are_not_named_get_no_answer_even_if_they_are_the_agents_own(listen: str) -> None:
    site = Scripted()
    agent = Agent(site, listen, peers=frozenset({os.geteuid() + 1}))
    agent.start()
    with pytest.raises(ConnectionFailed, match="not reachable"):
        RemoteSite(AgentAddress(listen), timeout=0.3).__enter__()
    agent.stop(grace=0)
    assert site.asked == []


def test_a_socket_left_by_a_killed_agent_is_replaced(listen: str, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "agent.sock"))
    left.close()
    with serving(Scripted(), listen), RemoteSite(AgentAddress(listen)) as remote:
        assert remote.describe(DescribeRequest("run", "{}", "code")) == DESCRIPTION


def test_a_second_agent_is_refused_and_the_first_goes_on(listen: str) -> None:
    with serving(Scripted(), listen):
        with pytest.raises(ConnectionFailed, match="another agent is already serving there; stop it first"):
            Agent(Scripted(), listen)
        with RemoteSite(AgentAddress(listen)) as remote:
            assert remote.describe(DescribeRequest("run", "{}", "code")) == DESCRIPTION


def test_a_file_that_is_no_socket_is_not_replaced(listen: str, tmp_path: Path) -> None:
    (tmp_path / "agent.sock").write_text("notes")
    with pytest.raises(ConnectionFailed, match="is no socket"):
        Agent(Scripted(), listen)
    assert (tmp_path / "agent.sock").read_text() == "notes"


def test_an_agent_that_is_not_there_is_told_with_the_remedy(listen: str) -> None:
    with pytest.raises(ConnectionFailed, match=r"not reachable.*is 'consilium site agent' running"):
        RemoteSite(AgentAddress(listen), timeout=0.2).__enter__()


# ----------------------------------------------------------------------------------------------------------------- tls


def test_with_certificates_on_both_sides_an_agent_serves_on_tcp(keys: Path) -> None:
    with (
        serving(Scripted(), "127.0.0.1:0", tls_of(keys / "ours")) as agent,
        RemoteSite(relay_of(agent, keys / "ours", keys / "ours")) as remote,
    ):
        assert remote.describe(DescribeRequest("run", "{}", "code")) == DESCRIPTION


@pytest.mark.parametrize(
    ("trusts", "shows"),
    [("ours", "theirs"), ("theirs", "ours"), ("theirs", "theirs")],
    ids=["the relay is a stranger", "the agent is a stranger", "both are"],
)
def test_a_wrong_certificate_ends_in_connection_failed(keys: Path, trusts: str, shows: str) -> None:
    site = Scripted()
    with serving(site, "127.0.0.1:0", tls_of(keys / "ours")) as agent:
        address = relay_of(agent, keys / trusts, keys / shows)
        with pytest.raises(ConnectionFailed, match="its certificate is not trusted"):
            RemoteSite(address, timeout=0.7).__enter__()
    assert site.asked == []


def test_a_relay_without_a_certificate_never_gets_through(keys: Path) -> None:
    site = Scripted()
    with serving(site, "127.0.0.1:0", tls_of(keys / "ours")) as agent:
        with pytest.raises(ConnectionFailed, match="agent-authority, agent-certificate and agent-key"):
            RemoteSite(AgentAddress(f"127.0.0.1:{agent.port}", keys / "ours" / "ca.pem"))
        anonymous = grpc.ssl_channel_credentials((keys / "ours" / "ca.pem").read_bytes())
        for channel in (
            grpc.secure_channel(f"127.0.0.1:{agent.port}", anonymous),
            grpc.insecure_channel(f"127.0.0.1:{agent.port}"),
        ):
            with channel, pytest.raises(grpc.RpcError):
                site_pb2_grpc.SiteAgentStub(channel).Describe(pb.DescribeRequest(), timeout=2)
    assert site.asked == []


def test_a_port_in_use_is_told(keys: Path) -> None:
    with (
        serving(Scripted(), "127.0.0.1:0", tls_of(keys / "ours")) as agent,
        pytest.raises(ConnectionFailed, match="cannot be bound; is another agent running"),
    ):
        Agent(Scripted(), f"127.0.0.1:{agent.port}", tls_of(keys / "ours"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"authority": "nowhere.pem"}, r"tls\.authority = '.*nowhere\.pem': cannot be read"),
        ({"authority": "text.pem"}, r"tls\.authority = '.*text\.pem': is not a PEM certificate"),
        ({"certificate": "nowhere.pem"}, r"tls\.certificate = '.*nowhere\.pem'.*cannot be read"),
        ({"certificate": "text.pem"}, r"is not the unencrypted PEM key of tls\.certificate = '.*text\.pem'"),
        ({"key": "text.pem"}, r"tls\.key = '.*text\.pem': is not the unencrypted PEM key"),
        ({"key": "relay.key"}, r"tls\.key = '.*relay\.key': is not the unencrypted PEM key"),
    ],
)
def test_a_certificate_or_key_that_cannot_be_used_is_named(
    keys: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "relay.key").write_bytes((keys / "ours" / "relay.key").read_bytes())
    tls = tls_of(keys / "ours").model_copy(update={field: tmp_path / name for field, name in changed.items()})
    with pytest.raises(ConnectionFailed, match=message):
        Agent(Scripted(), "127.0.0.1:0", tls)


def test_a_relays_certificate_that_cannot_be_read_is_named(keys: Path, tmp_path: Path) -> None:
    own = keys / "ours"
    with pytest.raises(ConnectionFailed, match=r"agent 127\.0\.0\.1:1: .*nowhere\.pem cannot be read"):
        RemoteSite(AgentAddress("127.0.0.1:1", tmp_path / "nowhere.pem", own / "relay.pem", own / "relay.key"))
