"""Several populations: a person of the site signs that they share nobody, and the site checks it at each start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from click.testing import Result
from site_files import site_tables, write_site
from typer.testing import CliRunner

from client.config import SiteConfig, read_site_config
from client.separation import check_separation, sign_separation, statement_of
from client.setup_cli import register
from common.errors import ConfigError
from common.signing import AUDIT_HEAD, SEPARATION, SigningKey, verify

STATEMENT = (
    'At site "north" no person belongs to more than one of these populations: '
    '"adults" (data sets: "notes", "reports"); "children" (data sets: "ward").'
)

app = typer.Typer()
register(app)


@pytest.fixture
def officer(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "officer.pem")


def tables(**separation: str) -> dict[str, Any]:
    population = {"public_size": 40, "lifetime_epsilon": 8.0}
    data = {"notes": "adults", "reports": "adults", "ward": "children"}
    return {
        **site_tables(Path("none")),
        "populations": {"children": population, "adults": population},
        "data": {name: {"path": f"{name}.csv", "population": one} for name, one in data.items()},
        **({"separation": separation} if separation else {}),
    }


def site(folder: Path, key: SigningKey, **changes: Any) -> SiteConfig:
    return read_site_config(write_site(folder, {**tables(statement="s.json", key=key.public), **changes}))


def run(folder: Path, *arguments: str, answer: str = "") -> Result:
    given = ["--key", str(folder / "officer.pem"), "--config", str(folder / "site.toml")]
    return CliRunner().invoke(app, ["separate", *arguments, *given], input=answer)


def problem(config: SiteConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_separation(config)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- the statement


def test_what_was_signed_passes_and_says_who_shares_nobody(tmp_path: Path, officer: SigningKey) -> None:
    config = site(tmp_path, officer)
    assert statement_of(config) == STATEMENT
    sign_separation(config, officer)
    check_separation(config)
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["statement"] == STATEMENT and content["schema_version"] == 1
    assert verify(officer.public, SEPARATION, STATEMENT.encode(), content["signature"])


def test_one_population_needs_no_statement(tmp_path: Path) -> None:
    check_separation(read_site_config(write_site(tmp_path, site_tables(Path("none")))))


@pytest.mark.parametrize(
    "change",
    [
        {"site": {"name": "south", "trust_relay": True}},
        {"data": {"notes": {"path": "n.csv", "population": "adults"}}},
        {
            "data": {
                "notes": {"path": "notes.csv", "population": "adults"},
                "reports": {"path": "reports.csv", "population": "children"},
                "ward": {"path": "ward.csv", "population": "children"},
            }
        },
        {"populations": {name: tables()["populations"]["adults"] for name in ("adults", "children", "staff")}},
    ],
    ids=["another site", "a data set less", "a data set moved", "one more population"],
)
def test_a_statement_about_anything_else_is_refused(
    tmp_path: Path, officer: SigningKey, change: dict[str, Any]
) -> None:
    sign_separation(site(tmp_path, officer), officer)
    found = problem(site(tmp_path, officer, **change))
    assert "another site, other populations or other data sets; have it signed again" in found


def test_no_two_settings_have_the_same_statement(tmp_path: Path, officer: SigningKey) -> None:
    """A name may hold what separates names."""
    one = {"public_size": 40, "lifetime_epsilon": 8.0}
    data = {"notes": {"path": "n.csv", "population": "c"}}
    first = site(tmp_path, officer, populations={"a; b": one, "c": one}, data=data)
    second = site(tmp_path, officer, populations={"a": one, "b": one, "c": one}, data=data)
    third = site(tmp_path, officer, populations={'a" (data sets: none); "b': one, "c": one}, data=data)
    assert len({statement_of(config) for config in (first, second, third)}) == 3


def test_another_key_or_purpose_is_refused(tmp_path: Path, officer: SigningKey) -> None:
    config = site(tmp_path, officer)
    sign_separation(config, SigningKey.fresh())
    assert "is not signed by separation.key" in problem(config)
    signature = officer.sign(AUDIT_HEAD, STATEMENT.encode())
    content = {"schema_version": 1, "statement": STATEMENT, "signature": signature}
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert "is not signed by separation.key" in problem(config)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'"text"', b"\xff", b"[" * 100_000, b'{"schema_version": 1, "statement": "x"}'],
    ids=["empty", "list", "no fields", "text", "no UTF-8", "deep", "no signature"],
)
def test_a_damaged_file_is_told_with_its_remedy(tmp_path: Path, officer: SigningKey, content: bytes) -> None:
    config = site(tmp_path, officer)
    (tmp_path / "s.json").write_bytes(content)
    found = problem(config)
    assert "separation.statement: " in found and "is damaged; have it signed again" in found


def test_a_text_that_is_no_unicode_is_not_signed(tmp_path: Path, officer: SigningKey) -> None:
    config = site(tmp_path, officer)
    (tmp_path / "s.json").write_text('{"schema_version": 1, "statement": "\\ud800", "signature": "x"}')
    assert "is not signed by separation.key" in problem(config)


def test_a_missing_or_newer_file_is_told(tmp_path: Path, officer: SigningKey) -> None:
    config = site(tmp_path, officer)
    assert "cannot be read (No such file or directory); have it signed" in problem(config)
    (tmp_path / "s.json").write_text('{"schema_version": 2, "statement": "", "signature": ""}')
    assert "schema_version 2 " in problem(config) and "update it" in problem(config)


# --------------------------------------------------------------------------------------------------------- command line


def test_the_statement_is_shown_and_signed_with_consent(tmp_path: Path, officer: SigningKey) -> None:
    site(tmp_path, officer)
    result = run(tmp_path, "adults", "children", answer="y\n")
    assert (result.exit_code, result.stdout) == (0, f"{STATEMENT}\n")
    assert (
        "Do you vouch for this? [y/N]" in result.stderr and f"signed: {tmp_path.resolve() / 's.json'}" in result.stderr
    )
    check_separation(read_site_config(tmp_path / "site.toml"))


def test_without_consent_nothing_is_signed(tmp_path: Path, officer: SigningKey) -> None:
    site(tmp_path, officer)
    result = run(tmp_path, "adults", "children", answer="n\n")
    assert isinstance(result.exception, ConfigError) and "nothing was done" in str(result.exception)
    assert not (tmp_path / "s.json").exists()


def test_it_can_be_signed_before_site_toml_pins_a_key_and_says_what_to_add(tmp_path: Path, officer: SigningKey) -> None:
    path = write_site(tmp_path, tables())
    with pytest.raises(ConfigError, match="a signed statement that they share no persons is needed"):
        read_site_config(path)
    result = run(tmp_path, "children", "adults", "--yes")
    statement, _, section = result.stdout.partition("\n")
    assert statement == STATEMENT
    path.write_text(tomli_w.dumps(tables()) + section)
    check_separation(read_site_config(path))


@pytest.mark.parametrize("named", [["adults"], ["adults", "staff"], ["adults", "children", "children"]])
def test_exactly_the_declared_populations_are_named(tmp_path: Path, officer: SigningKey, named: list[str]) -> None:
    site(tmp_path, officer)
    result = run(tmp_path, *named, "--yes")
    assert isinstance(result.exception, ConfigError) and "declares adults, children" in str(result.exception)
    assert not (tmp_path / "s.json").exists()


def test_there_is_nothing_to_sign_for_one_population(tmp_path: Path, officer: SigningKey) -> None:
    write_site(tmp_path, site_tables(Path("none")))
    result = run(tmp_path, "site", "--yes")
    assert isinstance(result.exception, ConfigError) and "sign only where there are several" in str(result.exception)


def test_only_the_pinned_key_signs(tmp_path: Path, officer: SigningKey) -> None:
    site(tmp_path, SigningKey.fresh())
    result = run(tmp_path, "adults", "children", "--yes")
    assert isinstance(result.exception, ConfigError) and officer.public in str(result.exception)


def test_a_new_key_is_private_and_its_public_half_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "officer.pem"
    result = CliRunner().invoke(app, ["keygen", str(file)])
    assert result.stdout == f"{SigningKey.load(file).public}\n" and file.stat().st_mode & 0o777 == 0o600
    result = CliRunner().invoke(app, ["keygen", str(file)])
    assert isinstance(result.exception, ConfigError) and "never overwritten" in str(result.exception)
