"""The grid of a sweep: which runs it asks for, under which names, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.recipes import default_phases
from common.toml_settings import validate
from simulations.sweep_grid import Cell, cells_of, read_axis

TABLES: dict[str, Any] = {
    "task": {"name": "sequence-classification", "labels": ["a", "b"]},
    "data": {"site_column": "hospital"},
}
HEAD = {"name": "head", "rounds": 3, "sample_rate": 1.0, "train": ["head"]}
LORA = {"name": "lora", "rounds": 2, "sample_rate": 0.5, "train": ["head", "lora"]}
WRITTEN = {**TABLES, "phase": [HEAD, LORA]}


def grid(*over: str, tables: Mapping[str, Any] = TABLES, seeds: int = 1, settings: tuple[str, ...] = ()) -> list[Cell]:
    return cells_of(tables, settings, [read_axis(text) for text in over], seeds, "run.toml")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("privacy.epsilon=1,3,none", ("1", "3", "none")),
        ("lora.r=4", ("4",)),
        ('task.labels=["a","b"],["c","d"]', ('["a","b"]', '["c","d"]')),
        ('task.prompt_template="{prompt}, please", chat', ('"{prompt}, please"', "chat")),
    ],
)
def test_an_axis_is_cut_at_its_commas_outside_brackets_and_quotes(text: str, values: tuple[str, ...]) -> None:
    assert read_axis(text).values == values


def test_every_combination_is_a_run_once_for_each_seed() -> None:
    cells = grid("privacy.epsilon=1,none", "lora.r=4,8", seeds=2)
    assert [cell.name for cell in cells] == [
        f"epsilon-{epsilon}_r-{r}_seed-{seed}" for seed in (0, 1) for epsilon in ("1", "none") for r in ("4", "8")
    ]
    for cell in cells:
        choices = dict(cell.choices)
        config = cell.config
        assert (config.run.seed, config.simulation.seed) == (cell.seed, cell.seed)
        assert config.lora.r == int(choices["lora.r"])
        private = choices["privacy.epsilon"] != "none"
        assert config.privacy.mechanism == ("dp-sgd" if private else "none")
        assert not private or config.privacy.epsilon == 1


def test_an_epsilon_brings_its_mechanism_where_the_file_has_none() -> None:
    (cell,) = grid("privacy.epsilon=2", tables={**TABLES, "privacy": {"mechanism": "none"}})
    assert (cell.config.privacy.mechanism, cell.config.privacy.epsilon) == ("dp-sgd", 2)


def test_without_privacy_the_default_recipe_gives_way_as_it_does_in_a_comparison() -> None:
    (cell,) = grid("privacy.epsilon=none")
    base = validate(RunConfig, TABLES, "")
    assert cell.config.phases == base.without_privacy().phases != base.phases


def test_an_algorithm_is_set_in_every_phase_that_trains_lora_and_in_no_other() -> None:
    for key in ("server.algorithm", "phase.algorithm"):
        (cell,) = grid(f"{key}=fedsvd", tables=WRITTEN)
        assert cell.name == "algorithm-fedsvd_seed-0"
        assert [phase.algorithm for phase in cell.config.phases] == ["ffa", "fedsvd"]


def test_a_phase_is_changed_by_name_and_all_of_them_without_one() -> None:
    (one,) = grid("phase.lora.rounds=7", tables=WRITTEN)
    (every,) = grid("phase.rounds=7", tables=WRITTEN)
    assert [phase.rounds for phase in one.config.phases] == [3, 7]
    assert [phase.rounds for phase in every.config.phases] == [7, 7]
    (first,) = grid("phase.0.rounds=7", tables=WRITTEN)
    assert [phase.rounds for phase in first.config.phases] == [7, 2]
    with pytest.raises(ConfigError, match=r"phase.2.rounds: there is no such phase \(known: head, lora\)"):
        grid("phase.2.rounds=7", tables=WRITTEN)
    (batch,) = grid("phase.lora.batch_size=4", tables=WRITTEN)
    changed = batch.config.phases[1]
    assert (changed.batch_size, changed.sample_rate) == (4, None)


def test_a_change_applies_to_whichever_default_recipe_the_model_asks_for() -> None:
    (cell,) = grid("server.algorithm=fedsvd", "privacy.epsilon=none")
    assert cell.config.phase == ()
    for feature_map in ("none", "held-out-texts"):
        decided = cell.config.model_copy(
            update={"task": cell.config.task.model_copy(update={"feature_map": feature_map})}
        )
        usual = default_phases(decided.task, decided.privacy)
        assert decided.phases == (usual[0], usual[1].model_copy(update={"algorithm": "fedsvd"}))


def test_settings_of_phases_may_be_the_same_in_all_cells() -> None:
    (cell,) = grid(settings=("phase.lora.rounds=9", "lora.r=2"), tables=WRITTEN)
    assert cell.config.lora.r == 2 and cell.config.phases[1].rounds == 9


def test_cells_share_a_model_and_its_data_unless_a_setting_touches_either() -> None:
    cells = grid("privacy.epsilon=1,8", "server.algorithm=ffa,fedsvd", "phase.lora.rounds=2,3", tables=WRITTEN, seeds=2)
    assert len({cell.resident for cell in cells}) == 1
    for over in ("evaluation.selection=best,auto", "evaluation.patience=1,2", "evaluation.every=1,2"):
        assert len({cell.resident for cell in grid(over, tables=WRITTEN)}) == 1, over
    for over in ("lora.r=4,8", "task.max_length=32,64", "privacy.epsilon=8,none", "evaluation.limit=5,6"):
        assert len({cell.resident for cell in grid(over, tables=WRITTEN)}) == 2, over
    dealt = {**WRITTEN, "data": {"sites": 4}}
    assert len({cell.resident for cell in grid(tables=dealt, seeds=2)}) == 2


def test_names_tell_axes_apart_and_hold_nothing_that_a_path_cannot() -> None:
    (cell,) = grid("phase.head.rounds=1", "phase.lora.rounds=2", "model.name=../x y/z", tables=WRITTEN)
    assert cell.name.startswith("head.rounds-1_lora.rounds-2_name-..-x-y-z-")
    assert "/" not in cell.name and " " not in cell.name


REFUSED = [
    (["privacy.epsilom=1,2"], "privacy.epsilom: unknown setting (did you mean 'epsilon'?)"),
    (["phase.lora.round=1,2"], "unknown setting (did you mean 'rounds'?)"),
    (["phase.lola.rounds=1,2"], "no such phase (did you mean 'lora'?)"),
    (["server.algorithm=ffa,fedsdv"], "did you mean 'fedsvd'?"),
    (["lora.r=4,many"], "lora.r = 'many'"),
    (["nothing"], "expected section.key=value,value"),
    (["lora.r="], "expected section.key=value,value"),
    (["lora.r=4,,8"], "expected section.key=value,value"),
    (["lora.r=4,4"], "lists a value twice"),
    (["privacy.epsilon=1,1.0"], "are the same run"),
    (["lora.r=4", "lora.r=8"], "is given twice"),
    (["server.algorithm=ffa", "phase.algorithm=fedsvd"], "is given twice"),
    (["run.seed=1,2"], "--seeds"),
    (["run.seed.deep=1"], "--over run.seed.deep=1"),
    (["simulation.compare=true"], "--set simulation.compare=false"),
]


@pytest.mark.parametrize(("over", "said"), REFUSED)
def test_what_does_not_fit_is_one_clear_error(over: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        grid(*over, tables={**WRITTEN, "run": {"seed": 0}})
    assert said in str(refused.value)


def test_an_algorithm_without_lora_is_refused() -> None:
    with pytest.raises(ConfigError, match="no phase trains 'lora'"):
        grid("server.algorithm=ffa,fedsvd", tables={**TABLES, "phase": [HEAD]})
