"""Evaluation of the global adapter on data the server holds itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import torch

from common.adapted import AdaptedModel
from common.data.load import encode_all, load_rows
from common.data.read import Rows, has_split, is_file
from common.data.split import count, select
from common.errors import ConfigError, did_you_mean
from common.examples import Examples
from common.messages import Tensors
from common.tasks.base import Generates

LOWER_IS_BETTER = ("loss", "perplexity")
ROWS = 32
"""Rows of a physical batch in evaluation."""


@dataclass(frozen=True)
class HeldOut:
    """One split of the server's own data."""

    examples: Examples
    rows: Rows

    def digest(self) -> str:
        """SHA-256 of the rows' contents."""
        return hashlib.sha256(repr(sorted(self.rows.items())).encode()).hexdigest()


def held_out(
    model: AdaptedModel,
    source: str,
    split: str,
    columns: Mapping[str, str],
    limit: int | None,
    unit_column: str | None = None,
) -> HeldOut:
    """Reads and encodes one split.

    Args:
        unit_column: of a single file that is also learnt from: the privacy unit, all of whose rows are in one split.

    Raises:
        DataError: missing, empty, or with rows that cannot be evaluated.
    """
    rows = load_rows(source, split, model.task, columns, unit_column=unit_column).rows
    if limit is not None and count(rows) > limit:
        rows = select(rows, range(limit))
    return HeldOut(encode_all(rows, model.task, model.base.tokenizer, f"{source} ({split})"), rows)


def test_exists(source: str, split: str | None) -> bool:
    """Whether there is a test split to use at the end."""
    return bool(split) and (is_file(source) or has_split(source, split or ""))


class Evaluator:
    """Scores adapters on the server's splits; frozen features are cached once per split.

    Args:
        generate: how many examples of a split a language model answers in free text (ROUGE-L); 0 for none.

    Raises:
        ConfigError: the task has no metric of this name.
    """

    def __init__(self, model: AdaptedModel, splits: Mapping[str, HeldOut], metric: str = "", generate: int = 0) -> None:
        self.model, self.splits, self.generate = model, splits, generate
        self.metric = metric or model.task.metric
        known = [name for name in model.task.metric_names if generate or name != "rouge_l"]
        if self.metric not in known:
            raise ConfigError(
                f"evaluation.metric = '{self.metric}': this task has no such metric{did_you_mean(self.metric, known)}"
            )
        self.higher_is_better = self.metric not in LOWER_IS_BETTER

    def evaluate(
        self, adapter: Tensors, split: str, advance: Callable[[int], None] = lambda examples: None
    ) -> dict[str, float]:
        """The metrics of one split, ``examples`` (their number) among them.

        Args:
            advance: called with the number of examples just scored.
        """
        data = self.splits[split]
        self.model.load(adapter)
        cut = self.model.cut_for(
            (name for name in self.model.spec.names if self.model.group_of(name) == "head"), adapter
        )
        parts: list[dict[str, Any]] = []
        with torch.no_grad():
            for batch in data.examples.batches(np.arange(len(data.examples)), ROWS, self.model, cut):
                logits = self.model.top(batch.inputs, batch.mask, cut)[: len(batch.indices)]
                parts.append(self.model.task.score(logits, batch.targets[: len(batch.indices)]))
                advance(len(batch.indices))
        scores = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        metrics = self.model.task.metrics(scores)
        if self.generate and isinstance(self.model.task, Generates):
            rows = select(data.rows, range(min(self.generate, count(data.rows))))
            metrics |= self.model.task.generated_metrics(self.model.network, self.model.base.tokenizer, rows)
        return {**metrics, "examples": float(len(data.examples))}

    def better(self, new: float, best: float | None) -> bool:
        """Whether a metric's value beats the best so far. NaN never does, and anything else beats NaN."""
        if isnan(new):
            return False
        if best is None or isnan(best):
            return True
        return new > best if self.higher_is_better else new < best
