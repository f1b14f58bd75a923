"""The explicit, resumable round loop over a Flower ``Grid``.

One round: store the cohort → send → admit replies one by one, each spilled to disk → close at the deadline or when all
have answered → store the admitted set → fold in site-name order → evaluate → checkpoint. Whatever happens in between,
``--resume`` continues with the same cohort, the same replies and the same result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common import wire
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.config import RunConfig
from common.errors import RunFailed, WireError
from common.messages import (
    DescribeRequest,
    Pending,
    PlanStatus,
    Refusal,
    Release,
    SiteDescription,
    Tensors,
    TrainRequest,
)
from common.plan import Plan
from server import sampling
from server.admission import Rejection, examine
from server.aggregation.registry import aggregator_for
from server.checkpoint import Checkpoint, RunFolder
from server.evaluation import Evaluator

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
VALIDATION = "validation"


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


@dataclass(frozen=True)
class Participant:
    """A site that takes part, and the Flower node it is behind in this submission."""

    node: int
    description: SiteDescription


@dataclass
class Outcome:
    """What one round's exchange brought."""

    cohort: tuple[str, ...]
    admitted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Result:
    """A finished run."""

    adapter: AdapterState
    """The best round's."""
    best_round: int
    history: tuple[dict[str, Any], ...]
    participants: Mapping[str, SiteDescription]
    absent: Mapping[str, str]
    """Sites that were described and do not take part, with the reason."""


