"""A site is killed at a place, comes back, and is asked the same again: what was on its disk, and what it answered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from mortal_sites import KILLED, MortalSite
from site_books import Books, Tensors, payload_of

from common.messages import PlanStatus

RUN, ROUNDS = "run", (1, 2, 3)
FIRST, SECOND = "first", "second"
"""What the secrets of the killed process are derived from, and those of the one that comes after it."""
AT_REST = {"agent.lock", "audit.jsonl", "audit.jsonl.head", "cache", "ledger.sqlite", "secrets", "site.key"}
"""What lies in a site's state once its agent has ended in order."""
Foreseen = Mapping[tuple[str, int], Tensors]
"""(origin of the secrets, round) → the release of a site that nobody kills."""


@dataclass(frozen=True)
class Comeback:
    """What became of a kill.

    Attributes:
        found: on the disk, right after it.
        left: on the disk, once all rounds are released and the agent has ended in order.
        serves: seconds from the start of the next process until it serves.
        answers: and until the coordinator has the release of the round.
    """

    found: Books
    left: Books
    serves: float
    answers: float


def foresee(site: MortalSite, entropy: str) -> dict[tuple[str, int], Tensors]:
    """The releases of a site that nobody kills, with these secrets."""
    plan = site.plan(RUN)
    with site.serving(entropy=entropy):
        site.describe(plan)
        return {(entropy, round): payload_of(site.release(plan, round)) for round in ROUNDS}


def come_back(site: MortalSite, point: str, foreseen: Foreseen) -> Comeback:
    """Kills the site's agent at a point of its first round, starts another, and asks for all rounds.

    Raises:
        AssertionError: something is not as it must be.
    """
    plan = site.plan(RUN)
    life = site.agent(point=point, entropy=FIRST)
    if life.code is None and site.describe(plan) is not None:
        assert site.train(plan) is None
    assert life.end() == KILLED, f"was never at the point:\n{life.log}"
    found = site.books()

    started = time.perf_counter()
    with site.serving(entropy=SECOND) as life:
        serves = time.perf_counter() - started
        described = site.describe(plan, witness=newest_head(site))
        assert described is not None and described.status is PlanStatus.READY, described
        release = site.release(plan)
        answers = time.perf_counter() - started
        assert payload_of(release) == foreseen[FIRST if (RUN, 1) in found.charged else SECOND, 1]
        for round in ROUNDS[1:]:
            assert payload_of(site.release(plan, round)) == foreseen[SECOND, round]
        again = site.release(plan)
        assert again.head == release.head
        described = site.describe(plan, witness=newest_head(site))
        assert described is not None and described.status is PlanStatus.READY
    left = site.books(killed=False)
    assert sorted(left.charged) == sorted(left.stored) == [(RUN, round) for round in ROUNDS]
    assert left.sequence == 1 + 2 * len(ROUNDS), "something was decided or charged twice"
    assert not left.secrets
    assert {file.name for file in site.state.iterdir()} == AT_REST
    return Comeback(found, left, serves, answers)


def newest_head(site: MortalSite) -> str:
    """What the coordinator shows the site: the last head it has seen."""
    releases = list(site.auditor.received.values())
    return releases[-1].head if releases else ""
