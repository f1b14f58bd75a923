"""The page about a run says what the run's records support, in every state a run can be in."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from written_runs import DELTA, NOISE, write_run

import consilium
from common.errors import OutputError
from common.messages import PlanStatus, RefusalReason
from common.privacy.accounting import Segment, epsilon
from common.privacy.in_words import odds_factor, odds_in_words
from server.admission import Rejection
from server.report_page import words
from server.report_page.charts import Line, line_chart, ticks
from server.report_page.content import Content, Status, as_object, values_by_round
from server.report_page.page import content_of_folder, render
from server.report_page.participation import REASONS, Outcome, participation

HOSTILE = '<script>alert("x")</script>'


def page(folder: Path) -> tuple[Content, str]:
    content = content_of_folder(folder)
    return content, render(content)


def text_of(html: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&#39;", "'").replace("\N{NO-BREAK SPACE}", " ").split())


class Outline(HTMLParser):
    """Headings, ids, references and what is linked to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.named_by: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.headers: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th":
            self.headers.append(given)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.named_by += (given.get("aria-labelledby") or "").split()
        self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "action") and value]


# ---- what is said --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_told_in_plain_sentences(tmp_path: Path) -> None:
    _, html = page(write_run(tmp_path, summary={"test": {"loss": 1.0, "accuracy": 0.71, "examples": 500.0}}))
    text = text_of(html)
    assert "Three sites trained one model together" in text
    assert "Finished: 5 of five planned rounds." in text
    assert "On 200 validation examples held by the coordinator, accuracy went from 50.0 % before training to" in text
    assert "75.0 %. On 500 test examples it is 71.0 %." in text
    assert "to sort texts into two classes: urgent, routine." in text
    assert "330 examples, from 100 to 120 at one site" in text
    assert "No privacy" not in text


def test_a_run_without_privacy_is_loudly_said_to_have_none(tmp_path: Path) -> None:
    _, html = page(write_run(tmp_path, mechanism="none"))
    assert '<div class="warning" role="alert"><strong>No privacy</strong>' in html
    text = text_of(html)
    assert "This run made no privacy promise at all" in text and "There is none." in text
    assert "Each site states that it added noise" not in text and "What ε says" not in text


def test_a_site_that_states_no_epsilon_spoils_the_claim_for_the_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    sites = json.loads((tmp_path / "sites.json").read_text())
    sites["west"]["privacy"]["epsilon"] = None
    (tmp_path / "sites.json").write_text(json.dumps(sites))
    content, html = page(tmp_path)
    text = text_of(html)
    assert "No privacy is claimed for every site" in text and "Not every site states an ε" in text
    assert "Each site states that it added noise" not in text
    assert {one.site: one.executed is None for one in content.accounts} == {
        "north": False,
        "south": False,
        "west": True,
    }


def test_a_simulation_is_called_one_and_its_epsilon_is_limited_to_the_run(tmp_path: Path) -> None:
    text = text_of(page(write_run(tmp_path, kind="simulation"))[1])
    assert "Three simulated sites trained one model together" in text and "This was a simulation" in text
    assert "sampling and noise come from a public seed" in text and "fresh ledger" in text
    assert "Each site used its own data" not in text


def test_fast_noise_is_said_not_to_be_fit_for_release(tmp_path: Path) -> None:
    secure = text_of(page(write_run(tmp_path / "secure"))[1])
    fast = text_of(page(write_run(tmp_path / "fast", settings={"privacy": {"noise": "fast"}}))[1])
    assert "not for release" in fast and "not for release" not in secure


@pytest.mark.parametrize(
    ("written", "status", "said"),
    [
        ({"done": 2}, Status.UNFINISHED, "Not finished: 2 of five planned rounds."),
        ({"done": 0}, Status.UNFINISHED, "No round is finished yet."),
        ({"done": 3, "error": "round 4: too few replies"}, Status.FAILED, "round 4: too few replies"),
        ({"sites": [], "done": 0, "error": "no site came"}, Status.FAILED, "Training one model: not begun"),
        ({"sites": ["solo"]}, Status.COMPLETED, "One site trained one model Finished"),
    ],
)
def test_a_run_of_any_state_has_a_page(tmp_path: Path, written: dict[str, Any], status: Status, said: str) -> None:
    content, html = page(write_run(tmp_path, **written))
    assert content.status is status and said in text_of(html)


