"""Which replies count: each reason for which one does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.adapter import AdapterSpec
from common.messages import Release
from server.admission import LARGEST_NORM, Rejection, examine

SPEC = AdapterSpec.of("base", {"a": (2,), "b": (2, 2)})
UPDATE = {"a": np.array([0.5, -0.5], np.float32), "b": np.zeros((2, 2), np.float32)}
GOOD = Release("north", "run-1", 3, "d" * 64, UPDATE)
BOUNDS = {"loss": 2 * math.log(3), "accuracy": 1.0}
MEASURED = replace(GOOD, metrics={"loss": 0.5, "accuracy": 0.75})


def verdict(reply: Release, bounds: dict[str, float] | None = None) -> Rejection | None:
    return examine(reply, "north", "run-1", 3, "d" * 64, SPEC, bounds or {})


def update(**tensors: Any) -> Release:
    return replace(GOOD, update={**UPDATE, **tensors})


def test_a_release_of_the_round_with_the_rounds_layout_counts() -> None:
    assert verdict(GOOD) is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (replace(GOOD, site="south"), Rejection.WRONG_SITE),
        (replace(GOOD, site="North"), Rejection.WRONG_SITE),
        (replace(GOOD, run_id="run-2"), Rejection.STALE),
        (replace(GOOD, round=2), Rejection.STALE),
        (replace(GOOD, round=4), Rejection.STALE),
        (replace(GOOD, request_digest="e" * 64), Rejection.STALE),
        (replace(GOOD, update={"a": UPDATE["a"]}), Rejection.LAYOUT),
        (replace(GOOD, update={}), Rejection.LAYOUT),
        (update(c=np.zeros(1, np.float32)), Rejection.LAYOUT),
        (update(b=np.zeros(4, np.float32)), Rejection.LAYOUT),
        (update(b=np.zeros((2, 2), np.float64)), Rejection.LAYOUT),
        (update(b=np.zeros((2, 2), np.int32)), Rejection.LAYOUT),
        (update(a=np.array([0, np.nan], np.float32)), Rejection.NOT_FINITE),
        (update(b=np.full((2, 2), np.inf, np.float32)), Rejection.NOT_FINITE),
        (update(a=np.array([0, -np.inf], np.float32)), Rejection.NOT_FINITE),
        (update(a=np.array([0, 3e38], np.float32)), Rejection.OVERSIZE),
        (update(b=np.full((2, 2), 1e30, np.float32)), Rejection.OVERSIZE),
    ],
)
def test_anything_else_is_rejected_by_name(reply: Release, reason: Rejection) -> None:
    assert verdict(reply) is reason


def test_the_metrics_that_the_plan_asks_for_count_up_to_their_bounds() -> None:
    assert verdict(MEASURED, BOUNDS) is None
    for value in (0.0, 1.0):
        assert verdict(replace(MEASURED, metrics={"loss": value, "accuracy": value}), BOUNDS) is None
    largest = float(np.float32(2 * math.log(3)))
    assert largest > BOUNDS["loss"], "what a site sends is rounded to fp32"
    assert verdict(replace(MEASURED, metrics={"loss": largest, "accuracy": 1.0}), BOUNDS) is None


@pytest.mark.parametrize(
    ("metrics", "bounds", "reason"),
    [
        ({"loss": 0.5}, {}, Rejection.LAYOUT),
        ({}, BOUNDS, Rejection.LAYOUT),
        ({"loss": 0.5}, BOUNDS, Rejection.LAYOUT),
        ({"loss": 0.5, "accuracy": 0.5, "f1": 0.5}, BOUNDS, Rejection.LAYOUT),
        ({"loss": 0.5, "f1": 0.5}, BOUNDS, Rejection.LAYOUT),
        ({"loss": math.nan, "accuracy": 0.5}, BOUNDS, Rejection.NOT_FINITE),
        ({"loss": 0.5, "accuracy": math.inf}, BOUNDS, Rejection.NOT_FINITE),
        ({"loss": 0.5, "accuracy": -math.inf}, BOUNDS, Rejection.NOT_FINITE),
        ({"loss": 1e30, "accuracy": 0.5}, BOUNDS, Rejection.OVERSIZE),
        ({"loss": 2.2, "accuracy": 0.5}, BOUNDS, Rejection.OVERSIZE),
        ({"loss": 0.5, "accuracy": 1.001}, BOUNDS, Rejection.OVERSIZE),
        ({"loss": -0.001, "accuracy": 0.5}, BOUNDS, Rejection.OVERSIZE),
    ],
)
def test_other_metrics_are_rejected_by_name(
    metrics: dict[str, float], bounds: dict[str, float], reason: Rejection
) -> None:
    assert verdict(replace(GOOD, metrics=metrics), bounds) is reason


def test_the_largest_norm_is_over_all_tensors_together() -> None:
    half = np.float32(LARGEST_NORM * 0.7)
    one = update(a=np.array([half, 0], np.float32))
    two = update(a=np.array([half, 0], np.float32), b=np.array([[half, 0], [0, half]], np.float32))
    assert verdict(one) is None
    assert verdict(two) is Rejection.OVERSIZE


def test_reasons_are_told_in_the_words_of_the_report() -> None:
    assert [str(reason) for reason in Rejection] == [
        "unreadable",
        "node-error",
        "wrong-site",
        "stale",
        "layout",
        "not-finite",
        "oversize",
        "late",
    ]
