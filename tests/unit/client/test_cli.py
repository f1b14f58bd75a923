"""``consilium site``: what a person at the site sees and decides."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import Result
from site_files import COORDINATOR, site_tables, write_site
from small_sites import CODE, encoded, phase, plan_for, policy_for, random_state, request_for, shown, site_for
from typer.testing import CliRunner

from client.audit_log import AuditLog
from client.cli import app
from client.ledger_report import print_table
from client.privacy.ledger import Decision, Ledger
from client.site import Site
from common.adapted import AdaptedModel
from common.errors import ConfigError, LedgerError
from common.messages import PlanStatus, Refusal, RefusalReason, Release
from common.model import digest_of
from common.plan import Plan
from common.signing import SigningKey

LABELS = "urgent,routine,review"
NOTES = [("mild cough", "routine"), ("chest pain", "urgent"), ("", "review"), ("fever", "feverish")]


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> Path:
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("note", "class"), *NOTES])
    data = {"default": {"path": "train.csv", "columns": {"text": "note", "label": "class"}}}
    return write_site(tmp_path, site_tables(tiny_bert, data=data, policy={"approval": "manual"}))


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


def change(config: Path, *table: str, **settings: Any) -> None:
    """Settings of a table of ``site.toml`` as a person edits them."""
    tables = tomllib.loads(config.read_text())
    section = tables
    for name in table:
        section = section.setdefault(name, {})
    section.update(settings)
    config.write_text(tomli_w.dumps(tables))


def trail(site: Site) -> list[dict[str, Any]]:
    return [json.loads(line) for line in site.audit.path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- deciding


@pytest.mark.usefixtures("site")
def test_waiting_plans_are_listed_with_what_they_would_cost(config: Path, plan: Plan) -> None:
    (waiting,) = as_json(config, "pending")
    assert (waiting["digest"], waiting["run"], waiting["delta"]) == (plan.digest(), "run", 1e-5)
    assert 7.9 < waiting["epsilon"] <= 8.0 < waiting["reserved_after"] < waiting["limit"] == 50.0
    result = run(config, "pending")
    assert plan.digest() in result.stdout and "does not fit" not in result.stdout and result.stderr == ""


def test_a_plan_is_approved_by_the_first_characters_of_its_digest_while_the_agent_runs(
    config: Path, site: Site, model: AdaptedModel, plan: Plan
) -> None:
    result = run(config, "approve", plan.digest()[:8])
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert first == f"plan {plan.digest()[:12]}: approved"
    balance = site.ledger.balance("site")
    assert second == (
        f"population 'site': epsilon {balance.reserved:.4f} of 50.0000 is reserved, {balance.left:.4f} is left"
    )
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    AuditLog(site.audit.path)  # its chain is whole, though two processes wrote it
    assert run(config, "pending").stdout == "no plan waits for a decision\n"


def test_a_plan_is_rejected_and_that_is_recorded(config: Path, site: Site, plan: Plan) -> None:
    assert run(config, "reject", plan.digest()).exit_code == 0
    assert site.describe(shown(plan)).status is PlanStatus.REFUSED
    last = trail(site)[-1]
    assert (last["event"], last["plan"], last["decision"], last["by"]) == (
        "plan decided",
        plan.digest(),
        "refused",
        "person",
    )
    assert isinstance(run(config, "approve", plan.digest()).exception, LedgerError)


def test_to_approve_what_does_not_fit_refuses_it_and_says_so(config: Path, model: AdaptedModel, plan: Plan) -> None:
    change(config, "populations", "site", lifetime_epsilon=5.0)
    policy = policy_for(model, approval="manual", lifetime_epsilon=5.0)
    with closing(site_for(config.parent / "state", model, (), policy).ledger) as ledger:
        assert ledger.balance("site").limit == 5.0
    site = site_for(config.parent / "state", model, (), policy)
    site.describe(shown(plan))
    assert "(does not fit)" in run(config, "pending").stdout
    assert "THE PLAN DOES NOT FIT: to approve it is to refuse it." in run(config, "show", plan.digest()).stdout
    result = run(config, "approve", plan.digest())
    assert result.exit_code == 2 and result.stdout.startswith(f"plan {plan.digest()[:12]}: refused\n")
    assert (trail(site)[-1]["decision"], site.ledger.reserved("site")) == ("refused", [])


def test_a_closed_plan_serves_no_further_round_and_the_trail_says_why(
    config: Path, site: Site, model: AdaptedModel, plan: Plan
) -> None:
    run(config, "approve", plan.digest())
    site.train(request_for(plan, random_state(model)))
    closed = as_json(config, "close", plan.digest(), "--why", "the study ended")
    assert (closed["decision"], closed["reserved"]) == ("closed", site.ledger.balance("site").reserved)
    last = trail(site)[-1]
    assert (last["event"], last["why"], last["by"]) == ("plan closed", "the study ended", "person")
    for round in (1, 2):
        assert site.train(request_for(plan, random_state(model), round=round)) == Refusal("north", RefusalReason.CLOSED)
    assert isinstance(run(config, "close", plan.digest(), "--why", "x" * 201).exception, ConfigError)
    assert isinstance(run(config, "close", plan.digest(), "--why", "two\nlines").exception, ConfigError)


@pytest.mark.usefixtures("site")
def test_a_digest_that_names_no_one_plan_is_told(config: Path, plan: Plan) -> None:
    error = run(config, "approve", "zzz").exception
    assert isinstance(error, ConfigError) and "0 plans start with it; see 'consilium site pending'" in str(error)
    for short in ("", plan.digest()[:5]):
        error = run(config, "approve", short).exception
        assert isinstance(error, ConfigError) and "is too short; give at least 6 characters" in str(error)
    assert len(as_json(config, "pending")) == 1


def test_a_decision_is_in_the_ledger_before_it_is_in_the_trail(
    config: Path, site: Site, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash between the two the trail says less than the ledger, never more."""
    before = trail(site)
    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", _power_cut)
        assert isinstance(run(config, "approve", plan.digest()).exception, RuntimeError)
    assert site.describe(shown(plan)).status is PlanStatus.READY and trail(site) == before


