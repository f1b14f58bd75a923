"""A federation in which some sites do not send what they have trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import RunFailed
from common.messages import (
    DescribeRequest,
    Release,
    SiteDescription,
    SiteService,
    TrainReply,
    TrainRequest,
    Unavailable,
)
from common.plan import Plan
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.watcher import Silent
from simulations.federation import Arm, Federation
from simulations.workers import Workers

Altered = Callable[[Release], TrainReply]


class Hostile:
    """A real site whose releases are altered on their way out."""

    def __init__(self, site: SiteService, alter: Altered) -> None:
        self.site, self.alter = site, alter

    def describe(self, request: DescribeRequest) -> SiteDescription:
        return self.site.describe(request)

    def train(self, request: TrainRequest) -> TrainReply:
        reply = self.site.train(request)
        return self.alter(reply) if isinstance(reply, Release) else reply


class Besieged(Federation):
    """A federation some of whose sites are hostile."""

    hostile: Mapping[str, Altered] = {}

    @contextmanager
    def sites(
        self, arm: Arm, plan: Plan, coordinator: str, workers: Workers | None = None
    ) -> Iterator[Mapping[str, SiteService]]:
        with super().sites(arm, plan, coordinator, workers) as sites:
            yield {
                name: Hostile(site, self.hostile[name]) if name in self.hostile else site
                for name, site in sites.items()
            }


def settings(tiny_bert: Path, triage_data: Path, cohort: float = 1.0, **phase: Any) -> RunConfig:
    head = {"name": "head", "rounds": 2, "sample_rate": 1.0, "train": ["head"], "learning_rate": 1.0}
    tables = {
        "model": {"name": str(tiny_bert)},
        "task": {"labels": ["urgent", "routine", "review"], "max_length": 32},
        "data": {"path": str(triage_data), "sites": 5},
        "lora": {"layers": 1},
        "server": {"cohort": cohort},
        "phase": [{**head, **phase}],
    }
    return validate(RunConfig, tables, "test")


@pytest.fixture(scope="module")
def besieged(tiny_bert: Path, triage_data: Path) -> Besieged:
    """Five sites of fifteen or sixteen rows: s1 to s5."""
    return Besieged(settings(tiny_bert, triage_data))


@pytest.fixture
def run(
    besieged: Besieged, tmp_path: Path, tiny_bert: Path, triage_data: Path
) -> Callable[..., tuple[dict[str, Any], ...]]:
    """Runs the federation with these hostile sites and returns its rounds."""

    def once(hostile: Mapping[str, Altered], resume: bool = False, **phase: Any) -> tuple[dict[str, Any], ...]:
        besieged.hostile = hostile
        arm = Arm("hostile", tmp_path / "run", settings(tiny_bert, triage_data, **phase), tuple(besieged.parts))
        return besieged.run(arm, "run-1", resume, lambda title, rounds: nullcontext(Silent())).result.history[1:]

    return once


def scaled(factor: float) -> Altered:
    return lambda reply: replace(
        reply, update={name: (factor * array).astype(np.float32) for name, array in reply.update.items()}
    )


def test_honest_sites_are_all_admitted(besieged: Besieged, run: Callable[..., tuple[dict[str, Any], ...]]) -> None:
    for record in run({}):
        assert record["admitted"] == sorted(besieged.parts) and record["rejected"] == {}


def test_what_no_honest_site_sends_is_rejected_by_name_and_the_round_goes_on(
    besieged: Besieged, run: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    first, second, third, fourth, fifth = sorted(besieged.parts)
    seen: list[Release] = []

    def remembered(reply: Release) -> Release:
        seen.append(reply)
        return reply

    def copied(reply: Release) -> Release:
        return replace(reply, update=seen[-1].update)

    def earlier(reply: Release) -> Release:
        return replace(reply, round=reply.round + 1)

    hostile = {
        first: remembered,
        second: scaled(20.0),
        third: copied,
        fourth: earlier,
        fifth: lambda reply: replace(reply, run_id="run-2"),
    }
    for record in run(hostile):
        assert record["admitted"] == [first]
        assert record["rejected"] == {second: "oversize", third: "duplicate", fourth: "stale", fifth: "foreign"}


def test_a_hostile_update_that_is_admitted_wins_the_mean_and_no_robust_rule(
    besieged: Besieged, tmp_path: Path, tiny_bert: Path, triage_data: Path
) -> None:
    """Without clipping an update of thirty times the usual length is admitted: where the global adapter goes."""

    def adapter(combine: str, hostile: Mapping[str, Altered]) -> np.ndarray:
        besieged.hostile = hostile
        config = settings(tiny_bert, triage_data, rounds=1, combine=combine).without_privacy()
        folder = tmp_path / f"{combine}-{len(hostile)}"
        arm = Arm("hostile", folder, config, tuple(besieged.parts))
        (record,) = besieged.run(arm, "run-1", False, lambda title, rounds: nullcontext(Silent())).result.history[1:]
        assert len(record["admitted"]) == 5
        latest = RunFolder(folder).latest()
        assert latest is not None
        return np.concatenate([latest.aggregator[name].ravel() for name in sorted(latest.aggregator)])

    attack = {min(besieged.parts): scaled(-30.0)}
    moved = {
        combine: float(np.linalg.norm(adapter(combine, attack) - adapter(combine, {})))
        for combine in ("mean", "median", "trimmed-mean", "multi-krum")
    }
    assert max(moved[combine] for combine in moved if combine != "mean") < 0.15 * moved["mean"]


def test_too_few_replies_for_a_robust_rule_stop_the_run_and_once_mended_it_loses_nothing(
    besieged: Besieged, tmp_path: Path, run: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    first, *others = sorted(besieged.parts)
    krum = {"combine": "multi-krum", "hostile_sites": 1}
    message = r"round 1: phase\.head\.hostile_sites = 1: .* replies of 5 sites .* there are 4; .*node-error"
    with pytest.raises(RunFailed, match=message):
        run({first: lambda reply: Unavailable()}, **krum)
    assert RunFolder(tmp_path / "run").replies(1) == set(others)
    asked: list[tuple[str, int]] = []

    def noted(reply: Release) -> Release:
        asked.append((reply.site, reply.round))
        return reply

    rounds = run(dict.fromkeys(besieged.parts, noted), resume=True, **krum)
    assert [record["admitted"] for record in rounds] == [[first, *others]] * 2
    assert sorted(asked) == sorted([(first, 1), *((site, 2) for site in besieged.parts)])


def test_no_hostile_site_stops_a_run_by_sending_what_is_sure_to_be_rejected(
    besieged: Besieged, run: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    """Five sites, one of them hostile and told: multi-krum needs five replies, or three once the one is found."""
    first, *others = sorted(besieged.parts)
    for record in run({first: scaled(30.0)}, combine="multi-krum", hostile_sites=1):
        assert record["rejected"] == {first: "oversize"} and record["admitted"] == others


def test_with_too_few_sites_for_a_robust_rule_no_site_spends_anything(
    besieged: Besieged, run: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    asked: list[str] = []
    with pytest.raises(RunFailed, match=r"multi-krum.* replies of 7 sites .* there are 5; bring more sites back"):
        run(
            dict.fromkeys(besieged.parts, lambda reply: asked.append(reply.site)), combine="multi-krum", hostile_sites=2
        )
    assert asked == []


@pytest.mark.parametrize(("rule", "least"), [("trimmed-mean", 3), ("median", 1)])
def test_a_cohort_is_large_enough_for_the_rule(
    run: Callable[..., tuple[dict[str, Any], ...]], rule: str, least: int
) -> None:
    assert [len(record["cohort"]) for record in run({}, cohort=0.2, combine=rule)] == [least, least]
