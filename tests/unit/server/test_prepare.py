"""What a run needs before its first round: here, where the server's model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import RunConfig
from common.errors import ModelError
from common.toml_settings import validate
from server.prepare import prepare, resident_model


def settings(model: Path, data: Path, **sections: Any) -> RunConfig:
    tables = {
        "model": {"name": str(model)},
        "task": {"labels": ["urgent", "routine", "review"]},
        "data": {"path": str(data)},
        "evaluation": {"limit": 4},
        "phase": [{"name": "head", "rounds": 1, "sample_rate": 1.0, "train": ["head"]}],
        **sections,
    }
    return validate(RunConfig, tables, "test")


def test_a_deployed_server_is_placed_by_its_own_section_and_a_simulation_by_its(
    tiny_bert: Path, triage_data: Path
) -> None:
    """The device that ``[simulation]`` names exists nowhere: what reads it fails."""
    absent = {"device": "cuda:99", "dtype": "float32"}
    config = settings(tiny_bert, triage_data, server={"device": "cpu", "dtype": "bfloat16"}, simulation=absent)
    placement = prepare(config, "run-1").model.base.placement
    assert (placement.device, placement.dtype) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ModelError, match="cuda:99"):
        resident_model(config)
    swapped = settings(tiny_bert, triage_data, server=absent, simulation={"device": "cpu", "dtype": "bfloat16"})
    placement = resident_model(swapped).base.placement
    assert (placement.device, placement.dtype) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ModelError, match="cuda:99"):
        prepare(swapped, "run-1")


def test_a_model_that_is_given_stays_where_it_is(tiny_bert: Path, triage_data: Path) -> None:
    config = settings(tiny_bert, triage_data, server={"device": "cuda:99"}, simulation={"device": "cpu"})
    model = resident_model(config)
    assert prepare(config, "run-1", model).model is model
