"""Submits a run to a SuperLink and follows the folder the ServerApp writes into."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import ConnectionFailed, ConsiliumError, OutputError, RunFailed
from server.checkpoint import RunFolder
from server.lock import RunLock
from server.settings import Submission, absolute, read_run, resolved_toml, signing_key
from server.submission import SuperLinkAddress, run_status, stop, submit
from server.watcher import Progress

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often the folder is looked at."""
ASK_SECONDS = 10.0
"""How often the SuperLink is asked after a run whose ServerApp has not begun to work (a second of a core each time)."""
REACH_SECONDS = 5.0
"""How often it is tried whether the SuperLink is still there."""
LOST_SECONDS = 60.0
"""How long a SuperLink that was reached before may be away."""


def run_deployment(config: RunConfig, out: Path, resume: bool, progress: Progress) -> dict[str, Any]:
    """Submits the run, waits for its end and returns its summary.

    With ``resume`` a run that is finished is only shown, and one that is still going is only followed again.

    Raises:
        ConsiliumError: what the ServerApp reported, or the SuperLink.
    """
    config = absolute(config)
    signing_key(config)  # says now what the ServerApp would say later
    server = config.server
    superlink = SuperLinkAddress(server.superlink, server.root_certificates, server.insecure)
    folder, lock = RunFolder(out), RunLock(out)
    flower_run = lock.holder()
    if resume:
        run_id = _resumable(folder)
        if (out / "summary.json").is_file():
            return _summary(out, 0, progress)
        if flower_run is not None and resolved_toml(config) != resolved_toml(read_run(out)):
            raise OutputError(
                f"--resume {out}: the run is still going (Flower run {flower_run}) and takes no other settings; leave "
                "out --set, or stop it first ('flwr stop')"
            )
    else:
        folder.refuse_other_run()
        if flower_run is not None:
            raise OutputError(f"--out {out}: another run is being prepared there; give a new folder")
        run_id = f"{config.run.name}-{secrets.token_hex(4)}"
    if flower_run is None:
        (out / "error.json").unlink(missing_ok=True)
        submission = Submission(run_id, str(out.resolve()), resume, config.model_dump_json())
        flower_run = submit(superlink, submission.to_json())
    try:
        return _follow(superlink, flower_run, out, progress)
    except KeyboardInterrupt:
        with suppress(ConsiliumError):  # it may have finished in the meantime
            stop(superlink, flower_run)
        raise


def _resumable(folder: RunFolder) -> str:
    manifest = folder.manifest()
    if manifest["kind"] != "deployment":
        raise OutputError(f"--resume {folder.path}: holds a simulation; use 'consilium simulate --resume'")
    return str(manifest["run_id"])


def _follow(superlink: SuperLinkAddress, flower_run: int, out: Path, progress: Progress) -> dict[str, Any]:
    lock, status, reach = RunLock(out), _Status(superlink, flower_run), _Reach(superlink)
    shown, begun, waiting = 0, False, ""
    while True:
        # The holder writes its result before it lets go: a lock found free here is older than what is looked for below.
        working = lock.holder() == flower_run
        shown = _show(out, shown, progress)
        if (out / "error.json").is_file():
            raise _reported(out)
        if (out / "summary.json").is_file():
            return _summary(out, shown, progress)
        if begun and not working:
            raise RunFailed(f"the coordinator process ended without a result; continue with --resume {out}")
        begun = working
        if not begun and (ended := status.ended()):
            if _has_ended(out):
                continue
            raise RunFailed(f"the run ended at the SuperLink without a result ({ended}); start it again")
        if working and (text := RunFolder(out).waiting()) != waiting:
            waiting = text
            log.warning("waiting: %s", text or "no longer")
        reach.look()
        time.sleep(LOOK_SECONDS)


class _Reach:
    """Tells when a SuperLink goes away and comes back: the ServerApp then waits for it, for as long as it takes."""

    def __init__(self, superlink: SuperLinkAddress) -> None:
        self.superlink, self._looked, self._there = superlink, time.monotonic(), True

    def look(self) -> None:
        """Now and then opens a connection and closes it again."""
        if time.monotonic() - self._looked < REACH_SECONDS:
            return
        try:
            socket.create_connection(self.superlink.host_and_port, timeout=REACH_SECONDS).close()
            there = True
        except OSError:
            there = False
        if there != self._there:
            state = "is back" if there else "cannot be reached; the run waits for it"
            log.warning("the SuperLink at %s %s", self.superlink.address, state)
        self._looked, self._there = time.monotonic(), there


class _Status:
    """Asks a SuperLink now and then, and forgives it to be away for a while."""

    def __init__(self, superlink: SuperLinkAddress, flower_run: int) -> None:
        self.superlink, self.flower_run = superlink, flower_run
        self._asked = self._heard = time.monotonic()

    def ended(self) -> str | None:
        """How the run has ended, if it is known to have.

        Raises:
            ConnectionFailed: the SuperLink has been away for too long.
        """
        now = time.monotonic()
        if now - self._asked < ASK_SECONDS:
            return None
        self._asked = now
        try:
            status = run_status(self.superlink, self.flower_run)
        except ConnectionFailed:
            if now - self._heard > LOST_SECONDS:
                raise
            return None
        self._heard = now
        return status if status.startswith("finished") else None


def _has_ended(out: Path) -> bool:
    return (out / "summary.json").is_file() or (out / "error.json").is_file()


def _summary(out: Path, shown: int, progress: Progress) -> dict[str, Any]:
    _show(out, shown, progress)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def _show(out: Path, shown: int, progress: Progress) -> int:
    file = out / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines[shown:]:
        progress.round(json.loads(line))
    return len(lines)


def _reported(out: Path) -> ConsiliumError:
    """The ServerApp's error; a folder in which no run came to be is left as it was found."""
    report: Mapping[str, Any] = json.loads((out / "error.json").read_text(encoding="utf-8"))
    if not (out / "manifest.json").is_file():
        (out / "error.json").unlink()
        (out / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            out.rmdir()
    error = RunFailed(report["message"])
    error.exit_code = int(report["exit_code"])
    return error
