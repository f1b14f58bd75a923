"""The site agent: a long-lived gRPC server around one :class:`client.site.Site`, with grpc.health.v1.

Errors never carry text across the border: a fault inside the site becomes the same status with the same words, whatever
its cause, and the cause is logged here.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.config import TlsSection
from common.errors import ConnectionFailed, WireError
from common.messages import DescribeRequest, SiteService
from common.protos import site_pb2 as pb
from common.protos import site_pb2_grpc
from common.rpc import description_to_proto, train_reply_frames, train_request_of

log = logging.getLogger(__name__)

FAULT = "the site could not serve the request"
MALFORMED = "the request is malformed"
SERVICE = "consilium.site.v1.SiteAgent"


class _Servicer(site_pb2_grpc.SiteAgentServicer):  # type: ignore[misc]
    def __init__(self, site: SiteService) -> None:
        self.site = site

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.SiteDescription:
        try:
            return description_to_proto(
                self.site.describe(
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
        except Exception as error:
            _abort(context, error)

    def Train(
        self, request_iterator: Iterator[pb.TrainRequestFrame], context: grpc.ServicerContext
    ) -> Iterator[pb.TrainReplyFrame]:
        try:
            frames = list(train_reply_frames(self.site.train(train_request_of(request_iterator))))
        except Exception as error:
            _abort(context, error)
        yield from frames


def _abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    if isinstance(error, WireError):
        log.warning("refused a malformed request: %s", error)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
    log.error("a request could not be served", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, FAULT)
    raise AssertionError("abort raises")


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
        listen: ``unix:PATH`` (the socket is created 0660, for the relay's group), or ``HOST:PORT`` with TLS on both
            sides.

    Raises:
        ConnectionFailed: the address is in use or a certificate cannot be read.
    """

    def __init__(self, site: SiteService, listen: str, tls: TlsSection | None = None) -> None:
        self.listen = listen
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
        servicer: Any = _Servicer(site)
        site_pb2_grpc.add_SiteAgentServicer_to_server(servicer, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._stopped = threading.Event()
        self._bind(tls)

    def _bind(self, tls: TlsSection | None) -> None:
        unix = self.listen.startswith("unix:")
        if unix:
            self._free_socket(Path(self.listen.removeprefix("unix:")))
        try:
            if unix:
                port = self._server.add_insecure_port(self.listen)
            else:
                assert tls is not None
                port = self._server.add_secure_port(self.listen, _credentials(tls))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConnectionFailed(f"site.listen = '{self.listen}': cannot be bound; is another agent running?")
        if unix:
            os.chmod(self.listen.removeprefix("unix:"), 0o660)
        self.port = port

    def _free_socket(self, path: Path) -> None:
        """Removes a socket left by a killed agent; refuses if somebody still answers there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        if not path.is_socket():
            raise ConnectionFailed(
                f"site.listen = '{self.listen}': there is a file that is no socket; give another path"
            )
        channel = grpc.insecure_channel(self.listen)
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            path.unlink()
        else:
            raise ConnectionFailed(
                f"site.listen = '{self.listen}': another agent is already serving there; stop it first"
            )
        finally:
            channel.close()

    def start(self) -> None:
        """Starts serving and reports healthy."""
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def ask_to_stop(self) -> None:
        """Makes :meth:`wait` return; safe in a signal handler."""
        self._stopped.set()

    def wait(self) -> None:
        """Blocks until :meth:`ask_to_stop`."""
        self._stopped.wait()

    def stop(self, grace: float = 1.0) -> None:
        """Stops serving; a release that is being computed is finished or re-executed later from its seed."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
