"""What the page says, as data: also the answer to ``consilium report --json``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from common.sections import PhaseSection
from server.report_page.participation import Participation, participation
from server.report_page.records import Records, Round
from server.report_page.spending import Curve, Spending, curves, spending

Metrics = Mapping[str, float | None]
ALONE = "alone-"
NO_PRIVACY = "no-privacy"
"""How ``simulation.compare`` calls the folders of its runs."""


class Status(StrEnum):
    """How far a run has come."""

    COMPLETED = "completed"
    RUNNING = "running"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    """No result and no error: a simulation may be at work, or somebody stopped it."""


@dataclass(frozen=True)
class Phase:
    """One phase as planned, and what came of it."""

    settings: PhaseSection
    rounds: int
    """Finished ones."""
    bytes_down: int
    bytes_up: int
    seconds: Mapping[str, float]
    """Of each part of a round, summed."""


@dataclass(frozen=True)
class Scores:
    """One model's metrics on the coordinator's held-out splits."""

    title: str
    validation: Metrics | None
    test: Metrics | None


@dataclass(frozen=True)
class SiteScores:
    """Base and best model on the held-out rows that are like one site's."""

    site: str
    examples: int
    base: Metrics
    best: Metrics


@dataclass(frozen=True)
class BySite:
    """How evenly the sites are served."""

    split: str
    sites: tuple[SiteScores, ...]
    """The worst served first."""
    spread: float
    """Best minus worst."""
    worse_than_base: tuple[str, ...]


@dataclass(frozen=True)
class Course:
    """The model, round by round, on the validation rows that are like one site's."""

    site: str
    points: tuple[tuple[int, float | None], ...]
    """Each evaluated round and the metric after it."""

    @property
    def last(self) -> float | None:
        """The metric after the last evaluated round."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Arm:
    """A run for comparison, on the coordinator's validation split."""

    title: str
    alone: bool
    """One site without the others."""
    points: tuple[tuple[int, float | None], ...]
    """Round and metric."""
    best: float | None


@dataclass(frozen=True)
class Content:
    """Everything the page shows."""

    records: Records
    status: Status
    metric: str
    higher_is_better: bool
    best_round: int
    planned_rounds: int
    rounds: tuple[Round, ...]
    """Without the evaluation before round 1."""
    phases: tuple[Phase, ...]
    scores: tuple[Scores, ...]
    arms: tuple[Arm, ...]
    by_site: BySite | None
    courses: tuple[Course, ...]
    """The worst served after the last evaluated round first; none where the rows name no site."""
    accounts: tuple[Spending, ...]
    curves: tuple[Curve, ...]
    participation: Participation
    settings_digest: str
    """SHA-256 of run.toml as it stands."""

    def score(self, title: str) -> Scores | None:
        """One model's metrics, if it has been measured."""
        return next((one for one in self.scores if one.title == title), None)

    @property
    def told(self) -> tuple[str, ...]:
        """The metrics that the sites tell of their own training data."""
        return tuple(dict.fromkeys(name for record in self.rounds for name in record.get("site_metrics", ())))


def content_of(records: Records) -> Content:
    """Computes what is not in the files as such."""
    summary: Mapping[str, Any] = records.summary or {}
    metric, higher = _metric(records)
    rounds = tuple(record for record in records.rounds if record["round"] > 0)
    phases = records.config.phases
    return Content(
        records=records,
        status=_status(records),
        metric=metric,
        higher_is_better=higher,
        best_round=int(summary.get("best_round", _best(records.rounds, metric, higher)[0])),
        planned_rounds=sum(phase.rounds for phase in phases),
        rounds=rounds,
        phases=tuple(_phase(phase, rounds) for phase in phases),
        scores=_scores(records, metric, higher),
        arms=tuple(_arm(name, history, metric, higher) for name, history in records.arms.items()),
        by_site=_by_site(summary.get("by_site"), metric, higher),
        courses=_courses(records.rounds, higher),
        accounts=tuple(spending(site, one, phases, rounds) for site, one in sorted(records.sites.items())),
        curves=curves(records.sites, phases, rounds),
        participation=participation(sorted(_everybody(records)), rounds, summary.get("absent", {})),
        settings_digest=hashlib.sha256(records.toml.encode()).hexdigest(),
    )


def as_object(content: Content) -> dict[str, Any]:
    """The content as plain data."""
    records = content.records
    return {
        "run_id": records.manifest.get("run_id"),
        "kind": records.manifest.get("kind"),
        "status": content.status,
        "error": records.error,
        "started": records.manifest.get("started"),
        "finished": (records.summary or {}).get("finished"),
        "mechanism": records.config.privacy.mechanism,
        "epsilon": records.config.privacy.epsilon if records.config.privacy.mechanism != "none" else None,
        "metric": content.metric,
        "higher_is_better": content.higher_is_better,
        "best_round": content.best_round,
        "planned_rounds": content.planned_rounds,
        "finished_rounds": len(content.rounds),
        "scores": [vars(one) for one in content.scores],
        "arms": [vars(one) for one in content.arms],
        "by_site": content.by_site and {**vars(content.by_site), "sites": [vars(one) for one in content.by_site.sites]},
        "phases": [{**vars(one), "settings": one.settings.model_dump(mode="json")} for one in content.phases],
        "rounds": list(content.rounds),
        "privacy_by_site": [vars(one) for one in content.accounts],
        "epsilon_by_round": [vars(one) for one in content.curves],
        "outcomes": dict(content.participation.totals),
        "missed": [{**vars(one), "in_words": one.in_words} for one in content.participation.missed],
        "absent": dict(content.participation.absent),
        "settings_digest": content.settings_digest,
        "manifest": dict(records.manifest),
    }