class Coordinator:
    """Runs a plan to its end.

    Args:
        grid: Flower's grid, of a deployment or of a simulation.
        model: the server's own resident model, for evaluation.
        code_digest: of the server's installation; a site with another one refuses.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        plan: Plan,
        model: AdaptedModel,
        evaluator: Evaluator,
        folder: RunFolder,
        code_digest: str,
        progress: Progress | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.grid, self.config, self.plan, self.model = grid, config, plan, model
        self.evaluator, self.folder, self.code_digest = evaluator, folder, code_digest
        self.progress: Progress = progress or Silent()
        self.poll_seconds = poll_seconds
        self.participants: dict[str, Participant] = {}
        self.absent: dict[str, str] = {}

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self, initial: AdapterState) -> Result:
        """All rounds that are left.

        Raises:
            RunFailed: too few sites, or too few admitted replies in a round.
        """
        checkpoint = self.folder.latest() or self._start(initial)
        if checkpoint.next_round <= self.plan.rounds:
            self._gather()
        while checkpoint.next_round <= self.plan.rounds:
            checkpoint = self._one_round(checkpoint)
        return Result(
            adapter=dict(checkpoint.best),
            best_round=checkpoint.best_round,
            history=checkpoint.history,
            participants={site: one.description for site, one in self.participants.items()},
            absent=self.absent,
        )

    def _start(self, initial: AdapterState) -> Checkpoint:
        """Evaluates the adapter before round 1 and writes checkpoint 0."""
        started = time.perf_counter()
        metrics = self.evaluator.evaluate(initial, VALIDATION)
        record = {"round": 0, "phase": "base", "metrics": metrics, "seconds": {"evaluate": _since(started)}}
        phase = self.plan.phase_of(1)
        aggregator = aggregator_for(phase)
        checkpoint = Checkpoint(
            0, 1, phase.name, 0, (record,), aggregator.save(aggregator.init(initial)), dict(initial)
        )
        self.folder.save(checkpoint)
        self.progress.round(record)
        return checkpoint

    def _one_round(self, before: Checkpoint) -> Checkpoint:
        round = before.next_round
        phase = self.plan.phase_of(round)
        aggregator = aggregator_for(phase)
        state = aggregator.load(before.aggregator)
        if phase.name != before.phase:  # a new phase starts with a fresh state and keeps the adapter
            state = aggregator.init(_adapter_in(before.aggregator))
        request = TrainRequest(self.plan.run_id, round, self.plan.digest(), _adapter_in(aggregator.save(state)))
        clock = _Clock()
        outcome = self._exchange(request)
        clock.lap("exchange")
        weights = sampling.weights(
            {site: one.description.public_size for site, one in self.participants.items()}, self.config.server.weights
        )
        for site in outcome.admitted:
            state = aggregator.accumulate(state, self.folder.reply(round, site), weights[site])
        state, adapter = aggregator.finish(state)
        clock.lap("aggregate")
        metrics = self.evaluator.evaluate(adapter, VALIDATION)
        clock.lap("evaluate")
        record = {
            "round": round,
            "phase": phase.name,
            "metrics": metrics,
            "bytes_down": outcome.bytes_down,
            "bytes_up": outcome.bytes_up,
            "seconds": clock.laps,
            "cohort": list(outcome.cohort),
            "admitted": outcome.admitted,
            "refused": outcome.refused,
            "rejected": outcome.rejected,
        }
        after = self._advance(before, record, adapter, aggregator.save(state))
        self.folder.save(after)
        self.progress.round(record)
        return after

    def _advance(
        self, before: Checkpoint, record: dict[str, Any], adapter: AdapterState, aggregator: Mapping[str, Any]
    ) -> Checkpoint:
        """The checkpoint after a round: best so far, and which round comes next."""
        round, phase = int(record["round"]), str(record["phase"])
        history = (*before.history, record)
        values = {entry["round"]: _metric(entry, self.evaluator.metric) for entry in history}
        best, best_round = before.best, before.best_round
        if self.evaluator.better(values[round], values[best_round]):
            best, best_round = adapter, round
        return Checkpoint(
            round, self._next_round(round, phase, best_round, history), phase, best_round, history, aggregator, best
        )

    def _next_round(self, round: int, phase: str, best_round: int, history: tuple[dict[str, Any], ...]) -> int:
        """Early stopping ends a phase, not the run: the next phase starts. Spent ε is not refunded."""
        patience = self.config.evaluation.patience
        rounds_here = [entry["round"] for entry in history if entry["phase"] == phase]
        if patience is None or len(rounds_here) < patience or best_round > round - patience:
            return round + 1
        following = round + 1
        while following <= self.plan.rounds and self.plan.phase_of(following).name == phase:
            following += 1
        log.info("phase '%s' stopped early after round %d", phase, round)
        return following

    # ---- who takes part ---------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Describes the plan to every node until ``min_sites`` are ready, or the round timeout has passed."""
        deadline = time.monotonic() + self.config.server.round_timeout
        asked: set[int] = set()
        while True:
            fresh = [node for node in sorted(self.grid.get_node_ids()) if node not in asked]
            asked.update(self._describe(fresh, deadline))
            waiting = [site for site, reason in self.absent.items() if reason == PlanStatus.WAITING]
            if len(self.participants) >= self.config.server.min_sites:
                break
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"server.min_sites = {self.config.server.min_sites}: only {len(self.participants)} sites are ready "
                    f"({_reasons(self.absent)}); start the missing sites or approve the plan there, then --resume"
                )
            if waiting:
                asked -= {node for node in asked if node not in {one.node for one in self.participants.values()}}
            time.sleep(self.poll_seconds * 5)
        self.progress.sites({site: one.description for site, one in self.participants.items()})

    def _describe(self, nodes: Iterable[int], deadline: float) -> set[int]:
        """Asks the nodes; returns those that answered."""
        request = DescribeRequest(self.plan.run_id, self.plan.canonical(), self.code_digest)
        record = wire.describe_request_to_record(request)
        messages = dict.fromkeys(nodes, record)
        answered = set()
        for node, reply in self._ask(messages, wire.DESCRIBE_TYPE, deadline):
            if reply is None or wire.is_unavailable(reply):
                self.absent[f"node-{node}"] = str(Rejection.NODE_ERROR)
                continue
            self.absent.pop(f"node-{node}", None)
            answered.add(node)
            try:
                self._enrol(node, wire.description_from_record(reply))
            except WireError as error:
                self.absent[f"node-{node}"] = str(Rejection.UNREADABLE)
                log.warning("node %d: %s", node, error)
        return answered

    def _enrol(self, node: int, description: SiteDescription) -> None:
        site = description.site
        if site in self.participants and self.participants[site].node != node:
            self.absent[f"{site} (node {node})"] = "duplicate-name"
            log.warning("two nodes call themselves '%s'; the second is left out", site)
        elif description.status is PlanStatus.READY:
            self.absent.pop(site, None)
            self.participants[site] = Participant(node, description)
        else:
            self.absent[site] = str(description.refusal or description.status)

    # ---- one exchange -----------------------------------------------------------------------------------------------

    def _exchange(self, request: TrainRequest) -> Outcome:
        """Sends the round's request to its cohort and closes the round; a round closed before is read from disk."""
        stored = self.folder.outcome(request.round)
        if stored is not None:
            return Outcome(**{**stored, "cohort": tuple(stored["cohort"])})
        cohort = self.folder.cohort(request.round)
        if cohort is None:
            server = self.config.server
            cohort = sampling.cohort(
                list(self.participants), server.cohort, server.min_replies, self.plan.seed, request.round
            )
            self.folder.store_cohort(request.round, cohort)
        outcome = Outcome(cohort)
        self._collect(request, outcome)
        outcome.admitted.sort()
        if len(outcome.admitted) < self.config.server.min_replies:
            raise RunFailed(
                f"round {request.round}: {len(outcome.admitted)} replies were admitted, server.min_replies = "
                f"{self.config.server.min_replies} ({_reasons({**outcome.refused, **outcome.rejected})}); "
                "mend the cause, then --resume"
            )
        self.folder.store_outcome(request.round, vars(outcome))
        return outcome

    def _collect(self, request: TrainRequest, outcome: Outcome) -> None:
        """Admits replies one by one as they come; those already on disk are not asked for again."""
        digest = request.digest()
        spec = self.model.spec.part(self.model.trained_in(self.plan.phase_of(request.round), request.round))
        record = wire.train_request_to_record(request)
        size = wire.payload_bytes(record)
        on_disk = self.folder.replies(request.round) & set(outcome.cohort)
        outcome.admitted.extend(on_disk)
        outcome.bytes_down += size * len(outcome.cohort)
        outcome.bytes_up += sum(_size(self.folder.reply(request.round, site)) for site in on_disk)
        sites = {self.participants[s].node: s for s in outcome.cohort if s not in on_disk and s in self.participants}
        for site in set(outcome.cohort) - on_disk - set(sites.values()):
            outcome.rejected[site] = str(Rejection.NODE_ERROR)
        deadline = time.monotonic() + self.config.server.round_timeout
        for node, reply in self._ask(dict.fromkeys(sites, record), wire.TRAIN_TYPE, deadline):
            verdict = self._admit(reply, sites[node], request, digest, spec, outcome)
            self.progress.reply(request.round, sites[node], verdict)
        for site in sites.values():
            if site not in {*outcome.admitted, *outcome.refused, *outcome.rejected}:
                outcome.rejected[site] = str(Rejection.LATE)
                self.progress.reply(request.round, site, Rejection.LATE)

    def _admit(
        self, record: RecordDict | None, site: str, request: TrainRequest, digest: str, spec: Any, outcome: Outcome
    ) -> str:
        """Files one reply under admitted, refused or rejected; returns the verdict."""
        if record is None:
            outcome.rejected[site] = str(Rejection.NODE_ERROR)
            return Rejection.NODE_ERROR
        try:
            reply = wire.train_reply_from_record(record)
        except WireError:
            outcome.rejected[site] = str(Rejection.UNREADABLE)
            return Rejection.UNREADABLE
        if isinstance(reply, Refusal | Pending):
            outcome.refused[site] = str(reply.reason) if isinstance(reply, Refusal) else str(PlanStatus.WAITING)
            return outcome.refused[site]
        if not isinstance(reply, Release):
            outcome.rejected[site] = str(Rejection.NODE_ERROR)
            return Rejection.NODE_ERROR
        rejection = examine(reply, site, request.run_id, request.round, digest, spec)
        outcome.bytes_up += _size(reply.update)
        if rejection is not None:
            outcome.rejected[site] = str(rejection)
            return rejection
        self.folder.store_reply(request.round, site, digest, reply.update)
        outcome.admitted.append(site)
        return "admitted"

    def _ask(
        self, contents: Mapping[int, RecordDict], message_type: str, deadline: float
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Sends one message to each node and yields each reply as it comes; ``None`` for a node's error."""
        lifetime = max(1.0, deadline - time.monotonic())
        messages = [
            self.grid.create_message(content, message_type, node, group_id=self.plan.run_id, ttl=lifetime)
            for node, content in contents.items()
        ]
        waiting = {
            identity: node
            for identity, node in zip(self.grid.push_messages(messages), contents, strict=True)
            if identity
        }
        for node in set(contents) - set(waiting.values()):
            yield node, None
        while waiting and time.monotonic() < deadline:
            for reply in list(self.grid.pull_messages(list(waiting))):
                identity = reply.metadata.reply_to_message_id
                if identity in waiting:
                    yield waiting.pop(identity), reply.content if reply.has_content() else None
            if waiting:
                time.sleep(self.poll_seconds)


class _Clock:
    """Seconds of each part of a round."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        self.laps[name] = _since(self._last)
        self._last = time.perf_counter()


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 4)


def _adapter_in(arrays: Mapping[str, Any]) -> Tensors:
    """The adapter in an aggregator's saved state."""
    return {name.removeprefix("adapter/"): array for name, array in arrays.items() if name.startswith("adapter/")}


def _size(tensors: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _metric(record: Mapping[str, Any], metric: str) -> float:
    value = record["metrics"].get(metric)
    return float("nan") if value is None else float(value)


def _reasons(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{site}: {reason}" for site, reason in sorted(reasons.items())) or "no site answered"
