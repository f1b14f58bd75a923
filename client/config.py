"""``site.toml``: what a site decides for itself, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config import EXAMPLE, SCHEMA_VERSION, Count, Positive, Section
from common.errors import ConfigError
from common.toml_settings import read_toml, validate


class SiteSection(Section):
    """``[site]``: who this is and where it listens."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The site's public name."""
    listen: str = "unix:consilium-agent.sock"
    """``unix:PATH`` (relative to the folder of site.toml), or ``HOST:PORT`` with ``[tls]``."""
    state: Path = Path("state")
    """Folder of ledger, secrets and audit log, relative to site.toml. Keep it out of backups that can be restored."""


class TlsSection(Section):
    """``[tls]``: needed when ``site.listen`` is HOST:PORT; the relay must show a certificate of ``authority``."""

    certificate: Path
    key: Path
    authority: Path


class SiteDataSection(Section):
    """``[data.NAME]``: a data set a plan can ask for by name."""

    path: str
    """A file, or a folder with one file per split."""
    split: str = "train"
    """Which file of a folder is learnt from."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The task's fields → column names."""
    privacy_unit: str | None = None
    """The column that names each row's privacy unit, e.g. ``patient_id``; needed unless ``policy.unit`` is
    ``example``."""


class PolicySection(Section):
    """``[policy]``: bounds no plan can exceed. What is missing is refused."""

    public_size: Count | Literal["exact"]
    """The number of units this site declares. Everything about q, σ, weights and refusals is computed from it, never
    from the true number. ``"exact"`` consents to publishing the true number."""
    unit: str = Field(default=EXAMPLE, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """What the budget protects: ``example``, or a group of rows such as ``patient``, told by
    ``data.NAME.privacy_unit``. Fixed for the site's lifetime; a plan for another unit is refused."""
    secure_noise: bool = True
    """Whether a plan must ask for ``noise = "secure"``."""
    lifetime_epsilon: Positive
    """ε over the lifetime of the site's population: all plans of all runs together."""
    lifetime_delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    """δ the lifetime ε is stated at."""
    max_epsilon: Positive
    """Largest ε of a single plan."""
    max_delta: Annotated[float, Field(gt=0, le=1e-3)] = 1e-5
    """Largest δ of a single plan."""
    tasks: tuple[str, ...] = ("sequence-classification", "causal-lm")
    """Tasks a plan may ask for."""
    max_rank: Count = 64
    """Largest LoRA rank."""
    allow_no_privacy: bool = False
    """Whether a plan with ``mechanism = "none"`` may run here. It makes no promise at all."""
    approval: Literal["manual", "automatic"] = "manual"
    """``manual``: a person approves each plan (``consilium site approve``); ``automatic``: within these bounds."""


class DeviceSection(Section):
    """``[device]``: where training runs."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    physical_batch: Count = 8
    gradient_checkpointing: bool = False
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
    site: SiteSection
    tls: TlsSection | None = None
    models: tuple[str, ...] = ("minilm",)
    """Base models this site allows: names, folders or hub ids. A plan selects one by the digest of its files."""
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
            if (entry.privacy_unit is None) != (self.policy.unit == EXAMPLE):
                raise ValueError(
                    f"data.{name}.privacy_unit: names the column of the unit where policy.unit is not 'example', and "
                    f"is left out where it is; policy.unit is '{self.policy.unit}'"
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
    site = config.site.model_copy(update={"listen": listen, "state": base / config.site.state})
    data = {
        name: entry.model_copy(update={"path": str(base / entry.path) if (base / entry.path).exists() else entry.path})
        for name, entry in config.data.items()
    }
    models = tuple(str(base / name) if (base / name / "config.json").is_file() else name for name in config.models)
    tls = config.tls and TlsSection(**{name: base / value for name, value in config.tls.model_dump().items()})
    return config.model_copy(update={"site": site, "data": data, "models": models, "tls": tls})
