"""Utility on the nine natural sites of medquad_qtype: every algorithm in a race, then the table of the test split.

    python benchmarks/utility.py race --data FOLDER
    python benchmarks/utility.py table --data FOLDER --algorithms ffa,fedit
    python benchmarks/utility.py beside --data FOLDER
    python benchmarks/utility.py refined --data FOLDER

``race``    every algorithm in the LoRA phase of the default recipe, with the same learning rates for each, at epsilon 3
            and one seed; judged on validation alone
``table``   the default recipe, or the algorithms named, each with the rate that won its race, or ``head``, which is
            the recipe's head alone, at epsilon 8, 3, 1 and without privacy; three seeds
``wire``    the default algorithm with bf16 and int8 both ways, at epsilon 8, one seed
``beside``  the same recipe with all rows in one place (``centralised``), and every site alone (the best on validation
            is shown); one seed
``refined`` the head's phase alone, with ``server_refinement`` and without, on all rows, 4,000 and 1,500 of them; two
            seeds

The test split is scored once per cell of all stages but ``race``, with the adapter that validation chose. Resumable: a
finished cell is a line of results/utility.jsonl and is not run again; results/utility.md is written from it.

On honesty: recipe and learning rates were chosen on the validation split, which is the server's own; in a real
federation each try would have spent its epsilon at every site, and no figure here is charged for that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, environment
from pyarrow import parquet

from common.algorithms import LOCAL_RULES
from common.config import RunConfig
from common.sections import WireSection
from common.toml_settings import apply_overrides, read_toml, validate
from server.prepare import TEST
from server.rounds import VALIDATION
from server.watcher import Silent
from simulations.federation import Arm, Federation

ROOT = Path(__file__).resolve().parent.parent
CELLS, TABLE = RESULTS / "utility.jsonl", RESULTS / "utility.md"
EPSILONS: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0)
RATES = (0.5, 4.0, 16.0)
"""Learning rates of the LoRA phase in the race."""
DEFAULT = "default"
"""In the place of an algorithm: the default recipe as it is, ``ffa`` under DP, else ``fedit`` with FedAdam."""
HEAD_ALONE = "head"
"""In the place of an algorithm: the default recipe's head on the default recipe's features, with the whole budget."""
WITHOUT_MOMENTUM = ("flexlora", "fedex")
"""They take the mean of the sites' products as it is; their LoRA phase runs without the recipe's server momentum."""
METRICS = ("accuracy", "macro_f1")
ROWS: tuple[int | None, ...] = (None, 4000, 1500)
"""Training rows of the nine sites together in the stage ``refined``."""
Cell = dict[str, Any]


def configured(
    data: str, epsilon: float | None, seed: int, algorithm: str = "", rate: float | None = None
) -> RunConfig:
    """The example's settings with the cell's privacy and seeds, and another LoRA phase where one is named.

    Without privacy that phase has 120 rounds, of which every 15th is evaluated.
    """
    privacy = ["privacy.mechanism=none", "evaluation.every=15"] if epsilon is None else [f"privacy.epsilon={epsilon}"]
    settings = [f"data.path={data}", f"run.seed={seed}", f"simulation.seed={seed}", *privacy]
    tables = apply_overrides(read_toml(ROOT / "examples" / "medquad_qtype.toml"), settings)
    config = validate(RunConfig, tables, "benchmark")
    if algorithm in ("", DEFAULT):
        return config
    if algorithm == HEAD_ALONE:
        return _head_alone(config)
    change: dict[str, Any] = {"algorithm": algorithm} | ({"learning_rate": rate} if rate else {})
    if algorithm in WITHOUT_MOMENTUM:
        change["server_momentum"] = 0.0
    phases = tuple(one.model_copy(update=change) if "lora" in one.train else one for one in config.phases)
    return config.model_copy(update={"phase": phases})


def run_cell(federation: Federation, config: RunConfig, sites: Iterable[str], test: bool = True) -> Cell:
    """One run: validation of its best round, and the test split once."""
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(sites))
        trained = federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(Silent()))
    history = trained.result.history
    best = next(one for one in history if one["round"] == trained.result.best_round)
    cell: Cell = {"best_round": trained.result.best_round, VALIDATION: _figures(best["metrics"])}
    lora = [one["metrics"] for one in history if one["phase"] == "lora" and one["metrics"]]
    if lora:
        cell["last_lora_round"] = _figures(lora[-1])
    if test:
        cell[TEST] = _figures(federation.evaluator.evaluate(trained.result.adapter, TEST))
    return {**cell, "seconds": round(sum(sum(one["seconds"].values()) for one in history), 1)}


def _figures(metrics: dict[str, float]) -> list[float]:
    return [round(metrics[name], 4) for name in METRICS]


class Federations:
    """One federation for each kind of feature map: without privacy it keeps more coordinates."""

    def __init__(self, arguments: argparse.Namespace, centralised: bool) -> None:
        self.arguments, self.centralised = arguments, centralised
        self._made: dict[bool, Federation] = {}

    def of(self, epsilon: float | None) -> Federation:
        """Loaded on first use."""
        if (epsilon is None) not in self._made:
            config = configured(self.arguments.data, epsilon, 0)
            if self.centralised:
                data = config.data.model_copy(update={"site_column": None, "sites": 1})
                config = config.model_copy(update={"data": data})
            self._made[epsilon is None] = Federation(config, cache=self.arguments.cache)
        return self._made[epsilon is None]


class Cells:
    """The finished cells, on disk."""

    def __init__(self) -> None:
        self.all: list[Cell] = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []

    def of(self, **key: Any) -> list[Cell]:
        """Those with these entries."""
        return [cell for cell in self.all if all(cell.get(name) == value for name, value in key.items())]

    def add(self, key: Cell, run: Callable[[], Cell]) -> None:
        """Runs the cell unless it is there."""
        if self.of(**key):
            return
        cell = {**key, **run()}
        self.all.append(cell)
        with CELLS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(cell) + "\n")
        print(cell, flush=True)

    def rate(self, algorithm: str) -> float | None:
        """The learning rate that won the algorithm's race, by its last LoRA round; ``None`` if it has not run."""
        ran = self.of(stage="race", algorithm=algorithm)
        return max(ran, key=lambda cell: sum(cell["last_lora_round"]))["rate"] if ran else None


