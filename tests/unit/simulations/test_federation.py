"""Simulations of very many sites: what is never sampled is never made, and workers change nothing but the time."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from stopped_runs import Stopped, StopsAfter

from client.privacy.ledger import Ledger
from client.site import Site
from common.adapted import AdaptedModel
from common.config import RunConfig
from common.cuts import INPUT
from common.errors import ConfigError
from common.toml_settings import validate
from server.rounds import Coordinator
from server.watcher import Silent
from simulations.federation import Arm, Federation, Trained
from simulations.simulate import simulate
from simulations.sites import MadeWhenAsked, OpenLedgers

SITES, COHORT = 10_000, 10
LABELS = ("urgent", "routine", "review")


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows for each of 10,000 sites, and a few to validate on."""
    folder = tmp_path_factory.mktemp("data")
    words = ("cough", "fever", "pain", "rash", "wound", "bleeding", "throat")
    draw = np.random.default_rng(0)
    for split, count in (("train", 2 * SITES), ("validation", 30)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([" ".join(draw.choice(words, 3)), LABELS[label]] for label in draw.integers(0, 3, count))
    return folder


def settings(model: Path, folder: Path, **sections: Any) -> RunConfig:
    tables: dict[str, Any] = {
        "model": {"name": str(model)},
        "task": {"labels": LABELS, "max_length": 16},
        "data": {"path": str(folder), "sites": SITES},
        "lora": {"layers": 1},
        "server": {"cohort": COHORT / SITES},
        "phase": [{"name": "lora", "rounds": 3, "sample_rate": 1.0, "train": ["head", "lora"], "learning_rate": 1.0}],
    }
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section} if isinstance(section, dict) else section
    return validate(RunConfig, tables, "test")


def run(federation: Federation, config: RunConfig, out: Path, resume: bool = False, last: int | None = None) -> Trained:
    arm = Arm("test", out, config, tuple(federation.parts))
    return federation.run(arm, "run-1", resume, lambda title, rounds: nullcontext(StopsAfter(last)))