def _power_cut(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")


def test_with_a_broken_trail_nothing_is_decided(config: Path, site: Site, plan: Plan) -> None:
    path = site.audit.path
    path.write_text(path.read_text().replace("plan received", "plan rejected") * 2)
    for command in ("approve", "reject", "close"):
        assert isinstance(run(config, command, plan.digest()).exception, LedgerError)
    assert [entry.decision for entry in site.ledger.plans()] == ["waiting"]


# -------------------------------------------------------------------------------------------------------------- showing


@pytest.mark.usefixtures("site")
def test_a_plan_is_explained_in_plain_words_before_and_after_it_is_approved(
    config: Path, site: Site, plan: Plan
) -> None:
    lines = run(config, "show", plan.digest()[:10]).stdout.splitlines()
    assert lines[0] == f"Plan {plan.digest()}" and lines[2] == "It waits for you."
    assert lines[3] == f"It is signed by the coordinator's key {COORDINATOR.public}."
    statement = site.ledger.plans()[0].statement
    assert statement is not None
    (trained,) = statement.phases
    text = "\n".join(lines)
    for part in (
        "Task: to sort texts into 3 classes: 'urgent', 'routine', 'review'.",
        "It belongs to population 'site', declared to have 40 examples.",
        f"Base model: the one with weight digest {plan.model_digest}.",
        "Adapter: LoRA of rank 4 (alpha 8) on query and value of the attention of the top 2 layers.",
        "Phase 'lora' trains the classification head and the LoRA adapter: 3 rounds of 2 steps each.",
        "Each example takes part in a step with probability 0.25, by chance alone: about 10 of 40.",
        f"is cut to norm 1; the noise in each step is {trained.noise_multiplier:.4g} times that (noise multiplier).",
        "At most 3 releases, one in each round",
        f"This plan: epsilon {statement.epsilon:.4f} at delta 1e-05 for each example, by the accountant PRV",
        "limit                   50.0000",
        "reserved before          0.0000",
        f"reserved if approved {site.ledger.balance('site').after(statement):>10.4f}",
    ):
        assert part in text, part
    run(config, "approve", plan.digest())
    after = run(config, "show", plan.digest()).stdout
    reserved = site.ledger.balance("site").reserved
    assert "It is approved." in after and f"reserved             {reserved:>10.4f}" in after


@pytest.mark.usefixtures("site")
def test_the_explanation_is_also_one_json_object(config: Path, site: Site, plan: Plan) -> None:
    found = as_json(config, "show", plan.digest())
    assert (found["decision"], found["signed_by"]) == ("waiting", COORDINATOR.public)
    assert found["plan"] == plan.model_dump(mode="json")
    assert found["budget"]["fits"] and found["budget"]["reserved_after"] > found["budget"]["reserved"] == 0.0
    assert found["population"]["public_size"] == 40


def test_nothing_in_a_plan_can_steer_the_terminal_or_pass_for_a_line(
    config: Path, site: Site, model: AdaptedModel, plan: Plan
) -> None:
    labels = ("urgent\x1b[2K\r", "x\n  left then 50.0000", "\u202egnikcats", "it's', 'fine\\n")
    task = plan.task.model_copy(update={"labels": labels})
    hostile = plan.model_copy(update={"task": task, "run_id": "hostile"})
    site.describe(shown(hostile))
    for arguments in (["show", hostile.digest()], ["pending"], ["ledger"]):
        text = run(config, *arguments).stdout
        assert all(line.isprintable() for line in text.splitlines()) and hostile.digest()[:12] in text
    text = run(config, "show", hostile.digest()).stdout
    assert r"'urgent\x1b[2K\r', 'x\n  left then 50.0000', '\u202egnikcats', 'it\'s\', \'fine\\n'" in text
    assert as_json(config, "show", hostile.digest())["plan"]["task"]["labels"] == list(labels)


def test_a_plan_without_privacy_or_signature_says_so_loudly(
    config: Path, tiny_bert: Path, model: AdaptedModel, plan: Plan
) -> None:
    free = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"mechanism": "none", "epsilon": None})})
    site = site_for(config.parent / "state", model, (), policy_for(model, approval="manual", allow_no_privacy=True))
    site.describe(shown(free))
    other = "ed25519:" + "A" * 43
    write_site(config.parent, site_tables(tiny_bert, coordinator=other))
    text = run(config, "show", free.digest()).stdout
    assert "THE PLAN PROMISES NO PRIVACY" in text and "NO NOISE is added." in text
    assert "IT IS NOT SIGNED by any key that site.toml names now" in text


