"""``site.toml``: what a site decides for itself, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.config import SCHEMA_VERSION
from common.errors import ConfigError
from common.sections import EXAMPLE, Count, Positive, Section
from common.signing import is_public_key
from common.toml_settings import read_toml, validate

WHOLE_SITE = "site"
"""The population that data belong to unless site.toml says otherwise."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _public_key(text: str) -> str:
    if not is_public_key(text):
        raise ValueError("is not a public key; it starts with 'ed25519:' and is printed where the key was made")
    return text


class SiteSection(Section):
    """``[site]``: who this is and where it listens."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """The site's public name."""
    listen: str = "unix:run/agent.sock"
    """``unix:PATH`` (relative to the folder of site.toml), or ``HOST:PORT`` with ``[tls]``. The relay's user must be
    able to enter the socket's folder and those above it, and must not be able to list the socket's."""
    state: Path = Path("state")
    """Folder of ledger, secrets, keys, caches and audit log, relative to site.toml. Keep it out of backups that can be
    restored."""
    counter: Path = Path("consilium.counter")
    """A small file outside ``state`` that tells an older copy of the ledger from the ledger; relative to site.toml.
    Best on another disk, and in no backup."""
    relay_user: str | None = None
    """The user that SuperNode and relay run under, by name or number; needed with a unix socket. Only this user may
    connect, and the agent does not start if it could read the data, the ledger or a key."""
    trust_relay: bool = False
    """For trials on one machine: the relay may run under the agent's own user. Shipped code can then read the data."""


class TlsSection(Section):
    """``[tls]``: needed when ``site.listen`` is HOST:PORT; the relay must show a certificate of ``authority``."""

    certificate: Path
    """The agent's certificate, PEM."""
    key: Path
    """Its private key, PEM, unencrypted."""
    authority: Path
    """Certificate of the authority whose clients may connect, PEM: all of them, so one of the site's own."""


class PopulationSection(Section):
    """``[populations.NAME]``: persons who share one privacy budget. Everything but the limit is fixed for ever."""

    public_size: Count | Literal["exact"]
    """The number of units declared. Everything about q, σ, weights and refusals is computed from it, never from the
    true number. ``"exact"`` consents to publishing the true number."""
    unit: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = EXAMPLE
    """What the budget protects: ``example``, or a group of rows such as ``patient``, told by
    ``data.NAME.privacy_unit``. A plan for another unit is refused."""
    lifetime_epsilon: Positive
    """ε over the population's lifetime: all plans of all runs together."""
    lifetime_delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    """δ the lifetime ε is stated at."""


class SeparationSection(Section):
    """``[separation]``: needed with several populations; a person of the site vouches that they share nobody."""

    statement: Path
    """The signed statement (``consilium site separate``), relative to site.toml."""
    key: Annotated[str, AfterValidator(_public_key)]
    """Public key of the person who signs it."""


class SiteDataSection(Section):
    """``[data.NAME]``: a data set a plan can ask for by name."""

    path: str
    """A file, or a folder with one file per split."""
    split: str = "train"
    """Which file of a folder is learnt from."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The task's fields → column names."""
    privacy_unit: str | None = None
    """The column that names each row's privacy unit, e.g. ``patient_id``; needed unless the population's unit is
    ``example``."""
    population: str = WHOLE_SITE
    """Whose data they are. Unless told otherwise: the whole site's, so that data which are not told apart are charged
    to one budget. A data set never changes its population."""


class PolicySection(Section):
    """``[policy]``: bounds no plan can exceed. What is missing is refused."""

    base_models: tuple[Digest, ...]
    """Weight digests of the base models that were reviewed; ``consilium site check`` prints those of ``models``."""
    tasks: tuple[str, ...]
    """Tasks a plan may ask for: ``sequence-classification``, ``causal-lm``."""
    lora_targets: tuple[str, ...]
    """Modules that may get an adapter, by the last part of their names; ``attention`` allows a plan that names none,
    which means query and value of the model's family."""
    max_rank: Count
    """Largest LoRA rank, and this site's own where a larger plan lets sites choose theirs."""
    max_epsilon: Positive
    """Largest ε of a single plan."""
    max_delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    """Largest δ of a single plan."""
    min_noise_multiplier: Positive
    """Least σ of any phase of a plan, as calibrated here: a bound on what one step can reveal."""
    secure_noise: bool = True
    """Whether a plan must ask for ``noise = "secure"``."""
    metrics: tuple[str, ...] = ()
    """Metrics a plan may ask for under differential privacy, as part of its ε."""
    coordinator_keys: tuple[Annotated[str, AfterValidator(_public_key)], ...]
    """Public keys of the coordinators whose plans are looked at (``consilium server keygen`` prints one)."""
    allow_no_privacy: bool = False
    """Whether a plan with ``mechanism = "none"`` may run here. It makes no promise at all."""
    approval: Literal["manual", "automatic"] = "manual"
    """``manual``: a person approves each plan (``consilium site approve``); ``automatic``: within these bounds."""
    reply_after: Annotated[float, Field(ge=0)] = 0.0
    """Seconds after its arrival before which no training request is answered. Longer than the longest round, it hides
    how long training took."""
    plan_days: Positive = 30.0
    """So many days after it was decided, a plan ends: its stored releases are deleted and no round is served."""


