"""What is wrong with the connection to a SuperLink, said so that its user can mend it.

Flower reports every transport fault as "unavailable". So after a failure the connection is tried again, step by step:
does anyone listen, do both sides speak the same protocol, is the certificate trusted for this name.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path

from common.errors import ConnectionFailed

TIMEOUT = 10.0
"""Seconds that each step may take."""


def check_connection(host: str, port: int, root_certificates: Path | None, insecure: bool) -> None:
    """Return if a SuperLink can be talked to as configured.

    Args:
        host: its name or IP address, without brackets.
        port: its port.
        root_certificates: PEM file of the trusted authority; None means the system's authorities.
        insecure: plain HTTP is expected.

    Raises:
        ConnectionFailed: with the address, what happened and the remedy.
    """
    where = f"the SuperLink at {f'[{host}]' if ':' in host else host}:{port}"
    try:
        connection = socket.create_connection((host, port), timeout=TIMEOUT)
    except OSError as error:
        raise ConnectionFailed(
            f"{where} cannot be reached ({error}): check the address, and that flower-superlink is running there"
        ) from None
    with connection:
        if insecure:
            _expect_plain_http(connection, where)
        else:
            _expect_trusted_tls(connection, where, host, root_certificates)


def _expect_plain_http(connection: socket.socket, where: str) -> None:
    plain = http.client.HTTPConnection("superlink", timeout=TIMEOUT)
    plain.sock = connection
    try:
        plain.request("GET", "/health")
        plain.getresponse().close()
    except (http.client.HTTPException, OSError):
        raise ConnectionFailed(
            f"{where} does not answer plain HTTP, which insecure = true asks for: "
            "it probably speaks TLS, so set insecure = false and give its CA certificate as root_certificates"
        ) from None


def _expect_trusted_tls(connection: socket.socket, where: str, host: str, root_certificates: Path | None) -> None:
    # Built as Flower builds it: the stricter default of newer Pythons would blame certificates that Flower accepts.
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if root_certificates is None:
            trust.load_default_certs()
        else:
            trust.load_verify_locations(cafile=root_certificates)
    except ssl.SSLError:
        raise ConnectionFailed(
            f"root_certificates '{root_certificates}' is not a PEM certificate: "
            f"ask the operator of {where} for its CA certificate"
        ) from None
    try:
        trust.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        used = f"'{root_certificates}'" if root_certificates is not None else "the system's authorities"
        raise ConnectionFailed(
            f"the certificate of {where} is not trusted ({error.verify_message}; checked against {used}): "
            "give the CA certificate that signed it as root_certificates, and the host name it was issued for"
        ) from None
    except OSError:
        raise ConnectionFailed(
            f"{where} does not speak TLS: check the port; set insecure = true only for a SuperLink on this machine"
        ) from None
