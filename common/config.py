"""Every setting of a run, typed and documented; :mod:`common.toml_settings` reads them.

``RunConfig`` is what a researcher or coordinator writes (``run.toml``). What touches privacy in it becomes the
:class:`common.plan.Plan` that sites agree to. Settings that belong to a site (paths, devices, public size) live in the
site's own ``site.toml`` (``client/config.py``); in a simulation ``[data]`` and ``[simulation]`` synthesise them.
"""

from __future__ import annotations

from pydantic import model_validator

from common.algorithms import LOCAL_RULES
from common.errors import did_you_mean
from common.phase_changes import changed
from common.recipes import RECIPES, default_phases
from common.sections import (
    EXAMPLE,
    DataSection,
    EvaluationSection,
    LoraSection,
    ModelSection,
    PhaseSection,
    PrivacySection,
    RunSection,
    Section,
    ServerSection,
    SimulationSection,
    TaskSection,
    WireSection,
)

SCHEMA_VERSION = 1


class RunConfig(Section):
    """A whole ``run.toml``."""

    schema_version: int = SCHEMA_VERSION
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: TaskSection
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    privacy: PrivacySection = PrivacySection()
    wire: WireSection = WireSection()
    server: ServerSection = ServerSection()
    evaluation: EvaluationSection = EvaluationSection()
    simulation: SimulationSection = SimulationSection()
    phase: tuple[PhaseSection, ...] = ()
    phase_changes: tuple[str, ...] = ()
    """Of the phases, the default recipe's too, e.g. ``phase.head.rounds=20``; ``--set`` puts them here."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.phases:
            raise ValueError(
                f"task.name = '{self.task.name}': has no default recipe{did_you_mean(self.task.name, RECIPES)}; "
                "correct the name, or write at least one [[phase]]"
            )
        if self.lora.dropout and self.privacy.mechanism != "none":
            raise ValueError(
                f"lora.dropout = {self.lora.dropout:g}: under differential privacy one unit more would change the "
                "masks of all others; leave it out"
            )
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError("phase: two phases have the same name")
        for phase in self.phases:
            if "head" in phase.train and self.task.name == "causal-lm":
                raise ValueError(f"phase '{phase.name}': 'head' cannot be trained for causal-lm; use train = ['lora']")
            if phase.layers and self.lora.layers and phase.layers > self.lora.layers:
                raise ValueError(
                    f"phase '{phase.name}': layers = {phase.layers} exceeds lora.layers = {self.lora.layers}"
                )
        return self

    @model_validator(mode="after")
    def _ranks_are_free(self) -> RunConfig:
        bound = [phase for phase in self.phases if "lora" in phase.train and not LOCAL_RULES[phase.algorithm].own_rank]
        least = min(self.simulation.ranks, default=self.lora.r)
        if bound and least < self.lora.r:
            raise ValueError(
                f"simulation.ranks: a site of rank {least} refuses phase '{bound[0].name}', whose algorithm "
                f"'{bound[0].algorithm}' needs lora.r = {self.lora.r} of everybody; use algorithm = 'flexlora'"
            )
        return self

    @property
    def unit(self) -> str:
        """The privacy unit's name."""
        return self.data.privacy_unit or self.privacy.unit if self.privacy.unit == EXAMPLE else self.privacy.unit

    @property
    def phases(self) -> tuple[PhaseSection, ...]:
        """The phases as written, or the task's default recipe where none is written, with their changes."""
        return changed(self.phase or default_phases(self.task, self.privacy), self.phase_changes)

    def without_privacy(self) -> RunConfig:
        """The same run without a mechanism; the default recipe, unless it was changed, gives way to that for gradients
        that are not clipped."""
        privacy = self.privacy.model_copy(update={"mechanism": "none"})
        usual = self.phases == default_phases(self.task, self.privacy)
        recipe = default_phases(self.task, privacy) if usual else self.phases
        return self.model_copy(update={"privacy": privacy, "phase": recipe, "phase_changes": ()})