def test_metrics_that_a_plan_asks_for_are_told_as_what_leaves(config: Path, model: AdaptedModel, plan: Plan) -> None:
    metrics = plan.privacy.model_copy(update={"metrics": ("loss", "accuracy")})
    asking = plan.model_copy(update={"privacy": metrics})
    site_for(
        config.parent / "state", model, (), policy_for(model, approval="manual", metrics=("loss", "accuracy"))
    ).describe(shown(asking))
    text = run(config, "show", asking.digest()).stdout
    assert "the mean over the round's examples of: loss, accuracy." in text and "no loss" not in text


def test_the_ledger_tells_every_budget_and_charge(config: Path, model: AdaptedModel) -> None:
    site = site_for(config.parent / "state", model, encoded(model, 12), policy_for(model))
    assert as_json(config, "ledger")["plans"] == []
    plan = plan_for(model, [phase("lora", rounds=3), phase("more", rounds=1, steps=1)])
    site.describe(shown(plan))
    for round in (1, 2, 4):
        assert isinstance(site.train(request_for(plan, random_state(model), round=round)), Release)
    found = as_json(config, "ledger")
    (population,), (entry,) = found["populations"], found["plans"]
    balance = site.ledger.balance("site")
    assert (population["spent"], population["reserved"], population["left"]) == (
        balance.spent,
        balance.reserved,
        balance.left,
    )
    assert 0 < population["spent"] < population["reserved"]
    charges = [tuple(charge.values()) for charge in entry["rounds"]]
    assert charges == site.ledger.charges(plan.digest()) and [charge[0] for charge in charges] == [1, 2, 4]
    result = run(config, "ledger")
    lines = [line.split() for line in result.stdout.splitlines()]
    noise = [f"{charge[3]:.6g}" for charge in charges]
    start = plan.digest()[:12]
    assert [start, "1-2", "lora", "0.25", noise[0], "2"] in lines
    assert [start, "4", "more", "0.25", noise[2], "1"] in lines
    assert [
        "site",
        "example",
        "1e-05",
        "50.0000",
        *(f"{population[x]:.4f}" for x in ("spent", "reserved", "left")),
    ] in lines


