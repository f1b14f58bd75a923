"""Two site agents that allow LoRA ranks 8 and 4, in processes of their own behind unix sockets, in one federation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents import SiteAgent, agent_tables

from common.adapter import lora_pairs
from common.config import RunConfig
from common.messages import (
    DescribeRequest,
    Release,
    SiteDescription,
    SiteService,
    TrainReply,
    TrainRequest,
    WireTensors,
)
from common.rpc import AgentAddress, RemoteSite
from common.signing import SigningKey
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.prepare import prepare
from server.rounds import Coordinator, Result
from server.watcher import Silent
from simulations.federation import Arm, Federation
from simulations.grid import InProcessGrid

RANKS = {"north": 8, "south": 4}
"""The largest rank that each site allows."""
ROUNDS = 2
PATIENCE = 60.0


def settings(model: Path, data: Path, algorithm: str = "flexlora", **simulation: Any) -> RunConfig:
    """A plan of rank 8 that trains LoRA and the head in the top two layers, with noise.

    ``workers``: sites in this process are worked on by one thread of torch, as at an agent. The number of threads
    decides how sums are rounded.
    """
    phase = {"name": "lora", "rounds": ROUNDS, "steps": 2, "sample_rate": 0.5, "train": ["lora", "head"]}
    tables = {
        "model": {"name": str(model)},
        "task": {"labels": ["urgent", "routine", "review"], "max_length": 32},
        "data": {"path": str(data), "site_column": "hospital"},
        "lora": {"r": 8, "alpha": 12.0, "layers": 2},
        "server": {"round_timeout": PATIENCE},
        "simulation": {"seed": 0, "physical_batch": 8, "device": "cpu", "workers": 1, **simulation},
        "phase": [{**phase, "algorithm": algorithm, "learning_rate": 0.5}],
    }
    return validate(RunConfig, tables, "test")


@dataclass
class Overheard:
    """A site behind its agent, and which ranks were in the tensors of each training request and release."""

    agent: SiteService
    exchanged: dict[int, tuple[set[int], set[int]]] = field(default_factory=dict)
    """Round → ranks asked with, ranks released."""

    def describe(self, request: DescribeRequest) -> SiteDescription:
        return self.agent.describe(request)

    def train(self, request: TrainRequest) -> TrainReply:
        reply = self.agent.train(request)
        assert isinstance(reply, Release), reply
        self.exchanged[request.round] = ranks_of(request.adapter), ranks_of(reply.update)
        return reply


def ranks_of(tensors: WireTensors) -> set[int]:
    """Rows of each A and columns of each B; empty without any."""
    of_a = {array.shape[0] for name, array in tensors.items() if ".lora_A." in name}
    return of_a | {array.shape[1] for name, array in tensors.items() if ".lora_B." in name}


@dataclass(frozen=True)
class Remote:
    """The coordinator, and the agents it reaches without a SuperLink between them."""

    here: Federation
    """The coordinator's own model and held-out data; and the same sites in this process."""
    key: SigningKey
    agents: Mapping[str, SiteAgent]

    def run(self, config: RunConfig, folder: Path) -> tuple[Result, dict[str, Overheard]]:
        """A run of the server's round loop, whose id is the folder's name; its result, and what each site was told."""
        prepared = prepare(config, folder.name, self.here.model, self.here.evaluator)
        with ExitStack() as stack:
            sites = {
                name: Overheard(stack.enter_context(RemoteSite(AgentAddress(agent.tables["site"]["listen"]))))
                for name, agent in self.agents.items()
            }
            grid = InProcessGrid(sites, workers=stack.enter_context(ThreadPoolExecutor(len(sites))))
            coordinator = Coordinator(
                grid, config, prepared.plan, self.here.model, self.here.evaluator, RunFolder(folder), self.key
            )
            return coordinator.run(prepared.initial), sites


@pytest.fixture(scope="module")
def remote(tiny_bert: Path, triage_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """Both agents, with the rows that the sites of those names have in a simulation."""
    key = SigningKey.fresh()
    with (triage_data / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    agents = {}
    for name, rank in RANKS.items():
        folder = tmp_path_factory.mktemp(name)
        tables = agent_tables(name, f"unix:{folder}/agent.sock", tiny_bert, key.public, policy={"max_rank": rank})
        agents[name] = SiteAgent(name, folder, tables, [row for row in rows if row["hospital"] == name])
    try:
        with ThreadPoolExecutor(1 + len(agents)) as pool:
            started = [pool.submit(agent.start) for agent in agents.values()]
            here = Federation(settings(tiny_bert, triage_data, ranks=tuple(RANKS.values())))
            for one in started:
                one.result()
        yield Remote(here, key, agents)
    finally:
        for agent in agents.values():
            agent.kill()


def state_of(folder: Path) -> dict[str, np.ndarray]:
    """The aggregator's state after the last round."""
    checkpoint = RunFolder(folder).latest()
    assert checkpoint is not None and checkpoint.round == ROUNDS
    return dict(checkpoint.aggregator)


def test_agents_of_rank_8_and_4_train_one_adapter_of_rank_8_as_the_same_sites_in_this_process(
    remote: Remote, tiny_bert: Path, triage_data: Path, tmp_path: Path
) -> None:
    config = remote.here.config
    result, sites = remote.run(config, tmp_path / "remote" / "run")
    for name, rank in RANKS.items():
        # Before round 1 a site makes the adapter of the public seed: nothing goes down.
        assert sites[name].exchanged == {1: (set(), {rank}), 2: ({rank}, {rank})}
        assert remote.agents[name].charges()["run"] == [1, 2]
    assert {site: one.max_rank for site, one in result.participants.items()} == RANKS
    assert [record["admitted"] for record in result.history[1:]] == [list(RANKS)] * ROUNDS

    state = state_of(tmp_path / "remote" / "run")
    pairs = lora_pairs(state)
    assert len(pairs) == 2 * 2  # layers × (query, value)
    assert ranks_of(state) == {8}
    assert [np.linalg.matrix_rank(state[b].astype(np.float64) @ state[a]) for b, a in pairs] == [8] * 4

    arm = Arm("here", tmp_path / "here" / "run", config, tuple(RANKS))
    here = remote.here.run(arm, "run", False, lambda title, rounds: nullcontext(Silent())).result
    expected = state_of(arm.folder)
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name], expected[name]) for name in state)
    for record, other in zip(result.history[1:], here.history[1:], strict=True):
        assert (record["bytes_down"], record["bytes_up"]) == (other["bytes_down"], other["bytes_up"])


def test_a_site_of_rank_4_refuses_a_plan_of_rank_8_whose_algorithm_needs_one_rank(
    remote: Remote, tiny_bert: Path, triage_data: Path, tmp_path: Path
) -> None:
    result, sites = remote.run(settings(tiny_bert, triage_data, algorithm="ffa"), tmp_path / "fixed")
    assert result.absent == {"south": "policy"}
    assert {site: list(one.exchanged) for site, one in sites.items()} == {"north": [1, 2], "south": []}
    assert {name: agent.charges()["fixed"] for name, agent in remote.agents.items()} == {"north": [1, 2], "south": []}
