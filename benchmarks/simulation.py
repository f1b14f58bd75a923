"""What a simulation costs beyond the arithmetic, what it saves, and how it grows with cores and sites.

    OMP_NUM_THREADS=1 python benchmarks/simulation.py --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/simulation.py --data FOLDER --stages overhead little --physical-batch 2

FOLDER holds the data set medquad_qtype: nine natural sites, MiniLM, adapters of rank 8. Rows are written to
results/simulation.jsonl as they come; what is there is not measured again.

=============  ======================================================================================================
``overhead``   8 steps × batch 16 in all six layers: core-seconds of a round over those of a bare loop
``little``     1 step × batch 2: core and wall milliseconds per client-round beyond the bare loop
``prefix``     adapters in the top two layers and the frozen-prefix cache, over the bare loop with all six adapted
``cores``      seconds of a round with two workers, over those with one; nine sites, and eighteen of equal size
``start``      seconds from the loaded model to the first training message, with an empty cache and a filled one
``sites``      10, 1,000 and 10,000 sites, at most 100 in a round: seconds to the first round, memory, sites made
=============  ======================================================================================================

The bare loop has nothing around it: torch alone without privacy, torch and Opacus's hooks and optimiser with DP. It
runs right after each site's round of the real thing, in the same process, on the same examples, and ratios are taken
site by site, of process time. It is there twice: ``same`` runs the very batches of the site (of one shape, filled up
with dummy rows), and shows what the system around the arithmetic costs; ``plain`` runs all examples of a step in one
batch as long as its longest, as most people would write it, and shows in addition what batches of one shape cost.
Making its batches is not charged to it. What the server does in a round is charged to the real thing.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer

from client.privacy.sampling import RoundSecret, poisson_sample
from common.adapted import INPUT, AdaptedModel
from common.config import RunConfig
from common.examples import Batch, Examples
from common.messages import DescribeRequest, SiteDescription, SiteService, TrainReply, TrainRequest
from common.plan import Plan
from common.toml_settings import apply_overrides, read_toml, validate
from server.prepare import resident_model
from server.rounds import Silent
from simulations.federation import Arm, Federation
from simulations.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
ROWS = RESULTS / "simulation.jsonl"
STAGES = ("overhead", "little", "prefix", "cores", "start", "sites")
WORK, LITTLE = (8, 16), (1, 2)
"""(steps, batch) of a site in a round."""
CROWDS = (10, 1000, 10_000)
COHORT = 100
Row = dict[str, Any]


def configured(data: str, work: tuple[int, int], rounds: int, *settings: str, layers: int | None = None) -> RunConfig:
    """The example's settings with one phase of this work."""
    tables = read_toml(ROOT / "examples" / "medquad_qtype.toml")
    tables = apply_overrides(tables, [f"data.path={data}", "evaluation.limit=16", "lora.r=8", *settings])
    tables["lora"].pop("layers", None)
    if layers is not None:
        tables["lora"]["layers"] = layers
    steps, batch = work
    phase = {"name": "lora", "rounds": rounds, "steps": steps, "batch_size": batch, "train": ["head", "lora"]}
    tables["phase"] = [phase]
    return validate(RunConfig, tables, "benchmark")


# ---- the bare loop ----


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


# ---- interleaved with the real thing ----


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
            with watch.on(loop):
                bare(self.other, batches, self.config)
        self.pairs.append({"real": real, **watch.process, "same wall": watch.wall.get("same", 0.0)})


