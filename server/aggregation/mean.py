"""The weighted mean of a round's updates, tensor by tensor: Σ w_k Δ_k / Σ w_k.

Folding is bound by memory, so each reply's numbers should be read once and little else moved. Replies wait until there
are ``GROUP`` of them and are then added up block by block: the running sum of a block stays in the processor's cache,
in fp32, and goes into the sum over all groups, in fp64. So a sum is rounded in fp32 at most ``GROUP`` times in a group,
whatever the number of replies; to widen each reply to fp64 first would take twice the time. With secure sums: this is
what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import daxpy, saxpy

from common.adapter import AdapterState
from common.messages import Tensors
from common.sections import PhaseSection
from server.aggregation.base import register_rule

GROUP = 8
"""Replies that are added up together, and so held open at a time."""
BLOCK = 1 << 15
"""Numbers of a block: 128 KiB of running sum, and long stretches of each reply."""


@dataclass
class Sums:
    """Weighted sums of the round so far, and the replies that wait to be added.

    Args:
        block: where a block's running sum is kept; its type is that of the sum within a group. fp64 for sums that are
            compared with others.
    """

    block: npt.NDArray[np.floating[Any]] = field(default_factory=lambda: np.empty(BLOCK))
    totals: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    weight: float = 0.0
    waiting: list[tuple[Tensors, float]] = field(default_factory=list)


@register_rule("mean")
class WeightedMean:
    """Every update counts by its weight, a hostile one too."""

    least = 1

    def __init__(self, phase: PhaseSection) -> None:
        """Has no settings."""

    def empty(self) -> Sums:
        """Nothing yet."""
        return Sums(np.empty(BLOCK, np.float32))

    def add(self, folded: Sums, update: Tensors, weight: float) -> Sums:
        """Adds ``weight · update``, now or together with later ones."""
        if not folded.totals:
            folded.totals = {name: np.zeros(update[name].shape) for name in update}
        folded.waiting.append((update, float(folded.block.dtype.type(weight))))
        if len(folded.waiting) == GROUP:
            _add_up(folded)
        return folded

    def close(self, folded: Sums) -> AdapterState:
        """Sum over weight."""
        _add_up(folded)
        return {name: (total / folded.weight).astype(np.float32) for name, total in folded.totals.items()}


def _add_up(sums: Sums) -> None:
    """Adds what waits to the totals."""
    weights = [weight for _, weight in sums.waiting]
    for name, total in sums.totals.items():
        flat = [np.asarray(update[name], np.float32).reshape(-1) for update, _ in sums.waiting]
        _add_group(total.reshape(-1), flat, weights, sums.block)
    sums.weight += sum(weights)
    sums.waiting = []


def _add_group(
    total: npt.NDArray[np.float64],
    updates: Sequence[npt.NDArray[np.float32]],
    weights: Sequence[float],
    block: npt.NDArray[np.floating[Any]],
) -> None:
    """``total += Σ weights[k] · updates[k]`` in place, all [n]."""
    add = saxpy if block.dtype == np.float32 else daxpy
    for start in range(0, len(total), len(block)):
        end = min(start + len(block), len(total))
        running = block[: end - start]
        running[:] = 0.0
        for update, weight in zip(updates, weights, strict=True):
            add(update[start:end], running, a=weight)
        total[start:end] += running
