"""What protecting a larger unit costs: the default recipe on medquad_qtype by example and by subject, at equal epsilon.

    python benchmarks/privacy_unit.py --data FOLDER

The column ``focus`` names what a text is about; a site has 1 to 15 texts of each on average. (``doc_id`` names a
document, of which the training split has one text each: there both units are the same.) Each cell is one federated run
on the nine natural sites; the test split is evaluated once per cell, with the adapter chosen on validation. Resumable
as ``utility.py`` is; results/privacy_unit.md is written from results/privacy_unit.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np
from environment import RESULTS, environment
from utility import configured, run_cell

from common.config import RunConfig
from common.data.load import load_rows
from common.data.units import renumbered
from simulations.federation import Federation

CELLS = RESULTS / "privacy_unit.jsonl"
UNIT = "focus"
EPSILONS = (8.0, 3.0)


def by_unit(config: RunConfig, unit: str | None) -> RunConfig:
    """The same settings with another privacy unit."""
    return config.model_copy(update={"data": config.data.model_copy(update={"privacy_unit": unit})})


def main() -> None:
    """Runs the cells that are missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the medquad_qtype data set")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    done = {(cell["epsilon"], cell["seed"], cell["unit"]) for cell in cells}
    config = configured(arguments.data, 8.0, 0)
    federation = Federation(config)
    loaded = load_rows(arguments.data, "train", federation.model.task, config.data.columns, unit_column=UNIT)
    assert loaded.units is not None
    units = {site: renumbered(loaded.units[indices]) for site, indices in federation.parts.items()}
    for seed in range(arguments.seeds):
        for epsilon in EPSILONS:
            for unit in (None, UNIT):
                if (epsilon, seed, unit) in done:
                    continue
                for site, examples in federation.examples.items():  # the frozen activations stay
                    examples.units = units[site] if unit else None
                cell = {"epsilon": epsilon, "seed": seed, "unit": unit}
                cell |= run_cell(federation, by_unit(configured(arguments.data, epsilon, seed), unit), federation.parts)
                cells.append(cell)
                with CELLS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(cell) + "\n")
                print(cell, flush=True)
    lines = ["| epsilon | unit | units per site | test accuracy / macro-F1 | seeds |", "|---|---|---|---|---|"]
    for epsilon in EPSILONS:
        for unit in (None, UNIT):
            tests = [cell["test"] for cell in cells if (cell["epsilon"], cell["unit"]) == (epsilon, unit)]
            sizes = [len(np.unique(each)) if unit else len(each) for each in units.values()]
            means = " / ".join(f"{100 * statistics.mean(test[index] for test in tests):.1f}" for index in (0, 1))
            name = unit or "example"
            lines.append(f"| {epsilon:g} | {name} | {min(sizes)} to {max(sizes)} | {means} | {len(tests)} |")
    where = environment()
    where["command"] = "python benchmarks/privacy_unit.py --data medquad_qtype"
    text = "\n".join(lines) + f"\n\nMeasured with `{json.dumps(where)}`.\n"
    (RESULTS / "privacy_unit.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
