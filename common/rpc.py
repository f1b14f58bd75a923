"""Messages ⇄ protobuf frames, and the stub through which a relay reaches its site agent. Torch-free, Flower-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import ConnectionFailed, WireError
from common.messages import (
    LARGEST_TRANSFER,
    SCHEMA_VERSION,
    DescribeRequest,
    Pending,
    PhaseStatement,
    PlanStatus,
    PrivacyStatement,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    TrainReply,
    TrainRequest,
    WireTensors,
)
from common.protos import site_pb2 as pb
from common.protos import site_pb2_grpc

CHUNK = 1 << 20
"""Bytes of tensor data in one frame; far below gRPC's 4 MiB message limit."""
_TYPES: dict[pb.ElementType, np.dtype[Any]] = {
    pb.FLOAT32: np.dtype("<f4"),
    pb.UINT16: np.dtype("<u2"),
    pb.INT8: np.dtype("i1"),
}


def train_request_frames(request: TrainRequest) -> Iterator[pb.TrainRequestFrame]:
    """Header first, then the tensors' bytes in name order."""
    header = pb.TrainRequestHeader(
        schema_version=request.schema_version,
        run_id=request.run_id,
        round=request.round,
        plan_digest=request.plan_digest,
        layout=_layout(request.adapter),
        adapter_digest=request.adapter_digest,
    )
    yield pb.TrainRequestFrame(header=header)
    for chunk in _chunks(request.adapter):
        yield pb.TrainRequestFrame(chunk=chunk)


def train_request_of(frames: Iterable[pb.TrainRequestFrame]) -> TrainRequest:
    """The request from its frames.

    Raises:
        WireError: frames missing, out of order or too large.
    """
    stream = iter(frames)
    first = next(stream, None)
    if first is None or first.WhichOneof("content") != "header":
        raise WireError("request: does not start with a header")
    header = first.header
    _check_version(header.schema_version)
    return TrainRequest(
        run_id=header.run_id,
        round=header.round,
        plan_digest=header.plan_digest,
        adapter=_tensors(header.layout, _chunks_of(stream)),
        adapter_digest=header.adapter_digest,
        schema_version=header.schema_version,
    )


def train_reply_frames(reply: TrainReply) -> Iterator[pb.TrainReplyFrame]:
    """One frame for a refusal or a pending plan; header and chunks for a release.

    ``Unavailable`` is the relay's own word, never the agent's.
    """
    if isinstance(reply, Refusal):
        yield pb.TrainReplyFrame(refusal=pb.Refusal(site=reply.site, reason=reply.reason.value))
    elif isinstance(reply, Pending):
        yield pb.TrainReplyFrame(pending=pb.Pending(site=reply.site))
    elif isinstance(reply, Release):
        header = pb.ReleaseHeader(
            schema_version=reply.schema_version,
            site=reply.site,
            run_id=reply.run_id,
            round=reply.round,
            request_digest=reply.request_digest,
            layout=_layout(reply.update),
            head=reply.head,
            metrics=[pb.Metric(name=name, value=reply.metrics[name]) for name in sorted(reply.metrics)],
        )
        yield pb.TrainReplyFrame(release=header)
        for chunk in _chunks(reply.update):
            yield pb.TrainReplyFrame(chunk=chunk)


def train_reply_of(frames: Iterable[pb.TrainReplyFrame]) -> TrainReply:
    """The reply from its frames.

    Raises:
        WireError: frames missing, out of order, too large or of an unknown kind.
    """
    stream = iter(frames)
    first = next(stream, None)
    kind = first.WhichOneof("content") if first is not None else None
    if first is not None and kind in ("refusal", "pending"):
        if next(stream, None) is not None:
            raise WireError(f"reply: goes on after a {kind}")
        if kind == "pending":
            return Pending(first.pending.site)
        try:
            return Refusal(first.refusal.site, RefusalReason(first.refusal.reason))
        except ValueError:
            raise WireError(f"reply: unknown refusal reason {first.refusal.reason!r}") from None
    if first is None or kind != "release":
        raise WireError("reply: does not start with a release, a refusal or a pending plan")
    header = first.release
    _check_version(header.schema_version)
    return Release(
        site=header.site,
        run_id=header.run_id,
        round=header.round,
        request_digest=header.request_digest,
        update=_tensors(header.layout, _chunks_of(stream)),
        head=header.head,
        metrics=_metrics(header.metrics),
        schema_version=header.schema_version,
    )


