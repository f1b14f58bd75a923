"""What a site does with a request, readable from top to bottom.

``train``: check plan and policy → reserve the round in the ledger → train under the privacy mechanism → release through
the egress gate → record. Nothing that depends on the data decides whether a reply comes, which kind, or how large.

A simulation may train several sites at once. It asks each to ``begin``, trains the rounds of all that have reserved one
together (:mod:`simulations.together`), and lets each ``finish``: the same checks, and the same records.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from client import egress
from client.audit_head import Head
from client.audit_log import AuditLog
from client.policy import Policy
from client.privacy.budget import state_privacy
from client.privacy.ledger import Decision, Ledger, PlanEntry, Reservation, StoredRelease
from client.privacy.mechanism import PrivacyMechanism, mechanism_for
from client.privacy.row_independence import Probed
from client.privacy.sampling import RoundSecret
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, AdapterState
from common.errors import LedgerError, ModelError, PrivacyError, WireError
from common.examples import Examples
from common.messages import DescribeRequest, RefusalReason, SiteDescription, TrainReply, TrainRequest
from common.plan import Plan, read_plan
from common.privacy.metrics import metric_bounds
from common.requests import NOTHING, Held, Received, kept_after, moved_by_server, received
from common.sections import EXAMPLE, PhaseSection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What a site trains with."""

    model: Callable[[Plan], AdaptedModel]
    """The resident base model with the plan's adapter attached."""
    examples: Callable[[Plan, AdaptedModel], Examples]
    """The plan's data, encoded once."""
    physical_batch: int | None = None
    """Rows of one forward and backward pass; ``None``: what the model's device asks for."""
    fingerprint: Callable[[Plan], str] = lambda plan: ""
    """Changes when the plan's data change. Never leaves the site."""
    probed: Probed = field(default_factory=Probed)
    """What is known of the resident models' rows; sites of one simulation share it."""


@dataclass(frozen=True)
class Work:
    """A round that is reserved and has to be trained."""

    plan: Plan
    request: TrainRequest
    digest: str
    """Of the request."""
    model: AdaptedModel
    adapter: Received
    spec: AdapterSpec
    """Of the adapter, at the site's rank."""
    names: tuple[str, ...]
    """The tensors that are trained and released."""
    examples: Examples
    rows: int
    """Of a physical batch."""
    reservation: Reservation
    public_size: int

    @property
    def phase(self) -> PhaseSection:
        """The round's phase."""
        return self.plan.phase_of(self.request.round)

    def mechanism(self) -> PrivacyMechanism:
        """A fresh one; whoever trains the round, and however often, draws the same from its secret."""
        reservation = self.reservation
        return mechanism_for(self.plan.privacy, reservation.phase, self.public_size, reservation.secret)


