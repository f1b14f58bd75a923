"""What a plan costs at a site, from the plan and the declared public size alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import PhaseStatement, PrivacyStatement
from common.plan import Plan
from common.privacy.accounting import PhaseLoad, Segment, calibrate, default_delta, epsilon, filter_epsilon


def sample_rates(plan: Plan, public_size: int) -> tuple[float, ...]:
    """q of each phase; above 1 if the declared size is too small for an expected batch."""
    return tuple(
        phase.sample_rate if phase.sample_rate is not None else (phase.batch_size or 0) / public_size
        for phase in plan.phases
    )


def fits(plan: Plan, public_size: int) -> bool:
    """Whether the declared size carries every phase's expected batch, and an expected batch is at least one unit."""
    return all(q <= 1 and q * public_size >= 1 for q in sample_rates(plan, public_size))


def state_privacy(plan: Plan, public_size: int) -> PrivacyStatement:
    """Calibrates σ of every phase so that full participation in all rounds meets the plan's ε, and states the cost.

    Skipped rounds and early stops are not refunded: the statement is for the whole plan.

    Raises:
        PrivacyError: the target cannot be met.
    """
    rates = sample_rates(plan, public_size)
    steps = tuple(phase.rounds * phase.steps for phase in plan.phases)
    if plan.privacy.mechanism == "none":
        noise: tuple[float, ...] = (0.0,) * len(steps)
        target = delta = None
    else:
        assert plan.privacy.epsilon is not None
        delta = plan.privacy.delta or default_delta(public_size)
        loads = [
            PhaseLoad(sample_rate=q, steps=t, share=phase.budget_share)
            for q, t, phase in zip(rates, steps, plan.phases, strict=True)
        ]
        noise = calibrate(loads, plan.privacy.epsilon, delta)
        target = epsilon([Segment(q, s, t) for q, s, t in zip(rates, noise, steps, strict=True)], delta)
    phases = tuple(
        PhaseStatement(phase.name, q, sigma, phase.clip_norm, t)
        for phase, q, sigma, t in zip(plan.phases, rates, noise, steps, strict=True)
    )
    return PrivacyStatement(
        epsilon=target,
        delta=delta,
        unit=plan.privacy.unit,
        neighbouring=plan.neighbouring,
        accountant=plan.accountant,
        steps=sum(steps),
        phases=phases,
    )


def segments_of(statement: PrivacyStatement) -> tuple[Segment, ...]:
    """The statement's phases as the accountant sees them; empty without noise."""
    return tuple(
        Segment(phase.sample_rate, phase.noise_multiplier, phase.steps)
        for phase in statement.phases
        if phase.noise_multiplier > 0
    )


@dataclass(frozen=True)
class Balance:
    """A population's budget: what of its lifetime ε is gone.

    All figures are the lifetime filter's (:func:`common.privacy.accounting.filter_epsilon`), which do not add up: two
    plans together cost less than the sum of what each costs alone, and more than a plan's own stated ε says.
    """

    limit: float
    """ε over the population's lifetime."""
    delta: float
    """The δ it is stated at."""
    charged: tuple[Segment, ...] = field(repr=False)
    """Steps of funded rounds."""
    planned: tuple[Segment, ...] = field(repr=False)
    """Steps of all plans ever approved; the charged ones are among them."""

    @property
    def spent(self) -> float:
        """ε of what was executed."""
        return filter_epsilon(self.charged, self.delta)

    @property
    def reserved(self) -> float:
        """ε of what was approved, executed or not. It is never refunded, and it alone is compared with the limit."""
        return filter_epsilon(self.planned, self.delta)

    @property
    def left(self) -> float:
        """How far the limit is from what is reserved."""
        return max(0.0, self.limit - self.reserved)

    def after(self, statement: PrivacyStatement) -> float:
        """What would be reserved if a further plan were approved. Beyond the limit, the ledger refuses it."""
        return filter_epsilon([*self.planned, *segments_of(statement)], self.delta)
