"""A person or a data set withdraws: everything of them at the site goes, the rest stays, and no crash leaves a half."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import typer
from click.testing import Result
from site_files import site_tables, write_site
from small_ledgers import STATEMENT
from typer.testing import CliRunner

import client.record_files
from client.announce import catch_up
from client.audit_log import AuditLog, verify
from client.config import SiteConfig, read_site_config
from client.privacy.ledger import Decision, Ledger, Population
from client.setup_cli import register
from client.withdrawal import Outcome, Request, withdraw
from client.withdrawal_journal import refuse_interrupted
from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError, DataError, LedgerError
from common.plan import Plan, plan_of
from common.prefix_files import cache_folder

REPOSITORY = Path(__file__).parents[3]

CSV = (
    b"\xef\xbb\xbfpatient_id,note,label\r\n"
    b'P7,"says ""no"", and\r\nP8 agrees",urgent\r\n'
    b"P8,mild cough,routine\n"
    b"\n"
    b'"P9", 5\'10" tall ,routine\n'
    b'" P7 ",back again,routine\r\n'
    b'P10,"last line, no end",urgent'
)
CSV_WITHOUT_P7 = (
    b"\xef\xbb\xbfpatient_id,note,label\r\n"
    b"P8,mild cough,routine\n"
    b"\n"
    b'"P9", 5\'10" tall ,routine\n'
    b'P10,"last line, no end",urgent'
)
LINES = (
    b'{"patient_id": "P7", "note": "one"}\n'
    b'{"note":"two",   "patient_id":"P8"}\r\n'
    b"\n"
    b'{"note": "nobody\\u2019s"}\n'
    b'{"patient_id": "P7"}'
)
LINES_WITHOUT_P7 = b'{"note":"two",   "patient_id":"P8"}\r\n\n{"note": "nobody\\u2019s"}\n'
PARQUET = pa.table({"patient_id": ["P8", "P7", "P9"], "note": ["a", "the note of P7", "c"]})

app = typer.Typer()
register(app)


def plan(data: str = "ward", run_id: str = "run") -> Plan:
    tables = {
        "task": {"labels": ["urgent", "routine"]},
        "data": {"name": data},
        "phase": [{"name": "head", "rounds": 2, "sample_rate": 1.0, "train": ["head"]}],
    }
    return plan_of(RunConfig.model_validate(tables), run_id, "m" * 64, "a" * 64, "c" * 64)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A site of two data sets: ``ward``, a folder of three splits with a patient P7 in each, and ``lab``."""
    folder = tmp_path / "site"
    (folder / "ward").mkdir(parents=True)
    (folder / "ward" / "train.csv").write_bytes(CSV)
    (folder / "ward" / "validation.jsonl").write_bytes(LINES)
    pyarrow.parquet.write_table(PARQUET, folder / "ward" / "test.parquet")
    (folder / "lab.jsonl").write_bytes(LINES)
    for data in ("ward", "lab"):
        cache = cache_folder(folder / "state" / "cache", data)
        cache.mkdir(parents=True)
        (cache / "head.prefixes").write_bytes(b"the frozen activations of " + data.encode())
    sets = {
        "ward": {"path": "ward", "privacy_unit": "patient_id", "columns": {"text": "note"}},
        "lab": {"path": "lab.jsonl", "privacy_unit": "patient_id"},
    }
    tables = site_tables(Path("none"), population={"unit": "patient"})
    return write_site(folder, {**tables, "data": sets})


@pytest.fixture
def ledger(config: Path) -> Path:
    """The site's state: of each data set a plan that goes on, and one more of the ward that waits."""
    with opened(config) as ledger:
        ledger.declare(Population("site", "patient", 40, 50.0, 1e-5))
        for one in (plan("ward", "first"), plan("ward", "second"), plan("lab", "third")):
            ledger.receive(one.digest(), one.run_id, one.canonical(), "site", STATEMENT, None)
        for one in (plan("ward", "first"), plan("lab", "third")):
            assert ledger.approve(one.digest()) is Decision.APPROVED
    return config.parent / "state"


def opened(config: Path) -> closing[Ledger]:
    settings = read_site_config(config)
    return closing(Ledger(settings.site.state, counter=settings.site.counter))