def _metrics(entries: Iterable[pb.Metric]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for entry in entries:
        if entry.name in metrics:
            raise WireError(f"reply: metric '{entry.name}' is given twice")
        metrics[entry.name] = entry.value
    return metrics


def description_to_proto(description: SiteDescription) -> pb.SiteDescription:
    """A site's description as it crosses the border."""
    message = pb.SiteDescription(
        schema_version=description.schema_version,
        site=description.site,
        status=description.status.value,
        refusal=description.refusal.value if description.refusal else "",
        code_digest=description.code_digest,
        tasks=description.tasks,
        max_rank=description.max_rank,
        public_size=description.public_size,
    )
    privacy = description.privacy
    if privacy is not None:
        message.privacy.CopyFrom(
            pb.PrivacyStatement(
                epsilon=privacy.epsilon,
                delta=privacy.delta,
                unit=privacy.unit,
                neighbouring=privacy.neighbouring,
                accountant=privacy.accountant,
                steps=privacy.steps,
                phases=[pb.PhaseStatement(**vars(phase)) for phase in privacy.phases],
            )
        )
    return message


def description_of(message: pb.SiteDescription) -> SiteDescription:
    """A site's description from its protobuf form.

    Raises:
        WireError: of a newer schema, or with an unknown status or refusal.
    """
    _check_version(message.schema_version)
    privacy = None
    if message.HasField("privacy"):
        p = message.privacy
        privacy = PrivacyStatement(
            epsilon=p.epsilon if p.HasField("epsilon") else None,
            delta=p.delta if p.HasField("delta") else None,
            unit=p.unit,
            neighbouring=p.neighbouring,
            accountant=p.accountant,
            steps=p.steps,
            phases=tuple(
                PhaseStatement(f.name, f.sample_rate, f.noise_multiplier, f.clip_norm, f.steps) for f in p.phases
            ),
        )
    try:
        status = PlanStatus(message.status)
        refusal = RefusalReason(message.refusal) if message.refusal else None
    except ValueError as error:
        raise WireError(f"description: {error}; relay and agent must run the same version") from None
    return SiteDescription(
        site=message.site,
        status=status,
        refusal=refusal,
        code_digest=message.code_digest,
        tasks=tuple(message.tasks),
        max_rank=message.max_rank,
        public_size=message.public_size,
        privacy=privacy,
        schema_version=message.schema_version,
    )


def _layout(tensors: WireTensors) -> list[pb.TensorLayout]:
    size = sum(array.nbytes for array in tensors.values())
    if size > LARGEST_TRANSFER:
        raise WireError(
            f"adapter: {size / 2**20:.0f} MiB exceeds the limit of {LARGEST_TRANSFER >> 20} MiB for one message; "
            "lower lora.r or adapt fewer modules"
        )
    return [
        pb.TensorLayout(name=name, shape=tensors[name].shape, type=_type_of(name, tensors[name]))
        for name in sorted(tensors)
    ]


def _type_of(name: str, array: np.ndarray[Any, Any]) -> pb.ElementType:
    for kind, stored in _TYPES.items():
        if array.dtype == stored:
            return kind
    raise WireError(f"message: tensor '{name}' is {array.dtype}, expected float32, uint16 or int8")


def _chunks(tensors: WireTensors) -> Iterator[bytes]:
    for name in sorted(tensors):
        raw = np.asarray(tensors[name], tensors[name].dtype.newbyteorder("<"), order="C").tobytes()
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK]


