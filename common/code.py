"""The digest of the code both sides must share, so that a mix-up of versions is refused instead of guessed at."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over names and contents of ``common/**/*.py`` and ``client/app.py``, wherever they are installed."""
    common = Path(__file__).resolve().parent
    root = common.parent
    files = sorted([*common.rglob("*.py"), root / "client" / "app.py"])
    state = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        state.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
    return state.hexdigest()
