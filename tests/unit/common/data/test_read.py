"""Reading a split: three kinds of file, named columns, and one message for whatever is missing or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.read import count_rows, has_split, is_file, read_rows
from common.errors import DataError

ROWS = [
    {"note": "fever, since\ntwo days", "class": "urgent"},
    {"note": 'she said "äh"', "class": "routine"},
    {"note": "rash", "class": "urgent"},
]
EXPECTED = {"text": [row["note"] for row in ROWS], "label": ["urgent", "routine", "urgent"]}
COLUMNS = {"text": "note", "label": "class"}
FIELDS = ("text", "label")

Write = Callable[[Path, list[dict[str, Any]]], None]


def csv(path: Path, rows: list[dict[str, Any]]) -> None:
    def quoted(value: Any) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(map(quoted, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


KINDS: dict[str, Write] = {".csv": csv, ".jsonl": jsonl, ".json": jsonl, ".parquet": parquet}


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with train and empty-handed neighbours, in each kind of file."""
    KINDS[request.param](tmp_path / f"train{request.param}", ROWS)
    return tmp_path


def refused(source: Path | str, split: str = "train", columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(str(source), split, FIELDS, COLUMNS if columns is None else columns)
    return str(caught.value)


# ---- what is there --------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(folder: Path) -> None:
    assert read_rows(str(folder), "train", FIELDS, COLUMNS) == EXPECTED
    assert count_rows(str(folder), "train") == 3
    assert has_split(str(folder), "train") and not has_split(str(folder), "test")


def test_a_single_file_is_read_whatever_the_split(folder: Path) -> None:
    (file,) = folder.iterdir()
    assert is_file(str(file)) and not is_file(str(folder))
    assert read_rows(str(file), "anything", FIELDS, COLUMNS) == EXPECTED


def test_a_field_is_read_from_the_column_of_its_own_name_unless_one_is_named(tmp_path: Path) -> None:
    csv(tmp_path / "train.csv", [{"text": "a", "label": "b", "other": "c"}])
    assert read_rows(str(tmp_path), "train", FIELDS, {}) == {"text": ["a"], "label": ["b"]}
    assert read_rows(str(tmp_path), "train", FIELDS, {"text": "other"}) == {"text": ["c"], "label": ["b"]}


def test_csv_values_are_text_as_written(tmp_path: Path) -> None:
    """Labels called 1 and 2 are names, not ids; a date, a truth value or NA is what was written."""
    rows = [
        {"text": "2024-01-31", "label": "1"},
        {"text": "true", "label": "02"},
        {"text": "NA", "label": ""},
        {"text": "1e5", "label": "null"},
    ]
    csv(tmp_path / "train.csv", rows)
    assert read_rows(str(tmp_path), "train", FIELDS, {}) == {
        "text": ["2024-01-31", "true", "NA", "1e5"],
        "label": ["1", "02", "", "null"],
    }


def test_numbers_and_missing_values_of_typed_files_stay_what_they_are(tmp_path: Path) -> None:
    for write, name in ((jsonl, "train.jsonl"), (parquet, "test.parquet")):
        write(tmp_path / name, [{"text": "a", "label": 1}, {"text": None, "label": 2}])
        assert read_rows(str(tmp_path), Path(name).stem, FIELDS, {}) == {"text": ["a", None], "label": [1, 2]}


def test_a_byte_order_mark_is_not_part_of_the_first_columns_name(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\r\na,b\r\n")
    assert read_rows(str(tmp_path), "train", FIELDS, {}) == {"text": ["a"], "label": ["b"]}


# ---- what is missing or wrong ---------------------------------------------------------------------------------------


def test_a_missing_path_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.data.read._from_hub", lambda *_: pytest.fail("the hub was asked"))
    for source in (tmp_path / "absent", "./absent", "~/absent", "a/b/c", "absent.csv"):
        assert f"data.path = '{source}': no such file or folder" in refused(source)


def test_a_missing_split_says_what_is_there(tmp_path: Path) -> None:
    csv(tmp_path / "train.csv", ROWS)
    (tmp_path / "README.md").touch()
    told = refused(tmp_path, "validation")
    assert (
        "no file for split 'validation' (looked for validation.parquet, .csv, .jsonl, .json; found: train.csv)" in told
    )
    assert "found: none of these kinds" in refused(tmp_path.parent, "validation")


def test_a_missing_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    csv(tmp_path / "train.csv", ROWS)
    told = refused(tmp_path, columns={"text": "notes", "label": "class"})
    assert told.startswith("data.columns.text = 'notes': ")
    assert told.endswith("has no such column (did you mean 'note'?); columns: note, class")


def test_a_column_named_for_no_field_of_the_task_is_refused(tmp_path: Path) -> None:
    told = refused(tmp_path, columns={**COLUMNS, "lable": "class"})
    assert told == "data.columns: 'lable' is not a field of this task (did you mean 'label'?); fields: text, label"


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("note,class,note\na,b,c\n", encoding="utf-8")
    assert "data.columns.text = 'note'" in refused(tmp_path) and "several columns" in refused(tmp_path)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("note,class\n", encoding="utf-8")
    pq.write_table(
        pa.table({"note": pa.array([], pa.string()), "class": pa.array([], pa.string())}), tmp_path / "t.parquet"
    )
    for source in (tmp_path / "train.csv", tmp_path / "t.parquet"):
        assert refused(source).endswith("has no rows; give a file with at least one example")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", b""),
        ("train.csv", b'note,class\n"a,b\n'),
        ("train.csv", b"note,class\na,b,c\n"),
        ("train.csv", b"note,class\n\xff\xfe,b\n"),
        ("train.jsonl", b""),
        ("train.jsonl", b'{"note": '),
        ("train.json", b'[{"note": "a", "class": "b"}]'),
        ("train.parquet", b"PAR1 not really"),
        ("train.parquet", b""),
    ],
)
def test_a_damaged_file_is_named_with_its_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    told = refused(tmp_path)
    assert told.startswith(f"data: {tmp_path / name} cannot be read as {name.split('.')[1]}: ")
    assert "\n" not in told


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.xlsx").touch()
    assert "is of an unknown kind '.xlsx'; use csv, jsonl or parquet" in refused(tmp_path / "notes.xlsx")


