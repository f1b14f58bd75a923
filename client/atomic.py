"""A small file that is there whole, or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from client.durable import sync_folder


def put(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Stores the content in the place of whatever is there, durably.

    Raises:
        OSError: it cannot be stored.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_folder(path.parent)
