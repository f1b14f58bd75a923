"""The site's policy as a pure function of policy, plan and declared size: a refusal, or none."""

from __future__ import annotations

from dataclasses import dataclass

from client.config import PolicySection
from client.privacy.budget import fits
from common.messages import RefusalReason
from common.plan import Plan
from common.privacy.accounting import default_delta

LEAST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-6, 1e6
"""Beyond them rounding in fp32 could let a clipped gradient exceed the clip norm noticeably."""


@dataclass(frozen=True)
class Policy:
    """What this site allows, with its public size resolved to a number."""

    public_size: int
    section: PolicySection
    data_names: tuple[str, ...]
    model_digests: tuple[str, ...]

    def refusal(self, plan: Plan) -> RefusalReason | None:
        """Why the plan cannot run here; ``None`` if the policy allows it. Looks at no data."""
        allowed = (
            plan.data in self.data_names
            and plan.model_digest in self.model_digests
            and plan.task.name in self.section.tasks
            and plan.lora.r <= self.section.max_rank
            and plan.privacy.unit == self.section.unit
            and _clips_soundly(plan)
            and self._allows_privacy(plan)
        )
        if not allowed:
            return RefusalReason.POLICY
        return None if fits(plan, self.public_size) else RefusalReason.TOO_SMALL

    def _allows_privacy(self, plan: Plan) -> bool:
        if plan.privacy.mechanism == "none":
            return self.section.allow_no_privacy
        if self.section.secure_noise and plan.privacy.noise != "secure":
            return False
        assert plan.privacy.epsilon is not None
        delta = plan.privacy.delta or default_delta(self.public_size)
        return plan.privacy.epsilon <= self.section.max_epsilon and delta <= self.section.max_delta


def _clips_soundly(plan: Plan) -> bool:
    return all(LEAST_CLIP_NORM <= phase.clip_norm <= LARGEST_CLIP_NORM for phase in plan.phases)


def rounded(size: int) -> int:
    """Rounded down to two significant digits: what a site may declare instead of its exact size."""
    unit: int = 10 ** max(0, len(str(size)) - 2)
    return max(1, size // unit * unit)
