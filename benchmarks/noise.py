"""What noise fit for release costs: sampling it, and summing clipped gradients on its grid, against one training step.

    python benchmarks/noise.py

The step is forward and backward of a BERT of MiniLM's shape (6 layers of 384, random weights) with LoRA of rank 8 on
the attention, about 150k parameters, for 16 examples of 64 tokens, without privacy. All parts run in turn within one
loop, on one thread; the ratio is taken turn by turn.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import RESULTS, environment
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from common.privacy.noise import Grid, fast_gaussian, rounded_gaussian

TURNS, UNITS, TOKENS, RANK = 31, 16, 64, 8
KEY = bytes(range(32))
DEVIATION = 0.7


def adapted_bert() -> torch.nn.Module:
    """Frozen base, LoRA on query, key, value and output of the attention."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))
    targets = ["query", "key", "value", "attention.output.dense"]
    model: torch.nn.Module = get_peft_model(base, LoraConfig(r=RANK, target_modules=targets))
    return model.eval()


def parts() -> tuple[dict[str, Callable[[], Any]], int]:
    """Each part of a step, and the number of trained parameters."""
    model = adapted_bert()
    shapes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total, grid = sum(shapes), Grid.of(DEVIATION)
    tokens = torch.randint(1000, 20000, (UNITS, TOKENS))
    sources = [torch.randn(UNITS, size) for size in shapes]
    gradients = [source.clone() for source in sources]
    factors = torch.full((UNITS,), 0.01)

    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens).last_hidden_state.mean().backward()

    def restore() -> None:
        for gradient, source in zip(gradients, sources, strict=True):
            gradient.copy_(source)

    return {
        "training step": step,
        "restore": restore,  # what the sum on the grid overwrites; not reported
        "sum on the grid": lambda: [grid.summed(gradient, factors) for gradient in gradients],
        "sum in floating point": lambda: [factors @ source for source in sources],
        "secure noise": lambda: rounded_gaussian(KEY, DEVIATION / grid.spacing, total),
        "fast noise": lambda: fast_gaussian(KEY, DEVIATION, total),
    }, total


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {name: round(f(values), 5) for name, f in (("min", min), ("median", statistics.median), ("max", max))}


def main() -> None:
    """Writes results/noise.json and prints it."""
    torch.set_num_threads(1)
    timed, total = parts()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(TURNS + 2):
        for name, part in timed.items():
            started = time.perf_counter()
            part()
            if turn >= 2:  # after warming up
                seconds[name].append(time.perf_counter() - started)
    del seconds["restore"]
    secure = zip(seconds["secure noise"], seconds["sum on the grid"], strict=True)
    fast = zip(seconds["fast noise"], seconds["sum in floating point"], strict=True)
    extra = [
        (sum(slow) - sum(quick)) / step
        for slow, quick, step in zip(secure, fast, seconds["training step"], strict=True)
    ]
    result = {
        "parameters": total,
        "units": UNITS,
        "turns": TURNS,
        "milliseconds": {name: spread([1e3 * one for one in values]) for name, values in seconds.items()},
        "secure beyond fast, as a share of the step": spread(extra),
        "environment": {**environment(), "load_average": os.getloadavg()[0]},
    }
    (RESULTS / "noise.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
