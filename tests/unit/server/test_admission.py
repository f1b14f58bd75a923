"""Which replies count: each reason for which one does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client.privacy.budget import state_privacy
from common.adapter import AdapterSpec
from common.config import RunConfig
from common.messages import PlanStatus, Release, SiteDescription
from common.plan import Plan, plan_of
from common.toml_settings import validate
from server.admission import LEAST_ENTRIES, Gate, Rejection, examine, still_facing
from server.norm_bound import LARGEST_NORM

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
        (replace(GOOD, run_id="run-2"), Rejection.FOREIGN),
        (replace(GOOD, run_id="run-2", round=2), Rejection.FOREIGN),
        (replace(GOOD, round=2), Rejection.STALE),
        (replace(GOOD, round=4), Rejection.STALE),
        (replace(GOOD, request_digest="e" * 64), Rejection.FOREIGN),
        (replace(GOOD, request_digest="e" * 64, round=2), Rejection.STALE),
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
        "foreign",
        "stale",
        "duplicate",
        "layout",
        "not-finite",
        "oversize",
        "late",
    ]


# ---- a round of a plan ----------------------------------------------------------------------------------------------

LAYOUT = AdapterSpec.of("base", {"x": (8, 50)})
START = {"x": np.ones((8, 50), np.float32)}


def planned(**privacy: Any) -> Plan:
    phase = {"name": "head", "rounds": 3, "sample_rate": 1.0, "learning_rate": 4.0, "clip_norm": 0.5}
    tables = {"task": {"labels": ["a", "b"]}, "phase": [phase], "privacy": {"epsilon": 1.0, **privacy}}
    return plan_of(validate(RunConfig, tables, "test"), "run-1", "m" * 64, "a" * 64, "c" * 64)


def gate(plan: Plan) -> Gate:
    sites = {
        name: SiteDescription(name, PlanStatus.READY, None, "c" * 64, (), 8, size, state_privacy(plan, size))
        for name, size in (("north", 100), ("south", 400), ("west", 40))
    }
    return Gate(plan, 3, START, sites, {})


def noise(plan: Plan, size: int, seed: int = 0) -> np.ndarray:
    """An update without any gradient."""
    deviation = 4.0 * 0.5 * state_privacy(plan, size).phases[0].noise_multiplier / size
    return (deviation * np.random.default_rng(seed).standard_normal((8, 50))).astype(np.float32)


def judged(gate: Gate, site: str, array: np.ndarray, **changes: Any) -> Rejection | None:
    reply = Release(site, "run-1", 3, "d" * 64, {"x": array})
    return gate.verdict(replace(reply, **changes), site, "d" * 64, LAYOUT)


def test_an_update_of_its_noises_size_counts_and_ten_times_it_does_not() -> None:
    plan = planned()
    for site, size in (("north", 100), ("south", 400)):
        honest = noise(plan, size)
        assert judged(gate(plan), site, honest) is None
        assert judged(gate(plan), site, 10 * honest) is Rejection.OVERSIZE
        assert judged(gate(plan), site, -10 * honest) is Rejection.OVERSIZE


def test_each_site_is_judged_by_its_own_size() -> None:
    """A small site's noise is larger; from a large site the same update is too long."""
    plan = planned()
    assert judged(gate(plan), "west", noise(plan, 40)) is None
    assert judged(gate(plan), "south", noise(plan, 40)) is Rejection.OVERSIZE


def test_of_two_equal_updates_the_later_is_a_duplicate_whoever_sends_it() -> None:
    plan = planned()
    array = noise(plan, 400)
    for first, second in (("north", "south"), ("south", "north")):
        here = gate(plan)
        assert judged(here, first, array) is None
        assert judged(here, second, array.copy()) is Rejection.DUPLICATE
        assert judged(here, second, np.nextafter(array, np.float32(9))) is None


def test_a_copy_of_a_reply_that_was_admitted_before_a_resumption_is_told() -> None:
    plan = planned()
    here, array = gate(plan), noise(plan, 400)
    assert not here.is_copy({"x": array})
    assert judged(here, "north", array) is Rejection.DUPLICATE


def test_what_was_turned_away_makes_no_duplicate_of_another() -> None:
    plan = planned()
    here, array = gate(plan), noise(plan, 400)
    assert judged(here, "north", array, round=2) is Rejection.STALE
    assert judged(here, "north", array, request_digest="e" * 64) is Rejection.FOREIGN
    assert judged(here, "south", array) is None


def test_zeros_few_numbers_and_updates_without_noise_may_be_equal() -> None:
    zeros = np.zeros((8, 50), np.float32)
    here = gate(planned())
    assert judged(here, "north", zeros) is None and judged(here, "south", zeros) is None
    few = {"x": np.ones(LEAST_ENTRIES - 1, np.float32)}
    assert not here.is_copy(few) and not here.is_copy(few)
    many = {"x": np.ones(LEAST_ENTRIES, np.float32)}
    assert not here.is_copy(many) and here.is_copy(many)
    free = gate(planned(mechanism="none"))
    assert not free.is_copy(many) and not free.is_copy(many)


def test_hostile_sites_that_were_found_need_not_be_withstood_again() -> None:
    phase = planned().phases[0].model_copy(update={"hostile_sites": 3})
    honest_perhaps = {"a": "late", "b": "node-error", "c": "duplicate"}
    assert still_facing(phase, {}).hostile_sites == still_facing(phase, honest_perhaps).hostile_sites == 3
    found = dict(zip("defg", ("oversize", "layout", "stale", "foreign"), strict=True))
    assert still_facing(phase, {**honest_perhaps, "d": "oversize"}).hostile_sites == 2
    assert still_facing(phase, found).hostile_sites == 0
    for reason in ("unreadable", "wrong-site", "not-finite"):
        assert still_facing(phase, {"d": reason}).hostile_sites == 2