def test_where_no_agent_has_run_everything_says_so_and_nothing_is_made(config: Path) -> None:
    assert run(config, "pending").stdout.startswith("no plan waits for a decision; the agent has never run here")
    assert run(config, "ledger").stdout == "no plan was ever shown to this site\n"
    assert as_json(config, "pending") == [] and as_json(config, "ledger")["plans"] == []
    error = run(config, "show", "abcdef").exception
    assert isinstance(error, ConfigError) and "no plan was shown yet" in str(error)
    assert not (config.parent / "state").exists() and not (config.parent / "consilium.counter").exists()


def test_on_a_terminal_it_is_a_table_and_no_name_is_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table("Plans", ("plan", "run"), [("3f9c21aa", "[red]a[/red]\x1b[2K")])
    drawn = capsys.readouterr().out
    assert "│ 3f9c21aa │ [red]a[/red]\\x1b[2K │" in drawn and "\x1b[2K" not in drawn


# ------------------------------------------------------------------------------------------------------------- blocking


def test_a_blocked_site_says_so_everywhere_and_goes_on_only_when_a_person_answers_for_it(
    config: Path, site: Site, plan: Plan
) -> None:
    assert run(config, "unblock").stdout == "this site is not blocked; there is nothing to lift\n"
    site.ledger.block("somebody showed a newer head")
    for arguments in (["pending"], ["ledger"], ["show", plan.digest()]):
        assert "this site is BLOCKED: somebody showed a newer head" in run(config, *arguments).stderr
    assert as_json(config, "ledger")["blocked"] == "somebody showed a newer head"
    assert isinstance(run(config, "approve", plan.digest()).exception, LedgerError)
    for incomplete in ([], ["--this-is-the-newest-copy"], ["--why", "looked"]):
        error = run(config, "unblock", *incomplete).exception
        assert isinstance(error, ConfigError) and "somebody showed a newer head" in str(error)
    before = len(trail(site))
    result = run(config, "unblock", "--this-is-the-newest-copy", "--why", "the other head was a drill")
    assert result.exit_code == 0 and result.stdout == "the site goes on; 1 open plans were closed\n"
    assert site.ledger.blocked is None
    assert [(line["event"], line["why"], line["by"]) for line in trail(site)[before:]] == [
        ("site unblocked", "the other head was a drill", "person"),
        ("plan closed", "the other head was a drill", "person"),
    ]


