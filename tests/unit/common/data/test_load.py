"""From a source to encoded examples."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from common.adapted import AdaptedModel
from common.data.load import describe, encode_all, load_rows
from common.errors import DataError
from common.sections import TaskSection
from common.tasks.base import Fault
from common.tasks.registry import task_of

Load = Callable[..., AdaptedModel]

TASK = task_of(TaskSection(labels=("urgent", "routine", "review")))


def test_rows_come_with_the_values_of_the_site_column_beside_them(triage_data: Path) -> None:
    loaded = load_rows(str(triage_data), "train", TASK, {}, "hospital")
    rows, sites = loaded.rows, loaded.sites
    assert set(rows) == {"text", "label"}
    assert {site: sites.count(site) for site in sites} == {"north": 40, "south": 25, "west": 12}
    plain = load_rows(str(triage_data), "train", TASK, {})
    without, none = plain.rows, plain.sites
    assert (without, none) == (rows, [])


def test_of_a_single_file_no_row_is_learnt_from_and_tested_on(triage_data: Path, tmp_path: Path) -> None:
    """Sites read it with the site column, the server without."""
    files = [(triage_data / f"{split}.csv").read_text(encoding="utf-8") for split in ("train", "validation", "test")]
    header = files[0].partition("\n")[0]
    notes = "".join(file.partition("\n")[2] for file in files)
    (tmp_path / "all.csv").write_text(f"{header}\n{notes}", encoding="utf-8")
    source = str(tmp_path / "all.csv")
    learnt = load_rows(source, "train", TASK, {}, "hospital")
    trained, sites = learnt.rows, learnt.sites
    assert len(sites) == len(trained["text"])
    held_out = [load_rows(source, split, TASK, {}).rows["text"] for split in ("validation", "test")]
    assert not set(trained["text"]) & {*held_out[0], *held_out[1]}
    assert len(trained["text"]) + len(held_out[0]) + len(held_out[1]) == 137


def test_a_missing_site_column_is_named(triage_data: Path) -> None:
    with pytest.raises(DataError, match=r"'hospitl': .* has no such column \(did you mean 'hospital'\?\)"):
        load_rows(str(triage_data), "train", TASK, {}, "hospitl")


def test_rows_that_cannot_be_learnt_from_are_told_with_the_first_reasons(
    tmp_path: Path, tiny_bert: Path, adapted_model: Load
) -> None:
    with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["text", "label"], ["rash", "urgent"], ["", "urgent"], ["rash", "bad"], [" ", "worse"]])
    model = adapted_model(tiny_bert)
    loaded = load_rows(str(tmp_path), "train", model.task, {}).rows
    with pytest.raises(DataError) as caught:
        encode_all(loaded, model.task, model.base.tokenizer, "train.csv")
    assert str(caught.value) == (
        "data: train.csv: 3 rows cannot be learnt from: row 1: text is empty; row 2: label 'bad' is not one of the "
        "declared labels; row 3: text is empty (and 1 more); mend or drop these rows"
    )


def test_good_rows_become_examples(triage_data: Path, tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    loaded = load_rows(str(triage_data), "test", model.task, {}).rows
    examples = encode_all(loaded, model.task, model.base.tokenizer, "test")
    assert len(examples) == 30 and all(item is not None for item in examples.encoded)


def test_faults_are_counted_by_row() -> None:
    faults = [Fault(0, "text", "is empty"), Fault(0, "label", "is unknown")]
    assert describe(faults) == "1 rows cannot be learnt from: row 0: text is empty; row 0: label is unknown"
