"""One small chart per site, all on the same axes: fifty sites stay apart without fifty colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.report_page import words
from server.report_page.charts import Drawn, Line, Tick, draw, ticks
from server.report_page.content import Content, Course, values_by_round

WIDTH, HEIGHT = 200, 112
LEFT, RIGHT, TOP, BOTTOM = 50, 6, 8, 22
"""Margins of the plotting area, in the same units; a phone shows about 0.75 pixels of each."""
OWN, ALL = 0, 7
"""The style sheet's bold line and its muted one."""


@dataclass(frozen=True)
class Panel:
    """What the template needs to draw one site's chart."""

    site: str
    value: str
    """At the last round, for the reader."""
    description: str
    """For those who do not see it."""
    lines: tuple[Drawn, ...]
    """That of all rows behind the site's own."""


@dataclass(frozen=True)
class Panels:
    """All sites' charts and what is the same in each."""

    panels: tuple[Panel, ...]
    """The worst served at the last round first."""
    x_ticks: tuple[Tick, ...]
    """The first and the last round."""
    y_ticks: tuple[Tick, ...]
    """The ends of the scale, and its middle without a label."""
    mark: float | None
    """Where the kept round is, if training was of use."""


def panels_of(content: Content) -> Panels | None:
    """The metric by round of each site beside that of all rows; ``None`` where no column tells the sites apart."""
    if not content.courses:
        return None
    together = values_by_round(content.records.rounds, content.metric)
    lines = [together, *(course.points for course in content.courses)]
    values = [value for points in lines for _, value in points if value is not None]
    if not values:
        return None
    steps = ticks(min(values), max(values))
    low, high, last = steps[0], steps[-1], max(round for points in lines for round, _ in points)

    def across(round_number: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * round_number / last, 1)

    def down(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    behind = draw(Line("all rows", together, ALL), across, down)
    return Panels(
        tuple(
            Panel(
                course.site,
                words.figure(content.metric, course.last),
                _description(content, course),
                (behind, draw(Line(course.site, course.points, OWN), across, down)),
            )
            for course in content.courses
        ),
        (Tick(across(0), "0"), Tick(across(last), f"round {last}")),
        tuple(Tick(down(value), label) for value, label in _scale(content.metric, low, high)),
        across(content.best_round) if content.best_round else None,
    )


def _scale(metric: str, low: float, high: float) -> Sequence[tuple[float, str]]:
    return (low, words.short(metric, low)), ((low + high) / 2, ""), (high, words.short(metric, high))


def _description(content: Content, course: Course) -> str:
    """A line in words."""
    first, last = (course.points[end] for end in (0, -1))
    start, end = (words.figure(content.metric, value) for _, value in (first, last))
    name = words.metric_name(content.metric)
    return f"{course.site}: {name} {start} at round {first[0]}, {end} at round {last[0]}"
