"""One self-contained HTML page about a run: no script, no font, no picture from elsewhere, nothing that asks a network.

All text is escaped by the template engine; there is no other way into the page.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import jinja2

from common.errors import OutputError
from server.checkpoint import write_atomically
from server.report_page import charts, small_multiples, words
from server.report_page.charts import STYLES, Chart, Line, line_chart
from server.report_page.content import Content, Status, content_of, values_by_round
from server.report_page.participation import Outcome
from server.report_page.records import records_of

MOST_ALONE = 12
"""Lines of single sites in one chart."""
SHOWN_PANELS = 12
"""Sites whose own chart is always seen; the others can be opened."""
SHOWN = 25
"""Rows of a table that are always seen; the others can be opened."""
MOST = 1000
"""Rows of a table altogether."""
SYMBOLS = {
    Outcome.ADMITTED: "●",
    Outcome.REFUSED: "R",
    Outcome.REJECTED: "X",
    Outcome.LATE: "L",
    Outcome.ABSENT: "–",
    Outcome.NOT_ASKED: "·",
}
LEGEND = {
    Outcome.ADMITTED: "its reply counted",
    Outcome.REFUSED: "the site refused",
    Outcome.REJECTED: "the coordinator rejected its reply",
    Outcome.LATE: "no reply before the deadline",
    Outcome.ABSENT: "no answer",
    Outcome.NOT_ASKED: "in this round the site was left out",
}


def content_of_folder(folder: Path) -> Content:
    """What the page of a run's folder says.

    Raises:
        OutputError: the folder holds no run, or a damaged one.
    """
    return content_of(records_of(folder))


def write_page(content: Content, file: Path) -> None:
    """Writes the page.

    Raises:
        OutputError: the file cannot be written.
    """
    if file.is_dir():
        raise OutputError(f"--out {file}: is a folder; give the page's file, e.g. --out {file / 'report.html'}")
    write_atomically(file, render(content).encode())


def render(content: Content) -> str:
    """The page as HTML."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        content=content,
        records=content.records,
        config=content.records.config,
        manifest=content.records.manifest,
        summary=content.records.summary or {},
        words=words,
        chart={chart.id: chart for chart in _charts(content)},
        frame=charts,
        panels=small_multiples.panels_of(content),
        panel_frame=small_multiples,
        shown_panels=SHOWN_PANELS,
        style=(here / "page.css").read_text(encoding="utf-8"),
        symbols=SYMBOLS,
        legend=LEGEND,
        finished=content.status is Status.COMPLETED,
        shown=SHOWN,
        most=MOST,
        scale=_scale(content),
    )


def _charts(content: Content) -> list[Chart]:
    found = [_quality(content), _loss(content), _epsilon(content), _replies(content)]
    return [chart for chart in found if chart is not None]


def _quality(content: Content) -> Chart | None:
    name = words.metric_name(content.metric)
    own = values_by_round(content.records.rounds, content.metric)
    # Of many sites alone the best and the worst; the table has all.
    arms = sorted(content.arms, key=lambda arm: (arm.best is None, arm.best or 0.0))
    if sum(arm.alone for arm in arms) > MOST_ALONE:
        together = [arm for arm in arms if not arm.alone]
        alone = [arm for arm in arms if arm.alone]
        arms = [*together, alone[0], alone[-1]]
    lines = [Line("all sites together", own, 0, marked=len(own) <= 40)]
    for arm in sorted(arms, key=lambda arm: (arm.alone, arm.title)):
        lines.append(Line("one site alone", arm.points, STYLES - 1) if arm.alone else Line(arm.title, arm.points, 1))
    ends = [words.figure(content.metric, value) for _, value in (*own[:1], *own[-1:])]
    return line_chart(
        "quality",
        f"{name[:1].upper()}{name[1:]} by round",
        f"{name} on the coordinator's validation data, {' to '.join(ends)}. All values are in the table.",
        lines,
        name,
        lambda value: words.short(content.metric, value),
        phases=_spans(content),
        mark=(content.best_round, "kept" if content.status is Status.COMPLETED else "best")
        if content.best_round
        else None,
    )


def _loss(content: Content) -> Chart | None:
    if content.metric == "loss":
        return None
    own = values_by_round(content.records.rounds, "loss")
    lines = [Line("all sites together, on the coordinator's validation data", own, 0, marked=len(own) <= 40)]
    if any("loss" in record.get("site_metrics", {}) for record in content.rounds):
        told = [(record["round"], record.get("site_metrics", {}).get("loss")) for record in content.rounds]
        lines.append(Line("the sites' own mean, with privacy noise", told, 1))
    return line_chart(
        "loss",
        "Loss by round (lower is better)",
        f"Loss on the coordinator's validation data over {len(content.rounds)} rounds; all values are in the table.",
        lines,
        "loss",
        lambda value: f"{value:g}",
        phases=_spans(content),
    )


def _epsilon(content: Content) -> Chart | None:
    target = content.records.config.privacy.epsilon
    if not content.curves or target is None:
        return None
    alike: defaultdict[tuple[tuple[int, float], ...], list[str]] = defaultdict(list)
    for curve in content.curves:
        alike[curve.points].append(curve.site)
    lines = [Line(_together(sites), points, index) for index, (points, sites) in enumerate(alike.items())]
    most = max(curve.points[-1][1] for curve in content.curves)
    return line_chart(
        "epsilon",
        "Privacy loss ε of the rounds so far",
        f"ε of the executed rounds rises to {most:.2f}; the plan allows {target:g}. The table has the end values.",
        lines,
        "ε",
        lambda value: f"{value:g}",
        phases=_spans(content),
        limit=(target, f"the plan's ε = {target:g}, charged at approval"),
        from_zero=True,
    )


def _together(sites: list[str]) -> str:
    return " and ".join(sites) if len(sites) < 3 else f"{len(sites)} sites alike"


def _replies(content: Content) -> Chart | None:
    if content.participation.left_out == 0 and not content.participation.missed:
        return None
    asked = [(record["round"], float(len(record["cohort"]))) for record in content.rounds]
    admitted = [(record["round"], float(len(record["admitted"]))) for record in content.rounds]
    return line_chart(
        "replies",
        "Replies by round",
        f"Sites asked and replies that counted, over {len(content.rounds)} rounds.",
        [Line("replies that counted", admitted, 0), Line("sites asked", asked, 1)],
        "sites",
        lambda value: f"{value:g}",
        phases=_spans(content),
        from_zero=True,
    )


def _spans(content: Content) -> list[tuple[str, int, int]]:
    """Name, first and last planned round of each phase."""
    spans, first = [], 1
    for phase in content.phases:
        spans.append((phase.settings.name, first, first + phase.settings.rounds - 1))
        first += phase.settings.rounds
    return spans if len(spans) > 1 else []


def _scale(content: Content) -> tuple[float, float]:
    """Left and right end of the axis on which sites are compared."""
    if content.metric in words.SHARES:
        return 0.0, 1.0
    found = content.by_site.sites if content.by_site else ()
    values = [
        value for one in found for part in (one.base, one.best) if (value := part.get(content.metric)) is not None
    ]
    return (0.0, max(values)) if values and max(values) > 0 else (0.0, 1.0)
