"""``consilium site init``: a whole ``site.toml`` to read and to fill in."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

import client.config
from client.config import SiteConfig, read_site_config
from client.setup_cli import register
from client.template import SECTIONS, explanations, template
from common.errors import ConfigError, ConsiliumError, DataError
from common.model import digest_of
from common.sections import Section
from common.signing import SigningKey
from common.toml_settings import validate

FILLED = {
    "site": {"name": "north"},
    "populations.site": {"public_size": 400},
    "data.default": {"path": "notes.csv"},
    "policy": {"base_models": ["0" * 64]},
}
TEXT = template(FILLED, ("minilm",))

app = typer.Typer()
register(app)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a site, with its data."""
    (tmp_path / "notes.csv").write_text("patient_id,text,label\nP1,cough,routine\n")
    return tmp_path


def run(folder: Path, model: Path | str, *arguments: str, name: str = "north", size: str = "400") -> Result:
    given = ["--name", name, "--model", str(model), "--data", str(folder / "notes.csv"), "--public-size", size]
    return CliRunner().invoke(app, ["init", str(folder), *given, *arguments])


# ------------------------------------------------------------------------------------------------------------- template


def test_every_section_and_every_field_is_named() -> None:
    sections = {one for one in vars(client.config).values() if isinstance(one, type) and issubclass(one, Section)}
    assert set(SECTIONS.values()) == sections - {Section, SiteConfig}
    tables = re.split(r"^#?\[(.+)\]$", TEXT, flags=re.MULTILINE)
    found = dict(zip(tables[1::2], tables[2::2], strict=True))
    assert list(found) == list(SECTIONS)
    for table, section in SECTIONS.items():
        assert re.findall(r"^#?([a-z_]+) = ", found[table], flags=re.MULTILINE) == list(section.model_fields)
    top = re.findall(r"^([a-z_]+) = ", tables[0], flags=re.MULTILINE)
    assert {*top, *(table.partition(".")[0] for table in SECTIONS)} == set(SiteConfig.model_fields)


RANK = "Largest LoRA rank, and this site's own where a larger plan lets sites choose theirs."


def test_a_field_is_explained_by_its_own_docstring() -> None:
    found = explanations()
    assert found["PolicySection", "max_rank"] == RANK
    assert found["SiteSection", "listen"].startswith("``unix:PATH`` (relative to the folder of site.toml)")
    lines = TEXT.splitlines()
    assert lines[lines.index("max_rank = 16") - 1] == f"# {RANK}"
    words = " ".join(line.removeprefix("# ") for line in lines)
    for text in found.values():
        assert " ".join(text.replace("``", "").split()) in words


def test_no_line_is_longer_than_a_screen() -> None:
    assert max(map(len, TEXT.splitlines())) <= 118


def test_what_it_says_besides_comments_are_cautious_settings() -> None:
    config = validate(SiteConfig, tomllib.loads(TEXT), "test")
    policy = config.policy
    assert (policy.approval, policy.secure_noise, policy.allow_no_privacy, policy.metrics) == (
        "manual",
        True,
        False,
        (),
    )
    assert (policy.max_epsilon, policy.max_delta, policy.max_rank, policy.min_noise_multiplier) == (3.0, 1e-5, 16, 0.5)
    assert policy.coordinator_keys == () and config.testing is None and config.tls is None
    assert not config.site.trust_relay and config.populations["site"].lifetime_epsilon == 8.0


def test_with_every_line_in_use_it_is_a_whole_file_as_well() -> None:
    """So the examples in the lines that are needed in some cases only are right, too."""
    used = re.sub(r"^#(?=\S)", "", TEXT, flags=re.MULTILINE).replace("ed25519:...", SigningKey.fresh().public)
    used = used.replace('unit = "example"', 'unit = "patient"')
    config = validate(SiteConfig, tomllib.loads(used), "test")
    assert config.model_fields_set == set(SiteConfig.model_fields)
    assert config.data["default"].columns == {"text": "note", "label": "diagnosis"}


def test_values_are_written_as_toml_whatever_is_in_them() -> None:
    odd = 'no\\tes "2024"\n\x7fé\u2028.csv'
    text = template({**FILLED, "data.default": {"path": odd}}, ("a\\b", 'c"d'))
    tables = tomllib.loads(text)
    assert tables["data"]["default"]["path"] == odd and tables["models"] == ["a\\b", 'c"d']


# ----------------------------------------------------------------------------------------------------------------- init


def test_the_file_is_complete_private_and_loads(folder: Path, tiny_bert: Path) -> None:
    result = run(folder, tiny_bert)
    path = folder / "site.toml"
    assert result.exit_code == 0 and str(path) in result.stdout and "policy.coordinator_keys" in result.stdout
    assert path.stat().st_mode & 0o777 == 0o600
    config = read_site_config(path)
    assert config.site.name == "north" and config.populations["site"].public_size == 400
    assert config.policy.base_models == (digest_of(tiny_bert),) and config.models == (str(tiny_bert),)
    assert config.data["default"].path == str(folder.resolve() / "notes.csv")
    assert 'path = "notes.csv"' in path.read_text()  # beside it, so that the folder can be moved


def test_a_population_of_persons(folder: Path, tiny_bert: Path) -> None:
    assert run(folder, tiny_bert, "--unit", "patient", "--privacy-unit", "patient_id").exit_code == 0
    config = read_site_config(folder / "site.toml")
    assert (config.populations["site"].unit, config.data["default"].privacy_unit) == ("patient", "patient_id")


def test_a_new_folder_is_the_owners_alone(folder: Path, tiny_bert: Path) -> None:
    data = str(folder / "notes.csv")
    new = folder / "new" / "site"
    given = ["--name", "north", "--model", str(tiny_bert), "--data", data, "--public-size", "400", "--json"]
    result = CliRunner().invoke(app, ["init", str(new), *given])
    report = json.loads(result.stdout)
    assert report["file"] == str(new / "site.toml") and report["base_model"] == digest_of(tiny_bert)
    assert new.stat().st_mode & 0o777 == 0o700
    assert read_site_config(new / "site.toml").data["default"].path == str(Path(data).resolve())


def test_a_file_that_is_there_is_never_overwritten(folder: Path, tiny_bert: Path) -> None:
    (folder / "site.toml").write_text("mine")
    result = run(folder, tiny_bert)
    assert isinstance(result.exception, ConfigError) and "is never overwritten" in str(result.exception)
    assert (folder / "site.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "settings", "problem"),
    [
        ([], {"name": "no spaces"}, "site.name = 'no spaces'"),
        ([], {"size": "0"}, "populations.site.public_size = 0"),
        (["--privacy-unit", "patient_id"], {}, "data.default.privacy_unit: names the column of the unit"),
        (["--unit", "patient"], {}, "data.default.privacy_unit: names the column of the unit"),
    ],
)
def test_settings_that_are_wrong_leave_no_file(
    folder: Path, tiny_bert: Path, arguments: list[str], settings: dict[str, str], problem: str
) -> None:
    result = run(folder, tiny_bert, *arguments, **settings)
    assert isinstance(result.exception, ConfigError) and problem in str(result.exception)
    assert not (folder / "site.toml").exists()


def test_data_and_model_must_be_there(folder: Path, tiny_bert: Path) -> None:
    result = run(folder, "/no/such/model")
    assert isinstance(result.exception, ConsiliumError) and "/no/such/model" in str(result.exception)
    (folder / "notes.csv").unlink()
    result = run(folder, tiny_bert)
    assert isinstance(result.exception, DataError) and str(result.exception).startswith("--data = ")
    assert not (folder / "site.toml").exists()