def single(folder: Path, name: str, content: bytes, column: str | None = "patient_id") -> SiteConfig:
    """A site whose one data set is this file."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    data: dict[str, Any] = {"path": name} if column is None else {"path": name, "privacy_unit": column}
    tables = site_tables(Path("none"), population={"unit": "example" if column is None else "patient"})
    return read_site_config(write_site(folder, {**tables, "data": {"ward": data}}))


def go(config: Path | SiteConfig, **request: Any) -> Outcome:
    settings = read_site_config(config) if isinstance(config, Path) else config
    return withdraw(settings, Request(**{"data": "ward", **request}), lambda intent: None)


def run(config: Path, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(app, ["withdraw", *arguments, "--config", str(config)], input=answer)


def tree(folder: Path) -> dict[str, Any]:
    """Every file below, with what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def trail(config: Path) -> list[dict[str, Any]]:
    log = config.parent / "state" / "audit.jsonl"
    assert verify(log).intact
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "previous", "salt")} for line in lines]


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_other_records_of_every_split_stay_byte_for_byte(config: Path) -> None:
    ward = config.parent / "ward"
    outcome = go(config, unit="P7")
    assert outcome.intent is not None and [change.rows for change in outcome.intent.changes] == [1, 2, 2]
    assert (ward / "train.csv").read_bytes() == CSV_WITHOUT_P7
    assert (ward / "validation.jsonl").read_bytes() == LINES_WITHOUT_P7
    left = pyarrow.parquet.read_table(ward / "test.parquet")
    assert left.to_pydict() == {"patient_id": ["P8", "P9"], "note": ["a", "c"]}
    assert sorted(file.name for file in ward.iterdir()) == ["test.parquet", "train.csv", "validation.jsonl"]
    assert (config.parent / "lab.jsonl").read_bytes() == LINES


@pytest.mark.parametrize("typed", ["7", " 7 "])
def test_an_id_is_the_same_person_however_it_is_written_down(tmp_path: Path, typed: str) -> None:
    lines = b'{"patient_id": 7}\n{"patient_id": "7"}\n{"patient_id": " 7"}\n{"patient_id": 7.0}\n{"patient_id": "07"}\n'
    go(single(tmp_path, "notes.jsonl", lines), unit=typed)
    assert (tmp_path / "notes.jsonl").read_bytes() == b'{"patient_id": 7.0}\n{"patient_id": "07"}\n'


def test_a_file_without_the_person_is_not_touched(config: Path) -> None:
    file = config.parent / "ward" / "test.parquet"
    before = file.stat()
    go(config, unit="P10")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV[: CSV.index(b"P10,")]


def test_owner_mode_and_extended_attributes_stay_and_the_copy_is_private_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = single(tmp_path, "notes.csv", CSV)
    file = tmp_path / "notes.csv"
    file.chmod(0o640)
    if marked := hasattr(os, "setxattr"):
        try:
            os.setxattr(file, "user.origin", b"ward")
        except OSError:
            marked = False
    modes = []
    real = shutil.copystat
    monkeypatch.setattr(shutil, "copystat", lambda a, b: (modes.append(Path(b).stat().st_mode & 0o777), real(a, b)))
    before = file.stat()
    go(settings, unit="P7")
    after = file.stat()
    assert modes == [0o600]
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino and after.st_mtime_ns > before.st_mtime_ns
    assert not marked or os.getxattr(file, "user.origin") == b"ward"


def test_a_link_stays_and_the_file_behind_it_loses_the_rows(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "export.csv").write_bytes(CSV)
    settings = single(tmp_path / "site", "other.csv", CSV)
    (tmp_path / "site" / "other.csv").unlink()
    (tmp_path / "site" / "other.csv").symlink_to(elsewhere / "export.csv")
    go(settings, unit="P7")
    assert (tmp_path / "site" / "other.csv").is_symlink()
    assert (elsewhere / "export.csv").read_bytes() == CSV_WITHOUT_P7


def test_a_file_with_another_name_is_refused_since_the_rows_would_stay_under_it(tmp_path: Path) -> None:
    settings = single(tmp_path, "notes.csv", CSV)
    os.link(tmp_path / "notes.csv", tmp_path / "same.csv")
    with pytest.raises(DataError, match="hard link"):
        go(settings, unit="P7")
    assert (tmp_path / "notes.csv").read_bytes() == CSV


