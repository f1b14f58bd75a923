"""The default recipe of each task: what is trained where no ``[[phase]]`` is written."""

from __future__ import annotations

from common.sections import PhaseSection, PrivacySection, TaskSection


def _head(epsilon: float) -> PhaseSection:
    """Full-batch steps of the head on frozen features. Less noise allows longer steps."""
    return PhaseSection(
        name="head",
        rounds=60,
        sample_rate=1.0,
        train=("head",),
        learning_rate=round(26.0 * epsilon**0.75, 1),
        clip_norm=0.25,
        server_momentum=0.8,
        server_noise=0.06,
        server_refinement=True,
        budget_share=0.92,
    )


_UNCLIPPED_HEAD = _head(8.0).model_copy(update={"learning_rate": 512.0, "server_momentum": 0.9})
_LORA = PhaseSection(
    name="lora",
    rounds=4,
    sample_rate=0.05,
    train=("lora",),
    learning_rate=0.5,
    clip_norm=0.5,
    server_momentum=0.9,
    budget_share=0.08,
)
_UNCLIPPED_LORA = PhaseSection(
    name="lora",
    rounds=120,
    sample_rate=0.03,
    train=("lora",),
    algorithm="fedit",
    learning_rate=1.0,
    server_optimizer="adam",
    server_learning_rate=1.5e-4,
    server_momentum=0.9,
    server_adaptivity=1e-6,
)
"""One step a round of all sites together is one of Adam on their joint data. Its step does not depend on the length of
the update, so the sites' rate may be 1."""
_LANGUAGE = PhaseSection(name="lora", rounds=10, steps=4, sample_rate=0.05, train=("lora",), learning_rate=0.5)

RECIPES = ("sequence-classification", "causal-lm")
"""Tasks that have a default recipe."""


def default_phases(task: TaskSection, privacy: PrivacySection) -> tuple[PhaseSection, ...]:
    """The default recipe of a task; none for a task that has none.

    The head on frozen pooled features first, one full-batch step a round, from the label names; then FFA-LoRA, or
    without privacy, where features are mapped, LoRA by FedAdam. A clipped gradient is shorter than a free one, and
    mapped features are shorter than others, so each wants learning rates of its own. Chosen on validation data of
    medquad_qtype (benchmarks/utility.py); that choice is not charged to any ε.
    """
    if task.name == "causal-lm":
        return (_LANGUAGE,)
    if task.name != "sequence-classification":
        return ()
    if privacy.mechanism != "none" and privacy.epsilon is not None:
        return (_head(privacy.epsilon), _LORA)
    if task.feature_map == "none":
        return (_UNCLIPPED_HEAD.model_copy(update={"learning_rate": 8.0}), _LORA)
    return (_UNCLIPPED_HEAD, _UNCLIPPED_LORA)
