"""Number formats, and requests that carry only what a site lacks, through whole simulated runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from stopped_runs import Stopped, StopsAfter

from client.site import Site
from common import number_formats
from common.config import RunConfig
from common.messages import Refusal, RefusalReason, Release, TrainReply, TrainRequest
from common.requests import NOTHING
from common.toml_settings import validate
from server.watcher import Silent
from simulations.simulate import simulate

LABELS = ("urgent", "routine", "review")


@pytest.fixture
def settings(tiny_bert: Path, triage_data: Path) -> dict[str, Any]:
    """Three sites: a round of the head, then B and A in turn."""
    lora = {"name": "lora", "rounds": 3, "sample_rate": 1.0, "train": ["lora"], "algorithm": "rolora"}
    return {
        "model": {"name": str(tiny_bert)},
        "task": {"name": "sequence-classification", "labels": LABELS, "max_length": 32},
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 2},
        "wire": {"down": "int8", "up": "int8"},
        "phase": [{"name": "head", "rounds": 1, "sample_rate": 1.0, "train": ["head"], "learning_rate": 1.0}, lora],
    }


def run(settings: dict[str, Any], out: Path, resume: bool = False, watcher: Silent | None = None) -> dict[str, Any]:
    @contextmanager
    def watch(title: str, rounds: int) -> Iterator[Silent]:
        yield watcher or Silent()

    return simulate(validate(RunConfig, dict(settings), "test"), out, resume, watch)


def adapter(out: Path) -> dict[str, bytes]:
    state = load_file(out / "adapter" / "adapter_model.safetensors")
    return {name: array.tobytes() for name, array in state.items()}


Answer = Callable[[Site, TrainRequest], TrainReply]
honest: Answer = Site.train


def answering(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> Counter[tuple[str, int]]:
    """Sites answer like this; how often each was asked for each round."""
    asked: Counter[tuple[str, int]] = Counter()

    def train(site: Site, request: TrainRequest) -> TrainReply:
        asked[site.name, request.round] += 1
        return answer(site, request)

    monkeypatch.setattr(Site, "train", train)
    return asked


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_run_in_a_smaller_format_comes_to_the_same_result_again_for_fewer_bytes(
    settings: dict[str, Any], tmp_path: Path, form: str
) -> None:
    smaller = {**settings, "wire": {"down": form, "up": form}}
    one, again = (run(smaller, tmp_path / name) for name in ("one", "again"))
    assert adapter(tmp_path / "one") == adapter(tmp_path / "again")
    assert (one["bytes_down"], one["bytes_up"]) == (again["bytes_down"], again["bytes_up"])
    whole = run({**settings, "wire": {}}, tmp_path / "whole")
    assert one["bytes_up"] < whole["bytes_up"] and one["bytes_down"] < whole["bytes_down"]
    assert all(record["admitted"] == ["north", "south", "west"] for record in one["rounds"][1:])
    assert abs(one["validation"]["loss"] - whole["validation"]["loss"]) < 0.02
    assert json.loads((tmp_path / "one" / "summary.json").read_text()) == json.loads(json.dumps(one))


def test_a_site_that_has_lost_what_it_held_is_asked_again_at_once_in_full_and_nothing_else_changes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings, tmp_path / "whole")

    def forgetful(site: Site, request: TrainRequest) -> TrainReply:
        if (site.name, request.round) == ("south", 3):
            site._held.clear()
        return honest(site, request)

    asked = answering(monkeypatch, forgetful)
    forgot = run(settings, tmp_path / "forgot")
    assert {one: count for one, count in asked.items() if count > 1} == {("south", 3): 2}
    assert adapter(tmp_path / "forgot") == adapter(tmp_path / "whole")
    assert [record["admitted"] for record in forgot["rounds"][1:]] == [["north", "south", "west"]] * 4
    more = [b["bytes_down"] - a["bytes_down"] for a, b in zip(whole["rounds"][1:], forgot["rounds"][1:], strict=True)]
    assert more[2] > 0 and [more[0], more[1], more[3]] == [0, 0, 0]
    assert [record["refused"] for record in forgot["rounds"][1:]] == [{}] * 4


def test_a_site_that_always_lacks_something_is_asked_twice_and_no_more(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(site: Site, request: TrainRequest) -> TrainReply:
        return Refusal("south", RefusalReason.ADAPTER_MISSING) if site.name == "south" else honest(site, request)

    asked = answering(monkeypatch, lacking)
    summary = run(settings, tmp_path / "out")
    assert {count for (site, _), count in asked.items() if site == "south"} == {2}
    assert [record["refused"] for record in summary["rounds"][1:]] == [{"south": "adapter-missing"}] * 4
    assert [record["admitted"] for record in summary["rounds"][1:]] == [["north", "west"]] * 4


def _whole_numbers(site: Site, reply: Release) -> Release:
    return replace(reply, update={name: np.zeros(3, np.float32) for name in reply.update})


def _in_fp32(site: Site, reply: Release) -> Release:
    names = number_formats.names_of(reply.update)
    return replace(reply, update={name: reply.update[name].astype(np.float32) for name in names})


def _hostile_scales(value: float) -> Callable[[Site, Release], Release]:
    return lambda site, reply: replace(
        reply,
        update={n: np.full_like(a, value) if n.startswith("scale/") else a for n, a in reply.update.items()},
    )


@pytest.mark.parametrize(
    "bend",
    [_whole_numbers, _in_fp32, *map(_hostile_scales, (np.nan, np.inf, -1.0, 3e38))],
    ids=["shapes", "fp32", "nan", "inf", "negative", "huge"],
)
def test_a_release_in_another_format_or_with_hostile_scales_is_rejected_by_name_and_the_round_goes_on(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bend: Callable[[Site, Release], Release],
) -> None:
    def bent(site: Site, request: TrainRequest) -> TrainReply:
        reply = honest(site, request)
        return bend(site, reply) if isinstance(reply, Release) and site.name == "south" else reply

    answering(monkeypatch, bent)
    settings["phase"] = settings["phase"][:1]
    summary = run(settings, tmp_path / "out")
    (record,) = summary["rounds"][1:]
    assert record["rejected"] == {"south": "layout"} and record["admitted"] == ["north", "west"]
    assert np.isfinite(record["metrics"]["loss"])


class StopsWithin(Silent):
    """Stops a run after the second reply of a round."""

    def reply(self, round: int, site: str, outcome: str) -> None:
        if (round, site) == (3, "south"):
            raise Stopped


def test_a_resumed_run_asks_everybody_in_full_once_and_comes_to_the_same_result(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(settings, tmp_path / "out", watcher=StopsAfter(2))
    asked = answering(monkeypatch, honest)
    resumed = run(settings, tmp_path / "out", resume=True)
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")
    assert set(asked.values()) == {1}, "nobody lacks anything, since nobody is taken to hold anything"
    more = [b["bytes_down"] - a["bytes_down"] for a, b in zip(whole["rounds"][1:], resumed["rounds"][1:], strict=True)]
    assert more[2] > 0 and [more[0], more[1], more[3]] == [0, 0, 0]
    assert [record["bytes_up"] for record in resumed["rounds"][1:]] == [
        record["bytes_up"] for record in whole["rounds"][1:]
    ]


def test_a_round_resumed_between_two_replies_counts_the_stored_ones_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(settings, tmp_path / "out", watcher=StopsWithin())
    asked = answering(monkeypatch, honest)
    resumed = run(settings, tmp_path / "out", resume=True)
    assert set(asked) == {("west", 3), *((site, 4) for site in ("north", "south", "west"))}
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")
    assert resumed["rounds"][3]["bytes_up"] == pytest.approx(whole["rounds"][3]["bytes_up"], abs=10)


def test_sites_hold_nothing_that_the_seed_gives_or_the_round_has_changed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, set[str]] = {}

    def watched(site: Site, request: TrainRequest) -> TrainReply:
        reply = honest(site, request)
        (one,) = site._held.values() or (NOTHING,)
        held[request.round] = {"head" if ".lora_" not in name else name[-8] for name in one.tensors}
        return reply

    answering(monkeypatch, watched)
    run(settings, tmp_path / "out")
    assert held == {1: set(), 2: {"head"}, 3: {"head", "B"}, 4: {"head", "A"}}
