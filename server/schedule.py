"""Which rounds are evaluated, and which round comes next."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.plan import Plan
from common.sections import EvaluationSection
from server.selection import Record, Selection

log = logging.getLogger(__name__)


class Schedule:
    """See ``evaluation.every`` and ``evaluation.patience``.

    It follows from the plan, the settings and the finished rounds alone, so a resumed run has the same one.
    """

    def __init__(self, plan: Plan, settings: EvaluationSection, selection: Selection) -> None:
        self.plan, self.every, self.patience, self.selection = plan, settings.every, settings.patience, selection

    def evaluates(self, round: int) -> bool:
        """Whether the global adapter is evaluated after a round (from 1): every k-th of its phase, and the last."""
        turn = self.plan.round_of_phase(round)
        return turn % self.every == 0 or turn == self.plan.phase_of(round).rounds

    def next_round(self, history: Sequence[Record]) -> int:
        """The round after the last of the history; that of the next phase where the phase stops early.

        Early stopping ends a phase, not the run. Spent ε is not refunded.
        """
        following = int(history[-1]["round"]) + 1
        if not self._has_stalled(history):
            return following
        phase = history[-1]["phase"]
        log.info("phase '%s' stopped early after round %d", phase, following - 1)
        while following <= self.plan.rounds and self.plan.phase_of(following).name == phase:
            following += 1
        return following

    def _has_stalled(self, history: Sequence[Record]) -> bool:
        """Whether so many rounds of the phase, evaluated or not, have passed since the best one. Asked after an
        evaluation only: what was not measured is no reason to stop."""
        last = history[-1]
        if self.patience is None or not last["metrics"]:
            return False
        done = len([record for record in history if record["phase"] == last["phase"]])
        since_best = int(last["round"]) - int(self.selection.best(history)["round"])
        return min(done, since_best) >= self.patience
