"""The site's policy as a pure function of policy, plan and declared sizes: a refusal, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from client.config import WHOLE_SITE, PolicySection
from client.privacy.budget import fits
from client.privacy.ledger import Population
from common.messages import PrivacyStatement, RefusalReason
from common.plan import Plan
from common.privacy.accounting import default_delta
from common.signing import PLAN, verify

LEAST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-6, 1e6
"""Beyond them rounding in fp32 could let a clipped gradient exceed the clip norm noticeably."""
FAMILY_DEFAULT = "attention"
"""In ``policy.lora_targets``: a plan that names no modules, which means the family's query and value."""
LEAST_NOISE = 1e-9
"""A bound that no calibrated noise falls below."""


@dataclass(frozen=True)
class Policy:
    """What this site allows, with its public sizes resolved to numbers."""

    section: PolicySection
    populations: Mapping[str, Population]
    data: Mapping[str, str]
    """Data set → population."""

    def population_of(self, plan: Plan) -> Population:
        """Whose budget a plan is charged to; the whole site's for data the site does not know."""
        name = self.data.get(plan.data, WHOLE_SITE)
        return self.populations.get(name) or next(iter(self.populations.values()))

    def signed(self, plan_digest: str, signature: str) -> bool:
        """Whether a pinned coordinator key signed the plan."""
        message = plan_digest.encode()
        return any(verify(key, PLAN, message, signature) for key in self.section.coordinator_keys)

    def refusal(self, plan: Plan) -> RefusalReason | None:
        """Why the plan cannot run here; ``None`` if the policy allows it. Looks at no data."""
        allowed = (
            plan.data in self.data
            and plan.model_digest in self.section.base_models
            and plan.task.name in self.section.tasks
            and set(plan.lora.target_modules or (FAMILY_DEFAULT,)) <= set(self.section.lora_targets)
            and plan.rank_at(self.section.max_rank) <= self.section.max_rank
            and plan.privacy.unit == self.population_of(plan).unit
            and set(plan.privacy.metrics) <= set(self.section.metrics)
            and _bounds_each_unit(plan)
            and self._allows_privacy(plan)
        )
        if not allowed:
            return RefusalReason.POLICY
        return None if fits(plan, self.population_of(plan).public_size) else RefusalReason.TOO_SMALL

    def too_quiet(self, statement: PrivacyStatement) -> bool:
        """Whether a phase, as calibrated, adds less noise than the site asks for."""
        return statement.epsilon is not None and any(
            phase.noise_multiplier < self.section.min_noise_multiplier for phase in statement.phases
        )

    def _allows_privacy(self, plan: Plan) -> bool:
        if plan.privacy.mechanism == "none":
            return self.section.allow_no_privacy
        if self.section.secure_noise and plan.privacy.noise != "secure":
            return False
        assert plan.privacy.epsilon is not None
        delta = plan.privacy.delta or default_delta(self.population_of(plan).public_size)
        return plan.privacy.epsilon <= self.section.max_epsilon and delta <= self.section.max_delta


def policy_for(
    plan: Plan, public_size: int, coordinator: str, lifetime_epsilon: float = 1e6, max_rank: int | None = None
) -> Policy:
    """A policy that allows one plan and nothing else: for a simulated or audited site, whose people are not asked.

    Args:
        coordinator: the public key that signs the plan.
        max_rank: the site's largest LoRA rank; empty: the plan's.
    """
    section = PolicySection(
        base_models=(plan.model_digest,),
        tasks=(plan.task.name,),
        lora_targets=plan.lora.target_modules or (FAMILY_DEFAULT,),
        max_rank=max_rank or plan.lora.r,
        max_epsilon=plan.privacy.epsilon or 1.0,
        max_delta=1e-3,
        min_noise_multiplier=LEAST_NOISE,
        secure_noise=plan.privacy.noise == "secure",
        metrics=plan.privacy.metrics,
        coordinator_keys=(coordinator,),
        allow_no_privacy=plan.privacy.mechanism == "none",
        approval="automatic",
    )
    population = Population(WHOLE_SITE, plan.privacy.unit, public_size, lifetime_epsilon, 1e-5)
    return Policy(section, {WHOLE_SITE: population}, {plan.data: WHOLE_SITE})


def _bounds_each_unit(plan: Plan) -> bool:
    """Whether one unit moves a step's sum by the clip norm at most. A further unit would take the dropout masks of the
    next one, and so change what all units after it contribute."""
    if plan.privacy.mechanism != "none" and plan.lora.dropout:
        return False
    return all(LEAST_CLIP_NORM <= phase.clip_norm <= LARGEST_CLIP_NORM for phase in plan.phases)


def rounded(size: int) -> int:
    """Rounded down to two significant digits: what a site may declare instead of its exact size."""
    unit: int = 10 ** max(0, len(str(size)) - 2)
    return max(1, size // unit * unit)
