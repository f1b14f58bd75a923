"""Settings: all problems at once, with the nearest known name; overrides; every cross-check."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from site_files import site_tables

from client.config import SiteConfig
from common.config import RunConfig
from common.errors import ConfigError
from common.recipes import default_phases
from common.sections import PrivacySection, TaskSection
from common.toml_settings import apply_overrides, read_toml, validate
from server.settings import resolved_toml

TASK = {"labels": ["urgent", "routine"]}
PHASE = {"name": "head", "rounds": 2, "sample_rate": 0.5}
EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.toml"))


def run(**sections: Any) -> RunConfig:
    return validate(RunConfig, {"task": TASK, **sections}, "run.toml")


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run(**sections)
    return caught.value.problems


# ---- unknown and mistyped settings ----------------------------------------------------------------------------------


def test_the_smallest_file_takes_the_defaults() -> None:
    config = run()
    assert config.model.name == "minilm"
    assert (config.privacy.mechanism, config.privacy.epsilon) == ("dp-sgd", 8.0)
    assert config.phases == default_phases(TaskSection(labels=("a", "b")), PrivacySection(epsilon=8.0))
    none = PrivacySection(mechanism="none")
    assert config.without_privacy().phases == default_phases(TaskSection(labels=("a", "b")), none)
    written = config.model_copy(update={"phase": config.phases[:1]})
    assert written.without_privacy().phases == config.phases[:1]
    resolved = config.model_copy(update={"phase": config.phases})  # as run.toml holds them when a run is resumed
    assert resolved.without_privacy() == config.without_privacy()


def test_all_problems_of_a_file_are_told_at_once_each_with_the_nearest_known_name() -> None:
    with pytest.raises(ConfigError) as caught:
        run(
            privcy={},
            privacy={"epsilom": 3, "delta": 2},
            lora={"r": "eight"},
            phase=[{**PHASE, "rounds": 0}, {**PHASE, "name": "two", "trian": ["head"]}],
        )
    assert sorted(caught.value.problems) == [
        "lora.r = 'eight': should be a valid integer",
        "phase.0.rounds = 0: should be greater than or equal to 1",
        "phase.1.trian: unknown setting (did you mean 'train'?)",
        "privacy.delta = 2: should be less than 1",
        "privacy.epsilom: unknown setting (did you mean 'epsilon'?)",
        "privcy: unknown setting (did you mean 'privacy'?)",
    ]
    assert str(caught.value).startswith("6 settings in run.toml are wrong:\n  - ")


def test_a_name_that_resembles_none_is_answered_with_the_known_ones() -> None:
    (problem,) = problems(data={"zzz": 1})
    known = "alpha, classes_per_site, columns, min_size, name, partition, path, privacy_unit, site_column, sites"
    assert problem == f"data.zzz: unknown setting (known: {known})"


def test_a_setting_inside_a_named_table_is_answered_with_the_settings_of_that_table() -> None:
    policy = {"public_size": 10, "lifetime_epsilon": 8.0, "max_epsilon": 8.0}
    tables = {"site": {"name": "a"}, "data": {"notes": {"path": "x", "splitt": "train"}}, "policy": policy}
    with pytest.raises(ConfigError, match=r"data\.notes\.splitt: unknown setting \(did you mean 'split'\?\)"):
        validate(SiteConfig, tables, "site.toml")


def test_a_value_that_fits_neither_of_two_kinds_is_one_problem() -> None:
    tables = site_tables(Path("no model"), population={"public_size": "exakt"})
    with pytest.raises(ConfigError) as caught:
        validate(SiteConfig, tables, "site.toml")
    problem = "populations.site.public_size = 'exakt': should be a valid integer, or should be 'exact'"
    assert caught.value.problems == [problem]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"task": None}, "task = None: should be a table"),
        ({"task": {"labels": "urgent"}}, "task.labels = 'urgent': should be a list"),
        ({"run": "x"}, "run = 'x': should be a table"),
        ({"phase": {"name": "x"}}, "phase = {'name': 'x'}: should be a list"),
        ({"lora": {"r": True}}, "lora.r = True: should be a valid integer"),
        ({"lora": {"r": "8"}}, "lora.r = '8': should be a valid integer"),
        ({"lora": {"alpha": float("inf")}}, "lora.alpha = inf: should be a finite number"),
        ({"lora": {"alpha": -1.0}}, "lora.alpha = -1.0: should be greater than 0"),
        ({"server": {"cohort": 1.5}}, "server.cohort = 1.5: should be less than or equal to 1"),
        ({"privacy": {"mechanism": "dp"}}, "privacy.mechanism = 'dp': should be 'dp-sgd' or 'none'"),
        ({"run": {"name": "a/b"}}, "run.name = 'a/b': string should match pattern"),
    ],
)
def test_a_mistyped_value_is_named_with_what_it_should_be(sections: dict[str, Any], problem: str) -> None:
    (told,) = problems(**sections)
    assert told.startswith(problem)


def test_a_required_section_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^setting in run\.toml: task: is required and missing$"):
        validate(RunConfig, {}, "run.toml")


# ---- cross-checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"task": {"labels": ["one"]}}, "task.labels: at least two label names are needed"),
        ({"task": {"labels": ["one", "one"]}}, "task.labels: a label name appears twice"),
        ({"task": {"name": "causal-lm", "prompt_template": "Q:"}}, "task.prompt_template: must contain {prompt}"),
        ({"privacy": {"epsilon": None}}, "privacy.epsilon: must be given with mechanism = 'dp-sgd'"),
        ({"phase": [{"name": "p", "rounds": 1}]}, "phase.0.sample_rate: give exactly one of sample_rate and batch_"),
        ({"phase": [{**PHASE, "batch_size": 4}]}, "phase.0.sample_rate: give exactly one of sample_rate and batch_"),
        ({"phase": [{**PHASE, "algorithm": "fedit "}]}, "phase.0.algorithm = 'fedit ': is unknown (did you mean 'fe"),
        ({"phase": [{**PHASE, "train": []}]}, "phase.0.train: must list 'head', 'lora' or both, each once"),
        ({"phase": [{**PHASE, "train": ["head", "head"]}]}, "phase.0.train: must list 'head', 'lora' or both, each"),
        ({"phase": [PHASE, PHASE]}, "phase: two phases have the same name"),
        (
            {"task": {"name": "causal-lm"}, "phase": [{**PHASE, "train": ["head"]}]},
            "phase 'head': 'head' cannot be trained for causal-lm",
        ),
        (
            {"lora": {"layers": 1}, "phase": [{**PHASE, "layers": 2}]},
            "phase 'head': layers = 2 exceeds lora.layers = 1",
        ),
        ({"lora": {"dropout": 0.1}}, "lora.dropout = 0.1: under differential privacy one unit more would change"),
        (
            {"task": {"name": "sequence-clasification"}},
            "task.name = 'sequence-clasification': has no default recipe (did you mean 'sequence-classification'?)",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, Any], problem: str) -> None:
    (told,) = problems(**sections)
    assert told.startswith(problem)


def test_no_privacy_needs_no_epsilon() -> None:
    assert run(privacy={"mechanism": "none", "epsilon": None}).privacy.epsilon is None


def test_a_newer_schema_is_refused_before_its_names_are_judged() -> None:
    for model in (RunConfig, SiteConfig):
        with pytest.raises(ConfigError) as caught:
            validate(model, {"schema_version": 2, "from_the_future": 1}, "x.toml")
        (problem,) = caught.value.problems
        assert problem == "schema_version = 2: is newer than this installation knows (1); update it"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    assert validate(RunConfig, read_toml(path), str(path)).phases


# ---- overrides ------------------------------------------------------------------------------------------------------

TABLES: dict[str, Any] = tomllib.loads(
    """
    [task]
    labels = ["urgent", "routine"]
    [[phase]]
    name = "head"
    rounds = 40
    sample_rate = 1.0
    [[phase]]
    name = "lora"
    rounds = 10
    sample_rate = 0.25
    """
)


def test_overrides_are_toml_values_or_plain_text() -> None:
    given = [
        "privacy.epsilon=3",
        "lora.target_modules=['query']",
        "run.name=a-run",
        "data.path=/some/folder with = and spaces",
        "evaluation.test=''",
        " lora.use_rslora = true",
        "data.columns.text=note",
    ]
    config = validate(RunConfig, apply_overrides(TABLES, given), "run.toml")
    assert config.privacy.epsilon == 3.0
    assert config.lora.target_modules == ("query",)
    assert config.run.name == "a-run"
    assert config.data.path == "/some/folder with = and spaces"
    assert config.evaluation.test == ""
    assert config.lora.use_rslora is True
    assert config.data.columns == {"text": "note"}


def test_a_phase_is_addressed_by_index_or_by_name() -> None:
    config = validate(RunConfig, apply_overrides(TABLES, ["phase.0.rounds=3", "phase.lora.rounds=4"]), "run.toml")
    assert [phase.rounds for phase in config.phases] == [3, 4]


DEFAULT: dict[str, Any] = {"task": TABLES["task"]}


def overridden(*overrides: str, tables: dict[str, Any] = TABLES) -> RunConfig:
    return validate(RunConfig, apply_overrides(tables, overrides), "run.toml")


def test_the_phases_of_the_default_recipe_are_addressed_alike() -> None:
    usual = overridden(tables=DEFAULT)
    for settings in (("phase.head.rounds=7",), ("phase.0.rounds=7",), ("phase.rounds=7", "phase.lora.rounds=4")):
        config = overridden(*settings, tables=DEFAULT)
        assert config.phases == (usual.phases[0].model_copy(update={"rounds": 7}), usual.phases[1])
        assert config.phase == ()  # so that the model still says which recipe it is, and whether features are mapped
        assert validate(RunConfig, json.loads(config.model_dump_json()), "") == config


def test_an_algorithm_is_changed_where_lora_is_trained_and_a_batch_takes_the_sample_rates_place() -> None:
    tables = {**DEFAULT, "phase": [{**TABLES["phase"][0], "train": ["head"]}, TABLES["phase"][1]]}
    config = overridden("server.algorithm=fedsvd", "phase.lora.batch_size=4", tables=tables)
    assert [phase.algorithm for phase in config.phases] == ["ffa", "fedsvd"]
    assert [(phase.sample_rate, phase.batch_size) for phase in config.phases] == [(1.0, None), (None, 4)]


def test_a_recipe_that_was_changed_by_hand_stays_as_it_is_without_privacy() -> None:
    config = overridden("phase.head.learning_rate=3.5", tables=DEFAULT)
    written = validate(RunConfig, tomllib.loads(resolved_toml(config)), "run.toml")  # as a resumed run reads it
    assert written.phases == config.phases and written.phase_changes == ()
    assert config.without_privacy().phases == written.without_privacy().phases == config.phases


@pytest.mark.parametrize("tables", [TABLES, DEFAULT])
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("phase.haed.rounds=1", "phase.haed.rounds: there is no such phase (did you mean 'head'?)"),
        ("phase.7.rounds=1", "phase.7.rounds: there is no such phase (known: head, lora)"),
        (
            "phase.head.rounds.x=1",
            "phase.head.rounds.x: does not address a setting; expected phase.KEY or phase.NAME.KEY",
        ),
        ("phase.head.round=1", "setting in phase.head.round=1: round: unknown setting (did you mean 'rounds'?)"),
        (
            "phase.head.rounds=0",
            "setting in phase.head.rounds=0: rounds = 0: should be greater than or equal to 1",
        ),
    ],
)
def test_a_change_of_a_phase_that_does_not_fit_is_refused(tables: dict[str, Any], override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden(override, tables=tables)
    assert str(caught.value) == problem


def test_all_phases_that_are_not_there_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        overridden("phase.body.rounds=1", "phase.7.rounds=1")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["phase.body.rounds", "phase.7.rounds"]


def test_overrides_leave_the_given_tables_alone() -> None:
    apply_overrides(TABLES, ["phase.0.rounds=3", "task.max_length=16"])
    assert TABLES["phase"][0]["rounds"] == 40
    assert "max_length" not in TABLES["task"]


def test_all_wrong_overrides_are_told_at_once() -> None:
    wrong = ["privacy.epsilon", "epsilon=3", "task.labels.x=1", "a..b=1"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(TABLES, wrong)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"--set {each}" for each in wrong]
    assert "expected section.key=value, e.g. --set privacy.epsilon=3" in caught.value.problems[0]
    assert "'task.labels.x' does not address a setting" in caught.value.problems[2]


def test_an_override_with_an_unknown_name_is_an_unknown_setting() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilom: unknown setting \(did you mean 'epsilon'\?\)"):
        validate(RunConfig, apply_overrides(TABLES, ["privacy.epsilom=3"]), "run.toml")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    broken, binary = tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("[task\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_toml(tmp_path)
    for path in (broken, binary):
        with pytest.raises(ConfigError, match=rf"{path.name}: is not valid TOML"):
            read_toml(path)
