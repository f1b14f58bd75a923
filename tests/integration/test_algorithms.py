"""Every aggregation algorithm in a whole run: real sites, ledgers, noise, spilled replies and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.algorithms import LOCAL_RULES
from common.config import RunConfig
from common.errors import ConfigError
from common.sections import DataSection, LoraSection, ModelSection, PhaseSection, PrivacySection, TaskSection
from server.checkpoint import RunFolder
from server.prepare import prepare
from server.watcher import Progress, Silent
from simulations.federation import Arm, Federation

SITES = ("north", "south", "west")
HEAD = PhaseSection(name="head", rounds=3, sample_rate=1.0, train=("head",), learning_rate=2.0, server_average=0.5)
FULL = {"server_optimizer": "adam", "server_learning_rate": 0.02, "server_momentum": 0.9, "server_average": 0.5}
LOCAL = {"smoothing": 1.0, "proximal": 0.1}


def lora(algorithm: str, **settings: Any) -> PhaseSection:
    fixed = {"name": "lora", "rounds": 3, "steps": 2, "sample_rate": 0.5, "train": ("head", "lora")}
    return PhaseSection(**{**fixed, "algorithm": algorithm, **settings})


@pytest.fixture(scope="module")
def settings(tiny_bert: Path, triage_data: Path) -> Callable[..., RunConfig]:
    def of(*phases: PhaseSection, **privacy: Any) -> RunConfig:
        return RunConfig(
            model=ModelSection(name=str(tiny_bert)),
            task=TaskSection(labels=("urgent", "routine", "review"), max_length=32),
            data=DataSection(path=str(triage_data), site_column="hospital"),
            lora=LoraSection(r=4, layers=2),
            privacy=PrivacySection(**privacy),
            phase=phases,
        )

    return of


@pytest.fixture(scope="module")
def federation(settings: Callable[..., RunConfig]) -> Federation:
    return Federation(settings(HEAD))


@contextmanager
def quietly(title: str, rounds: int) -> Iterator[Progress]:
    yield Silent()


def run(federation: Federation, config: RunConfig, folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Result, and the aggregator's state at the end."""
    arm = Arm("run", folder, config, SITES)
    trained = federation.run(arm, "run", False, quietly)
    checkpoint = RunFolder(folder).latest()
    assert checkpoint is not None
    return trained.result, dict(checkpoint.aggregator)


@pytest.mark.parametrize(
    "phase",
    [
        lora("fedit"),
        lora("ffa", **{**FULL, "server_optimizer": "yogi"}),
        lora("fedsvd", **FULL),
        lora("rolora", server_momentum=0.9, server_average=0.5),
        lora("la-lora", **LOCAL),
        lora("flexlora"),
        lora("fedex"),
    ],
    ids=lambda phase: phase.algorithm,
)
def test_a_whole_run_moves_what_the_algorithm_moves_and_leaves_a_state_to_go_on_from(
    federation: Federation, settings: Callable[..., RunConfig], tmp_path: Path, phase: PhaseSection
) -> None:
    config = settings(HEAD, phase)
    result, state = run(federation, config, tmp_path / "run")
    assert [len(record.get("admitted", ())) for record in result.history] == [0, 3, 3, 3, 3, 3, 3]
    start = prepare(config, "run", federation.model, federation.evaluator).initial
    sent = {name: state[f"adapter/{name}"] for name in start}
    assert all(np.isfinite(array).all() for array in sent.values())
    rule = LOCAL_RULES[phase.algorithm]
    for group in ("A", "B"):
        names = [name for name in start if federation.model.group_of(name) == group]
        moves = group in {*rule.server_moves, *rule.trains(1), *rule.trains(2)}
        assert {bool(np.array_equal(sent[name], start[name])) for name in names} == {not moves}
    parts = {key.partition("/")[0] for key in state}
    adaptive, average = phase.server_optimizer != "sgd", bool(phase.server_average)
    assert ("second" in parts, "average" in parts) == (adaptive, average)
    assert ("velocity" in parts) == (adaptive or phase.server_momentum > 0)


def test_a_new_phase_starts_from_the_average_that_the_last_one_kept(
    federation: Federation, settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The second phase trains LoRA alone, so it carries the head it started from, calibrated, to its end."""
    only_lora = lora("ffa", train=("lora",))
    one, first = run(federation, settings(HEAD, mechanism="none"), tmp_path / "one")
    _, both = run(federation, settings(HEAD, only_lora, mechanism="none"), tmp_path / "two")
    heads = [name for name in one.adapter if ".lora_" not in name]
    kept, last, carried = (
        np.concatenate([state[f"{part}/{name}"].ravel() for name in heads])
        for state, part in ((first, "average"), (first, "adapter"), (both, "adapter"))
    )
    temperature = np.linalg.norm(kept) / np.linalg.norm(carried)
    np.testing.assert_allclose(temperature * carried, kept, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(last * np.linalg.norm(kept) / np.linalg.norm(last), kept, rtol=1e-3)


def test_phases_whose_algorithms_start_a_alike_can_be_mixed_and_others_are_refused(
    settings: Callable[..., RunConfig], federation: Federation
) -> None:
    def start(*algorithms: str) -> Any:
        phases = [lora(algorithm, name=f"{algorithm}-phase") for algorithm in algorithms]
        return prepare(settings(HEAD, *phases), "run", federation.model, federation.evaluator).initial

    orthonormal = start("ffa", "fedsvd", "rolora", "la-lora")
    for name in (name for name in orthonormal if ".lora_A." in name):
        np.testing.assert_allclose(orthonormal[name] @ orthonormal[name].T, np.eye(4), atol=1e-6)
    uniform = start("fedit", "flexlora", "fedex")
    assert any(not np.array_equal(uniform[name], orthonormal[name]) for name in uniform)
    with pytest.raises(ConfigError, match=r"'rolora' \(phase 'rolora-phase'\) and 'fedex' \(phase 'fedex-phase'\)"):
        start("rolora", "fedex")