def test_before_its_first_evaluation_a_run_has_a_page_too(tmp_path: Path) -> None:
    write_run(tmp_path, done=0)
    for name in ("rounds.jsonl", "sites.json"):
        (tmp_path / name).unlink()
    assert "Nothing has been measured yet." in text_of(page(tmp_path)[1])


def test_a_coordinator_at_work_makes_the_run_running(tmp_path: Path) -> None:
    from server.lock import RunLock

    write_run(tmp_path, done=2)
    with RunLock(tmp_path).hold(7):
        content, html = page(tmp_path)
    assert content.status is Status.RUNNING and "The run is still going" in text_of(html)


def test_the_round_that_is_best_so_far_is_the_least_perplexed_and_no_number_is_never_best(tmp_path: Path) -> None:
    values = [60.0, 50.0, None, 40.0, 45.0]
    settings = {"task": {"name": "causal-lm"}}
    written = write_run(
        tmp_path, done=4, settings=settings, metrics=lambda round: {"loss": 4.0, "perplexity": values[round]}
    )
    content, html = page(written)
    assert content.best_round == 3 and not content.higher_is_better
    assert "perplexity went from 60.0 before training to 40.0 so far (lower is better)" in text_of(html)


def test_rounds_that_were_not_evaluated_are_dashes_and_no_points_and_break_no_line(tmp_path: Path) -> None:
    """Of five rounds 2, 4 and 5 are evaluated, so the line has four corners and 1 and 3 none."""
    scores = {0: 0.5, 2: 0.7, 4: 0.9, 5: 0.8}
    measured: dict[int, dict[str, float | None]] = {
        round: {"loss": 1.0, "accuracy": value, "examples": 200.0} for round, value in scores.items()
    }
    settings = {"evaluation": {"every": 2}}
    write_run(tmp_path, settings=settings, metrics=lambda round: measured.get(round, {}))
    write_run(tmp_path / "arms" / "alone-north", ["north"], metrics=lambda round: measured.get(round, {}))
    content, html = page(tmp_path)
    assert content.best_round == 4 and values_by_round(content.rounds, "accuracy") == ((2, 0.7), (4, 0.9), (5, 0.8))
    assert content.arms[0].points == ((0, 0.5), (2, 0.7), (4, 0.9), (5, 0.8)) and content.arms[0].best == 0.9
    (chart,) = re.findall(r'<p class="title" id="quality-caption">.*?</figure>', html, flags=re.DOTALL)
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', chart)
    assert len(lines) == 2 and all(len(line.split()) == 4 for line in lines) and chart.count("<circle") == 4
    assert "50.0 % to 80.0 %" in text_of(html)
    table = text_of(html).split("All rounds as a table")[1]
    assert "1 head – – 3/3" in table and "2 head 1.000 70.0 % 3/3" in table and "3 head – – 3/3" in table
    assert "–: not evaluated, as evaluation.every = 2 asks" in table


def test_a_running_run_whose_last_round_was_not_evaluated_has_a_page(tmp_path: Path) -> None:
    figures: dict[str, float | None] = {"loss": 1.0, "accuracy": 0.7, "examples": 200.0}
    write_run(tmp_path, done=3, metrics=lambda round: {} if round % 2 else figures)
    content, html = page(tmp_path)
    assert content.best_round == 0 and "3 of five planned rounds" in text_of(html)
    assert "70.0 % before training to 70.0 % so far" in text_of(html)
    assert "Accuracy by round" in text_of(html)
    only_base = write_run(tmp_path / "first", done=1, metrics=lambda round: {} if round else figures)
    assert "Accuracy by round" not in text_of(page(only_base)[1])


# ---- ε -------------------------------------------------------------------------------------------------------------


def test_epsilon_by_round_is_the_accountants_and_ends_at_the_stated_one(tmp_path: Path) -> None:
    content, _ = page(write_run(tmp_path, rounds=5))
    for curve in content.curves:
        assert curve.points[0] == (0, 0.0)
        for round, value in curve.points[1:]:
            # Without sampling t rounds are one Gaussian mechanism of mu = sqrt(t) / sigma.
            assert value == pytest.approx(epsilon([Segment(1.0, NOISE / math.sqrt(round), 1)], DELTA), rel=1e-12)
    assert all(one.executed == one.stated for one in content.accounts)


