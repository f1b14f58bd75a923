"""Ray listens on all network interfaces: whoever does not have the run's token is turned away at every port."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]
STARTED = """
import os, sys
from simulations import cli, simulate  # what the command line has imported by then
from common.errors import ConnectionFailed
from common.sections import SimulationSection
from simulations.ray_cluster import cluster

for attempt in (1, 2, 3):
    try:
        with cluster(SimulationSection(engine="ray")):
            import ray
            ray.get(ray.remote(lambda: None).remote())  # a worker is there
            os.write(1, (os.environ.get("RAY_AUTH_TOKEN", "none") + "\\n").encode())
            sys.stdin.read()
            break
    except ConnectionFailed:  # the machine was too busy
        if attempt == 3:
            raise
"""
HARMLESS = {
    "head": "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "node": "/ray.rpc.NodeManagerService/GetNodeStats",
    "worker": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "objects": "/ray.rpc.ObjectManagerService/FreeObjects",
}
"""A call that each of Ray's kinds of gRPC server understands and that changes nothing."""


@dataclass(frozen=True)
class Running:
    """A local Ray of a run."""

    token: str
    ports: tuple[tuple[str, int], ...]
    """Where its processes listen for other machines."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Started as ``simulation.engine = "ray"`` does, in a process that knows no Ray before."""
    pipe = subprocess.PIPE
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", STARTED]
    driver = subprocess.Popen(command, cwd=ROOT, env=bare, stdin=pipe, stdout=pipe, stderr=pipe)
    assert driver.stdin and driver.stdout
    known = psutil.Process(driver.pid)
    try:
        token = driver.stdout.readline().decode().strip()
        assert token, driver.communicate()[1].decode()
        ports = {
            (socket.laddr.ip, socket.laddr.port)
            for process in (known, *known.children(recursive=True))
            for socket in process.net_connections("tcp")
            if socket.status == psutil.CONN_LISTEN and not socket.laddr.ip.startswith("127.")
        }
        yield Running(token, tuple(sorted(ports)))
    finally:
        left = [known, *known.children(recursive=True)] if known.is_running() else []
        driver.communicate(timeout=60)
        for process in psutil.wait_procs(left, timeout=30)[1]:
            process.kill()


def answers(host: str, port: int, token: str | None) -> dict[str, str]:
    """What a stranger hears: the status of each call, or of HTTP."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    found = {}
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for kind, method in HARMLESS.items():
            try:
                channel.unary_unary(method)(b"", timeout=10, metadata=tuple(headers.items()))
                found[kind] = "OK"
            except grpc.RpcError as refused:
                found[kind] = refused.code().name
    if set(found.values()) != {"UNAVAILABLE"}:
        return {kind: status for kind, status in found.items() if status != "UNIMPLEMENTED"}
    web = http.client.HTTPConnection(host, port, timeout=10)
    try:
        web.request("GET", "/", headers=headers)
        return {"web": str(web.getresponse().status)}
    finally:
        web.close()


def test_every_port_of_a_local_ray_turns_away_whoever_has_no_token(running: Running) -> None:
    kinds: set[str] = set()
    for host, port in running.ports:
        heard = answers(host, port, None)
        assert set(heard.values()) in ({"UNAUTHENTICATED"}, {"401"}), (host, port, heard)
        heard = answers(host, port, "0" * len(running.token))
        assert set(heard.values()) in ({"UNAUTHENTICATED"}, {"403"}), (host, port, heard)
        kinds |= heard.keys()
    assert kinds >= HARMLESS.keys()  # none was missed


def test_whoever_has_the_token_is_heard(running: Running) -> None:
    """So what others hear is for want of it."""
    assert len(bytes.fromhex(running.token)) == 32
    heard = [answers(host, port, running.token) for host, port in running.ports]
    assert {"head": "OK"} in heard
    assert not {"UNAUTHENTICATED", "401", "403"} & {status for one in heard for status in one.values()}