def test_nothing_of_the_person_is_left_in_a_parquet_files_dictionaries_and_statistics(tmp_path: Path) -> None:
    """Categories are kept in a dictionary that does not shrink by itself when rows go."""
    patients = pa.array(["zz-north", "aa-withdrawn", "mm-south", "zz-north", None])
    table = pa.table(
        {
            "patient_id": patients.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
            "note": pa.array(["one", "aa-withdrawn's", "two", "three", "four"]),
            "dose": pa.array([1.5, 99.25, None, 2.5, 3.5]),
        }
    ).replace_schema_metadata({"made by": "the ward"})
    file = tmp_path / "notes.parquet"
    settings = single(tmp_path, "notes.parquet", b"")
    pyarrow.parquet.write_table(table, file, compression={"patient_id": "NONE", "note": "NONE", "dose": "ZSTD"})
    assert b"aa-withdrawn" in file.read_bytes()
    go(settings, unit="aa-withdrawn")
    assert b"aa-withdrawn" not in file.read_bytes()
    left = pyarrow.parquet.read_table(file)
    assert left.schema.equals(table.schema, check_metadata=True)
    assert left.to_pydict() == {
        "patient_id": ["zz-north", "mm-south", "zz-north", None],
        "note": ["one", "two", "three", "four"],
        "dose": [1.5, None, 2.5, 3.5],
    }
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
    assert [group.column(index).compression for index in range(3)] == ["UNCOMPRESSED", "UNCOMPRESSED", "ZSTD"]
    assert group.column(2).statistics.max == 3.5


def test_categories_inside_of_lists_are_refused(tmp_path: Path) -> None:
    codes = pa.ListArray.from_arrays(pa.array([0, 1, 2]), pa.array(["secret", "open"]).dictionary_encode())
    settings = single(tmp_path, "notes.parquet", b"")
    pyarrow.parquet.write_table(pa.table({"patient_id": ["P7", "P8"], "codes": codes}), tmp_path / "notes.parquet")
    with pytest.raises(DataError, match="column 'codes' holds categories inside of lists"):
        go(settings, unit="P7")


def test_records_of_csv_end_where_the_reader_of_training_says() -> None:
    """Compared with pyarrow on 4,000 random files of quotes, commas and line ends, and one of several blocks."""
    draw = random.Random(1)
    pieces = ['"', '"', '""', ",", ",", "\n", "\r\n", "\r", "a", "b", " ", "é", '"a"', '"a\n"', "\n\n"]
    read = 0
    for _ in range(4000):
        head = draw.choice(["", "\n", "\ufeff", "\r\n\n"]) + draw.choice(["a", "a,b", "a,b,c"]) + "\n"
        content = (head + "".join(draw.choices(pieces, k=draw.randrange(12)))).encode()
        try:
            rows = rows_as_read(content)
        except pa.ArrowInvalid:
            continue
        read += rows > 0
        assert content_rows(content) == rows, content
    assert read > 400
    rows_of_a_block = b'x,"' + b"0123456789\n" * 8 + b'"\ny,"""\r\n"""\r\n'
    blocks = b"a,b\n" + rows_of_a_block * 25_000
    assert content_rows(blocks) == rows_as_read(blocks)


def rows_as_read(content: bytes) -> int:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(pa.BufferReader(content), parse_options=parse) as reader:
        text = dict.fromkeys(reader.schema.names, pa.string())
    convert = pyarrow.csv.ConvertOptions(column_types=text)
    return int(pyarrow.csv.read_csv(pa.BufferReader(content), parse_options=parse, convert_options=convert).num_rows)


def content_rows(content: bytes) -> int:
    records = list(client.record_files._records(content, ".csv"))  # type: ignore[arg-type]
    assert b"".join(records) == content
    return sum(1 for record in records if record.strip(b"\r\n")) - 1


def test_a_copy_that_does_not_hold_exactly_the_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = single(tmp_path, "notes.csv", CSV)
    real = client.record_files._records
    monkeypatch.setattr(client.record_files, "_records", lambda *given: list(real(*given))[::-1])
    before = tree(tmp_path)
    with pytest.raises(DataError, match="could not be told apart safely, so nothing was changed"):
        go(settings, unit="P7")
    assert {name: before.get(name) for name in tree(tmp_path) if "agent.lock" not in name} == before


