"""What is shipped: the wheel, the bundle, the examples, the README's commands and the tests that PRIVACY.md names."""

from __future__ import annotations

import ast
import csv
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import consilium
from server.submission import assemble_bundle

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
SHIPPED = ("consilium.py", "server/", "client/", "common/", "simulations/")

QTYPE = ["causes", "exams and tests", "frequency", "genetic changes", "information", "inheritance", "outlook",
         "prevention", "susceptibility", "symptoms", "treatment"]  # fmt: skip


def in_git() -> set[str]:
    """Files git tracks, and new ones it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_holds_exactly_the_packages_files_that_git_knows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == {name for name in in_git() if name.startswith(SHIPPED)}


def test_the_bundle_holds_the_server_what_both_share_and_the_relay_and_nothing_else(tmp_path: Path) -> None:
    bundle = assemble_bundle(tmp_path)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    wanted = {name for name in in_git() if name.startswith(("server/", "common/")) and name.endswith(".py")}
    assert files == wanted | {"client/__init__.py", "client/app.py", "pyproject.toml"}


def write_sample(folder: Path, columns: dict[str, list[str]], rows: int) -> None:
    """Small train, validation and test files with the given columns, values in turn."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            turns = zip(*(itertools.cycle(values) for values in columns.values()), strict=True)
            writer.writerows(
                [f"{value} {n}" if value.startswith("*") else value for value in row]
                for n, row in enumerate(itertools.islice(turns, rows))
            )


SAMPLES = {
    "medquad_qtype": {
        "text": ["*the fever came with a rash", "*rest and water"],
        "label_name": QTYPE,
        "client": ["A", "B"],
    },
    "medquad_qa": {"question": ["*what is a rash ?"], "answer": ["*a change of the skin"], "client": ["A", "B", "C"]},
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_on_a_small_file_of_its_schema(
    example: Path, tmp_path: Path, tiny_bert: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "data", SAMPLES[example.stem], 60)
    task = tomllib.loads(example.read_text(encoding="utf-8"))["task"]["name"]
    model = tiny_bert if task == "sequence-classification" else tiny_llama
    run_example(example, tmp_path / "data", model, tmp_path / "out", monkeypatch)


REAL_MODELS = {"medquad_qtype": None, "medquad_qa": "stories260K"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_shortened_on_the_real_data(
    example: Path,
    tmp_path: Path,
    tiny_bert: Path,
    shared_data: Path,
    shared_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = REAL_MODELS[example.stem]
    model = shared_models / name if name else tiny_bert
    run_example(example, shared_data / example.stem, model, tmp_path / "out", monkeypatch)


def run_example(example: Path, data: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of one step of the example, on few examples and short texts."""
    task = tomllib.loads(example.read_text(encoding="utf-8"))["task"]["name"]
    rate = 0.02 if (ROOT.parent / "shared") in data.parents else 0.5
    settings = [
        f"data.path={data}",
        f"model.name={model}",
        "task.max_length=32",
        "evaluation.limit=20",
        "evaluation.generate=1",
        f'phase=[{{name="short", rounds=1, sample_rate={rate}, train=["lora"]}}]',
    ]
    if task == "sequence-classification":
        settings.append("lora.layers=4")  # all of the tiny model's: nothing is cached for rows that are never drawn
    arguments = ["consilium", "simulate", "--config", str(example), "--out", str(out)]
    for setting in settings:
        arguments += ["--set", setting]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        consilium.main()
    assert not ended.value.code
    assert (out / "summary.json").is_file() and (out / "adapter" / "adapter_config.json").is_file()


def test_an_example_is_about_25_lines() -> None:
    assert all(len(example.read_text(encoding="utf-8").splitlines()) <= 30 for example in EXAMPLES)


def readme_commands() -> list[str]:
    """Every line of the README's shell blocks and transcripts that calls consilium or make."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^\$ (consilium .*)$", text, flags=re.MULTILINE)
    return [line for line in lines if line.startswith(("consilium ", "make "))]


def test_the_readme_names_only_commands_options_and_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = readme_commands()
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
            continue
        names = tuple(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
        options = {word for word in words if word.startswith("--")}
        known = help_of(names[:3]) or help_of(names[:2]) or help_of(names[:1])
        assert known and options <= known, command


def defined_in(path: str) -> set[str]:
    """The tests that a file defines; none if there is no such file."""
    if not (ROOT / path).is_file():
        return set()
    body = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing_tests(text: str) -> list[str]:
    """Every `file`, `file::test_name` or `::test_name` (the file named before) of a document that does not exist."""
    missing, path, known = [], "", set[str]()
    for file, name in re.findall(r"`((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`", text):
        if file:
            path, known = file, defined_in(file)
            missing += [] if known else [file]
        if name and name not in known:
            missing.append(f"{path}::{name}")
    return missing


def test_every_test_that_the_documents_name_exists() -> None:
    documents = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
    assert len(re.findall(r"::test_\w+`", documents["PRIVACY.md"])) >= 100
    assert {name: missing for name, text in documents.items() if (missing := missing_tests(text))} == {}


def test_a_test_that_does_not_exist_would_be_found() -> None:
    here = "tests/unit/test_package.py"
    real = "test_an_example_is_about_25_lines"
    assert missing_tests(f"`{here}::{real}`, `::{real}`, `{here}`") == []
    assert missing_tests(f"`{here}::{real}`, `::test_gone`") == [f"{here}::test_gone"]
    assert missing_tests("`tests/test_gone.py::test_a`") == ["tests/test_gone.py", "tests/test_gone.py::test_a"]


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "PRIVACY.md").read_text(encoding="utf-8")
    rows = text.partition("| promise | test |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) >= 50
    assert [row for row in rows if "`tests/" not in row] == []


def help_of(names: tuple[str, ...]) -> set[str] | None:
    """Options of a command; None if there is no such command."""
    import typer.main

    command = typer.main.get_command(consilium.app)
    for name in names:
        found = getattr(command, "commands", {}).get(name)
        if found is None:
            return None
        command = found
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}
