"""What a task is: how rows become tokens and targets, the loss of one example, and the metrics.

A task is one file in this folder that registers itself with :func:`register`, plus one import line in
``common/tasks/registry.py``. The contract suite in ``tests/contract/test_tasks.py`` runs on every registered task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import ConfigError, did_you_mean
from common.sections import TaskSection

LogitsOf = Callable[[Sequence["Encoded | None"]], Sequence[torch.Tensor]]
"""Runs the adapted model on encoded rows and returns each row's logits, in order."""

Scores = dict[str, npt.NDArray[Any]]
"""Per-example results of an evaluation, one array [n] each."""


@dataclass(frozen=True)
class Encoded:
    """One example: token ids int32 [T] and its target (int64, 0-d or [T])."""

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be learnt from. Shown at the site only."""

    row: int
    field: str
    reason: str


@runtime_checkable
class Task(Protocol):
    """One kind of learning problem, bound to the plan's settings."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Data fields a row must have; ``data.columns`` maps them to columns."""
    peft_type: ClassVar[str]
    """PEFT's task type."""
    metric: ClassVar[str]
    """The metric that selects the best round, unless ``evaluation.metric`` names another."""
    metric_names: ClassVar[tuple[str, ...]]
    """All metrics of an evaluation."""
    selects_pooling: ClassVar[bool]
    """Whether token states are pooled into one feature vector before the head."""
    settings: TaskSection
    """``[task]`` of the plan."""

    def __init__(self, settings: TaskSection) -> None: ...

    def load_network(self, path: str, **options: Any) -> PreTrainedModel:
        """The base network in eval mode with the head this task needs."""
        ...

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Encoded | None], list[Fault]]:
        """Tokens and targets of each row; ``None`` and a fault where a row cannot be learnt from."""
        ...

    def collate(self, targets: Sequence[npt.NDArray[np.int64] | None], length: int) -> torch.Tensor:
        """Targets as one tensor; ``None`` stands for a dummy row. Shape [B] or [B, length]."""
        ...

    def per_example_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each example, fp32 [B]. It must not depend on the other rows of the batch."""
        ...

    def per_example_accuracy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Share of what each example asks for that is predicted right, fp32 [B], in [0, 1]; of no other row either."""
        ...

    def outcomes(self, network: PreTrainedModel) -> int:
        """Among how many labels or tokens a prediction chooses."""
        ...

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
        """Per-example results from which the metrics are computed; ``predicted`` and ``label`` among them where an
        answer is right or wrong."""
        ...

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The metrics of a whole split, ``loss`` among them."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A task that can be applied to rows without targets."""

    inputs: ClassVar[tuple[str, ...]]
    """Fields that are needed to predict."""

    def predict(
        self,
        logits_of: LogitsOf,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Any]],
    ) -> Iterator[dict[str, Any]]:
        """One answer per row, in order; ``{"error": …}`` for a row that cannot be read."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A task whose model answers in free text."""

    def generated_metrics(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Sequence[Any]]
    ) -> dict[str, float]:
        """Metrics of greedily generated answers against the references."""
        ...


_TASKS: dict[str, Callable[[TaskSection], Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Class decorator: makes a task known under its name."""
    _TASKS[task.name] = task
    return task


def known_tasks() -> tuple[str, ...]:
    """Names of all registered tasks."""
    return tuple(sorted(_TASKS))


def create(settings: TaskSection) -> Task:
    """The task the settings name.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    if settings.name not in _TASKS:
        raise ConfigError(
            f"task.name = '{settings.name}': unknown task{did_you_mean(settings.name, _TASKS)}; "
            f"known: {', '.join(known_tasks())}"
        )
    return _TASKS[settings.name](settings)