def test_what_may_have_left_counts_and_what_was_refused_does_not(tmp_path: Path) -> None:
    kinds = {
        "counted": ("admitted", ""),
        "late": ("rejected", "late"),
        "oversize": ("rejected", "oversize"),
        "unheard": ("rejected", "node-error"),
        "refusing": ("refused", "closed"),
        "lost": ("refused", "seed-lost"),
        "left-out": ("", ""),
    }
    content, html = page(
        write_run(
            tmp_path, list(kinds), rounds=4, outcomes=lambda round, site: kinds[site] if round > 2 else kinds["counted"]
        )
    )
    assert {one.site: one.rounds for one in content.accounts} == {
        "counted": 4,
        "late": 4,
        "oversize": 4,
        "unheard": 4,
        "refusing": 2,
        "lost": 4,
        "left-out": 2,
    }
    executed = {one.site: one.executed for one in content.accounts}
    assert executed["refusing"] == epsilon([Segment(1.0, NOISE, 2)], DELTA) < executed["late"]  # type: ignore[operator]
    assert len({one.stated for one in content.accounts}) == 1  # charged whole, whatever was executed
    assert "The plan's whole ε is charged all the same." in text_of(html)


def test_the_odds_are_those_of_epsilon() -> None:
    assert odds_factor(1.0) == "2.72" and odds_factor(8.0) == "2,980" and odds_factor(20.0) == "e^20"
    assert odds_in_words(math.log(3), 1e-5, "patient").endswith(
        "any one patient is in the data by a factor of 3 at most, except with probability 1e-05."
    )


# ---- who took part -------------------------------------------------------------------------------------------------


def test_every_reason_a_reply_can_fail_for_is_put_into_words() -> None:
    assert set(REASONS) == {*RefusalReason, *Rejection, PlanStatus.WAITING}


def test_the_grid_tells_by_a_sign_and_a_word_what_came_of_each_request(tmp_path: Path) -> None:
    kinds = [
        ("admitted", ""),
        ("refused", "budget"),
        ("rejected", "layout"),
        ("rejected", "late"),
        ("rejected", "node-error"),
    ]
    write_run(
        tmp_path, ["a"], rounds=5, outcomes=lambda round, site: kinds[round - 1], summary={"absent": {"b": "policy"}}
    )
    content, html = page(tmp_path)
    (row,) = content.participation.rows
    assert row.cells == (Outcome.ADMITTED, Outcome.REFUSED, Outcome.REJECTED, Outcome.LATE, Outcome.ABSENT)
    signs = re.findall(r'<td class="[a-z]+" aria-label="([a-z]+)">(.)</td>', html)
    assert signs == [("admitted", "●"), ("refused", "R"), ("rejected", "X"), ("late", "L"), ("absent", "–")]
    text = text_of(html)
    assert "the plan does not fit into the site's lifetime privacy budget ( budget )" in text
    assert "b: the site's policy does not allow what the plan asks for" in text


def test_many_rounds_share_a_column_that_shows_trouble_before_success() -> None:
    def record(number: int, verdict: str) -> dict[str, Any]:
        rejected = {"a": "late"} if verdict == "late" else {}
        admitted = ["a"] if verdict == "admitted" else []
        return {"round": number, "admitted": admitted, "refused": {}, "rejected": rejected}

    rounds = [record(n, "late" if n == 5 else "" if n in (7, 8, 9) else "admitted") for n in range(1, 121)]
    found = participation(["a"], rounds, {})
    assert found.columns[:3] == ((1, 3), (4, 6), (7, 9)) and len(found.columns) == 40
    assert found.rows[0].cells[:3] == (Outcome.ADMITTED, Outcome.LATE, Outcome.NOT_ASKED)
    assert (found.rows[0].admitted, found.rows[0].asked) == (116, 117)


def test_a_hundred_sites_stay_readable_and_small(tmp_path: Path) -> None:
    names = [f"hospital-{number:03d}" for number in range(100)]
    troubled = names[::3]
    scores = {name: {"base": {"accuracy": 0.5}, "best": {"accuracy": 0.6, "examples": 9.0}} for name in names}
    content, html = page(
        write_run(
            tmp_path,
            names,
            rounds=200,
            outcomes=lambda round, site: (
                ("rejected", "late") if site in troubled and round % 7 == 0 else ("admitted", "")
            ),
            summary={"by_site": {"split": "test", "sites": scores}},
        )
    )
    grid = content.participation
    assert len(grid.rows) == 40 and grid.left_out == 60 and len(grid.columns) <= 40
    assert set(troubled) <= {row.site for row in grid.rows}
    assert len(html.encode()) < 2_000_000
    assert all(html.count(name) > 1 for name in names)  # all of them are in the tables


