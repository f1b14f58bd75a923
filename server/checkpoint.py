"""The run's folder: what a run leaves behind, and what it resumes from. Every write is atomic and durable.

::

    DIR/run.toml            the settings, resolved
    DIR/manifest.json       run id, versions, digests, public seeds
    DIR/sites.json          every site that ever took part, as it described itself
    DIR/rounds.jsonl        one line per finished round (line 0: before round 1)
    DIR/rounds/N/           the cohort, each admitted reply, the admitted set of round N while it is open
    DIR/checkpoint/N/       state after round N (safetensors + JSON); LATEST names the current one
    DIR/adapter/            the best adapter, plain PEFT
    DIR/answers.json        which held-out rows the best adapter answers rightly, for a task where an answer can be
    DIR/summary.json        the result
    DIR/error.json          why a deployment's coordinator stopped
    DIR/waiting.txt         what the run waits for before its first round, while it does
    DIR/.lock               held by the coordinator at work (``server/lock.py``)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.durable import sync_folder
from common.errors import OutputError
from common.messages import Tensors
from server.spill import SpilledReply

SCHEMA_VERSION = 1
Arrays = Mapping[str, npt.NDArray[Any]]


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """The file has either its old or its new content, whatever happens, and the new one is on disk on return.

    Args:
        durable: ``False``: written, but not forced to the disk. A power cut may take it; the end of a process may not.

    Raises:
        OutputError: the file system does not allow it, or is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(f"output {path}: cannot be written ({error.strerror}); free space or mend access") from None


