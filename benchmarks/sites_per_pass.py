"""Client-rounds of many sites in one forward pass beside the same client-rounds one after the other.

    OMP_NUM_THREADS=1 python benchmarks/sites_per_pass.py --data FOLDER [--cells 'top-*'] [--pairs 5]
    python benchmarks/sites_per_pass.py --device cuda --model-config FILE [--pairs 5]

Whole client-rounds of real sites, ledger and audit log included: each pair of measurements trains one round of the same
sites with the same secrets twice, one after the other and so many sites at a time, in an order that changes from pair
to pair; the ratio is taken within the pair. ``difference`` is the largest deviation of an update between the two, as a
share of the update's largest entry. Cells are merged into results/sites_per_pass.json, so it can be run in parts.

On the CPU, in seconds of one core: MiniLM, rank 8, rows of medquad_qtype dealt out to 16 sites of 60 rows (the head's
and the cached prefix's features of them all are computed before), both in the physical batches that a simulation has by
default. ``head`` trains on pooled features, ``top`` adapts the top 2 of 6 layers from the cached frozen prefix on,
``all`` adapts all layers from the token ids on.

With ``--model-config``: a decoder of random weights in bf16, of whatever size the config of transformers says, on texts
of random tokens; one after the other in physical batches of the expected batch rounded up to a multiple of 8, together
in ``--rows`` rows. bf16 rounds differently at another shape, so there the difference is no measure of correctness.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment
from transformers import AutoConfig, AutoModelForCausalLM

from client.audit_log import AuditLog
from client.policy import policy_for
from client.privacy.ledger import Ledger
from client.privacy.row_independence import Probed
from client.site import Resources, Site
from common.adapted import AdaptedModel
from common.attention import always_mask
from common.config import RunConfig
from common.data.load import encode_all, load_rows
from common.data.split import count, dealt
from common.examples import Examples
from common.messages import DescribeRequest, Release, TrainReply
from common.model import BaseModel, Placement
from common.plan import Plan, plan_of
from common.requests import RoundRequest
from common.sections import LoraSection, TaskSection
from common.signing import PLAN, SigningKey
from common.tasks.base import Encoded
from common.tasks.registry import task_of
from common.toml_settings import validate
from server.prepare import resident_model
from simulations.together.serving import train_sites

OUT = RESULTS / "sites_per_pass.json"
ROOT = Path(__file__).resolve().parent.parent
TOGETHER = {"cpu": (2, 4, 8, 16), "cuda": (1, 4, 16, 64)}
ROWS = 60
KEY = SigningKey.fresh()


@dataclass(frozen=True)
class Cell:
    """What is trained, in steps of how many expected examples, under which mechanism."""

    part: str
    batch: int
    mechanism: str
    steps: int = 1

    @property
    def name(self) -> str:
        """E.g. ``top-4-dp-sgd``."""
        return f"{self.part}-{self.batch}-{self.mechanism}"

    def tables(self, rounds: int) -> dict[str, Any]:
        """The settings of a run."""
        phase = {"name": self.part, "rounds": rounds, "steps": self.steps, "batch_size": self.batch}
        phase["train"] = ["head"] if self.part == "head" else ["lora"]
        phase["learning_rate"] = 0.1
        lora = {"r": 8, "layers": 2} if self.part == "top" else {"r": 8}
        privacy = {"mechanism": "none"} if self.mechanism == "none" else {"epsilon": 8.0, "noise": "fast"}
        return {"lora": lora, "phase": [phase], "privacy": privacy, "run": {"name": "benchmark"}}


PARTS = {"cpu": ("head", "top", "all"), "cuda": ("decoder",)}


@dataclass(frozen=True)
class Sites:
    """A model and the examples of each site."""

    model: AdaptedModel
    examples: Sequence[Examples]
    config: RunConfig


def classifiers(data: str, cell: Cell, rounds: int) -> Sites:
    """MiniLM on medquad_qtype, dealt out to 16 sites."""
    import tomllib

    tables = tomllib.loads((ROOT / "examples" / "medquad_qtype.toml").read_text(encoding="utf-8"))
    tables = {"task": {**tables["task"], "feature_map": "none"}, "data": {"columns": tables["data"]["columns"]}}
    config = validate(RunConfig, {**tables, **cell.tables(rounds)}, "benchmark")
    model = resident_model(config)
    config = config.model_copy(update={"task": model.task.settings})
    rows = load_rows(data, "train", model.task, config.data.columns).rows
    encoded = encode_all(rows, model.task, model.base.tokenizer, data).encoded
    parts = dealt(count(rows), max(TOGETHER["cpu"]), 0).values()
    return Sites(model, [Examples([encoded[row] for row in part[:ROWS]], model.task) for part in parts], config)


def decoders(path: str, cell: Cell, rounds: int, length: int) -> Sites:
    """A random decoder on random texts of up to ``length`` tokens."""
    task = task_of(TaskSection(name="causal-lm", max_length=length))
    settings = AutoConfig.from_pretrained(path)
    placement = Placement.choose("cuda", "bfloat16")
    with torch.device(placement.device):
        network = AutoModelForCausalLM.from_config(settings, dtype=placement.dtype).eval()
    network.config.use_cache = False
    always_mask(network)
    network.requires_grad_(False)
    base = BaseModel(network, SimpleNamespace(pad_token_id=0), "0" * 64, placement, "model")  # type: ignore[arg-type]
    config = validate(RunConfig, {"task": {"name": "causal-lm"}, **cell.tables(rounds)}, "benchmark")
    model = AdaptedModel(base, task, LoraSection(r=8))
    config = config.model_copy(update={"task": task.settings, "lora": model.lora})
    generator = np.random.default_rng(0)
    vocabulary = int(network.config.vocab_size)

    def text() -> Encoded:
        ids = generator.integers(3, vocabulary, int(generator.integers(length // 4, length + 1)))
        return Encoded(ids.astype(np.int32), np.where(np.arange(len(ids)) < len(ids) // 2, -100, ids).astype(np.int64))

    sites = max(TOGETHER["cuda"])
    return Sites(model, [Examples([text() for _ in range(1000)], task) for _ in range(sites)], config)


class Arm:
    """The sites of one way of training them, with ledgers of their own."""

    def __init__(self, given: Sites, plan: Plan, rows: int, folder: Path, stack: ExitStack) -> None:
        self.sites = []
        probed = Probed()
        for number, examples in enumerate(given.examples):
            ledger = Ledger(folder / str(number), durable=False)
            stack.callback(ledger.close)
            site = Site(
                f"site-{number}",
                policy_for(plan, len(examples), KEY.public),
                ledger,
                AuditLog(folder / str(number) / "audit.jsonl", durable=False, site="site", key=SigningKey.fresh()),
                Resources(lambda plan: given.model, lambda plan, model, own=examples: own, rows, probed=probed),  # type: ignore[misc]
                plan.code_digest,
                fixed_seed=0,
            )
            signature = KEY.sign(PLAN, plan.digest().encode())
            site.describe(DescribeRequest(plan.run_id, plan.canonical(), plan.code_digest, signature, ""))
            self.sites.append(site)

    def timed(self, request: RoundRequest, sites: int, together: int) -> tuple[float, list[TrainReply]]:
        """Seconds, and the replies of the first so many sites."""
        asked = [(site, request.to({})) for site in self.sites[:sites]]
        _wait()
        started = _clock()
        if together == 1:
            replies = [site.train(one) for site, one in asked]
        else:
            replies = []
            for first in range(0, len(asked), together):
                for reply in train_sites(asked[first : first + together]):
                    if isinstance(reply, Exception):
                        raise reply
                    replies.append(reply)
        _wait()
        return _clock() - started, replies


def _clock() -> float:
    """Wall time of a GPU; on the CPU the process's own, which other processes disturb less."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(given: Sites, cell: Cell, device: str, pairs: int, rows: tuple[int, int]) -> dict[str, Any]:
    """Ratios (one after the other / together) for each number of sites per pass."""
    plan = plan_of(given.config, "benchmark", given.model.base.digest, given.model.spec.digest(), "0" * 64)
    adapter = given.model.initial_state(plan.seed, True)
    generator = np.random.default_rng(0)
    if cell.part != "head":
        for name, array in adapter.items():
            if given.model.group_of(name) == "B":
                adapter[name] = (0.02 * generator.standard_normal(array.shape)).astype(np.float32)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        alone = Arm(given, plan, rows[0], Path(folder) / "alone", stack)
        both = Arm(given, plan, rows[1], Path(folder) / "together", stack)
        round = 0
        for pair in range(pairs + 1):
            for together in TOGETHER[device]:
                round += 1
                request = RoundRequest.of(plan, given.model, round, adapter)
                sites = len(given.examples) if device == "cpu" else together
                arms = [(alone, 1), (both, together)]
                done = {arm: arm.timed(request, sites, each) for arm, each in arms[:: 1 if pair % 2 else -1]}
                if pair:  # the first warms up, and fills the caches
                    entry = found.setdefault(
                        str(together), {"ratio": [], "alone": [], "together": [], "difference": []}
                    )
                    entry["ratio"].append(done[alone][0] / done[both][0])
                    entry["alone"].append(done[alone][0] / sites)
                    entry["together"].append(done[both][0] / sites)
                    entry["difference"].append(difference(done[alone][1], done[both][1]))
    return {
        together: {
            "ratio": _spread(entry["ratio"]),
            "seconds_per_client_round_alone": _spread(entry["alone"]),
            "seconds_per_client_round_together": _spread(entry["together"]),
            "difference": float(f"{max(entry['difference']):.2g}"),
        }
        for together, entry in found.items()
    }