# ---- the sites' own quality ----------------------------------------------------------------------------------------


def test_the_worst_site_the_spread_and_who_lost_are_named(tmp_path: Path) -> None:
    def scores(before: float, after: float, rows: int) -> dict[str, Any]:
        return {"base": {"accuracy": before, "examples": rows}, "best": {"accuracy": after, "examples": rows}}

    sites = {"north": scores(0.5, 0.9, 100), "south": scores(0.5, 0.75, 64), "west": scores(0.7, 0.64, 25)}
    content, html = page(write_run(tmp_path, summary={"by_site": {"split": "test", "sites": sites}}))
    assert content.by_site is not None
    assert [one.site for one in content.by_site.sites] == ["west", "south", "north"]
    assert content.by_site.spread == pytest.approx(0.26)
    text = text_of(html)
    assert "Worst served is west with 64.0 %, best north with 90.0 %: a spread of 26.0 points." in text
    assert "For one site (west) the model became worse by training." in text
    assert "± 9.6" in text  # sqrt(0.64 · 0.36 / 25)
    assert "Site by site" not in text_of(page(write_run(tmp_path / "unknown"))[1])


def test_each_site_has_a_chart_by_round_worst_last_round_first_on_one_scale(tmp_path: Path) -> None:
    """Accuracy from 50 % to 90 %: the scale is 50 % at the bottom (90) to 90 % at the top (8), 2.05 for each point."""
    courses: dict[str, list[float | None]] = {
        "north": [0.5, 0.6, None, 0.9],
        "south": [0.5, 0.5, 0.5, 0.6],
        HOSTILE: [0.9, 0.8, 0.8, 0.7],
    }
    folder = write_run(
        tmp_path,
        rounds=3,
        metrics=lambda round: {"loss": 1.0, "accuracy": 0.5 + 0.1 * round, "examples": 200.0},
        by_site=lambda round: {site: values[round] for site, values in courses.items()},
    )
    content, html = page(folder)
    assert [one.site for one in content.courses] == ["south", HOSTILE, "north"]
    panels = re.findall(r"<figcaption>.*?</figure>", html, flags=re.DOTALL)
    assert [re.findall(r"<b>(.*?)</b> ([\d.]+)", panel)[0] for panel in panels] == [
        ("south", "60.0"),
        ("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;", "70.0"),
        ("north", "90.0"),
    ]
    assert 'aria-label="south: accuracy 50.0\N{NO-BREAK SPACE}% at round 0, 60.0\N{NO-BREAK SPACE}% at round 3"' in html
    lines = [re.findall(r'<polyline class="line s(\d)" points="([^"]*)"', panel) for panel in panels]
    together = ("7", "50,90 98,69.5 146,49 194,28.5")
    assert lines[0] == [together, ("0", "50,90 98,90 146,90 194,69.5")]
    assert lines[1] == [together, ("0", "50,8 98,28.5 146,28.5 194,49")]
    assert lines[2] == [together, ("0", "50,90 98,69.5")]  # no number after round 2: the line breaks
    assert '<circle class="dot s0" cx="194.0" cy="8.0"' in panels[2]
    text = text_of(html)
    assert "After round 3 the worst served is south with 60.0 %, the best north with 90.0 %." in text
    assert "this site's rows all validation rows round 3, kept" in text
    assert re.findall(r'<li><a href="#(\w+)">Site', html) == ["sites"]


def test_where_less_is_better_the_worst_site_has_the_most(tmp_path: Path) -> None:
    written = write_run(
        tmp_path,
        done=2,
        settings={"task": {"name": "causal-lm"}},
        metrics=lambda round: {"loss": 4.0, "perplexity": 60.0 - round},
        by_site=lambda round: {"north": 50.0 - round, "south": 70.0 - round, "west": None},
    )
    content, html = page(written)
    assert [one.site for one in content.courses] == ["south", "north", "west"]
    assert "After round 2 the worst served is south with 68.0, the best north with 48.0." in text_of(html)
    assert "Perplexity (lower is better) on the coordinator's validation rows" in text_of(html)


def test_rounds_that_were_not_evaluated_are_no_points_of_a_sites_chart(tmp_path: Path) -> None:
    by_site: dict[int, dict[str, float | None]] = {0: {"a": 0.5}, 2: {"a": 0.7}}
    content, html = page(write_run(tmp_path, done=3, by_site=lambda round: by_site.get(round, {})))
    (course,) = content.courses
    assert course.points == ((0, 0.5), (2, 0.7)) and course.last == 0.7
    assert "Round by round" in text_of(html) and "worst served is" not in text_of(html)


