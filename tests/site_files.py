"""``site.toml`` for tests: everything that must be written, with wide bounds, and what a test puts over it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from client.config import WHOLE_SITE
from common.model import digest_of, locate
from common.signing import SigningKey

COORDINATOR = SigningKey.fresh()
"""Signs the plans that these sites look at."""


def site_tables(model: Path, coordinator: str = COORDINATOR.public, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a site of one population, whose data lie in ``train.csv`` beside the file.

    Args:
        coordinator: the pinned public key.
        sections: settings put over these, by section; ``population`` stands for that of the whole site.
    """
    known = model.is_dir()
    tables: dict[str, Any] = {
        "site": {"name": "north", "trust_relay": True},
        "models": [str(model)],
        "populations": {WHOLE_SITE: {"public_size": 40, "lifetime_epsilon": 50.0, **sections.pop("population", {})}},
        "data": {"default": {"path": "train.csv"}},
        "policy": {
            "base_models": [digest_of(locate(str(model)))] if known else [],
            "tasks": ["sequence-classification", "causal-lm"],
            "lora_targets": ["attention"],
            "max_rank": 64,
            "max_epsilon": 10.0,
            "min_noise_multiplier": 1e-3,
            "coordinator_keys": [coordinator],
            "approval": "automatic",
        },
    }
    for section, settings in sections.items():
        tables[section] = {**tables.get(section, {}), **settings}
    return tables


def write_site(folder: Path, tables: Mapping[str, Any]) -> Path:
    """The tables as ``folder/site.toml``."""
    path = folder / "site.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path
