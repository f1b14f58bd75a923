"""(d) The ledger holds what was executed, the statement covers it, and the budget cannot be had twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from client.config import WHOLE_SITE
from client.privacy.audit.canaries import Estimate
from client.privacy.audit.probe import Folders, NoRelease, Probe, Subject, audited_phase, closing, subject_of
from client.privacy.audit.sampling import STILL
from client.privacy.audit.subjects import CANARIES, canary, coordinates, examples_of_units, zero_adapter
from client.privacy.audit.verdicts import Verdict, within
from common.config import RunConfig
from common.messages import PrivacyStatement
from common.privacy.accounting import Segment, filter_epsilon, pld_epsilon
from common.sections import EXAMPLE

PART = "ledger"
FEW = 8
"""Canaries whose steps are counted."""
PLD_ERROR = 0.005
"""dp-accounting's figure may exceed the true one by so much."""


def ledger_steps(
    config: RunConfig,
    subject: Subject,
    probe: Probe,
    estimate: Estimate,
    seed: int,
    folders: Folders,
    done: Callable[[], None],
) -> list[Verdict]:
    """All verdicts of the part.

    Args:
        subject: the plan as it is.
        probe: a site that has executed rounds of it.
        estimate: how many.
    """
    statement = probe.statement
    verdicts = [_rows(subject, probe, statement, estimate)]
    done()
    verdicts.append(_claim(subject, statement))
    done()
    try:
        verdicts.append(_executed(config, subject, seed, folders))
    except NoRelease as error:
        verdicts.append(within(PART, "steps-executed", "every round is answered", 0.0, 1.0, suspects=str(error)))
    done()
    verdicts.append(_lifetime(config, subject, statement, folders))
    done()
    return verdicts


def _rows(subject: Subject, probe: Probe, statement: PrivacyStatement, estimate: Estimate) -> Verdict:
    """Statement, reservations and charges against the plan's own text: q, C, σ and steps."""
    assert statement.epsilon is not None and subject.plan.privacy.epsilon is not None
    problems = []
    if statement.epsilon > subject.plan.privacy.epsilon:
        problems.append(f"ε = {statement.epsilon} stated, {subject.plan.privacy.epsilon} planned")
    reserved: defaultdict[tuple[float, float], int] = defaultdict(int)
    expected: defaultdict[tuple[float, float], int] = defaultdict(int)
    stated = {phase.name: phase for phase in statement.phases}
    for phase in subject.plan.phases:
        mine = stated.get(phase.name)
        if mine is None:
            problems.append(f"phase {phase.name}: is not stated")
            continue
        values = (mine.sample_rate, mine.clip_norm, mine.steps)
        if values != (subject.rate(phase), phase.clip_norm, phase.rounds * phase.steps):
            problems.append(f"phase {phase.name}: (q, C, steps) stated as {values}")
        expected[mine.sample_rate, mine.noise_multiplier] += phase.rounds * phase.steps
    for segment in probe.ledger.reserved(WHOLE_SITE):
        reserved[segment.sample_rate, segment.noise_multiplier] += segment.steps
    if reserved != expected:
        problems.append(f"reserved {dict(reserved)} instead of {dict(expected)}")
    charges = probe.ledger.charges(subject.plan.digest())
    if len(charges) != estimate.rounds:
        problems.append(f"{len(charges)} rounds charged, {estimate.rounds} released")
    for round, name, rate, noise, steps in charges:
        phase = subject.plan.phase_of(round)
        if (name, rate, noise) != (phase.name, subject.rate(phase), stated[phase.name].noise_multiplier):
            problems.append(f"round {round}: charged as {name}, q = {rate}, σ = {noise}")
        if steps != phase.steps:
            problems.append(f"round {round}: {steps} steps charged, {phase.steps} planned")
    return within(
        PART, "ledger-rows", "statement, reservations and charges equal the plan's q, C and steps and each other's σ "
        "(figure: rows that differ)", float(len(problems)), most=0.0, where="; ".join(problems[:3]),
        suspects="the ledger holds other steps, rates or noise than the plan",
    )  # fmt: skip


