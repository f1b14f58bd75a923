"""Seconds of a LoRA training step and of a forward pass, with the base's linear maps by oneDNN over those by MKL.

    OMP_NUM_THREADS=1 python benchmarks/frozen_linear.py

MiniLM, rank 8, random tokens. Both ways take turns on the same model and batch; process time, ratio turn by turn.
Written to results/frozen_linear.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from environment import RESULTS, environment
from torch import nn

from common.adapted import AdaptedModel
from common.config import RunConfig
from common.cuts import INPUT
from common.frozen_linear import FrozenLinear, available
from common.toml_settings import validate
from server.prepare import resident_model

SHAPES = ((4, 32), (4, 128), (16, 128))
"""Rows and tokens of a batch."""


def model() -> AdaptedModel:
    """MiniLM with adapters of rank 8 in all layers."""
    task = {"name": "sequence-classification", "labels": ["a", "b"], "feature_map": "none"}
    return resident_model(validate(RunConfig, {"task": task, "lora": {"r": 8}}, "benchmark"))


def step(subject: AdaptedModel, ids: torch.Tensor) -> None:
    """Forward and backward."""
    with subject.training(subject.spec.names):
        subject.top(ids, torch.ones_like(ids), INPUT).sum().backward()


def forward(subject: AdaptedModel, ids: torch.Tensor) -> None:
    """Forward alone, as in an evaluation."""
    with torch.no_grad():
        subject.top(ids, torch.ones_like(ids), INPUT)


def seconds(work: Callable[[], None], maps: list[nn.Module], kind: type[nn.Module]) -> float:
    """Process seconds with all maps of one kind."""
    for one in maps:
        one.__class__ = kind
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Runs and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    if not available():
        raise SystemExit("oneDNN is of no use on this machine: no AVX-512, or a torch without its operator")
    torch.manual_seed(0)
    subject = model()
    maps = [one for one in subject.peft.modules() if type(one) is FrozenLinear]
    rows = []
    for batch, tokens in SHAPES:
        ids = torch.randint(1000, 2000, (batch, tokens))
        for what in (step, forward):
            turns = [
                [seconds(lambda: what(subject, ids), maps, kind) for kind in (nn.Linear, FrozenLinear)]  # noqa: B023
                for _ in range(arguments.turns + 1)
            ][1:]
            ratios = sorted(fast / plain for plain, fast in turns)
            row = {
                "batch": batch,
                "tokens": tokens,
                "what": what.__name__,
                "mkl_seconds": round(statistics.median(plain for plain, _ in turns), 4),
                "onednn_over_mkl": {
                    "median": round(statistics.median(ratios), 3),
                    "min": round(ratios[0], 3),
                    "max": round(ratios[-1], 3),
                },
            }
            rows.append(row)
            print(row, flush=True)
    content = {"turns": arguments.turns, "rows": rows, "environment": environment()}
    (RESULTS / "frozen_linear.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
