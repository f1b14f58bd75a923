"""From ``site.toml`` to a running site: data read at start, base model loaded once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from client.audit_log import AuditLog
from client.config import SiteConfig, SiteDataSection
from client.policy import Policy
from client.privacy.ledger import Ledger, Population
from client.separation import check_separation
from client.site import Resources, Site
from common.adapted import AdaptedModel
from common.code import code_digest
from common.data.read import SUFFIXES, Rows, count_rows, read_rows
from common.data.split import count, select
from common.data.units import count_units, units_of
from common.errors import ConfigError, ConsiliumError, DataError
from common.examples import Examples
from common.model import Placement, digest_of, load_base, locate
from common.plan import Plan
from common.prefix_files import cache_folder, wipe_outdated
from common.sections import LoraSection, TaskSection
from common.signing import SigningKey
from common.tasks.base import Encoded
from common.tasks.registry import task_of

log = logging.getLogger(__name__)

UNIT = "privacy_unit"
"""Where a site's rows hold the id of the unit they belong to."""


@dataclass
class Resident:
    """Models and data kept between messages.

    A base model is loaded once per (files, task, LoRA layout) and stays. Examples are encoded once per data set and
    task.
    """

    config: SiteConfig
    folders: dict[str, Path]
    """Weight digest → folder of an allowed base model."""
    loads: int = 0
    """How many times a base model was loaded."""
    _models: dict[tuple[str, TaskSection, LoraSection], AdaptedModel] = field(default_factory=dict)
    _examples: dict[tuple[str, TaskSection, str], Examples] = field(default_factory=dict)
    _rows: dict[tuple[str, str], Rows] = field(default_factory=dict)
    _fingerprints: dict[tuple[str, str], str] = field(default_factory=dict)

    def model(self, plan: Plan) -> AdaptedModel:
        """The resident model of a plan, its adapter at this site's rank; another plan's model makes room for it."""
        lora = plan.lora.at_rank(plan.rank_at(self.config.policy.max_rank))
        key = (plan.model_digest, plan.task, lora)
        if key not in self._models:
            self._models.clear()
            device = self.config.device
            placement = Placement.choose(device.device, device.dtype, device.gradient_checkpointing)
            task = task_of(plan.task)
            base = load_base(self.folders[plan.model_digest], task, placement, plan.task.pooling)
            self._models[key] = AdaptedModel(base, task, lora)
            self.loads += 1
            log.info("base model loaded (%d so far in this process)", self.loads)
        return self._models[key]

    def warm_up(self) -> None:
        """Reads every data set now, so that an unreadable file stops the agent from starting, and never a round.

        What the allowed tasks learn from is kept: the file is not looked at again. Cached activations of data that have
        changed since are deleted.

        Raises:
            ConfigError: they cannot be.
        """
        for name, data in self.config.data.items():
            size_of(data)
            self._read_ahead(name)
        try:
            wipe_outdated(self.cache, {name: files_of(data) for name, data in self.config.data.items()})
        except OSError as error:
            raise ConfigError(
                f"site.state: activations of deleted rows may be left in {self.cache} ({error.strerror}); delete it"
            ) from None

    def _read_ahead(self, name: str) -> None:
        """The cells of a data set, for each allowed task that can learn from it; tells where none can."""
        faults = []
        for task_name in self.config.policy.tasks:
            try:
                self.rows(name, TaskSection.model_construct(name=task_name))  # labels decide nothing of what is read
            except ConsiliumError as error:
                faults.append(f"{task_name}: {error}")
        if len(faults) == len(self.config.policy.tasks):
            log.warning("data '%s' can be learnt from by no task of policy.tasks: %s", name, "; ".join(faults))

    @property
    def cache(self) -> Path:
        """The folder of all data sets' frozen activations: as secret as the data."""
        return self.config.site.state / "cache"

    def rows(self, name: str, task_settings: TaskSection) -> Rows:
        """The rows of a data set, read once; with their privacy units, where a unit is more than a row."""
        key = (name, task_settings.name)
        if key not in self._rows:
            data = self.config.data[name]
            # A single file is learnt from as a whole: what is held out is held out at the coordinator.
            self._rows[key] = rows_of(data, task_of(task_settings).fields)
        return self._rows[key]

    def fingerprint(self, plan: Plan) -> str:
        """Digest of the rows that the plan learns from, as they were read; empty where they cannot be."""
        key = (plan.data, plan.task.name)
        if key not in self._fingerprints:
            try:
                self._fingerprints[key] = fingerprint_of(self.rows(plan.data, plan.task))
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of a library in Rust is no Exception, and a row must fail no round
                log.exception("data '%s' cannot be read; see 'consilium site check'", plan.data)
                return ""
        return self._fingerprints[key]

    def examples(self, plan: Plan, model: AdaptedModel) -> Examples:
        """The plan's data, encoded once; rows that cannot be learnt from stay as void examples."""
        key = (plan.data, plan.task, plan.model_digest)
        if key not in self._examples:
            rows = dict(self.rows(plan.data, plan.task))
            ids = rows.pop(UNIT, None)
            units = None if ids is None else units_of(ids)
            self._examples[key] = Examples(
                encode_each(rows, model),
                model.task,
                int(self.config.device.cache_limit * (1 << 30)),
                units,
                cache_folder(self.cache, plan.data),
            )
        return self._examples[key]


def fingerprint_of(rows: Rows) -> str:
    """Digest of rows as they were read."""
    state = hashlib.sha256()
    for field_name in sorted(rows):
        state.update(json.dumps([field_name, *map(str, rows[field_name])]).encode())
    return state.hexdigest()