def _claim(subject: Subject, statement: PrivacyStatement) -> Verdict:
    """The claimed ε by a second library, for all rounds and steps of the plan's text at the stated noise."""
    assert statement.epsilon is not None and statement.delta is not None
    noise = {phase.name: phase.noise_multiplier for phase in statement.phases}
    segments = [
        Segment(subject.rate(phase), noise[phase.name], phase.rounds * phase.steps) for phase in subject.plan.phases
    ]
    second = pld_epsilon(segments, statement.delta)
    return within(
        PART, "claim-covers-the-plan", "the claimed ε covers every step of every planned round (figure: ε by the PLD "
        "of a second library)", second, most=statement.epsilon + PLD_ERROR, where=f"claimed {statement.epsilon:.4g}",
        suspects="rounds, steps or phases are not composed in the stated ε",
    )  # fmt: skip


def _executed(config: RunConfig, subject: Subject, seed: int, folders: Folders) -> Verdict:
    """At q = 1 and with known keys a canary contributes C in every step: its sum counts them."""
    fixed = {"rounds": 1, "sample_rate": 1.0, "batch_size": None, "learning_rate": STILL * subject.public_size}
    phases = [audited_phase(phase, **fixed) for phase in subject.plan.phases]
    counted = subject_of(config, subject.model, subject.public_size, phases, run_id="steps", delta=1e-5)
    units = examples_of_units(subject.model, [(canary(k),) for k in range(FEW)], config.unit != EXAMPLE)
    none = examples_of_units(subject.model, [], False)
    adapter = zero_adapter(subject.model)
    figures: list[tuple[float, str]] = []
    with (
        closing(Probe(folders(), counted, units, seed)) as here,
        closing(Probe(folders(), counted, none, seed)) as there,
    ):
        assert here.statement and there.statement
        for index, phase in enumerate(phases):
            moved = here.noisy_sum(index + 1, adapter) - there.noisy_sum(index + 1, adapter)
            steps = float(np.mean(coordinates(moved.reshape(2, CANARIES))[:FEW])) / phase.clip_norm
            charged = here.ledger.charges(counted.plan.digest())[-1][-1]
            figures.append((steps / charged, f"phase {phase.name}: {steps:.4g} executed, {charged} charged"))
    worst, where = max(figures, key=lambda each: abs(each[0] - 1))
    return within(
        PART, "steps-executed", "each round executes the steps that the ledger charges (figure: executed over charged)",
        worst, 0.999, 1.001, where=where, suspects="the ledger counts other steps than are executed, or units weigh "
        "other than C",
    )  # fmt: skip


def _lifetime(config: RunConfig, subject: Subject, statement: PrivacyStatement, folders: Folders) -> Verdict:
    """A budget that carries the plan once: the same again must be refused, whatever happened to the data meanwhile."""
    once = [Segment(p.sample_rate, p.noise_multiplier, p.steps) for p in statement.phases]
    limit = (filter_epsilon(once, 1e-5) + filter_epsilon([*once, *once], 1e-5)) / 2
    orders: Sequence[Sequence[int]] = (range(FEW), range(FEW - 1, -1, -1), range(1, FEW))
    folder, approved = folders(), 0
    for index, order in enumerate(orders):
        plan = subject.plan.model_copy(update={"run_id": f"again-{index}"})
        again = Subject(plan, subject.model, subject.public_size)
        units = examples_of_units(subject.model, [(canary(k),) for k in order], config.unit != EXAMPLE)
        with closing(Probe(folder, again, units, lifetime_epsilon=limit)) as probe:
            approved += probe.description.refusal is None
    return within(
        PART, "lifetime-budget", "a lifetime budget for one plan funds one, also after the data were reshuffled or "
        "changed (figure: plans approved)", float(approved), 1.0, 1.0, where=f"limit {limit:.4g}",
        suspects="reshuffled or changed data, or another run, get a fresh budget",
    )  # fmt: skip