# ---- the stages -----------------------------------------------------------------------------------------------------


def race(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """Validation alone."""
    federation = federations.of(3.0)
    for rate in RATES:
        for algorithm in arguments.algorithms or LOCAL_RULES:
            key = {"stage": "race", "algorithm": algorithm, "rate": rate, "epsilon": 3.0, "seed": 0}
            config = configured(arguments.data, 3.0, 0, algorithm, rate)
            cells.add(key, lambda config=config: run_cell(federation, config, federation.parts, test=False))  # type: ignore[misc]


def table(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """Three seeds at all epsilon."""
    for seed in range(arguments.seeds):
        for epsilon in EPSILONS:
            federation = federations.of(epsilon)
            for algorithm in arguments.algorithms or [DEFAULT]:
                key = {"stage": "table", "algorithm": algorithm, "epsilon": epsilon, "seed": seed}
                config = configured(arguments.data, epsilon, seed, algorithm, cells.rate(algorithm))
                cells.add(key, lambda f=federation, config=config: run_cell(f, config, f.parts))  # type: ignore[misc]


def wire(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """The default algorithm with other number formats in both directions."""
    for format in ("bf16", "int8"):
        key = {"stage": "wire", "format": format, "epsilon": 8.0, "seed": 0}
        config, federation = configured(arguments.data, 8.0, 0), federations.of(8.0)
        config = config.model_copy(update={"wire": WireSection(down=format, up=format)})  # type: ignore[arg-type]
        cells.add(key, lambda f=federation, config=config: run_cell(f, config, f.parts))  # type: ignore[misc]


def beside(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """Every site alone."""
    for epsilon in EPSILONS:
        config, federation = configured(arguments.data, epsilon, 0), federations.of(epsilon)
        for site in federation.parts:
            key = {"stage": "alone", "site": site, "epsilon": epsilon, "seed": 0}
            cells.add(key, lambda f=federation, config=config, site=site: run_cell(f, config, (site,)))  # type: ignore[misc]


def centralised(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """All rows at one site."""
    for epsilon in EPSILONS:
        key = {"stage": "centralised", "epsilon": epsilon, "seed": 0}
        config, federation = configured(arguments.data, epsilon, 0), federations.of(epsilon)
        cells.add(key, lambda f=federation, config=config: run_cell(f, config, f.parts))  # type: ignore[misc]


def refined(federations: Federations, cells: Cells, arguments: argparse.Namespace) -> None:
    """The head's phase with and without the refinement."""
    for rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            data = arguments.data if rows is None else _fewer(Path(arguments.data), Path(folder), rows)
            config = _head_alone(configured(data, 8.0, 0))
            federation = Federation(config, cache=arguments.cache if rows is None else None)
            for seed in range(2):
                for epsilon in EPSILONS[1:]:
                    for asked in (True, False):
                        key = {"stage": "refined", "rows": rows, "refined": asked, "epsilon": epsilon, "seed": seed}
                        config = _head_alone(configured(data, epsilon, seed), server_refinement=asked)
                        cells.add(key, lambda f=federation, config=config: run_cell(f, config, f.parts))  # type: ignore[misc]


def _head_alone(config: RunConfig, **change: Any) -> RunConfig:
    task = config.task.model_copy(update={"feature_map": "held-out-texts"})
    return config.model_copy(update={"task": task, "phase": (config.phases[0].model_copy(update=change),)})


def _fewer(source: Path, folder: Path, rows: int) -> str:
    """The data set with so many training rows, drawn with a fixed seed."""
    for split in ("train", "validation", "test"):
        table = parquet.read_table(source / f"{split}.parquet")
        if split == "train":
            table = table.take(np.sort(np.random.default_rng(0).permutation(len(table))[:rows]))
        parquet.write_table(table, folder / f"{split}.parquet")
    return str(folder)


# ---- the tables -----------------------------------------------------------------------------------------------------


def written(cells: Cells) -> Iterator[str]:
    """Markdown."""
    names = ["none" if epsilon is None else f"ε = {epsilon:g}" for epsilon in EPSILONS]
    yield f"| accuracy / macro-F1 on test | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells.of(stage="table")):
        of = [cells.of(stage="table", algorithm=algorithm, epsilon=epsilon) for epsilon in EPSILONS]
        name = {DEFAULT: "the default recipe", HEAD_ALONE: "its head alone"}.get(algorithm, algorithm)
        yield f"| federated, {name} | {' | '.join(map(_mean, of))} |"
    of = [cells.of(stage="centralised", epsilon=epsilon) for epsilon in EPSILONS]
    if any(of):
        yield f"| centralised | {' | '.join(map(_mean, of))} |"
    of = [cells.of(stage="alone", epsilon=epsilon) for epsilon in EPSILONS]
    if any(of):
        best = [sorted(ran, key=lambda cell: cell[VALIDATION][0])[-1:] for ran in of]
        yield f"| best single site | {' | '.join(map(_mean, best))} |"
    for format in ("bf16", "int8"):
        if ran := cells.of(stage="wire", format=format):
            both = [ran if epsilon == ran[0]["epsilon"] else [] for epsilon in EPSILONS]
            yield f"| the default recipe, {format} both ways (seed 0) | {' | '.join(map(_mean, both))} |"
    for rows in ROWS:
        for asked in (False, True):
            of = [cells.of(stage="refined", rows=rows, refined=asked, epsilon=epsilon) for epsilon in EPSILONS]
            if any(of):
                number = "all" if rows is None else f"{rows:,}"
                yield f"| head alone, {number} rows, {'' if asked else 'not '}refined | {' | '.join(map(_mean, of))} |"
    if cells.of(stage="race"):
        yield ""
        yield "| race at ε = 3, one seed, validation | " + " | ".join(f"LoRA rate {rate:g}" for rate in RATES) + " |"
        yield "|---|" + "---|" * len(RATES)
    for algorithm in dict.fromkeys(cell["algorithm"] for cell in cells.of(stage="race")):
        of = [cells.of(stage="race", algorithm=algorithm, rate=rate) for rate in RATES]
        yield f"| {algorithm} | {' | '.join(_last(ran) for ran in of)} |"


def _mean(cells: list[Cell]) -> str:
    if not cells:
        return "not run"
    columns = zip(*(cell[TEST] for cell in cells), strict=True)
    if len(cells) == 1:
        return " / ".join(f"{100 * value:.1f}" for (value,) in columns) + " (1 seed)"
    spreads = [f"{100 * statistics.mean(one):.1f} ± {100 * statistics.pstdev(one):.1f}" for one in columns]
    return " / ".join(spreads) + f" ({len(cells)} seeds)"


def _last(cells: list[Cell]) -> str:
    if not cells:
        return "not run"
    accuracy, f1 = cells[0]["last_lora_round"]
    return f"{100 * accuracy:.1f} / {100 * f1:.1f}"


STAGES: dict[str, Callable[[Federations, Cells, argparse.Namespace], None]] = {
    "race": race,
    "table": table,
    "wire": wire,
    "beside": beside,
    "centralised": centralised,
    "refined": refined,
}


def main() -> None:
    """Runs the cells that are missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="none: write the tables alone")
    parser.add_argument("--data", help="folder of the medquad_qtype data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--algorithms", type=lambda text: text.split(","), help="or all in the race, else the default recipe"
    )
    parser.add_argument("--cache", type=Path, help="folder in which frozen activations are kept for the next start")
    arguments = parser.parse_args()
    cells = Cells()
    for stage in arguments.stages:
        STAGES[stage](Federations(arguments, stage == "centralised"), cells, arguments)
    where = {
        **environment(),
        "command": "python benchmarks/utility.py race table beside centralised refined --data medquad_qtype",
    }
    text = "\n".join(written(cells)) + f"\n\nMeasured with `{json.dumps(where)}`.\n"
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