def test_a_split_that_has_lost_its_last_row_is_no_obstacle_to_the_next_withdrawal(config: Path) -> None:
    ward = config.parent / "ward"
    (ward / "validation.jsonl").write_bytes(b'{"patient_id": "P7"}\n\n')
    (ward / "train.csv").write_bytes(b"patient_id\nP7\nP8\n")
    go(config, unit="P7")
    assert (ward / "validation.jsonl").read_bytes() == b"\n"
    go(config, unit="P8")
    assert (ward / "train.csv").read_bytes() == b"patient_id\n"
    with pytest.raises(DataError, match="no row of data set 'ward' is of this person"):
        go(config, unit="P8")


def test_a_file_that_cannot_tell_whose_rows_it_holds_is_refused(config: Path) -> None:
    (config.parent / "ward" / "codes.csv").write_text("code,meaning\n1,urgent\n")
    with pytest.raises(DataError, match=r"codes\.csv has no such column.*move it elsewhere"):
        go(config, unit="P7")
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV


@pytest.mark.parametrize("killed_at", ["the ledger", "the log"])
def test_the_log_never_says_more_than_the_ledger_and_is_told_at_the_next_start(
    config: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise LedgerError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(*((Ledger, "close_plan") if killed_at == "the ledger" else (AuditLog, "append")), killed)
        with pytest.raises(LedgerError, match="killed"):
            go(config, unit="P7")
    with opened(config) as book:
        closed = [entry.digest for entry in book.plans() if entry.decision is Decision.CLOSED]
    assert len(closed) == (killed_at == "the log")
    assert told_as_closed(config) == []
    assert go(config, unit="P7").finished
    with opened(config) as book:
        closed = [entry.digest for entry in book.plans() if entry.decision is Decision.CLOSED]
        assert set(closed) == {plan("ward", "first").digest(), plan("ward", "second").digest()}
        catch_up(AuditLog(ledger / "audit.jsonl"), book)
    assert sorted(told_as_closed(config)) == sorted(closed)


def told_as_closed(config: Path) -> list[Any]:
    if not (config.parent / "state" / "audit.jsonl").exists():
        return []
    return [line["plan"] for line in trail(config) if line["event"] == "plan closed"]


def test_a_full_disk_leaves_everything_as_it_was(config: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ward = tree(config.parent / "ward")
    with monkeypatch.context() as patch:
        patch.setattr(client.record_files.os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            go(config, unit="P7")
    assert tree(config.parent / "ward") == ward
    with opened(config) as book:
        assert all(entry.decision is not Decision.CLOSED for entry in book.plans())
    go(config, unit="P7")
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV_WITHOUT_P7


# ----------------------------------------------------------------------------------------------- what is made from them


def test_caches_and_open_plans_of_the_data_set_go_and_those_of_others_stay(config: Path, ledger: Path) -> None:
    go(config, unit="P7")
    assert sorted(file.name for file in (ledger / "cache").iterdir()) == ["data-lab"]
    with opened(config) as book:
        assert [(entry.run_id, entry.decision) for entry in book.plans()] == [
            ("first", Decision.CLOSED),
            ("second", Decision.CLOSED),
            ("third", Decision.APPROVED),
        ]
        assert book.reserved("site")  # nothing is refunded
    go(config, data="lab", unit="P7")
    with opened(config) as book:
        assert book.plans()[2].closed_because == "a withdrawal changed its data"


def test_a_plan_that_cannot_be_read_could_be_over_any_data_and_is_closed(config: Path, ledger: Path) -> None:
    with opened(config) as book:
        book.receive("0" * 64, "older", '{"schema_version": 1}', "site", STATEMENT, None)
    go(config, data="lab", unit="P7")
    with opened(config) as book:
        assert [entry.decision is Decision.CLOSED for entry in book.plans()] == [False, False, True, True]


def test_a_file_of_two_data_sets_concerns_the_caches_and_plans_of_both(config: Path, ledger: Path) -> None:
    text = config.read_text().replace('path = "lab.jsonl"', 'path = "ward/validation.jsonl"')
    config.write_text(text)
    outcome = go(config, data="lab", unit="P7")
    assert outcome.intent is not None and outcome.intent.affected == ("ward", "lab")
    assert len(outcome.intent.plans) == 3 and not list((ledger / "cache").iterdir())
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV  # a file that lab does not read


def test_the_audit_log_says_that_it_happened_and_never_who_or_how_much(config: Path, ledger: Path) -> None:
    go(config, unit="P7")
    why = "a withdrawal changed its data"
    assert trail(config) == [
        {"event": "plan closed", "plan": plan("ward", "first").digest(), "why": why},
        {"event": "plan closed", "plan": plan("ward", "second").digest(), "why": why},
        {"event": "withdrawal", "data": "ward", "plans": 2},
    ]
    assert all(b"P7" not in content for content in tree(ledger).values())


def test_a_site_whose_agent_has_never_run_needs_no_ledger(config: Path) -> None:
    go(config, unit="P7")
    assert not (config.parent / "state" / "ledger.sqlite").exists()
    assert trail(config) == [{"event": "withdrawal", "data": "ward", "plans": 0}]


def test_the_agent_must_not_serve_meanwhile(config: Path, ledger: Path) -> None:
    with opened(config) as book, book.serve_alone(), pytest.raises(LedgerError, match="stop that one first"):
        go(config, unit="P7")
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV


# ----------------------------------------------------------------------------------------------------- rows, everything


def test_where_a_row_is_the_unit_it_withdraws_by_its_number(tmp_path: Path) -> None:
    settings = single(tmp_path, "notes.csv", b'text\nzero\n\n"one\n1"\ntwo\n', column=None)
    go(settings, row=1)
    assert (tmp_path / "notes.csv").read_bytes() == b"text\nzero\n\ntwo\n"
    for row in (2, -1):
        with pytest.raises(DataError, match=rf"--row = {row}: .*counts them from 0"):
            go(settings, row=row)


def test_a_row_is_one_of_the_split_that_is_learnt_from(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text\nzero\none\n")
    settings = single(tmp_path, "notes.txt", b"", column=None)
    settings.data["ward"] = settings.data["ward"].model_copy(update={"path": str(tmp_path), "split": "validation"})
    go(settings, row=0)
    assert (tmp_path / "validation.csv").read_text() == "text\none\n"
    assert (tmp_path / "train.csv").read_text() == "text\nzero\none\n"


def test_a_whole_data_set_goes_with_files_caches_and_plans_whether_or_not_it_can_be_read(
    config: Path, ledger: Path
) -> None:
    ward = config.parent / "ward"
    (ward / "train.csv").write_bytes(b"\0 no csv")
    (ward / "README").write_text("not of the data set")
    go(config)
    assert [file.name for file in ward.iterdir()] == ["README"]
    assert [line["event"] for line in trail(config)] == ["plan closed", "plan closed", "withdrawal"]
    with pytest.raises(DataError, match=r"data\.ward\.path = .*is no file or folder of this site \(any more\)"):
        go(config)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"data": "wrad", "unit": "P7"}, "--data = 'wrad': is no data set of site.toml .did you mean 'ward'"),
        ({"unit": "  "}, "--unit: is blank"),
        ({"row": 3}, "--row: data set 'ward' protects the unit in column 'patient_id'"),
    ],
)
def test_a_wrong_request_is_told_with_its_remedy(config: Path, request_: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        go(config, **request_)


def test_a_row_has_no_id_where_it_is_the_unit_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unit: data set 'ward' has no privacy unit but the row; give --row"):
        go(single(tmp_path, "notes.csv", CSV, column=None), unit="P7")


def test_rows_of_a_hub_data_set_are_not_the_sites_to_change(config: Path) -> None:
    config.write_text(config.read_text().replace('path = "lab.jsonl"', 'path = "someone/notes"'))
    with pytest.raises(DataError, match=r"data\.lab\.path = 'someone/notes': .*hub data set.*write it to a file"):
        go(config, data="lab", unit="P7")


# -------------------------------------------------------------------------------------------------------------- crashes


@pytest.fixture(scope="module")
def killer() -> Iterator[subprocess.Popen[str]]:
    """The program that withdraws and is killed (:mod:`killed_withdrawal`)."""
    program = Path(__file__).with_name("killed_withdrawal.py")
    started = subprocess.Popen(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with started:
        yield started
        assert started.stdin is not None
        started.stdin.close()
        assert started.wait(30) == 0


def attempt(
    killer: subprocess.Popen[str], config: Path, request: dict[str, Any], fatal: int | str | None
) -> dict[str, Any]:
    assert killer.stdin is not None and killer.stdout is not None
    print(json.dumps({"config": str(config), "request": request, "fatal": fatal}), file=killer.stdin, flush=True)
    answer: dict[str, Any] = json.loads(killer.stdout.readline())
    return answer


def everywhere(
    killer: subprocess.Popen[str], config: Path, work: Path, request: dict[str, Any]
) -> Iterator[tuple[Path, str]]:
    """Copies of the site, each after a kill before another change; and what that change was."""
    fatal = 0
    while True:
        fatal += 1
        copy = work / str(fatal)
        shutil.copytree(config.parent, copy)
        answer = attempt(killer, copy / "site.toml", request, fatal)
        if answer["code"] == 0:
            break
        assert (answer["code"], answer["changes"]) == (-9, fatal)
        yield copy / "site.toml", answer["at"]
    assert fatal > 15


def test_a_kill_before_any_change_is_finished_by_the_same_command(
    config: Path, ledger: Path, tmp_path: Path, killer: subprocess.Popen[str]
) -> None:
    old, seen = tree(config.parent / "ward"), []
    request = {"data": "ward", "unit": "P7"}
    for copy, at in everywhere(killer, config, tmp_path / "work", request):
        seen.append(at)
        ward, cache = copy.parent / "ward", copy.parent / "state" / "cache" / "data-ward"
        now = tree(ward)
        assert now["train.csv"] in (CSV, CSV_WITHOUT_P7), at
        assert now["validation.jsonl"] in (LINES, LINES_WITHOUT_P7), at
        if any(now[name] != old[name] for name in old):
            assert not cache.exists(), f"{at}: the cache has outlived the rows"
            with pytest.raises(DataError, match="a withdrawal from data set 'ward' was interrupted"):
                refuse_interrupted(read_site_config(copy))

        unfinished = (copy.parent / "state" / "withdrawal.json").exists() or any(now[name] == old[name] for name in old)
        assert attempt(killer, copy, request, None)["code"] == (0 if unfinished else 1), at
        assert_withdrawn(copy)
    for expected in ("state/withdrawal.json.part", "state/cache/data-ward", "ward/train.csv", "state/withdrawal.json"):
        assert any(at.endswith(expected) for at in seen), expected


def assert_withdrawn(config: Path) -> None:
    ward = config.parent / "ward"
    assert sorted(file.name for file in ward.iterdir()) == ["test.parquet", "train.csv", "validation.jsonl"]
    assert (ward / "train.csv").read_bytes() == CSV_WITHOUT_P7
    assert (ward / "validation.jsonl").read_bytes() == LINES_WITHOUT_P7
    assert pyarrow.parquet.read_table(ward / "test.parquet")["patient_id"].to_pylist() == ["P8", "P9"]
    state = config.parent / "state"
    assert sorted(file.name for file in (state / "cache").iterdir()) == ["data-lab"]
    refuse_interrupted(read_site_config(config))
    with opened(config) as book:
        catch_up(AuditLog(state / "audit.jsonl"), book)  # as the next start of the agent does
    lines = trail(config)
    assert {"event": "withdrawal", "data": "ward", "plans": 2} in lines
    assert {line["plan"] for line in lines if line["event"] == "plan closed"} == {
        plan("ward", "first").digest(),
        plan("ward", "second").digest(),
    }
    with opened(config) as book:
        assert [entry.decision is Decision.CLOSED for entry in book.plans()] == [True, True, False]


ROWS = b"text\nzero\none\ntwo\nthree\n"


def test_a_row_given_again_after_a_crash_takes_no_second_row(tmp_path: Path, killer: subprocess.Popen[str]) -> None:
    single(tmp_path / "site", "notes.csv", ROWS, column=None)
    request = {"data": "ward", "row": 1}
    for copy, at in everywhere(killer, tmp_path / "site" / "site.toml", tmp_path / "work", request):
        begun = (copy.parent / "state" / "withdrawal.json").exists()
        if begun or (copy.parent / "notes.csv").read_bytes() == ROWS:
            assert attempt(killer, copy, request, None)["code"] == 0, at
        assert (copy.parent / "notes.csv").read_bytes() == b"text\nzero\ntwo\nthree\n", at


def test_another_row_after_a_crash_is_refused_since_rows_have_moved(
    tmp_path: Path, killer: subprocess.Popen[str]
) -> None:
    single(tmp_path / "site", "notes.csv", ROWS, column=None)
    begun = 0
    for copy, at in everywhere(killer, tmp_path / "site" / "site.toml", tmp_path / "work", {"data": "ward", "row": 1}):
        if (copy.parent / "state" / "withdrawal.json").exists():
            begun += 1
            with pytest.raises(DataError, match="rows have moved up"):
                go(copy, row=2)
            assert (copy.parent / "notes.csv").read_bytes() == b"text\nzero\ntwo\nthree\n", at
    assert begun > 3


def test_a_whole_data_set_goes_in_spite_of_crashes(
    config: Path, ledger: Path, tmp_path: Path, killer: subprocess.Popen[str]
) -> None:
    request = {"data": "ward"}
    for copy, at in everywhere(killer, config, tmp_path / "work", request):
        begun = (copy.parent / "state" / "withdrawal.json").exists()
        if begun or list((copy.parent / "ward").iterdir()):
            assert attempt(killer, copy, request, None)["code"] == 0, at
        assert not list((copy.parent / "ward").iterdir()), at
        assert trail(copy)[-1] == {"event": "withdrawal", "data": "ward", "plans": 2}


def interrupted(config: Path, killer: subprocess.Popen[str]) -> None:
    """Leaves the site as a crash does that comes before the first file is replaced."""
    answer = attempt(killer, config, {"data": "ward", "unit": "P7"}, "os.rename ward/")
    assert answer["code"] == -9 and (config.parent / "state" / "withdrawal.json").exists()


def test_rows_that_were_added_after_a_crash_are_not_lost(
    config: Path, ledger: Path, killer: subprocess.Popen[str]
) -> None:
    interrupted(config, killer)
    train = config.parent / "ward" / "train.csv"
    train.write_bytes(CSV + b"\nP11,a new patient,routine\n")
    with pytest.raises(DataError, match=r"train\.csv: was changed while .* delete withdrawal\.json in site\.state"):
        go(config, unit="P7")
    (ledger / "withdrawal.json").unlink()
    go(config, unit="P7")
    assert train.read_bytes() == CSV_WITHOUT_P7 + b"\nP11,a new patient,routine\n"
    assert_nothing_is_left_over(config)


def test_the_next_person_is_withdrawn_after_the_interrupted_one(
    config: Path, ledger: Path, killer: subprocess.Popen[str]
) -> None:
    interrupted(config, killer)
    outcome = go(config, unit="P8")
    assert outcome.finished and outcome.intent is not None
    kept = pyarrow.parquet.read_table(config.parent / "ward" / "test.parquet")["patient_id"].to_pylist()
    assert kept == ["P9"]
    assert_nothing_is_left_over(config)


def test_a_damaged_or_newer_journal_is_told(config: Path, ledger: Path) -> None:
    journal = ledger / "withdrawal.json"
    for content, problem in (("{", "is damaged"), ('{"schema_version": 9}', "newer version")):
        journal.write_text(content)
        with pytest.raises(DataError, match=problem):
            go(config, unit="P7")
        with pytest.raises(DataError, match=problem):
            refuse_interrupted(read_site_config(config))


def assert_nothing_is_left_over(config: Path) -> None:
    ward = config.parent / "ward"
    assert sorted(file.name for file in ward.iterdir()) == ["test.parquet", "train.csv", "validation.jsonl"]
    assert not (config.parent / "state" / "withdrawal.json").exists()


# --------------------------------------------------------------------------------------------------------- command line


def test_a_dry_run_says_everything_and_changes_nothing(config: Path, ledger: Path) -> None:
    before = tree(config.parent / "ward"), tree(ledger / "cache"), sorted(tree(ledger))
    result = run(config, "--data", "ward", "--unit", "P7", "--dry-run")
    ward = config.parent.resolve() / "ward"
    first, second = plan("ward", "first").digest()[:12], plan("ward", "second").digest()[:12]
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "nothing was changed; what would be done:\n"
        f"  {ward}/test.parquet: 1 row removed\n"
        f"  {ward}/train.csv: 2 rows removed\n"
        f"  {ward}/validation.jsonl: 2 rows removed\n"
        "  caches deleted of data set ward\n"
        f"  plans closed: {first}, {second}\n"
        "note: privacy budget that was spent stays spent, and adapters that were released before are not recalled\n"
        "note: backups and snapshots of these files are not touched\n"
        "note: other data sets are not touched: lab\n"
    )
    assert (tree(config.parent / "ward"), tree(ledger / "cache"), sorted(tree(ledger))) == before


def test_the_result_as_json(config: Path, ledger: Path) -> None:
    result = run(config, "--data", "ward", "--unit", "P7", "--yes", "--json")
    report = json.loads(result.stdout)
    remarks = report.pop("remarks")
    ward = config.parent.resolve() / "ward"
    assert report == {
        "data": "ward",
        "done": True,
        "finished_interrupted": False,
        "files": [
            {"file": str(ward / "test.parquet"), "rows": 1},
            {"file": str(ward / "train.csv"), "rows": 2},
            {"file": str(ward / "validation.jsonl"), "rows": 2},
        ],
        "caches": ["ward"],
        "plans": [plan("ward", "first").digest(), plan("ward", "second").digest()],
    }
    assert remarks[0].startswith("privacy budget that was spent stays spent")
    assert (ward / "train.csv").read_bytes() == CSV_WITHOUT_P7


@pytest.mark.parametrize("answer", ["n\n", "", "\n"])
def test_without_consent_nothing_happens(config: Path, ledger: Path, answer: str) -> None:
    before = tree(config.parent / "ward"), tree(ledger / "cache")
    result = run(config, "--data", "ward", "--unit", "P7", answer=answer)
    assert isinstance(result.exception, ConfigError) and "nothing was done" in str(result.exception)
    assert "train.csv: 2 rows removed" in result.stderr and "This cannot be undone. Go on? [y/N]" in result.stderr
    assert (tree(config.parent / "ward"), tree(ledger / "cache")) == before


def test_with_consent_it_happens(config: Path) -> None:
    result = run(config, "--data", "ward", "--unit", "P7", answer="y\n")
    assert result.exit_code == 0 and result.stdout.startswith("done:\n")
    assert (config.parent / "ward" / "train.csv").read_bytes() == CSV_WITHOUT_P7


def test_an_unknown_id_is_one_message_that_names_nobody(config: Path, ledger: Path) -> None:
    result = run(config, "--data", "ward", "--unit", "P99", "--yes")
    assert isinstance(result.exception, ConsiliumError) and result.exception.exit_code == 2
    assert str(result.exception) == (
        "--unit: no row of data set 'ward' is of this person, who may have withdrawn before; compare the id with "
        "column 'patient_id'"
    )
    assert result.stdout == "" and not (ledger / "audit.jsonl").exists()


@pytest.mark.parametrize("arguments", [[], ["--unit", "P7", "--all"], ["--row", "1", "--unit", "P7"]])
def test_one_way_to_say_who_withdraws_is_needed(config: Path, arguments: list[str]) -> None:
    result = run(config, "--data", "ward", *arguments)
    assert isinstance(result.exception, ConfigError) and "give one of them" in str(result.exception)


def test_what_is_left_to_do_is_told(config: Path, ledger: Path) -> None:
    """A declared size is fixed for ever; a true one that is published would change."""
    config.write_text(config.read_text().replace("public_size = 40", 'public_size = "exact"'))
    (config.parent / "ward" / "train.csv").write_bytes(b"patient_id\nP7\n")
    (config.parent / "ward" / "train.csv.bak").write_bytes(CSV)
    said = run(config, "--data", "ward", "--unit", "P7", "--yes").stdout
    assert 'note: populations.site.public_size stays what was declared: write 40 in place of "exact"\n' in said
    assert "note: [data.ward] has no rows left: take it out of site.toml, or the agent does not start\n" in said
    assert "note: files that are none of the data set's kinds are not looked into: train.csv.bak\n" in said
