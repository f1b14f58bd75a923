"""Where frozen activations are kept: in memory, or in a folder of the site's own disk, found again after a restart.

A file is taken for whole only if its header names the very same model, examples and number format, and its checksum
holds; else it is computed anew. Whatever goes wrong with the disk, activations are computed without it.

Files are read with ``preadv`` straight into the batch, not through a memory map. The system's page cache serves both.
But the pages of a map count as memory of the process, and reading a map whose file was cut short kills the process,
while here it is an error like any other. (A batch of 16 × 64 tokens of width 384: 0.10 ms; through a map 0.08 ms, or
0.16 ms where its pages are given back each time.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.cuts import Cut
from common.durable import sync_folder
from common.prefixes import Layout, Memory, Prefixes, Values, reason

log = logging.getLogger(__name__)

RESERVE = 1 << 30
"""Bytes a cache leaves free on its disk: the site's ledger may lie there too."""

SCHEMA_VERSION = 1
"""Of the files; one of another version is computed anew."""

HEADER = 4096
"""Bytes before the values: one JSON object, filled up with spaces."""

WHOLE, PART = ".prefixes", ".part"


class PrefixFile:
    """Rows in an open file behind a header; the file is closed when nobody uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)

    def read(self, start: int, into: Values) -> None:
        """As :class:`Store`."""
        if os.preadv(self.descriptor, [into.data], HEADER + start * into.strides[0]) != into.nbytes:
            raise OSError(errno.EIO, "the file has been cut short")

    def write(self, start: int, values: Values) -> None:
        """As :class:`Store`."""
        if os.pwrite(self.descriptor, values.data, HEADER + start * values.strides[0]) != values.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def header(self) -> dict[str, Any]:
        """What the file says it holds; empty where that cannot be read."""
        try:
            found = json.loads(os.pread(self.descriptor, HEADER, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def checksum(self) -> str:
        """SHA-256 of the values."""
        state, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        at = HEADER
        while count := os.preadv(self.descriptor, [buffer], at):
            state.update(buffer[:count])
            at += count
        return state.hexdigest()


@dataclass(frozen=True)
class PrefixCache:
    """Keeps activations: in a folder (0700) of files (0600), or in memory where no folder is given.

    One file for each cut; files of another origin make room for new ones. No file name tells anything about the data.
    """

    limit: int
    """Bytes of hidden states; above it they are not kept. Features are always kept, in memory if need be."""
    folder: Path | None = None

    def find(self, cut: Cut, origin: str, layout: Layout) -> Prefixes | None:
        """The activations at a cut, if an earlier process left them whole.

        Args:
            origin: digest of all that the values depend on, but for the cut.
        """
        if self.folder is None or not layout.rows:
            return None
        try:
            file = self._whole(cut, origin, layout)
        except OSError as error:
            log.warning("the frozen activations on disk cannot be read: %s", reason(error))
            return None
        return None if file is None else Prefixes(layout, file)

    def make(self, cut: Cut, origin: str, layout: Layout, fill: Callable[[Prefixes], None]) -> Prefixes:
        """Has the activations computed and keeps them; not stored where there is no room.

        Args:
            origin: as for ``find``.
            fill: puts all of them.
        """
        if self.folder is not None and layout.rows:
            try:
                return self._on_disk(cut, origin, layout, fill)
            except OSError as error:
                why = reason(error)
        elif cut.layer is None or layout.size <= self.limit:
            return self.in_memory(layout, fill)
        else:
            why = _too_large(layout.size, self.limit)
        if cut.layer is None:
            log.warning("the frozen features are kept in memory alone: %s", why)
            return self.in_memory(layout, fill)
        log.warning("the frozen activations are not kept, so their layers run in every step: %s", why)
        return Prefixes(layout, None)

    def in_memory(self, layout: Layout, fill: Callable[[Prefixes], None]) -> Prefixes:
        """Computed for this process alone."""
        prefixes = Prefixes(layout, Memory(layout))
        fill(prefixes)
        return prefixes

    def _whole(self, cut: Cut, origin: str, layout: Layout) -> PrefixFile | None:
        if not self._path(cut).exists():
            return None
        file = PrefixFile(os.open(self._path(cut), os.O_RDONLY | os.O_NOFOLLOW))
        header = file.header()
        checksum = header.pop("sha256", None)
        if header != _header(cut, origin, layout):
            log.info("the frozen activations on disk are of another model or other data and are replaced")
        elif file.checksum() != checksum:
            log.warning("the frozen activations on disk are damaged and are computed anew")
        else:
            log.info("the frozen activations were found on disk (%s)", _gib(layout.size))
            return file
        return None

    def _on_disk(self, cut: Cut, origin: str, layout: Layout, fill: Callable[[Prefixes], None]) -> Prefixes:
        """A file that gets its name when everything is in it and on disk; nothing is left of it on an error."""
        folder = self._cleared(cut, origin, HEADER + layout.size)
        descriptor, part = tempfile.mkstemp(suffix=PART, dir=folder)  # 0600
        file = PrefixFile(descriptor)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk shows before the work is done
                os.posix_fallocate(descriptor, 0, HEADER + layout.size)
            prefixes = Prefixes(layout, file)
            fill(prefixes)
            if prefixes.flawed:  # readable as long as it is open, and tried again after a restart
                os.unlink(part)
                return prefixes
            header = {**_header(cut, origin, layout), "sha256": file.checksum()}
            os.pwrite(descriptor, json.dumps(header).encode().ljust(HEADER), 0)
            os.fsync(descriptor)
            os.replace(part, self._path(cut))
            sync_folder(folder)
        except BaseException:
            file.close()
            Path(part).unlink(missing_ok=True)
            raise
        log.info("the frozen activations are kept on disk (%s)", _gib(layout.size))
        return prefixes

    def _cleared(self, cut: Cut, origin: str, size: int) -> Path:
        """The folder, without what is outdated or left over from a crash.

        Raises:
            OSError: there is no room for a file of this size.
        """
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)  # also where it was there before
        kept = 0
        for path in self.folder.iterdir():
            if path.suffix == PART or (path.suffix == WHOLE and (path == self._path(cut) or _origin(path) != origin)):
                path.unlink()
            elif path.suffix == WHOLE:
                kept += path.stat().st_size
        if kept + size > self.limit:
            raise OSError(errno.EDQUOT, _too_large(kept + size, self.limit))
        if size + RESERVE > (free := shutil.disk_usage(self.folder).free):
            raise OSError(errno.ENOSPC, f"{_gib(size)} are needed and {_gib(free)} free, of which 1 GiB must stay free")
        return self.folder

    def _path(self, cut: Cut) -> Path:
        assert self.folder is not None
        return self.folder / f"{cut.key()}{WHOLE}"


def _header(cut: Cut, origin: str, layout: Layout) -> dict[str, Any]:
    """What makes a file the one that is looked for."""
    return {
        "format": "consilium frozen prefixes",
        "schema_version": SCHEMA_VERSION,
        "origin": origin,
        "cut": cut.key(),
        "dtype": str(layout.dtype),
        "rows": layout.rows,
        "width": layout.width,
    }


def _origin(path: Path) -> object:
    return PrefixFile(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)).header().get("origin")


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def _too_large(size: int, limit: int) -> str:
    return f"{_gib(size)} exceed the cache limit of {_gib(limit)}"


# ---- wiped with the data --------------------------------------------------------------------------------------------


def cache_folder(root: Path, data: str) -> Path:
    """The folder of one data set's caches, whatever characters its name has."""
    return root / f"data-{quote(data, safe='')}"


def wipe(folder: Path) -> None:
    """Deletes every cache of a data set. A process that has one open can read it until it ends.

    Raises:
        OSError: something cannot be deleted.
    """
    if folder.exists():
        shutil.rmtree(folder)


def wipe_outdated(root: Path, sources: Mapping[str, Sequence[Path]]) -> None:
    """Deletes the caches of data sets that are no longer there or whose files have changed: rows that were deleted
    must not live on in them, whether or not anybody trains again.

    Args:
        root: the folder of all data sets' caches.
        sources: data set → the files it is read from.

    Raises:
        OSError: something cannot be read or deleted.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = {cache_folder(root, data): files for data, files in sources.items()}
    for folder in root.iterdir():
        if folder not in known:
            wipe(folder)
    for folder, files in known.items():
        digest, note = _digest_of(files), folder / "source"
        if not (note.is_file() and note.read_bytes() == digest.encode()):
            wipe(folder)
            folder.mkdir(mode=0o700)
            note.touch(mode=0o600)
            note.write_bytes(digest.encode())


def _digest_of(files: Sequence[Path]) -> str:
    state = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()
