"""A training loop with nothing around it, and what the real thing costs beyond it.

The bare loop is torch alone without privacy, torch and Opacus's hooks and optimiser with DP. It runs right after each
site's round of the real thing, in the same process, on the same examples, and ratios are taken site by site, of process
time. It is there twice: ``same`` runs the very batches of the site (of one shape, filled up with dummy rows) and has
the base's frozen linear maps done as the site has (common/frozen_linear.py), and so shows what the system around the
arithmetic costs; ``plain`` runs all examples of a step in one batch as long as its longest, all with torch's own linear
maps, as most people would write it, and shows in addition what batches of one shape cost and other maps save. Making
its batches is not charged to it. What the server does in a round is charged to the real thing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn

from client.privacy.sampling import RoundSecret, poisson_sample
from common.adapted import AdaptedModel
from common.config import RunConfig
from common.cuts import INPUT
from common.examples import Batch, Examples
from common.frozen_linear import FrozenLinear
from common.messages import DescribeRequest, SiteDescription, SiteService, TrainReply, TrainRequest
from common.plan import Plan
from common.tasks.base import Scores
from server.watcher import Silent
from simulations.federation import Arm, Federation
from simulations.workers import Workers

Row = dict[str, Any]


def same_batches(examples: Examples, steps: Sequence[Any], rows: int, model: AdaptedModel) -> list[list[Batch]]:
    """The very batches that the site trained on."""
    return [list(examples.batches(chosen, rows, model, INPUT)) for chosen in steps]


def plain_batches(examples: Examples, steps: Sequence[Any], model: AdaptedModel) -> list[list[Batch]]:
    """One batch for each step, as long as its longest example."""
    return [[_plain(examples, chosen, model)] if len(chosen) else [] for chosen in steps]


def _plain(examples: Examples, chosen: Any, model: AdaptedModel) -> Batch:
    items = [examples.encoded[index] for index in chosen]
    length = max(len(item.ids) for item in items)
    ids = np.full((len(items), length), model.base.tokenizer.pad_token_id or 0, np.int64)
    mask = np.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)], mask[row, : len(item.ids)] = item.ids, 1
    targets = model.task.collate([item.target for item in items], length)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), targets, torch.ones(len(items)), chosen)


def bare(model: AdaptedModel, steps: Sequence[Sequence[Batch]], config: RunConfig) -> None:
    """The steps, and nothing else."""
    private = config.privacy.mechanism != "none"
    with model.training(model.trained_in(config.phases[0], 1)) as parameters:
        optimizer: Any = torch.optim.SGD(list(parameters.values()), lr=1e-6)
        hooks = None
        if private:
            hooks = GradSampleHooks(model.peft, batch_first=True, loss_reduction="sum", strict=False)
            optimizer = DPOptimizer(
                optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=None, loss_reduction="sum"
            )
        for batches in steps:
            for batch in batches:
                losses = model.task.per_example_loss(model.top(batch.inputs, batch.mask, INPUT), batch.targets)
                (losses * batch.weights).sum().backward()
                if private:
                    optimizer.clip_and_accumulate()
                    for parameter in parameters.values():
                        parameter.grad_sample = None  # type: ignore[attr-defined]
            if private and batches:
                optimizer.add_noise()
                optimizer.original_optimizer.step()
            elif not private:
                optimizer.step()
            optimizer.zero_grad()
        if hooks is not None:
            hooks.cleanup()


@contextmanager
def torchs_own(model: AdaptedModel) -> Iterator[None]:
    """With torch's linear maps throughout."""
    maps = [module for module in model.peft.modules() if type(module) is FrozenLinear]
    for module in maps:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in maps:
            module.__class__ = FrozenLinear


