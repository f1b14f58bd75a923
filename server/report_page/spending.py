"""What of the plan's ε each site has really spent, round by round, as far as the coordinator can know.

The plan's whole ε is charged when a site approves it, whatever is executed later. Beside it stands the ε of the rounds
in which the site may have made a release, by the same accountant. A late or rejected reply counts: its ε is spent. A
refused request does not, since nothing was computed; only a round whose secret was lost had been paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import RefusalReason
from common.privacy.accounting import Segment, epsilon
from common.sections import PhaseSection
from server.report_page.participation import Outcome, outcome_of
from server.report_page.records import Round

MOST_CURVES = 8
"""Sites whose ε is followed round by round."""
MOST_POINTS = 25
"""Of one such curve."""


@dataclass(frozen=True)
class Spending:
    """One site's account in this run."""

    site: str
    public_size: int
    unit: str
    delta: float | None
    stated: float | None
    """ε of the whole plan; ``None``: none is claimed."""
    phases: tuple[Mapping[str, Any], ...]
    """Sampling rate, noise multiplier, clip norm and steps of each phase."""
    rounds: int
    """Rounds in which the site may have made a release."""
    executed: float | None
    """ε of those rounds."""

    def phase(self, name: str) -> Mapping[str, Any] | None:
        """What the site states of one phase."""
        return next((phase for phase in self.phases if phase["name"] == name), None)


@dataclass(frozen=True)
class Curve:
    """ε of one site over the rounds."""

    site: str
    points: tuple[tuple[int, float], ...]


def may_have_released(record: Round, site: str) -> bool:
    """Whether the site may have made a release in this round."""
    outcome, reason = outcome_of(record, site)
    if outcome is Outcome.REFUSED:
        return reason == RefusalReason.SEED_LOST
    return outcome is not Outcome.NOT_ASKED


def spending(
    site: str, description: Mapping[str, Any], phases: Sequence[PhaseSection], rounds: Sequence[Round]
) -> Spending:
    """A site's account from its own description and the run's rounds."""
    statement = description.get("privacy") or {}
    executed = [record for record in rounds if may_have_released(record, site)]
    return Spending(
        site=site,
        public_size=int(description["public_size"]),
        unit=str(statement.get("unit", "")),
        delta=statement.get("delta"),
        stated=statement.get("epsilon"),
        phases=tuple(statement.get("phases", ())),
        rounds=len(executed),
        executed=_epsilon(statement, phases, executed),
    )


def curves(
    sites: Mapping[str, Mapping[str, Any]], phases: Sequence[PhaseSection], rounds: Sequence[Round]
) -> tuple[Curve, ...]:
    """ε by round of every site; of many sites, those of the smallest and largest declared sizes."""
    stated = [site for site, one in sites.items() if (one.get("privacy") or {}).get("epsilon") is not None]
    if len(stated) > MOST_CURVES:
        by_size = sorted(stated, key=lambda site: int(sites[site]["public_size"]))
        stated = sorted({*by_size[: MOST_CURVES // 2], *by_size[-MOST_CURVES // 2 :]})
    every = -(-len(rounds) // MOST_POINTS) or 1
    looked_at = [index for index in range(len(rounds)) if (index + 1) % every == 0 or index == len(rounds) - 1]
    found = []
    for site in stated:
        points = [(0, 0.0)]
        for index in looked_at:
            executed = [record for record in rounds[: index + 1] if may_have_released(record, site)]
            value = _epsilon(sites[site]["privacy"], phases, executed)
            points.append((int(rounds[index]["round"]), value or 0.0))
        found.append(Curve(site, tuple(points)))
    return tuple(found)


def _epsilon(statement: Mapping[str, Any], phases: Sequence[PhaseSection], executed: Sequence[Round]) -> float | None:
    """ε of the executed rounds by the accountant of record; ``None`` where none is claimed."""
    if statement.get("epsilon") is None or statement.get("delta") is None:
        return None
    steps = {phase.name: phase.steps for phase in phases}
    segments = [
        Segment(stated["sample_rate"], stated["noise_multiplier"], count * steps[stated["name"]])
        for stated in statement["phases"]
        if (count := sum(record["phase"] == stated["name"] for record in executed))
    ]
    return epsilon(segments, float(statement["delta"]))