def told(trained: Trained) -> list[dict[str, Any]]:
    """All rounds, without their times."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in trained.result.history]


def sampled(trained: Trained) -> set[str]:
    return {site for record in trained.result.history[1:] for site in record["cohort"]}


@pytest.fixture(scope="module")
def crowd(tiny_bert: Path, many_rows: Path) -> Federation:
    return Federation(settings(tiny_bert, many_rows))


def test_of_ten_thousand_sites_only_those_sampled_are_made(tiny_bert: Path, many_rows: Path, tmp_path: Path) -> None:
    federation = Federation(settings(tiny_bert, many_rows))
    assert len(federation.parts) == SITES and federation.examples.made == {}
    trained = run(federation, federation.config, tmp_path / "run")
    asked = sampled(trained)
    assert 2 * COHORT < len(asked) <= 3 * COHORT
    assert set(federation.examples.made) == asked
    assert set(os.listdir(tmp_path / "run" / "sites")) == asked == set(trained.result.participants)
    assert all(record["admitted"] == record["cohort"] for record in trained.result.history[1:])
    assert set(json.loads((tmp_path / "run" / "sites.json").read_text())) == asked


def test_a_run_of_ten_thousand_sites_resumes_with_the_same_result(crowd: Federation, tmp_path: Path) -> None:
    whole = run(crowd, crowd.config, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(crowd, crowd.config, tmp_path / "stopped", last=2)
    resumed = run(crowd, crowd.config, tmp_path / "stopped", resume=True)
    for record, other in zip(told(whole), told(resumed), strict=True):
        for name in ("cohort", "admitted", "metrics", "bytes_up"):
            assert record.get(name) == other.get(name)
    assert set(resumed.result.participants) == set(whole.result.participants) == sampled(whole)
    assert all(
        np.array_equal(whole.result.adapter[name], resumed.result.adapter[name]) for name in whole.result.adapter
    )


def test_too_few_sites_are_named_before_any_is_asked(crowd: Federation, tmp_path: Path) -> None:
    config = crowd.config.model_copy(update={"server": crowd.config.server.model_copy(update={"min_sites": SITES + 1})})
    with pytest.raises(Exception, match=f"server.min_sites = {SITES + 1}: there are only {SITES} sites"):
        run(crowd, config, tmp_path / "run")
    assert not (tmp_path / "run" / "sites").exists()


@pytest.mark.parametrize("name", ["min_sites", "min_replies"])
def test_a_simulation_of_fewer_sites_than_it_needs_is_refused_before_it_starts(
    crowd: Federation, tmp_path: Path, name: str
) -> None:
    server = crowd.config.server.model_copy(update={name: SITES + 1})
    config = crowd.config.model_copy(update={"server": server})
    with pytest.raises(ConfigError) as caught:
        simulate(config, tmp_path / "run", False, lambda title, rounds: nullcontext(Silent()), crowd)
    assert str(caught.value) == (
        f"server.{name} = {SITES + 1}: there are only {SITES} simulated sites; lower it, or deal the rows out to more "
        "sites (data.sites, data.site_column)"
    )
    assert not (tmp_path / "run").exists()


def test_the_cohort_is_asked_alike_whether_all_sites_are_described_first_or_none(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_bert, triage_data, data={"sites": 5}, server={"cohort": 0.6})
    federation = Federation(config)
    lazily = run(federation, config, tmp_path / "lazily")
    always = Coordinator.__init__

    def eagerly(self: Any, *arguments: Any, **named: Any) -> None:
        always(self, *arguments, **{**named, "ask_when_sampled": False})

    monkeypatch.setattr(Coordinator, "__init__", eagerly)
    assert told(run(federation, config, tmp_path / "eagerly")) == told(lazily)


@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_any_number_of_workers_gives_the_same_run(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, mechanism: str
) -> None:
    runs = []
    for workers in (1, 2, 3):
        config = settings(
            tiny_bert,
            triage_data,
            data={"sites": 5},
            server={"cohort": 1.0},
            privacy={"mechanism": mechanism},
            simulation={"workers": workers},
        )
        runs.append(run(Federation(config), config, tmp_path / str(workers)))
    for other in runs[1:]:
        assert told(other) == told(runs[0])
        adapters = [each.result.adapter for each in (runs[0], other)]
        assert all(adapters[0][name].tobytes() == adapters[1][name].tobytes() for name in adapters[0])


def test_one_worker_gives_what_none_gives_on_one_thread(tiny_bert: Path, triage_data: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = []
        for workers in ({}, {"workers": 1}):
            config = settings(
                tiny_bert, triage_data, data={"sites": 3}, server={"cohort": 1.0}, simulation=dict(workers)
            )
            runs.append(told(run(Federation(config), config, tmp_path / str(len(workers)))))
        assert runs[0] == runs[1]
    finally:
        torch.set_num_threads(threads)


def test_a_site_that_fails_ends_the_run_and_its_workers(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_bert, triage_data, data={"sites": 5}, server={"cohort": 1.0}, simulation={"workers": 2})
    monkeypatch.setattr(Site, "train", lambda self, request: (_ for _ in ()).throw(ZeroDivisionError(self.name)))
    with pytest.raises(ZeroDivisionError, match="site-1"):
        run(Federation(config), config, tmp_path / "run")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("site_")]


def test_dropout_is_refused_with_several_workers(tiny_bert: Path, triage_data: Path, tmp_path: Path) -> None:
    config = settings(
        tiny_bert,
        triage_data,
        data={"sites": 3},
        lora={"dropout": 0.1},
        privacy={"mechanism": "none"},
        server={"cohort": 1.0},
        simulation={"workers": 2},
    )
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.1"):
        run(Federation(config), config, tmp_path / "run")


def test_a_replica_shares_the_base_and_nothing_that_is_trained(
    adapted_model: Callable[..., AdaptedModel], tiny_bert: Path
) -> None:
    model = adapted_model(tiny_bert, lora={"layers": 1})
    twin = model.replica()
    assert twin.original is model and twin.replica().original is model
    own = {id(model._parameters[name]) for name in model.spec.names}
    for one, other in zip(model.peft.parameters(), twin.peft.parameters(), strict=True):
        assert (one.data_ptr() == other.data_ptr()) == (id(one) not in own)
    ids = torch.arange(1, 9).unsqueeze(0)
    before = model.top(ids, torch.ones_like(ids), INPUT)
    twin.load({name: array + 1 for name, array in twin.state().items()})
    assert model.top(ids, torch.ones_like(ids), INPUT).equal(before)
    assert not twin.top(ids, torch.ones_like(ids), INPUT).equal(before)


def test_with_a_cache_a_second_run_finds_its_tokens_and_activations(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        tiny_bert,
        triage_data,
        data={"sites": 3},
        server={"cohort": 1.0},
        simulation={"cache": str(tmp_path / "cache")},
    )

    @contextmanager
    def quietly(title: str, rounds: int) -> Iterator[Silent]:
        yield Silent()

    simulate(config, tmp_path / "first", False, quietly)
    monkeypatch.setattr(AdaptedModel, "features", lambda *_: pytest.fail("computed again"))
    simulate(config, tmp_path / "second", False, quietly)
    kept = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second")]
    assert all(np.array_equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_a_value_is_made_once_and_only_if_it_is_asked_for() -> None:
    asked: list[str] = []
    lazily = MadeWhenAsked(["a", "b"], lambda name: asked.append(name) or name.upper())  # type: ignore[func-returns-value]
    assert list(lazily) == ["a", "b"] and len(lazily) == 2 and "b" in lazily and asked == []
    assert [lazily["b"], lazily["b"]] == ["B", "B"] and asked == ["b"] == list(lazily.made)
    with pytest.raises(KeyError):
        lazily["c"]


def test_only_the_ledgers_used_last_stay_open_and_the_others_open_again(tmp_path: Path) -> None:
    ledgers = {name: Ledger(tmp_path / name, durable=False) for name in "abc"}
    kept = OpenLedgers(most=2)

    def open_ones() -> set[str]:
        found = set()
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                found |= {path.parent.name} if path.is_relative_to(tmp_path) else set()
        return found

    for name in "abcab":
        kept.used(name, ledgers[name])
        assert ledgers[name].sequence == 0
    assert open_ones() == {"a", "b"}
    kept.close()
    assert open_ones() == set()