class DeviceSection(Section):
    """``[device]``: where training runs."""

    device: str = "auto"
    """``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast on a GPU that has it, else float32."""
    physical_batch: Count | None = None
    """Rows of one forward and backward pass. Empty: 8, or 4 on a CPU with texts of more than 64 tokens. On a GPU more
    are faster, as far as its memory allows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    threads: Count | None = None
    """CPU threads; empty: as many as the machine has cores."""
    cache_limit: Annotated[float, Field(ge=0)] = 16.0
    """GiB of frozen activations kept on disk (``state/cache``) for each data set; 0: hidden states are never kept."""


class TestingSection(Section):
    """``[testing]``: fixed keys, for tests only. The privacy statement then claims no ε."""

    noise: Literal["fast"]
    """Must be written out, so that fixed keys are never a slip."""
    seed: int = Field(ge=0)
    """Sampling and noise derive from (seed, site, round, step)."""


class SiteConfig(Section):
    """A whole ``site.toml``."""

    schema_version: int = SCHEMA_VERSION
    """Version of this file's format; a newer one is refused."""
    site: SiteSection
    tls: TlsSection | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("minilm",)
    """Base models this site allows: names, folders or hub ids. A plan selects one by the digest of its files."""
    populations: dict[str, PopulationSection]
    separation: SeparationSection | None = None
    data: dict[str, SiteDataSection]
    policy: PolicySection
    device: DeviceSection = DeviceSection()
    testing: TestingSection | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SiteConfig:
        if not self.site.listen.startswith("unix:") and self.tls is None:
            raise ValueError("site.listen: HOST:PORT needs [tls] with certificate, key and authority; or use unix:PATH")
        if not self.data:
            raise ValueError("data: at least one [data.NAME] is needed")
        for name, entry in self.data.items():
            population = self.populations.get(entry.population)
            if population is None:
                raise ValueError(
                    f"data.{name}.population: '{entry.population}' is not declared; "
                    f"add [populations.{entry.population}]"
                )
            if (entry.privacy_unit is None) != (population.unit == EXAMPLE):
                raise ValueError(
                    f"data.{name}.privacy_unit: names the column of the unit where its population's unit is not "
                    f"'example', and is left out where it is; populations.{entry.population}.unit is "
                    f"'{population.unit}'"
                )
        if len(self.populations) > 1 and self.separation is None:
            raise ValueError(
                "separation: with several populations a signed statement that they share no persons is needed; make "
                "one with 'consilium site separate', or declare one population"
            )
        return self


def read_site_config(path: Path) -> SiteConfig:
    """The settings of ``site.toml``, with relative paths made absolute against its folder.

    Raises:
        ConfigError: lists every problem.
    """
    config = validate(SiteConfig, read_toml(path), str(path))
    base = path.resolve().parent
    listen = config.site.listen
    if listen.startswith("unix:"):
        listen = f"unix:{base / listen.removeprefix('unix:')}"
        if len(listen.removeprefix("unix:").encode()) > 100:
            raise ConfigError("site.listen: the socket's path is longer than 100 bytes; use a shorter one", str(path))
    site = config.site.model_copy(
        update={"listen": listen, "state": base / config.site.state, "counter": base / config.site.counter}
    )
    data = {
        name: entry.model_copy(update={"path": str(base / entry.path) if (base / entry.path).exists() else entry.path})
        for name, entry in config.data.items()
    }
    models = tuple(str(base / name) if (base / name / "config.json").is_file() else name for name in config.models)
    tls = config.tls and TlsSection(**{name: base / value for name, value in config.tls.model_dump().items()})
    separation = config.separation and config.separation.model_copy(
        update={"statement": base / config.separation.statement}
    )
    changes = {"site": site, "data": data, "models": models, "tls": tls, "separation": separation}
    return config.model_copy(update=changes)
