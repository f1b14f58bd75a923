"""A whole federation in one process: the real server loop, the real sites, one resident base model.

With ``simulation.compare`` the same data and the same cached features also train each site alone at the same ε, and the
federation without privacy; the test split is looked at once, at the very end, for all of them.
"""

from __future__ import annotations

import resource
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.audit_log import AuditLog
from client.policy import policy_for, rounded
from client.privacy.budget import sample_rates, state_privacy
from client.privacy.ledger import Ledger
from client.privacy.row_independence import Probed
from client.site import Resources, Site
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.code import code_digest
from common.config import RunConfig
from common.data.load import Loaded, encode_all, load_rows
from common.data.split import by_column, count, dealt
from common.data.units import count_units, renumbered
from common.errors import ConfigError, DataError, OutputError, PrivacyError
from common.examples import Examples
from common.messages import SiteService
from common.plan import Plan
from common.sections import EXAMPLE
from common.signing import SigningKey
from server.checkpoint import RunFolder
from server.evaluation import Evaluator
from server.prepare import TEST, Prepared, prepare, resident_model, splits
from server.report import finish, manifest
from server.rounds import Coordinator, Progress, Result
from server.settings import resolved_toml
from simulations.grid import InProcessGrid

OPEN_LEDGERS = 100
"""Above so many sites each ledger is closed between uses, so that file handles do not grow with the sites."""

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
        cache: folder in which frozen activations are kept for the next start; ``None``: in memory alone.
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
        self.parts = self._partition(loaded)
        encoded = encode_all(loaded.rows, self.model.task, self.model.base.tokenizer, f"{data.path} (train)").encoded
        self.examples = {
            site: Examples(
                [encoded[index] for index in indices],
                self.model.task,
                units=None if loaded.units is None else renumbered(loaded.units[indices]),
                cache_folder=cache and cache / site,
            )
            for site, indices in self.parts.items()
        }
        for site, examples in self.examples.items():
            if not examples.unit_count:
                raise DataError(f"data.privacy_unit = '{data.privacy_unit}': no row of site '{site}' names its unit")
        self.probed = Probed()
        self.evaluator = Evaluator(
            self.model, splits(config, self.model), config.evaluation.metric, config.evaluation.generate
        )

    def _partition(self, loaded: Loaded) -> dict[str, list[int]]:
        if self.config.data.site_column is not None:
            return _named(by_column(loaded.sites))
        if self.config.data.sites is None:
            raise ConfigError("data.site_column or data.sites: one is needed, to say which rows belong to which site")
        if loaded.units is None:
            return dealt(count(loaded.rows), self.config.data.sites, self.config.run.seed)
        units = dealt(count_units(loaded.units), self.config.data.sites, self.config.run.seed)
        return {site: np.flatnonzero(np.isin(loaded.units, chosen)).tolist() for site, chosen in units.items()}

    def public_size(self, site: str) -> int:
        """What the simulated site declares: privacy units."""
        size = self.examples[site].unit_count
        return size if self.config.simulation.public_size == "exact" else rounded(size)

    def max_rank(self, site: str) -> int | None:
        """The largest rank that the simulated site allows; ``None`` where it takes the plan's."""
        ranks = self.config.simulation.ranks
        return ranks[sorted(self.parts).index(site) % len(ranks)] if ranks else None

    def _check_size(self, site: str, plan: Plan) -> None:
        """Says now, and with figures, what a real site would refuse without any.

        Raises:
            PrivacyError: an expected batch does not fit the site, or ε cannot be reached.
        """
        size = self.public_size(site)
        for phase, rate in zip(plan.phases, sample_rates(plan, size), strict=True):
            if not 1 / size <= rate <= 1:
                raise PrivacyError(
                    f"phase.{phase.name}: an expected batch of {rate * size:g} units does not fit site '{site}' "
                    f"with {size}; lower batch_size, use sample_rate, or drop the site"
                )
        state_privacy(plan, size)

    def run(self, arm: Arm, run_id: str, resume: bool, watch: Watch) -> Trained:
        """Runs (or resumes) one arm to its end."""
        prepared = prepare(arm.config, run_id, self.model, self.evaluator)
        for site in arm.sites:
            self._check_size(site, prepared.plan)
        folder = RunFolder(arm.folder)
        if not (resume and (arm.folder / "manifest.json").exists()):
            folder = RunFolder.create(arm.folder, resolved_toml(arm.config), manifest(prepared, run_id, "simulation"))
        elif folder.manifest()["plan_digest"] != prepared.plan.digest():
            raise OutputError(
                f"--resume {arm.folder}: the run was started with other settings or another version; give a new folder"
            )
        key = SigningKey.fresh()
        with self._sites(arm, prepared.plan, key.public) as sites, watch(arm.title, prepared.plan.rounds) as progress:
            coordinator = Coordinator(
                InProcessGrid(sites),
                arm.config,
                prepared.plan,
                self.model,
                self.evaluator,
                folder,
                key,
                progress,
                poll_seconds=0.0,
            )
            return Trained(arm, prepared, coordinator.run(prepared.initial))

    @contextmanager
    def _sites(self, arm: Arm, plan: Plan, coordinator: str) -> Iterator[Mapping[str, SiteService]]:
        """The arm's sites, each with a fresh ledger under the arm's folder."""
        ledgers = []
        sites: dict[str, SiteService] = {}
        for name in arm.sites:
            folder = arm.folder / "sites" / name
            ledger = Ledger(folder, durable=False, keep_open=len(arm.sites) <= OPEN_LEDGERS)
            ledgers.append(ledger)
            sites[name] = Site(
                name,
                policy_for(plan, self.public_size(name), coordinator, max_rank=self.max_rank(name)),
                ledger,
                AuditLog(folder / "audit.jsonl", durable=False, site=name, key=SigningKey.fresh()),
                Resources(
                    model=lambda plan: self.model,
                    examples=lambda plan, model, name=name: self.examples[name],  # type: ignore[misc]
                    physical_batch=arm.config.simulation.physical_batch,
                    probed=self.probed,
                ),
                code_digest(),
                fixed_seed=arm.config.simulation.seed,
            )
        try:
            yield sites
        finally:
            for ledger in ledgers:
                ledger.close()


