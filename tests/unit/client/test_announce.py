"""Whatever bounds what may leave, or keeps shipped code from the data, is told in the log when it was changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from site_files import site_tables, write_site

from client.announce import announce
from client.assemble import build_site
from client.config import read_site_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.csv").write_text("text,label\nmild cough,routine\nchest pain,urgent\n")
    return tmp_path


def started_with(folder: Path, model: Path, **sections: Any) -> None:
    """An agent's start under these settings."""
    config = read_site_config(write_site(folder, site_tables(model, **sections)))
    site, _ = build_site(config)
    announce(site, config)
    site.ledger.close()


def changes(folder: Path) -> list[tuple[str, str, str]]:
    """(setting, before, after) of every line about one."""
    lines = [json.loads(line) for line in (folder / "state" / "audit.jsonl").read_text().splitlines()]
    return [(line["setting"], line["before"], line["after"]) for line in lines if line["event"] == "policy changed"]


def test_that_shipped_code_was_trusted_for_a_while_is_told(folder: Path, tiny_bert: Path) -> None:
    for trusted in (False, True, False):
        started_with(folder, tiny_bert, site={"trust_relay": trusted, "relay_user": "61001"})
    assert changes(folder) == [("site.trust_relay", "false", "true"), ("site.trust_relay", "true", "false")]


def test_that_keys_were_fixed_is_told_and_the_keys_are_not(folder: Path, tiny_bert: Path) -> None:
    started_with(folder, tiny_bert)
    started_with(folder, tiny_bert, testing={"noise": "fast", "seed": 918273645})
    assert changes(folder) == [("testing.fixed_keys", "false", "true")]
    assert "918273645" not in (folder / "state" / "audit.jsonl").read_text()


def test_another_user_of_the_relay_is_told(folder: Path, tiny_bert: Path) -> None:
    for user in ("61001", "61002"):
        started_with(folder, tiny_bert, site={"relay_user": user})
    assert changes(folder) == [("site.relay_user", '"61001"', '"61002"')]
