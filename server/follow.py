"""Submits a run to a SuperLink and follows the folder the ServerApp writes into."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import ConsiliumError, RunFailed
from server.checkpoint import RunFolder
from server.rounds import Progress
from server.settings import Submission
from server.submission import SuperLinkAddress, run_status, stop, submit

LOOK_SECONDS = 0.2
"""How often the folder is looked at."""
ASK_SECONDS = 10.0
"""How often the SuperLink is asked whether the run still lives (each question costs a second of a core)."""


def run_deployment(config: RunConfig, out: Path, resume: bool, progress: Progress) -> dict[str, Any]:
    """Submits the run, waits for its end and returns its summary.

    Raises:
        ConsiliumError: what the ServerApp reported, or the SuperLink.
    """
    folder = RunFolder(out)
    if resume:
        run_id = folder.manifest()["run_id"]
    else:
        folder.refuse_other_run()
        run_id = f"{config.run.name}-{secrets.token_hex(4)}"
    for name in ("error.json", "summary.json"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    superlink = SuperLinkAddress(config.server.superlink, config.server.root_certificates, config.server.insecure)
    submission = Submission(run_id, str(out.resolve()), resume, config.model_dump_json())
    flower_run = submit(superlink, submission.to_json())
    try:
        return _follow(superlink, flower_run, out, progress)
    except KeyboardInterrupt:
        with suppress(ConsiliumError):  # it may have finished in the meantime
            stop(superlink, flower_run)
        raise


def _follow(superlink: SuperLinkAddress, flower_run: int, out: Path, progress: Progress) -> dict[str, Any]:
    shown = 0
    asked = time.monotonic()
    while True:
        shown = _show(out, shown, progress)
        if (out / "error.json").is_file():
            raise _reported(json.loads((out / "error.json").read_text(encoding="utf-8")))
        if (out / "summary.json").is_file():
            _show(out, shown, progress)
            summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            return summary
        if time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            status = run_status(superlink, flower_run)
            if status.startswith("finished") and not _ended(out):
                raise RunFailed(
                    f"the run ended at the SuperLink without a result ({status}); continue with --resume {out}"
                )
        time.sleep(LOOK_SECONDS)


def _ended(out: Path) -> bool:
    return (out / "summary.json").is_file() or (out / "error.json").is_file()


def _show(out: Path, shown: int, progress: Progress) -> int:
    file = out / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines[shown:]:
        progress.round(json.loads(line))
    return len(lines)


def _reported(report: Mapping[str, Any]) -> ConsiliumError:
    error = RunFailed(report["message"])
    error.exit_code = int(report["exit_code"])
    return error
