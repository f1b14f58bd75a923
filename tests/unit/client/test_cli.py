"""``consilium site``: what a person at the site sees and decides."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import Result
from small_sites import CODE, encoded, plan_for, policy_for, random_state, request_for, shown, site_for
from typer.testing import CliRunner

from client.audit_log import AuditLog
from client.cli import app
from client.site import Site
from common.adapted import AdaptedModel
from common.errors import ConfigError, LedgerError
from common.messages import PlanStatus, Release
from common.plan import Plan

LABELS = "urgent,routine,review"
NOTES = [("mild cough", "routine"), ("chest pain", "urgent"), ("", "review"), ("fever", "feverish")]


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> Path:
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("note", "class"), *NOTES])
    tables = {
        "site": {"name": "north"},
        "models": [str(tiny_bert)],
        "data": {"default": {"path": "train.csv", "columns": {"text": "note", "label": "class"}}},
        "policy": {"public_size": 40, "lifetime_epsilon": 50.0, "max_epsilon": 10.0},
    }
    (tmp_path / "site.toml").write_text(tomli_w.dumps(tables))
    return tmp_path / "site.toml"


@pytest.fixture
def plan(model: AdaptedModel) -> Plan:
    return plan_for(model)


@pytest.fixture
def site(config: Path, model: AdaptedModel, plan: Plan) -> Site:
    """The site's agent, to which a plan was shown that waits for a person."""
    agent = site_for(config.parent / "state", model, encoded(model, 12), policy_for(model, approval="manual"))
    assert agent.describe(shown(plan)).status is PlanStatus.WAITING
    return agent


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def as_json(config: Path, *arguments: str) -> Any:
    result = run(config, *arguments, "--json")
    return json.loads(result.stdout)


@pytest.mark.usefixtures("site")
def test_waiting_plans_are_listed_with_what_they_would_cost(config: Path, plan: Plan) -> None:
    (waiting,) = as_json(config, "pending")
    assert (waiting["digest"], waiting["run"], waiting["delta"]) == (plan.digest(), "run", 1e-5)
    assert 7.9 < waiting["epsilon"] <= 8.0
    assert plan.digest() in run(config, "pending").stdout


def test_a_plan_is_approved_by_the_first_characters_of_its_digest_while_the_agent_runs(
    config: Path, site: Site, model: AdaptedModel, plan: Plan
) -> None:
    result = run(config, "approve", plan.digest()[:8])
    assert result.exit_code == 0 and result.stdout == f"plan {plan.digest()[:12]}: approved\n"
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    AuditLog(site.audit.path)  # its chain is whole, though two processes wrote it
    (entry,) = as_json(config, "ledger")
    assert (entry["decision"], entry["run"]) == ("approved", "run")
    (executed,) = entry["rounds"]
    assert (executed["round"], executed["phase"], executed["sample_rate"], executed["steps"]) == (1, "lora", 0.25, 2)
    assert "rounds funded 1" in run(config, "ledger").stdout
    assert run(config, "pending").stdout == "no plan waits for a decision\n"


def test_a_plan_is_rejected_and_that_is_recorded(config: Path, site: Site, plan: Plan) -> None:
    assert run(config, "reject", plan.digest()).exit_code == 0
    assert site.describe(shown(plan)).status is PlanStatus.REFUSED
    last = json.loads(site.audit.path.read_text().splitlines()[-1])
    assert (last["event"], last["plan"], last["decision"], last["by"]) == (
        "plan decided",
        plan.digest(),
        "refused",
        "person",
    )
    assert isinstance(run(config, "approve", plan.digest()).exception, LedgerError)


@pytest.mark.usefixtures("site")
def test_a_digest_that_names_no_one_plan_is_told(config: Path) -> None:
    error = run(config, "approve", "zzz").exception
    assert isinstance(error, ConfigError) and "0 plans start with it; see 'consilium site pending'" in str(error)


def test_an_empty_ledger_says_so(config: Path) -> None:
    assert run(config, "ledger").stdout == "no plan was ever shown to this site\n"
    assert run(config, "pending").stdout == "no plan waits for a decision\n"


def test_check_names_every_row_that_cannot_be_learnt_from(config: Path) -> None:
    result = run(config, "check", "--labels", LABELS)
    assert result.exit_code == 2
    assert (
        "data 'default': 4 rows, 4 privacy units (example); 2 rows cannot be learnt from (they contribute zero)"
        in result.stdout
    )
    assert "row 2: text is empty" in result.stdout
    assert "row 3: label 'feverish' is not one of the declared labels" in result.stdout
    report = as_json(config, "check", "--labels", LABELS)
    assert [fault["row"] for fault in report["data"]["default"]["first_faults"]] == [2, 3]
    assert report["shared"]["public_size"] == 40


def test_check_of_good_data_says_what_the_coordinator_will_see(config: Path) -> None:
    file = config.parent / "train.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:3]) + "\n")
    result = run(config, "check", "--labels", LABELS)
    assert result.exit_code == 0
    assert "2 rows, 2 privacy units (example); 0 rows cannot be learnt from" in result.stdout
    assert '"public_size": 40' in result.stdout and CODE not in result.stdout
