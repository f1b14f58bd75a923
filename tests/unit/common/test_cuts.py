"""A cut is taken only where the view from a layer on is seen to compute what the encoder computes.

That the two parts of the families known here give the whole is in ``test_adapted.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common import cuts
from common.adapted import AdaptedModel
from common.cuts import INPUT, Cut
from common.model import top_of

Load = Callable[..., AdaptedModel]

MAP = {"feature_map": "held-out-texts", "feature_levels": 3, "feature_rank": 6}


def test_a_view_that_does_not_show_every_pooled_level_is_not_used(
    tiny_bert: Path, adapted_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the layers computes the same last states, and tells nothing to who listens at the encoder's own."""
    monkeypatch.setattr(cuts, "top_of", lambda encoder, first: copy.deepcopy(top_of(encoder, first)))
    assert adapted_model(tiny_bert, lora={"layers": 1}).layer_cut == Cut(3)
    assert adapted_model(tiny_bert, lora={"layers": 1}, **MAP).layer_cut == INPUT


def test_half_precision_does_not_keep_a_model_of_several_levels_from_being_cut(
    tiny_bert: Path, adapted_model: Load
) -> None:
    assert adapted_model(tiny_bert, lora={"layers": 1}, dtype="bfloat16", **MAP).layer_cut == Cut(2)


class Broken(nn.Module):
    """Takes none of what a view is given."""

    def forward(self) -> None:
        raise AssertionError("not reached")


class Shifted(nn.Module):
    """As the view, but for its last states."""

    def __init__(self, view: nn.Module, by: float) -> None:
        super().__init__()
        self.view, self.by = view, by

    def forward(self, **inputs: torch.Tensor) -> Any:
        out = self.view(**inputs)
        out.last_hidden_state = out.last_hidden_state + self.by
        return out


@pytest.mark.parametrize(
    ("changed", "cut"),
    [
        (lambda view: view, Cut(2)),
        (lambda view: Broken(), INPUT),
        (lambda view: Shifted(view, 0.0), Cut(2)),
        (lambda view: Shifted(view, 0.01), INPUT),
    ],
    ids=["as it is", "takes nothing", "shifted by nothing", "shifted a little"],
)
def test_a_view_is_used_only_if_it_computes_the_same(
    tiny_bert: Path,
    adapted_model: Load,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[nn.Module], nn.Module],
    cut: Cut,
) -> None:
    monkeypatch.setattr(cuts, "top_of", lambda encoder, first: changed(top_of(encoder, first)))  # type: ignore[arg-type]
    assert adapted_model(tiny_bert, lora={"layers": 2}).layer_cut == cut


def test_whether_a_view_is_exact_is_tried_once(
    tiny_bert: Path, adapted_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def none(encoder: nn.Module, first: int) -> None:
        asked.append(first)

    monkeypatch.setattr(cuts, "top_of", none)
    model = adapted_model(tiny_bert, lora={"layers": 2})
    assert [model.layer_cut, model.layer_cut] == [INPUT, INPUT]
    assert asked == [2]
