"""A federation in one process: the real server loop, the real sites, one resident base model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from client.audit_log import AuditLog
from client.policy import policy_for, rounded
from client.privacy.budget import sample_rates, state_privacy
from client.privacy.ledger import Ledger
from client.privacy.row_independence import Probed
from client.site import Resources, Site
from common.adapted import AdaptedModel
from common.code import code_digest
from common.config import RunConfig
from common.data.load import Loaded, load_rows, tokenise_all
from common.data.split import count
from common.data.units import count_units, renumbered
from common.errors import ConfigError, DataError, OutputError, PrivacyError
from common.examples import Examples
from common.messages import SiteService
from common.plan import Plan
from common.prefixes import CACHE_LIMIT
from common.requests import start_of
from common.sections import EXAMPLE, ServerSection
from common.signing import SigningKey
from server.checkpoint import RunFolder
from server.evaluation import Evaluator
from server.prepare import Prepared, prepare, resident_model, splits
from server.report import manifest
from server.rounds import Coordinator, Result
from server.settings import resolved_toml
from server.watcher import Progress
from simulations.grid import InProcessGrid
from simulations.partition import sites_of
from simulations.sites import MadeWhenAsked, SimulatedSites
from simulations.workers import Workers, workers_for

Engine = Callable[["Arm", Plan, str], AbstractContextManager[Grid]]
"""(arm, plan, public key of whoever signs it) → the grid of the arm's sites, which are open as long as it lasts."""
Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""(title, rounds) → who watches that run."""


@dataclass(frozen=True)
class Arm:
    """One training run of a comparison."""

    title: str
    folder: Path
    config: RunConfig
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Trained:
    """An arm and what came of it."""

    arm: Arm
    prepared: Prepared
    result: Result


class Federation:
    """The data of all sites, encoded once, and one resident model; arms are run on it one after the other.

    Args:
        cache: folder in which tokens and frozen activations are kept for the next start; ``None``: that of
            ``simulation.cache``, or else in memory and a file without a name.
    """

    def __init__(self, config: RunConfig, model: AdaptedModel | None = None, cache: Path | None = None) -> None:
        data = config.data
        if data.path is None:
            raise ConfigError("data.path: is missing; give a folder, a file or a hub data set (--set data.path=PATH)")
        self.model = model or resident_model(config)
        self.config = config = config.model_copy(update={"task": self.model.task.settings})
        if config.unit != EXAMPLE and data.privacy_unit is None:
            raise ConfigError(f"data.privacy_unit: is missing; it names the column of privacy.unit = '{config.unit}'")
        loaded = load_rows(data.path, "train", self.model.task, data.columns, data.site_column, data.privacy_unit)
        self.parts = {site: np.asarray(rows, np.int64) for site, rows in self._partition(loaded).items()}
        self._units = loaded.units
        self._sizes = {site: self._count_units(rows) for site, rows in self.parts.items()}
        for site, size in self._sizes.items():
            if not size:
                raise DataError(f"data.privacy_unit = '{data.privacy_unit}': no row of site '{site}' names its unit")
        self._cache = cache or config.simulation.cache
        tokenizer, where = self.model.base.tokenizer, f"{data.path} (train)"
        self.rows = tokenise_all(loaded.rows, self.model.task, tokenizer, where, self._cache and self._cache / "tokens")
        self.examples: MadeWhenAsked[Examples] = MadeWhenAsked(self.parts, self._examples)
        self.probed = Probed()

    @cached_property
    def evaluator(self) -> Evaluator:
        """Of the coordinator's own held-out data; an actor of a Ray cluster has no use for it.

        Raises:
            ConsiliumError: they are missing or wrong.
        """
        config, held_out = self.config, splits(self.config, self.model)
        for name, split in held_out.items():
            if self._cache is not None:
                split.examples.keep_in(self._cache / "held-out" / name)
        return Evaluator(self.model, held_out, config.evaluation.metric, config.evaluation.generate)

    def digest(self) -> str:
        """SHA-256 of the rows, units and tokens of every site: equal wherever the same data are loaded."""
        state = hashlib.sha256()
        for site, rows in sorted(self.parts.items()):
            state.update(f"{site}\0{len(rows)}\0".encode() + rows.tobytes())
            state.update(b"" if self._units is None else self._units[rows].tobytes())
        for item in self.rows:
            state.update(f"{len(item.ids)}\0".encode() + item.ids.tobytes() + item.target.tobytes())
        return state.hexdigest()

    def _count_units(self, rows: npt.NDArray[np.int64]) -> int:
        return len(rows) if self._units is None else count_units(renumbered(self._units[rows]))

    def _examples(self, site: str) -> Examples:
        """A site's part of the tokenised rows, and of the memory for frozen activations."""
        rows = self.parts[site]
        return Examples(
            self.rows.part(rows),
            self.model.task,
            CACHE_LIMIT * len(rows) // len(self.rows),
            units=None if self._units is None else renumbered(self._units[rows]),
            cache_folder=self._cache and self._cache / site,
        )

    def _partition(self, loaded: Loaded) -> dict[str, list[int]]:
        return sites_of(
            self.config.data,
            self.config.run.seed,
            count(loaded.rows),
            column=loaded.sites,
            labels=loaded.rows.get("label"),
            units=loaded.units,
        )

    def public_size(self, site: str) -> int:
        """What the simulated site declares: privacy units."""
        made = self.examples.made.get(site)
        size = self._sizes[site] if made is None else made.unit_count
        return size if self.config.simulation.public_size == "exact" else rounded(size)

    def max_rank(self, site: str) -> int | None:
        """The largest rank that the simulated site allows; ``None`` where it takes the plan's."""
        ranks = self.config.simulation.ranks
        return ranks[self._order[site] % len(ranks)] if ranks else None

    @cached_property
    def _order(self) -> dict[str, int]:
        return {site: number for number, site in enumerate(sorted(self.parts))}

    def check_count(self, server: ServerSection) -> None:
        """Says now what the run would only find out by waiting.

        Raises:
            ConfigError: it is to have more sites than there are.
        """
        for name in ("min_sites", "min_replies"):
            if (least := getattr(server, name)) > len(self.parts):
                raise ConfigError(
                    f"server.{name} = {least}: there are only {len(self.parts)} simulated sites; lower it, or deal the "
                    "rows out to more sites (data.sites, data.site_column)"
                )

    def _check_sizes(self, sites: Iterable[str], plan: Plan) -> None:
        """Says now, and with figures, what a real site would refuse without any. What ε needs is looked at for the
        smallest and the largest site; it takes too long to do for thousands.

        Raises:
            PrivacyError: an expected batch does not fit a site, or ε cannot be reached.
        """
        named = {self.public_size(site): site for site in sites}
        for size, site in sorted(named.items()):
            self._check_size(site, size, plan)
        for size in {min(named), max(named)}:
            state_privacy(plan, size)

    def _check_size(self, site: str, size: int, plan: Plan) -> None:
        for phase, rate in zip(plan.phases, sample_rates(plan, size), strict=True):
            if not 1 / size <= rate <= 1:
                raise PrivacyError(
                    f"phase.{phase.name}: an expected batch of {rate * size:g} units does not fit site '{site}' "
                    f"with {size}; lower batch_size, use sample_rate, or drop the site"
                )

    def run(self, arm: Arm, run_id: str, resume: bool, watch: Watch, engine: Engine | None = None) -> Trained:
        """Runs (or resumes) one arm to its end.

        Args:
            engine: where its sites are worked on; ``None``: in this process.
        """
        prepared = prepare(arm.config, run_id, self.model, self.evaluator)
        self._check_sizes(arm.sites, prepared.plan)
        folder = RunFolder(arm.folder, durable=False)
        if not (resume and (arm.folder / "manifest.json").exists()):
            about = manifest(prepared, run_id, "simulation")
            folder = RunFolder.create(arm.folder, resolved_toml(arm.config), about, durable=False)
        elif folder.manifest()["plan_digest"] != prepared.plan.digest():
            raise OutputError(
                f"--resume {arm.folder}: the run was started with other settings or another version; give a new folder"
            )
        key = SigningKey.fresh()
        with (
            (engine or self.in_process)(arm, prepared.plan, key.public) as grid,
            watch(arm.title, prepared.plan.rounds) as progress,
        ):
            coordinator = Coordinator(
                grid,
                arm.config,
                prepared.plan,
                self.model,
                self.evaluator,
                folder,
                key,
                progress,
                poll_seconds=0.0,
                ask_when_sampled=arm.config.server.cohort < 1,
            )
            return Trained(arm, prepared, coordinator.run(prepared.initial))

    @contextmanager
    def in_process(self, arm: Arm, plan: Plan, coordinator: str) -> Iterator[Grid]:
        """The engine of this process: one site after the other, or as many at a time as there are workers."""
        settings = arm.config.simulation
        if settings.workers is not None:  # here, and not in the worker that happens to be first
            start_of(plan, self.model, self.model.spec)
        with workers_for(arm.config, self.model) as workers, self.sites(arm, plan, coordinator, workers) as sites:
            yield InProcessGrid(sites, workers=workers.executor, sites_per_pass=settings.sites_per_pass)

    @contextmanager
    def sites(
        self, arm: Arm, plan: Plan, coordinator: str, workers: Workers | None = None
    ) -> Iterator[Mapping[str, SiteService]]:
        """The arm's sites, each made when it is first asked for, with a ledger under the arm's folder."""
        workers = workers or Workers(self.model)
        sites = SimulatedSites(arm.sites, lambda name: self._site(name, arm, plan, coordinator, workers))
        try:
            yield sites
        finally:
            sites.close()

    def _site(self, name: str, arm: Arm, plan: Plan, coordinator: str, workers: Workers) -> Site:
        folder = arm.folder / "sites" / name
        return Site(
            name,
            policy_for(plan, self.public_size(name), coordinator, max_rank=self.max_rank(name)),
            Ledger(folder, durable=False),
            AuditLog(folder / "audit.jsonl", durable=False, site=name, key=SigningKey.fresh()),
            Resources(
                model=lambda plan: workers.model,
                examples=lambda plan, model: self.examples[name],
                physical_batch=arm.config.simulation.physical_batch,
                probed=self.probed,
            ),
            code_digest(),
            fixed_seed=arm.config.simulation.seed,
        )
