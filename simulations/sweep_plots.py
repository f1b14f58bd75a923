"""Two pictures of a sweep, each as PNG and SVG: what privacy costs in utility, and how training converged."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulations.sweep_grid import EPSILON, NO_PRIVACY
from simulations.sweep_results import Group, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe & Ito's, which people with any colour vision tell apart; grey in place of yellow, which paper swallows."""

MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
MOST_LINES = 8
"""In one panel; above it there is a panel for each value of the first setting."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "consilium",
}

Histories = Mapping[str, Sequence[tuple[int, float | None]]]
"""Cell → (round, metric on validation data)."""


@dataclass(frozen=True)
class _Line:
    """How one group is drawn."""

    colour: str
    marker: str
    dash: str

    @classmethod
    def number(cls, index: int) -> _Line:
        return cls(
            COLOURS[index % len(COLOURS)],
            MARKERS[index % len(MARKERS)],
            DASHES[index // len(COLOURS) % len(DASHES)],
        )


def draw(groups: Sequence[Group], histories: Histories, note: str, folder: Path) -> list[Path]:
    """Writes the pictures that the groups allow; the files.

    Args:
        note: a line below the frontier: what its ε leaves out.
    """
    import matplotlib

    pictures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        if any(EPSILON in group.choices for group in groups):
            pictures["frontier"] = frontier(groups, note)
        if groups:
            pictures["convergence"] = convergence(groups, histories)
        files = []
        for name, figure in pictures.items():
            for kind in ("png", "svg"):
                files.append(folder / f"{name}.{kind}")
                figure.savefig(
                    files[-1], dpi=160, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else {}
                )
    return files


# ---- privacy and utility --------------------------------------------------------------------------------------------


def frontier(groups: Sequence[Group], note: str) -> Figure:
    """The metric over ε of a run, a line for each other choice; runs without privacy apart, at the right."""
    from matplotlib.figure import Figure

    split = "test" if all(row.test for group in groups for row in group.rows) else "validation"
    metric = groups[0].rows[0].metric
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(_title(group, without=EPSILON), []).append(group)
    values = sorted({float(group.choices[EPSILON]) for group in groups if group.choices[EPSILON] != NO_PRIVACY})
    apart = values[-1] * max(2.0, (values[-1] / values[0]) ** 0.25) if values else 1.0
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for index, (title, members) in enumerate(lines.items()):
        shift = 1 + 0.012 * (index - (len(lines) - 1) / 2)  # so that error bars do not hide each other
        _frontier_line(axes, members, title, _Line.number(index), split, metric, apart, shift)
    bare = any(group.choices[EPSILON] == NO_PRIVACY for group in groups)
    if bare and values:
        axes.axvline((values[-1] * apart) ** 0.5, color="#B0B0B0", linewidth=1, linestyle=":")
    ticks = [*values, apart] if bare else values
    axes.set_xticks(ticks, [*(f"{value:g}" for value in values), "no\nprivacy"][: len(ticks)])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xlabel("ε of a run (log scale)")
    axes.set_ylabel(f"{split} {_plain(metric)}")
    axes.set_title("Privacy and utility", loc="left", fontweight="bold")
    _legend(axes, len(lines))
    figure.tight_layout()
    _note(figure, f"{_spread(groups)} {note}")
    return figure


def _frontier_line(
    axes: Axes, members: Sequence[Group], title: str, line: _Line, split: str, metric: str, apart: float, shift: float
) -> None:
    points: list[tuple[float, Spread]] = []
    for group in members:
        spread = group.figure(split, metric)
        if spread is None:
            continue
        if group.choices[EPSILON] == NO_PRIVACY:
            _point(
                axes, [(apart * shift, spread)], line, linestyle="none", markerfacecolor="white", markeredgewidth=1.6
            )
        else:
            points.append((float(group.choices[EPSILON]) * shift, spread))
    _point(axes, sorted(points, key=lambda one: one[0]), line, linestyle=line.dash, label=title)


def _point(axes: Axes, points: Sequence[tuple[float, Spread]], line: _Line, **more: Any) -> None:
    axes.errorbar(
        [x for x, _ in points],
        [spread.mean for _, spread in points],
        yerr=[spread.deviation or 0.0 for _, spread in points],
        color=line.colour,
        marker=line.marker,
        markersize=6,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        **more,
    )


# ---- convergence ----------------------------------------------------------------------------------------------------


def convergence(groups: Sequence[Group], histories: Histories) -> Figure:
    """The validation metric by round: each group's mean over its seeds, and a band of one standard deviation."""
    from matplotlib.figure import Figure

    first = next(iter(groups[0].choices), None)
    panels: dict[str, list[Group]] = {}
    for group in groups:
        apart = len(groups) > MOST_LINES and first is not None
        panels.setdefault(_choice(first, group.choices[first]) if apart and first else "", []).append(group)
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.2 if len(panels) == 1 else 4.4 * columns, 4.4 if rows == 1 else 3.4 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    titles = list(dict.fromkeys(_title(one, first if len(panels) > 1 else None) for one in groups))
    for axes, (panel, members) in zip(grid.flat, panels.items(), strict=False):
        for group in members:
            title = _title(group, first if len(panels) > 1 else None)
            _curve(axes, group, histories, title, _Line.number(titles.index(title)))
        axes.set_title(panel, loc="left", fontsize=10)
        axes.set_xlabel("round")
        axes.tick_params(labelbottom=True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"validation {_plain(groups[0].rows[0].metric)}")
    _legend(grid[0, columns - 1], len(titles))
    if len(panels) == 1:
        grid[0, 0].set_title("Convergence", loc="left", fontweight="bold", fontsize=12)
    else:
        figure.suptitle("Convergence", x=0.06, ha="left", fontweight="bold")
    figure.tight_layout()
    _note(figure, _spread(groups).replace("bars", "bands"))
    return figure


