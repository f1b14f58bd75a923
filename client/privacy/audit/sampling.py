"""Sampling: who takes part in which step, read from the releases of two sites that share their keys.

One site holds all canaries, the other none; both draw the same noise. In each canary's own direction the difference of
their sums, divided by C, is how often that canary took part in the round's steps: exact whole numbers. Under Poisson
sampling they are independent binomial counts (steps, q) (Abadi et al. 2016, arXiv 1607.00133, §3.1); batches of a fixed
size, or epochs of a shuffled data set, are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.privacy.audit.probe import Folders, NoRelease, Probe, Subject, audited_phase, closing, subject_of
from client.privacy.audit.subjects import CANARIES, canary, coordinates, examples_of_units, zero_adapter
from client.privacy.audit.verdicts import (
    LEVEL,
    Comparison,
    FloatArray,
    Verdict,
    binomial_range,
    dispersion_range,
    within,
    worst_of,
)
from common.adapted import AdaptedModel
from common.config import RunConfig
from common.sections import EXAMPLE, PhaseSection

PART = "sampling"
STILL = 2.0**-24
"""η/(q·public_size) of canary runs: the head moves so little that every step finds the gradients of the first."""

Counts = npt.NDArray[np.int64]


def canary_subject(config: RunConfig, model: AdaptedModel, public_size: int) -> Subject:
    """The plan as it is, but that each phase trains the head of the canary model, slowly."""
    phases = [audited_phase(phase, train=("head",), layers=None) for phase in config.phases]
    plain = subject_of(config, model, public_size, phases)
    still = [
        audited_phase(phase, learning_rate=STILL * plain.rate(phase) * public_size, layers=None) for phase in phases
    ]
    return subject_of(config, model, public_size, still, "canaries")


@dataclass(frozen=True)
class Inclusions:
    """How often each canary took part in each round of a phase."""

    phase: PhaseSection
    rate: float
    counts: Counts
    """[rounds, canaries]"""
    error: float
    """Largest distance of a contribution from a whole multiple of C, in units of what rounding explains."""


def inclusions(
    subject: Subject, rounds: int, seed: int, folders: Folders, done: Callable[[], None]
) -> list[Inclusions]:
    """Executes ``rounds`` rounds of each phase with known keys.

    Raises:
        NoRelease: a round was not answered.
    """
    found: dict[str, list[FloatArray]] = {phase.name: [] for phase in subject.plan.phases}
    noise = 0.0
    grouped = subject.plan.privacy.unit != EXAMPLE
    adapter = zero_adapter(subject.model)
    units = [(canary(k),) * (1 + k % 3 if grouped else 1) for k in range(CANARIES)]
    everyone = examples_of_units(subject.model, units, grouped)
    nobody = examples_of_units(subject.model, [], False)
    while any(len(each) < rounds for each in found.values()):
        first, second = Probe(folders(), subject, everyone, seed), Probe(folders(), subject, nobody, seed)
        with closing(first), closing(second):
            for phase in subject.plan.phases:
                for round in subject.rounds_of(phase)[: rounds - len(found[phase.name])]:
                    alone = second.noisy_sum(round, adapter)
                    moved = (first.noisy_sum(round, adapter) - alone) / phase.clip_norm
                    found[phase.name].append(coordinates(moved.reshape(2, CANARIES)))
                    noise = max(noise, float(np.abs(alone).max()) / phase.clip_norm)
        seed += 1
        done()
    tolerance = 1e-3 + 1e-6 * noise  # the noise is taken off in fp32
    return [_counted(p, subject.rate(p), np.stack(found[p.name]), tolerance) for p in subject.plan.phases]


def _counted(phase: PhaseSection, rate: float, contributions: FloatArray, tolerance: float) -> Inclusions:
    counts = np.rint(np.nan_to_num(contributions))
    error = float(np.abs(contributions - counts).max())
    return Inclusions(phase, rate, counts.astype(np.int64), error / tolerance)


def sampling(subject: Subject, rounds: int, seed: int, folders: Folders, done: Callable[[], None]) -> list[Verdict]:
    """All verdicts of the part."""
    try:
        found = inclusions(subject, rounds, seed, folders, done)
    except NoRelease as error:
        return [within(PART, "canaries-released", "a site with canaries releases", 0.0, 1.0, suspects=str(error))]
    return [_whole(found), _rates(found), _poisson(found)]


def _whole(found: list[Inclusions]) -> Verdict:
    worst = max(found, key=lambda each: each.error)
    return within(
        PART, "contributes-c", "a unit whose gradient exceeds C contributes exactly C in each step it takes part in "
        "(figure: distance from a multiple of C, in units of rounding)", worst.error, most=1.0,
        where=f"phase {worst.phase.name}",
        suspects="gradients are clipped to something else than the plan's clip norm, or not at all",
    )  # fmt: skip


def _rates(found: list[Inclusions]) -> Verdict:
    comparisons = []
    for each in found:
        trials = each.counts.size * each.phase.steps
        low, high = binomial_range(trials, each.rate, LEVEL / len(found))
        expected = trials * each.rate
        figure = float(each.counts.sum())
        comparisons.append(Comparison(figure / expected, low / expected, high / expected, f"phase {each.phase.name}"))
    worst = worst_of(comparisons)
    return within(
        PART, "sample-rate", "units take part at the plan's rate q (figure in units of q; exact binomial)",
        worst.figure, worst.least, worst.most, false_alarm=LEVEL, where=worst.where,
        suspects=f"units are sampled at {_times(worst.figure)} the stated rate, or steps are executed as often",
    )  # fmt: skip


def _times(ratio: float) -> str:
    return "twice" if abs(ratio - 2) < 0.1 else f"{ratio:.3g} times"


def _poisson(found: list[Inclusions]) -> Verdict:
    """Sizes of steps, counts of units and of single rounds are as scattered as binomial counts; rounds independent."""
    sampled = [each for each in found if each.rate < 1]
    comparisons = []
    level = LEVEL / max(1, 4 * len(sampled))
    for each in sampled:
        rounds, units = each.counts.shape
        steps, rate, where = each.phase.steps, each.rate, f"phase {each.phase.name}"
        for what, counts, trials in (
            ("sizes of the batches", each.counts.sum(axis=1), units * steps),
            ("times each unit took part", each.counts.sum(axis=0), rounds * steps),
            ("times each unit took part in a round", each.counts.ravel(), steps),
        ):
            if trials == 1:
                continue
            figure = float(np.mean((counts - trials * rate) ** 2)) / (trials * rate * (1 - rate))
            low, high = dispersion_range(trials, rate, len(counts), level)
            comparisons.append(Comparison(figure, low, high, f"variance of {what}, {where}"))
        if rounds > 1:
            # Disjoint pairs of rounds, so that the number of units that are in both is exactly binomial.
            pairs = each.counts[: rounds // 2 * 2].reshape(-1, 2, units) > 0
            both = float((pairs[:, 0] & pairs[:, 1]).sum())
            chance = (1 - (1 - rate) ** steps) ** 2
            trials = units * len(pairs)
            low, high = binomial_range(trials, chance, level)
            expected = trials * chance
            comparisons.append(
                Comparison(both / expected, low / expected, high / expected, f"units in both of two rounds, {where}")
            )
    worst = worst_of(comparisons) if comparisons else Comparison(1.0, 1.0, 1.0, "q = 1: every unit is in every step")
    return within(
        PART, "poisson", "each unit takes part independently of the other units and of other steps "
        "(figure: scatter in units of the binomial's)", worst.figure, worst.least, worst.most,
        false_alarm=LEVEL if comparisons else 0.0, where=worst.where,
        suspects="batches are not Poisson samples: shuffled, of a fixed size, or the same again",
    )  # fmt: skip
