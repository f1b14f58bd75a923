"""Line charts as geometry; the template draws them. Text stays text, and nothing is told by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
"""Margins of the plotting area, in the same units; a phone shows about 0.7 pixels of each."""
STYLES = 8
"""Different line styles of the style sheet."""

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    title: str
    points: Points
    """x and y; a y of ``None`` leaves a gap."""
    style: int
    """Which of the style sheet's colours and dashes."""
    marked: bool = False
    """With a dot at each point."""


@dataclass(frozen=True)
class Drawn:
    """A line in the chart's own units."""

    title: str
    style: int
    paths: tuple[str, ...]
    """The points of each unbroken part, for ``polyline``."""
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tick:
    """A labelled position of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A phase in the background."""

    left: float
    width: float
    title: str


@dataclass(frozen=True)
class Chart:
    """What the template needs to draw one chart."""

    id: str
    title: str
    description: str
    """For those who do not see it."""
    y_title: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bands: tuple[Band, ...]
    limit: Tick | None
    """A horizontal line that must not be crossed."""
    mark: Tick | None
    """A vertical line, at the round whose adapter is kept."""


def line_chart(
    id: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    y_title: str,
    y_label: Callable[[float], str],
    phases: Sequence[tuple[str, int, int]] = (),
    limit: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """A chart over the rounds; ``None`` where there is nothing to draw.

    Args:
        phases: name, first and last round.
        limit: a horizontal line and its text.
        mark: a vertical line and its text.
    """
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None]
    if not ys or max(xs) <= 0:
        return None
    steps = ticks(min([*ys, *([0.0] if from_zero else [])]), max([*ys, *([limit[0]] if limit else [])]))
    low, high, last = steps[0], steps[-1], max(xs)

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / last, 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low), 1)

    bands = [
        Band(across(max(0, first - 1)), round(across(min(end, last)) - across(max(0, first - 1)), 1), name)
        for name, first, end in phases
        if first - 1 < last
    ]
    return Chart(
        id,
        title,
        description,
        y_title,
        tuple(draw(line, across, down) for line in lines),
        tuple(Tick(across(x), f"{x:g}") for x in ticks(0, last, whole=True) if x <= last),
        tuple(Tick(down(y), y_label(y)) for y in steps),
        tuple(bands),
        limit and Tick(down(limit[0]), limit[1]),
        mark and Tick(across(mark[0]), mark[1]),
    )


def ticks(low: float, high: float, whole: bool = False) -> tuple[float, ...]:
    """Four to eight round numbers, the first not above ``low`` and the last not below ``high``."""
    if high <= low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def draw(line: Line, across: Callable[[float], float], down: Callable[[float], float]) -> Drawn:
    """A line in a chart's own units, which ``across`` and ``down`` give of x and y."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((across(x), down(y)))
    dots = tuple(point for part in parts for point in part if line.marked or len(part) == 1)
    paths = tuple(" ".join(f"{x:g},{y:g}" for x, y in part) for part in parts if len(part) > 1)
    return Drawn(line.title, line.style % STYLES, paths, dots)
