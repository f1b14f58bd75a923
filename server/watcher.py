"""Whoever watches a run: a terminal with progress bars, a sweep, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from common.messages import SiteDescription


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def sites(self, described: Mapping[str, SiteDescription]) -> None:
        """The sites that take part."""
        ...

    def reply(self, round: int, site: str, outcome: str) -> None:
        """One site has answered."""
        ...

    def round(self, record: Mapping[str, Any]) -> None:
        """One round is finished."""
        ...


class Silent:
    """Nobody watches."""

    def sites(self, described: Mapping[str, SiteDescription]) -> None:
        """Ignored."""

    def reply(self, round: int, site: str, outcome: str) -> None:
        """Ignored."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Ignored."""