@pytest.mark.parametrize("written", [{}, {"done": 0, "by_site": lambda round: {"a": 0.5, "b": 0.6}}])
def test_without_a_site_column_or_a_round_there_is_no_chart_by_site(tmp_path: Path, written: dict[str, Any]) -> None:
    content, html = page(write_run(tmp_path, **written))
    assert content.courses == () and "Round by round" not in html and 'href="#sites"' not in html


def test_of_many_sites_the_worst_served_are_seen_and_the_others_can_be_opened(tmp_path: Path) -> None:
    names = [f"hospital-{number:02d}" for number in range(50)]
    folder = write_run(tmp_path, names, rounds=90, by_site=lambda round: dict.fromkeys(names, 0.5))
    html = page(folder)[1]
    seen, opened = html.split("<summary>38 more</summary>")
    assert (seen.count("<figcaption>"), opened.count("<figcaption>")) == (12, 38)
    assert len(html.encode()) < 1_000_000


def test_the_runs_compared_with_stand_beside_the_run(tmp_path: Path) -> None:
    row = {"validation": {"accuracy": 0.8, "loss": 1.0, "examples": 200.0}}
    compared = {"base": row, "best_single_site": {"site": "north", **row}, "federated": row}
    write_run(tmp_path, kind="simulation", summary={"comparison": compared})
    write_run(tmp_path / "arms" / "alone-north", ["north"], metrics=lambda n: {"loss": 1.0, "accuracy": 0.4 + n / 100})
    content, html = page(tmp_path)
    assert [arm.best for arm in content.arms] == [0.45]
    text = text_of(html)
    assert "best single site: north" in text and "north alone 45.0 %" in text and "one site alone" in text


# ---- the page as such ----------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        [HOSTILE, "b"],
        done=3,
        error=HOSTILE,
        outcomes=lambda round, site: ("refused", HOSTILE) if round == 2 else ("admitted", ""),
        settings={"task": {"labels": [HOSTILE, "</style><img src=x onerror=alert(1)>"]}},
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "model": HOSTILE, "run_id": HOSTILE}))
    _, html = page(tmp_path)
    outline = Outline(html)
    assert not {"script", "img", "iframe", "object"} & outline.tags
    assert html.count("&lt;script&gt;") > 5 and html.count("<style>") == 1


def test_nothing_is_asked_of_a_network_and_the_page_forbids_it_itself(tmp_path: Path) -> None:
    _, html = page(write_run(tmp_path))
    assert all(link.startswith(("#", "data:,")) for link in Outline(html).links)
    assert "default-src 'none'" in html and not re.search(r"url\(|@import|https?://", html)


def test_the_page_can_be_found_ones_way_about_in_without_seeing_it(tmp_path: Path) -> None:
    _, html = page(
        write_run(tmp_path, outcomes=lambda round, site: ("rejected", "late") if round == 2 else ("admitted", ""))
    )
    outline = Outline(html)
    assert '<html lang="en">' in html
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids) and set(outline.named_by) <= set(outline.ids)
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert outline.headers and all(header.get("scope") in ("col", "row") for header in outline.headers)
    assert html.count("<svg viewBox") - html.count('aria-hidden="true"><line') == html.count('role="img"') == 4


def test_texts_stand_out_from_their_backgrounds() -> None:
    style = (Path(words.__file__).parent / "page.css").read_text()
    pairs = re.findall(r"\{ background: (#\w{6}); color: (#\w{6}); \}", style)
    named = dict(re.findall(r"--(\w+): (#\w{3,6})", style))
    pairs += [
        (named[paper], named[ink]) for paper in ("paper", "wash") for ink in ("ink", "soft", "accent", "bad", "warn")
    ]
    assert len(pairs) == 15
    for paper, ink in pairs:
        light, dark = sorted((_luminance(paper), _luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (paper, ink)  # WCAG 2.2, 1.4.3


def _luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ---- charts and words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 8.0, (0, 2, 4, 6, 8)),
        (0.55, 0.84, (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)),
        (3.0, 3.0, (2.85, 2.9, 2.95, 3.0, 3.05, 3.1, 3.15)),
    ],
)
def test_axes_have_round_numbers_that_enclose_the_values(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_breaks_where_a_value_is_missing() -> None:
    line = Line("a", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5)], 0)
    chart = line_chart("x", "title", "text", [line], "y", str)
    assert chart is not None
    (drawn,) = chart.lines
    assert len(drawn.paths) == 1 and len(drawn.dots) == 1  # one stroke of two points, and one lonely point
    assert line_chart("x", "title", "text", [Line("a", [(0, None)], 0)], "y", str) is None


