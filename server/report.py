"""What a run says about itself: manifest, summary, adapter card, TensorBoard events."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.adapter import rank_of, save_adapter
from common.code import code_digest
from common.messages import SiteDescription
from common.sections import LoraSection
from server.checkpoint import SCHEMA_VERSION, RunFolder, to_json, write_atomically
from server.judgement import Judgement
from server.prepare import Prepared
from server.rounds import Result

PACKAGES = ("consilium", "torch", "transformers", "peft", "opacus", "flwr", "numpy", "safetensors")


def manifest(prepared: Prepared, run_id: str, kind: str) -> dict[str, Any]:
    """What was run with what: versions, public seeds, digests. Never a digest of a site's data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "kind": kind,
        "started": _now(),
        "metric": prepared.evaluator.metric,
        "higher_is_better": prepared.evaluator.higher_is_better,
        "plan_digest": prepared.plan.digest(),
        "model": prepared.config.model.name,
        "model_digest": prepared.model.base.digest,
        "code_digest": code_digest(),
        "seed": prepared.config.run.seed,
        "evaluation_data_digests": {name: split.digest() for name, split in prepared.evaluator.splits.items()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def summary(
    prepared: Prepared, run_id: str, result: Result, test: Mapping[str, float] | None, adapter: Path
) -> dict[str, Any]:
    """The result: final and per-round metrics, bytes, seconds, and each site's privacy statement."""
    rounds = [record for record in result.history if record["round"] > 0]
    best = next(record for record in result.history if record["round"] == result.best_round)
    seconds: dict[str, float] = {}
    by_phase: dict[str, float] = {}
    for record in result.history:
        for part, value in record["seconds"].items():
            seconds[part] = round(seconds.get(part, 0.0) + value, 4)
            by_phase[record["phase"]] = round(by_phase.get(record["phase"], 0.0) + value, 4)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": "completed",
        "finished": _now(),
        "privacy": prepared.config.privacy.mechanism,
        "metric": prepared.evaluator.metric,
        "best_round": result.best_round,
        "base": result.history[0]["metrics"],
        "validation": best["metrics"],
        **{key: best[key] for key in ("site_metrics", "site_metrics_noise") if key in best},
        "test": test,
        "adapter": str(adapter),
        "bytes_down": sum(record["bytes_down"] for record in rounds),
        "bytes_up": sum(record["bytes_up"] for record in rounds),
        "seconds": seconds,
        "seconds_by_phase": by_phase,
        "sites": {site: _site(one, site, rounds) for site, one in sorted(result.participants.items())},
        "absent": dict(result.absent),
        "rounds": list(result.history),
    }


def _site(description: SiteDescription, site: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "public_size": description.public_size,
        "privacy": asdict(description.privacy) if description.privacy else None,
        "rounds_admitted": sum(site in record["admitted"] for record in rounds),
        "rounds_refused": sum(site in record["refused"] for record in rounds),
        "rounds_rejected": sum(site in record["rejected"] for record in rounds),
    }


def finish(
    prepared: Prepared,
    run_id: str,
    folder: RunFolder,
    result: Result,
    judgement: Judgement,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes adapter, TensorBoard events, answers and summary; returns the summary.

    Args:
        judgement: of the result's adapter.
        more: further entries of the summary.
    """
    adapter = folder.path / "adapter"
    sites = {"by_site": {"split": judgement.split, "sites": judgement.by_site}} if judgement.by_site else {}
    content = {**summary(prepared, run_id, result, judgement.test, adapter), **sites, **(more or {})}
    statements = {site: entry["privacy"] for site, entry in content["sites"].items()}
    lora = prepared.config.lora.at_rank(rank_of(result.adapter) or prepared.config.lora.r)
    save_adapter(adapter, result.adapter, prepared.model.peft_config(lora), card(prepared, run_id, lora, statements))
    write_events(folder.path / "tensorboard", result.history)
    if judgement.right is not None:
        answers = {"split": judgement.split, "right": judgement.right}
        write_atomically(folder.path / "answers.json", to_json(answers))
    write_atomically(folder.path / "summary.json", to_json(content))
    return content


def card(prepared: Prepared, run_id: str, lora: LoraSection, statements: Mapping[str, Any]) -> dict[str, Any]:
    """``consilium.json``: what is needed to use the adapter as it was trained, and what privacy it was trained with.

    Args:
        lora: the settings at the adapter's own rank, which a correction at export may have raised.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "model": prepared.config.model.name,
        "model_digest": prepared.model.base.digest,
        "adapter_digest": prepared.model.spec.at_rank(lora.r).digest(),
        "pooling": prepared.model.base.pooling,
        "task": prepared.config.task.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json"),
        "privacy": statements,
    }


def write_events(folder: Path, history: tuple[dict[str, Any], ...]) -> None:
    """TensorBoard events of the whole history."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in history:
            for name, value in record["metrics"].items():
                writer.add_scalar(f"validation/{name}", value, record["round"])
            for name, value in record.get("site_metrics", {}).items():
                writer.add_scalar(f"sites/{name}", value, record["round"])
            for key in ("bytes_up", "bytes_down"):
                if key in record:
                    writer.add_scalar(f"wire/{key}", record[key], record["round"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
