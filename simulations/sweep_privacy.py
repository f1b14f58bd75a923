"""What a whole sweep costs in privacy: the ε of all its runs together, at the worst site.

Choosing the best of several runs is a function of all of them, so a person in the data has only the ε of all runs
composed, whichever is kept. A run that was started counts with its whole plan, as a site's ledger would count it:
nothing is refunded for rounds that were skipped or not reached.

The account takes the runs for independent releases, each with noise of its own, as real sites draw it. The simulated
noise comes from seeds, and two cells of one seed share theirs: what a simulation writes is private against nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import OutputError
from common.privacy.accounting import Segment, epsilon
from simulations.records import read_record
from simulations.sweep_grid import Axis, Cell

ANY_SITE = "any site"
"""Where a person's site differs from run to run: the bound over all sites of each run."""

BY_ROW = ("data.", "simulation.")
"""Axes under these may deal the same people out to other sites."""


@dataclass(frozen=True)
class Spent:
    """What one site's part in one run costs: its whole plan, or (``None``) no privacy at all."""

    segments: tuple[Segment, ...] | None
    delta: float | None


@dataclass(frozen=True)
class Composed:
    """ε of all runs of a sweep together."""

    epsilon: float | None
    """At the worst site; ``None``: infinite, since some run was without privacy."""
    private_epsilon: float
    """Of the runs with privacy alone."""
    delta: float | None
    """``None``: no run was private."""
    site: str | None
    """The worst site of the private runs."""
    runs: int
    """Runs that were started."""
    private_runs: int


def spent_by(folder: Path) -> dict[str, Spent]:
    """Site → what its part in the run costs, as the site itself stated it when it took the plan.

    Raises:
        OutputError: the sites' statements are damaged.
    """
    file = folder / "sites.json"
    if not file.is_file():
        return {}
    sites = read_record(file)
    try:
        return {site: _spent(one["privacy"]) for site, one in sites.items() if one["privacy"]}
    except (KeyError, TypeError):
        raise OutputError(
            f"{file}: is damaged; restore it from a copy, or the ε of this run cannot be counted"
        ) from None


def _spent(statement: Mapping[str, Any]) -> Spent:
    if statement["epsilon"] is None:
        return Spent(None, None)
    phases = statement["phases"]
    segments = tuple(Segment(one["sample_rate"], one["noise_multiplier"], one["steps"]) for one in phases)
    return Spent(segments, statement["delta"])


def compose(runs: Sequence[Mapping[str, Spent]], same_sites: bool) -> Composed:
    """The accountant of record over all runs; δ is the smallest that any of a site's runs states.

    Args:
        runs: site → what it spent, for each run that was started.
        same_sites: whether a person is at the site of the same name in every run. Else each phase of a run counts with
            the largest q and the smallest σ of its sites, which costs no less than any of them.
    """
    started = [run if same_sites else {ANY_SITE: _worst(list(run.values()))} for run in runs if run]
    private = [{site: one for site, one in run.items() if one.segments is not None} for run in started]
    worst, worst_site, worst_delta = 0.0, None, None
    for site in sorted({site for run in private for site in run}):
        mine = [run[site] for run in private if site in run]
        delta = min(one.delta for one in mine if one.delta is not None)
        value = epsilon([segment for one in mine for segment in one.segments or ()], delta)
        if worst_site is None or value > worst:
            worst, worst_site, worst_delta = value, site, delta
    exposed = any(one.segments is None for run in started for one in run.values())
    return Composed(
        None if exposed else worst, worst, worst_delta, worst_site, len(started), sum(bool(run) for run in private)
    )


def _worst(spent: Sequence[Spent]) -> Spent:
    """A mechanism that costs no less than any of these: they are one plan at sites of different size."""
    plans = [one.segments for one in spent]
    if not all(plans):
        return Spent(None, None)
    phases = zip(*(plan for plan in plans if plan), strict=True)
    segments = tuple(
        Segment(
            max(one.sample_rate for one in phase),
            min(one.noise_multiplier for one in phase),
            max(one.steps for one in phase),
        )
        for phase in phases
    )
    return Spent(segments, min(one.delta for one in spent if one.delta is not None))


def same_sites(cells: Sequence[Cell], axes: Sequence[Axis]) -> bool:
    """Whether a column of the data says who is at which site, and no axis can change that."""
    fixed = not any(axis.key.startswith(BY_ROW) for axis in axes)
    return fixed and all(cell.config.data.site_column is not None for cell in cells)


def sentences(composed: Composed, cells: int) -> list[str]:
    """The composed ε in words."""
    said = ["ε of a run is what that run alone costs at its worst site: selection not charged."]
    counted = f"all {composed.runs} runs" if composed.runs == cells else f"the {composed.runs} of {cells} runs started"
    alone = f"{composed.private_epsilon:.3f} at δ = {composed.delta:g} ({_place(composed)})" if composed.delta else ""
    if not composed.runs:
        return [*said, "No run was started, so nothing was spent."]
    if composed.epsilon is not None:
        said.append(f"Composed over {counted}: ε = {alone}.")
    else:
        bare = composed.runs - composed.private_runs
        said.append(f"Composed over {counted}: ε is infinite, since {bare} had no privacy mechanism.")
        if alone:
            said.append(f"The {composed.private_runs} private runs alone: ε = {alone}.")
    said.append("Composed ε takes each run's noise for its own, as real sites draw it; simulated noise is seeded.")
    return said


def _place(composed: Composed) -> str:
    return "a bound over all sites" if composed.site == ANY_SITE else f"site '{composed.site}', the worst"
