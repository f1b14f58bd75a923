"""What each site is asked in a round: to each only what it lacks, in the plan's number format.

What a site holds is known from its admitted releases, and kept in memory alone: after a resumption everybody is asked
in full once, and a site that has started anew since says that something is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common import wire
from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, rank_of
from common.messages import Tensors
from common.plan import Plan
from common.requests import RoundRequest


@dataclass(frozen=True)
class Asked:
    """A round's request to the sites of one rank, and what their replies must be."""

    request: RoundRequest
    digest: str
    spec: AdapterSpec
    """Of exactly the tensors that the round trains."""
    _records: dict[frozenset[str], wire.Record] = field(default_factory=dict)

    def record(self, held: Mapping[str, str]) -> wire.Record:
        """The message to a site that holds tensors of these digests; made once for all that lack the same."""
        request = self.request.to(held)
        names = frozenset(request.adapter)
        if names not in self._records:
            self._records[names] = wire.train_request_to_record(request)
        return self._records[names]


class Outbox:
    """The requests of one run."""

    def __init__(self, plan: Plan, model: AdaptedModel) -> None:
        self.plan, self.model = plan, model
        self._held: dict[str, Mapping[str, str]] = {}

    def asked(self, round: int, adapter: Tensors) -> Asked:
        """What is asked of the sites of the adapter's rank."""
        request = RoundRequest.of(self.plan, self.model, round, adapter)
        trained = self.model.trained_in(self.plan.phase_of(round), self.plan.round_of_phase(round))
        spec = self.model.spec.at_rank(rank_of(adapter) or self.plan.lora.r).part(trained)
        return Asked(request, request.digest(), spec)

    def record(self, site: str, asked: Asked) -> wire.Record:
        """The message to a site, without what it is known to hold."""
        return asked.record(self._held.get(site, {}))

    def in_full(self, site: str, asked: Asked) -> wire.Record:
        """The message to a site that does not hold what it was taken to hold."""
        self._held.pop(site, None)
        return asked.record({})

    def confirm(self, site: str, asked: Asked) -> None:
        """The site has answered, so it holds what the round has left as it was."""
        self._held[site] = asked.request.confirmed