def difference(expected: Sequence[TrainReply], found: Sequence[TrainReply]) -> float:
    """Largest deviation of any update, relative to its largest entry."""
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, Release) and isinstance(other, Release), (one, other)
        for name, array in one.update.items():
            scale = float(np.abs(array).max()) or 1.0
            worst = max(worst, float(np.abs(array - other.update[name]).max()) / scale)
    return worst


def _spread(values: Sequence[float]) -> dict[str, float]:
    digits = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**{key: float(f"{value:.4g}") for key, value in digits.items()}, "n": len(values)}


def main() -> None:
    """Runs the chosen cells and merges them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the medquad_qtype data set")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model-config", help="a config.json of transformers, or a folder with one")
    parser.add_argument("--length", type=int, default=128, help="longest text of the decoder, in tokens")
    parser.add_argument("--rows", type=int, default=64, help="rows of a shared pass of the decoder")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cells", default="*")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    cells = [Cell(part, batch, how) for part in PARTS[device] for batch in (4, 16) for how in ("none", "dp-sgd")]
    for cell in (one for one in cells if fnmatch(one.name, arguments.cells)):
        rounds = (arguments.pairs + 1) * len(TOGETHER[device])
        if device == "cpu":
            given = classifiers(arguments.data, cell, rounds)
            usual = given.model.base.placement.physical_batch(given.model.task.settings.max_length)
            rows = (usual, usual)
        else:
            given = decoders(arguments.model_config, cell, rounds, arguments.length)
            rows = (-(-cell.batch // 8) * 8, arguments.rows)
        found = measure(given, cell, device, arguments.pairs, rows)
        print(cell.name, json.dumps(found, indent=2))
        results = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        where = environment()
        where["command"] = where["command"].replace(str(arguments.data), "medquad_qtype")
        results.setdefault("cells", {})[cell.name] = {"environment": where, "rows": rows, "sites_per_pass": found}
        OUT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
