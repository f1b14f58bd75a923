"""Reads what a run has left in its folder so far; nothing is taken for granted but settings and manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.config import RunConfig
from common.errors import ConfigError, OutputError
from common.toml_settings import read_toml, validate
from server.checkpoint import SCHEMA_VERSION
from server.lock import RunLock

Read = TypeVar("Read")
Round = Mapping[str, Any]
"""One line of rounds.jsonl."""
ARMS = "arms"
"""Folder of the runs that a simulation compares with."""


@dataclass(frozen=True)
class Records:
    """A run's folder, read."""

    path: Path
    manifest: Mapping[str, Any]
    toml: str
    """run.toml as it stands."""
    config: RunConfig
    rounds: tuple[Round, ...]
    """Finished rounds; the first is the evaluation before round 1."""
    sites: Mapping[str, Mapping[str, Any]]
    """Every site that ever took part, as it described itself."""
    summary: Mapping[str, Any] | None
    """``None`` until the run is finished."""
    error: str | None
    """Why a deployment's coordinator stopped."""
    working: bool
    """A coordinator is at work in the folder. Never true of a simulation, which takes no lock."""
    arms: Mapping[str, tuple[Round, ...]]
    """Rounds of the runs it was compared with, by the name of their folder."""


def records_of(path: Path) -> Records:
    """Everything the page is made of.

    Raises:
        OutputError: the folder holds no run, or a file in it is damaged or of a newer version.
    """
    for name in ("manifest.json", "run.toml"):
        if not (path / name).is_file():
            raise OutputError(
                f"report {path}: holds no run ({name} is missing); give the folder that --out of 'consilium simulate' "
                "or 'consilium server run' named"
            )
    manifest = _read(path, "manifest.json", _versioned)
    error = _read(path, "error.json", _object) if (path / "error.json").is_file() else None
    summary = _read(path, "summary.json", _summary) if (path / "summary.json").is_file() else None
    return Records(
        path=path,
        manifest=manifest,
        toml=_read(path, "run.toml", str),
        config=_settings(path),
        rounds=_rounds(path, ""),
        sites=_read(path, "sites.json", _described) if (path / "sites.json").is_file() else {},
        summary=summary,
        error=None if error is None or summary else str(error.get("message", "")),
        working=summary is None and RunLock(path).holder() is not None,
        arms={arm.name: _rounds(path, f"{ARMS}/{arm.name}/") for arm in sorted((path / ARMS).glob("*"))},
    )


def _settings(path: Path) -> RunConfig:
    try:
        return validate(RunConfig, read_toml(path / "run.toml"), str(path / "run.toml"))
    except ConfigError as error:
        raise OutputError(f"report {path}: {error}") from None


def _rounds(path: Path, folder: str) -> tuple[Round, ...]:
    name = f"{folder}rounds.jsonl"
    return _read(path, name, _lines) if (path / name).is_file() else ()


def _lines(text: str) -> tuple[Round, ...]:
    rounds = tuple(_object(line) for line in text.splitlines())
    for record in rounds:
        parts = (record["metrics"], record.get("by_site", {}))
        if not isinstance(record["round"], int) or not all(isinstance(part, dict) for part in parts):
            raise ValueError("not a record of a round")
    return rounds


def _described(text: str) -> dict[str, Any]:
    """Sites as they described themselves."""
    sites = _object(text)
    for one in sites.values():
        if not isinstance(one["public_size"], int):
            raise ValueError("not a declared size")
        for phase in (one["privacy"] or {"phases": ()})["phases"]:
            if not all(isinstance(phase[name], int | float) for name in ("sample_rate", "noise_multiplier", "steps")):
                raise ValueError(f"phase {phase['name']}: not a statement")
    return sites


def _summary(text: str) -> dict[str, Any]:
    summary = _versioned(text)
    if not isinstance(summary["best_round"], int) or not isinstance(summary["validation"], dict):
        raise ValueError("not a result")
    return summary


def _versioned(text: str) -> dict[str, Any]:
    value = _object(text)
    if value.get("schema_version", 0) > SCHEMA_VERSION:
        raise _Newer
    return value


class _Newer(Exception):
    """A file of a later version."""


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _read(path: Path, name: str, parse: Callable[[str], Read]) -> Read:
    try:
        return parse((path / name).read_text(encoding="utf-8"))
    except _Newer:
        raise OutputError(f"report {path}: {name} was written by a newer version; update this installation") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"report {path}: {name} is damaged ({type(error).__name__}); restore the folder from a copy"
        ) from None
