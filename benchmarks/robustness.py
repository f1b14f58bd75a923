"""Global accuracy against hostile sites: none to four of the nine sites of medquad_qtype, six attacks, four rules.

    python benchmarks/robustness.py --data FOLDER

Each cell is one federated run through the real coordinator, the real sites and the real admission, at epsilon = 8: a
head on frozen features, 30 rounds of one full-batch step, from the label names (the first phase of the default recipe,
shortened, with all of the budget, and fast noise). Hostile sites are real sites whose releases are altered on their way
out; they know the plan, the bound on their own updates, and (``collude``) every honest update of the round before it is
sent.

===========  ===========================================================================================================
attack       what a hostile site sends in place of its honest, noised update u
===========  ===========================================================================================================
flip         -u
scale        -10·u; longer than the bound and rejected, so its rows show what is left without the hostile sites
longest      -u, scaled to 99 % of the bound on its norm: the worst that admission lets pass in that direction
random       Gaussian noise of 99 % of the bound
labels       an honest update, learnt from the site's own texts with label k turned into 10 - k
collude      mean - 1.5 · standard deviation of all nine honest updates, entry by entry ("a little is enough", Baruch
             et al. 2019, arXiv 1902.06156, §3), each with noise of its own of 1 % of it, so that no two are equal
===========  ===========================================================================================================

Hostile are the first f sites of a fixed order: the sites' names as shuffled by ``random.Random(0)``; the table says
which and how large they are. trimmed-mean and multi-krum are told f (at least 1; multi-krum at most 3, since nine sites
withstand no more). The mean weighs by public size, as is the default; the other rules count every site once.

Resumable: a finished cell is a line of results/robustness.jsonl and is not run again; results/robustness.md is written
from it. Figures are of the test split: of the model after the last round, and of the one that the run keeps, which is
the best on the server's own validation data.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, environment

from common.adapter import AdapterSpec
from common.config import RunConfig
from common.examples import Examples
from common.messages import DescribeRequest, Release, SiteDescription, SiteService, Tensors, TrainReply, TrainRequest
from common.plan import Plan
from common.tasks.base import Encoded
from common.toml_settings import apply_overrides, read_toml, validate
from server.checkpoint import RunFolder
from server.norm_bound import largest_norm, norm
from server.prepare import TEST
from server.watcher import Silent
from simulations.federation import Arm, Federation
from simulations.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
CELLS = RESULTS / "robustness.jsonl"
ATTACKS = ("flip", "scale", "longest", "random", "labels", "collude")
RULES = ("mean", "median", "trimmed-mean", "multi-krum")
MOST = 4
"""Hostile sites, of nine."""
LITTLE = 1.5
"""Standard deviations that colluding sites stay away from the mean."""
HEAD = {
    "name": "head",
    "rounds": 30,
    "sample_rate": 1.0,
    "train": ["head"],
    "learning_rate": 32.0,
    "clip_norm": 0.25,
    "server_momentum": 0.8,
}


@dataclass(frozen=True, order=True)
class Cell:
    """One run."""

    hostile: int
    attack: str
    rule: str

    @property
    def told(self) -> int:
        """``phase.hostile_sites``."""
        return min(max(1, self.hostile), 3 if self.rule == "multi-krum" else MOST)


def configured(data: str, cell: Cell) -> RunConfig:
    """The example's settings with the head phase alone and the cell's rule."""
    tables = read_toml(ROOT / "examples" / "medquad_qtype.toml")
    phase = {**HEAD, "combine": cell.rule, "hostile_sites": cell.told}
    tables = apply_overrides(tables, [f"data.path={data}", "privacy.noise=fast"])
    return validate(RunConfig, {**tables, "lora": {}, "phase": [phase]}, "benchmark")


class Hostile:
    """A real site whose releases are altered on their way out."""

    def __init__(self, site: SiteService, attack: str, plan: Plan, sites: Mapping[str, SiteService]) -> None:
        self.site, self.attack, self.plan, self.sites = site, attack, plan, sites

    def describe(self, request: DescribeRequest) -> SiteDescription:
        """As the site."""
        self.description = self.site.describe(request)
        return self.description

    def train(self, request: TrainRequest) -> TrainReply:
        """What the attack makes of the site's release."""
        reply = self.site.train(request)
        assert isinstance(reply, Release)
        return replace(reply, update={name: array.astype(np.float32) for name, array in self._sent(request, reply)})

    def _sent(self, request: TrainRequest, reply: Release) -> Iterator[tuple[str, np.ndarray]]:
        draw = np.random.default_rng([reply.round, sum(reply.site.encode())])
        update = reply.update
        if self.attack == "flip":
            return ((name, -array) for name, array in update.items())
        if self.attack == "scale":
            return ((name, -10 * array) for name, array in update.items())
        if self.attack == "longest":
            return self._long({name: -array for name, array in update.items()})
        if self.attack == "random":
            return self._long({name: draw.standard_normal(array.shape, np.float32) for name, array in update.items()})
        if self.attack == "collude":
            return self._little(request, draw)
        return iter(update.items())

    def _long(self, update: Tensors) -> Iterator[tuple[str, np.ndarray]]:
        """Scaled to 99 % of what is admitted."""
        spec = AdapterSpec.of("", {name: array.shape for name, array in update.items()})
        most = largest_norm(self.plan, 1, self.description, spec, 0.0)
        return ((name, array * (0.99 * most / norm(update))) for name, array in update.items())

    def _little(self, request: TrainRequest, draw: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
        """A site that is asked again sends the same bytes, so asking the others first costs nothing."""
        honest = [site.train(request) for site in self.sites.values()]
        for name in honest[0].update:  # type: ignore[union-attr]
            values = np.stack([reply.update[name] for reply in honest])  # type: ignore[union-attr]
            deviation = values.std(axis=0)
            yield (
                name,
                values.mean(axis=0) - LITTLE * deviation + 0.01 * deviation * draw.standard_normal(deviation.shape),
            )


class Besieged(Federation):
    """The federation with the hostile sites of a cell.

    Args:
        cache: where features are kept for the next start; ``None``: nowhere.
    """

    def __init__(self, config: RunConfig, cache: Path | None) -> None:
        super().__init__(config, cache=cache)
        self.cell = Cell(0, "", "mean")

    @property
    def order(self) -> list[str]:
        """Who turns hostile first."""
        names = sorted(self.parts)
        random.Random(0).shuffle(names)
        return names

    @contextmanager
    def sites(
        self, arm: Arm, plan: Plan, coordinator: str, workers: Workers | None = None
    ) -> Iterator[Mapping[str, SiteService]]:
        bad, honest = self.order[: self.cell.hostile], dict(self.examples)
        if self.cell.attack == "labels":
            self.examples.made.update({name: flipped(honest[name], len(self.config.task.labels)) for name in bad})
        try:
            with super().sites(arm, plan, coordinator, workers) as sites:
                attacked = {name: Hostile(sites[name], self.cell.attack, plan, sites) for name in bad}
                yield {**sites, **attacked}
        finally:
            self.examples.made.update(honest)


def flipped(examples: Examples, labels: int) -> Examples:
    """The same texts, label k turned into ``labels - 1 - k``. What is cached of the texts is shared."""
    other = copy.copy(examples)
    other.encoded = [one and Encoded(one.ids, labels - 1 - one.target) for one in examples.encoded]
    return other


def run_cell(federation: Besieged, config: RunConfig, cell: Cell) -> dict[str, Any]:
    """One run; the test split with the last model and with the one that is kept."""
    federation.cell = cell
    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
        trained = federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(Silent()))
        latest = RunFolder(arm.folder).latest()
    assert latest is not None
    last = {
        name.removeprefix("adapter/"): array for name, array in latest.aggregator.items() if name.startswith("adapter/")
    }
    bad, rounds = federation.order[: cell.hostile], trained.result.history[1:]
    rejected = [site for record in rounds for site in record["rejected"]]
    return {
        "last": _figures(federation, last),
        "kept": _figures(federation, trained.result.adapter),
        "kept_round": trained.result.best_round,
        "rejected": round(sum(site in bad for site in rejected) / max(1, len(rounds) * len(bad)), 3),
        "honest_rejected": sum(site not in bad for site in rejected),
        "seconds": round(sum(sum(record["seconds"].values()) for record in trained.result.history), 1),
    }


