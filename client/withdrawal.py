"""A person or a data set withdraws: rows, caches and open plans go; spent ε and released adapters stay.

What is to happen is prepared first, beside the files, and written down without the person's id
(:mod:`client.withdrawal_journal`). From then on it happens, whatever breaks meanwhile: giving the command again
finishes it. The agent, which holds rows in memory, must not serve meanwhile, nor start before it is finished.

1. copies of the files without the rows, read back, on disk         nothing has changed yet
2. the journal: files, plans, data sets                             from here on it will be done
3. every open plan over these data is closed                        it would go on with other data than it began with
4. the frozen activations are deleted                               before the rows: a cache never outlives them
5. each copy takes its file's place                                 a file is the old one or the new one, never a part
6. the audit log says so; the journal goes

**Erasure.** The old files' blocks are given back to the file system, not overwritten. Overwriting would promise what it
cannot keep: SSDs write elsewhere, journaling and copy-on-write file systems keep the old block for a while, snapshots
and backups for as long as they are kept. Keep data and ``state`` on an encrypted disk, let backups expire, and where a
remnant must be impossible, move the data to a new volume and destroy the old one's key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.config import SiteConfig, SiteDataSection
from client.privacy.agent_lock import agent_lock
from client.privacy.ledger import existing_ledger
from client.record_files import Rows, copy_name, copy_without, count, ids_in, is_copy
from client.withdrawal_journal import Journal, finish, is_open, journal_file, seen_now
from common.data.read import SUFFIXES
from common.data.units import units_of
from common.durable import sync_folder
from common.errors import ConfigError, DataError, WireError, did_you_mean
from common.plan import read_plan


@dataclass(frozen=True)
class Request:
    """Who or what withdraws: a person by id, a row by number, or with neither the whole data set."""

    data: str
    unit: str | None = None
    """Compared as training compares ids (:mod:`common.data.units`)."""
    row: int | None = None
    """From 0, in the file that is learnt from, as ``consilium site check`` counts."""

    @property
    def everything(self) -> bool:
        """Whether the whole data set goes."""
        return self.unit is None and self.row is None


@dataclass(frozen=True)
class Change:
    """What becomes of one file."""

    file: Path
    seen: tuple[int, ...]
    """Inode, size and time of change of the file that this was decided about."""
    gone: Rows | None
    """Which rows go; ``None``: the file itself."""

    @property
    def rows(self) -> int:
        """How many rows go; of a whole file nobody counts them."""
        return 0 if self.gone is None else int(self.gone.sum())


@dataclass(frozen=True)
class Intent:
    """What a withdrawal will do."""

    request: Request
    changes: tuple[Change, ...]
    affected: tuple[str, ...]
    """The data sets that read one of these files: their caches and plans go too."""
    plans: tuple[str, ...]
    """Digests of the plans to be closed."""


@dataclass(frozen=True)
class Outcome:
    """What was done."""

    intent: Intent | None
    """``None``: nothing but what was interrupted before."""
    finished: bool
    """An earlier withdrawal had been interrupted and was finished first."""


class _NobodyThere(DataError):
    """Nothing of who or what withdraws is at the site, or no longer."""


# ---- what it would do -----------------------------------------------------------------------------------------------


def intend(config: SiteConfig, request: Request) -> Intent:
    """Finds out what the withdrawal means. Changes nothing.

    Raises:
        ConfigError: the data set, or the way to name its rows, is not one of this site.
        DataError: nobody of that id is there, or a file cannot be read or must not be replaced.
        LedgerError: the ledger cannot be read.
    """
    data = _data_set(config, request)
    files = _files_of(data)
    if not files:
        raise _NobodyThere(
            f"data.{request.data}.path = '{data.path}': is no file or folder of this site (any more); copies of a hub "
            "data set are not the site's to change: write it to a file, name that in data."
            f"{request.data}.path, and withdraw there"
        )
    try:
        changes = tuple(change for file in files if (change := _change(file, data, request)) is not None)
    except OSError as error:
        raise DataError(
            f"data.{request.data}: {error.filename} cannot be read ({error.strerror}); use the owner's account"
        ) from None
    if not changes and request.row is not None:
        raise DataError(f"data.{request.data}.split = '{data.split}': {data.path} has no such file; mend site.toml")
    if not changes:
        raise _NobodyThere(
            f"--unit: no row of data set '{request.data}' is of this person, who may have withdrawn before; compare "
            f"the id with column '{data.privacy_unit}'"
        )
    touched = {change.file for change in changes}
    affected = tuple(name for name, entry in config.data.items() if touched & set(_files_of(entry)))
    return Intent(request, changes, affected, _open_plans(config, affected))


def _data_set(config: SiteConfig, request: Request) -> SiteDataSection:
    data = config.data.get(request.data)
    if data is None:
        raise ConfigError(
            f"--data = '{request.data}': is no data set of site.toml{did_you_mean(request.data, config.data)}"
        )
    if request.unit is not None and data.privacy_unit is None:
        raise ConfigError(
            f"--unit: data set '{request.data}' has no privacy unit but the row; give --row, as 'consilium site check' "
            "counts rows"
        )
    if request.unit is not None and not request.unit.strip():
        raise ConfigError("--unit: is blank; give the person's id")
    if request.row is not None and data.privacy_unit is not None:
        raise ConfigError(
            f"--row: data set '{request.data}' protects the unit in column '{data.privacy_unit}', which withdraws with "
            "all rows; give --unit"
        )
    return data


def _files_of(data: SiteDataSection) -> list[Path]:
    """All splits, by their real paths: a link that is replaced would leave what it points to."""
    path = Path(data.path).expanduser()
    if path.is_file():
        return [path.resolve()]
    if not path.is_dir():
        return []
    found = {file.resolve() for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file()}
    return sorted(file for file in found if not is_copy(file))


def _change(file: Path, data: SiteDataSection, request: Request) -> Change | None:
    seen = seen_now(file)
    gone = None if request.everything else _rows(file, data, request)
    if gone is not None and not gone.any():
        return None
    if file.stat().st_nlink > 1:
        raise DataError(f"{file}: has another name (a hard link), under which the rows would stay; remove that first")
    return Change(file, seen, gone)


def _rows(file: Path, data: SiteDataSection, request: Request) -> Rows:
    if request.row is None:
        assert request.unit is not None and data.privacy_unit is not None
        return np.equal(units_of([request.unit, *_ids(file, data.privacy_unit)])[1:], 0)
    if file != _learnt_from(data):
        return np.zeros(0, np.bool_)
    gone = np.zeros(count(file), np.bool_)
    if not 0 <= request.row < len(gone):
        raise DataError(f"--row = {request.row}: {file} has no such row; 'consilium site check' counts them from 0")
    gone[request.row] = True
    return gone


def _ids(file: Path, column: str) -> list[Any]:
    try:
        return ids_in(file, column)
    except DataError as error:
        raise DataError(
            f"{error}. Whoever withdraws could be in this file: mend it, or move it elsewhere if it is none of the data"
        ) from None


def _learnt_from(data: SiteDataSection) -> Path | None:
    path = Path(data.path).expanduser()
    splits = [path] if path.is_file() else [path / f"{data.split}{suffix}" for suffix in SUFFIXES]
    return next((file.resolve() for file in splits if file.is_file()), None)


def _open_plans(config: SiteConfig, affected: tuple[str, ...]) -> tuple[str, ...]:
    with existing_ledger(config.site.state, config.site.counter) as ledger:
        plans = ledger.plans() if ledger else []
    return tuple(plan.digest for plan in plans if is_open(plan) and _data_of(plan.body) in (None, *affected))


def _data_of(body: str) -> str | None:
    """``None`` for a plan that cannot be read: it could be over any data."""
    try:
        return read_plan(body).data
    except WireError:
        return None


# ---- doing it -------------------------------------------------------------------------------------------------------


def withdraw(config: SiteConfig, request: Request, agree: Callable[[Intent], None]) -> Outcome:
    """Withdraws, for good; finishes first what was interrupted before.

    Args:
        agree: is shown what will be done, before anything is; raises if it must not be.

    Raises:
        ConsiliumError: as :func:`intend`; the agent serves; or something cannot be written. What was begun is finished
            by the next call.
    """
    _data_set(config, request)
    with _faults_told(), _alone(config):
        before = finish(config)
        if before is not None and request.row is not None and request.data in before.affected:
            return _same_row(before, request)
        try:
            intent = intend(config, request)
        except _NobodyThere:
            if before is not None and before.data == request.data:  # it was this one
                return Outcome(None, finished=True)
            raise
        agree(intent)
        _begin(config, intent)
        finish(config)
        return Outcome(intent, finished=before is not None)


def remarks(config: SiteConfig, request: Request, intent: Intent | None) -> list[str]:
    """What a withdrawal does not undo, and what it leaves to do.

    Args:
        intent: what was done; ``None``: only what was interrupted before.
    """
    affected = intent.affected if intent else (request.data,)
    said = [
        "privacy budget that was spent stays spent, and adapters that were released before are not recalled",
        "backups and snapshots of these files are not touched",
    ]
    if unread := _unread(config.data[request.data]):
        said.append(f"files that are none of the data set's kinds are not looked into: {', '.join(unread)}")
    if others := [name for name in config.data if name not in affected]:
        said.append(f"other data sets are not touched: {', '.join(others)}")
    return [*said, *_left_to_do(config, affected)]


def _left_to_do(config: SiteConfig, affected: tuple[str, ...]) -> Iterator[str]:
    if journal_file(config).exists():
        yield "a withdrawal that was interrupted is finished first"
    with existing_ledger(config.site.state, config.site.counter) as ledger:
        declared = {entry.name: entry.public_size for entry in ledger.populations()} if ledger else {}
    for name in dict.fromkeys(config.data[data].population for data in affected):
        if config.populations[name].public_size == "exact" and name in declared:
            yield f'populations.{name}.public_size stays what was declared: write {declared[name]} in place of "exact"'
    for data in affected:
        learnt_from = _learnt_from(config.data[data])
        if learnt_from is None or not count(learnt_from):
            yield f"[data.{data}] has no rows left: take it out of site.toml, or the agent does not start"


def _unread(data: SiteDataSection) -> list[str]:
    path = Path(data.path).expanduser()
    files = path.iterdir() if path.is_dir() else ()
    return sorted(file.name for file in files if file.suffix not in SUFFIXES and file.is_file())


def _same_row(before: Journal, request: Request) -> Outcome:
    """Never two rows for one command that was given again."""
    if (before.data, before.row) == (request.data, request.row):
        return Outcome(None, finished=True)
    raise DataError(
        f"--row = {request.row}: an interrupted withdrawal was finished just now, and rows have moved up; look the row "
        "up again with 'consilium site check'"
    )


@contextmanager
def _alone(config: SiteConfig) -> Iterator[None]:
    state = config.site.state
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with agent_lock(state / "agent.lock"):
        yield


@contextmanager
def _faults_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or 'the disk'}: cannot be changed ({error.strerror}); see that the disk has room and "
            "that this user owns the data and may write there, then give the same command again"
        ) from None


def _begin(config: SiteConfig, intent: Intent) -> None:
    """Copies first, journal last: as long as it is missing, nothing has changed."""
    request, data = intent.request, config.data[intent.request.data]
    _delete_copies(data)  # what a crash left
    try:
        for change in intent.changes:
            if change.gone is not None:
                copy_without(change.file, change.gone, data.privacy_unit)
                sync_folder(change.file.parent)
            if seen_now(change.file) != change.seen:
                raise DataError(f"{change.file}: was changed meanwhile, so nothing is done; give the command again")
        files = [(str(change.file), change.seen) for change in intent.changes]
        journal = Journal(request.data, request.row, request.everything, intent.affected, intent.plans, files)
        journal.write(journal_file(config))
    except BaseException:
        if not journal_file(config).exists():
            _delete_copies(data)
        raise


def _delete_copies(data: SiteDataSection) -> None:
    for file in _files_of(data):
        copy_name(file).unlink(missing_ok=True)
