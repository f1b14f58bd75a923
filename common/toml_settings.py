"""Settings from TOML: read, overridden by ``section.key=value``, and checked against their types with all problems told
at once."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from common.errors import ConfigError, did_you_mean

Settings = TypeVar("Settings", bound=BaseModel)

ALGORITHM = "phase.algorithm"
ALIASES = {"server.algorithm": ALGORITHM}
"""What else a setting may be called on the command line."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of an existing TOML file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """The tables with ``section.key=value`` settings put in; values are TOML, or plain text where that fails.

    ``phase.0.rounds=3``, ``phase.head.rounds=3`` and ``phase.rounds=3`` change phases, which may be the default recipe:
    they are added to ``phase_changes`` (:mod:`common.phase_changes`).

    Args:
        option: of the command line, from which the overrides are; for messages.

    Raises:
        ConfigError: an override has no ``=`` or addresses what is not a table.
    """
    result: dict[str, Any] = _copied(tables)
    problems, changes = [], []
    for override in overrides:
        name, equals, text = override.partition("=")
        name = ALIASES.get(name.strip(), name.strip())
        keys = name.split(".")
        if not equals or not all(keys) or (len(keys) < 2 and keys != ["phase"]):
            problems.append(f"{option} {override}: expected section.key=value, e.g. {option} privacy.epsilon=3")
            continue
        if keys[0] == "phase" and len(keys) > 1:
            changes.append(f"{name}={text.strip()}")
        elif not _put(result, keys, toml_value(text.strip())):
            problems.append(f"{option} {override}: '{name}' does not address a setting")
    if changes and isinstance(given := result.get("phase_changes", []), list):
        result["phase_changes"] = [*given, *changes]
    if problems:
        raise ConfigError(problems)
    return result


def validate(model: type[Settings], tables: Mapping[str, Any], source: str) -> Settings:
    """The settings, or one ConfigError that lists every problem with the nearest known name.

    Raises:
        ConfigError: also where the settings are of a newer schema, whose names cannot be judged here.
    """
    version, known = tables.get("schema_version"), model.model_fields.get("schema_version")
    if known is not None and isinstance(version, int) and version > known.default:
        raise ConfigError(
            f"schema_version = {version}: is newer than this installation knows ({known.default}); update it", source
        )
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for detail in error.errors(include_url=False):
            subject, problem = _problem(model, detail)
            problems.setdefault(subject, []).append(problem)
        raise ConfigError([f"{subject}: {', or '.join(each)}" for subject, each in problems.items()], source) from None


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def toml_value(text: str) -> Any:
    """The TOML value, or plain text where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tables: dict[str, Any], keys: Sequence[str], value: Any) -> bool:
    here: Any = tables
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            return False
    here[keys[-1]] = value
    return True


_PLAINLY = {"tuple_type": "should be a list", "model_type": "should be a table", "dict_type": "should be a table"}
"""pydantic error type → what is wrong, in the words of TOML."""


def _problem(model: type[BaseModel], detail: Any) -> tuple[str, str]:
    """One pydantic error: its subject (dotted name and value), and what is wrong with it."""
    parent, location = _resolved(model, detail["loc"])
    name = ".".join(str(part) for part in location)
    message = _PLAINLY.get(detail["type"], detail["msg"].removeprefix("Value error, ").removeprefix("Input "))
    if detail["type"] == "extra_forbidden":
        known = parent.model_fields if parent is not None else {}
        return name, f"unknown setting{did_you_mean(str(location[-1]), known)}"
    if detail["type"] == "missing":
        return name, "is required and missing"
    if detail["type"] == "value_error":
        subject, colon, problem = message.partition(": ")
        return (f"{name}.{subject}" if name else subject, problem) if colon else (name, message)
    return f"{name} = {detail['input']!r}", message[0].lower() + message[1:]


def _resolved(model: type[BaseModel], location: Sequence[Any]) -> tuple[type[BaseModel] | None, list[Any]]:
    """The section a pydantic location lies in, and the location without the names of a union's members."""
    parent: type[BaseModel] | None = None
    here: type[BaseModel] | None = model
    named: list[Any] = []
    free = False  # the next part is the name of a table, not of a field
    for part in location:
        if free or isinstance(part, int):
            free = False
        elif here is None:
            continue
        else:
            field = here.model_fields.get(str(part))
            parent, here = here, _section_type(field.annotation) if field else None
            free = field is not None and get_origin(field.annotation) is dict
        named.append(part)
    return parent, named


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_type(argument)
        if found is not None:
            return found
    return None
