"""How long an honest update can be: what a plan says of the norm of a site's update, before any has come.

A round has T local steps at learning rate η. Each takes the noisy gradient

    g_i = (Σ_{u ∈ S_i} clip_C(∇_u) + z_i) / (q·n),    z_i ~ N(0, σ²C² I),

where n is the site's declared public size, and so q·n the public denominator; S_i is drawn at rate q from its true
n' ≤ 1.1·n units (a declared size may be rounded down to two digits). With FedProx's pull μ and the low-pass filter F a
step is d ← (1 - ημ)·d - η·F g_i for d = θ - θ_received. Unrolled, with ρ = max(1, |1 - ημ|), whatever the data are,

    ‖d_T‖  ≤  η·‖F‖/(q·n) · ( ρ^(T-1) · C·M  +  ‖Σ_i a_i z_i‖ ),    M = Σ_i |S_i|,  0 ≤ |a_i| ≤ ρ^(T-i),

and both random parts have a tail that the data do not move:

**M** is binomial of T·n' trials at rate q, mean m. Bernstein (Boucheron, Lugosi & Massart 2013, Concentration
Inequalities, Corollary 2.11): P(M ≥ m + s) ≤ exp(-s²/(2(m + s/3))), so M < m + x/3 + √(x²/9 + 2mx) but for a
probability of e^(-x); and M ≤ T·n' always.

**The noise** has P independent entries of variance at most σ²C²·Σ_i ρ^(2(T-i)). Laurent & Massart 2000 (Annals of
Statistics 28(5), Lemma 1, eq. 4.3): P(χ²_P ≥ P + 2√(Px) + 2x) ≤ e^(-x).

x = ln(2·rounds / 1e-9), so that an honest site is turned away in any round of a run with probability below 1e-9. With
metrics the noise on the gradient is σ/√(1 - s) (:mod:`common.privacy.metrics`). Tensors that a step leaves alone only
take away from both parts.

**The filter** is F = D⁻¹K with K symmetric and D its row sums. D^(-1/2) K D^(-1/2) has the eigenvalues of F, which are
at most 1 in magnitude, so ‖F‖ ≤ √(max D / min D) ≤ √2: a row at the border keeps more than half of its taps.

**AdamW** (bias-corrected, no weight decay) moves an entry by at most η·R_i in step i, for any gradients at all. By
Cauchy-Schwarz on m_i = (1-β₁) Σ_j β₁^(i-j) g_j and v_i = (1-β₂) Σ_j β₂^(i-j) g_j² (Kingma & Ba 2015, arXiv 1412.6980,
Algorithm 1), with γ = β₁²/β₂,

    R_i = (1-β₁)/(1-β₁ⁱ) · √((1-β₂ⁱ)/(1-β₂)) · √((1-γⁱ)/(1-γ)),    ‖d_T‖ ≤ η·√P·Σ_i R_i.

R_1 = 1, and R_i stays below 7.3. Pull and filter come before the moments, so they do not matter.

**Rounding.** In each step θ is rounded to fp32, which moves d by up to 2⁻²⁴·‖θ‖; all else in the computation is
relative and below 0.1 %. On the journey Q rounds a row of L entries off by at most κ times its norm: 2⁻⁹ for bf16,
√L/127 for int8. With error feedback a site sends Q(u + e) and keeps e ← u + e - Q(u + e), so ‖e‖ ≤ κ/(1-κ)·max‖u‖ over
the rounds of a phase, and what is sent is at most (1+κ)/(1-κ) times the bound. (From L = 127² on that says nothing.)

Without clipping (mechanism ``none`` and SGD) nothing bounds an update but :data:`LARGEST_NORM`.

What the bound is good for: an update of noise size cannot be scaled up by much. Where the clipped gradients of many
units outweigh the noise (large sites, ε of 8 and more), it is the norm of as many gradients of norm C all in one
direction; real ones add up to several times less, and that factor is an attacker's.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from common.adapter import AdapterSpec
from common.errors import PrivacyError
from common.messages import UNDERSTATED, PhaseStatement, SiteDescription, Tensors
from common.number_formats import LEVELS, NumberFormat
from common.plan import Plan
from common.privacy.accounting import PhaseLoad, calibrate, default_delta
from common.privacy.metrics import NoiseSplit
from common.sections import PhaseSection

LARGEST_NORM = 1e6
"""Largest Euclidean norm of any update. Adapters are of norm 1 to 100; beyond this the next round's numbers
overflow."""

FALSE_ALARM = 1e-9
"""Probability that an honest site's update is found too long in any round of a run."""

_FIRST, _SECOND = 0.9, 0.999
"""β₁ and β₂ of the sites' AdamW."""
_FILTER = math.sqrt(2.0)
"""‖F‖."""
_FP32 = 2.0**-23
"""Twice the rounding of a step, for θ that has moved."""
_ARITHMETIC = 1.001
_SAME_NOISE = 1.02
"""Noise that two machines calibrate for the same ε differs by less: by what :func:`calibrate` leaves open."""


