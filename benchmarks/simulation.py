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
``sites``      1,000 and 10,000 sites, at most 100 in a round: seconds to the first round, memory, sites made
=============  ======================================================================================================

The bare loop is the same arithmetic with no federation around it: ``bare_loop.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from bare_loop import Row, measured, spread
from environment import RESULTS, environment

from common.config import RunConfig
from common.toml_settings import apply_overrides, read_toml, validate
from server.prepare import resident_model
from server.watcher import Silent
from simulations.federation import Arm, Federation

ROOT = Path(__file__).resolve().parent.parent
ROWS = RESULTS / "simulation.jsonl"
STAGES = ("overhead", "little", "prefix", "cores", "start", "sites")
WORK, LITTLE = (8, 16), (1, 2)
"""(steps, batch) of a site in a round."""
CROWDS = (1000, 10_000)
COHORT = 100
STARTS = 5


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
    return {"seconds_of_a_round": {str(n): spread(all_) for n, all_ in seconds.items()}, "faster": spread(faster)}


def start(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A process of its own for each start, and a cache of its own for each pair."""

    def run() -> Row:
        found: dict[str, list[Row]] = {"empty_cache": [], "filled_cache": []}
        for _ in range(STARTS):
            with tempfile.TemporaryDirectory() as cache:
                for rows in found.values():
                    rows.append(_child(arguments.data, "start", cache))
        return {name: {what: spread([row[what] for row in rows]) for what in rows[0]} for name, rows in found.items()}

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
        "seconds_per_client_round": spread(exchange),
        "peak_memory_mib": _peak_memory() // 1024,
        "sites": len(federation.parts),
        "sites_made": len(sites),
    }


def _peak_memory() -> int:
    """KiB that this process has held at most; ``ru_maxrss`` would start at what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


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