def _check_version(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise WireError(f"message: schema_version {version} is newer than this installation knows; update it")


def _chunks_of(frames: Iterable[pb.TrainRequestFrame | pb.TrainReplyFrame]) -> Iterator[bytes]:
    for frame in frames:
        if frame.WhichOneof("content") != "chunk":
            raise WireError("message: after its header comes something other than tensor data")
        yield frame.chunk


def _tensors(layout: Iterable[pb.TensorLayout], chunks: Iterable[bytes]) -> dict[str, np.ndarray[Any, Any]]:
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    stream = iter(chunks)
    # Python's integers: a product of announced sizes may exceed 64 bits
    expected = sum(_bytes(entry) for entry in layout)
    if expected > LARGEST_TRANSFER:
        raise WireError(f"message: announces {expected / 2**20:.0f} MiB, more than {LARGEST_TRANSFER >> 20} MiB")
    for entry in layout:
        if entry.name in tensors:
            raise WireError(f"message: tensor '{entry.name}' is announced twice")
        size = _bytes(entry)
        raw = bytearray()
        while len(raw) < size:
            chunk = next(stream, b"")
            if not chunk or len(raw) + len(chunk) > size:
                raise WireError(f"message: the bytes of tensor '{entry.name}' do not match its shape")
            raw += chunk
        tensors[entry.name] = np.frombuffer(raw, _TYPES[entry.type]).reshape(tuple(entry.shape))
    if next(stream, None) is not None:
        raise WireError("message: more bytes than its layout announces")
    return tensors


def _bytes(entry: pb.TensorLayout) -> int:
    if entry.type not in _TYPES:
        raise WireError(f"message: tensor '{entry.name}' has elements of a type that this installation does not know")
    return _TYPES[entry.type].itemsize * int(prod(entry.shape))


@dataclass(frozen=True)
class AgentAddress:
    """Where a site agent listens, and the certificates to use when that is not a unix socket."""

    target: str
    """``unix:PATH`` or ``HOST:PORT``."""
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class RemoteSite:
    """A site behind its agent: :class:`common.messages.SiteService` over gRPC.

    Args:
        timeout: seconds to wait for the agent to accept the connection.
    """

    def __init__(self, address: AgentAddress, timeout: float = 10.0) -> None:
        self.address, self.timeout = address, timeout
        self._channel = self._open()
        self._stub = site_pb2_grpc.SiteAgentStub(self._channel)

    def _open(self) -> grpc.Channel:
        if self.address.target.startswith("unix:"):
            return grpc.insecure_channel(self.address.target)
        try:
            files = (self.address.authority, self.address.key, self.address.certificate)
            authority, key, certificate = (file.read_bytes() if file else None for file in files)
        except OSError as error:
            raise ConnectionFailed(f"agent {self.address.target}: {error.filename} cannot be read") from None
        if not (authority and key and certificate):
            raise ConnectionFailed(
                f"agent {self.address.target}: HOST:PORT needs agent-authority, agent-certificate and agent-key"
            )
        return grpc.secure_channel(self.address.target, grpc.ssl_channel_credentials(authority, key, certificate))

    def __enter__(self) -> RemoteSite:
        # Not channel_ready_future: it looks every 0.2 s, and the relay starts anew for every message.
        ask = health_pb2_grpc.HealthStub(self._channel).Check
        try:
            health = ask(health_pb2.HealthCheckRequest(), timeout=self.timeout, wait_for_ready=True)
            serving = health.status == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            serving = False
        if not serving:
            self._channel.close()
            raise ConnectionFailed(
                f"agent {self.address.target}: not reachable, or its certificate is not trusted; "
                "is 'consilium site agent' running, and does --node-config name its address?"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def describe(self, request: DescribeRequest) -> SiteDescription:
        """The site's description and its stand on the plan."""
        message = pb.DescribeRequest(
            schema_version=request.schema_version,
            run_id=request.run_id,
            plan=request.plan,
            code_digest=request.code_digest,
            signature=request.signature,
            witness=request.witness,
        )
        return description_of(self._stub.Describe(message))

    def train(self, request: TrainRequest) -> TrainReply:
        """One round of local training; returns when the site has answered."""
        return train_reply_of(self._stub.Train(train_request_frames(request)))
