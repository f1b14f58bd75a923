"""Which round's adapter a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import ConfigError
from server.evaluation import PROPORTION, Evaluator

Record = Mapping[str, Any]
ONE_STANDARD_ERROR = "one-standard-error"


class Selection:
    """By the metric on the server's validation split; see ``evaluation.selection``.

    Args:
        rule: ``best``, ``one-standard-error`` or ``auto``.
        private: whether the run is under DP, which decides ``auto``.

    Raises:
        ConfigError: the rule is asked for by name, and the metric has no standard error.
    """

    def __init__(self, evaluator: Evaluator, rule: str, private: bool) -> None:
        if rule == ONE_STANDARD_ERROR and evaluator.metric != PROPORTION:
            raise ConfigError(
                f"evaluation.selection = '{rule}': of evaluation.metric = '{evaluator.metric}' no standard error is "
                f"known; use evaluation.metric = '{PROPORTION}', or evaluation.selection = 'best'"
            )
        self.evaluator = evaluator
        self.doubts = rule == ONE_STANDARD_ERROR or (rule == "auto" and private)

    def keeps(self, record: Record, earlier: Sequence[Record]) -> bool:
        """Whether a finished round's adapter takes the place of the one kept so far; never one's that was not
        evaluated, and within doubt never one's that is no better than what its phase began with."""
        best = self.best(earlier)
        value, top = self._metric(record), self._metric(best)
        if self.evaluator.better(value, top):
            return True
        doubt = self.evaluator.standard_error(best["metrics"]) if self.doubts else None
        if doubt is None or not value >= top - doubt:
            return False
        return self.evaluator.better(value, self._metric(self._start_of_phase(record, earlier)))

    @staticmethod
    def _start_of_phase(record: Record, earlier: Sequence[Record]) -> Record:
        """The last evaluated record of another phase; round 0, the base, is a phase of its own."""
        return next(one for one in reversed(earlier) if one["phase"] != record["phase"] and one["metrics"])

    def best(self, history: Sequence[Record]) -> Record:
        """The first record with the best metric."""
        best = history[0]
        for record in history[1:]:
            if self.evaluator.better(self._metric(record), self._metric(best)):
                best = record
        return best

    def _metric(self, record: Record) -> float:
        value = record["metrics"].get(self.evaluator.metric)
        return float("nan") if value is None else float(value)
