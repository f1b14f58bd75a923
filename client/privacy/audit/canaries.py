"""(c) Mean-shift canaries: a lower bound on ε from releases of the real ``Site.train`` over all rounds.

Each of about a thousand canaries has a gradient in a direction of its own. A coin decides which of them are in the
data. Projected on a canary's direction, the releases add up to N(0, v) if it is out, and to the same shifted by the sum
of its clipped gradients if it is in. Shift over deviation, μ, is estimated over all canaries of few runs, as in Steinke
et al. 2023 (arXiv 2305.08846) and Andrew et al. 2023 (arXiv 2302.03098): the canaries are independent because their
directions are orthogonal and each is in by its own coin. A lower bound on μ gives one on ε by Gaussian DP, as in Nasr
et al. 2023 (arXiv 2302.07956), with the exact curve of Balle & Wang 2018.

Why that is a lower bound. A canary that is in has the larger variance v₁ ≥ v₀, as it joins by chance. For every
threshold t ≥ 0, P(x > t) is that of N(Δ, v₁), while Q(x > t) is at most that of N(0, v₁). So the two hypotheses are at
least as far apart, at any ε ≥ 0, as N(Δ, v₁) and N(0, v₁), that is as Gaussian DP with μ = Δ/√v₁. The bound on μ is a
one-sided noncentral t interval with the deviation of the canaries that are in, which overstates the error of the other
mean. That the noise is normal is checked apart (noise-is-normal). Under sampling, the less so the smaller q and σ, a
shift of the mean is less than all there is to see, so the bound stays further below the claim; at q = 1 it meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from client.privacy.audit.probe import Folders, NoRelease, Probe, Subject, closing
from client.privacy.audit.subjects import CANARIES, canary, coordinates, examples_of_units, zero_adapter
from client.privacy.audit.verdicts import LEVEL, FloatArray, Verdict, within
from common.messages import PhaseStatement, PrivacyStatement
from common.privacy.privacy_loss import gaussian_epsilon, gaussian_mu
from common.sections import EXAMPLE, PhaseSection

PART = "canaries"
CONFIDENCE = 0.99
"""Of the interval that is reported; the verdict uses the audit's own, stricter level."""


@dataclass(frozen=True)
class Estimate:
    """The empirical privacy of a plan beside the claimed one."""

    canaries: int
    rounds: int
    """Rounds executed in each run."""
    planned_rounds: int
    mu: float
    mu_low: float
    mu_high: float
    epsilon: float
    epsilon_low: float
    epsilon_high: float
    """At the plan's δ; the bounds at ``CONFIDENCE``, two-sided."""
    claimed_epsilon: float
    delta: float
    power_half_noise: float
    """Probability that canaries alone show noise of half the scale; noise-scale sees it with certainty."""
    power_one_round: float
    """Probability that canaries alone show noise that pays for one round only; claim-covers-the-plan always does."""


@dataclass(frozen=True)
class Shift:
    """Sums over all rounds in each canary's direction, of canaries that were in and out."""

    inside: FloatArray
    outside: FloatArray

    @property
    def mu(self) -> float:
        """Shift in units of the deviation of those inside."""
        return float((self.inside.mean() - self.outside.mean()) / self.inside.std(ddof=1))

    def bounds(self, level: float) -> tuple[float, float]:
        """One-sided lower and upper bound on μ, each at 1 − ``level``.

        Noncentral t in the normal approximation of Johnson & Welch 1940 (Biometrika 31); at hundreds of degrees of
        freedom it is exact to more digits than matter.
        """
        root = math.sqrt(1 / len(self.inside) + 1 / len(self.outside))
        freedom = len(self.inside) - 1
        t = self.mu / root
        centre = t * (1 - 1 / (4 * freedom))
        half = float(stats.norm.isf(level)) * math.sqrt(1 + t * t / (2 * freedom))
        return (centre - half) * root, (centre + half) * root


def runs_needed(subject: Subject, statement: PrivacyStatement, rounds: list[int], most: int) -> int:
    """Runs of ``CANARIES`` canaries after which this part sees half the noise, and noise that pays for one round only,
    each with 99 % power; ``most`` at most."""
    return next((runs for runs in range(1, most) if min(powers(subject, statement, rounds, runs)) > 0.99), most)


def powers(subject: Subject, statement: PrivacyStatement, rounds: list[int], runs: int) -> tuple[float, float]:
    """Probability that canaries alone show half the noise (by their shift, against what the statement implies), and
    noise that pays for one round (by the bound on ε; the statement is then as wrong as the noise)."""
    assert statement.epsilon is not None and statement.delta is not None

    def power(noise: float, reference: float, level: float) -> float:
        mu = expected_shift(subject, statement, rounds, noise)
        deviation = math.sqrt((4 + mu * mu) / (runs * CANARIES))
        return float(stats.norm.cdf((mu - reference) / deviation - stats.norm.isf(level)))

    claimed = gaussian_mu(statement.epsilon, statement.delta)
    stated = expected_shift(subject, statement, rounds)
    return power(0.5, stated, LEVEL / 2), power(1 / math.sqrt(subject.plan.rounds), claimed, LEVEL)