def test_an_older_copy_stops_every_command_until_a_person_answers_for_it(config: Path, site: Site, plan: Plan) -> None:
    state = config.parent / "state"
    site.ledger.close()
    shutil.copytree(state, config.parent / "backup")
    run(config, "approve", plan.digest())
    shutil.rmtree(state)
    shutil.copytree(config.parent / "backup", state)
    for arguments in (["pending"], ["approve", plan.digest()], ["ledger"]):
        error = run(config, *arguments).exception
        assert isinstance(error, LedgerError) and "run 'consilium site unblock'" in str(error)
    error = run(config, "unblock").exception
    assert isinstance(error, ConfigError) and "older copy" in str(error)
    assert run(config, "unblock", "--this-is-the-newest-copy", "--why", "restored").exit_code == 0
    assert as_json(config, "pending") == []
    (entry,) = as_json(config, "ledger")["plans"]
    assert (entry["decision"], entry["closed_because"]) == ("closed", "restored")
    shutil.rmtree(state)
    assert isinstance(run(config, "pending").exception, LedgerError), "a deleted ledger is no fresh one"


def test_a_clock_that_was_set_back_is_spoken_of(config: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Ledger(config.parent / "state")) as ledger, ledger._file.writing() as db:
        db.execute("UPDATE meta SET value='2999-01-01T00:00:00+00:00' WHERE key='clock'")
    assert "days, " in run(config, "ledger").stderr and "ahead of the system's" in run(config, "pending").stderr
    assert as_json(config, "ledger")["clock_ahead_seconds"] > 1e9


def test_a_plan_that_the_policy_does_not_allow_any_more_is_not_approved(config: Path, plan: Plan, site: Site) -> None:
    stricter = tomllib.loads(config.read_text())
    stricter["policy"]["max_epsilon"] = 0.5
    config.write_text(tomli_w.dumps(stricter))
    error = run(config, "approve", plan.digest()[:12]).exception
    assert isinstance(error, ConfigError) and "does not allow it any more (policy)" in str(error)
    assert site.ledger.plan(plan.digest()).decision is Decision.WAITING  # type: ignore[union-attr]


def test_a_plan_whose_key_is_pinned_no_more_is_not_approved(config: Path, plan: Plan, site: Site) -> None:
    change(config, "policy", coordinator_keys=[SigningKey.fresh().public])
    assert "IT IS NOT SIGNED" in run(config, "show", plan.digest()).stdout
    error = run(config, "approve", plan.digest()).exception
    assert isinstance(error, ConfigError) and "no key that policy.coordinator_keys names now has signed it" in str(
        error
    )
    assert site.ledger.reserved("site") == []


@pytest.mark.parametrize("limit", [1.0, 60.0])
def test_nothing_is_approved_under_another_limit_than_site_toml_says(
    config: Path, plan: Plan, site: Site, limit: float
) -> None:
    change(config, "populations", "site", lifetime_epsilon=limit)
    error = run(config, "approve", plan.digest()).exception
    assert isinstance(error, ConfigError) and "with a lifetime_epsilon of 50, as it did when the agent" in str(error)
    assert (site.ledger.reserved("site"), site.ledger.balance("site").limit) == ([], 50.0)


def test_with_fixed_keys_no_command_shows_an_epsilon(config: Path, plan: Plan, site: Site) -> None:
    change(config, "testing", noise="fast", seed=0)
    pending = run(config, "pending")
    assert [each["epsilon"] for each in as_json(config, "pending")] == [None]
    assert "fixed keys are in use: no privacy is claimed" in pending.stderr
    assert "THE PLAN PROMISES NO PRIVACY" in run(config, "show", plan.digest()).stdout
    assert as_json(config, "show", plan.digest())["epsilon"] is None
    assert [each["epsilon"] for each in as_json(config, "ledger")["plans"]] == [None]


