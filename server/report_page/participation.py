"""Who answered in which round, and why a reply did not count."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from common.messages import PlanStatus, RefusalReason
from server.admission import Rejection
from server.report_page.records import Round

MOST_COLUMNS = 40
"""Of the grid; longer runs show several rounds in one column."""
MOST_ROWS = 40
"""Of the grid; with more sites, those whose replies were missed most often."""


class Outcome(StrEnum):
    """What came of asking one site in one round."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    REJECTED = "rejected"
    LATE = "late"
    ABSENT = "absent"
    NOT_ASKED = "not asked"


REASONS: Mapping[str, str] = {
    RefusalReason.POLICY: "the site's policy does not allow what the plan asks for",
    RefusalReason.BUDGET: "the plan does not fit into the site's lifetime privacy budget",
    RefusalReason.TOO_SMALL: "the site's declared size is too small for the plan's batch",
    RefusalReason.UNKNOWN_PLAN: "the site has never been shown this plan",
    RefusalReason.PLAN_CHANGED: "the site knows this run with another plan",
    RefusalReason.SIGNATURE: "the plan is not signed by a key that the site trusts",
    RefusalReason.CODE_MISMATCH: "the site runs another version of the software",
    RefusalReason.CLOSED: "the plan has ended at the site",
    RefusalReason.BLOCKED: "the site has stopped itself; people there must look",
    RefusalReason.OUT_OF_ORDER: "the round lies before one already served, or outside the plan",
    RefusalReason.REQUEST_CHANGED: "the site has already served this round for another request",
    RefusalReason.ADAPTER_LAYOUT: "the adapter that was sent does not have the plan's form",
    RefusalReason.ADAPTER_MISSING: "the site no longer holds what was left out of the request",
    RefusalReason.MODEL: "the model cannot be trained privately in this way",
    RefusalReason.SEED_LOST: "the site could no longer make the release that the round had paid for",
    PlanStatus.WAITING: "people at the site have not decided on the plan yet",
    Rejection.UNREADABLE: "the reply was not a message of the agreed form",
    Rejection.NODE_ERROR: "no answer came from the site: it was not connected, or its software failed",
    Rejection.WRONG_SITE: "the reply named another site than the one asked",
    Rejection.FOREIGN: "the reply, or what the site states of itself, belongs to another run, plan or request",
    Rejection.STALE: "the reply belonged to another round",
    Rejection.DUPLICATE: "a second voice for the same site, or a copy of another site's reply",
    Rejection.LAYOUT: "the reply did not have the plan's form",
    Rejection.NOT_FINITE: "the reply held numbers that are none",
    Rejection.OVERSIZE: "the reply was larger than an honest one can be",
    Rejection.LATE: "no reply came before the deadline",
}
"""Every reason there is, for a reader who did not write the software."""


@dataclass(frozen=True)
class Row:
    """One site of the grid, with one cell per column."""

    site: str
    cells: tuple[Outcome, ...]
    """Of several rounds in one column: what most of the missed ones were, or admitted where none was missed."""
    asked: int
    admitted: int


@dataclass(frozen=True)
class Missed:
    """Replies of one site that did not count, for one reason."""

    site: str
    outcome: Outcome
    reason: str
    rounds: tuple[int, ...]

    @property
    def in_words(self) -> str:
        """The reason for a reader who did not write the software."""
        return REASONS.get(self.reason, self.reason)


@dataclass(frozen=True)
class Participation:
    """The grid of sites and rounds."""

    columns: tuple[tuple[int, int], ...]
    """First and last round of each column."""
    rows: tuple[Row, ...]
    left_out: int
    """Sites without a row; none of them missed more rounds than those with one."""
    missed: tuple[Missed, ...]
    totals: Mapping[str, int]
    """How often each outcome occurred, over all sites and rounds."""
    absent: Mapping[str, str]
    """Sites and nodes that did not take part at the end, with the reason."""


def outcome_of(record: Round, site: str) -> tuple[Outcome, str]:
    """What came of asking the site in a round, and the reason where its reply did not count."""
    if site in record["admitted"]:
        return Outcome.ADMITTED, ""
    if site in record["refused"]:
        return Outcome.REFUSED, str(record["refused"][site])
    if site in record["rejected"]:
        reason = str(record["rejected"][site])
        special = {Rejection.LATE: Outcome.LATE, Rejection.NODE_ERROR: Outcome.ABSENT}
        return next((outcome for code, outcome in special.items() if code == reason), Outcome.REJECTED), reason
    return Outcome.NOT_ASKED, ""


def participation(sites: Sequence[str], rounds: Sequence[Round], absent: Mapping[str, str]) -> Participation:
    """The grid of all sites, aggregated where it would not be readable.

    Args:
        rounds: without the evaluation before round 1.
    """
    table = {site: [outcome_of(record, site) for record in rounds] for site in sites}
    numbers = [int(record["round"]) for record in rounds]
    width = -(-len(rounds) // MOST_COLUMNS) or 1
    starts = range(0, len(rounds), width)
    rows = [
        Row(
            site,
            tuple(_joined([outcome for outcome, _ in cells[start : start + width]]) for start in starts),
            sum(outcome is not Outcome.NOT_ASKED for outcome, _ in cells),
            sum(outcome is Outcome.ADMITTED for outcome, _ in cells),
        )
        for site, cells in table.items()
    ]
    shown = {row.site for row in sorted(rows, key=lambda row: row.admitted - row.asked)[:MOST_ROWS]}
    together: defaultdict[tuple[str, Outcome, str], list[int]] = defaultdict(list)
    for site, cells in table.items():
        for number, (outcome, reason) in zip(numbers, cells, strict=True):
            if reason:
                together[site, outcome, reason].append(number)
    return Participation(
        columns=tuple((numbers[start], numbers[min(start + width, len(numbers)) - 1]) for start in starts),
        rows=tuple(row for row in rows if row.site in shown),
        left_out=len(rows) - len(shown),
        missed=tuple(
            Missed(site, outcome, reason, tuple(found)) for (site, outcome, reason), found in together.items()
        ),
        totals=Counter(str(outcome) for cells in table.values() for outcome, _ in cells),
        absent=dict(absent),
    )


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    missed = Counter(one for one in outcomes if one not in (Outcome.ADMITTED, Outcome.NOT_ASKED))
    if missed:
        return missed.most_common(1)[0][0]
    return Outcome.ADMITTED if Outcome.ADMITTED in outcomes else Outcome.NOT_ASKED
