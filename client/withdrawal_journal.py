"""What a withdrawal has begun, written down so that it is finished whatever breaks meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from client.audit_log import AuditLog
from client.config import SiteConfig
from client.privacy.ledger import Decision, existing_ledger
from client.privacy.ledger_entries import PlanEntry
from client.record_files import copy_name
from common.config import SCHEMA_VERSION
from common.durable import put, sync_folder
from common.errors import DataError
from common.prefix_files import cache_folder, wipe

WHY = "a withdrawal changed its data"
"""Said of the plans that are closed."""


@dataclass(frozen=True)
class Journal:
    """What was begun and is to be finished. Holds no id of a person."""

    data: str
    row: int | None
    everything: bool
    affected: Sequence[str]
    plans: Sequence[str]
    files: Sequence[tuple[str, Sequence[int]]]
    """Each file, and how it looked (:func:`seen_now`) when this was decided."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """What is written there; ``None``: nothing is to be finished.

        Raises:
            DataError: it cannot be read.
        """
        try:
            fields = json.loads(path.read_bytes())
            if fields["schema_version"] > SCHEMA_VERSION:
                raise DataError(f"{path}: was written by a newer version than this installation; update it")
            return cls(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}: is damaged; a withdrawal was interrupted: delete this file and give that command again"
            ) from None

    def write(self, path: Path) -> None:
        """Durably. From then on it is to be finished."""
        put(path, json.dumps(asdict(self)).encode(), mode=0o600)


def refuse_interrupted(config: SiteConfig) -> None:
    """Passes unless a withdrawal was begun and not finished. The agent asks before it reads any data.

    Raises:
        DataError: one was.
    """
    if (journal := Journal.read(journal_file(config))) is not None:
        raise DataError(
            f"a withdrawal from data set '{journal.data}' was interrupted; give that 'consilium site withdraw' command "
            "again, then start the agent"
        )


def finish(config: SiteConfig) -> Journal | None:
    """Does what the journal says, as far as it is not done; returns it.

    Raises:
        ConsiliumError: ledger or audit log cannot be written, or a file was changed meanwhile.
        OSError: caches cannot be deleted, or a file cannot be replaced.
    """
    path = journal_file(config)
    journal = Journal.read(path)
    if journal is None:
        return None
    audit = AuditLog(config.site.state / "audit.jsonl")
    with existing_ledger(config.site.state, config.site.counter) as ledger:
        for digest in journal.plans:
            entry = ledger.plan(digest) if ledger else None
            if ledger and entry and is_open(entry):
                ledger.close_plan(digest, WHY)  # first, as everywhere: what a crash keeps from the log is told later
                audit.append("plan closed", plan=digest, why=WHY)
    for name in journal.affected:  # before the rows: a cache never outlives them
        wipe(cache_folder(config.site.state / "cache", name))
    for file, seen in journal.files:
        _replace(Path(file), tuple(seen), journal)
    audit.append("withdrawal", data=journal.data, plans=len(journal.plans))
    path.unlink()
    sync_folder(path.parent)
    return journal


def journal_file(config: SiteConfig) -> Path:
    """Where the journal is."""
    return config.site.state / "withdrawal.json"


def seen_now(file: Path) -> tuple[int, ...]:
    """Inode, size and time of change: whether somebody changes the file meanwhile."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def is_open(plan: PlanEntry) -> bool:
    """Whether a plan waits or goes on."""
    return plan.decision in (Decision.WAITING, Decision.APPROVED)


def _replace(file: Path, seen: tuple[int, ...], journal: Journal) -> None:
    """Unless it is done already. A file that somebody changed meanwhile is left alone: their rows would be lost."""
    copy = copy_name(file)
    if not (file if journal.everything else copy).exists():
        return
    if not file.exists() or seen_now(file) != seen:
        raise DataError(
            f"{file}: was changed while a withdrawal from data set '{journal.data}' was under way. Its plans are "
            "closed and its caches deleted, but rows are left: delete withdrawal.json in site.state, and give that "
            "command again"
        )
    if journal.everything:
        file.unlink()
    else:
        os.replace(copy, file)
    sync_folder(file.parent)
