"""What the frozen-prefix cache saves: seconds of a local training round with and without it, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/prefix_cache.py --pairs 30
    OMP_NUM_THREADS=1 python benchmarks/prefix_cache.py --pairs 30 --cells 'bert-top1*'

A cell is a model of six layers with random weights, how many top layers are adapted, and a mechanism. ``bert`` has the
shape of MiniLM, ``llama`` is a small Llama; both are classifiers. ``llama-lm`` is that Llama as a language model: its
output layer (512 words) is no layer that could be saved. In each pair every arm runs the same round through the real
trainer and mechanism, in an order drawn anew: the same Poisson samples, the same noise.

==========  ==========================================================================================================
``all``     adapters in all six layers: no prefix is constant, and six layers go forward and back
``anew``    adapters in the top layers, no cache: six layers go forward, the top ones back (below nothing is trained)
``cached``  the same from the cache on disk: the top layers go forward and back
``ready``   the same from batches that lie in memory as tensors: what no cache could beat
==========  ==========================================================================================================

``all / cached`` is held against the ratio of layers: six to the number adapted (``share_of_layers_ratio``). That ratio
leaves out what does not depend on the layers (the head, clipping per step, noise), so it is not quite the ideal.
``anew / cached`` is what the cache alone saves: forward passes, since below the adapters there is no backward pass with
or without a cache. It is held against ``anew / ready``; the quotient of the two, ``ready / cached``, is the share of
the ideal that is reached. Ratios are taken pair by pair, of wall times and of CPU times. ``fill`` is the time to
compute and store the activations, also in passes of ``anew`` over as many examples; ``found`` the time to find them
after a restart.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from environment import RESULTS, environment
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from client.privacy.mechanism import mechanism_for
from client.privacy.sampling import RoundSecret
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.cuts import Cut
from common.examples import Batch, Examples
from common.messages import PhaseStatement
from common.model import Placement, load_base
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection
from common.tasks.base import Encoded
from common.tasks.registry import task_of

OUT = RESULTS / "prefix_cache.json"
ARMS = ("all", "anew", "cached", "ready")
LAYERS, WIDTH, VOCABULARY, CLASSES = 6, 384, 512, 11
EXAMPLES, BATCH, STEPS, LENGTHS = 512, 32, 4, (33, 64)
SECRET = RoundSecret.fixed(0, "benchmark", 1)


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    top: int
    mechanism: str

    @property
    def name(self) -> str:
        """E.g. ``bert-top1-dp-sgd``."""
        return f"{self.model}-top{self.top}-{self.mechanism}"


CELLS = tuple(Cell(*each) for each in product(("bert", "llama", "llama-lm"), (1, 2), ("none", "dp-sgd")))


def write_model(kind: str, folder: Path) -> Path:
    """A model of random weights with a tokenizer that has a pad token and is not used otherwise."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    }
    network: PreTrainedModel
    if kind == "bert":
        network = BertModel(BertConfig(**shape, intermediate_size=4 * WIDTH))
    else:
        network = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=1024, num_key_value_heads=6))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(kind: str, folder: Path, top: int | None) -> AdaptedModel:
    """Rank 8 in the attention of the top layers, or of all."""
    if kind != "llama-lm":
        labels = tuple(f"class {index}" for index in range(CLASSES))
        settings = TaskSection(name="sequence-classification", labels=labels, max_length=128, head_init="zero")
    else:
        settings = TaskSection(name="causal-lm", max_length=128)
    task = task_of(settings)
    base = load_base(folder, task, Placement.choose(), "mean" if kind == "bert" else "last")
    return AdaptedModel(base, task, LoraSection(r=8, layers=top))


def random_examples(model: AdaptedModel) -> list[Encoded | None]:
    """Random tokens in two length buckets."""
    generator = np.random.default_rng(0)
    items: list[Encoded | None] = []
    for length in generator.integers(LENGTHS[0], LENGTHS[1] + 1, EXAMPLES):
        ids = generator.integers(2, VOCABULARY, length).astype(np.int32)
        label = np.asarray(generator.integers(CLASSES), np.int64)
        items.append(Encoded(ids, ids.astype(np.int64) if model.task.name == "causal-lm" else label))
    return items


