"""Real sites around synthetic data: the audit asks them as a coordinator would and looks at what they release.

Everything between request and release is the installation's own: policy, ledger, secrets, sampling, clipping, noise,
egress, audit log. What an audit knows of a site is what it put in, what comes out, and the ledger's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.audit_log import AuditLog
from client.policy import policy_for
from client.privacy.audit.verdicts import FloatArray
from client.privacy.ledger import Ledger
from client.privacy.row_independence import Probed
from client.site import Resources, Site
from common.adapted import AdaptedModel
from common.algorithms import LOCAL_RULES
from common.config import RunConfig
from common.errors import ConfigError
from common.examples import Examples
from common.messages import (
    DescribeRequest,
    PhaseStatement,
    PlanStatus,
    PrivacyStatement,
    Release,
    SiteDescription,
    Tensors,
    TrainRequest,
)
from common.plan import Plan, plan_of
from common.privacy.metrics import NoiseSplit
from common.sections import PhaseSection, WireSection
from common.signing import PLAN, SigningKey

CODE = "0" * 64
ROWS = 16
"""Rows of a physical batch, unless a check needs few of them."""
_COORDINATOR = SigningKey.fresh()
_PROBED = Probed()
"""The audit's sites share its models, and so what is known of their rows."""


class NoRelease(Exception):
    """A site did not answer a request with a release: refused, raised, or sent something that is none."""


@dataclass(frozen=True)
class Subject:
    """A plan to be executed with a model of the audit's own, at sites that declare a public size."""

    plan: Plan
    model: AdaptedModel
    public_size: int

    def rate(self, phase: PhaseSection) -> float:
        """q, from the plan's text alone."""
        return phase.sample_rate if phase.sample_rate is not None else (phase.batch_size or 0) / self.public_size

    def noise(self, stated: PhaseStatement) -> float:
        """σ of the released gradient: the stated one, and a little more where metrics have a share of the account."""
        return NoiseSplit.of(self.plan.privacy).gradient(stated.noise_multiplier)

    def names(self, round: int) -> tuple[str, ...]:
        """The tensors of a round that move in it, in the order of :meth:`Probe.noisy_sum`."""
        return tuple(self.moved(round))

    def moved(self, round: int) -> dict[str, int]:
        """Tensor → in how many of the round's steps it moves."""
        phase = self.plan.phase_of(round)
        rule, steps = LOCAL_RULES[phase.algorithm], range(1, phase.steps + 1)
        names = self.model.trained_in(phase, self.plan.round_of_phase(round))
        counts = {name: sum(rule.moves(self.model.group_of(name), step) for step in steps) for name in names}
        return {name: count for name, count in counts.items() if count}

    def rounds_of(self, phase: PhaseSection) -> range:
        """The rounds of a phase."""
        first = 1
        for each in self.plan.phases:
            if each.name == phase.name:
                break
            first += each.rounds
        return range(first, first + phase.rounds)


def subject_of(
    config: RunConfig,
    model: AdaptedModel,
    public_size: int,
    phases: Sequence[PhaseSection],
    run_id: str = "audit",
    delta: float | None = None,
) -> Subject:
    """The plan of ``config`` with these phases, for a model of the audit's own."""
    plan = plan_of(config, run_id, model.base.digest, model.spec.digest(), CODE)
    privacy = plan.privacy if delta is None else plan.privacy.model_copy(update={"delta": delta})
    changes = {"task": model.task.settings, "lora": model.lora, "phases": tuple(phases), "privacy": privacy}
    exact = {"wire": WireSection()}  # a number format only rounds what was released
    return Subject(plan.model_copy(update=changes | exact), model, public_size)


def audited_phase(phase: PhaseSection, **changes: Any) -> PhaseSection:
    """A phase with plain SGD: whatever else is done to the noisy gradient only processes it further, which costs no
    privacy, and with SGD a release *is* the sum of its noisy gradients."""
    plain = {"optimizer": "sgd", "proximal": 0.0, "smoothing": 0.0}
    fixed = {**plain, "layers": None if phase.layers is None else 1}
    return PhaseSection(**{**phase.model_dump(), **fixed, **changes})


