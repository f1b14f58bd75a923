"""What the federation costs beyond the arithmetic: wall time per client-round against a bare loop, and memory by sites.

    python benchmarks/simulation.py --data FOLDER

The bare loop runs the same physical batches through the same model with nothing around it: torch alone without privacy,
torch and Opacus's hooks and optimiser with DP. It is timed right after each round of the real thing (same process,
interleaved), and the ratio is taken round by round. Memory is the peak resident size of a process of its own for 10,
100 and 1000 sites that share the same 3,000 rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
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
from common.examples import Batch
from common.toml_settings import apply_overrides, read_toml, validate
from server.rounds import Silent
from simulations.simulate import Arm, Federation

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, ROUNDS = 2, 16, 3


def overhead(data: str, mechanism: str) -> dict[str, Any]:
    """Ratio of (round / bare loop) wall time, one value per round."""
    config = _config(data, mechanism)
    federation = Federation(config)
    ratios: list[float] = []
    seconds: list[float] = []

    class Interleaved(Silent):
        """After each round of the real thing: the same steps in a bare loop."""

        def round(self, record: Any) -> None:
            if record["round"] == 0:
                return
            real = record["seconds"]["exchange"] + record["seconds"]["aggregate"]
            started = time.perf_counter()
            for site in federation.parts:
                batches = _batches(federation, site, int(record["round"]), config)
                _bare(federation.model, batches, config, mechanism)
            bare = time.perf_counter() - started
            if record["round"] > 1:  # the first round warms up
                ratios.append(real / bare)
                seconds.append((real - bare) / len(federation.parts))

    with tempfile.TemporaryDirectory() as folder:
        arm = Arm("benchmark", Path(folder) / "run", config, tuple(federation.parts))
        federation.run(arm, "benchmark", False, lambda title, rounds: nullcontext(Interleaved()))
    return {"mechanism": mechanism, "ratios": _spread(ratios), "extra_seconds_per_client_round": _spread(seconds)}


def _config(data: str, mechanism: str) -> RunConfig:
    tables = read_toml(ROOT / "examples" / "medquad_qtype.toml")
    tables = apply_overrides(
        tables, [f"data.path={data}", f"privacy.mechanism={mechanism}", "evaluation.limit=16", "lora.r=8"]
    )
    del tables["lora"]["layers"]
    tables["phase"] = [
        {"name": "lora", "rounds": ROUNDS + 1, "steps": STEPS, "batch_size": BATCH, "train": ["head", "lora"]}
    ]
    return validate(RunConfig, tables, "benchmark")


def _batches(federation: Federation, site: str, round: int, config: RunConfig) -> list[list[Batch]]:
    """The very batches the site trained on in this round."""
    secret = RoundSecret.fixed(config.simulation.seed, site, round)
    examples = federation.examples[site]
    rate = BATCH / federation.public_size(site)
    chosen = (poisson_sample(len(examples), rate, secret, step) for step in range(STEPS))
    rows = config.simulation.physical_batch
    return [list(examples.batches(indices, rows, federation.model, INPUT)) for indices in chosen]


def _bare(model: AdaptedModel, steps: Sequence[Sequence[Batch]], config: RunConfig, mechanism: str) -> None:
    phase = config.phases[0]
    with model.training(model.trained_in(phase, 1)) as parameters:
        optimizer: Any = torch.optim.SGD(list(parameters.values()), lr=1e-6)
        hooks = None
        if mechanism != "none":
            hooks = GradSampleHooks(model.peft, batch_first=True, loss_reduction="sum", strict=False)
            optimizer = DPOptimizer(
                optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=None, loss_reduction="sum"
            )
        for batches in steps:
            for batch in batches:
                losses = model.task.per_example_loss(model.top(batch.inputs, batch.mask, INPUT), batch.targets)
                (losses * batch.weights).sum().backward()
                if hooks is not None:
                    optimizer.clip_and_accumulate()
                    for parameter in parameters.values():
                        parameter.grad_sample = None  # type: ignore[attr-defined]
            if hooks is not None and batches:
                optimizer.add_noise()
                optimizer.original_optimizer.step()
            elif hooks is None:
                optimizer.step()
            optimizer.zero_grad()
        if hooks is not None:
            hooks.cleanup()


def memory(sites: int) -> dict[str, Any]:
    """Peak resident memory and seconds of a run with so many sites, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(Path(folder) / "data")
        settings = [
            f"data.path={folder}/data",
            f"data.sites={sites}",
            'task.labels=["a", "b"]',
            'phase=[{name="head", rounds=2, sample_rate=1.0, train=["head"]}]',
        ]
        command = [sys.executable, str(ROOT / "consilium.py"), "simulate", "--json", "--config", f"{folder}/run.toml"]
        Path(folder, "run.toml").write_text('[task]\nname = "sequence-classification"\n', encoding="utf-8")
        for setting in settings:
            command += ["--set", setting]
        started = time.perf_counter()
        done = subprocess.run([*command, "--out", f"{folder}/out"], capture_output=True, text=True, check=True)
        summary = json.loads(done.stdout)
        return {
            "sites": sites,
            "peak_memory_mib": summary["peak_memory_mib"],
            "wall_seconds": round(time.perf_counter() - started, 1),
            "seconds_per_client_round": round(summary["rounds"][-1]["seconds"]["exchange"] / sites, 5),
        }


def _write_rows(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 3000), ("validation", 50)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            for _ in range(count):
                words = generator.choice(["fever", "cough", "pain", "rash", "ankle", "heart"], 6)
                writer.writerow([" ".join(words), "ab"[int(generator.integers(2))]])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


def main() -> None:
    """Runs everything and writes results/simulation.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the medquad_qtype data set")
    arguments = parser.parse_args()
    results = {
        "environment": environment(),
        "setting": {"sites": 9, "steps": STEPS, "batch": BATCH, "rank": 8, "model": "MiniLM", "adapters": "all layers"},
        "overhead": [overhead(arguments.data, mechanism) for mechanism in ("none", "dp-sgd")],
        "memory": [memory(sites) for sites in (10, 100, 1000)],
    }
    results["environment"]["command"] = "python benchmarks/simulation.py --data medquad_qtype"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "simulation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
