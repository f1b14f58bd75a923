"""A cell that cannot be continued: what is said of it, and that what it has spent is counted all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.privacy.accounting import Segment, epsilon
from simulations.sweep import Sweep, write_results
from simulations.sweep_grid import cells_of
from simulations.sweep_privacy import spent_by
from simulations.sweep_worker import Worker


@pytest.fixture
def sweep(tmp_path: Path, tiny_bert: Path, triage_data: Path) -> Sweep:
    """Two seeds of one round."""
    tables = {
        "model": {"name": str(tiny_bert)},
        "task": {"labels": ["urgent", "routine", "review"], "max_length": 16},
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"layers": 1},
        "phase": [{"name": "head", "rounds": 1, "sample_rate": 1.0, "train": ["head"]}],
    }
    return Sweep(tmp_path / "sweep", (), tuple(cells_of(tables, [], [], 2, "run.toml")), 1, 1)


def test_a_cell_whose_plan_has_changed_is_refused_and_what_it_spent_still_counts(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    events: list[dict[str, Any]] = []
    worker = Worker(lambda **event: events.append(event))

    def run(number: int) -> dict[str, Any]:
        cell = sweep.cells[number]
        order = {"order": "run", "name": cell.name, "folder": str(sweep.cell_folder(cell)), "resident": cell.resident}
        worker.serve({**order, "config": cell.config.model_dump_json()})
        return events[-1]

    assert run(0) == run(1) == {"event": "done"}
    first = sweep.cell_folder(sweep.cells[0])
    (first / "summary.json").unlink()  # as if it had been stopped
    manifest = json.loads((first / "manifest.json").read_text())
    (first / "manifest.json").write_text(json.dumps({**manifest, "plan_digest": "0" * 64}))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    event = run(0)
    assert (event["event"], event["code"]) == ("failed", 2)
    assert "the run was started with other settings or another version" in event["why"]
    assert "counts the ε that it has spent" in event["why"] and "give the whole sweep a new --out" in event["why"]
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before

    content = write_results(sweep, {sweep.cells[0].name: event["why"]})
    assert [row["status"] for row in content["cells"]] == ["failed", "completed"]
    composed = content["privacy"]["composed"]
    (noise,) = {one.segments[0].noise_multiplier for one in spent_by(first).values() if one.segments}
    assert (composed["runs"], composed["private_runs"]) == (2, 2)
    assert composed["private_epsilon"] == epsilon([Segment(1.0, noise, 1)] * 2, 1e-5) > 8.0
