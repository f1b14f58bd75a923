"""Secrets of rounds that are funded and not yet released: one file each, readable by the site's own user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.privacy.sampling import RoundSecret
from common.durable import sync_folder
from common.errors import LedgerError


class SecretFiles:
    """A folder (0700) of files (0600). It belongs outside backups.

    Args:
        durable: each secret is on disk before ``write`` returns.

    Raises:
        LedgerError: here and in all methods, if the folder cannot be used.
    """

    def __init__(self, folder: Path, durable: bool) -> None:
        self.folder, self.durable = folder, durable
        with self._faults():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o077:  # it was there before
                folder.chmod(0o700)

    def write(self, plan: str, round: int, secret: RoundSecret) -> None:
        """Stores the secret of a round in place of any other; where that fails, nothing is left of it."""
        file = self._file(plan, round)
        with self._faults():
            try:
                self._store(file, secret.value)
            except OSError:
                file.unlink(missing_ok=True)
                raise

    def read(self, plan: str, round: int) -> RoundSecret | None:
        """The secret of a round; ``None`` if it is gone or not whole."""
        with self._faults():
            file = self._file(plan, round)
            value = file.read_bytes() if file.is_file() else b""
            return RoundSecret(value) if len(value) == 32 else None

    def delete(self, plan: str, round: int) -> None:
        """Forgets the secret of a round."""
        with self._faults():
            self._file(plan, round).unlink(missing_ok=True)

    def rounds(self) -> Iterator[tuple[str, int]]:
        """(plan, round) of every secret that is stored."""
        with self._faults():
            names = [file.name for file in self.folder.iterdir()]
        for name in names:
            plan, _, round = name.rpartition("-")
            if plan and round.isdecimal():
                yield plan, int(round)

    def _store(self, file: Path, value: bytes) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, value)
            if self.durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if self.durable:
            sync_folder(self.folder)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"secrets of rounds {self.folder}: cannot be read and written ({error.strerror}); give the site's user "
                "a folder of its own and some free space. No round is trained without its secret on the disk"
            ) from None

    def _file(self, plan: str, round: int) -> Path:
        return self.folder / f"{plan}-{round}"
