"""Runs that are stopped on purpose after a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.watcher import Silent


class Stopped(Exception):
    """The coordinator was stopped after a round."""


class StopsAfter(Silent):
    """Stops a run after a round; ``None``: never."""

    def __init__(self, last: int | None) -> None:
        self.last = last

    def round(self, record: Mapping[str, Any]) -> None:
        """The round in question ends the run."""
        if record["round"] == self.last:
            raise Stopped