def _curve(axes: Axes, group: Group, histories: Histories, title: str, line: _Line) -> None:
    """Over the rounds that every seed evaluated: ``evaluation.every`` and early stopping skip some."""
    runs = [{round: value for round, value in histories[row.cell] if value is not None} for row in group.rows]
    rounds = sorted(set.intersection(*(set(run) for run in runs)))
    spreads = [spread for round in rounds if (spread := Spread.of(run[round] for run in runs))]
    means = [spread.mean for spread in spreads]
    axes.plot(
        rounds,
        means,
        color=line.colour,
        linestyle=line.dash,
        linewidth=1.8,
        marker=line.marker,
        markersize=4.5,
        markevery=max(1, len(rounds) // 8),
        label=title,
    )
    if len(runs) > 1:
        width = [spread.deviation or 0.0 for spread in spreads]
        low = [mean - one for mean, one in zip(means, width, strict=True)]
        high = [mean + one for mean, one in zip(means, width, strict=True)]
        axes.fill_between(rounds, low, high, color=line.colour, alpha=0.13, linewidth=0)


# ---- both -----------------------------------------------------------------------------------------------------------


def _title(group: Group, without: str | None = None) -> str:
    return ", ".join(_choice(key, value) for key, value in group.choices.items() if key != without)


def _choice(key: str, value: str) -> str:
    if key == EPSILON:
        return "no privacy" if value == NO_PRIVACY else f"ε {value}"
    return f"{key.split('.')[-1].replace('_', ' ')} {value}"


def _plain(metric: str) -> str:
    return metric.replace("_", "-")


def _spread(groups: Sequence[Group]) -> str:
    counts = sorted({len(group.rows) for group in groups})
    if counts == [1]:
        return "One seed: no spread is known."
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean of {n} seeds; bars: ± 1 standard deviation."


def _legend(axes: Axes, lines: int) -> None:
    if lines > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, handlelength=2.6)


def _note(figure: Figure, text: str) -> None:
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 14))
    figure.text(0.03, -0.01, "\n".join(lines), ha="left", va="top", fontsize=8, color="#555555")
