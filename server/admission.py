"""Which replies count. Everything else is rejected by name, counted and reported; the round goes on without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

import numpy as np

from common.adapter import AdapterSpec
from common.errors import AdapterError
from common.messages import Release


class Rejection(StrEnum):
    """Why a reply does not count."""

    UNREADABLE = "unreadable"
    """Not a message of the agreed form."""
    NODE_ERROR = "node-error"
    """Flower reports an error of the node, or its relay had no answer from the agent."""
    WRONG_SITE = "wrong-site"
    """The reply names another site than the one asked."""
    STALE = "stale"
    """The reply belongs to another run, round or request."""
    LAYOUT = "layout"
    """Other tensors or shapes than this round trains, or other metrics than the plan asks for."""
    NOT_FINITE = "not-finite"
    """NaN or Inf in the update or a metric."""
    OVERSIZE = "oversize"
    """An update so large that it can only be a fault or an attack, or a metric beyond its bounds."""
    LATE = "late"
    """No reply before the deadline. The site's ε stays spent."""


LARGEST_NORM = 1e6
"""Largest Euclidean norm of an update. Adapters are of norm 1 to 100; beyond this the next round's numbers overflow."""


def examine(
    reply: Release,
    site: str,
    run_id: str,
    round: int,
    request_digest: str,
    spec: AdapterSpec,
    bounds: Mapping[str, float],
) -> Rejection | None:
    """``None`` if the release counts.

    Args:
        spec: layout of exactly the tensors this round trains.
        bounds: largest value of each metric that the plan asks for.
    """
    if reply.site != site:
        return Rejection.WRONG_SITE
    if (reply.run_id, reply.round, reply.request_digest) != (run_id, round, request_digest):
        return Rejection.STALE
    try:
        spec.check(reply.update, "reply")
    except AdapterError:
        return Rejection.LAYOUT
    if reply.metrics.keys() != bounds.keys():
        return Rejection.LAYOUT
    if not all(math.isfinite(value) for value in reply.metrics.values()):
        return Rejection.NOT_FINITE
    if not all(0 <= value <= np.float32(bounds[name]) for name, value in reply.metrics.items()):
        return Rejection.OVERSIZE
    if not all(bool(np.isfinite(array).all()) for array in reply.update.values()):
        return Rejection.NOT_FINITE
    if sum(float(np.square(array, dtype=np.float64).sum()) for array in reply.update.values()) > LARGEST_NORM**2:
        return Rejection.OVERSIZE
    return None