def to_json(value: Any) -> bytes:
    """Indented JSON; NaN and Inf become null, so that any reader can parse it."""
    return (json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


@dataclass(frozen=True)
class Checkpoint:
    """State between two rounds."""

    round: int
    """Last finished round; 0 before the first."""
    next_round: int
    phase: str
    best_round: int
    history: tuple[dict[str, Any], ...]
    """One record per finished round, as in rounds.jsonl."""
    aggregator: Arrays
    best: Arrays
    """The best adapter so far."""


class RunFolder:
    """A run's folder, new or resumed.

    Args:
        durable: ``False`` in simulations: what the open round receives is written, but not forced to the disk. The
            sites would send it again. Checkpoints always are.

    Raises:
        OutputError: it already holds another run, or nothing to resume.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.durable = path, durable

    @classmethod
    def create(cls, path: Path, run_toml: str, manifest: Mapping[str, Any], durable: bool = True) -> RunFolder:
        """A new run's folder."""
        folder = cls(path, durable)
        folder.refuse_other_run()
        write_atomically(path / "manifest.json", to_json(manifest))
        write_atomically(path / "run.toml", run_toml.encode())
        return folder

    def refuse_other_run(self) -> None:
        """Raises OutputError if the folder cannot take a new run."""
        if self.path.is_file():
            raise OutputError(f"--out {self.path}: is a file; give a new folder")
        held = [name for name in ("run.toml", "manifest.json", "rounds.jsonl") if (self.path / name).exists()]
        if held:
            raise OutputError(
                f"--out {self.path}: already holds a run ({held[0]}); give a new folder, or --resume {self.path}"
            )

    def manifest(self) -> dict[str, Any]:
        """The run's manifest.

        Raises:
            OutputError: there is none, it is damaged, or it is of a newer version.
        """
        file = self.path / "manifest.json"
        if not file.is_file() or not (self.path / "run.toml").is_file():
            raise OutputError(
                f"--resume {self.path}: holds no run (manifest.json or run.toml is missing); start it with --config "
                "and a new --out"
            )
        with self._undamaged(file):
            manifest: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        if manifest.get("schema_version", 0) > SCHEMA_VERSION:
            raise OutputError(f"--resume {self.path}: was written by a newer version; update this installation")
        return manifest

    def sites(self) -> dict[str, Any]:
        """What :meth:`store_sites` stored."""
        file = self.path / "sites.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def store_sites(self, sites: Mapping[str, Any]) -> None:
        """Descriptions of all sites that ever took part; weights and privacy statements survive a resumption."""
        write_atomically(self.path / "sites.json", to_json(dict(sorted(sites.items()))))

    def heads(self) -> dict[str, str]:
        """The newest head that :meth:`add_head` stored of each site. A line that a crash left unfinished is ignored."""
        file, heads = self.path / "heads.jsonl", {}
        for line in file.read_bytes().splitlines() if file.is_file() else []:
            with suppress(ValueError):
                site, head = json.loads(line)
                heads[site] = head
        return heads

    def add_head(self, site: str, head: str) -> None:
        """A signed head of a site's audit log, to be shown to the site again after a resumption. One line more, so that
        its cost does not grow with the number of sites.

        Raises:
            OutputError: it cannot be written.
        """
        file = self.path / "heads.jsonl"
        try:
            new = not file.exists()
            with file.open("a+b") as stream:
                if (end := stream.seek(0, os.SEEK_END)) and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                    stream.write(b"\n")  # ends what a crash has left unfinished
                stream.write(json.dumps([site, head]).encode() + b"\n")
                stream.flush()
                if self.durable:
                    os.fsync(stream.fileno())
            if new and self.durable:
                sync_folder(self.path)
        except OSError as error:
            raise OutputError(
                f"output {file}: cannot be written ({error.strerror}); free space or mend access"
            ) from None

    def waiting(self) -> str:
        """What the run waits for, in words; empty if for nothing."""
        file = self.path / "waiting.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def store_waiting(self, text: str) -> None:
        """Says what the run waits for, to whoever follows its folder."""
        file = self.path / "waiting.txt"
        if not text:
            file.unlink(missing_ok=True)
        elif text != self.waiting():
            write_atomically(file, text.encode())

    # ---- inside a round ------------------------------------------------------------------------------------------

    def round_folder(self, round: int) -> Path:
        """Where the open round's cohort and replies are kept."""
        return self.path / "rounds" / str(round)

    def cohort(self, round: int) -> tuple[str, ...] | None:
        """The stored cohort of an open round."""
        return self._names(self.round_folder(round) / "cohort.json")

    def store_cohort(self, round: int, sites: tuple[str, ...]) -> None:
        """Stored before anything is sent."""
        write_atomically(self.round_folder(round) / "cohort.json", to_json(list(sites)))

    def store_reply(self, round: int, site: str, request_digest: str, update: Tensors) -> None:
        """Spills one admitted reply to disk."""
        content = save(
            {name: np.ascontiguousarray(array) for name, array in update.items()}, {"request": request_digest}
        )
        write_atomically(self.round_folder(round) / f"{site}.safetensors", content, self.durable)

    def reply(self, round: int, site: str) -> SpilledReply:
        """A spilled reply, whose tensors are read when they are asked for.

        Raises:
            OutputError: it is gone, or damaged.
        """
        return SpilledReply(self.round_folder(round) / f"{site}.safetensors")

    def replies(self, round: int) -> set[str]:
        """Sites whose reply is on disk."""
        return {file.stem for file in self.round_folder(round).glob("*.safetensors")}

    def outcome(self, round: int) -> dict[str, Any] | None:
        """The closed round's admitted set, refusals, rejections and figures."""
        file = self.round_folder(round) / "outcome.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def store_outcome(self, round: int, outcome: Mapping[str, Any]) -> None:
        """Stored before anything is folded."""
        write_atomically(self.round_folder(round) / "outcome.json", to_json(outcome))

    def _names(self, file: Path) -> tuple[str, ...] | None:
        return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    # ---- between rounds ------------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint, points LATEST at it, then tidies up what it replaces."""
        folder = self.path / "checkpoint" / str(checkpoint.round)
        arrays = {f"aggregator/{name}": array for name, array in checkpoint.aggregator.items()}
        arrays |= {f"best/{name}": array for name, array in checkpoint.best.items()}
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        write_atomically(folder / "state.safetensors", content)
        state = {
            "schema_version": SCHEMA_VERSION,
            "round": checkpoint.round,
            "next_round": checkpoint.next_round,
            "phase": checkpoint.phase,
            "best_round": checkpoint.best_round,
            "history": checkpoint.history,
        }
        write_atomically(folder / "state.json", to_json(state))
        write_atomically(self.path / "checkpoint" / "LATEST", str(checkpoint.round).encode())
        self.tidy(checkpoint)

    def tidy(self, checkpoint: Checkpoint) -> None:
        """Publishes the history and removes what the checkpoint replaces; repeated after a crash in between."""
        lines = b"".join(json.dumps(_plain(record), allow_nan=False).encode() + b"\n" for record in checkpoint.history)
        write_atomically(self.path / "rounds.jsonl", lines)
        for old in (self.path / "checkpoint").iterdir():
            if old.is_dir() and old.name != str(checkpoint.round):
                shutil.rmtree(old)
        shutil.rmtree(self.round_folder(checkpoint.round), ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The last checkpoint, if any.

        Raises:
            OutputError: it is damaged, or of a newer version.
        """
        pointer = self.path / "checkpoint" / "LATEST"
        if not pointer.is_file():
            return None
        folder = self.path / "checkpoint" / pointer.read_text(encoding="utf-8").strip()
        with self._undamaged(folder):
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["schema_version"] > SCHEMA_VERSION:
                raise OutputError(f"--resume {self.path}: its checkpoint was written by a newer version; update")
            arrays = load((folder / "state.safetensors").read_bytes())
            parts: dict[str, dict[str, npt.NDArray[Any]]] = {"aggregator": {}, "best": {}}
            for key, array in arrays.items():
                part, _, name = key.partition("/")
                parts[part][name] = array
            return Checkpoint(
                state["round"],
                state["next_round"],
                state["phase"],
                state["best_round"],
                tuple(_with_nan(record) for record in state["history"]),
                parts["aggregator"],
                parts["best"],
            )

    @contextmanager
    def _undamaged(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise OutputError(
                f"--resume {self.path}: {path.relative_to(self.path)} is damaged ({type(error).__name__}); "
                "restore the folder from a copy, or start a new run"
            ) from None


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was before JSON made null of a metric that is not a number."""
    metrics = {name: float("nan") if value is None else value for name, value in record["metrics"].items()}
    return {**record, "metrics": metrics}
