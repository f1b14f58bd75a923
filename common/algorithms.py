"""What an aggregation algorithm asks of the sites: how A starts, and which of A and B a site trains.

Both sides must agree on this, so it lives here; how replies are folded is the server's (``server/aggregation/``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Matrix = Literal["A", "B"]


@dataclass(frozen=True)
class LocalRule:
    """One algorithm's local side."""

    orthonormal_a: bool
    """Whether A starts with orthonormal rows from the public seed."""
    trains: Callable[[int], tuple[Matrix, ...]]
    """Round (from 1) → matrices a site trains in it."""


LOCAL_RULES: dict[str, LocalRule] = {
    # Zhang et al. 2023, arXiv 2305.05644: sites train both matrices, the server averages each.
    "fedit": LocalRule(orthonormal_a=False, trains=lambda round: ("A", "B")),
    # Sun et al. 2024, arXiv 2403.12313: A is frozen, so the mean of BA is exactly the mean of B times A.
    "ffa": LocalRule(orthonormal_a=True, trains=lambda round: ("B",)),
}
