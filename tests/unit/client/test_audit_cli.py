"""``consilium site audit-log``: what a data-protection officer sees of the trail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from site_files import site_tables, write_site
from typer.testing import CliRunner

from client.audit_cli import app
from client.audit_log import AuditLog
from common.errors import ConfigError, LedgerError
from common.signing import SigningKey


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_site(tmp_path, site_tables(Path("none")))


@pytest.fixture
def key(config: Path) -> SigningKey:
    return SigningKey.create(config.parent / "state" / "site.key")


@pytest.fixture
def log(config: Path, key: SigningKey) -> AuditLog:
    """Four lines, of which the first three are signed."""
    log = AuditLog(config.parent / "state" / "audit.jsonl", site="north", key=key)
    log.append("plan received", run="run", plan="0123456789ab", refusal=None)
    log.append("round reserved", run="run", round=1)
    log.append("round released", run="run", round=1, epsilon=0.25)
    log.sign_head()
    log.append("round refused", run="run", round=9, reason="out-of-order")
    return log


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def as_json(config: Path, *arguments: str) -> tuple[int, Any]:
    result = run(config, *arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def cut(log: AuditLog, lines: int) -> None:
    log.path.write_text("".join(log.path.read_text().splitlines(keepends=True)[:lines]))


# --------------------------------------------------------------------------------------------------------------- verify


def test_a_whole_trail_is_told_with_the_key_that_vouches_for_it(config: Path, log: AuditLog, key: SigningKey) -> None:
    result = run(config, "verify")
    assert (result.exit_code, result.stdout) == (
        0,
        f"4 lines, chain intact, head signed by {key.public} at line 3\n",
    )
    code, report = as_json(config, "verify", "--key", key.public)
    (head,) = report.pop("heads")
    assert code == 0 and report == {
        "intact": True,
        "lines": 4,
        "line": None,
        "fault": "",
        "unfinished": False,
        "key": key.public,
    }
    assert (head["site"], head["lines"], head["key"]) == ("north", 3, key.public)


def test_a_changed_line_is_named_and_ends_with_code_2(config: Path, log: AuditLog) -> None:
    log.path.write_text(log.path.read_text().replace("0.25", "0.05"))
    result = run(config, "verify")
    fault = "does not follow line 3: one of the two was changed, or lines between them were dropped"
    # Line 3 itself is one of those that the head vouches for, so that it need not be guessed.
    assert result.exit_code == 2
    assert result.stdout == (
        "line 3 is not what the site signed: among lines 1 to 3 some were changed, added or dropped, though the chain "
        "holds so far\n"
    )
    (config.parent / "state" / "audit.jsonl.head").unlink()
    assert run(config, "verify").stdout == f"line 4 {fault}\n"
    code, report = as_json(config, "verify")
    assert (code, report["intact"], report["lines"], report["line"]) == (2, False, 3, 4)
    assert report["fault"] == fault


def test_a_cut_tail_is_found_with_the_head_beside_the_log(config: Path, log: AuditLog) -> None:
    cut(log, 2)
    result = run(config, "verify")
    assert result.exit_code == 2
    assert result.stdout == "line 3 is gone: the site signed 3 lines, and the log ends after 2\n"


def test_a_cut_tail_is_found_with_a_head_that_was_kept_elsewhere(config: Path, log: AuditLog, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(run(config, "head").stdout)
    cut(log, 2)
    (config.parent / "state" / "audit.jsonl.head").unlink()
    result = run(config, "verify")
    assert result.exit_code == 0
    assert result.stdout == (
        "2 lines, chain intact, no signed head\n"
        "whether the end was cut off cannot be told: give --head with a head that was kept elsewhere\n"
    )
    assert run(config, "verify", "--head", str(kept)).exit_code == 2


def test_a_key_that_is_given_must_have_signed(config: Path, log: AuditLog, key: SigningKey, tmp_path: Path) -> None:
    stranger = SigningKey.create(tmp_path / "stranger.key")
    result = run(config, "verify", "--key", stranger.public)
    assert result.exit_code == 2
    assert result.stdout == f"a head of 3 lines is signed by {key.public}, not by {stranger.public}\n"
    (config.parent / "state" / "audit.jsonl.head").unlink()
    result = run(config, "verify", "--key", key.public)
    assert result.exit_code == 2
    assert result.stdout.endswith(
        "no head signed by the key that was given: whether the end was cut off cannot be told\n"
    )
    code, report = as_json(config, "verify", "--key", key.public)
    assert (code, report["intact"], report["fault"]) == (2, False, "no signed head")


def test_a_head_forged_with_another_key_is_found_by_the_site_s_own(
    config: Path, log: AuditLog, key: SigningKey, tmp_path: Path
) -> None:
    cut(log, 2)
    (config.parent / "state" / "audit.jsonl.head").unlink()
    stranger = SigningKey.create(tmp_path / "stranger.key")
    AuditLog(log.path, site="north", key=stranger).sign_head()
    result = run(config, "verify")
    assert (result.exit_code, "not by " + key.public in result.stdout) == (2, True)


def test_a_copy_is_checked_without_the_site_s_key_and_says_that_the_key_was_not_compared(
    config: Path, log: AuditLog, key: SigningKey
) -> None:
    (config.parent / "state" / "site.key").unlink()
    result = run(config, "verify")
    assert result.exit_code == 0
    assert result.stdout == (
        f"4 lines, chain intact, head signed by {key.public} at line 3\n"
        "nobody said whose key this is: give --key with the site's public key\n"
    )
    assert len(run(config, "verify", "--key", key.public).stdout.splitlines()) == 1


def test_a_torn_last_line_is_told_and_is_no_fault(config: Path, log: AuditLog) -> None:
    with log.path.open("ab") as stream:
        stream.write(b'{"event":')
    result = run(config, "verify")
    assert result.exit_code == 0
    assert "the last line has no end, as after a power cut" in result.stdout


def test_what_cannot_be_checked_is_an_error(config: Path, log: AuditLog, tmp_path: Path) -> None:
    assert isinstance(run(config, "verify", "--key", "ed25519:x").exception, ConfigError)
    missing = run(config, "verify", "--head", str(tmp_path / "none")).exception
    assert isinstance(missing, LedgerError) and "none: cannot be read (No such file" in str(missing)
    foreign = run(config, "verify", "--head", str(config)).exception
    assert isinstance(foreign, LedgerError) and "site.toml: is not a signed head" in str(foreign)


def test_a_site_without_a_trail_is_not_whole(config: Path) -> None:
    result = run(config, "verify")
    assert (result.exit_code, result.stdout) == (2, "there is no log\n")


# -------------------------------------------------------------------------------------------------------- show and head


def test_the_trail_is_shown_line_by_line(config: Path, log: AuditLog) -> None:
    result = run(config, "show")
    assert result.exit_code == 0
    assert [re.sub(r"\d{4}-\S+", "TIME", line) for line in result.stdout.splitlines()] == [
        "     1  TIME  plan received           plan=0123456789ab  run=run",
        "     2  TIME  round reserved          round=1  run=run",
        "     3  TIME  round released          epsilon=0.25  round=1  run=run",
        "     4  TIME  round refused           reason=out-of-order  round=9  run=run",
    ]


def test_the_newest_lines_are_shown_alone(config: Path, log: AuditLog) -> None:
    assert [line.split()[0] for line in run(config, "show", "--last", "2").stdout.splitlines()] == ["3", "4"]
    code, entries = as_json(config, "show", "--last", "1")
    (entry,) = entries
    assert code == 0 and entry.pop("time")
    details = {"reason": "out-of-order", "round": 9, "run": "run"}
    assert entry == {"line": 4, "event": "round refused", "details": details}
    assert [entry["line"] for entry in as_json(config, "show")[1]] == [1, 2, 3, 4]
    assert run(config, "show", "--last", "0").exit_code == 2


def test_a_name_chosen_by_the_coordinator_cannot_steer_the_terminal(config: Path, log: AuditLog) -> None:
    log.append("plan received", run="\x1b[2J\u202e", plan="x  decision=approved")
    shown = run(config, "show", "--last", "1").stdout
    assert shown.count("\n") == 1 and shown[:-1].isprintable()
    assert shown.endswith('plan="x  decision=approved"  run="\\u001b[2J\\u202e"\n')


def test_showing_stops_at_a_line_that_is_not_the_next_one(config: Path, log: AuditLog) -> None:
    log.path.write_text(log.path.read_text().replace("0.25", "0.05"))
    result = run(config, "show")
    assert len(result.stdout.splitlines()) == 3
    assert isinstance(result.exception, LedgerError) and "line 4 does not follow line 3" in str(result.exception)


def test_a_site_without_a_trail_has_nothing_to_show(config: Path) -> None:
    for command in ("show", "head"):
        error = run(config, command).exception
        assert isinstance(error, LedgerError) and "state/audit.jsonl" in str(error)


def test_the_newest_head_is_printed_as_it_is_stored(config: Path, log: AuditLog) -> None:
    stored = (config.parent / "state" / "audit.jsonl.head").read_text()
    assert run(config, "head").stdout == stored
    newer = log.sign_head()
    assert run(config, "head").stdout == newer + "\n" != stored


def test_a_head_with_a_false_signature_is_not_printed(config: Path, log: AuditLog) -> None:
    file = config.parent / "state" / "audit.jsonl.head"
    file.write_text(file.read_text().replace('"lines":3', '"lines":2'))
    error = run(config, "head").exception
    assert isinstance(error, LedgerError) and "its signature is false" in str(error)
