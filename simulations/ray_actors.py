"""Actors of a Ray cluster: how many fit, started on the nodes that have room, and checked before they get work."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources
from ray.exceptions import RayError, RayTaskError

from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError, OutputError, RunFailed
from simulations.ray_sites import Footing, Introduction, SiteActor

READY_WITHIN = 600.0
"""Seconds until Ray must have found room for an actor and the actor have loaded model and data."""
LOOK_SECONDS = 2.0
"""How often is looked whether there is still room for an actor that is waited for."""
REMEDY = {
    "code": "install the same version of Consilium on every host",
    "torch": "install the same version of torch on every host",
    "model": "give every host the same base model",
    "adapter": "install the same versions of transformers and peft on every host",
    "data": "give every host the same data under data.path",
}
"""What an actor's footing may differ in → what helps."""


class NoRoom(RunFailed):
    """The nodes that are left have no room for so many actors."""


class DiedEarly(RunFailed):
    """An actor died before it could serve."""


@dataclass(frozen=True)
class Hired:
    """An actor that is ready to serve."""

    handle: Any
    who: Introduction


class Employer:
    """Starts actors for one run.

    Args:
        config: with absolute paths.
        folder: of the run; it need not exist yet.
        footing: the driver's own.
    """

    def __init__(self, config: RunConfig, folder: Path, footing: Footing) -> None:
        self.config, self.folder, self.footing = config, folder, footing
        section = config.simulation
        self._resources = {"num_cpus": section.cpus_per_actor, "num_gpus": section.gpus_per_actor}
        self._threads = max(1, math.floor(section.cpus_per_actor))

    @property
    def room(self) -> int:
        """How many actors the cluster's nodes have room for, were they all free."""
        try:
            return int(pool_size_from_resources(self._resources))
        except ValueError:  # none at all
            return 0

    def wanted(self) -> int:
        """How many actors there shall be.

        Raises:
            ConfigError: the cluster has no room for them.
        """
        section, room = self.config.simulation, self.room
        each = f"{section.cpus_per_actor:g} CPUs and {section.gpus_per_actor:g} GPUs each"
        if room and (section.actors or 0) <= room:
            return section.actors or room
        asked = f"simulation.actors = {section.actors}" if section.actors else "simulation.engine = 'ray'"
        raise ConfigError(
            f"{asked}: the nodes of the Ray cluster have room for {room} actors ({each}); ask for fewer, lower "
            "cpus_per_actor or gpus_per_actor, or add nodes"
        )

    def hire(self, count: int, beside: int = 0) -> list[Hired]:
        """So many actors, loaded at the same time.

        Args:
            beside: how many others there are.

        Raises:
            NoRoom: nodes are gone; it takes Ray some seconds to notice.
            ConfigError: what an actor loaded is not what the driver has.
            OutputError: an actor does not see the run's folder.
            DiedEarly: an actor died while it loaded.
            RunFailed: an actor was not ready in time.
        """
        kind: Any = ray.remote(SiteActor)
        options = {**self._resources, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        handles = [kind.options(**options).remote() for _ in range(count)]
        deadline = time.monotonic() + READY_WITHIN
        try:
            with _mark(self.folder) as mark:
                loading = [handle.load.remote(self.config, mark, self._threads) for handle in handles]
                for ready in loading:
                    self._await(ready, deadline, count + beside)
                return [Hired(*pair) for pair in zip(handles, map(self._introduced, loading), strict=True)]
        except BaseException:
            for handle in handles:
                ray.kill(handle)
            raise

    def _await(self, ready: Any, deadline: float, needed: int) -> None:
        while not ray.wait([ready], timeout=LOOK_SECONDS)[0]:
            if self.room < needed:
                raise NoRoom(
                    f"simulation.engine = 'ray': the cluster has lost nodes, and has no room for {needed} actors"
                )
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"simulation.engine = 'ray': an actor was not ready within {READY_WITHIN:g} s; other jobs may hold "
                    "the CPUs or GPUs of the cluster ('ray status' tells), or the model loads too slowly"
                )

    def _introduced(self, ready: Any) -> Introduction:
        """Compares what an actor has with what the driver has."""
        try:
            who: Introduction = ray.get(ready)
        except RayTaskError as error:
            if not isinstance(error.cause, ConsiliumError):
                raise
            raise ConfigError(
                f"simulation.engine = 'ray': an actor cannot load the run ({error.cause}); every host of the cluster "
                "needs model and data under the same paths"
            ) from None
        except RayError as error:
            raise DiedEarly(
                f"simulation.engine = 'ray': an actor died while it loaded model and data ({first_line(error)}); each "
                "holds a model of its own: lower simulation.actors, or give the nodes more memory"
            ) from None
        if not who.sees_mark:
            raise OutputError(
                f"--out {self.folder}: is not there on {who.host}; the sites' ledgers are kept in it, so all hosts of "
                "the Ray cluster must share it: give a folder on a file system that they all have under this path"
            )
        if differing := self.footing.differs_in(who.footing):
            what = "; ".join(f"{name}: {REMEDY[name]}" for name in differing)
            raise ConfigError(f"simulation.engine = 'ray': {who} has loaded something else than the driver ({what})")
        return who


@contextmanager
def _mark(folder: Path) -> Iterator[Path]:
    """A file in the folder, or in the nearest one above that exists already, as long as actors look for it."""
    while not folder.is_dir():
        folder = folder.parent
    mark = folder / f".consilium-{secrets.token_hex(8)}"
    try:
        mark.touch()
        yield mark
    except OSError as error:
        raise OutputError(f"--out {folder}: cannot be written ({error.strerror}); give another folder") from None
    finally:
        mark.unlink(missing_ok=True)


def dealt_out(sizes: Mapping[str, int], actors: int) -> list[list[str]]:
    """Equally many sites for each actor, and about equally many rows: by size, dealt to and fro."""
    order = sorted(sizes, key=lambda site: (-sizes[site], site))
    shares: list[list[str]] = [[] for _ in range(actors)]
    for number, site in enumerate(order):
        lap, place = divmod(number, actors)
        shares[place if lap % 2 == 0 else actors - 1 - place].append(site)
    return shares


def first_line(error: RayError) -> str:
    """What Ray says, without its advice."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
