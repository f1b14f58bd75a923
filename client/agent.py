"""The site agent: a long-lived gRPC server around one :class:`client.site.Site`, with grpc.health.v1.

Whoever connects may be hostile: the relay is code that the coordinator ships. A doorman keeps the unix socket, and
certificates keep a port. Requests are bounded in size, number and time, and one adapter at a time is in memory. Errors
never carry text across the border: a fault inside the site becomes the same status with the same words, whatever its
cause, and the cause is logged here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import ssl
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2

from client.config import TlsSection
from client.doorman import Doorman
from common.errors import ConnectionFailed, WireError
from common.messages import DescribeRequest, SiteService
from common.protos import site_pb2 as pb
from common.rpc import description_to_proto, train_reply_frames, train_request_of

log = logging.getLogger(__name__)

FAULT = "the site could not serve the request"
MALFORMED = "the request is malformed"
SERVICE = "consilium.site.v1.SiteAgent"
HEALTH = "grpc.health.v1.Health"

PR_SET_DUMPABLE = 4
"""See prctl(2)."""

LARGEST_FRAME = 4 << 20
"""Bytes of one gRPC message; a plan or a layout is far smaller, and tensors travel in chunks of 1 MiB."""
LARGEST_METADATA = 4 << 10
"""Bytes of a call's header fields; gRPC's own are a few hundred."""
CALLS_AT_A_TIME = 8
"""Calls served at the same time."""
MOST_CALLS = 64
"""Calls served or waiting, of one connection and of all; what comes beyond is refused."""
TRANSFER_SECONDS = 600.0
"""How long a request may take to arrive, and a reply to be taken; 512 MiB in this time are 1 MiB a second."""

LIMITS = (
    ("grpc.max_receive_message_length", LARGEST_FRAME),
    ("grpc.per_message_decompression", 0),  # relays compress nothing, and a few bytes must not become gigabytes
    ("grpc.max_metadata_size", LARGEST_METADATA),
    ("grpc.absolute_max_metadata_size", LARGEST_METADATA),
    ("grpc.max_concurrent_streams", MOST_CALLS),
    ("grpc.so_reuseport", 0),
)


class _Calls:
    """What a relay can ask. Every call reads its request as a stream, so that no request can keep a thread for ever."""

    def __init__(self, site: SiteService) -> None:
        self._site = site
        self._transfer = threading.Lock()
        self.serving = False

    def describe(self, frames: Iterator[pb.DescribeRequest], context: grpc.ServicerContext) -> pb.SiteDescription:
        try:
            with _deadline(context):
                request = _only(frames)
            return description_to_proto(
                self._site.describe(
                    DescribeRequest(
                        request.run_id,
                        request.plan,
                        request.code_digest,
                        request.signature,
                        request.witness,
                        request.schema_version,
                    )
                )
            )
        except BaseException as error:  # gRPC would leave the caller without an answer
            _abort(context, error)

    def train(
        self, frames: Iterator[pb.TrainRequestFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.TrainReplyFrame]:
        try:
            with self._transfer:  # from the first frame read to the last one taken: one adapter in memory, not many
                with _deadline(context):
                    request = train_request_of(frames)
                reply = self._site.train(request)
                with _deadline(context):
                    yield from train_reply_frames(reply)
        except GeneratorExit:  # the caller has left
            raise
        except BaseException as error:
            _abort(context, error)

    def check(
        self, frames: Iterator[health_pb2.HealthCheckRequest], context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        try:
            with _deadline(context):
                service = _only(frames).service
        except Exception as error:
            _abort(context, error)
        if service not in ("", SERVICE):
            context.abort(grpc.StatusCode.NOT_FOUND, MALFORMED)
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self.serving else states.NOT_SERVING)

    def handlers(self) -> Iterator[grpc.GenericRpcHandler]:
        """All there is to call."""
        yield grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.stream_unary_rpc_method_handler(
                    self.describe, pb.DescribeRequest.FromString, pb.SiteDescription.SerializeToString
                ),
                "Train": grpc.stream_stream_rpc_method_handler(
                    self.train, pb.TrainRequestFrame.FromString, pb.TrainReplyFrame.SerializeToString
                ),
            },
        )
        yield grpc.method_handlers_generic_handler(
            HEALTH,
            {
                "Check": grpc.stream_unary_rpc_method_handler(
                    self.check,
                    health_pb2.HealthCheckRequest.FromString,
                    health_pb2.HealthCheckResponse.SerializeToString,
                )
            },
        )


def _only(frames: Iterator[Any]) -> Any:
    """The one message of a request.

    Raises:
        WireError: there is none, or another.
    """
    messages = list(islice(frames, 2))
    if len(messages) != 1:
        raise WireError("request: must be one message")
    return messages[0]


@contextmanager
def _deadline(context: grpc.ServicerContext) -> Iterator[None]:
    """Ends the call unless what follows is done in time.

    Raises:
        WireError: it was not, or the caller has left: gRPC may then show what came so far as if it were all.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        context.cancel()

    timer = threading.Timer(TRANSFER_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if late.is_set() or not context.is_active():
        raise WireError("request: did not come to its end in time")


def _abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    if isinstance(error, WireError):
        log.warning("refused a malformed request: %.300s", ascii(str(error)))  # it may quote what the caller chose
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
    elif not context.is_active():
        log.warning("a call ended before it was served")
    else:
        log.error("a request could not be served", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, FAULT)
    raise AssertionError("abort raises")


def forbid_inspection() -> None:
    """From now on no process of the same user can trace this one or read its memory, and no core dump is written.

    Call it before anything secret is read. Root still can, and where there is no ``prctl`` nothing changes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _credentials(tls: TlsSection) -> grpc.ServerCredentials:
    """Certificates for both sides. They are tried here, because gRPC would say of any fault only that it cannot bind.

    Raises:
        ConnectionFailed: a file cannot be read or is not what it should be.
    """
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        trial.load_verify_locations(tls.authority)
    except ssl.SSLError:
        raise ConnectionFailed(f"tls.authority = '{tls.authority}': is not a PEM certificate") from None
    except OSError as error:
        raise ConnectionFailed(f"tls.authority = '{tls.authority}': cannot be read ({error.strerror})") from None
    try:
        trial.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    except ssl.SSLError as error:
        raise ConnectionFailed(
            f"tls.key = '{tls.key}': is not the unencrypted PEM key of tls.certificate = '{tls.certificate}' "
            f"({error.reason or 'not PEM'}); give the pair that was issued together"
        ) from None
    except OSError as error:
        raise ConnectionFailed(
            f"tls.certificate = '{tls.certificate}', tls.key = '{tls.key}': cannot be read ({error.strerror})"
        ) from None
    return grpc.ssl_server_credentials([pair], tls.authority.read_bytes(), True)


class Agent:
    """Serves a site until stopped.

    Args:
        listen: ``unix:PATH``, or ``HOST:PORT`` with TLS on both sides, where whoever shows a certificate of the
            authority is welcome.
        peers: ids of the users that may connect to a unix socket; the agent's own alone, unless given.

    Raises:
        ConnectionFailed: the address is in use or a certificate cannot be read.
    """

    def __init__(
        self, site: SiteService, listen: str, tls: TlsSection | None = None, peers: frozenset[int] | None = None
    ) -> None:
        self.listen = listen
        self._calls = _Calls(site)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(CALLS_AT_A_TIME, thread_name_prefix="call"),
            handlers=tuple(self._calls.handlers()),
            options=LIMITS,
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        self._stopped = threading.Event()
        self._doorman: Doorman | None = None
        self.port = 0
        if listen.startswith("unix:"):
            self._doorman = self._keep_door(frozenset({os.geteuid()}) if peers is None else peers)
        else:
            assert tls is not None
            self.port = self._open_port(_credentials(tls))

    def _keep_door(self, peers: frozenset[int]) -> Doorman:
        if sys.platform != "linux":
            raise ConnectionFailed(
                f"site.listen = '{self.listen}': only Linux tells who connects to a unix socket; "
                "use HOST:PORT with [tls]"
            )
        return Doorman(Path(self.listen.removeprefix("unix:")), peers, self._server.add_insecure_port)

    def _open_port(self, credentials: grpc.ServerCredentials) -> int:
        try:
            return int(self._server.add_secure_port(self.listen, credentials))
        except RuntimeError:
            raise ConnectionFailed(
                f"site.listen = '{self.listen}': cannot be bound; is another agent running?"
            ) from None

    def start(self) -> None:
        """Starts serving and reports healthy."""
        self._server.start()
        self._calls.serving = True
        if self._doorman is not None:
            self._doorman.start()

    def ask_to_stop(self) -> None:
        """Makes :meth:`wait` return; safe in a signal handler."""
        self._stopped.set()

    def wait(self) -> None:
        """Blocks until :meth:`ask_to_stop`."""
        self._stopped.wait()

    def stop(self, grace: float = 1.0) -> None:
        """Stops serving; a release that is being computed is finished or re-executed later from its seed."""
        self._calls.serving = False
        self._server.stop(grace).wait()
        if self._doorman is not None:
            self._doorman.stop()