def largest_norm(plan: Plan, round: int, site: SiteDescription, spec: AdapterSpec, start: float) -> float:
    """Largest Euclidean norm of an honest update as it arrives; see the module's description.

    Args:
        site: which :func:`agrees` with the plan.
        spec: of the tensors that the round trains.
        start: Euclidean norm of the adapter that the site was sent.
    """
    phase = plan.phase_of(round)
    entries = sum(math.prod(shape) for _, shape in spec.shapes)
    if phase.optimizer == "adamw":
        bound = phase.learning_rate * math.sqrt(entries) * math.fsum(map(_adam_step, range(1, phase.steps + 1)))
    elif plan.privacy.mechanism == "none":
        return LARGEST_NORM
    else:
        assert site.privacy is not None
        stated = next(one for one in site.privacy.phases if one.name == phase.name)
        tail = math.log(2 * plan.rounds / FALSE_ALARM)
        bound = _sgd(phase, stated, site.public_size, entries, NoiseSplit.of(plan.privacy), tail)
    trained = _ARITHMETIC * bound + phase.steps * _FP32 * (start + bound)
    return min(LARGEST_NORM, trained * _journey(plan.wire.up, spec))


def norm(tensors: Tensors) -> float:
    """Euclidean norm of all tensors together, in fp64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in tensors.values()))


def _sgd(
    phase: PhaseSection, stated: PhaseStatement, public_size: int, entries: int, split: NoiseSplit, tail: float
) -> float:
    """Every clipped gradient in one direction, and the noise."""
    keep = max(1.0, abs(1 - phase.learning_rate * phase.proximal))
    trials = phase.steps * math.floor(UNDERSTATED * public_size)
    signal = keep ** (phase.steps - 1) * _most_units(trials, stated.sample_rate, tail)
    deviation = math.sqrt(math.fsum(keep ** (2 * left) for left in range(phase.steps)))
    noise = split.gradient(stated.noise_multiplier) * deviation * _longest_gaussian(entries, tail)
    stretch = _FILTER if phase.smoothing else 1.0
    return phase.learning_rate * stretch * stated.clip_norm * (signal + noise) / (stated.sample_rate * public_size)


def _most_units(trials: int, rate: float, tail: float) -> float:
    """A binomial count exceeds it with probability at most exp(-tail)."""
    mean = trials * rate
    return min(float(trials), mean + tail / 3 + math.sqrt(tail**2 / 9 + 2 * mean * tail))


def _longest_gaussian(entries: int, tail: float) -> float:
    """A standard Gaussian vector is longer with probability at most exp(-tail)."""
    return math.sqrt(entries + 2 * math.sqrt(entries * tail) + 2 * tail)


def _adam_step(step: int) -> float:
    """R_i."""
    ratio = _FIRST**2 / _SECOND
    second = math.sqrt((1 - _SECOND**step) / (1 - _SECOND) * (1 - ratio**step) / (1 - ratio))
    return (1 - _FIRST) / (1 - _FIRST**step) * second


def _journey(form: NumberFormat, spec: AdapterSpec) -> float:
    """(1+κ)/(1-κ)."""
    longest = max((max(shape, default=1) for _, shape in spec.shapes), default=1)
    off = {"fp32": 0.0, "bf16": 2.0**-9, "int8": math.sqrt(longest) / LEVELS}[form]
    return (1 + off) / (1 - off) if off < 1 else math.inf


# ---- what a site states of itself -----------------------------------------------------------------------------------


def agrees(plan: Plan, description: SiteDescription) -> bool:
    """Whether a site states what the plan comes to at its declared size.

    It must, since the bound on its updates follows from it: rates, clip norms and steps to the letter, and in each
    phase no more noise than the plan's ε needs. Less noise would be the site's own loss.
    """
    stated = description.privacy
    if stated is None:
        return False
    rates = [phase.sample_rate or (phase.batch_size or 0) / description.public_size for phase in plan.phases]
    terms = [
        (one.name, rate, one.clip_norm, one.rounds * one.steps) for one, rate in zip(plan.phases, rates, strict=True)
    ]
    if terms != [(one.name, one.sample_rate, one.clip_norm, one.steps) for one in stated.phases]:
        return False
    try:
        most = _noise_needed(plan, tuple(rates), description.public_size)
    except PrivacyError:
        return False
    return all(0 <= one.noise_multiplier <= _SAME_NOISE * noise for one, noise in zip(stated.phases, most, strict=True))


def _noise_needed(plan: Plan, rates: tuple[float, ...], public_size: int) -> tuple[float, ...]:
    """σ of each phase.

    Raises:
        PrivacyError: the plan cannot be met at this size.
    """
    if plan.privacy.mechanism == "none":
        return (0.0,) * len(rates)
    assert plan.privacy.epsilon is not None
    loads = (
        PhaseLoad(rate, phase.rounds * phase.steps, phase.budget_share)
        for rate, phase in zip(rates, plan.phases, strict=True)
    )
    return _calibrated(tuple(loads), plan.privacy.epsilon, plan.privacy.delta or default_delta(public_size))


_calibrated = lru_cache(maxsize=1024)(calibrate)  # many sites come to the same
