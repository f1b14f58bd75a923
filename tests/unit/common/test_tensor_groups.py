"""What a canonical name says of a tensor, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ModelError
from common.sections import PhaseSection
from common.tensor_groups import group_of, layer_of, trained_in

STEM = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
HEAD = ("base_model.model.classifier.bias", "base_model.model.classifier.weight")
NAMES = (*(STEM.format(layer, matrix) for layer in (2, 3) for matrix in "AB"), *HEAD, "feature_map.weight")


def test_a_name_tells_group_and_layer() -> None:
    assert [group_of(name) for name in NAMES] == ["A", "B", "A", "B", "head", "head", "map"]
    assert [layer_of(name) for name in NAMES] == [2, 2, 3, 3, None, None, None]
    assert layer_of("feature_map.0.weight") is None
    assert layer_of(STEM.format(11, "A")) == 11


def phase(**settings: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "rounds": 2, "sample_rate": 1.0, "train": ("head", "lora"), **settings})


def test_a_round_trains_what_its_algorithm_moves_in_the_layers_of_its_phase() -> None:
    b2, b3 = STEM.format(2, "B"), STEM.format(3, "B")
    assert trained_in(phase(algorithm="ffa"), 1, NAMES, 4) == (b2, b3, *HEAD)
    assert trained_in(phase(algorithm="ffa", layers=1), 1, NAMES, 4) == (b3, *HEAD)
    assert trained_in(phase(algorithm="fedit", train=("lora",), layers=1), 1, NAMES, 4) == (STEM.format(3, "A"), b3)
    assert trained_in(phase(train=("head",)), 1, NAMES, 4) == HEAD
    odd, even = (trained_in(phase(algorithm="rolora", train=("lora",)), round, NAMES, 4) for round in (1, 2))
    assert {group_of(name) for name in odd} == {"B"} and {group_of(name) for name in even} == {"A"}


def test_a_phase_of_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"phase\.p\.layers = 5: the model has only 4 layers"):
        trained_in(phase(layers=5), 1, NAMES, 4)
