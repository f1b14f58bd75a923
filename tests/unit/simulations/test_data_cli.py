"""``consilium data``: files that a deployment reads as they are, all of them or none, and what the tables say."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from site_files import site_tables, write_site
from typer.testing import CliRunner

import consilium
from client.assemble import rows_of
from client.check import check_site
from client.config import read_site_config
from common.config import RunConfig
from common.data.read import read_rows
from common.errors import ConfigError, ConsiliumError, DataError, OutputError
from common.sections import DataSection
from common.toml_settings import validate
from simulations import site_files
from simulations.data_cli import app
from simulations.federation import Federation

LABELS = ("urgent", "routine", "review")
AWKWARD = ['said "no", then\nleft', "ends with a blank ", "", "naïve — 日本", "a,b;c\t", "=1+1", "\r\n", "  "]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def rows_in(folder: Path, split: str = "train") -> list[tuple[Any, ...]]:
    return list(zip(*read_rows(str(folder), split, ["text", "label", "hospital"], {}).values(), strict=True))


def test_sites_are_written_as_files_that_together_are_the_source(triage_data: Path, tmp_path: Path) -> None:
    record = as_json("partition", "--input", triage_data, "--out", tmp_path / "parts", "--sites", 5)
    assert json.loads((tmp_path / "parts" / "partition.json").read_text()) == record
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["partition.json", *record["sites"]]
    written = {site: rows_in(tmp_path / "parts" / site) for site in record["sites"]}
    assert Counter(row for rows in written.values() for row in rows) == Counter(rows_in(triage_data))
    for site, entry in record["sites"].items():
        assert [path.name for path in (tmp_path / "parts" / site).iterdir()] == ["train.csv"]
        assert entry["rows"] == entry["units"] == len(written[site])
        assert entry["labels"] == Counter(label for _, label, _ in written[site])
    assert record["method"] == "iid" and record["parameters"] == {"sites": 5, "min_size": 1} and record["seed"] == 0


@pytest.mark.parametrize("by", [{"alpha": 0.5, "by": "dirichlet"}, {"by": "square"}, {}])
def test_the_files_have_the_sites_of_a_simulation_with_the_same_settings(
    by: dict[str, Any], triage_data: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    options = [part for name, value in by.items() for part in (f"--{name}", value)]
    common = ("partition", "--input", triage_data, "--out", tmp_path / "parts", "--sites", 4, "--seed", 11)
    run(*common, "--min-size", 2, *options)
    settings: dict[str, Any] = {
        "run": {"seed": 11},
        "model": {"name": str(tiny_bert)},
        "task": {"name": "sequence-classification", "labels": LABELS},
        "data": {"path": str(triage_data), "sites": 4, "min_size": 2},
    }
    settings["data"] |= {{"by": "partition"}.get(name, name): value for name, value in by.items()}
    parts = Federation(validate(RunConfig, settings, "test")).parts
    rows = rows_in(triage_data)
    assert len(parts) == 4
    for site, chosen in parts.items():
        assert rows_in(tmp_path / "parts" / site) == [rows[row] for row in chosen]


def test_a_hospital_reads_its_folder_as_it_is_and_its_check_finds_no_fault(
    triage_data: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    run("partition", "--input", triage_data, "--out", tmp_path / "parts", "--column", "hospital", "--format", "jsonl")
    tables = site_tables(tiny_bert, data={"default": {"path": str(tmp_path / "parts" / "north")}})
    config = read_site_config(write_site(tmp_path, tables))
    assert len(rows_of(config.data["default"], ("text", "label"))["text"]) == 40
    (entry,) = check_site(config, labels=LABELS)["data"].values()
    assert (entry["rows"], entry["faults"]) == (40, 0)


def test_units_stay_whole_and_a_column_that_splits_them_is_told(tmp_path: Path) -> None:
    with (tmp_path / "notes.csv").open("w", newline="") as file:
        rows = [(f"note {n}", "ab"[n % 2], f"ward {n % 3}", f"patient {n // 4}") for n in range(60)]
        csv.writer(file).writerows([("text", "label", "hospital", "patient"), *rows])
    common = ("partition", "--input", tmp_path / "notes.csv", "--unit", "patient")
    record = as_json(*common, "--out", tmp_path / "whole", "--sites", 3, "--by", "linear")
    assert [entry["units"] for entry in record["sites"].values()] == [2, 5, 8]  # of 15: 15/6, 30/6, and the rest
    assert [entry["rows"] for entry in record["sites"].values()] == [8, 20, 32]
    assert record["units_at_several_sites"] == 0
    by_ward = (*common, "--out", tmp_path / "wards", "--column", "hospital")
    assert "15 ids of 'patient' occur at several sites" in run(*by_ward)
    assert json.loads((tmp_path / "wards" / "partition.json").read_text())["units_at_several_sites"] == 15


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_every_value_survives_from_every_format_to_every_other(source: str, kind: str, tmp_path: Path) -> None:
    columns = {"text": AWKWARD, "label": ["1", "2"] * 4, "hospital": ["a", "b"] * 4}
    file = tmp_path / f"notes.{source}"
    if source == "parquet":
        pyarrow.parquet.write_table(pa.table(columns), file)
    elif source == "jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([[*columns], *zip(*columns.values(), strict=True)])
    run("partition", "--input", file, "--out", tmp_path / "parts", "--column", "hospital", "--format", kind)
    for k, site in enumerate(("a", "b")):
        assert rows_in(tmp_path / "parts" / site) == [
            (text, label, site) for text, label in zip(AWKWARD[k::2], columns["label"][k::2], strict=True)
        ]


def test_types_of_a_parquet_file_are_kept(tmp_path: Path) -> None:
    schema = pa.schema(
        {"text": pa.large_string(), "label": pa.int8(), "at": pa.timestamp("ns"), "vector": pa.list_(pa.float32())}
    )
    table = pa.table({"text": ["a", "b"], "label": [1, None], "at": [0, 1], "vector": [[1.5], []]}, schema)
    pyarrow.parquet.write_table(table, tmp_path / "notes.parquet")
    run("partition", "--input", tmp_path / "notes.parquet", "--out", tmp_path / "parts", "--sites", 1)
    assert pyarrow.parquet.read_table(tmp_path / "parts" / "site-1" / "train.parquet").equals(table)
    with pytest.raises(
        DataError, match=r"--format csv: column 'vector' holds more than text and numbers; use --format"
    ):
        run(
            "partition", "--input", tmp_path / "notes.parquet", "--out", tmp_path / "2", "--sites", 1, "--format", "csv"
        )
    assert not (tmp_path / "2").exists()


def test_a_used_folder_is_left_alone_and_an_empty_one_is_taken(triage_data: Path, tmp_path: Path) -> None:
    common = ("partition", "--input", triage_data, "--sites", 2, "--out")
    (tmp_path / "empty").mkdir()
    run(*common, tmp_path / "empty")
    before = {path: path.read_bytes() for path in (tmp_path / "empty").rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    for used in ("empty", "file"):
        with pytest.raises(OutputError, match=rf"--out {tmp_path / used}: exists and is not an empty folder"):
            run(*common, tmp_path / used)
    assert {path: path.read_bytes() for path in (tmp_path / "empty").rglob("*") if path.is_file()} == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(
    failure: BaseException, triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def third_fails(table: object) -> Callable[..., None]:
        def write(path: Path, rows: object) -> None:
            nonlocal calls
            calls += 1
            path.write_text("half")
            if calls == 3:
                raise failure

        return write

    monkeypatch.setitem(site_files._WRITERS, "csv", third_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        site_files.write_sites(triage_data, "train", DataSection(sites=5), 0, None, None, tmp_path / "new" / "parts")
    assert calls == 3 and [*(tmp_path / "new").iterdir()] == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--sites", "0"], "data.sites = 0"),
        (["--sites", "100"], "data.sites = 100: there are only 77 rows; use fewer sites"),
        (["--sites", "3", "--by", "dirichlet"], "data.alpha: is missing"),
        (["--sites", "3", "--by", "dirichlet", "--alpha", "0"], "data.alpha = 0.0: should be greater than 0"),
        (["--sites", "3", "--by", "dirichlet", "--alpha", "-1"], "data.alpha = -1.0: should be greater than 0"),
        (["--sites", "3", "--alpha", "1"], "data.alpha = 1.0: belongs to partition = 'dirichlet'"),
        (
            ["--sites", "3", "--by", "pathological", "--classes-per-site", "4"],
            "data.classes_per_site = 4: the data have 3",
        ),
        (["--sites", "3", "--column", "hospital"], "data.site_column = 'hospital': says which rows belong to which"),
        ([], "data.site_column or data.sites: one is needed"),
        (["--column", "hospitl"], "--column hospitl: "),
        (["--sites", "3", "--label", "lable"], "--label lable: "),
        (["--sites", "3", "--unit", "patient"], "--unit patient: "),
        (["--sites", "3", "--split", "held-out"], "no file for split 'held-out'"),
        (["--sites", "3", "--input", "absent"], "'absent': no such file or folder"),
    ],
)
def test_bad_input_is_one_error_exit_code_2_and_no_folder(
    options: list[str],
    problem: str,
    triage_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--input", str(triage_data), "--out", str(tmp_path / "parts"), *options]
    monkeypatch.setattr(sys, "argv", ["consilium", "data", "partition", *arguments])
    with pytest.raises(SystemExit) as ended:
        consilium.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and problem in said.err and said.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_a_row_without_a_unit_or_a_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text,label,patient\na,x,1\nb,,2\nc,y,\n")
    common = ("partition", "--input", tmp_path / "notes.csv", "--out", tmp_path / "parts", "--sites", 1)
    with pytest.raises(DataError, match=r"--unit patient: row 2 of .* names no unit"):
        run(*common, "--unit", "patient")
    with pytest.raises(DataError, match="row 1 has no label"):
        run(*common, "--by", "dirichlet", "--alpha", "1")
    assert run(*common).count("site-1") == 2


def test_partitioning_opens_no_connection_and_prints_nothing_of_the_library(
    triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refused)
    result = CliRunner().invoke(
        app, ["partition", "--input", str(triage_data), "--out", str(tmp_path / "parts"), "--sites", "12", "--by",
              "dirichlet", "--alpha", "0.1", "--json"]
    )  # fmt: skip
    assert result.exit_code == 0 and result.stderr == "" and json.loads(result.stdout)["method"] == "dirichlet"


def test_the_table_of_a_partition_says_sizes_and_how_a_site_takes_them(triage_data: Path, tmp_path: Path) -> None:
    out = run("partition", "--input", triage_data, "--out", tmp_path / "parts", "--column", "hospital")
    assert "77 rows by column: site_column = hospital" in out and "north" in out and "40" in out
    assert f'path = "{tmp_path / "parts" / "north"}"' in out and "for their owner alone" in out


def test_a_look_prints_tables_and_leaves_a_picture_and_its_figures(triage_data: Path, tmp_path: Path) -> None:
    out = run("look", triage_data, "--site-column", "hospital", "--out", tmp_path / "looked")
    assert "north" in out and "routine" in out and "are for the owner of the data alone" in out
    assert sorted(path.name for path in (tmp_path / "looked").iterdir()) == ["look.json", "look.png"]
    found = as_json("look", triage_data, "--site-column", "hospital")
    assert json.loads((tmp_path / "looked" / "look.json").read_text()) == found
    assert {site: entry["rows"] for site, entry in found["sites"].items()} == {"north": 40, "south": 25, "west": 12}
    assert found["labels"] == {"urgent": 26, "routine": 26, "review": 25}
    assert "owner of the data alone" in found["notice"]


def test_a_look_at_what_partition_wrote_has_its_sizes(triage_data: Path, tmp_path: Path) -> None:
    record = as_json("partition", "--input", triage_data, "--out", tmp_path / "parts", "--sites", 3, "--by", "square")
    found = as_json("look", tmp_path / "parts")
    for site, entry in record["sites"].items():
        assert found["sites"][site]["rows"] == entry["rows"] and found["sites"][site]["labels"] == entry["labels"]


def test_tokens_are_those_of_the_models_own_tokenizer(tmp_path: Path, tiny_bert: Path) -> None:
    (tmp_path / "notes.csv").write_text("text\nmild cough\n" + "cough " * 300 + "\n")
    found = as_json("look", tmp_path / "notes.csv", "--model", tiny_bert)
    assert found["sites"]["all rows"]["tokens"] == {"median": 4, "most": 302, "longest": 302}  # with [CLS] and [SEP]
    with pytest.raises(ConsiliumError) as caught:
        run("look", tmp_path / "notes.csv", "--model", tmp_path / "absent")
    remedy = "give 'minilm', an existing folder or a hub id"
    assert str(caught.value) == f"--model {tmp_path / 'absent'}: no such folder; {remedy}"


def test_what_the_data_say_is_not_taken_for_markup(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text,label\na,[red]no[/red]\nb,[/]\n")
    assert "[red]no[/red]" in run("look", tmp_path / "notes.csv")


@pytest.mark.parametrize("command", ["partition", "look"])
def test_help_has_examples_and_says_whose_the_data_are(command: str) -> None:
    text = " ".join(run(command, "--help").split())
    assert text.count(f"consilium data {command}") >= 4 and "Examples:" in text and "owner of the data alone" in text


def test_help_needs_none_of_the_heavy_libraries() -> None:
    script = (
        "import sys; sys.argv = ['consilium', 'data', 'look', '--help']; import consilium\n"
        "try: consilium.main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'pyarrow'} & {*sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(consilium.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_real_data_are_split_by_their_column(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "medquad_qtype"
    record = as_json("partition", "--input", source, "--out", tmp_path / "parts", "--column", "client",
                     "--label", "label_name")  # fmt: skip
    assert len(record["sites"]) == 9 and record["sites"]["GARD"]["rows"] == 4253 and record["rows"] == 12030
    assert pyarrow.parquet.read_table(tmp_path / "parts" / "CDC" / "train.parquet").num_rows == 224


def test_settings_are_named_as_a_run_names_them(triage_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"consilium data partition: data\.min_size = 0"):
        run("partition", "--input", triage_data, "--out", tmp_path / "parts", "--sites", 3, "--min-size", 0)