class Stopwatch:
    """Process and wall seconds, by name."""

    def __init__(self) -> None:
        self.process: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Adds what happens meanwhile."""
        process, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.process[name] = self.process.get(name, 0.0) + time.process_time() - process
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall


class Timed:
    """A site after whose training the bare loops run."""

    def __init__(self, site: SiteService, after: Callable[[TrainRequest, float], None]) -> None:
        self.site, self.after = site, after

    def describe(self, request: DescribeRequest) -> SiteDescription:
        """As the site does."""
        return self.site.describe(request)

    def train(self, request: TrainRequest) -> TrainReply:
        """As the site does, and then the bare loops."""
        watch = Stopwatch()
        with watch.on("real"):
            reply = self.site.train(request)
        self.after(request, watch.process["real"])
        return reply


class Interleaved(Federation):
    """After each site's round from the second on: the same steps in bare loops.

    Args:
        loops: the bare loops' names, among ``same`` and ``plain``.
        other: the model of the bare loops, where it is not the real one.
    """

    def __init__(self, config: RunConfig, loops: Sequence[str], other: AdaptedModel | None = None) -> None:
        super().__init__(config)
        self.loops, self.other = loops, other or self.model
        self.watch, self.pairs = Stopwatch(), list[dict[str, float]]()

    @contextmanager
    def sites(
        self, arm: Arm, plan: Plan, coordinator: str, workers: Workers | None = None
    ) -> Iterator[Mapping[str, SiteService]]:
        """All of them, timed."""
        with super().sites(arm, plan, coordinator, workers) as sites:
            yield {name: Timed(sites[name], self._after(name)) for name in sites}

    def _after(self, name: str) -> Callable[[TrainRequest, float], None]:
        def run(request: TrainRequest, real: float) -> None:
            with self.watch.on("bare loops"):
                if request.round > 1:
                    self._pair(name, request.round, real)

        return run

    def _pair(self, name: str, round: int, real: float) -> None:
        steps, batch = self.config.phases[0].steps, self.config.phases[0].batch_size
        examples, watch = self.examples[name], Stopwatch()
        assert batch is not None
        secret, rate = RoundSecret.fixed(self.config.simulation.seed, name, round), batch / self.public_size(name)
        chosen = [poisson_sample(len(examples), rate, secret, step) for step in range(steps)]
        made = {
            "same": lambda: same_batches(examples, chosen, self.config.simulation.physical_batch, self.other),
            "plain": lambda: plain_batches(examples, chosen, self.other),
        }
        for loop in self.loops:
            batches = made[loop]()
            with torchs_own(self.other) if loop == "plain" else nullcontext(), watch.on(loop):
                bare(self.other, batches, self.config)
        self.pairs.append({"real": real, **watch.process, "same wall": watch.wall.get("same", 0.0)})


class Server(Silent):
    """Process and wall seconds of each round beside the sites' own and the evaluation."""

    def __init__(self, federation: Interleaved) -> None:
        self.federation = federation
        self.rounds: list[tuple[float, float]] = []
        self._evaluation = Stopwatch()
        scores = federation.evaluator.scores

        def timed(*arguments: Any, **named: Any) -> Scores:
            with self._evaluation.on("evaluate"):
                return scores(*arguments, **named)

        federation.evaluator.scores = timed  # type: ignore[method-assign]
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        beside = (self.federation.watch, self._evaluation)
        process = time.process_time() - sum(sum(one.process.values()) for one in beside)
        return process, time.perf_counter() - sum(sum(one.wall.values()) for one in beside)

    def round(self, record: Mapping[str, Any]) -> None:
        """All of it since the last one."""
        now = self._now()
        if record["round"] > 1:
            self.rounds.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def measured(config: RunConfig, loops: Sequence[str], other: AdaptedModel | None = None) -> Row:
    """A run, and what came of each pair."""
    federation = Interleaved(config, loops, other)
    server = Server(federation)
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
        federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(server))
    sites, row = len(federation.parts), Row()
    for loop in loops:
        bare_seconds = [sum(pair[loop] for pair in one) for one in _chunks(federation.pairs, sites)]
        row[f"over_{loop}"] = {
            "sites": spread([pair["real"] / pair[loop] for pair in federation.pairs]),
            "rounds": spread([all_[0] / one for all_, one in zip(server.rounds, bare_seconds, strict=True)]),
            "extra_core_ms_per_client_round": spread(
                [1e3 * (all_[0] - one) / sites for all_, one in zip(server.rounds, bare_seconds, strict=True)]
            ),
        }
    if "same" in loops:
        walls = [sum(pair["same wall"] for pair in one) for one in _chunks(federation.pairs, sites)]
        row["extra_wall_ms_per_client_round"] = spread(
            [1e3 * (all_[1] - one) / sites for all_, one in zip(server.rounds, walls, strict=True)]
        )
    return row


def _chunks(pairs: Sequence[dict[str, float]], size: int) -> list[Sequence[dict[str, float]]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, and how many."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }
