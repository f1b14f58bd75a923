"""Simulations on Ray, with two local nodes of one core each: what one process gives, whatever dies on the way."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from safetensors.numpy import load_file

pytest.importorskip("ray", reason="needs the extra 'ray'")

from client.privacy.ledger import Ledger
from common.config import RunConfig
from common.errors import ConfigError, OutputError, RunFailed
from common.messages import SiteDescription
from common.sections import SimulationSection
from server.watcher import Progress, Silent
from simulations import ray_actors
from simulations.federation import Arm, Engine, Federation, Trained
from simulations.ray_cluster import TOO_SLOW, cluster
from simulations.ray_engine import RayEngine
from simulations.ray_sites import Footing

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
SITES = ("north", "south", "west")
PHASES = [
    {"name": "head", "rounds": 2, "sample_rate": 1.0, "train": ["head"], "learning_rate": 2.0},
    {"name": "lora", "rounds": 2, "steps": 2, "sample_rate": 0.5, "train": ["head", "lora"]},
]


@pytest.fixture(scope="module")
def tables(tiny_bert: Path, triage_data: Path) -> dict[str, Any]:
    """The settings of a small run: three sites, two phases, epsilon 8."""
    return {
        "model": {"name": str(tiny_bert)},
        "task": {
            "name": "sequence-classification",
            "labels": ["urgent", "routine", "review"],
            "max_length": 32,
        },
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 2},
        "phase": PHASES,
    }


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two Ray nodes on this machine, each with one core and little shared memory."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray's own files
        running = Cluster()
        started(running, {**node, "include_dashboard": False})
        started(running, node)
        yield running
        running.shutdown()
        gc.collect()


def started(nodes: Any, node: Mapping[str, Any], attempts: int = 3) -> None:
    """Adds a node; Ray gives its processes 30 s to start, which a busy machine may not keep."""
    for attempt in range(1, attempts + 1):
        try:
            nodes.add_node(**node)
            return
        except Exception as error:
            if TOO_SLOW not in str(error) or attempt == attempts:
                raise


@pytest.fixture(scope="module")
def federation(tables: dict[str, Any]) -> Iterator[Federation]:
    """The driver's own, on as many threads as an actor has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Federation(RunConfig.model_validate(tables))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(nodes: Any, federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEngine]:
    """An actor on each node, with the federation loaded."""
    section = SimulationSection(engine="ray", ray_address=nodes.address)
    with cluster(section), RayEngine(federation.config, federation, tmp_path_factory.mktemp("ray")) as running:
        yield running


class Watched(Silent):
    """Calls a function when all sites have described themselves, before the first round."""

    def __init__(self, ready: Any = None) -> None:
        self.ready = ready

    def sites(self, described: Mapping[str, SiteDescription]) -> None:
        if self.ready is not None:
            self.ready()


def train(federation: Federation, folder: Path, engine: Engine | None, ready: Any = None) -> Trained:
    """One arm with all sites, under the same run id wherever it is run."""

    @contextmanager
    def watch(title: str, rounds: int) -> Iterator[Progress]:
        yield Watched(ready)

    return federation.run(Arm("all", folder, federation.config, SITES), "same-run", False, watch, engine)


def books(folder: Path) -> dict[str, Any]:
    """What each site's ledger says was charged and executed."""
    found = {}
    for site in SITES:
        ledger = Ledger(folder / "sites" / site, durable=False)
        [plan] = ledger.plans()
        found[site] = (plan.digest, plan.statement, ledger.charges(plan.digest), ledger.balance(plan.population))
        ledger.close()
    return found


def history(trained: Trained, *without: str) -> list[dict[str, Any]]:
    """The records of a run, but for the time that it took."""
    left_out = {"seconds", *without}
    return [{key: value for key, value in record.items() if key not in left_out} for record in trained.result.history]


def same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def in_one_process(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """The run that the others must equal."""
    folder = tmp_path_factory.mktemp("in-process") / "out"
    return train(federation, folder, None), folder


class HeldUp:
    """Holds the lock of a site's audit log: the site reserves the round, and stops before it tells the log."""

    def __init__(self, folder: Path, site: str = "north") -> None:
        self.log = folder / "sites" / site / "audit.jsonl"
        self._stream: IO[bytes] | None = None

    def hold(self) -> None:
        self._stream = self.log.open("rb")
        fcntl.flock(self._stream, fcntl.LOCK_EX)

    def release(self) -> None:
        assert self._stream is not None
        self._stream.close()

    def waiting(self) -> int:
        """The process that stands before the lock, once there is one."""
        number = f":{self.log.stat().st_ino}"
        while True:
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if fields[1] == "->" and fields[6].endswith(number):
                    return int(fields[5])
            time.sleep(0.02)


def test_two_nodes_give_what_one_process_gives(
    federation: Federation, engine: RayEngine, in_one_process: tuple[Trained, Path], tmp_path: Path
) -> None:
    alone, folder = in_one_process
    spread = train(federation, tmp_path / "out", engine.grid)
    assert len({post.actor.who.pid for post in engine.posts} - {os.getpid()}) == 2  # one core each: not on one node
    assert same_bits(spread.result.adapter, alone.result.adapter)
    assert history(spread) == history(alone)
    assert books(tmp_path / "out") == books(folder)


def test_an_actor_killed_in_mid_round_is_replaced_and_nothing_is_charged_twice(
    federation: Federation, engine: RayEngine, in_one_process: tuple[Trained, Path], tmp_path: Path
) -> None:
    alone, folder = in_one_process
    site, killed = HeldUp(tmp_path / "out"), []

    def kill() -> None:
        killed.append(site.waiting())
        assert list((site.log.parent / "secrets").iterdir())  # the round is charged, its release is not there
        os.kill(killed[0], signal.SIGKILL)
        site.release()

    def ready() -> None:
        site.hold()
        threading.Thread(target=kill).start()

    before = {post.actor.who.pid for post in engine.posts}
    spread = train(federation, tmp_path / "out", engine.grid, ready)
    after = {post.actor.who.pid for post in engine.posts}
    assert killed[0] in before - after and len(after) == 2 and len(after & before) == 1
    assert same_bits(spread.result.adapter, alone.result.adapter)
    # What the new actor has not received itself it is sent in full.
    assert history(spread, "bytes_down") == history(alone, "bytes_down")
    assert books(tmp_path / "out") == books(folder)
    assert not list((site.log.parent / "secrets").iterdir())


def test_what_goes_wrong_at_a_site_is_said_by_the_driver(
    federation: Federation, engine: RayEngine, tmp_path: Path
) -> None:
    ledger = tmp_path / "out" / "sites" / "south" / "ledger.sqlite"
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(b"no database" * 1000)
    with pytest.raises(RunFailed, match=r"site 'south': ledger .*; mend the cause, then --resume"):
        train(federation, tmp_path / "out", engine.grid)
    train(federation, tmp_path / "next", engine.grid)  # the actors are as good as before


def test_an_actor_that_does_not_see_the_folder_or_has_other_data_gets_no_work(
    engine: RayEngine, federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Footing("code", "torch", "model", "adapter", "data")
    ready = engine.posts[0].actor.handle.load.remote(federation.config, tmp_path / "no mark", 1)
    employer = ray_actors.Employer(federation.config, tmp_path, other)
    with pytest.raises(OutputError, match="all hosts of the Ray cluster must share it"):
        employer._introduced(ready)
    (tmp_path / "mark").touch()
    ready = engine.posts[0].actor.handle.load.remote(federation.config, tmp_path / "mark", 1)
    with pytest.raises(ConfigError, match="data: give every host the same data"):
        ray_actors.Employer(federation.config, tmp_path, other)._introduced(ready)


@pytest.mark.slow
def test_the_sites_of_a_node_that_is_gone_are_taken_over(
    nodes: Any, federation: Federation, engine: RayEngine, in_one_process: tuple[Trained, Path], tmp_path: Path
) -> None:
    alone, folder = in_one_process
    [second] = nodes.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid
    [lost] = [post for post in engine.posts if psutil.Process(post.actor.who.pid).ppid() == raylet]
    site = HeldUp(tmp_path / "out", next(site for site, post in engine._home.items() if post is lost))

    def pull_the_plug() -> None:
        site.waiting()
        nodes.remove_node(second, allow_graceful=False)
        site.release()

    def ready() -> None:
        site.hold()
        threading.Thread(target=pull_the_plug).start()

    spread = train(federation, tmp_path / "out", engine.grid, ready)
    assert lost not in engine.posts and len(engine.posts) == 1
    assert same_bits(spread.result.adapter, alone.result.adapter)
    assert books(tmp_path / "out") == books(folder)


class Driver:
    """``consilium simulate`` with a Ray of its own, in a process of its own.

    Attributes:
        tag: stands in the environment of every process that it starts.
    """

    def __init__(self, *arguments: str | Path) -> None:
        self.tag = secrets.token_hex(8)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONSILIUM_TEST": self.tag}
        command = [sys.executable, "-m", "consilium", "simulate", "--json", *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def end(self, send: int | None = None) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        if send == signal.SIGINT:
            os.killpg(self.process.pid, send)  # as a terminal does
        elif send is not None:
            self.process.send_signal(send)
        out, err = self.process.communicate(timeout=600)
        return self.process.returncode, out.decode(), err.decode()

    def left(self, seconds: float) -> set[str]:
        """Processes that are still there after so long."""
        deadline = time.monotonic() + seconds
        while (found := set(self._tagged())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _tagged(self) -> Iterator[str]:
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("CONSILIUM_TEST") == self.tag:
                    yield " ".join(process.cmdline())


@pytest.mark.slow
def test_interrupted_and_killed_runs_leave_no_process_and_resume_to_the_same_result(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    config, out = tmp_path / "run.toml", tmp_path / "out"
    config.write_text(tomli_w.dumps(tables), encoding="utf-8")
    ray = ["--set", "simulation.engine=ray", "--set", "simulation.cpus_per_actor=0.25", "--set", "simulation.actors=2"]
    folders = set(Path("/tmp").glob("ray-*"))

    def held_up(driver: Driver) -> HeldUp:
        """Stops the site within a round; one that is made anew, before its first word."""
        site = HeldUp(out)
        while not any(out.glob("rounds/*")):
            assert driver.process.poll() is None, driver.end()
            time.sleep(0.02)
        site.hold()
        site.waiting()
        return site

    driver = Driver("--config", config, "--out", out, *ray)
    site = held_up(driver)
    code, printed, said = driver.end(signal.SIGINT)
    assert (code, printed, driver.left(30)) == (130, "", set()) and "--resume" in said and "Traceback" not in said
    assert set(Path("/tmp").glob("ray-*")) == folders
    site.release()

    driver = Driver("--resume", out)
    site = held_up(driver)
    assert driver.end(signal.SIGKILL)[0] == -signal.SIGKILL and driver.left(60) == set()
    site.release()

    driver = Driver("--resume", out)
    code, printed, said = driver.end()
    assert (code, said, driver.left(30)) == (0, "", set()) and json.loads(printed)["best_round"] is not None
    alone = Driver("--config", config, "--out", tmp_path / "alone")
    assert alone.end()[0] == 0
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tmp_path / "alone")]
    assert same_bits(*adapters)
    charged = [{site: books[2] for site, books in books(folder).items()} for folder in (out, tmp_path / "alone")]
    assert charged[0] == charged[1]
    for folder in set(Path("/tmp").glob("ray-*")) - folders:
        shutil.rmtree(folder)  # of the driver that was killed