def _status(records: Records) -> Status:
    if records.summary is not None:
        return Status.COMPLETED
    if records.working:
        return Status.RUNNING
    return Status.FAILED if records.error is not None else Status.UNFINISHED


def _metric(records: Records) -> tuple[str, bool]:
    """The metric that chooses the best round, and whether more of it is better."""
    if {"metric", "higher_is_better"} <= records.manifest.keys():
        return str(records.manifest["metric"]), bool(records.manifest["higher_is_better"])
    from server.evaluation import LOWER_IS_BETTER  # an older folder; it imports torch

    measured = records.rounds[0]["metrics"] if records.rounds else {}
    usual = next((name for name in ("accuracy", "perplexity") if name in measured), "loss")
    name = str((records.summary or {}).get("metric") or records.config.evaluation.metric or usual)
    return name, name not in LOWER_IS_BETTER


def _best(rounds: Sequence[Round], metric: str, higher: bool) -> tuple[int, float | None]:
    """Number and value of the best round; of equal ones the first, as the run itself chooses."""
    known = [(number, value) for number, value in values_by_round(rounds, metric) if value is not None]
    if not known:
        return 0, None
    return max(known, key=lambda pair: (pair[1] if higher else -pair[1], -pair[0]))


def values_by_round(rounds: Sequence[Round], metric: str) -> tuple[tuple[int, float | None], ...]:
    """Round and value of the rounds that were evaluated; a value of ``None`` is no number."""
    return tuple((int(one["round"]), _number(one["metrics"].get(metric))) for one in rounds if one["metrics"])


def _number(value: Any) -> float | None:
    """``None`` also for what is no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _phase(phase: PhaseSection, rounds: Sequence[Round]) -> Phase:
    own = [record for record in rounds if record["phase"] == phase.name]
    parts = dict.fromkeys(part for record in own for part in record["seconds"])
    return Phase(
        settings=phase,
        rounds=len(own),
        bytes_down=sum(record["bytes_down"] for record in own),
        bytes_up=sum(record["bytes_up"] for record in own),
        seconds={part: sum(record["seconds"].get(part, 0.0) for record in own) for part in parts},
    )


def _scores(records: Records, metric: str, higher: bool) -> tuple[Scores, ...]:
    summary: Mapping[str, Any] = records.summary or {}
    if compared := summary.get("comparison"):
        return tuple(
            Scores(_title(name, entry), entry.get("validation"), entry.get("test")) for name, entry in compared.items()
        )
    if not records.rounds:
        return ()
    number, _ = _best(records.rounds, metric, higher)
    best = summary.get("validation") or next(one["metrics"] for one in records.rounds if one["round"] == number)
    return (
        Scores(BASE, records.rounds[0]["metrics"], None),
        Scores(TRAINED, best, summary.get("test")),
    )


BASE = "before training"
TRAINED = "after training together"


def _title(name: str, entry: Mapping[str, Any]) -> str:
    known = {"base": BASE, "federated": TRAINED, "federated_without_privacy": "together, without privacy"}
    return f"best single site: {entry['site']}" if "site" in entry else known.get(name, name.replace("_", " "))


def _arm(name: str, history: Sequence[Round], metric: str, higher: bool) -> Arm:
    alone = name.startswith(ALONE)
    title = f"{name.removeprefix(ALONE)} alone" if alone else name
    title = "all sites together, without privacy" if name == NO_PRIVACY else title
    return Arm(title, alone, values_by_round(history, metric), _best(history, metric, higher)[1])


def _by_site(found: Mapping[str, Any] | None, metric: str, higher: bool) -> BySite | None:
    if not found:
        return None
    sites = [
        SiteScores(site, int(one["best"]["examples"]), one["base"], one["best"]) for site, one in found["sites"].items()
    ]
    valued = [(one, value) for one in sites if (value := _number(one.best.get(metric))) is not None]
    if not valued:
        return None
    valued.sort(key=lambda pair: pair[1] if higher else -pair[1])
    worse = [
        one.site
        for one, value in valued
        if (before := _number(one.base.get(metric))) is not None and (value < before if higher else value > before)
    ]
    return BySite(found["split"], tuple(one for one, _ in valued), abs(valued[-1][1] - valued[0][1]), tuple(worse))


def _courses(rounds: Sequence[Round], higher: bool) -> tuple[Course, ...]:
    told = [record for record in rounds if record.get("by_site")]
    if not told or told[-1]["round"] == 0:
        return ()
    courses = [
        Course(site, tuple((int(one["round"]), _number(one["by_site"].get(site))) for one in told))
        for site in told[-1]["by_site"]
    ]
    known = [(one, one.last) for one in courses if one.last is not None]
    unknown = [one for one in courses if one.last is None]
    return (*(one for one, _ in sorted(known, key=lambda pair: pair[1] if higher else -pair[1])), *unknown)


def _everybody(records: Records) -> set[str]:
    return {*records.sites, *(site for record in records.rounds for site in record.get("cohort", ()))}
