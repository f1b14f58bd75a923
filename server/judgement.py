"""What the server's held-out data say about a finished adapter, which is scored on them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.prepare import TEST, Prepared
from server.rounds import VALIDATION, Result


@dataclass(frozen=True)
class Judgement:
    """Of the best adapter, on the test split where there is one. Nothing is chosen by it."""

    split: str
    """Which split that was."""
    test: Mapping[str, float] | None
    """Its metrics; ``None`` where there is no test split, since the best round's record has those of validation."""
    by_site: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Site → ``base`` and ``best`` → metrics on the rows that are like that site's; empty where no column names a
    site."""
    right: list[bool] | None
    """Whether each row is answered rightly, in the split's order; ``None`` where no answer is right or wrong."""


def judge(prepared: Prepared, result: Result) -> Judgement:
    """Scores a run's best adapter, once, and the one before round 1 where sites are told apart."""
    evaluator = prepared.evaluator
    split = TEST if TEST in evaluator.splits else VALIDATION
    scores = evaluator.scores(result.adapter, split)
    test, by_site = None, {}
    if split == TEST:
        test = evaluator.metrics_of(scores, **evaluator.generated(result.adapter, split))
    if evaluator.sites(split):
        base = evaluator.by_site(evaluator.scores(prepared.initial, split), split)
        best = evaluator.by_site(scores, split)
        by_site = {site: {"base": base[site], "best": best[site]} for site in best}
    return Judgement(split, test, by_site, evaluator.right(scores))
