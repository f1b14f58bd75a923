"""Secrets of rounds that are funded and not yet released: one file each, readable by the site's own user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from client.privacy.sampling import RoundSecret


class SecretFiles:
    """A folder (0700) of files (0600). It belongs outside backups.

    Args:
        durable: each secret is on disk before ``write`` returns.
    """

    def __init__(self, folder: Path, durable: bool) -> None:
        self.folder, self.durable = folder, durable
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # also where it was there before

    def write(self, plan: str, round: int, secret: RoundSecret) -> None:
        """Stores the secret of a round in place of any other."""
        descriptor = os.open(self._file(plan, round), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, secret.value)
            if self.durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not self.durable:
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, plan: str, round: int) -> RoundSecret | None:
        """The secret of a round; ``None`` if it is gone or not whole."""
        file = self._file(plan, round)
        value = file.read_bytes() if file.is_file() else b""
        return RoundSecret(value) if len(value) == 32 else None

    def delete(self, plan: str, round: int) -> None:
        """Forgets the secret of a round."""
        self._file(plan, round).unlink(missing_ok=True)

    def rounds(self) -> Iterator[tuple[str, int]]:
        """(plan, round) of every secret that is stored."""
        for file in list(self.folder.iterdir()):
            plan, _, round = file.name.rpartition("-")
            if plan and round.isdecimal():
                yield plan, int(round)

    def _file(self, plan: str, round: int) -> Path:
        return self.folder / f"{plan}-{round}"