class Probe:
    """One site that is ready for a plan.

    Args:
        folder: of its ledger; one that exists is taken up again.
        fixed_seed: known keys; ``None``: from the operating system, as in a deployment.
        lifetime_epsilon: limit of the site's population.

    Raises:
        ConfigError: the site's code refuses the plan.
    """

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        examples: Examples,
        fixed_seed: int | None = None,
        name: str = "audit",
        rows: int = ROWS,
        lifetime_epsilon: float = 1e9,
    ) -> None:
        self.folder, self.subject = folder, subject
        plan = subject.plan
        self.ledger = Ledger(folder, durable=False)
        self.site = Site(
            name,
            policy_for(plan, subject.public_size, _COORDINATOR.public, lifetime_epsilon),
            self.ledger,
            AuditLog(folder / "audit.jsonl", durable=False, site=name, key=SigningKey.fresh()),
            Resources(lambda plan: subject.model, lambda plan, model: examples, rows, probed=_PROBED),
            CODE,
            fixed_seed=fixed_seed,
            claims_epsilon=fixed_seed is None,
        )
        self.description = self.describe(plan)

    def describe(self, plan: Plan) -> SiteDescription:
        """Shows the site a plan."""
        signature = _COORDINATOR.sign(PLAN, plan.digest().encode())
        return self.site.describe(DescribeRequest(plan.run_id, plan.canonical(), CODE, signature))

    @property
    def statement(self) -> PrivacyStatement:
        """What the site was promised.

        Raises:
            ConfigError: it refused the plan.
        """
        if self.description.status is not PlanStatus.READY or self.description.privacy is None:
            raise ConfigError(
                f"public size {self.subject.public_size}: a site of this installation refuses the plan "
                f"({self.description.refusal}); see --public-size, privacy and phase in the configuration"
            )
        return self.description.privacy

    def release(self, round: int, adapter: Tensors, plan: Plan | None = None) -> Tensors:
        """The update of one round.

        Raises:
            NoRelease: anything else came.
        """
        plan = plan or self.subject.plan
        try:
            reply = self.site.train(TrainRequest(plan.run_id, round, plan.digest(), adapter))
        except Exception as error:  # whatever an engine under audit does instead of answering is a finding
            raise NoRelease(f"the site raised {type(error).__name__}: {error}") from error
        if not isinstance(reply, Release):
            raise NoRelease(f"the site answered {reply}")
        return reply.update

    def noisy_sum(self, round: int, adapter: Tensors, plan: Plan | None = None) -> FloatArray:
        """Clipped gradients and noise of all steps of a round, summed: what the release says about them.

        With SGD a release is −η/(q·public_size) times that sum. Flat, in the order of ``Subject.names``.
        """
        update = self.release(round, adapter, plan)
        phase = self.subject.plan.phase_of(round)
        factor = -self.subject.rate(phase) * self.subject.public_size / phase.learning_rate
        try:
            return flattened(
                {name: np.asarray(update[name], np.float64) * factor for name in self.subject.names(round)}
            )
        except KeyError as error:
            raise NoRelease(f"the release lacks {error}") from None

    def close(self) -> None:
        """Closes the ledger."""
        self.ledger.close()


@contextmanager
def closing(probe: Probe) -> Iterator[Probe]:
    """The probe, and its ledger closed at the end."""
    try:
        yield probe
    finally:
        probe.close()


def flattened(tensors: Mapping[str, FloatArray]) -> FloatArray:
    """All numbers in name order."""
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def slices_of(subject: Subject, round: int) -> dict[str, slice]:
    """Where each tensor lies in :meth:`Probe.noisy_sum`."""
    shapes, found, start = dict(subject.model.spec.shapes), {}, 0
    for name in subject.names(round):
        size = int(np.prod(shapes[name]))
        found[name] = slice(start, start + size)
        start += size
    return found


Folders = Callable[[], Path]
"""A new empty folder each time."""
