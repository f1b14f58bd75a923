"""Reads what finished runs and sweeps have left in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import OutputError


def read_record(file: Path, *needed: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        needed: entries without which it is of no use.

    Raises:
        OutputError: it cannot be read, is no such object, or lacks an entry.
    """
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise OutputError(f"{file}: cannot be read; restore it from a copy") from None
    if missing := [name for name in needed if name not in record]:
        raise OutputError(f"{file}: is damaged ('{missing[0]}' is missing); restore it from a copy")
    return record
