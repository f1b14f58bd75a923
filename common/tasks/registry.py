"""All tasks, each by one import line. Import ``task_of`` from here so that every task is registered."""

from __future__ import annotations

from common.sections import TaskSection
from common.tasks import causal_lm, sequence_classification
from common.tasks.base import Task, create, known_tasks

__all__ = ["causal_lm", "known_tasks", "sequence_classification", "task_of"]


def task_of(settings: TaskSection) -> Task:
    """The task the settings name.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    return create(settings)
