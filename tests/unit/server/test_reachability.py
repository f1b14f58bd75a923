"""Each way in which a SuperLink cannot be talked to, against a real socket."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConnectionFailed
from server.reachability import check_connection

HTTP_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def _self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The certificate of the server under test."""
    folder = tmp_path / "right"
    folder.mkdir()
    return _self_signed(folder)


@contextmanager
def _server(certificate: Path | None = None) -> Iterator[int]:
    """The port of a server that answers one connection, over TLS if it has a certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None:
        tls.load_cert_chain(certificate)

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                if certificate is not None:
                    tls.wrap_socket(connection, server_side=True).close()
                elif connection.recv(1000).startswith(b"GET "):
                    connection.sendall(HTTP_ANSWER)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            thread.join()


def test_a_trusted_certificate_passes(certificate: Path) -> None:
    with _server(certificate) as port:
        check_connection("127.0.0.1", port, certificate, insecure=False)


def test_plain_http_passes_where_it_is_asked_for() -> None:
    with _server() as port:
        check_connection("127.0.0.1", port, None, insecure=True)


def test_another_authority_is_told_apart_from_an_unreachable_server(certificate: Path, tmp_path: Path) -> None:
    other = _self_signed(tmp_path)
    with _server(certificate) as port, pytest.raises(ConnectionFailed, match=rf"127\.0\.0\.1:{port} is not trusted"):
        check_connection("127.0.0.1", port, other, insecure=False)


def test_a_certificate_for_another_name_is_not_trusted(certificate: Path) -> None:
    with _server(certificate) as port, pytest.raises(ConnectionFailed, match=r"not trusted \(Hostname mismatch"):
        check_connection("localhost", port, certificate, insecure=False)


def test_plain_http_to_a_tls_server_names_the_setting(certificate: Path) -> None:
    with _server(certificate) as port, pytest.raises(ConnectionFailed, match="insecure = false"):
        check_connection("127.0.0.1", port, None, insecure=True)


def test_tls_to_a_plain_server_names_the_setting(certificate: Path) -> None:
    with _server() as port, pytest.raises(ConnectionFailed, match="does not speak TLS"):
        check_connection("127.0.0.1", port, certificate, insecure=False)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a certificate")
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ConnectionFailed, match=r"wrong\.pem"):
        check_connection("127.0.0.1", listening.getsockname()[1], wrong, insecure=False)


def test_a_refused_connection_is_unreachable() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            check_connection("127.0.0.1", bound.getsockname()[1], None, insecure=False)
