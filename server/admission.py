"""Which replies count. Everything else is rejected by name, counted and reported; the round goes on without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

import numpy as np

from common.adapter import AdapterSpec
from common.errors import AdapterError
from common.messages import Release, SiteDescription, Tensors, adapter_digest, tensor_digest
from common.plan import Plan
from common.sections import PhaseSection
from server.norm_bound import LARGEST_NORM, largest_norm, norm

LEAST_ENTRIES = 32
"""Updates of fewer numbers could be equal by chance once they are rounded for the journey."""


class Rejection(StrEnum):
    """Why a reply does not count."""

    UNREADABLE = "unreadable"
    """Not a message of the agreed form."""
    NODE_ERROR = "node-error"
    """Flower reports an error of the node, or its relay had no answer from the agent."""
    WRONG_SITE = "wrong-site"
    """The reply names another site than the one asked."""
    FOREIGN = "foreign"
    """The reply belongs to another run, plan or request; or a site states other terms than the plan's."""
    STALE = "stale"
    """The reply belongs to another round."""
    DUPLICATE = "duplicate"
    """A second node that speaks for a site, or an update that another site has sent as well, bit for bit."""
    LAYOUT = "layout"
    """Other tensors or shapes than this round trains, or other metrics than the plan asks for."""
    NOT_FINITE = "not-finite"
    """NaN or Inf in the update or a metric."""
    OVERSIZE = "oversize"
    """An update longer than an honest one can be (:mod:`server.norm_bound`), or a metric beyond its bounds."""
    LATE = "late"
    """No reply before the deadline. The site's ε stays spent."""


DEVIATING = frozenset(
    {
        Rejection.UNREADABLE,
        Rejection.WRONG_SITE,
        Rejection.FOREIGN,
        Rejection.STALE,
        Rejection.LAYOUT,
        Rejection.NOT_FINITE,
        Rejection.OVERSIZE,
    }
)
"""Reasons that no honest and working site gives. A late or silent site may be honest, and of two equal updates the one
that counts may be the copy."""


def still_facing(phase: PhaseSection, rejected: Mapping[str, str]) -> PhaseSection:
    """The phase with so many hostile sites as its rule must still withstand: without those that were turned away.

    If at most f sites deviate and r of them were found, at most f - r are among the replies that count. Else a hostile
    site could stop the run by sending what is sure to be rejected.
    """
    found = sum(reason in DEVIATING for reason in rejected.values())
    return phase.model_copy(update={"hostile_sites": max(0, phase.hostile_sites - found)})


def examine(
    reply: Release,
    site: str,
    run_id: str,
    round: int,
    request_digest: str,
    spec: AdapterSpec,
    bounds: Mapping[str, float],
    largest: float = LARGEST_NORM,
) -> Rejection | None:
    """``None`` if the release counts.

    Args:
        spec: layout of exactly the tensors this round trains.
        bounds: largest value of each metric that the plan asks for.
        largest: norm of an honest update.
    """
    if reply.site != site:
        return Rejection.WRONG_SITE
    if reply.run_id != run_id:
        return Rejection.FOREIGN
    if reply.round != round:
        return Rejection.STALE
    if reply.request_digest != request_digest:  # of run, round, plan and adapter
        return Rejection.FOREIGN
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
    return Rejection.OVERSIZE if norm(reply.update) > largest else None


class Gate:
    """What counts in one round of a plan.

    Args:
        adapter: what the round starts from.
        described: what the sites have said of themselves.
        bounds: largest value of each metric that the plan asks for.
    """

    def __init__(
        self,
        plan: Plan,
        round: int,
        adapter: Tensors,
        described: Mapping[str, SiteDescription],
        bounds: Mapping[str, float],
    ) -> None:
        self.plan, self.round, self.described, self.bounds = plan, round, described, bounds
        self._start = norm(adapter)
        self._updates: set[str] = set()

    def verdict(self, reply: Release, site: str, request_digest: str, spec: AdapterSpec) -> Rejection | None:
        """``None`` if the site's release counts; see :func:`examine`."""
        largest = largest_norm(self.plan, self.round, self.described[site], spec, self._start)
        rejection = examine(reply, site, self.plan.run_id, self.round, request_digest, spec, self.bounds, largest)
        return rejection or (Rejection.DUPLICATE if self.is_copy(reply.update) else None)

    def is_copy(self, update: Tensors) -> bool:
        """Whether another site has sent these bits in this round; from now on, this one has.

        Two sites whose updates carry noise of their own do not send the same bits by chance (32 numbers of a few random
        bits each), so one of two equal updates is a copy. Which one cannot be told: the later is turned away. Zeros
        are no copy: they are what a site sends whose numbers have overflowed. Without noise equal data give equal
        updates, so there is none.
        """
        entries = sum(update[name].size for name in update)
        if self.plan.privacy.mechanism == "none" or entries < LEAST_ENTRIES:
            return False
        if not any(bool(update[name].any()) for name in update):
            return False
        digest = adapter_digest({name: tensor_digest(update[name]) for name in update})
        known = digest in self._updates
        self._updates.add(digest)
        return known
