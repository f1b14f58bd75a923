"""Evaluation of the global adapter on data the server holds itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.adapted import AdaptedModel
from common.data.load import encode_all, load_rows
from common.data.read import Rows, has_split, is_file
from common.data.split import count, select
from common.errors import ConfigError, did_you_mean
from common.examples import Examples
from common.messages import Tensors
from common.tasks.base import Generates, Scores

LOWER_IS_BETTER = ("loss", "perplexity")
PROPORTION = "accuracy"
"""The metric that is a share of the examples, so that its standard error is known."""
ROWS = 32
"""Rows of a physical batch in evaluation."""
MOST_SITES = 1000
"""With more sites in a split its metrics are not given by site: each takes a millisecond or two."""
MOST_SITES_BY_ROUND = 50
"""With more sites in a split a round's record has no metric by site: every checkpoint holds the record of each round so
far, so that it would grow with sites × rounds, and nobody compares more lines."""


@dataclass(frozen=True)
class HeldOut:
    """One split of the server's own data."""

    examples: Examples
    rows: Rows
    sites: tuple[str, ...] = ()
    """Which site each row is like, as the site column names it, or empty; no entries where there is no such column."""

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
    site_column: str | None = None,
) -> HeldOut:
    """Reads and encodes one split.

    Args:
        unit_column: of a single file that is also learnt from: the privacy unit, all of whose rows are in one split.
        site_column: which site each row is like. A split without this column is evaluated as a whole.

    Raises:
        DataError: missing, empty, or with rows that cannot be evaluated.
    """
    loaded = load_rows(source, split, model.task, columns, site_column, unit_column, sites_needed=False)
    rows, sites = loaded.rows, tuple("" if site is None else str(site) for site in loaded.sites)
    if limit is not None and count(rows) > limit:
        rows, sites = select(rows, range(limit)), sites[:limit]
    return HeldOut(encode_all(rows, model.task, model.base.tokenizer, f"{source} ({split})"), rows, sites)


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

    def evaluate(self, adapter: Tensors, split: str) -> dict[str, float]:
        """The metrics of one split, those of answers in free text among them."""
        return self.metrics_of(self.scores(adapter, split), **self.generated(adapter, split))

    def measured(self, adapter: Tensors, split: str) -> dict[str, Any]:
        """Entries of a round's record, from one forward pass: ``metrics`` as above and, where the rows name sites,
        ``by_site``, the run's metric on the rows of each. Nothing is chosen by the latter."""
        scores = self.scores(adapter, split)
        by_site = self.metric_by_site(scores, split)
        metrics = self.metrics_of(scores, **self.generated(adapter, split))
        return {"metrics": metrics, **({"by_site": by_site} if by_site else {})}

    def scores(self, adapter: Tensors, split: str) -> Scores:
        """What all of an adapter's figures are computed from, by row in the order of the split: one forward pass."""
        data = self.splits[split]
        self.model.load(adapter)
        cut = self.model.cut_for(
            (name for name in self.model.spec.names if self.model.group_of(name) == "head"), adapter
        )
        parts: list[Scores] = []
        order: list[npt.NDArray[np.int64]] = []
        with torch.no_grad():
            for batch in data.examples.batches(np.arange(len(data.examples)), ROWS, self.model, cut):
                logits = self.model.top(batch.inputs, batch.mask, cut)[: len(batch.indices)]
                parts.append(self.model.task.score(logits, batch.targets[: len(batch.indices)]))
                order.append(batch.indices)
        row = np.argsort(np.concatenate(order))
        return {key: np.concatenate([part[key] for part in parts])[row] for key in parts[0]}

    def generated(self, adapter: Tensors, split: str) -> dict[str, float]:
        """Metrics of answers in free text to the first examples of a split; empty where none are asked for."""
        if not (self.generate and isinstance(self.model.task, Generates)):
            return {}
        self.model.load(adapter)
        data = self.splits[split]
        rows = select(data.rows, range(min(self.generate, count(data.rows))))
        return self.model.task.generated_metrics(self.model.network, self.model.base.tokenizer, rows)

    def metrics_of(self, scores: Scores, **generated: float) -> dict[str, float]:
        """The metrics of all rows that were scored, ``examples`` (their number) among them.

        Args:
            generated: metrics of answers in free text, to stand beside them.
        """
        examples = len(next(iter(scores.values())))
        return {**self.model.task.metrics(scores), **generated, "examples": float(examples)}

    def by_site(self, scores: Scores, split: str) -> dict[str, dict[str, float]]:
        """The metrics of the rows that are like each site's.

        Args:
            scores: of this split.

        Returns:
            site → metrics, in name order; empty where the split has no site column, or of too many sites. Rows that
            name no site are left out.
        """
        site = np.array(self.splits[split].sites)
        return {
            name: self.metrics_of({key: values[site == name] for key, values in scores.items()})
            for name in self.sites(split)
        }

    def metric_by_site(self, scores: Scores, split: str) -> dict[str, float]:
        """The run's metric, to four digits, on the rows that are like each site's.

        Args:
            scores: of this split.

        Returns:
            site → value, in name order; empty where the split has no site column, or too many sites for a record of
            each round, and where the metric is of answers in free text.
        """
        names, right = self.sites(split), self.right(scores)
        if len(names) > MOST_SITES_BY_ROUND:
            return {}
        if self.metric == PROPORTION and right is not None:  # without the other metrics, which take 100 times as long
            site, correct = np.array(self.splits[split].sites), np.array(right)
            return {name: round(float(correct[site == name].mean()), 4) for name in names}
        found = self.by_site(scores, split)
        return {name: round(metrics[self.metric], 4) for name, metrics in found.items() if self.metric in metrics}

    def sites(self, split: str) -> tuple[str, ...]:
        """Which sites a split is told apart by, in name order."""
        names = sorted({name for name in self.splits[split].sites if name})
        return () if len(names) > MOST_SITES else tuple(names)

    def right(self, scores: Scores) -> list[bool] | None:
        """Whether each row is answered rightly; ``None`` where no answer is right or wrong."""
        if not {"predicted", "label"} <= scores.keys():
            return None
        return [bool(right) for right in scores["predicted"] == scores["label"]]

    def standard_error(self, metrics: Mapping[str, float]) -> float | None:
        """Of an accuracy p on n examples, √(p(1 - p)/n); ``None`` where the metric is no proportion."""
        if self.metric != PROPORTION:
            return None
        return sqrt(max(0.0, metrics[self.metric] * (1 - metrics[self.metric]) / metrics["examples"]))

    def better(self, new: float, best: float | None) -> bool:
        """Whether a metric's value beats the best so far. NaN never does, and anything else beats NaN."""
        if isnan(new):
            return False
        if best is None or isnan(best):
            return True
        return new > best if self.higher_is_better else new < best
