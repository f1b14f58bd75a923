"""The explicit, resumable round loop over a Flower ``Grid``.

One round: store the cohort → send → admit replies one by one, each spilled to disk → close at the deadline or when all
have answered → store the admitted set → fold in site-name order → evaluate → checkpoint. Whatever happens in between,
``--resume`` continues with the same cohort, the same replies and the same result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common import number_formats, wire
from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, AdapterState
from common.config import RunConfig
from common.errors import RunFailed, WireError
from common.messages import (
    Pending,
    PlanStatus,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    Tensors,
    joined,
)
from common.plan import Plan
from common.privacy.metrics import metric_bounds
from common.signing import SigningKey
from server import sampling
from server.admission import Gate, Rejection, still_facing
from server.aggregation.base import AVERAGE, rule_for
from server.aggregation.low_rank import leading
from server.aggregation.registry import aggregator_for
from server.aggregation.robust import too_few
from server.calibration import Calibrator
from server.checkpoint import Checkpoint, RunFolder
from server.damping import damped, deviation
from server.evaluation import Evaluator
from server.linear_head import HeldOutFeatures
from server.mailbox import Mailbox
from server.outbox import Asked, Outbox
from server.refinement import Refiner, step_deviations
from server.roster import Roster, reasons
from server.schedule import Schedule
from server.selection import Selection
from server.site_metrics import site_metrics
from server.watcher import Progress, Silent

POLL_SECONDS = 0.1
VALIDATION = "validation"
METRIC_BYTES = 4
"""A metric is one fp32 number, like an entry of a tensor."""


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
    """The kept round's."""
    best_round: int
    history: tuple[dict[str, Any], ...]
    participants: Mapping[str, SiteDescription]
    """Every site that took part, be it in a single round."""
    absent: Mapping[str, str]
    """Sites and nodes that do not take part (any more), with the reason."""