def test_a_hub_that_does_not_deliver_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("a very long text about the network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    told = refused("someone/data")
    assert told.startswith(
        "data.path = 'someone/data': no such file or folder, and the hub did not deliver split 'train'"
    )
    assert "(ConnectionError)" in told and "long text" not in told


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def deliver(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", deliver)
    assert read_rows("someone/data", "validation", FIELDS, COLUMNS) == EXPECTED
    assert asked == [("someone/data", "validation")]


# ---- the real data --------------------------------------------------------------------------------------------------


def test_the_real_data_sets_are_read_as_the_examples_name_their_columns(shared_data: Path) -> None:
    rows = read_rows(
        str(shared_data / "medquad_qtype"),
        "train",
        ("text", "label", "site"),
        {"label": "label_name", "site": "client"},
    )
    assert len(set(rows["site"])) == 9 and len(set(rows["label"])) == 11
    answers = read_rows(
        str(shared_data / "medquad_qa"),
        "test",
        ("prompt", "completion"),
        {"prompt": "question", "completion": "answer"},
    )
    assert all(isinstance(text, str) and text for text in answers["prompt"])


def test_one_line_does_not_change_how_the_others_are_read(tmp_path: Path) -> None:
    lines = [{"text": "2026-01-01"}, {"text": 7}, {"text": None}, {"other": "x"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_rows(str(tmp_path), "train", ["text"], {}) == {"text": ["2026-01-01", 7, None, None]}


# ---- one cell says nothing of the others ----------------------------------------------------------------------------


def texts(*written: bytes) -> pa.Array:
    """A column of text whose bytes nobody has checked, as other programs write it."""
    return pa.Array.from_buffers(pa.string(), len(written), pa.array(written, pa.binary()).buffers())


COLUMNS_WITH_ONE_UNREADABLE_CELL = {
    "not UTF-8": texts(b"fever", b"caf\xe9", b"rash"),
    "a list with text that is not UTF-8": pa.ListArray.from_arrays([0, 1, 2, 3], texts(b"fever", b"caf\xe9", b"rash")),
    "a day beyond the year 9999": pa.array([0, 2**30, 1], pa.int32()).view(pa.date32()),
    "a time beyond the year 9999": pa.array([0, 2**62, 1], pa.int64()).view(pa.timestamp("us")),
    "such a time of some zone": pa.array([0, 2**62, 1], pa.int64()).view(pa.timestamp("ms", "UTC")),
}


@pytest.mark.parametrize("kind", COLUMNS_WITH_ONE_UNREADABLE_CELL)
def test_a_cell_that_cannot_be_read_is_missing_and_the_others_are_read_as_without_it(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.table({"note": COLUMNS_WITH_ONE_UNREADABLE_CELL[kind], "class": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "with.parquet")
    pq.write_table(table.take([0, 2]), tmp_path / "without.parquet")
    others = read_rows(str(tmp_path / "without.parquet"), "", FIELDS, COLUMNS)
    assert None not in others["text"] and not caplog.records
    found = read_rows(str(tmp_path / "with.parquet"), "", FIELDS, COLUMNS)
    assert found == {"text": [others["text"][0], None, others["text"][1]], "label": ["a", "b", "c"]}
    assert "1 of 3 cells of column 'note' cannot be read as" in caplog.text and "caf" not in caplog.text


def test_a_file_whose_categories_cannot_be_read_is_refused_when_it_is_counted(tmp_path: Path) -> None:
    """They are read with the file, which the start of an agent does; no round comes so far."""
    notes = pa.DictionaryArray.from_arrays([0, 1, 0], texts(b"fever", b"caf\xe9"))
    pq.write_table(pa.table({"note": notes}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet: Invalid UTF8 payload"):
        count_rows(str(tmp_path), "train")


NEST = "[" * 100 + "]" * 100


@pytest.mark.parametrize(
    "nest", ["[" + NEST + "]", '{"a":' * 101 + "1" + "}" * 101, "[" * 5000 + "]" * 5000, "[" * 100_000]
)
def test_what_is_nested_too_deeply_is_named_by_its_line(tmp_path: Path, nest: str) -> None:
    (tmp_path / "train.jsonl").write_text(f'{{"note": "a"}}\n{{"note": {nest}}}\n', encoding="utf-8")
    assert "cannot be read as jsonl: line 2 is " in refused(tmp_path)


def test_how_deep_a_line_may_be_nested_does_not_depend_on_who_reads_it(tmp_path: Path) -> None:
    """The interpreter's own limit counts the callers' frames too: what the start reads, a round might not."""

    def below(frames: int) -> str | list[Any]:
        if frames:
            return below(frames - 1)
        try:
            return read_rows(str(tmp_path), "train", ["text"], {})["text"]
        except DataError as error:
            return str(error)

    for nest in (NEST[1:-1], "[" * 900 + "]" * 900, json.dumps("[{" * 200)):
        (tmp_path / "train.jsonl").write_text(f'{{"text": {nest}}}\n', encoding="utf-8")
        assert below(0) == below(500)
    assert below(0) == ["[{" * 200]  # brackets in a text nest nothing
    (tmp_path / "train.jsonl").write_text(f'{{"text": {NEST[1:-1]}}}\n', encoding="utf-8")
    assert below(500) == [json.loads(NEST[1:-1])]
    assert len(str(below(500))) == 200