def test_a_second_agent_does_not_start(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.agent.forbid_inspection", lambda: None)  # of this very process
    monkeypatch.setattr("client.log_limit.limit_log", lambda: None)  # its handlers are pytest's
    SigningKey.create(config.parent / "state" / "site.key")
    with closing(Ledger(config.parent / "state")) as first, first.serve_alone():
        error = run(config, "agent").exception
    assert isinstance(error, LedgerError) and f"an agent or a withdrawal uses it (process {os.getpid()})" in str(error)


# ---------------------------------------------------------------------------------------------------------------- check


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


def test_check_of_good_data_says_what_the_coordinator_will_see(config: Path) -> None:
    file = config.parent / "train.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:3]) + "\n")
    result = run(config, "check", "--labels", LABELS)
    assert result.exit_code == 0
    assert "2 rows, 2 privacy units (example); 0 rows cannot be learnt from" in result.stdout
    assert '"public_size": 40' in result.stdout and CODE not in result.stdout


def test_check_needs_no_labels_and_says_which_it_took(config: Path) -> None:
    result = run(config, "check")
    assert result.exit_code == 2 and "row 2: text is empty" in result.stdout and "feverish" in result.stdout
    assert "every label that occurs was taken for a label of the plan (4: 'feverish', 'review'" in result.stdout
    file = config.parent / "train.csv"
    file.write_text("note,class\nmild cough,2\nfever,1\n")
    assert "(3: '0', '1', '2')" in run(config, "check").stdout
    file.write_text("note,class\nmild cough,routine\nfever,routine\n")
    assert "holds fewer than two labels" in str(run(config, "check").exception)


def test_check_prints_the_digests_of_the_models_and_which_of_them_the_policy_lacks(
    config: Path, tiny_bert: Path
) -> None:
    digest = digest_of(tiny_bert)
    assert f"base model '{tiny_bert}': {digest}\n" in run(config, "check", "--labels", LABELS).stdout
    change(config, "policy", base_models=["0" * 64])
    report = as_json(config, "check", "--labels", LABELS)
    assert report["models"] == {str(tiny_bert): digest}
    assert any("the agent will not start: policy.base_models does not list" in remark for remark in report["remarks"])


def test_check_tells_what_would_keep_the_agent_from_starting_and_makes_nothing(config: Path) -> None:
    change(config, "site", trust_relay=False)
    remarks = as_json(config, "check", "--labels", LABELS)["remarks"]
    assert any(remark.startswith("the agent will not start: site.relay_user: is missing") for remark in remarks)
    assert not (config.parent / "state").exists()


@pytest.mark.parametrize(
    ("units", "declared", "told"), [(44, 40, ""), (45, 40, "45"), (137, 40, "130"), (137, "exact", "")]
)
def test_check_tells_where_the_declared_size_is_smaller_than_a_coordinator_allows_for(
    config: Path, units: int, declared: int | str, told: str
) -> None:
    """1.1 · 40 = 44 units are what ``server/norm_bound.py`` allows for."""
    rows = [
        ["note", "class", "patient"],
        *(["mild cough", "routine", f"p{index % units}"] for index in range(2 * units)),
    ]
    with (config.parent / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    change(config, "populations", "site", unit="patient", public_size=declared)
    change(config, "data", "default", privacy_unit="patient")
    remarks = [one for one in as_json(config, "check", "--labels", LABELS)["remarks"] if "public_size" in one]
    assert len(remarks) == bool(told)
    if told:
        assert remarks[0].startswith(f"populations.site.public_size = 40: data 'default' holds {units} privacy units")
        assert f"Declare {told} before the agent first starts" in remarks[0]


def test_check_names_a_row_that_no_tokenizer_takes(config: Path) -> None:
    change(config, "data", "default", path="train.jsonl")
    rows = [{"note": "mild cough", "class": "routine"}, {"note": "\ud800", "class": "urgent"}]
    (config.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(config, "check", "--labels", LABELS)
    assert result.exit_code == 2 and "row 1: row cannot be encoded" in result.stdout


def test_check_checks_for_the_task_that_the_policy_allows(config: Path) -> None:
    change(config, "policy", tasks=["causal-lm"])
    change(config, "data", "default", columns={"prompt": "note", "completion": "class"})
    report = as_json(config, "check")
    assert report["data"]["default"]["rows"] == 4
