"""`consilium report` after a real simulation, and its page in a real headless browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from written_runs import write_run

import consilium
from server.checkpoint import RunFolder
from server.report_page.page import content_of_folder, write_page

PHONE, DESKTOP = 360, 1280
HOSTILE = "<script>document.title = 'broken'; console.error('hostile')</script>"
OVERFLOWING = """
[...document.querySelectorAll("main *")]
  .filter(element => element.getBoundingClientRect().right > innerWidth && !element.closest(".scroll"))
  .map(element => element.tagName + " " + element.className)
"""
CUT = """
[...document.querySelectorAll(".scroll")].filter(box => getComputedStyle(box).overflowX !== "auto").length
"""
TEXT_SIZES = """
[...document.querySelectorAll("svg[role=img] text")].map(text => text.getBoundingClientRect().height)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of runs of every kind, by name."""
    folder = tmp_path_factory.mktemp("pages")
    many = [f"hospital-{number:03d}" for number in range(100)]
    scores = {name: {"base": {"accuracy": 0.5}, "best": {"accuracy": 0.6, "examples": 9.0}} for name in many}
    lm = {"task": {"name": "causal-lm"}}
    write_run(folder / "finished")
    write_run(folder / "no-privacy", ["solo"], mechanism="none", kind="simulation")
    write_run(folder / "hostile", [HOSTILE, "b" * 200], done=3, error=HOSTILE)
    write_run(folder / "not-begun", [], done=0)
    write_run(folder / "perplexity", metrics=lambda n: {"loss": 4.0 - n, "perplexity": 60.0 - n}, settings=lm)
    write_run(
        folder / "many",
        many,
        rounds=90,
        outcomes=lambda round, site: ("rejected", "late") if round % 9 == int(site[-1]) else ("admitted", ""),
        summary={"by_site": {"split": "test", "sites": scores}},
    )
    drawn = [HOSTILE, "b" * 200, *many[:48]]
    write_run(
        folder / "by-site",
        drawn,
        rounds=60,
        kind="simulation",
        metrics=lambda n: {"loss": 2.0, "accuracy": 0.9 - 0.4 / (1 + n), "examples": 500.0},
        by_site=lambda n: {site: 0.3 + place / 100 + n / 600 for place, site in enumerate(drawn)},
    )
    for run in list(folder.iterdir()):
        write_page(content_of_folder(run), folder / f"{run.name}.html")
    return {page.stem: page for page in folder.glob("*.html")}


KINDS = ["finished", "no-privacy", "hostile", "not-begun", "perplexity", "many", "by-site"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fits_its_window_says_nothing_on_the_console_and_asks_no_network(
    browser: Browser, pages: dict[str, Path], kind: str, width: int
) -> None:
    browser.open(pages[kind], width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOWING) == [] and browser.value(CUT) == 0
    assert browser.console == [] and browser.requests == []
    assert browser.value("document.title") != "broken"


def test_the_browser_would_tell_a_request_a_fault_and_a_page_too_wide(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    body = '<main><p style="width:900px">wide</p></main><img src="http://127.0.0.1:9/x.png"><script>missing()</script>'
    page.write_text(f'<!DOCTYPE html><html lang="en"><title>bad</title><body>{body}', encoding="utf-8")
    browser.open(page, PHONE)
    assert browser.requests == ["http://127.0.0.1:9/x.png"] and browser.console
    assert browser.value("document.documentElement.scrollWidth") > PHONE and browser.value("document.title") == "bad"


@pytest.mark.parametrize("kind", ["finished", "by-site"])
def test_the_text_of_charts_can_be_read_on_a_phone(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    browser.open(pages[kind], PHONE)
    sizes = [size for size in browser.value(TEXT_SIZES) if size]  # what is folded up has none
    assert len(sizes) > 20 and min(sizes) >= 9  # the height of a line, in CSS pixels


def test_a_browser_that_does_not_run_scripts_misses_nothing(pages: dict[str, Path]) -> None:
    assert not any("<script" in page.read_text(encoding="utf-8") for page in pages.values())


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_small_charts_stand_side_by_side_under_the_names_of_their_sites(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.open(pages["by-site"], width)
    boxes = browser.value(
        "[...document.querySelectorAll('.panels figure')].filter(one => one.checkVisibility()).map(one => "
        "[one.getBoundingClientRect().left, one.getBoundingClientRect().width, one.innerText.split(/\\s/)[0]])"
    )
    assert len(boxes) == 12 and len({left for left, _, _ in boxes}) == (2 if width == PHONE else 5)
    assert all(width > 130 for _, width, _ in boxes)
    assert boxes[2][2] == "hospital-000"


@pytest.mark.parametrize("kind", ["finished", "many", "by-site"])
def test_the_page_can_be_printed(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    browser.open(pages[kind], DESKTOP)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12


def test_a_simulation_tells_each_sites_share_of_the_held_out_rows_and_its_page_shows_it(
    browser: Browser, tmp_path: Path, tiny_bert: Path, triage_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(
        f"""
[model]
name = "{tiny_bert}"
[task]
labels = ["urgent", "routine", "review"]
max_length = 32
[data]
path = "{triage_data}"
site_column = "hospital"
[simulation]
compare = true
[[phase]]
name = "head"
rounds = 3
sample_rate = 1.0
train = ["head"]
""",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    for arguments in (["simulate", "--config", str(settings), "--out", str(out)], ["report", str(out)]):
        monkeypatch.setattr(sys, "argv", ["consilium", *arguments])
        with pytest.raises(SystemExit) as ended:
            consilium.main()
        assert not ended.value.code
    summary = json.loads((out / "summary.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["started"] <= summary["finished"] and manifest["metric"] == "accuracy"
    by_site = summary["by_site"]
    assert by_site["split"] == "test" and set(by_site["sites"]) == {"north", "south", "west"}
    for part, whole in (("base", summary["comparison"]["base"]["test"]), ("best", summary["test"])):
        # Ten rows of each site: the mean over the sites is the mean over all rows.
        accuracies = [one[part]["accuracy"] for one in by_site["sites"].values()]
        assert sum(accuracies) / 3 == pytest.approx(whole["accuracy"])
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [set(record["by_site"]) for record in rounds] == 4 * [{"north", "south", "west"}]
    checkpoint = RunFolder(out).latest()  # what a resumption goes on from
    assert checkpoint is not None and [one["by_site"] for one in checkpoint.history] == [
        one["by_site"] for one in rounds
    ]
    for record in rounds:  # ten validation rows of each site too, so that a site's accuracy is tenths
        assert sum(record["by_site"].values()) / 3 == pytest.approx(record["metrics"]["accuracy"])
        assert all(round(10 * value, 6).is_integer() for value in record["by_site"].values())
    browser.open(out / "report.html", PHONE)
    assert browser.console == [] and browser.requests == []
    assert browser.value("document.documentElement.scrollWidth") <= PHONE
    shown = str(browser.value("document.body.innerText"))
    assert "Round by round" in shown and "After round 3 the worst served is" in shown
    assert "Worst served is" in shown and "north alone" in shown and "together, without privacy" in shown
    assert summary["run_id"] in shown