def canary_runs(
    subject: Subject, seed: int, runs: tuple[int, int], most_steps: int, folders: Folders, done: Callable[[], None]
) -> tuple[list[Verdict], Estimate | None, Probe]:
    """All verdicts of the part, the estimate, and the first run's site with its ledger still open.

    Args:
        runs: how many, at least and at most; in between as many as the power of the checks needs.
        most_steps: of all runs together; beyond it there are fewer runs, and then fewer rounds of each phase.
    """
    generator = np.random.default_rng(seed)
    first, coin = _site(subject, generator, folders)
    statement, rounds = first.statement, _rounds_within(subject, most_steps)
    steps = sum(subject.plan.phase_of(round).steps for round in rounds)
    affordable = max(1, min(runs[1], most_steps // steps))
    needed = runs_needed(subject, statement, rounds, affordable)
    try:
        sums = _projected(first, statement, rounds)
        inside, outside = [sums[coin]], [sums[~coin]]
        done()
        for _ in range(1, max(needed, min(runs[0], affordable))):
            probe, coin = _site(subject, generator, folders)
            with closing(probe):
                sums = _projected(probe, statement, rounds)
            inside.append(sums[coin])
            outside.append(sums[~coin])
            done()
    except NoRelease as error:
        failed = within(PART, "canaries-released", "a site with canaries releases", 0.0, 1.0, suspects=str(error))
        return [failed], None, first
    shift = Shift(np.concatenate(inside), np.concatenate(outside))
    estimate = _estimate(subject, statement, shift, rounds)
    return [_epsilon(shift, estimate), _shift(subject, statement, shift, rounds)], estimate, first


def _site(subject: Subject, generator: np.random.Generator, folders: Folders) -> tuple[Probe, npt.NDArray[np.bool_]]:
    """A site with the canaries for which a coin says so, and the coins."""
    coin = generator.random(CANARIES) < 0.5
    grouped = subject.plan.privacy.unit != EXAMPLE
    units = [(canary(int(k)),) * (1 + int(k) % 3 if grouped else 1) for k in np.flatnonzero(coin)]
    return Probe(folders(), subject, examples_of_units(subject.model, units, grouped)), coin


def _rounds_within(subject: Subject, steps: int) -> list[int]:
    """All rounds, or of each phase the same share of its first rounds."""
    share = min(1.0, steps / sum(phase.rounds * phase.steps for phase in subject.plan.phases))
    chosen: list[int] = []
    for phase in subject.plan.phases:
        of_phase = subject.rounds_of(phase)
        chosen += of_phase[: max(1, math.floor(len(of_phase) * share))]
    return chosen


def _weight(subject: Subject, phase: PhaseSection, stated: PhaseStatement) -> float:
    """Of one round's sum in units of C: shift over variance, so that the shift of the weighted sum is largest."""
    return stated.sample_rate / subject.noise(stated) ** 2 / phase.clip_norm


def _projected(probe: Probe, statement: PrivacyStatement, rounds: list[int]) -> FloatArray:
    """The weighted sum of all rounds in each canary's direction; every request carries the same adapter."""
    stated = {phase.name: phase for phase in statement.phases}
    adapter = zero_adapter(probe.subject.model)
    total = np.zeros(CANARIES)
    for round in rounds:
        phase = probe.subject.plan.phase_of(round)
        released = probe.noisy_sum(round, adapter).reshape(2, CANARIES)
        total += _weight(probe.subject, phase, stated[phase.name]) * coordinates(released)
    return total


def expected_shift(subject: Subject, statement: PrivacyStatement, rounds: list[int], noise: float = 1.0) -> float:
    """μ that the statement's q, σ, C and steps imply; ``noise`` scales the noise that is really there."""
    shift = variance = 0.0
    stated = {phase.name: phase for phase in statement.phases}
    for round in rounds:
        phase = subject.plan.phase_of(round)
        q, sigma = subject.rate(phase), subject.noise(stated[phase.name])
        weight = _weight(subject, phase, stated[phase.name]) * phase.clip_norm
        shift += weight * q * phase.steps
        variance += weight**2 * phase.steps * ((noise * sigma) ** 2 + q * (1 - q))
    return shift / math.sqrt(variance)


def _estimate(subject: Subject, statement: PrivacyStatement, shift: Shift, rounds: list[int]) -> Estimate:
    assert statement.epsilon is not None and statement.delta is not None
    low, high = shift.bounds((1 - CONFIDENCE) / 2)
    delta = statement.delta
    canaries = len(shift.inside) + len(shift.outside)
    return Estimate(
        canaries, len(rounds), subject.plan.rounds, shift.mu, low, high, _epsilon_of(shift.mu, delta),
        _epsilon_of(low, delta), _epsilon_of(high, delta), statement.epsilon, delta,
        *powers(subject, statement, rounds, canaries // CANARIES),
    )  # fmt: skip


def _epsilon_of(mu: float, delta: float) -> float:
    return gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def _epsilon(shift: Shift, estimate: Estimate) -> Verdict:
    low = _epsilon_of(shift.bounds(LEVEL)[0], estimate.delta)
    return within(
        PART, "epsilon", "the releases give away no more than the claimed ε (figure: lower bound on ε from canaries)",
        low, most=estimate.claimed_epsilon, false_alarm=LEVEL,
        where=f"{estimate.canaries} canaries, {estimate.rounds} of {estimate.planned_rounds} rounds",
        suspects="the noise does not pay for the claimed ε: too small, or rounds or steps are not composed",
    )  # fmt: skip


def _shift(subject: Subject, statement: PrivacyStatement, shift: Shift, rounds: list[int]) -> Verdict:
    expected = expected_shift(subject, statement, rounds)
    low, high = shift.bounds(LEVEL / 2)
    # The bounds are turned around: the figure must lie where the expected value's own interval would put it.
    return within(
        PART, "canary-shift", "canaries leave the trace that q, σ, C and steps of the statement imply (figure: μ)",
        shift.mu, expected - (high - shift.mu), expected + (shift.mu - low), false_alarm=LEVEL,
        where=f"expected {expected:.3f}",
        suspects="canaries shift the releases "
        + ("more" if shift.mu > expected else "less")
        + " than stated: noise, sampling rate, clip norm or steps differ from the statement",
    )  # fmt: skip
