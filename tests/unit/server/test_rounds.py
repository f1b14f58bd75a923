"""What a round hands on to the evaluation, to the next round and to the next phase."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site import Site
from common.config import RunConfig
from common.messages import Tensors, TrainRequest
from common.toml_settings import validate
from server.calibration import Calibrator
from server.checkpoint import Checkpoint, RunFolder
from server.linear_head import HeldOutFeatures
from server.refinement import Refiner
from server.rounds import VALIDATION
from server.selection import Selection
from server.watcher import Silent
from simulations.federation import Arm, Federation

HEAD = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")


class Kept(Silent):
    """The checkpoint of every round."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = RunFolder(folder), list[Checkpoint]()

    def round(self, record: Mapping[str, Any]) -> None:
        checkpoint = self.folder.latest()
        assert checkpoint is not None and checkpoint.round == record["round"] == len(self.checkpoints)
        self.checkpoints.append(checkpoint)


def global_adapter(checkpoint: Checkpoint) -> Tensors:
    """What the aggregator goes on from."""
    arrays = checkpoint.aggregator.items()
    return {name.removeprefix("adapter/"): array for name, array in arrays if name.startswith("adapter/")}


def same_head(left: Tensors, right: Tensors) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in HEAD)


class Ends(Kept):
    """Ends the run after a round."""

    def __init__(self, folder: Path, last: int) -> None:
        super().__init__(folder)
        self.last = last

    def round(self, record: Mapping[str, Any]) -> None:
        super().round(record)
        if record["round"] == self.last:
            raise KeyboardInterrupt


def two_phases(model: Path, data: Path) -> RunConfig:
    """Two rounds of the head, refined; then one of LoRA."""
    head = {"name": "head", "rounds": 2, "sample_rate": 1.0, "train": ["head"], "server_momentum": 0.5}
    tables: dict[str, Any] = {
        "model": {"name": str(model)},
        "task": {
            "labels": ("urgent", "routine", "review"),
            "max_length": 32,
            "feature_map": "held-out-texts",
            "feature_rank": 6,
        },
        "data": {"path": str(data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 1},
        "phase": [
            {**head, "learning_rate": 3.0, "server_refinement": True},
            {"name": "lora", "rounds": 1, "sample_rate": 1.0, "train": ["head", "lora"]},
        ],
    }
    return validate(RunConfig, tables, "test")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensors]:
    """Round → the adapter that the sites were asked to start from, as rounds go by."""
    sent: dict[int, Tensors] = {}
    train = Site.train

    def listening(self: Site, request: TrainRequest) -> Any:
        sent[request.round] = dict(request.adapter)
        return train(self, request)

    monkeypatch.setattr(Site, "train", listening)
    return sent


def test_the_refined_head_is_evaluated_kept_and_calibrated_for_the_next_phase_while_its_own_goes_on_from_the_raw_one(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: dict[int, Tensors]
) -> None:
    monkeypatch.setattr(Selection, "keeps", lambda self, record, earlier: True)
    federation = Federation(two_phases(tiny_bert, triage_data))
    watcher = Kept(tmp_path / "run")
    arm = Arm("test", tmp_path / "run", federation.config, tuple(federation.parts))
    federation.run(arm, "run-1", False, lambda title, rounds: nullcontext(watcher))

    base, first, second, _ = watcher.checkpoints
    held_out = HeldOutFeatures(federation.model, federation.evaluator.splits[VALIDATION].examples)
    refiner = Refiner(held_out)
    phase = federation.config.phase[0]
    noise = [float(record["noise"]) for record in second.history[1:]]
    for checkpoint, deviations in ((first, noise[:1]), (second, noise)):
        raw = global_adapter(checkpoint)
        refined = refiner.refined(raw, phase, deviations)
        assert not same_head(refined, raw)
        assert {name: array.tobytes() for name, array in checkpoint.best.items()} == {
            name: array.tobytes() for name, array in refined.items()
        }
        assert checkpoint.history[-1]["metrics"] == federation.evaluator.evaluate(refined, VALIDATION)
    assert same_head(sent[1], global_adapter(base))
    assert same_head(sent[2], global_adapter(first))
    calibrated = Calibrator(held_out).calibrated(second.best, phase)
    assert same_head(sent[3], calibrated) and not same_head(calibrated, second.best)
    losses = [federation.evaluator.evaluate(adapter, VALIDATION)["loss"] for adapter in (calibrated, second.best)]
    assert losses[0] < losses[1]


def test_a_run_that_is_resumed_between_two_phases_starts_the_next_from_the_same_head(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, sent: dict[int, Tensors]
) -> None:
    def run(folder: Path, resume: bool, watcher: Silent) -> None:
        federation = Federation(two_phases(tiny_bert, triage_data))
        arm = Arm("test", folder, federation.config, tuple(federation.parts))
        federation.run(arm, "run-1", resume, lambda title, rounds: nullcontext(watcher))

    run(tmp_path / "whole", False, Silent())
    uninterrupted = sent.pop(3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ended", False, Ends(tmp_path / "ended", 2))
    assert 3 not in sent
    run(tmp_path / "ended", True, Silent())
    assert uninterrupted.keys() < sent[3].keys()  # sites that are asked for the first time are asked in full
    for name, array in uninterrupted.items():
        assert array.tobytes() == sent[3][name].tobytes()