def _figures(federation: Federation, adapter: Tensors) -> list[float]:
    found = federation.evaluator.evaluate(adapter, TEST)
    return [round(found[name], 4) for name in ("accuracy", "macro_f1")]


def tables(cells: list[dict[str, Any]], order: list[tuple[str, int]]) -> str:
    """Both models' figures, as Markdown."""
    total = sum(size for _, size in order)
    named = ", ".join(f"{name} ({size})" for name, size in order[:MOST])
    shares = ", ".join(f"{100 * sum(size for _, size in order[:f]) / total:.0f} %" for f in range(1, MOST + 1))
    lines = [f"Hostile, in this order: {named}; with one to four of them hostile, they hold {shares} of all rows.", ""]
    for key, title in (("last", "after the last round"), ("kept", "kept: the best round on validation")):
        lines += [
            f"Accuracy / macro-F1 of the model {title}",
            "",
            "| attack | hostile of 9 | hostile replies rejected | " + " | ".join(RULES) + " |",
            "|---|---|---|" + "---|" * len(RULES),
        ]
        for attack, count in [("none", 0), *itertools.product(ATTACKS, range(1, MOST + 1))]:
            row = {cell["rule"]: cell for cell in cells if (cell["attack"], cell["hostile"]) == (attack, count)}
            if row:
                figures = [_shown(row.get(rule), key) for rule in RULES]
                share = max(cell["rejected"] for cell in row.values())
                lines.append(f"| {attack} | {count} | {100 * share:.0f} % | " + " | ".join(figures) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown(cell: dict[str, Any] | None, key: str) -> str:
    return "not run" if cell is None else " / ".join(f"{100 * value:.1f}" for value in cell[key])


def main() -> None:
    """Runs the cells that are missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the medquad_qtype data set")
    parser.add_argument("--cache", type=Path, help="folder in which the features are kept for the next start")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    wanted = [Cell(0, "none", rule) for rule in RULES]
    wanted += [Cell(*each) for each in itertools.product((2, 4, 1, 3), ATTACKS, RULES)]
    done = {Cell(cell["hostile"], cell["attack"], cell["rule"]) for cell in cells}
    federation = Besieged(configured(arguments.data, wanted[0]), arguments.cache)
    order = [(name, len(federation.parts[name])) for name in federation.order]
    where = environment()
    where["command"] = "python benchmarks/robustness.py --data medquad_qtype"
    for cell in wanted:
        if cell not in done:
            found = run_cell(federation, configured(arguments.data, cell), cell)
            cells.append({**vars(cell), "told": cell.told, **found})
            with CELLS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(cells[-1]) + "\n")
            print(cells[-1], flush=True)
        text = f"{tables(cells, order)}\nMeasured with `{json.dumps(where)}`.\n"
        (RESULTS / "robustness.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
