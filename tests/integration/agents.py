"""Site agents for deployments under test: each site's folder with ``site.toml`` and data, and its agent process."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from deployment import Deployment
from site_files import site_tables

from client.agent import Agent
from client.assemble import build_site
from client.config import read_site_config
from client.privacy.ledger import Ledger
from common.signing import SigningKey

PROGRAM = Path(sys.executable).with_name("consilium")
INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
    str(PROGRAM),
)
"""``consilium`` that hears SIGINT, also where the tests run in the background of a shell, which makes children deaf."""
START_TIMEOUT = 120.0
POLL_INTERVAL = 0.05
BASE_MODEL_LOADED = "base model loaded"

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
"""One thread everywhere: the number of threads decides how sums are rounded."""


class AgentFailed(AssertionError):
    """An agent did not do what a test needs; the message ends with its log."""


def agent_tables(
    name: str, listen: str, model: Path, coordinator: str, **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """``site.toml`` as tables: automatic approval within wide bounds, fixed test keys, and a relay of the same user.

    Args:
        coordinator: the pinned public key.
        sections: settings put over these, by section.
    """
    usual: dict[str, Mapping[str, Any]] = {
        "site": {"name": name, "listen": listen},
        "population": {"public_size": "exact", "lifetime_epsilon": 1e6},
        "data": {"default": {"path": "train.csv", "columns": {"text": "text", "label": "label"}}},
        "policy": {"max_epsilon": 8.0, "max_delta": 1e-3},
        "device": {"device": "cpu", "physical_batch": 8, "threads": 1},
        "testing": {"noise": "fast", "seed": 0},
    }
    merged = {key: {**usual.get(key, {}), **sections.get(key, {})} for key in {**usual, **sections}}
    return site_tables(model, coordinator, **merged)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A csv file with these rows."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class SiteAgent:
    """One site: its folder, and the process that serves it.

    Attributes:
        folder: holds ``site.toml``, the data and (unless ``site.toml`` says otherwise) ``state/``.
    """

    name: str
    folder: Path
    tables: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Writes the folder; nothing runs yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "train.csv", self.rows)
        self.config.write_bytes(tomli_w.dumps(self.tables).encode())

    @property
    def config(self) -> Path:
        """``site.toml``."""
        return self.folder / "site.toml"

    @property
    def log_file(self) -> Path:
        """What all processes of this agent wrote."""
        return self.folder / "agent.log"

    def log(self) -> str:
        """The text of the log."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def base_model_loads(self) -> int:
        """How often this agent's processes loaded a base model."""
        return self.log().count(BASE_MODEL_LOADED)

    def charges(self) -> dict[str, list[int]]:
        """Run id → rounds that were charged to the ledger."""
        with contextlib.closing(Ledger(self.folder / "state")) as ledger:
            return {entry.run_id: [round for round, *_ in ledger.charges(entry.digest)] for entry in ledger.plans()}

    def run(self, *arguments: str) -> str:
        """``consilium site …`` on this site's settings; returns what it printed to stdout."""
        done = subprocess.run(
            [str(PROGRAM), "site", *arguments, "--config", str(self.config)],
            env=self._environment(),
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=START_TIMEOUT,
        )
        if done.returncode:
            raise AgentFailed(f"'consilium site {' '.join(arguments)}' ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Starts the agent (again) and waits until it serves."""
        before = self.log().count("serves at")
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [str(PROGRAM), "--verbose", "site", "agent", "--config", str(self.config)],
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self.log().count("serves at") == before:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AgentFailed(f"the agent of '{self.name}' does not serve:\n{self.log()}")
            time.sleep(POLL_INTERVAL)

    def stop(self) -> None:
        """Ends the agent in order."""
        self._end("terminate")

    def kill(self) -> None:
        """Ends the agent without warning."""
        self._end("kill")

    def _end(self, how: str) -> None:
        if self.process is not None:
            getattr(self.process, how)()
            try:
                self.process.wait(timeout=20.0)
            finally:
                self.process.kill()
                self.process = None

    def _environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ
        }
        return {**kept, "HOME": str(self.folder), **ENVIRONMENT, **self.environment}


@dataclass
class Federation:
    """A deployment, and an agent at each of its sites.

    Attributes:
        data: train.csv with the rows of all sites, validation.csv and test.csv.
        model: the folder of the base model.
    """

    deployment: Deployment
    data: Path
    model: Path
    agents: dict[str, SiteAgent] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        """The coordinator's signing key."""
        return self.deployment.folder / "coordinator.pem"

    def __enter__(self) -> Self:
        """Starts everything at the same time."""
        SigningKey.create(self.key)
        with (self.data / "train.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for site in self.deployment.sites:
            own = [row for row in rows if row["hospital"] == site.name]
            self.agents[site.name] = self.agent(site.name, rows=own)
        try:
            with ThreadPoolExecutor(1 + len(self.agents)) as pool:
                started = [pool.submit(agent.start) for agent in self.agents.values()]
                started.append(pool.submit(self.deployment.__enter__))
                for one in started:
                    one.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all of it."""
        self.close()

    def close(self) -> None:
        """Ends all of it without warning."""
        for agent in self.agents.values():
            agent.kill()
        self.deployment.close()

    def agent(
        self,
        at: str,
        rows: Sequence[Mapping[str, str]] | None = None,
        folder: str = "",
        **sections: Mapping[str, Any],
    ) -> SiteAgent:
        """An agent for the address of site ``at``, not started.

        Args:
            rows: its training data; those of the site's own agent, unless given.
            folder: the name of its folder; the site's, unless given.
            sections: settings put over the usual ones, by section of ``site.toml``.
        """
        coordinator = SigningKey.load(self.key).public
        tables = agent_tables(at, self.deployment.site(at).agent, self.model, coordinator, **sections)
        home = self.deployment.folder / "agents" / (folder or at)
        return SiteAgent(at, home, tables, self.agents[at].rows if rows is None else rows)

    @contextlib.contextmanager
    def nobody_at(self, site: str) -> Iterator[None]:
        """While this lasts, a site's address is free; its agent runs on and is found there again afterwards."""
        path = self.deployment.site(site).socket_path
        aside = path.with_suffix(".aside")
        path.rename(aside)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            aside.rename(path)

    @contextlib.contextmanager
    def in_this_process(self, agent: SiteAgent) -> Iterator[None]:
        """While this lasts, another agent than the site's own serves at its address, without the wait for a start."""
        settings = read_site_config(agent.config)
        site, _ = build_site(settings)
        with self.nobody_at(agent.name):
            served = Agent(site, settings.site.listen)
            served.start()
            try:
                yield
            finally:
                served.stop(grace=0.0)
                site.ledger.close()

    def logs(self) -> str:
        """The logs of all agents."""
        return "\n".join(f"==== agent of {name} ====\n{agent.log()}" for name, agent in self.agents.items())