class Ready(Examples):
    """Examples whose batches are made once and then lie in memory."""

    def __init__(self, source: Examples) -> None:
        super().__init__(source.encoded, source.task)
        self.source, self.made = source, dict[bytes, list[Batch]]()

    def batches(self, indices: npt.NDArray[np.int64], rows: int, model: AdaptedModel, cut: Cut) -> Iterator[Batch]:
        """The batches as they were the first time."""
        key = indices.tobytes()
        if key not in self.made:
            self.made[key] = list(self.source.batches(indices, rows, model, cut))
        yield from self.made[key]


def measure(cell: Cell, pairs: int, folder: Path) -> dict[str, Any]:
    """All figures of one cell."""
    weights = write_model(cell.model, folder / "model")
    model, whole = adapted(cell.model, weights, cell.top), adapted(cell.model, weights, None)
    items = random_examples(model)
    cached = Examples(items, model.task, cache_folder=folder / "cache")
    arms: dict[str, tuple[AdaptedModel, Examples]] = {
        "all": (whole, Examples(items, whole.task)),
        "anew": (model, Examples(items, model.task, cache_limit=0)),
        "cached": (model, cached),
        "ready": (model, Ready(cached)),
    }
    one, cut = np.zeros(1, np.int64), model.layer_cut
    fill, _ = timed(lambda: list(cached.batches(one, BATCH, model, cut)))
    again = Examples(items, model.task, cache_folder=folder / "cache")
    found, _ = timed(lambda: list(again.batches(one, BATCH, model, cut)))
    for arm in ARMS:
        training(*arms[arm], cell.mechanism)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    for _ in range(pairs):
        for arm in order.sample(ARMS, len(ARMS)):
            times[arm].append(timed(lambda: training(*arms[arm], cell.mechanism)))  # noqa: B023  # called at once
    wall = {arm: statistics.median(one for one, _ in times[arm]) for arm in ARMS}
    quotients = {
        f"{above}_over_{below}": {
            clock: ratios([a[k] / b[k] for a, b in zip(times[above], times[below], strict=True)])
            for k, clock in enumerate(("wall", "cpu"))
        }
        for above, below in (("all", "cached"), ("anew", "cached"), ("anew", "ready"), ("ready", "cached"))
    }
    layers = LAYERS / cell.top
    return {
        "layers_ratio": layers,
        "share_of_layers_ratio": {
            clock: round(spread["median"] / layers, 3) for clock, spread in quotients["all_over_cached"].items()
        },
        **quotients,
        "examples_per_second": {arm: round(STEPS * BATCH / wall[arm], 1) for arm in ARMS},
        "fill_seconds": round(fill, 3),
        "fill_in_passes_of_anew": round(fill / (wall["anew"] * EXAMPLES / (STEPS * BATCH)), 3),
        "found_seconds": round(found, 3),
        "cache_mib": round(sum(path.stat().st_size for path in (folder / "cache").iterdir()) / 2**20, 1),
    }


def training(model: AdaptedModel, examples: Examples, mechanism: str) -> None:
    """One local round of ``STEPS`` steps."""
    rate = BATCH / EXAMPLES
    statement = PhaseStatement("benchmark", rate, 1.0, 1.0, STEPS)
    phase = PhaseSection(name="benchmark", rounds=1, steps=STEPS, sample_rate=rate, learning_rate=1e-3)
    names = tuple(name for name in model.spec.names if model.group_of(name) != "A")
    received = model.state()
    train_round(
        model,
        examples,
        received,
        phase,
        names,
        mechanism_for(PrivacySection(mechanism=mechanism), statement, EXAMPLES, SECRET),
        SECRET,
        BATCH,
    )
    model.load(received)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratios(values: Sequence[float]) -> dict[str, float]:
    """Their spread."""
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
        "n": len(values),
    }


def main() -> None:
    """Measures the cells and merges them into results/prefix_cache.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="interleaved rounds of all arms")
    parser.add_argument("--cells", default="*", help="which cells, e.g. 'bert-*'")
    parser.add_argument("--remark", default="", help="stored with the cells, e.g. that the machine was busy")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"cells": {}}
    setting = {"layers": LAYERS, "width": WIDTH, "rank": 8, "batch": BATCH, "steps": STEPS, "tokens": list(LENGTHS)}
    for cell in CELLS:
        if not fnmatch(cell.name, arguments.cells):
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(cell, arguments.pairs, Path(folder))
        results["cells"][cell.name] = {**figures, "environment": environment(), "remark": arguments.remark}
        results["setting"] = setting
        print(cell.name, json.dumps(figures, indent=2), flush=True)
        RESULTS.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
