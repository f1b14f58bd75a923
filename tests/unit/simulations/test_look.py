"""A look at a data set: every figure counted by hand, the picture readable, and nothing sent."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from common.errors import ConfigError, DataError, OutputError
from simulations.look import ONE_SITE, Columns, Lengths, Look, SiteView, look, shown
from simulations.look_chart import COLOURS, HATCHES, MOST_LABELS, OTHERS, draw, draw_lengths, draw_sites, shares_of

ALL = Columns(site="ward", unit="patient")


def write(path: Path, rows: Sequence[tuple[str, str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "ward", "patient"), *rows])


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Two wards with a repeated text, one that both have, and one that is in training and test data."""
    write(
        tmp_path / "notes" / "train.csv",
        [
            ("mild cough", "routine", "north", "1"),
            ("Mild  cough ", "routine", "north", "1"),  # the same but for case and blanks
            ("fever", "urgent", "north", "2"),
            ("", "urgent", "north", ""),
            ("fever", "urgent", "south", "3"),
            ("rash", " ", "south", "3"),
            ("broken arm", "urgent", "south", "4"),
        ],
    )
    write(tmp_path / "notes" / "validation.csv", [("sore throat", "routine", "north", "5")])
    write(
        tmp_path / "notes" / "test.csv",
        [("RASH", "routine", "south", "9"), ("sore throat", "routine", "north", "4"), ("burn", "urgent", "south", "")],
    )
    return tmp_path / "notes"


def test_each_sites_figures_are_those_that_one_counts_by_hand(notes: Path) -> None:
    assert look(notes, ALL).sites == {
        "north": SiteView(
            rows=4,
            units=2,
            labels={"routine": 2, "urgent": 2},
            without_text=1,
            without_label=0,
            repeated=1,
            elsewhere=1,
            characters=Lengths(median=10, most=12, longest=12),  # 5, 10, 12
            tokens=None,
        ),
        "south": SiteView(3, 2, {"urgent": 2}, 0, 1, 0, 1, Lengths(5, 10, 10), None),  # 4, 5, 10
    }


def test_splits_tell_what_is_missing_and_what_was_seen_in_training(notes: Path) -> None:
    splits = look(notes, ALL).splits
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].missing == {"text": 1, "label": 1, "patient": 1}
    assert (splits["train"].rows, splits["train"].repeated) == (7, 2)
    assert splits["train"].leaked == splits["train"].leaked_units == {}
    assert splits["test"].leaked == {"train": 1, "validation": 1}
    assert splits["test"].leaked_units == {"train": 1, "validation": 0}


