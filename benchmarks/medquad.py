"""Utility of the default recipe on the nine natural sites of medquad_qtype: accuracy and macro-F1 on the test split.

    python benchmarks/medquad.py --data FOLDER

Each cell (privacy × seed) is one federated run of the default recipe; beside it every site alone at the same epsilon,
of which the best on validation is shown. The test split is evaluated once per cell, with the adapter chosen on
validation. Resumable: a finished cell is a line of results/medquad.jsonl and is not run again; results/medquad.md is
written from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from environment import RESULTS, environment

from common.config import RunConfig
from common.toml_settings import apply_overrides, read_toml, validate
from server.prepare import TEST
from server.rounds import Silent
from simulations.simulate import Arm, Federation

ROOT = Path(__file__).resolve().parent.parent
EPSILONS: tuple[float | None, ...] = (None, 8.0, 3.0)
CELLS = RESULTS / "medquad.jsonl"


def configured(data: str, epsilon: float | None, seed: int) -> RunConfig:
    """The example's settings with the cell's privacy and seeds."""
    tables = read_toml(ROOT / "examples" / "medquad_qtype.toml")
    privacy = "privacy.mechanism=none" if epsilon is None else f"privacy.epsilon={epsilon}"
    settings = [f"data.path={data}", f"run.seed={seed}", f"simulation.seed={seed}", privacy]
    return validate(RunConfig, apply_overrides(tables, settings), "benchmark")


def run_cell(federation: Federation, config: RunConfig, sites: Iterable[str]) -> dict[str, Any]:
    """One run; validation of its best round, and the test split once."""
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(sites))
        trained = federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(Silent()))
    best = next(one for one in trained.result.history if one["round"] == trained.result.best_round)
    test = federation.evaluator.evaluate(trained.result.adapter, TEST)
    return {
        "best_round": trained.result.best_round,
        "validation": [round(best["metrics"][name], 4) for name in ("accuracy", "macro_f1")],
        "test": [round(test[name], 4) for name in ("accuracy", "macro_f1")],
        "seconds": round(sum(sum(one["seconds"].values()) for one in trained.result.history), 1),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds, as Markdown."""
    lines = [
        "| privacy | federated: accuracy / macro-F1 | seeds | best single site (chosen on validation) | seeds |",
        "|---|---|---|---|---|",
    ]
    for epsilon in EPSILONS:
        federated = [cell for cell in cells if cell["epsilon"] == epsilon and cell["site"] is None]
        alone = []
        for seed in sorted({cell["seed"] for cell in cells}):
            ones = [c for c in cells if c["epsilon"] == epsilon and c["seed"] == seed and c["site"] is not None]
            if ones:
                alone.append(max(ones, key=lambda cell: cell["validation"][0]))
        name = "none" if epsilon is None else f"epsilon = {epsilon:g}"
        lines.append(f"| {name} | {_mean(federated)} | {len(federated)} | {_mean(alone)} | {len(alone)} |")
    return "\n".join(lines) + "\n"


def _mean(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return "not run"
    parts = []
    for index in (0, 1):
        values = [100 * cell["test"][index] for cell in cells]
        parts.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
    return " / ".join(parts)


def main() -> None:
    """Runs the cells that are missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the medquad_qtype data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alone-seeds", type=int, default=1, help="seeds of the single-site runs")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    federation = Federation(configured(arguments.data, 8.0, 0))
    wanted: list[tuple[float | None, int, str | None]] = [
        (epsilon, seed, None) for seed in range(arguments.seeds) for epsilon in EPSILONS
    ]
    wanted += [
        (epsilon, seed, site)
        for seed in range(arguments.alone_seeds)
        for epsilon in EPSILONS
        for site in federation.parts
    ]
    done = {(cell["epsilon"], cell["seed"], cell["site"]) for cell in cells}
    for epsilon, seed, site in wanted:
        if (epsilon, seed, site) in done:
            continue
        config = configured(arguments.data, epsilon, seed)
        result = run_cell(federation, config, federation.parts if site is None else (site,))
        cell = {"epsilon": epsilon, "seed": seed, "site": site, **result}
        cells.append(cell)
        with CELLS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(cell) + "\n")
        print(cell, flush=True)
    where = environment()
    where["command"] = "python benchmarks/medquad.py --data medquad_qtype"
    text = f"{table(cells)}\nMeasured with `{json.dumps(where)}`.\n"
    (RESULTS / "medquad.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
