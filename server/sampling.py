"""Cohorts, and the sites' weights: pure functions of public values."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np

LARGEST_WEIGHT = 20.0
"""A declared size counts at most so many times the median one, so that no site takes over by declaring a huge size."""


def cohort(sites: Sequence[str], share: float, minimum: int, seed: int, round: int) -> tuple[str, ...]:
    """The sites asked in a round: ⌈share · n⌉ (at least ``minimum``), drawn from the public seed; in name order.

    No privacy amplification is claimed for it: the draw is public.
    """
    ordered = sorted(sites)
    size = min(len(ordered), max(minimum, ceil(share * len(ordered))))
    if size == len(ordered):
        return tuple(ordered)
    digest = hashlib.sha256(f"cohort\0{seed}\0{round}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return tuple(sorted(generator.choice(ordered, size=size, replace=False).tolist()))


def weights(public_sizes: Mapping[str, int], rule: str) -> dict[str, float]:
    """Weight of each site in the average: 1, or its declared public size, capped."""
    if rule == "uniform":
        return dict.fromkeys(public_sizes, 1.0)
    cap = LARGEST_WEIGHT * statistics.median(public_sizes.values())
    return {site: float(min(size, cap)) for site, size in public_sizes.items()}