def test_numbers_are_written_for_a_reader() -> None:
    assert (words.ranges([1, 2, 3, 7, 9, 10]), words.size(2048), words.size(12)) == (
        "1–3, 7, 9–10",
        "2.0 KiB",
        "12 bytes",
    )
    assert (words.power(1e-5), words.power(2.5e-6)) == ("10⁻⁵", "2.5·10⁻⁶")
    assert (words.counted(1, "site"), words.counted(9, "site"), words.counted(1200, "site")) == (
        "one site",
        "nine sites",
        "1,200 sites",
    )
    assert (words.duration(90), words.duration(3600), words.duration(9000)) == ("90.0 s", "60.0 min", "2.5 h")


# ---- the command ---------------------------------------------------------------------------------------------------


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["consilium", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        consilium.main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_the_command_writes_into_the_folder_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert call(monkeypatch, capsys, run) == (0, f"{run / 'report.html'}\n", "")
    assert call(monkeypatch, capsys, run, "--out", tmp_path / "other.html")[0] == 0
    assert (tmp_path / "other.html").read_bytes() == (run / "report.html").read_bytes()


def test_the_content_can_be_had_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", done=2)
    code, stdout, _ = call(monkeypatch, capsys, run, "--json")
    found = json.loads(stdout)
    assert code == 0 and not (run / "report.html").exists()
    assert (found["status"], found["finished_rounds"], found["planned_rounds"]) == ("unfinished", 2, 5)
    assert found["privacy_by_site"][0]["executed"] == epsilon([Segment(1.0, NOISE, 2)], DELTA)
    assert found["outcomes"] == {"admitted": 6}
    assert found == json.loads(json.dumps(as_object(content_of_folder(run))))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", None, "holds no run (manifest.json is missing)"),
        ("run.toml", None, "holds no run (run.toml is missing)"),
        ("manifest.json", "{", "manifest.json is damaged"),
        ("manifest.json", '{"schema_version": 99}', "newer version"),
        ("summary.json", "[]", "summary.json is damaged"),
        ("summary.json", "{}", "summary.json is damaged"),
        ("summary.json", '{"best_round": "last", "validation": {}}', "summary.json is damaged"),
        ("summary.json", '{"schema_version": 99}', "summary.json was written by a newer version; update"),
        ("summary.json", '{"schema_version": "1"}', "summary.json is damaged"),
        ("sites.json", '{"north": 1}', "sites.json is damaged"),
        ("sites.json", '{"north": {"privacy": null}}', "sites.json is damaged"),
        ("sites.json", '{"north": {"public_size": 9, "privacy": {"phases": [1]}}}', "sites.json is damaged"),
        ("rounds.jsonl", '{"round": 0}', "rounds.jsonl is damaged"),
        ("rounds.jsonl", '{"round": 0, "metrics": {}, "by_site": 1}', "rounds.jsonl is damaged"),
        ("run.toml", "[task]\nlabelz = 1", "labelz"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_message_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    said: str,
) -> None:
    write_run(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    code, stdout, stderr = call(monkeypatch, capsys, tmp_path)
    assert (code, stdout) == (2, "") and stderr.startswith("error: ") and said in stderr and "Traceback" not in stderr
    with pytest.raises(OutputError):
        content_of_folder(tmp_path)


def test_a_folder_is_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = write_run(tmp_path / "run"), tmp_path / "pages"
    other.mkdir()
    code, stdout, stderr = call(monkeypatch, capsys, run, "--out", other)
    assert (code, stdout) == (2, "") and list(other.iterdir()) == []
    assert stderr == f"error: --out {other}: is a folder; give the page's file, e.g. --out {other / 'report.html'}\n"


def test_the_commands_help_loads_nothing_of_the_page() -> None:
    script = (
        "import sys, consilium\n"
        "sys.argv = ['consilium', 'report', '--help']\n"
        "try:\n    consilium.main()\nfinally:\n"
        "    assert not {'jinja2', 'torch', 'server.report_page.page'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "DIR" in done.stdout, done.stderr
