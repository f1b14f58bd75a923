"""The noise that a round records is the noise in the aggregated head.

A feature map of low rank fills up with zeros, so the gradient of the head's last columns is zero, and what moves them
is noise alone: it can be measured without knowing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chi2

from common.config import RunConfig
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.refinement import accumulated, step_deviations
from server.watcher import Silent
from simulations.federation import Arm, Federation

RANK, ROUNDS = 2, 3
LABELS = ("urgent", "routine", "review", *(f"other {number}" for number in range(21)))
"""Most of them never occur; each gives the head a row, and so more numbers to measure."""
ERROR = 1e-4
"""How often a test would fail by chance, were its seed not fixed."""


class Heads(Silent):
    """The padded columns of the global head after every round [24, 30]."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = RunFolder(folder), list[npt.NDArray[np.float64]]()

    def round(self, record: Mapping[str, Any]) -> None:
        checkpoint = self.folder.latest()
        assert checkpoint is not None
        head = checkpoint.aggregator["adapter/base_model.model.classifier.weight"]
        self.found.append(head[:, RANK:].astype(np.float64))


def trained(model: Path, data: Path, out: Path, weights: str, **phase: Any) -> tuple[Heads, list[float]]:
    """The global heads of a run of three sites of unequal size, and the noise it records."""
    head = {"name": "head", "rounds": ROUNDS, "steps": 2, "sample_rate": 0.5, "train": ["head"], "learning_rate": 2.0}
    tables: dict[str, Any] = {
        "model": {"name": str(model)},
        "task": {"labels": LABELS, "max_length": 32, "feature_map": "held-out-texts", "feature_rank": RANK},
        "data": {"path": str(data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 1},
        "server": {"weights": weights},
        "phase": [{**head, "clip_norm": 0.5, **phase}],
    }
    federation = Federation(validate(RunConfig, tables, "test"))
    heads = Heads(out)
    arm = Arm("test", out, federation.config, tuple(federation.parts))
    history = federation.run(arm, "run-1", False, lambda title, rounds: nullcontext(heads)).result.history
    return heads, step_deviations(history, "head")


def fits(noise: npt.NDArray[np.float64], deviation: float) -> bool:
    """Whether normal numbers of this deviation have such a sum of squares, up to one draw in 1/``ERROR``."""
    low, high = chi2.interval(1 - ERROR, noise.size)
    return bool(low < np.sum((noise / deviation) ** 2) < high)


@pytest.mark.parametrize("weights", ["public-size", "uniform"])
def test_the_recorded_noise_is_what_each_rounds_step_has(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, weights: str
) -> None:
    heads, noise = trained(tiny_bert, triage_data, tmp_path / "run", weights, server_learning_rate=0.7)
    steps = np.diff(heads.found, axis=0)
    assert steps.shape == (ROUNDS, len(LABELS), 32 - RANK)
    for step, deviation in zip(steps, noise, strict=True):
        assert fits(step, deviation)
        assert not fits(step, 0.8 * deviation) and not fits(step, 1.25 * deviation)


def test_the_recorded_noise_is_that_of_the_shortened_step_and_momentum_adds_it_up(
    tiny_bert: Path, triage_data: Path, tmp_path: Path
) -> None:
    heads, noise = trained(
        tiny_bert, triage_data, tmp_path / "run", "public-size", server_noise=0.01, server_momentum=0.8
    )
    assert noise == [pytest.approx(0.01)] * ROUNDS
    assert fits(heads.found[1] - heads.found[0], noise[0])
    total = heads.found[-1] - heads.found[0]
    assert fits(total, accumulated(noise, 0.8))
    assert not fits(total, accumulated(noise, 0.6))
