"""Run folders as a coordinator leaves them, written by hand: any number of sites, any outcome, no training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.privacy.accounting import Segment, epsilon
from common.toml_settings import validate
from server.settings import resolved_toml

NOISE = 6.0
DELTA = 1e-5
Outcomes = Callable[[int, str], tuple[str, str]]
"""(round, site) → ``admitted``, ``refused``, ``rejected`` or ``""`` (not asked), and the reason."""


def everybody(round: int, site: str) -> tuple[str, str]:
    """Each site is asked in each round, and each reply counts."""
    return "admitted", ""


def write_run(
    folder: Path,
    sites: Sequence[str] = ("north", "south", "west"),
    rounds: int = 5,
    done: int | None = None,
    outcomes: Outcomes = everybody,
    kind: str = "deployment",
    summary: Mapping[str, Any] | None = None,
    error: str | None = None,
    mechanism: str = "dp-sgd",
    metrics: Callable[[int], dict[str, float | None]] | None = None,
    settings: Mapping[str, Any] | None = None,
    by_site: Callable[[int], dict[str, float | None]] | None = None,
) -> Path:
    """Writes a folder of ``done`` of the planned rounds; finished if all are done and there is no error.

    Args:
        metrics: those of each round; accuracy and loss unless given.
        summary: further entries of summary.json.
        settings: further tables of run.toml.
        by_site: the metric of each round on the rows of each site; empty where it was not evaluated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = rounds if done is None else done
    measured = metrics or (lambda round: {"loss": 2 - 0.1 * round, "accuracy": 0.5 + 0.05 * round, "examples": 200.0})
    phases = [{"name": "head", "rounds": rounds, "sample_rate": 1.0, "train": ["lora"]}]
    tables = {"task": {"labels": ["urgent", "routine"]}, "privacy": {"mechanism": mechanism}, "phase": phases}
    config = validate(RunConfig, {**tables, **(settings or {})}, "test")
    (folder / "run.toml").write_text(resolved_toml(config), encoding="utf-8")
    higher = "perplexity" not in measured(0)
    manifest = {
        "schema_version": 1,
        "run_id": "first-1234",
        "kind": kind,
        "started": "2026-03-01T09:30:00+00:00",
        "metric": "accuracy" if higher else "perplexity",
        "higher_is_better": higher,
        "plan_digest": "a" * 64,
        "model": "minilm",
        "model_digest": "b" * 64,
        "code_digest": "c" * 64,
        "seed": 0,
        "evaluation_data_digests": {"validation": "d" * 64},
        "versions": {"python": "3.11.7", "consilium": "0.1.0"},
    }
    _write(folder / "manifest.json", manifest)
    described = {site: _description(site, 100 + 10 * index, rounds, mechanism) for index, site in enumerate(sites)}
    _write(folder / "sites.json", described)
    history: list[dict[str, Any]] = [
        {"round": 0, "phase": "base", "metrics": measured(0), "seconds": {"evaluate": 1.5}}
    ]
    history += [_round(number, sites, outcomes, measured(number)) for number in range(1, done + 1)]
    if by_site is not None:
        history = [{**record, "by_site": by_site(record["round"])} for record in history]
    lines = "".join(json.dumps(record) + "\n" for record in history)
    (folder / "rounds.jsonl").write_text(lines, encoding="utf-8")
    if error is not None:
        _write(folder / "error.json", {"message": error, "exit_code": 3})
    elif done == rounds:
        values = {record["round"]: record["metrics"].get(manifest["metric"]) for record in history}
        known = {round: value for round, value in values.items() if value is not None}
        best = (max if higher else min)(known, key=lambda round: known[round])
        finished = {
            "run_id": "first-1234",
            "status": "completed",
            "finished": "2026-03-01T10:00:00+00:00",
            "best_round": best,
            "base": history[0]["metrics"],
            "validation": history[best]["metrics"],
            "test": None,
            "adapter": str(folder / "adapter"),
            "absent": {},
        }
        _write(folder / "summary.json", {**finished, **(summary or {})})
    return folder


def _description(site: str, size: int, rounds: int, mechanism: str) -> dict[str, Any]:
    private = mechanism != "none"
    noise = NOISE if private else 0.0
    phase = {"name": "head", "sample_rate": 1.0, "noise_multiplier": noise, "clip_norm": 1.0, "steps": rounds}
    privacy = {
        "epsilon": epsilon([Segment(1.0, NOISE, rounds)], DELTA) if private else None,
        "delta": DELTA if private else None,
        "unit": "example",
        "neighbouring": "add-remove-one",
        "accountant": "prv",
        "steps": rounds,
        "phases": [phase],
    }
    return {"site": site, "status": "ready", "refusal": None, "public_size": size, "privacy": privacy}


def _round(
    number: int, sites: Sequence[str], outcomes: Outcomes, metrics: Mapping[str, float | None]
) -> dict[str, Any]:
    found = {site: outcomes(number, site) for site in sites}
    of = {kind: {site: why for site, (what, why) in found.items() if what == kind} for kind in ("refused", "rejected")}
    admitted = [site for site, (what, _) in found.items() if what == "admitted"]
    return {
        "round": number,
        "phase": "head",
        "metrics": dict(metrics),
        "bytes_down": 1000 * len(sites),
        "bytes_up": 2000 * len(admitted),
        "seconds": {"exchange": 2.0, "aggregate": 0.5, "evaluate": 0.25},
        "cohort": [site for site, (what, _) in found.items() if what],
        "admitted": admitted,
        **of,
    }


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