class Server(Silent):
    """Process and wall seconds of each round beside the sites' own and the evaluation."""

    def __init__(self, federation: Interleaved) -> None:
        self.federation = federation
        self.rounds: list[tuple[float, float]] = []
        self._evaluation = Stopwatch()
        evaluate = federation.evaluator.evaluate

        def timed(*arguments: Any, **named: Any) -> dict[str, float]:
            with self._evaluation.on("evaluate"):
                return evaluate(*arguments, **named)

        federation.evaluator.evaluate = timed  # type: ignore[method-assign]
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
            "sites": _spread([pair["real"] / pair[loop] for pair in federation.pairs]),
            "rounds": _spread([all_[0] / one for all_, one in zip(server.rounds, bare_seconds, strict=True)]),
            "extra_core_ms_per_client_round": _spread(
                [1e3 * (all_[0] - one) / sites for all_, one in zip(server.rounds, bare_seconds, strict=True)]
            ),
        }
    if "same" in loops:
        walls = [sum(pair["same wall"] for pair in one) for one in _chunks(federation.pairs, sites)]
        row["extra_wall_ms_per_client_round"] = _spread(
            [1e3 * (all_[1] - one) / sites for all_, one in zip(server.rounds, walls, strict=True)]
        )
    return row


def _chunks(pairs: Sequence[dict[str, float]], size: int) -> list[Sequence[dict[str, float]]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


# ---- stages ----


def overhead(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All layers, 8 × 16."""
    for mechanism in ("none", "dp-sgd"):
        settings = [f"privacy.mechanism={mechanism}", f"simulation.physical_batch={arguments.physical_batch}"]
        config = configured(arguments.data, WORK, arguments.rounds + 1, *settings)
        yield f"{mechanism}-rows{arguments.physical_batch}", lambda config=config: measured(config, ("same", "plain"))  # type: ignore[misc]


def little(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All layers, 1 × 2."""
    for mechanism in ("none", "dp-sgd"):
        settings = [f"privacy.mechanism={mechanism}", "simulation.physical_batch=1"]
        config = configured(arguments.data, LITTLE, 5 * arguments.rounds + 1, *settings)
        yield mechanism, lambda config=config: measured(config, ("same",))  # type: ignore[misc]


def prefix(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The top two layers, against all six."""
    for mechanism in ("none", "dp-sgd"):
        settings = [f"privacy.mechanism={mechanism}", f"simulation.physical_batch={arguments.physical_batch}"]
        everywhere = configured(arguments.data, WORK, arguments.rounds + 1, *settings)
        config = configured(arguments.data, WORK, arguments.rounds + 1, *settings, layers=2)

        def run(config: RunConfig = config, everywhere: RunConfig = everywhere) -> Row:
            row = measured(config, ("same", "plain"), resident_model(everywhere))
            return {
                f"faster_than_{loop}": 1 / row[f"over_{loop}"]["rounds"]["median"] for loop in ("same", "plain")
            } | row

        yield f"{mechanism}-rows{arguments.physical_batch}", run


def cores(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """One worker and two, in turns."""
    for name, sites in (("9 natural sites", ()), ("18 equal sites", ("data.sites=18", 'data.site_column=""'))):
        yield name, lambda sites=sites: _cores(arguments, sites)  # type: ignore[misc]


def _cores(arguments: argparse.Namespace, sites: Sequence[str]) -> Row:
    work = (2, WORK[1])
    settings = ("privacy.mechanism=dp-sgd", f"simulation.physical_batch={arguments.physical_batch}", *sites)
    federation = Federation(configured(arguments.data, work, 2, *settings))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for workers in (1, 2):
            config = configured(arguments.data, work, 2, *settings, f"simulation.workers={workers}")
            with tempfile.TemporaryDirectory() as folder:
                arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
                done = federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(Silent()))
            record = done.result.history[-1]
            seconds[workers].append(record["seconds"]["exchange"] + record["seconds"]["aggregate"])
    faster = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {"seconds_of_a_round": {str(n): _spread(all_) for n, all_ in seconds.items()}, "faster": _spread(faster)}


def start(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A process of its own for each."""

    def run() -> Row:
        with tempfile.TemporaryDirectory() as cache:
            both = [_child(arguments.data, "start", cache) for _ in range(2)]
        return {"empty_cache": both[0], "filled_cache": both[1]}

    yield "medquad_qtype", run


def sites(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A process of its own for each."""
    for count in CROWDS:
        yield str(count), lambda count=count: _child(arguments.data, "crowd", str(count))  # type: ignore[misc]


def _child(*arguments: str) -> Row:
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def child(data: str, what: str, how: str) -> Row:
    """``start`` with a cache folder, or ``crowd`` with a number of sites."""
    if what == "start":
        config = configured(data, WORK, 1, f"simulation.cache={how}", layers=2)
        return _until_first_message(config)
    count = int(how)
    settings = [f"data.sites={how}", 'data.site_column=""', f"server.cohort={min(1.0, COHORT / count)}"]
    tables = configured(data, WORK, 1, *settings, layers=1).model_dump(mode="json", exclude_unset=True)
    tables["phase"] = [{"name": "lora", "rounds": 3, "sample_rate": 1.0, "train": ["head", "lora"]}]
    return _first_round(validate(RunConfig, tables, "benchmark"))


def _until_first_message(config: RunConfig) -> Row:
    """Ends the run where its first round would start."""
    model = resident_model(config)
    clock = _Rounds(time.perf_counter(), stop=True)
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(config, model)
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
        with suppress(_Started):
            federation.run(arm, "benchmark", False, lambda title, count: nullcontext(clock))
    evaluation = clock.records[0]["seconds"]["evaluate"]
    return {"seconds_to_first_message": round(clock.started - evaluation, 3), "base_evaluation_seconds": evaluation}


def _first_round(config: RunConfig) -> Row:
    model = resident_model(config)
    loaded = time.perf_counter()
    federation = Federation(config, model)
    made = time.perf_counter() - loaded
    clock = _Rounds(loaded)
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
        federation.run(arm, "benchmark", False, lambda title, count: nullcontext(clock))
        sites = [each.name for each in (arm.folder / "sites").iterdir()]
    exchange = [record["seconds"]["exchange"] / len(record["cohort"]) for record in clock.records[1:]]
    return {
        "federation_seconds": round(made, 3),
        "base_evaluation_seconds": clock.records[0]["seconds"]["evaluate"],
        "seconds_to_first_message": round(clock.started - clock.records[0]["seconds"]["evaluate"], 3),
        "seconds_per_client_round": _spread(exchange),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "sites": len(federation.parts),
        "sites_made": len(sites),
    }


class _Rounds(Silent):
    """When the base was evaluated, which is when the first round starts; and every round."""

    def __init__(self, loaded: float, stop: bool = False) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.started, self._loaded, self._stop = 0.0, loaded, stop

    def round(self, record: Mapping[str, Any]) -> None:
        """Keeps it."""
        if record["round"] == 0:
            self.started = time.perf_counter() - self._loaded
        self.records.append(record)
        if self._stop:
            raise _Started


class _Started(Exception):
    """The first round would start now."""


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


def main() -> None:
    """Measures what is missing and writes results/simulation.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the medquad_qtype data set")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after one to warm up")
    parser.add_argument("--physical-batch", type=int, default=4, help="simulation.physical_batch, where it matters")
    parser.add_argument("--out", type=Path, default=ROWS, help="where rows are written")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    if not arguments.data:
        parser.error("--data: give the folder of the medquad_qtype data set")
    arguments.data = str(Path(arguments.data).resolve())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["stage"], row["cell"]) for row in rows}
    stages = {"overhead": overhead, "little": little, "prefix": prefix, "cores": cores, "start": start, "sites": sites}
    for stage in arguments.stages:
        for cell, run in stages[stage](arguments):
            if (stage, cell) in done:
                continue
            where = environment()
            where["command"] = f"python benchmarks/simulation.py --data medquad_qtype --stages {stage}"
            row = {"stage": stage, "cell": cell, **run(), "environment": where}
            rows.append(row)
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(json.dumps({key: value for key, value in row.items() if key != "environment"}), flush=True)
    arguments.out.with_suffix(".json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