def test_a_folder_of_sites_has_the_same_figures_as_one_file_with_a_column(notes: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        with (notes / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [tuple(row.values()) for row in csv.DictReader(file)]
        for ward in ("north", "south"):
            if chosen := [row for row in rows if row[2] == ward]:
                write(tmp_path / "sites" / ward / f"{split}.csv", chosen)  # type: ignore[arg-type]
    (tmp_path / "sites" / "partition.json").write_text("{}")
    assert look(tmp_path / "sites", Columns(unit="patient")) == look(notes, ALL)


def test_without_a_column_all_rows_are_one_site_and_a_file_is_one_split(notes: Path) -> None:
    found = look(notes / "train.csv", Columns())
    assert list(found.sites) == [ONE_SITE] and list(found.splits) == ["train"]
    assert found.sites[ONE_SITE].units is None
    assert found.labels == {"urgent": 4, "routine": 2}


def test_a_column_of_labels_may_be_absent_unless_it_is_named(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "plain.csv", [("a", "b", "c", "d")])
    text = (tmp_path / "plain.csv").read_text().replace("label", "answer")
    (tmp_path / "plain.csv").write_text(text)
    found = look(tmp_path / "plain.csv", Columns())
    assert found.labels == {} and found.sites[ONE_SITE].without_label == 0
    with pytest.raises(DataError, match=r"--label labels: .* has no such column \(did you mean 'label'\?\)"):
        look(notes, Columns(label="labels"))


def test_tokens_are_counted_for_the_texts_that_are_there_and_drawn_in_place_of_characters(notes: Path) -> None:
    found = look(notes, ALL, count_tokens=lambda texts: [len(text.split()) for text in texts])
    assert found.in_tokens and sorted(found.lengths) == [1, 1, 1, 2, 2, 2]
    assert found.sites["north"].tokens == Lengths(2, 2, 2) and found.sites["south"].tokens == Lengths(1, 2, 2)


def test_the_median_and_the_95_percent_are_lengths_that_occur() -> None:
    assert Lengths.of(list(range(1, 101))) == Lengths(50, 95, 100)
    assert Lengths.of([]) == Lengths(0, 0, 0)


@pytest.mark.parametrize(
    ("path", "columns", "split", "problem"),
    [
        ("absent", ALL, "train", "no such file or folder"),
        ("notes", Columns(text="note"), "train", "--text note: "),
        ("notes", Columns(site="hospital"), "train", "--site-column hospital: "),
        ("notes", ALL, "held-out", "--split held-out: .* has no such file; found: train, validation, test"),
        ("empty", ALL, "train", "neither it nor its folders hold a file of train, validation, test"),
    ],
)
def test_what_cannot_be_looked_at_is_one_error(
    notes: Path, path: str, columns: Columns, split: str, problem: str
) -> None:
    (notes.parent / "empty").mkdir()
    with pytest.raises(DataError, match=problem):
        look(notes.parent / path, columns, split)


def test_sites_cannot_be_given_by_folders_and_by_a_column(notes: Path, tmp_path: Path) -> None:
    write(tmp_path / "sites" / "north" / "train.csv", [("a", "b", "c", "d")])
    with pytest.raises(ConfigError, match="--site-column ward: the folders"):
        look(tmp_path / "sites", ALL)


def test_looking_and_drawing_opens_no_connection(notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "socket", refused)
    found = look(notes, ALL)
    draw(found, tmp_path / "look.png")
    assert json.loads(json.dumps(found.as_json()))["notice"].startswith("These figures are of the raw rows")


def invented(sites: int, labels: int = 3, names: Sequence[str] = ()) -> Look:
    """A look at sites of 60 rows and more, whose first label has a third of the rows."""
    each = {(names[n] if n < len(names) else f"label {n}"): 20 for n in range(labels)}
    lengths = Lengths(50, 95, 100)
    view = {f"site-{k:03d}": SiteView(60 + k, None, each, 0, 0, 0, 0, lengths, None) for k in range(sites)}
    return Look("train", view, {}, tuple(range(1, 101)), False)


def drawn(found: Look) -> Any:
    axes = Figure(figsize=(11, 6)).subplots()
    draw_sites(axes, found)
    return axes


@pytest.mark.parametrize("sites", [1, 2, 60, 400])
def test_the_picture_is_written_whole_for_two_sites_and_for_hundreds(sites: int, tmp_path: Path) -> None:
    draw(invented(sites), tmp_path / "look.png")
    height, width, _ = imread(tmp_path / "look.png").shape
    assert width == 1540 and 500 < height < 3500
    assert [file.name for file in tmp_path.iterdir()] == ["look.png"]


def test_bars_add_up_to_all_rows_of_each_site() -> None:
    axes = drawn(invented(4))
    ends = [0.0] * 4
    for bars in axes.containers:
        for site, bar in enumerate(bars):
            assert bar.get_x() == pytest.approx(ends[site])
            ends[site] += bar.get_width()
    assert ends == pytest.approx([100.0] * 4)
    assert axes.get_yticklabels()[0].get_text() == "site-000  (60)"
    assert axes.yaxis_inverted()  # the first site on top


def test_labels_can_be_told_apart_by_colour_and_hatching() -> None:
    axes = drawn(invented(2, labels=MOST_LABELS))
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers}
    assert len(looks) == MOST_LABELS == len(COLOURS) * len(HATCHES) - 1


def test_of_too_many_labels_the_rarest_are_drawn_together() -> None:
    found = invented(2, labels=50)
    shares = shares_of(found.sites, [*found.labels])
    assert len(shares) == MOST_LABELS and [*shares][-1] == OTHERS
    assert [sum(of_site) for of_site in zip(*shares.values(), strict=True)] == pytest.approx([100.0, 100.0])
    assert shares[OTHERS] == pytest.approx([2.0 * (50 - MOST_LABELS + 1)] * 2)


def test_names_from_the_data_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = ["_hidden", "$x^{", "日本", "two\nlines\x1b[31m", "w" * 60]
    found = invented(2, labels=5, names=names)
    legend = [text.get_text() for text in drawn(found).get_legend().get_texts()]
    assert set(legend) == {" _hidden", "$x^{", "日本", "two lines [31m", "w" * 27 + "…"}
    draw(found, tmp_path / "look.png")
    assert shown("plain") == "plain"


def test_sites_without_labels_and_texts_are_drawn_too(tmp_path: Path) -> None:
    empty = SiteView(3, None, {}, 3, 3, 0, 0, Lengths(0, 0, 0), None)
    draw(Look("train", {"north": empty}, {}, (), False), tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 1000


def test_the_histogram_counts_every_text_that_it_does_not_say_it_leaves_out() -> None:
    found = Look("train", {}, {}, (*range(1, 1000), 90_000), True)
    axes = Figure().subplots()
    draw_lengths(axes, found)
    assert sum(bar.get_height() for bar in axes.patches) + 5 == 1000
    (left_out,) = (text.get_text() for text in axes.get_legend().get_texts() if "longer" in text.get_text())
    assert left_out == "5 longer, up to 90,000: not drawn"
    assert axes.get_xlabel() == "tokens"


def test_a_picture_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        draw(invented(2), tmp_path / "absent" / "look.png")
