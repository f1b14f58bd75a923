"""Changes of single settings of the phases, be these written or the task's default recipe.

What the default recipe is, the model must say first (``task.feature_map``). So a change is kept as it was asked for,
``phase.head.rounds=20``, and made whenever the phases are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.errors import ConfigError, did_you_mean
from common.sections import PhaseSection
from common.toml_settings import ALGORITHM, toml_value, validate

EXCLUSIVE = {"batch_size": "sample_rate", "sample_rate": "batch_size"}
"""Settings of which one takes the other's place."""


def changed(phases: Sequence[PhaseSection], changes: Sequence[str]) -> tuple[PhaseSection, ...]:
    """The phases with all changes made, one after the other.

    ``phase.NAME.KEY=VALUE`` or ``phase.INDEX.KEY=VALUE`` changes one phase and ``phase.KEY=VALUE`` all of them;
    ``phase.algorithm`` those that train ``lora``, since others have no use for it.

    Raises:
        ConfigError: no such phase, or a value that does not fit.
    """
    if not phases or not changes:
        return tuple(phases)
    tables = [phase.model_dump(mode="json") for phase in phases]
    problems = []
    for change in changes:
        key, _, value = change.partition("=")
        *_, name = key.split(".")
        try:
            addressed = _addressed(tables, key)
        except ConfigError as error:
            problems += error.problems
            continue
        for table in addressed:
            if name in EXCLUSIVE:
                table[EXCLUSIVE[name]] = None
            table[name] = toml_value(value)
    if problems:
        raise ConfigError(problems)
    return tuple(validate(PhaseSection, table, ", ".join(changes)) for table in tables)


def _addressed(tables: Sequence[dict[str, Any]], key: str) -> Sequence[dict[str, Any]]:
    match key.split("."):
        case ["phase", which, _]:
            found = [table for table in tables if table["name"] == which]
            if not found and which.isdecimal():
                found = list(tables[int(which) :][:1])
            if not found:
                raise ConfigError(
                    f"{key}: there is no such phase{did_you_mean(which, [one['name'] for one in tables])}"
                )
        case ["phase", _]:
            found = [table for table in tables if key != ALGORITHM or "lora" in table["train"]]
            if not found:
                raise ConfigError(f"{key}: no phase trains 'lora', and an algorithm is chosen for nothing else")
        case _:
            raise ConfigError(f"{key}: does not address a setting; expected phase.KEY or phase.NAME.KEY")
    return found
