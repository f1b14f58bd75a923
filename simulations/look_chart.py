"""One picture of a data set: which labels each site has, and how long the texts are."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import OutputError
from simulations.look import Look, SiteView, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's palette, which people with any kind of colour blindness can tell apart; grey in place of black."""
HATCHES = ("", "////", "....")
"""The second and third time that a colour is used."""
OTHER, OTHERS = "#DDDDDD", "other labels"
FOOTNOTE = "Raw rows, counted exactly, without any privacy: for the owner of the data alone."

MOST_LABELS = len(COLOURS) * len(HATCHES) - 1
MOST_NAMED = 80
"""Above so many sites their bars are too thin for names."""
UNNAMED_HEIGHT = 30
"""They get the room of so many sites with names."""
MOST_BARS = 60
"""Bars of the histogram of lengths."""
MOST_OF_LENGTHS = 99.5
"""Percentile at which the axis of lengths ends, so that one long text does not squeeze all others."""


def draw(found: Look, path: Path) -> None:
    """Writes the PNG, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    bars = len(found.sites) if len(found.sites) <= MOST_NAMED else UNNAMED_HEIGHT
    heights = (max(1.6, 0.24 * bars + 0.6), 2.6)
    figure = Figure(figsize=(11.0, sum(heights) + 1.3))
    FigureCanvasAgg(figure)
    margin = 0.25 / figure.get_figheight()  # for the footnote
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, margin, 1, 1 - margin)))
    above, below = figure.subplots(2, 1, height_ratios=heights)
    draw_sites(above, found)
    draw_lengths(below, found)
    figure.text(0.995, 0.004, FOOTNOTE, ha="right", va="bottom", fontsize=7.5, color="#555555")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a script that the font lacks is drawn as boxes
            figure.savefig(part, format="png", dpi=140)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"--out {path.parent}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        part.unlink(missing_ok=True)


def draw_sites(axes: Axes, found: Look) -> None:
    """A bar of 100 % for each site, the first one on top, with its rows beside it; of very many the largest on top."""
    named = len(found.sites) <= MOST_NAMED
    sites = dict(found.sites if named else sorted(found.sites.items(), key=lambda item: -item[1].rows))
    shares = shares_of(sites, [*found.labels])
    places = np.arange(len(sites))
    left = np.zeros(len(sites))
    for number, (label, widths) in enumerate(shares.items()):
        colour, hatch = _look_of(number, label)
        right = left + widths
        if named:
            axes.barh(places, widths, 0.85, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
        else:  # one outline for all sites: thousands of bars would take minutes
            steps = (np.append(places, len(sites)) - 0.5, np.append(left, left[-1]), np.append(right, right[-1]))
            axes.fill_betweenx(*steps, step="post", color=colour, hatch=hatch, edgecolor="white", linewidth=0.0)
        left = right
    axes.set_xlim(0, 100)
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.set_xlabel("share of the site's rows with a label (%)" if shares else "no column of labels was found")
    axes.set_title(f"Labels by site in '{found.split}'", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        names = [f"{shown(name)}  ({site.rows:,})" for name, site in sites.items()]
        axes.set_yticks(places, names, parse_math=False)
        axes.set_ylabel("site (rows)")
    else:
        axes.set_ylabel(f"{len(sites):,} sites, largest on top")
    if shares:
        handles = [_swatch(number, label) for number, label in enumerate(shares)]
        legend = axes.legend(
            handles, [shown(label) for label in shares], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def shares_of(sites: Mapping[str, SiteView], labels: Sequence[str]) -> dict[str, list[float]]:
    """Label → its share in per cent at each site; the rarest of too many together."""
    drawn = labels if len(labels) <= MOST_LABELS else labels[: MOST_LABELS - 1]
    shares = {
        label: [100 * site.labels.get(label, 0) / max(1, sum(site.labels.values())) for site in sites.values()]
        for label in drawn
    }
    if len(drawn) < len(labels):
        rest = [
            100 - sum(of_site) if site.labels else 0.0
            for site, of_site in zip(sites.values(), zip(*shares.values(), strict=True), strict=True)
        ]
        shares[OTHERS] = rest
    return shares


def draw_lengths(axes: Axes, found: Look) -> None:
    """A histogram of all sites' texts, with the median and the 95 % mark."""
    unit = "tokens" if found.in_tokens else "characters"
    axes.set_title(f"Length of the texts in '{found.split}'", loc="left", fontweight="bold")
    axes.set_xlabel(unit)
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    if not found.lengths:
        return
    lengths = np.asarray(found.lengths)
    end = max(1.0, float(np.percentile(lengths, MOST_OF_LENGTHS)))
    within = lengths[lengths <= end]
    width = -(-int(end) // MOST_BARS)  # whole numbers, or some bars would hold more lengths than others
    edges = np.arange(0, int(end) + width + 1, width)
    axes.hist(within, bins=edges.tolist(), color=COLOURS[0], edgecolor="white", linewidth=0.4)
    median, most = np.percentile(lengths, [50, 95], method="inverted_cdf")
    axes.axvline(median, color="black", linewidth=1.4, label=f"median: {median:,}")
    axes.axvline(most, color="black", linewidth=1.4, linestyle="--", label=f"95 %: at most {most:,}")
    if beyond := len(lengths) - len(within):
        axes.plot([], [], " ", label=f"{beyond:,} longer, up to {lengths.max():,}: not drawn")
    axes.set_xlim(0, edges[-1])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _look_of(number: int, label: str) -> tuple[str, str]:
    if label == OTHERS:
        return OTHER, ""
    return COLOURS[number % len(COLOURS)], HATCHES[number // len(COLOURS)]


def _swatch(number: int, label: str) -> Patch:
    from matplotlib.patches import Patch

    colour, hatch = _look_of(number, label)
    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