class Site:
    """One institution. Implements :class:`common.messages.SiteService`; the agent serves it, a simulation calls it."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        ledger: Ledger,
        audit: AuditLog,
        resources: Resources,
        code_digest: str,
        fixed_seed: int | None = None,
        claims_epsilon: bool = True,
    ) -> None:
        self.name, self.policy, self.ledger, self.audit = name, policy, ledger, audit
        self.resources, self.code_digest = resources, code_digest
        self.fixed_seed, self.claims_epsilon = fixed_seed, claims_epsilon
        self._one_at_a_time = threading.Lock()
        self._refused: set[tuple[str, int, RefusalReason]] = set()
        self._held: dict[str, Held] = {}
        for population in policy.populations.values():
            ledger.declare(population)
        for data, name in policy.data.items():
            ledger.bind_data(data, name)

    # ---- describe: is this plan welcome? -----------------------------------------------------------------------

    def describe(self, request: DescribeRequest) -> SiteDescription:
        """Shows the plan to the policy (and to a person, if it says so); answers with the public description."""
        with self._one_at_a_time:
            self._close_expired()
            entry = self._consider(request)
        section = self.policy.section
        return egress.description(
            self.name,
            entry,
            self.code_digest,
            section.tasks,
            section.max_rank,
            self._public_size(request),
            fixed_keys=not self.claims_epsilon,
        )

    def _consider(self, request: DescribeRequest) -> PlanEntry | RefusalReason:
        if request.code_digest != self.code_digest:
            log.warning("the relay was shipped with other code than this agent runs; install the coordinator's version")
            return RefusalReason.CODE_MISMATCH
        self._heed(request.witness)
        if self.ledger.blocked:
            return RefusalReason.BLOCKED
        try:
            plan = read_plan(request.plan)
        except WireError:
            return RefusalReason.UNKNOWN_PLAN
        digest = plan.digest()
        if not self.policy.signed(digest, request.signature):
            log.warning("plan %s is not signed by a key of policy.coordinator_keys", digest[:12])
            return RefusalReason.SIGNATURE
        if plan.code_digest != self.code_digest:
            return RefusalReason.CODE_MISMATCH
        bound = self.ledger.plan_of_run(request.run_id)
        if plan.run_id != request.run_id or (bound is not None and bound.digest != digest):
            return RefusalReason.PLAN_CHANGED
        if bound is None:
            self._receive(plan, digest, request.signature)
        entry = self.ledger.plan(digest)
        assert entry is not None
        if entry.decision is Decision.WAITING and self.policy.section.approval == "automatic":
            if entry.statement is not None and self.policy.too_quiet(entry.statement):
                return RefusalReason.POLICY
            return self.policy.refusal(plan) or self._approve(entry)
        return entry

    def _heed(self, witness: str) -> None:
        """Stops the site for good if somebody shows a head of its own audit log that the log does not hold."""
        if not witness or self.ledger.blocked:
            return
        try:
            head = Head.parse(witness)
        except LedgerError:
            return  # a stranger's nonsense; what is wrong with the log itself is raised
        if self.audit.contradicts(head):
            self.ledger.block("a signed head of the audit log was shown that this log does not hold")
            self.audit.append("site blocked", why="a head was shown that this log does not hold")

    def _close_expired(self) -> None:
        for digest in self.ledger.expire(self.policy.section.plan_days):
            self.audit.append("plan closed", plan=digest, why="expired")

    def _public_size(self, request: DescribeRequest) -> int:
        """Of the population that the plan is charged to."""
        try:
            return self.policy.population_of(read_plan(request.plan)).public_size
        except WireError:
            return next(iter(self.policy.populations.values())).public_size

    def _receive(self, plan: Plan, digest: str, signature: str) -> None:
        """Policy first, then the calibrated cost, then the decision. Looks at no data."""
        refusal = self.policy.refusal(plan)
        population = self.policy.population_of(plan)
        statement = None
        if refusal is None:
            try:
                statement = state_privacy(plan, population.public_size)
            except PrivacyError:
                refusal = RefusalReason.POLICY
            else:
                refusal = RefusalReason.POLICY if self.policy.too_quiet(statement) else None
        self.ledger.receive(
            digest, plan.run_id, plan.canonical(), population.name, statement, refusal, signature=signature
        )
        self.audit.append("plan received", run=plan.run_id, plan=digest, refusal=refusal)

    def _approve(self, entry: PlanEntry) -> PlanEntry:
        """Charges the plan's whole cost, or refuses it, without a person."""
        decision = self.ledger.approve(entry.digest)
        self.audit.append("plan decided", run=entry.run_id, plan=entry.digest, decision=decision, by="policy")
        decided = self.ledger.plan(entry.digest)
        assert decided is not None
        return decided

    # ---- train: one round ---------------------------------------------------------------------------------------

    def train(self, request: TrainRequest) -> TrainReply:
        """One round: the stored release if there is one, else reserve, train, release, record."""
        with self.answering():
            begun = self.begin(request)
            return self.finish(begun, *self.trained(begun)) if isinstance(begun, Work) else begun

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a training request is answered, which is one at a time.

        Every answer waits until ``policy.reply_after``, and so does whatever else is asked meanwhile: an answer that
        waited for the end of training alone would tell when that was.
        """
        with self._one_at_a_time:
            earliest = time.monotonic() + self.policy.section.reply_after
            try:
                yield
            finally:
                time.sleep(max(0.0, earliest - time.monotonic()))

    def begin(self, request: TrainRequest) -> TrainReply | Work:
        """The reply, if it is settled already; else all that training needs. Within ``answering``."""
        self._close_expired()
        if self.ledger.blocked:
            return egress.refuse(self.name, RefusalReason.BLOCKED)
        entry = self.ledger.plan(request.plan_digest)
        if entry is None or entry.run_id != request.run_id:
            return egress.refuse(self.name, RefusalReason.UNKNOWN_PLAN)
        if entry.decision is Decision.WAITING:
            return egress.pending(self.name)
        if entry.decision in (Decision.REFUSED, Decision.CLOSED):
            return egress.refuse(self.name, entry.refusal or RefusalReason.POLICY)
        outcome = self._reserved(read_plan(entry.body), request)
        if isinstance(outcome, RefusalReason):
            self._record_refusal(entry, request, outcome)
            return egress.refuse(self.name, outcome)
        return outcome if isinstance(outcome, Work) else egress.reply(self.name, request, request.digest(), outcome)

    def _record_refusal(self, entry: PlanEntry, request: TrainRequest, reason: RefusalReason) -> None:
        """Once for each plan, reason and round it has: who asks again and again does not fill the disk."""
        round = request.round if 1 <= request.round <= read_plan(entry.body).rounds else 0
        if (entry.digest, round, reason) not in self._refused:
            self._refused.add((entry.digest, round, reason))
            self.audit.append("round refused", run=entry.run_id, round=request.round, reason=reason)

    def _reserved(self, plan: Plan, request: TrainRequest) -> Work | StoredRelease | RefusalReason:
        if not 1 <= request.round <= plan.rounds:
            return RefusalReason.OUT_OF_ORDER
        digest = request.digest()
        stored = self.ledger.release(request.plan_digest, request.round, digest)
        if stored is not None:
            return stored
        model = self.resources.model(plan)
        spec = model.spec.at_rank(plan.rank_at(self.policy.section.max_rank))
        if model.spec.at_rank(plan.lora.r).digest() != plan.adapter_digest:
            return RefusalReason.ADAPTER_LAYOUT
        try:
            adapter = received(plan, model, spec, request, self._held.get(request.plan_digest, NOTHING))
        except WireError:
            return RefusalReason.ADAPTER_LAYOUT
        if adapter is None:
            return RefusalReason.ADAPTER_MISSING
        phase = plan.phase_of(request.round)
        try:
            names = model.trained_in(phase, plan.round_of_phase(request.round))
        except ModelError:
            return RefusalReason.MODEL
        if not self.ledger.same_data(request.plan_digest, self.resources.fingerprint(plan)):
            self.ledger.close_plan(request.plan_digest, "its data were changed")
            self.audit.append("plan closed", run=request.run_id, plan=request.plan_digest, why="its data were changed")
            return RefusalReason.CLOSED
        rows = self._rows(plan, model)
        if plan.privacy.mechanism != "none" and (fault := self.resources.probed.fault(model, names, rows)):
            log.warning("the plan cannot be trained privately here: %s", fault)
            return RefusalReason.MODEL
        reservation = self.ledger.reserve(
            request.plan_digest,
            request.round,
            digest,
            phase.name,
            phase.steps,
            lambda: self._fresh_secret(request.round),
        )
        if isinstance(reservation, RefusalReason):
            return reservation
        self.audit.append("round reserved", run=request.run_id, round=request.round, request=digest)
        size = self.policy.population_of(plan).public_size
        examples = self._examples(plan, model)
        return Work(plan, request, digest, model, adapter, spec, names, examples, rows, reservation, size)

    def trained(self, work: Work) -> tuple[AdapterState, dict[str, float]]:
        """The round's update and the means of the plan's metrics, both with their noise."""
        mechanism = work.mechanism()
        update = train_round(
            work.model,
            work.examples,
            work.adapter.adapter,
            work.phase,
            work.names,
            mechanism,
            work.reservation.secret,
            work.rows,
            work.plan.privacy.max_examples_per_unit,
        )
        return update, mechanism.means()

    def finish(self, work: Work, update: AdapterState, means: dict[str, float]) -> TrainReply:
        """Releases what was trained, and records it. Within the same ``answering`` as ``begin``."""
        plan, request, model = work.plan, work.request, work.model
        bounds = metric_bounds(plan.privacy.metrics, model.task.outcomes(model.network))
        rounding = self._rounding(plan, model, work.reservation)
        outgoing = egress.release(update, work.spec.part(work.names), means, bounds, rounding)
        self.audit.append(
            "round released",
            run=request.run_id,
            round=request.round,
            request=work.digest,
            release=hashlib.sha256(outgoing.payload).hexdigest(),
            size=len(outgoing.payload),
        )
        head = self.audit.sign_head()
        self.ledger.record(work.reservation, outgoing.payload, head, outgoing.residual)
        self._hold(request.plan_digest, work.adapter.held(kept_after(plan, model, request.round)))
        return egress.reply(self.name, request, work.digest, StoredRelease(outgoing.payload, head))

    def _rounding(self, plan: Plan, model: AdaptedModel, reservation: Reservation) -> egress.Rounding:
        """How the round's release is written. What rounding takes away is carried over within a phase, for tensors
        whose frame stays: where the server turns A and B, an old residual would point somewhere else."""
        if plan.wire.up != "int8":
            return egress.Rounding(plan.wire.up)
        phase, round = plan.phase_of(reservation.round), plan.round_of_phase(reservation.round)
        turned = ("A", "B") if moved_by_server(phase) else ()
        return egress.Rounding(
            plan.wire.up,
            draw=lambda name, n: reservation.secret.uniform(f"rounding {name}", 0, n),
            residual=self.ledger.residual(reservation.plan, phase.name),
            feeds_back=frozenset(name for name in model.spec.names if model.group_of(name) not in turned),
            last=round == phase.rounds,
        )

    def _hold(self, plan: str, held: Held) -> None:
        """Remembers what the next requests of the plan may leave out, and forgets plans that have ended."""
        self._held[plan] = held
        if len(self._held) > 1:
            going_on = {entry.digest for entry in self.ledger.plans(Decision.APPROVED)}
            self._held = {digest: one for digest, one in self._held.items() if digest in going_on}

    def _rows(self, plan: Plan, model: AdaptedModel) -> int:
        """Rows of a physical batch: so many that no unit of several examples is cut in two."""
        rows = self.resources.physical_batch or model.base.placement.physical_batch(model.task.settings.max_length)
        return rows if plan.privacy.unit == EXAMPLE else max(rows, plan.privacy.max_examples_per_unit)

    def _examples(self, plan: Plan, model: AdaptedModel) -> Examples:
        """The plan's data; none at all where they cannot be read, since a missing release would tell of that."""
        try:
            return self.resources.examples(plan, model)
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            log.exception("data '%s' cannot be read, so the release is noise; see 'consilium site check'", plan.data)
            return Examples([], model.task)

    def _fresh_secret(self, round: int) -> RoundSecret:
        """From the operating system; in simulations and tests from the fixed seed, whatever the run is called."""
        if self.fixed_seed is None:
            return RoundSecret.from_system()
        return RoundSecret.fixed(self.fixed_seed, self.name, round)