def encode_each(rows: Rows, model: AdaptedModel) -> list[Encoded | None]:
    """The rows as the task encodes them; ``None`` for a row that cannot be learnt from, whatever is wrong with it."""
    try:
        return model.task.encode(rows, model.base.tokenizer)[0]
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        log.warning("the data could not be encoded in one go; each row is encoded alone")
    encoded: list[Encoded | None] = []
    for index in range(count(rows)):
        try:
            encoded += model.task.encode(select(rows, [index]), model.base.tokenizer)[0]
        except KeyboardInterrupt:
            raise
        except BaseException:
            encoded.append(None)
    return encoded


def build_site(config: SiteConfig) -> tuple[Site, Resident]:
    """The site as its agent serves it.

    Raises:
        ConsiliumError: a model or data set of ``site.toml`` cannot be used, or the ledger.
    """
    if config.device.threads is not None:
        torch.set_num_threads(config.device.threads)
    folders = reviewed_models(config)
    resident = Resident(config, folders)
    state = config.site.state
    policy = policy_of(config)
    key = site_key(state)
    ledger = Ledger(state, counter=config.site.counter)
    refuse_forgotten(config, ledger)
    site = Site(
        config.site.name,
        policy,
        ledger,
        AuditLog(state / "audit.jsonl", site=config.site.name, key=key),
        Resources(resident.model, resident.examples, config.device.physical_batch, resident.fingerprint),
        code_digest(),
        fixed_seed=config.testing.seed if config.testing else None,
        claims_epsilon=config.testing is None,
    )
    return site, resident


def refuse_forgotten(config: SiteConfig, ledger: Ledger) -> None:
    """A population that was ever charged stays declared: under a new name it would have a fresh budget.

    Raises:
        ConfigError: one is missing.
    """
    for population in ledger.populations():
        if population.name not in config.populations:
            raise ConfigError(
                f"populations.{population.name}: is in the ledger and no longer declared; declare it again (a "
                "population keeps its name and its budget for ever)"
            )


def site_key(state: Path) -> SigningKey:
    """The key that signs the head of the site's audit log; made at the first start and never again.

    Raises:
        ConfigError: it cannot be read or written, or is missing where a site has worked before.
    """
    file = state / "site.key"
    if file.exists():
        return SigningKey.load(file)
    if (state / "audit.jsonl").exists() or (state / "ledger.sqlite").exists():
        raise ConfigError(
            f"{file}: is missing beside an audit log or a ledger; bring it back, a new key vouches for neither"
        )
    return SigningKey.create(file)


def reviewed_models(config: SiteConfig) -> dict[str, Path]:
    """Weight digest → folder of each base model.

    Raises:
        ConfigError: a model's weights are not those that were reviewed.
        ModelError: a model cannot be found.
    """
    folders = {digest_of(locate(name)): (name, locate(name)) for name in config.models}
    for digest, (name, _) in folders.items():
        if digest not in config.policy.base_models:
            raise ConfigError(
                f"policy.base_models: does not list the weights of '{name}', whose digest is {digest}; add it once "
                "these files were reviewed, or take the model out of models"
            )
    return {digest: folder for digest, (_, folder) in folders.items()}


def policy_of(config: SiteConfig) -> Policy:
    """The policy with every population's public size as a number.

    Raises:
        ConsiliumError: ``"exact"`` for a population of several data sets, data that cannot be read, or populations
            that nobody has vouched for.
    """
    check_separation(config)
    populations = {
        name: Population(name, entry.unit, declared_size(config, name), entry.lifetime_epsilon, entry.lifetime_delta)
        for name, entry in config.populations.items()
    }
    return Policy(config.policy, populations, {name: data.population for name, data in config.data.items()})


def declared_size(config: SiteConfig, population: str) -> int:
    """The public size of a population as a number; ``"exact"`` counts the units of its one data set.

    Raises:
        ConfigError: ``"exact"`` with several data sets, or none.
    """
    declared = config.populations[population].public_size
    if declared != "exact":
        return declared
    data = [entry for entry in config.data.values() if entry.population == population]
    if len(data) != 1:
        raise ConfigError(
            f'populations.{population}.public_size = "exact": needs exactly one [data.NAME] of this population; '
            "declare a number instead"
        )
    return size_of(data[0])


def rows_of(data: SiteDataSection, fields: Sequence[str]) -> Rows:
    """The task's fields of a data set, and under ``UNIT`` each row's id, where a unit is more than a row.

    Raises:
        DataError: file, split or column missing, or without rows.
    """
    if data.privacy_unit is None:
        return read_rows(data.path, data.split, fields, data.columns)
    return read_rows(data.path, data.split, [*fields, UNIT], {**data.columns, UNIT: data.privacy_unit})


def files_of(data: SiteDataSection) -> list[Path]:
    """The file a data set is read from; none for one of the hub."""
    path = Path(data.path).expanduser()
    if path.is_file():
        return [path]
    return [file for suffix in SUFFIXES if (file := path / f"{data.split}{suffix}").is_file()][:1]


def size_of(data: SiteDataSection) -> int:
    """Number of privacy units of a data set.

    Raises:
        DataError: file, split or column missing, or no row names its unit.
    """
    if data.privacy_unit is None:
        return count_rows(data.path, data.split)
    size = count_units(units_of(read_rows(data.path, data.split, [UNIT], {UNIT: data.privacy_unit})[UNIT]))
    if not size:
        raise DataError(
            f"data.privacy_unit = '{data.privacy_unit}': no row of {data.path} names its unit; fill the column"
        )
    return size
