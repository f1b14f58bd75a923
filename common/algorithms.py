"""What an aggregation algorithm asks of the sites: how A starts, and which of A and B a site trains when.

Both sides must agree on this, so it lives here; how replies are folded is the server's (``server/aggregation/``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Matrix = Literal["A", "B"]


def _both(index: int) -> tuple[Matrix, ...]:
    return ("A", "B")


def _only_b(index: int) -> tuple[Matrix, ...]:
    return ("B",)


def _in_turn(index: int) -> tuple[Matrix, ...]:
    """B first: while B is zero, the gradient of A is."""
    return ("B",) if index % 2 else ("A",)


@dataclass(frozen=True)
class LocalRule:
    """One algorithm's local side."""

    orthonormal_a: bool
    """Whether A starts with orthonormal rows from the public seed."""
    trains: Callable[[int], tuple[Matrix, ...]]
    """Round of the phase (from 1) → matrices that a site trains and releases in it."""
    moves_in_step: Callable[[int], tuple[Matrix, ...]] = _both
    """Local step of the round (from 1) → which of the trained matrices this step moves."""
    server_moves: tuple[Matrix, ...] = ()
    """Matrices that the server changes beyond what sites train."""
    own_rank: bool = False
    """Whether a site may train at a smaller rank than the plan's."""

    def moves(self, group: str, step: int) -> bool:
        """Whether a local step of the round, from 1, moves a trained tensor of the group; all but A and B always."""
        return group not in ("A", "B") or group in self.moves_in_step(step)


LOCAL_RULES: dict[str, LocalRule] = {
    # Zhang et al. 2023, arXiv 2305.05644: sites train both matrices, the server averages each.
    "fedit": LocalRule(orthonormal_a=False, trains=_both),
    # Sun et al. 2024, arXiv 2403.12313: A is frozen, so the mean of BA is exactly the mean of B times A.
    "ffa": LocalRule(orthonormal_a=True, trains=_only_b),
    # Lee et al. 2025, arXiv 2505.12805: sites train B; the server takes A anew from the SVD of BA.
    "fedsvd": LocalRule(orthonormal_a=True, trains=_only_b, server_moves=("A",)),
    # Chen et al. 2025, arXiv 2502.01755: B and A in turn, round by round.
    "rolora": LocalRule(orthonormal_a=True, trains=_in_turn),
    # Liu et al. 2026, arXiv 2602.19926: B and A in turn, step by step, with the noised gradient smoothed.
    "la-lora": LocalRule(orthonormal_a=True, trains=_both, moves_in_step=_in_turn),
    # Bai et al. 2024, arXiv 2402.11505: sites of different rank; the mean of BA is cut to each site's rank again.
    "flexlora": LocalRule(orthonormal_a=False, trains=_both, own_rank=True),
    # Singhal et al. 2024, arXiv 2410.09432: FedIT, and the residual mean(BA) - mean(B)mean(A) beside it.
    "fedex": LocalRule(orthonormal_a=False, trains=_both),
}
