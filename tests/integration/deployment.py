"""A real Flower deployment on this machine: one SuperLink with TLS and node keys, one SuperNode per site.

Nothing of Flower is imported; its programs run as they would at a coordinator and at its sites. Every process carries a
marker in its environment, because Flower detaches the programs it starts itself (SuperExec, ``flwr-serverapp``,
``flwr-clientapp``) from its own process group: the marker is what finds and ends them all.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]
from credentials import write_certificates, write_node_key

from common.errors import ConsiliumError
from server.submission import (
    PRIVATE_ENVIRONMENT,
    SuperLinkAddress,
    control,
    flower_program,
    follow_log,
    run_status,
)

MARKER = "CONSILIUM_TEST_DEPLOYMENT"
START_TIMEOUT = 90.0
POLL_INTERVAL = 0.05
LOG_TAIL = 6000


class DeploymentFailed(AssertionError):
    """The deployment did not reach the awaited state; the message ends with the tails of all logs."""


@dataclass
class DeployedSite:
    """One site: a SuperNode with its own key, and the address at which its relay looks for the agent.

    Attributes:
        name: the site's name, which the relay sees as ``context.node_config["site"]``.
        agent: ``unix:PATH``; a test starts whatever should answer there. The relay sees it in its node configuration.
        node_config: everything the relay sees.
        port: where the SuperNode's own HTTP interface for its ClientApps listens.
        key: the node's private key; ``key.with_suffix(".pub")`` is what the coordinator registers.
        node_id: Flower's id for the registered key; 0 before registration.
    """

    name: str
    agent: str
    node_config: dict[str, str | int | float | bool]
    port: int
    key: Path
    node_id: int = 0

    @property
    def socket_path(self) -> Path:
        """The path inside ``agent``."""
        return Path(self.agent.removeprefix("unix:"))

    @property
    def public_key(self) -> Path:
        """The registered public key, in OpenSSH form."""
        return self.key.with_suffix(".pub")


@dataclass
class Deployment:
    """SuperLink and SuperNodes, from start to the certain end of every process.

    Args:
        sites: the sites' names, or names with further entries for each node configuration.
        database: keep the SuperLink's state in a file, so that a killed SuperLink can be started again with its nodes
            and runs. Otherwise it lives in memory.
        environment: more variables for every process.
    """

    sites_wanted: Sequence[str] | Mapping[str, Mapping[str, str | int | float | bool]] = ("site-1", "site-2")
    database: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay out folder, ports and keys; nothing runs yet."""
        # A short path: a unix socket's path may have at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="csl-"))
        self._marker = secrets.token_hex(8)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, str] = {}
        wanted = self.sites_wanted
        extra = wanted if isinstance(wanted, Mapping) else {name: {} for name in wanted}
        self._port, *node_ports = free_ports(len(extra) + 1)
        write_certificates(self.folder)
        self.superlink = SuperLinkAddress(f"127.0.0.1:{self._port}", self.folder / "ca.pem")
        self.sites = [
            self._lay_out_site(name, more, port) for (name, more), port in zip(extra.items(), node_ports, strict=True)
        ]

    def __enter__(self) -> Self:
        """Start everything and return when all SuperNodes are online."""
        try:
            self.start_superlink()
            self._register_sites()
            for site in self.sites:
                self.start_supernode(site.name)
            self.wait_until_online()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything; an error on its way out takes the logs along."""
        if error is not None and not isinstance(error, DeploymentFailed):
            error.add_note(self.logs())
        self.close()

    def site(self, name: str) -> DeployedSite:
        """The site of that name."""
        return next(site for site in self.sites if site.name == name)

    def start_superlink(self) -> None:
        """Start the SuperLink (again) and wait until it answers."""
        arguments = [
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--ssl-ca-certfile", str(self.folder / "ca.pem")),
            *("--ssl-certfile", str(self.folder / "server.pem")),
            *("--ssl-keyfile", str(self.folder / "server.key")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        if self.database:
            arguments += ["--database", str(self.folder / "superlink.db")]
        self._start("superlink", "flower-superlink", arguments)
        self._wait("the SuperLink to answer", self._superlink_answers, needs="superlink")

    def start_supernode(self, name: str) -> None:
        """Start a site's SuperNode (again); ``wait_until_online`` tells when it is there."""
        site = self.site(name)
        settings = " ".join(f"{key}={_toml_value(value)}" for key, value in site.node_config.items())
        self._start(
            name,
            "flower-supernode",
            [
                *("--superlink", self.superlink.address, "--root-certificates", str(self.folder / "ca.pem")),
                *("--auth-supernode-private-key", str(site.key)),
                *("--node-config", settings),
                *("--host", "127.0.0.1", "--port", str(site.port)),
            ],
        )

    def kill_server_app(self) -> int:
        """End every running ServerApp process without warning, and only those; return how many there were."""
        return _end([process for process in self._family("superlink") if _is_program(process, "flwr-serverapp")])

    def wait_until_online(self, names: Sequence[str] | None = None, timeout: float = START_TIMEOUT) -> None:
        """Wait until the running SuperNodes of the named sites (default: all) are online.

        As a service manager would, this starts a SuperNode again that has given up: the SuperLink turns the successor
        of a killed one away for as long as it believes the killed one to be alive, which is up to a minute.
        """
        awaited = [site for site in self.sites if names is None or site.name in names]

        def online() -> bool:
            for site in awaited:
                if self._processes[site.name].poll() is not None:
                    self.start_supernode(site.name)
            listed = control(self.superlink, "supernode", "list", "consilium")["nodes"]
            since = {int(node["node-id"]): node["online-at"] for node in listed if node["status"] == "online"}
            return all(since.get(site.node_id, "") >= self._started[site.name] for site in awaited)

        self._wait(f"{[site.name for site in awaited]} to be online", online, timeout, needs="superlink")

    def wait_for_run(self, run_id: int, timeout: float) -> str:
        """Wait until a run has finished, however it did; return its status."""
        lines: list[str] = []

        def follow() -> None:
            # What is wrong, if the log breaks off, the status below will tell.
            with contextlib.suppress(ConsiliumError):
                lines.extend(follow_log(self.superlink, run_id))

        waiting = threading.Thread(target=follow, daemon=True)
        waiting.start()
        waiting.join(timeout)
        status = run_status(self.superlink, run_id)
        if not status.startswith("finished"):
            raise self._failed(f"run {run_id} is still {status} after {timeout:.0f} s; it wrote:\n" + "\n".join(lines))
        return status

    def run_log(self, run_id: int) -> str:
        """What the ServerApp of a finished run wrote to stdout and stderr, of which only the SuperLink has a copy."""
        return "\n".join(follow_log(self.superlink, run_id))

    def logs(self) -> str:
        """The tail of every process's log."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts += [f"==== {path.stem} ====", path.read_text(errors="replace")[-LOG_TAIL:]]
        return "\n".join(parts)

    def close(self) -> None:
        """End every process that this deployment started or that its processes started; remove the folder."""
        for name in list(self._processes):
            self._kill(name)
        while _end(self._marked()):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lay_out_site(self, name: str, more: Mapping[str, str | int | float | bool], port: int) -> DeployedSite:
        key = self.folder / f"{name}.key"
        write_node_key(key)
        agent = f"unix:{self.folder / name}.sock"
        return DeployedSite(name, agent, {"agent": agent, "site": name, **more}, port, key)

    def _register_sites(self) -> None:
        def register(site: DeployedSite) -> None:
            answer = control(
                self.superlink, "supernode", "register", str(site.public_key), "consilium", "--name", site.name
            )
            site.node_id = int(answer["node-id"])

        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(register, self.sites))

    def _environment(self, home: Path) -> dict[str, str]:
        """A small environment of its own: neither proxies nor Python settings of the test run reach the deployment."""
        # OpenBLAS: what kernel it takes decides the last bit of a sum, which simulation and deployment must share.
        names = ("LD_LIBRARY_PATH", "LANG", "SYSTEMROOT", "OPENBLAS_CORETYPE")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {
            **kept,
            **PRIVATE_ENVIRONMENT,
            # Flower starts flower-superexec, flwr-serverapp and flwr-clientapp by bare name.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")),
            "HOME": str(home),
            "FLWR_HOME": str(home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "NO_COLOR": "1",
            **self.environment,
            MARKER: self._marker,
        }

    def _start(self, name: str, program: str, arguments: Sequence[str]) -> None:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        # In the form in which Flower lists when a node went online, to tell it from its killed predecessor.
        self._started[name] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(flower_program(program)), *arguments],
                env=self._environment(home) | {f"{MARKER}_PART": name},
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        _end(self._family(name))
        while _end(self._marked(part=name)):
            pass
        self._processes.pop(name).wait()

    def _family(self, name: str) -> list[psutil.Process]:
        """A started process and its descendants, parents first."""
        try:
            leader = psutil.Process(self._processes[name].pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _marked(self, part: str | None = None) -> list[psutil.Process]:
        """Processes of this deployment by their environment: also those whose parent has gone."""
        found = []
        for process in psutil.process_iter():
            # Others' processes cannot be read, nor can a SuperExec, and any process may end while it is looked at.
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                if environment.get(MARKER) == self._marker and part in (None, environment.get(f"{MARKER}_PART")):
                    found.append(process)
        return found

    def _superlink_answers(self) -> bool:
        trust = ssl.create_default_context(cafile=self.folder / "ca.pem")
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=5, context=trust)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _wait(self, what: str, reached: Callable[[], bool], timeout: float = START_TIMEOUT, *, needs: str = "") -> None:
        deadline = time.monotonic() + timeout
        while not self._try(reached):
            if needs and self._processes[needs].poll() is not None:
                raise self._failed(f"{needs} ended with code {self._processes[needs].returncode} while {what} was due")
            if time.monotonic() > deadline:
                raise self._failed(f"waited {timeout:.0f} s for {what}")
            time.sleep(POLL_INTERVAL)

    def _try(self, reached: Callable[[], bool]) -> bool:
        try:
            return reached()
        except ConsiliumError as error:
            raise self._failed(str(error)) from error

    def _failed(self, what: str) -> DeploymentFailed:
        return DeploymentFailed(f"{what}\n{self.logs()}")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _toml_value(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return str(value)
    # Flower's own parser of --node-config takes everything up to the next double quote, escapes or not.
    if '"' in value or "\\" in value:
        raise ValueError(f"node configuration value {value!r}: Flower cannot carry quotes or backslashes there")
    return f'"{value}"'


def _is_program(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(argument).name == name for argument in process.cmdline()[:2])
    return False


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _end(processes: Sequence[psutil.Process]) -> int:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # A zombie counts as gone: in a container nobody may collect the orphans.
    while any(_runs(process) for process in processes):
        time.sleep(POLL_INTERVAL)
    return len(processes)
