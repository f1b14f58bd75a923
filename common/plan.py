"""The plan: everything about a run that touches privacy, as one value with one canonical digest.

A site agrees to a plan, not to single requests. The digest is SHA-256 over canonical JSON (sorted keys, no spaces, no
floats formatted by hand), so that coordinator and site cannot mean different things by it. A changed plan is a new
plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from common.algorithms import LOCAL_RULES
from common.config import SCHEMA_VERSION, RunConfig
from common.errors import WireError
from common.sections import LoraSection, PhaseSection, PrivacySection, Section, TaskSection, WireSection


class Plan(Section):
    """What a site is asked to agree to."""

    schema_version: int = SCHEMA_VERSION
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,159}$")]
    """One plan funds one run; the same settings under another run id are another plan."""
    seed: int
    """Public seed: initialisation and cohorts only."""
    data: str
    """Which of the site's data sets is asked for, by name."""
    model_digest: str
    task: TaskSection
    lora: LoraSection
    privacy: PrivacySection
    phases: tuple[PhaseSection, ...]
    wire: WireSection = WireSection()
    adapter_digest: str
    """Digest of the adapter's layout (:class:`common.adapter.AdapterSpec`)."""
    code_digest: str
    """Digest of the code that both sides must run (:mod:`common.code`)."""
    neighbouring: Literal["add-remove-one"] = "add-remove-one"
    accountant: Literal["prv"] = "prv"

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names = {phase.name for phase in self.phases}
        if not names or len(names) != len(self.phases):  # a site looks up what it calibrated by the phase's name
            raise ValueError("phases: there are none, or two have the same name")
        return self

    @property
    def rounds(self) -> int:
        """Rounds of all phases."""
        return sum(phase.rounds for phase in self.phases)

    def phase_of(self, round: int) -> PhaseSection:
        """The phase a round (from 1) belongs to. The round index alone selects it.

        Raises:
            IndexError: the round lies outside the plan.
        """
        first = 1
        for phase in self.phases:
            if first <= round < first + phase.rounds:
                return phase
            first += phase.rounds
        raise IndexError(f"round {round} lies outside the plan's {self.rounds} rounds")

    def round_of_phase(self, round: int) -> int:
        """Which round of its phase a round (from 1) is, from 1.

        Raises:
            IndexError: the round lies outside the plan.
        """
        phase, first = self.phase_of(round), round
        while first > 1 and self.phase_of(first - 1).name == phase.name:
            first -= 1
        return round - first + 1

    def rank_at(self, max_rank: int) -> int:
        """The LoRA rank of a site that allows at most ``max_rank``: its own where every phase's algorithm lets it
        choose, else the plan's, which it then refuses if that is larger."""
        rules = [LOCAL_RULES[phase.algorithm] for phase in self.phases if "lora" in phase.train]
        return max(1, min(self.lora.r, max_rank)) if all(rule.own_rank for rule in rules) else self.lora.r

    def canonical(self) -> str:
        """Canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def plan_of(config: RunConfig, run_id: str, model_digest: str, adapter_digest: str, code_digest: str) -> Plan:
    """The plan of a run."""
    return Plan(
        run_id=run_id,
        seed=config.run.seed,
        data=config.data.name,
        model_digest=model_digest,
        task=config.task,
        lora=config.lora,
        privacy=config.privacy.model_copy(update={"unit": config.unit}),
        phases=config.phases,
        wire=config.wire,
        adapter_digest=adapter_digest,
        code_digest=code_digest,
    )


def read_plan(canonical: str) -> Plan:
    """The plan from its canonical JSON.

    Raises:
        WireError: not a plan, not canonical, or of a newer schema.
    """
    try:
        tables = json.loads(canonical)
        if not isinstance(tables, Mapping):
            raise ValueError("not an object")
        if isinstance(version := tables.get("schema_version"), int) and version > SCHEMA_VERSION:
            raise WireError(f"plan: schema_version {version} is newer than this installation knows; update it")
        plan = Plan.model_validate_json(canonical)
    except (ValueError, ValidationError, RecursionError) as error:
        raise WireError(f"plan: cannot be read ({type(error).__name__}); coordinator and site must match") from None
    if plan.canonical() != canonical:
        raise WireError("plan: its JSON is not canonical; coordinator and site must run the same version")
    return plan
