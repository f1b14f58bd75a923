"""What folding costs the server: memory by number of sites, and speed against the machine's own.

    taskset -c 0 python benchmarks/aggregation.py

**Memory.** For each combining rule a process of its own folds the spilled replies of 10, 100 and 1000 sites, an adapter
of 10 MiB each. Shown is by how much its resident memory peaks above what it was before the first reply, mapped file
pages included.

**Speed.** 1000 replies of 10 MiB are folded by the mean, from spilled files in the page cache and from arrays in
memory. Beside it, on the same bytes in turns of 100 replies: numpy's plain sum of each tensor, and a copy. The ratio to
the plain sum is of the same turn; its median is what counts, and its range is shown.

Replies of 1000 sites are the same eight (80 MiB together, more than a core's share of cache) again and again, under
names of their own; the server does not know.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS, environment

from common.messages import Tensors, joined
from common.sections import PhaseSection
from server.aggregation.registry import aggregator_for
from server.checkpoint import RunFolder

FILE = RESULTS / "aggregation.json"
ROOT = Path(__file__).resolve().parent.parent
RULES = ("mean", "median", "trimmed-mean", "multi-krum")
SITES = (10, 100, 1000)
DISTINCT = 8
TURNS, TURN = 10, 100
LAYERS, WIDTH, RANK = 16, 5120, 16
"""2 · 16 · 5120 · 16 numbers of fp32: 10 MiB."""


def phase(rule: str) -> PhaseSection:
    """Both matrices, one round."""
    return PhaseSection(name="lora", rounds=1, sample_rate=1.0, algorithm="fedit", combine=rule, hostile_sites=2)


def drawn(seed: int) -> dict[str, np.ndarray]:
    """An adapter's worth of numbers."""
    generator = np.random.default_rng(seed)
    shapes = {f"layer{layer}.lora_A.weight": (RANK, WIDTH) for layer in range(LAYERS)}
    shapes |= {f"layer{layer}.lora_B.weight": (WIDTH, RANK) for layer in range(LAYERS)}
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def spill(folder: RunFolder) -> None:
    """1000 replies: eight files, and links to them."""
    for seed in range(DISTINCT):
        folder.store_reply(1, f"s{seed:04}", "d", joined(drawn(seed), {"loss": 1.0}))
    first = folder.round_folder(1)
    for site in range(DISTINCT, max(SITES)):
        os.link(first / f"s{site % DISTINCT:04}.safetensors", first / f"s{site:04}.safetensors")


# ---- memory ---------------------------------------------------------------------------------------------------------


def fold_and_tell(folder: str, rule: str, sites: int) -> None:
    """In a process of its own: folds, and prints the peak of resident memory over the start, and the seconds."""
    aggregator, replies = aggregator_for(phase(rule)), RunFolder(Path(folder))
    state = aggregator.init({name: np.zeros_like(array) for name, array in drawn(0).items()})
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _status("VmRSS"), time.perf_counter()
    for site in range(sites):
        update, _ = replies.reply(1, f"s{site:04}").parted()
        state = aggregator.accumulate(state, update, 1.0 + site % 3)
    aggregator.finish(state)
    print(json.dumps([(_status("VmHWM") - before) / 1024, time.perf_counter() - started]))


def _status(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def memory(folder: Path, rules: Sequence[str], sites: Sequence[int]) -> dict[str, dict[str, Any]]:
    """MiB and seconds by rule and number of sites."""
    found: dict[str, dict[str, Any]] = {}
    for rule in rules:
        for count in sites:
            command = [sys.executable, __file__, "--fold", str(folder), rule, str(count)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **_path()})
            peak, seconds = json.loads(told.stdout)
            found.setdefault(rule, {})[str(count)] = {"peak_mib": round(peak, 1), "seconds": round(seconds, 2)}
            print(rule, count, found[rule][str(count)], flush=True)
    return found


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


# ---- speed ----------------------------------------------------------------------------------------------------------


def speed(replies: Callable[[int], Tensors]) -> dict[str, Any]:
    """GB/s of the mean, of the plain sum and of a copy, over the same replies in turns."""
    start = drawn(0)
    size = sum(array.nbytes for array in start.values())
    target = {name: np.empty_like(array) for name, array in start.items()}
    aggregator = aggregator_for(phase("mean"))
    state = aggregator.init(start)
    rates: dict[str, list[float]] = {"mean": [], "sum": [], "copy": []}
    for turn in range(TURNS):
        sites = range(turn * TURN, (turn + 1) * TURN)
        began = time.perf_counter()
        for site in sites:
            state = aggregator.accumulate(state, replies(site), 1.0 + site % 3)
        if turn == TURNS - 1:
            aggregator.finish(state)
        rates["mean"].append(_rate(began, size))
        began = time.perf_counter()
        for site in sites:
            reply = replies(site)
            for name in reply:
                reply[name].sum()
        rates["sum"].append(_rate(began, size))
        began = time.perf_counter()
        for site in sites:
            reply = replies(site)
            for name in reply:
                np.copyto(target[name], reply[name])
        rates["copy"].append(_rate(began, size))
    ratios = [mean / plain for mean, plain in zip(rates["mean"], rates["sum"], strict=True)]
    return {
        **{f"{kind}_gb_per_s": round(statistics.median(values), 2) for kind, values in rates.items()},
        "of_plain_sum": round(statistics.median(ratios), 3),
        "of_plain_sum_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def _rate(began: float, size: int) -> float:
    return TURN * size / (time.perf_counter() - began) / 1e9


def main() -> None:
    """Measures and writes the results; what is not asked for stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--sites", type=int, nargs="*", default=list(SITES), help="none: no memory")
    parser.add_argument("--rules", nargs="*", default=list(RULES))
    arguments = parser.parse_args()
    if arguments.fold:
        fold_and_tell(arguments.fold[0], arguments.fold[1], int(arguments.fold[2]))
        return
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        spill(folder)
        held = [drawn(seed) for seed in range(DISTINCT)]
        for kind, replies in (
            ("page_cache", lambda site: folder.reply(1, f"s{site:04}").parted()[0]),
            ("in_memory", lambda site: held[site % DISTINCT]),
        ):
            found[kind] = speed(replies)
            print(kind, found[kind], flush=True)
        for rule, by_sites in memory(folder.path, arguments.rules, arguments.sites).items():
            found.setdefault("memory", {}).setdefault(rule, {}).update(by_sites)
    found["adapter_mib"] = sum(array.nbytes for array in held[0].values()) / 2**20
    found["environment"] = environment()
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