def simulate(config: RunConfig, out: Path, resume: bool, watch: Watch) -> dict[str, Any]:
    """Runs the federation (and, with ``compare``, its comparisons) and writes everything under ``out``.

    Returns:
        The summary, with ``comparison`` and ``test`` figures where there is a test split.

    Raises:
        ConsiliumError: settings, data or folder do not fit.
    """
    folder = RunFolder(out)
    if resume:
        run_id = folder.manifest()["run_id"]
    else:
        folder.refuse_other_run()
        run_id = f"{config.run.name}-{secrets.token_hex(4)}"
    federation = Federation(config)
    trained = [
        federation.run(arm, run_id if arm.folder == out else f"{run_id}/{arm.folder.name}", resume, watch)
        for arm in _arms(federation.config, out, tuple(federation.parts))
    ]
    main = trained[0]
    rows = _comparison(federation, trained) if config.simulation.compare else {"federated": _on_test(federation, main)}
    more: dict[str, Any] = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if config.simulation.compare:
        more["comparison"] = rows
    return finish(main.prepared, run_id, folder, main.result, rows["federated"].get("test"), more)


def _arms(config: RunConfig, out: Path, sites: tuple[str, ...]) -> list[Arm]:
    arms = [Arm("federated", out, config, sites)]
    if not config.simulation.compare:
        return arms
    if config.privacy.mechanism != "none":
        arms.append(Arm("federated without privacy", out / "arms" / "no-privacy", config.without_privacy(), sites))
    one = config.server.model_copy(update={"min_sites": 1, "min_replies": 1, "cohort": 1.0})
    alone = config.model_copy(update={"server": one})
    arms += [Arm(f"{site} alone", out / "arms" / f"alone-{site}", alone, (site,)) for site in sites]
    return arms


def _comparison(federation: Federation, trained: list[Trained]) -> dict[str, dict[str, Any]]:
    """Base, best single site (chosen on validation), federated with and without privacy: validation and test."""
    evaluator, metric = federation.evaluator, federation.evaluator.metric
    main = trained[0]
    base = main.result.history[0]["metrics"]
    rows: dict[str, dict[str, Any]] = {
        "base": {"validation": base, **_test(federation, main.prepared.initial)},
    }
    singles = [entry for entry in trained if len(entry.arm.sites) == 1 and entry is not main]
    best: Trained | None = None
    for entry in singles:
        if best is None or evaluator.better(_best(entry)[metric], _best(best)[metric]):
            best = entry
    if best is not None:
        rows["best_single_site"] = {"site": best.arm.sites[0], **_on_test(federation, best)}
    rows["federated"] = _on_test(federation, main)
    for entry in trained[1:]:
        if entry.arm.folder.name == "no-privacy":
            rows["federated_without_privacy"] = _on_test(federation, entry)
    return rows


def _best(entry: Trained) -> dict[str, float]:
    record = next(one for one in entry.result.history if one["round"] == entry.result.best_round)
    metrics: dict[str, float] = record["metrics"]
    return metrics


def _on_test(federation: Federation, entry: Trained) -> dict[str, Any]:
    return {"validation": _best(entry), **_test(federation, entry.result.adapter)}


def _test(federation: Federation, adapter: AdapterState) -> dict[str, Any]:
    if TEST not in federation.evaluator.splits:
        return {}
    return {"test": federation.evaluator.evaluate(adapter, TEST)}


def _named(parts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The parts under names that may stand in paths.

    Raises:
        DataError: two sites would get the same name.
    """
    named: dict[str, list[int]] = {}
    for value, indices in parts.items():
        name = _site_name(value)
        if name in named:
            raise DataError(f"data.site_column: two sites would both be called '{name}' ('{value}' is one); rename one")
        named[name] = indices
    return named


def _site_name(value: str) -> str:
    """A site's name as it may stand in paths and reports."""
    name = "".join(char if char.isalnum() or char in "._-" else "-" for char in value)[:64]
    return name if name[:1].isalnum() else f"s{name}"
