"""The grid of a sweep: which settings are varied over which values, and the run that each cell of the grid is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from common.config import RunConfig
from common.errors import ConfigError
from common.toml_settings import ALIASES, apply_overrides, validate
from server.settings import absolute

EPSILON = "privacy.epsilon"
NO_PRIVACY = "none"
"""As a value of ``privacy.epsilon``: the run without a mechanism."""

SEEDS = ("run.seed", "simulation.seed")

_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes, all as written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of its folder: the choices and the seed, in characters that any shell takes."""
    choices: tuple[tuple[str, str], ...]
    """Axis → value, as written."""
    seed: int
    config: RunConfig

    def settings(self) -> dict[str, Any]:
        """What makes the cell the run it is; JSON."""
        return self.config.model_dump(mode="json")

    @cached_property
    def resident(self) -> str:
        """Equal for cells that can use the same model and the same encoded data, one after the other.

        All settings count but those known not to touch either, so a setting that is new here costs time at worst.
        """
        settings = self.config.model_dump(mode="json", exclude={"server", "wire", "phase_changes"})
        free = {
            "run": ("name", *(["seed"] if self.config.data.site_column else [])),
            "privacy": ("epsilon", "delta", "noise", "metrics", "metrics_share"),
            "simulation": ("seed",),
            "evaluation": ("every", "patience", "selection"),
        }
        for section, names in free.items():
            for name in names:
                del settings[section][name]
        return json.dumps(settings, sort_keys=True)


def read_axis(text: str) -> Axis:
    """The axis that ``section.key=value,value`` asks for. Commas inside brackets or quotes belong to a value.

    Raises:
        ConfigError: no key, no values, or one value twice.
    """
    key, equals, listed = text.partition("=")
    key = key.strip()
    values = tuple(value.strip() for value in _parts(listed))
    if not equals or key.count(".") < 1 or not all(key.split(".")) or not all(values):
        raise ConfigError(f"--over {text}: expected section.key=value,value, e.g. --over privacy.epsilon=1,3,none")
    if len(set(values)) != len(values):
        raise ConfigError(f"--over {text}: lists a value twice; leave one out (--seeds repeats a run)")
    if key in SEEDS:
        raise ConfigError(f"--over {text}: seeds are set by --seeds, both of them together")
    return Axis(ALIASES.get(key, key), values)


def _parts(listed: str) -> list[str]:
    """The text cut at its commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in listed:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += _BRACKETS.get(char, 0)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def cells_of(
    tables: Mapping[str, Any], overrides: Sequence[str], axes: Sequence[Axis], seeds: int, source: str
) -> list[Cell]:
    """All runs of the sweep, seed by seed, each checked.

    Args:
        tables: of the ``run.toml``.
        overrides: ``section.key=value``, the same in every cell.
        seeds: how many; a cell's seed is both ``run.seed`` and ``simulation.seed``.
        source: where the tables are from, for messages.

    Raises:
        ConfigError: some cell's settings do not fit.
    """
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--over {key}: is given twice; list all its values in one")
    tables = apply_overrides(tables, overrides)
    titles = _titles(keys)
    cells = []
    runs: dict[str, Cell] = {}
    for seed in range(seeds):
        for values in product(*(axis.values for axis in axes)):
            cell = _cell(tables, tuple(zip(keys, values, strict=True)), seed, titles, source)
            twin = runs.setdefault(json.dumps(cell.settings()), cell)
            if twin is not cell:
                raise ConfigError(f"--over: {twin.name} and {cell.name} are the same run; leave one value out")
            cells.append(cell)
    return cells


def _cell(
    tables: Mapping[str, Any],
    choices: tuple[tuple[str, str], ...],
    seed: int,
    titles: Mapping[str, str],
    source: str,
) -> Cell:
    mine = [override for key, value in choices for override in _overrides(key, value)]
    varied = apply_overrides(tables, [*mine, *(f"{key}={seed}" for key in SEEDS)], option="--over")
    config = absolute(validate(RunConfig, varied, source))
    if config.simulation.compare:
        raise ConfigError(
            "simulation.compare = true: would train further models in each cell; a sweep compares its cells, so add "
            "--set simulation.compare=false"
        )
    parts = [f"{titles[key]}-{_fit_for_a_name(value)}" for key, value in choices]
    return Cell("_".join([*parts, f"seed-{seed}"]), choices, seed, config)


def _overrides(key: str, value: str) -> list[str]:
    """What a choice sets; an ε, or none, says whether there is a mechanism."""
    if key != EPSILON:
        return [f"{key}={value}"]
    if value == NO_PRIVACY:
        return ["privacy.mechanism=none"]
    return ["privacy.mechanism=dp-sgd", f"{key}={value}"]


def _titles(keys: Sequence[str]) -> dict[str, str]:
    """Axis → the shortest end of its key that no other axis has."""
    titles = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        titles[key] = next(end for end in ends if not any(one != key and f".{one}".endswith(f".{end}") for one in keys))
    return titles


def _fit_for_a_name(value: str) -> str:
    """The value, or where it cannot stand in a path, what is left of it and a few digits of its digest."""
    fit = "".join(char if char.isalnum() or char in ".+-" else "-" for char in value)[:32]
    return fit if fit == value else f"{fit.strip('-')}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
