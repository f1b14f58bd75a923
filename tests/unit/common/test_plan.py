"""The plan: one canonical form, one digest, and the round index alone selects the phase."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import WireError
from common.plan import Plan, plan_of, read_plan

REPOSITORY = Path(__file__).parents[3]

PHASES = [
    {"name": "head", "rounds": 3, "sample_rate": 1.0, "train": ["head"]},
    {"name": "lora", "rounds": 2, "sample_rate": 0.25, "steps": 4},
]


def plan(
    run_id: str = "run-1", model: str = "m" * 64, adapter: str = "a" * 64, code: str = "c" * 64, **sections: Any
) -> Plan:
    tables = {"task": {"labels": ["ja", "nein", "später"]}, "phase": PHASES, **sections}
    return plan_of(RunConfig.model_validate(tables), run_id, model, adapter, code)


def changed(**fields: Any) -> str:
    """The plan's JSON with some top-level fields replaced."""
    return json.dumps({**json.loads(plan().canonical()), **fields}, sort_keys=True, separators=(",", ":"))


def test_the_digest_is_sha256_of_sorted_json_without_spaces() -> None:
    canonical = plan().canonical()
    assert json.dumps(json.loads(canonical), sort_keys=True, separators=(",", ":"), ensure_ascii=False) == canonical
    assert "später" in canonical
    assert plan().digest() == hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def test_the_digest_is_the_same_in_processes_with_different_hash_seeds() -> None:
    script = (
        "import sys; from common.plan import read_plan; print(read_plan(sys.stdin.buffer.read().decode()).digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            input=plan().canonical().encode(),
            capture_output=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {plan().digest().encode()}


def test_settings_written_differently_but_equal_have_one_digest() -> None:
    whole = plan(privacy={"epsilon": 3, "mechanism": "dp-sgd"})
    assert whole.digest() == plan(privacy={"mechanism": "dp-sgd", "epsilon": 3.0}).digest()


def test_defaults_written_out_do_not_change_the_digest() -> None:
    assert plan().digest() == plan(privacy={"epsilon": 8.0, "unit": "example"}, lora={"r": 8}).digest()


@pytest.mark.parametrize(
    "settings",
    [
        {"run_id": "run-2"},
        {"model": "n" * 64},
        {"adapter": "b" * 64},
        {"code": "d" * 64},
        {"run": {"seed": 1}},
        {"data": {"name": "other"}},
        {"task": {"labels": ["nein", "ja", "später"]}},
        {"task": {"labels": ["ja", "nein", "später"], "max_length": 64}},
        {"lora": {"r": 4}},
        {"privacy": {"epsilon": 7.999999}},
        {"privacy": {"mechanism": "none"}},
        {"phase": [PHASES[1], PHASES[0]]},
        {"phase": [PHASES[0], {**PHASES[1], "clip_norm": 0.5}]},
        {"phase": [PHASES[0], {**PHASES[1], "server_momentum": 0.9}]},
    ],
    ids=str,
)
def test_a_changed_plan_has_another_digest(settings: dict[str, Any]) -> None:
    assert plan(**settings).digest() != plan().digest()


def test_what_is_the_coordinators_own_affair_is_not_part_of_the_plan() -> None:
    same = plan(run={"name": "another-name"}, server={"min_sites": 9}, simulation={"seed": 5}, evaluation={"limit": 3})
    assert same.digest() == plan().digest()


def test_the_round_index_alone_selects_the_phase() -> None:
    assert [plan().phase_of(round).name for round in range(1, 6)] == ["head", "head", "head", "lora", "lora"]
    assert plan().rounds == 5
    for outside in (-1, 0, 6):
        with pytest.raises(IndexError, match=f"round {outside} lies outside the plan's 5 rounds"):
            plan().phase_of(outside)


def test_a_plan_is_read_back_equal() -> None:
    assert read_plan(plan().canonical()) == plan()
    assert read_plan(plan().canonical()).digest() == plan().digest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "{",
        "\ud800",
        '"' + "x" * 10 + '"',
        "[" * 200_000,
        '{"run_id":"\\ud800"}',
        changed(seed="0"),
        changed(unknown=1),
        changed(privacy={"mechanism": "dp-sgd", "epsilon": None}),
        changed(neighbouring="replace-one"),
        changed(accountant="gdp"),
        changed(phases=[{"name": "head", "rounds": 0, "sample_rate": 1.0}]),
        changed(phases=[{"name": "head", "rounds": 1, "sample_rate": 1.0, "clip_norm": float("nan")}]),
        changed(phases=[{"name": "head", "rounds": 1, "sample_rate": 1.0, "algorithm": "unheard-of"}]),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(WireError, match=r"^plan: "):
        read_plan(text)


def test_a_plan_without_phases_or_with_twice_the_same_name_is_refused() -> None:
    for phases in ([], [PHASES[0], PHASES[0]]):
        tables = plan().model_dump(mode="json")
        tables["phases"] = [{**tables["phases"][0], **phase} for phase in phases]
        text = json.dumps(tables, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        with pytest.raises(WireError, match=r"^plan: "):
            read_plan(text)


def test_a_plan_of_a_newer_schema_is_refused_as_such() -> None:
    with pytest.raises(WireError, match=r"schema_version 99 is newer than this installation knows; update it"):
        read_plan(changed(schema_version=99, something_new=True))


def test_a_plan_that_is_equal_but_not_canonical_is_refused() -> None:
    tables = json.loads(plan().canonical())
    for text in (json.dumps(tables), plan().canonical() + "\n", plan().canonical().replace('"seed":0', '"seed":0.0')):
        assert Plan.model_validate_json(text) == plan()
        with pytest.raises(WireError, match="not canonical"):
            read_plan(text)