class Coordinator:
    """Runs a plan to its end.

    Args:
        grid: Flower's grid, of a deployment or of a simulation.
        model: the server's own resident model, for evaluation.
        key: signs the plan; a site takes it only from a key that it has pinned.
        garbled: see :class:`server.mailbox.Mailbox`.
        ask_when_sampled: describe the plan to a site when it is sampled first, not to all before round 1. For
            simulations, whose sites are known to be ready.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        plan: Plan,
        model: AdaptedModel,
        evaluator: Evaluator,
        folder: RunFolder,
        key: SigningKey,
        progress: Progress | None = None,
        poll_seconds: float = POLL_SECONDS,
        garbled: tuple[type[Exception], ...] = (),
        ask_when_sampled: bool = False,
    ) -> None:
        self.ask_when_sampled = ask_when_sampled
        self.config, self.plan, self.model = config, plan, model
        self.evaluator, self.folder = evaluator, folder
        self.progress: Progress = progress or Silent()
        self.mailbox = Mailbox(grid, plan.run_id, poll_seconds, garbled)
        self.roster = Roster(self.mailbox, plan, key, folder)
        self.outbox = Outbox(plan, model)
        self.selection = Selection(evaluator, config.evaluation.selection, plan.privacy.mechanism != "none")
        self.schedule = Schedule(plan, config.evaluation, self.selection)
        held_out = HeldOutFeatures(model, evaluator.splits[VALIDATION].examples)
        self.refiner, self.calibrator = Refiner(held_out), Calibrator(held_out)
        self.bounds = metric_bounds(plan.privacy.metrics, model.task.outcomes(model.network))

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self, initial: AdapterState) -> Result:
        """All rounds that are left.

        Raises:
            RunFailed: too few sites, or too few admitted replies in a round.
        """
        checkpoint = self.folder.latest()
        if checkpoint is None:
            checkpoint = self._start(initial)
        else:
            self.folder.tidy(checkpoint)
        if checkpoint.next_round <= self.plan.rounds:
            if self.ask_when_sampled:
                self.roster.trust(self.config.server.min_sites)
            else:
                self.roster.gather(self.config.server.min_sites, self.config.server.round_timeout)
                self.progress.sites(self.roster.described)
        while checkpoint.next_round <= self.plan.rounds:
            self.roster.refresh()
            checkpoint = self._one_round(checkpoint)
        return Result(
            adapter=dict(checkpoint.best),
            best_round=checkpoint.best_round,
            history=checkpoint.history,
            participants=self.roster.described,
            absent=self.roster.absent,
        )

    def _start(self, initial: AdapterState) -> Checkpoint:
        """Evaluates the adapter before round 1 and writes checkpoint 0."""
        started = time.perf_counter()
        measured = self.evaluator.measured(initial, VALIDATION)
        record = {"round": 0, "phase": "base", **measured, "seconds": {"evaluate": _since(started)}}
        phase = self.plan.phase_of(1)
        aggregator = aggregator_for(phase)
        checkpoint = Checkpoint(
            0, 1, phase.name, 0, (record,), aggregator.save(aggregator.init(initial)), dict(initial)
        )
        self.folder.save(checkpoint)
        self.progress.round(record)
        return checkpoint

    def _one_round(self, before: Checkpoint) -> Checkpoint:
        """Runs the round that comes next.

        Its record's ``noise`` is the deviation of the noise in each number of the server's step where the updates are
        averaged. For the robust rules (median, trimmed-mean, multi-krum) it is that of the weighted mean all the same,
        and only approximates theirs.
        """
        round = before.next_round
        phase = self.plan.phase_of(round)
        aggregator = aggregator_for(phase)
        state = aggregator.load(before.aggregator)
        if phase.name != before.phase:  # a new phase starts with a fresh state, from what the last one is kept as
            state = aggregator.init(self._kept(before))
        clock = _Clock()
        outcome = self._exchange(round, _adapter_in(aggregator.save(state)))
        clock.lap("exchange")
        # Of the cohort alone, so that a resumed round weighs as it would have, whoever has come or gone since.
        sizes = {site: self.roster.described[site].public_size for site in outcome.cohort}
        weights = sampling.weights(sizes, self.config.server.weights)
        heard = {site: weights[site] for site in outcome.admitted}
        stepping = damped(still_facing(phase, outcome.rejected), self.roster.described, heard)
        aggregator = aggregator_for(stepping)
        noise = stepping.server_learning_rate * deviation(phase, self.roster.described, heard)
        told: dict[str, dict[str, float]] = {}
        for site in outcome.admitted:
            update, told[site] = self.folder.reply(round, site).parted()
            state = aggregator.accumulate(state, update, weights[site])
        state, adapter = aggregator.finish(state)
        adapter = self.refiner.refined(adapter, phase, [*step_deviations(before.history, phase.name), noise])
        clock.lap("aggregate")
        measured: dict[str, Any] = {"metrics": {}}
        if self.schedule.evaluates(round):
            measured = self.evaluator.measured(adapter, VALIDATION)
            clock.lap("evaluate")
        record = {
            "round": round,
            "phase": phase.name,
            **measured,
            **site_metrics(told, weights, self.roster.described, self.plan.privacy, phase, self.bounds),
            "bytes_down": outcome.bytes_down,
            "bytes_up": outcome.bytes_up,
            "noise": noise,
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

    def _kept(self, last: Checkpoint) -> Tensors:
        """What a new phase starts from after the last round of another: the adapter refined, or averaged, where that
        phase asks for it, and a head that it trained alone calibrated."""
        adapter = _adapter_in(last.aggregator, AVERAGE) or _adapter_in(last.aggregator)
        if last.round == 0:
            return adapter
        phase = self.plan.phase_of(last.round)
        adapter = self.refiner.refined(adapter, phase, step_deviations(last.history, phase.name))
        return self.calibrator.calibrated(adapter, phase)

    def _advance(
        self, before: Checkpoint, record: dict[str, Any], adapter: AdapterState, aggregator: Mapping[str, Any]
    ) -> Checkpoint:
        """The checkpoint after a round: the one to keep so far, and which round comes next."""
        round, phase = int(record["round"]), str(record["phase"])
        history = (*before.history, record)
        kept, kept_round = before.best, before.best_round
        if self.selection.keeps(record, before.history):
            kept, kept_round = adapter, round
        return Checkpoint(round, self.schedule.next_round(history), phase, kept_round, history, aggregator, kept)

    # ---- one exchange -----------------------------------------------------------------------------------------------

    def _exchange(self, round: int, adapter: Tensors) -> Outcome:
        """Sends the round's request to its cohort and closes the round; a round closed before is read from disk."""
        stored = self.folder.outcome(round)
        if stored is not None:
            return Outcome(**{**stored, "cohort": tuple(stored["cohort"])})
        phase = self.plan.phase_of(round)
        least = rule_for(phase).least
        cohort = self.folder.cohort(round)
        if cohort is None:
            server, sites = self.config.server, self.roster.names
            if len(sites) < least:  # before the cohort is settled, so that more sites can join
                raise RunFailed(f"round {round}: {too_few(phase, least, len(sites))} ({reasons(self.roster.absent)})")
            cohort = sampling.cohort(sites, server.cohort, max(server.min_replies, least), self.plan.seed, round)
            self.folder.store_cohort(round, cohort)
        if self.ask_when_sampled:
            self.roster.meet(cohort)
            self.progress.sites(self.roster.described)
        outcome = Outcome(cohort)
        self._collect(round, adapter, outcome)
        outcome.admitted.sort()
        if len(outcome.admitted) < self.config.server.min_replies:
            raise RunFailed(
                f"round {round}: {len(outcome.admitted)} replies were admitted, server.min_replies = "
                f"{self.config.server.min_replies} ({reasons({**outcome.refused, **outcome.rejected})}); "
                "mend the cause, then --resume"
            )
        left = still_facing(phase, outcome.rejected)
        least = rule_for(left).least
        if len(outcome.admitted) < least:  # before the round is closed, so that the missing sites can still answer
            why = reasons({**outcome.refused, **outcome.rejected})
            found = phase.hostile_sites - left.hostile_sites
            raise RunFailed(f"round {round}: {too_few(phase, least, len(outcome.admitted), found)} ({why})")
        self.folder.store_outcome(round, vars(outcome))
        return outcome

    def _collect(self, round: int, adapter: Tensors, outcome: Outcome) -> None:
        """Admits replies one by one as they come; those already on disk are not asked for again."""
        ranks = {site: self.plan.rank_at(self.roster.described[site].max_rank) for site in outcome.cohort}
        at_rank = {rank: self.outbox.asked(round, leading(adapter, rank)) for rank in set(ranks.values())}
        asked = {site: at_rank[rank] for site, rank in ranks.items()}
        gate = Gate(self.plan, round, adapter, self.roster.described, self.bounds)
        on_disk = self.folder.replies(round) & set(outcome.cohort)
        for site in sorted(on_disk):
            self._take_up(round, site, asked[site], gate, outcome)
        online = {site: one.node for site, one in self.roster.participants.items() if site in outcome.cohort}
        sites = {node: site for site, node in online.items() if site not in on_disk}
        for site in set(outcome.cohort) - on_disk - set(sites.values()):
            outcome.rejected[site] = str(Rejection.NODE_ERROR)
        messages = {node: self.outbox.record(site, asked[site]) for node, site in sites.items()}
        outcome.bytes_down += sum(wire.size_of(message) for message in messages.values())
        deadline = time.monotonic() + self.config.server.round_timeout
        again: dict[int, RecordDict] = {}
        asked_again: set[str] = set()
        for node, reply in self.mailbox.ask(messages, wire.TRAIN_TYPE, deadline, self.roster.refresh, again):
            site = sites[node]
            verdict = self._admit(reply, site, asked[site], gate, outcome)
            if verdict == RefusalReason.ADAPTER_MISSING and site not in asked_again:
                asked_again.add(site)
                del outcome.refused[site]
                again[node] = self.outbox.in_full(site, asked[site])
                outcome.bytes_down += wire.size_of(again[node])
                continue
            self.progress.reply(round, site, verdict)
        for site in sites.values():
            if site not in {*outcome.admitted, *outcome.refused, *outcome.rejected}:
                outcome.rejected[site] = str(Rejection.LATE)
                self.progress.reply(round, site, Rejection.LATE)

    def _take_up(self, round: int, site: str, asked: Asked, gate: Gate, outcome: Outcome) -> None:
        """A reply that was admitted before a resumption. It is counted as if its request had gone out in full."""
        outcome.admitted.append(site)
        update, metrics = self.folder.reply(round, site).parted()
        gate.is_copy(update)
        encoded = number_formats.encode(update, self.plan.wire.up)
        outcome.bytes_down += wire.size_of(asked.record({}))
        outcome.bytes_up += wire.size_of_tensors(encoded) + METRIC_BYTES * len(metrics)

    def _admit(self, record: RecordDict | None, site: str, asked: Asked, gate: Gate, outcome: Outcome) -> str:
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
        outcome.bytes_up += wire.size_of(record) + METRIC_BYTES * len(reply.metrics)
        reply = self._decoded(reply, asked.spec)
        rejection = gate.verdict(reply, site, asked.digest, asked.spec)
        if rejection is not None:
            outcome.rejected[site] = str(rejection)
            return rejection
        self.folder.store_reply(asked.request.round, site, asked.digest, joined(reply.update, reply.metrics))
        self.roster.witness(site, reply.head)
        self.outbox.confirm(site, asked)
        outcome.admitted.append(site)
        return "admitted"

    def _decoded(self, release: Release, spec: AdapterSpec) -> Release:
        """The release in fp32; without any tensor where it is not in the plan's number format, so that it is rejected
        for its layout, unless it is the wrong one altogether."""
        try:
            return replace(release, update=number_formats.decode(release.update, spec, self.plan.wire.up))
        except WireError:
            return replace(release, update={})


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


def _adapter_in(arrays: Mapping[str, Any], part: str = "adapter") -> Tensors:
    """The adapter, or the average of adapters, in an aggregator's saved state; empty if there is none."""
    return {name.removeprefix(f"{part}/"): array for name, array in arrays.items() if name.startswith(f"{part}/")}
