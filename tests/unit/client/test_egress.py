"""The gate: exactly the round's tensors leave, as finite fp32, and of everything else an allow-list."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from client import egress
from client.privacy.ledger import Decision, PlanEntry, StoredRelease
from common.adapter import AdapterSpec
from common.errors import AdapterError
from common.messages import (
    Pending,
    PhaseStatement,
    PlanStatus,
    PrivacyStatement,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    TrainRequest,
)

SPEC = AdapterSpec.of("base", {"b": (2, 3), "a": (4,)})
UPDATE = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
STATEMENT = PrivacyStatement(
    8.0, 1e-5, "example", "add-remove-one", "prv", 3, (PhaseStatement("lora", 0.1, 2.0, 1.0, 3),)
)


def entry(decision: Decision, refusal: RefusalReason | None = None) -> PlanEntry:
    return PlanEntry("digest", "run", "{}", decision, refusal, STATEMENT, "2030-01-01T00:00:00+00:00")


def payload(*given: Any, **named: Any) -> bytes:
    """What leaves."""
    return egress.release(*given, **named).payload


def describe(stand: PlanEntry | RefusalReason, fixed_keys: bool = False) -> SiteDescription:
    return egress.description("north", stand, "code", ("causal-lm",), 8, 40, fixed_keys)


def test_a_release_is_the_update_unchanged() -> None:
    sent = load(payload(UPDATE, SPEC))
    assert {name: array.tolist() for name, array in sent.items()} == {
        "a": [0.0, 1.0, 2.0, 3.0],
        "b": [[1.0] * 3, [1.0] * 3],
    }
    assert {array.dtype for array in sent.values()} == {np.dtype("<f4")}


def test_equal_updates_make_equal_bytes_in_whatever_order_and_memory_they_come() -> None:
    other = {"b": np.asfortranarray(UPDATE["b"]), "a": UPDATE["a"].copy()}
    assert payload(other, SPEC) == payload(UPDATE, SPEC)


@pytest.mark.parametrize(
    "update",
    [
        {"a": UPDATE["a"]},
        {**UPDATE, "loss": np.zeros(1, np.float32)},
        {**UPDATE, "a": np.zeros(5, np.float32)},
        {**UPDATE, "b": np.ones((3, 2), np.float32)},
        {**UPDATE, "a": UPDATE["a"].astype(np.float64)},
        {**UPDATE, "a": UPDATE["a"].astype(np.float16)},
    ],
    ids=["one missing", "one too many", "longer", "transposed", "double", "half"],
)
def test_any_other_layout_does_not_leave(update: dict[str, np.ndarray]) -> None:
    with pytest.raises(AdapterError, match="release"):
        payload(update, SPEC)


def test_what_is_not_finite_leaves_as_zero_and_what_is_extreme_as_a_bound() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)
    assert load(payload({**UPDATE, "a": odd}, SPEC))["a"].tolist() == [0, 0, 0, np.float32(1e30)]
    low = np.array([-3e38, -1e30, 1e-45, 5], np.float32)
    assert load(payload({**UPDATE, "a": low}, SPEC))["a"].tolist() == low.clip(-1e30).tolist()


def test_minus_zero_leaves_as_zero() -> None:
    minus = {name: -np.zeros_like(array) for name, array in UPDATE.items()}
    plus = {name: np.zeros_like(array) for name, array in UPDATE.items()}
    assert np.signbit(minus["a"]).all()
    assert payload(minus, SPEC) == payload(plus, SPEC)


def test_a_nan_leaves_no_trace_of_its_bits() -> None:
    bits = np.array([0x7FC00000, 0xFFC12345, 0x7F800001, 0xFF800000], np.uint32)
    zeros = np.zeros(4, np.float32)
    assert payload({**UPDATE, "a": bits.view(np.float32)}, SPEC) == payload({**UPDATE, "a": zeros}, SPEC)


BOUNDS = {"loss": 2.5, "accuracy": 1.0}


def stored(means: dict[str, float] | None = None) -> StoredRelease:
    return StoredRelease(payload(UPDATE, SPEC, means or {}, BOUNDS if means else {}), '{"lines":3}')


def replied(release: StoredRelease) -> Release:
    request = TrainRequest("run", 3, "plan", UPDATE)
    return egress.reply("north", request, request.digest(), release)


def test_a_reply_repeats_the_request_and_adds_what_is_stored_alone() -> None:
    reply, request = replied(stored()), TrainRequest("run", 3, "plan", UPDATE)
    assert (reply.site, reply.run_id, reply.round, reply.request_digest) == ("north", "run", 3, request.digest())
    assert sorted(reply.update) == ["a", "b"]
    assert (reply.head, reply.metrics) == ('{"lines":3}', {})


def test_metrics_are_stored_beside_the_tensors_and_leave_apart_from_them_in_their_own_units() -> None:
    release = stored({"loss": 0.5, "accuracy": 0.25})
    assert {name: (array.dtype, array.shape) for name, array in load(release.payload).items()} == {
        "a": (np.dtype("<f4"), (4,)),
        "b": (np.dtype("<f4"), (2, 3)),
        "metrics/loss": (np.dtype("<f4"), ()),
        "metrics/accuracy": (np.dtype("<f4"), ()),
    }
    reply = replied(release)
    assert reply.metrics == {"loss": 1.25, "accuracy": 0.25}
    assert {name: array.tolist() for name, array in reply.update.items()} == {
        name: array.tolist() for name, array in UPDATE.items()
    }


def test_without_metrics_the_bytes_are_those_of_the_tensors() -> None:
    assert payload(UPDATE, SPEC, {}, {}) == save(UPDATE) == payload(UPDATE, SPEC)


@pytest.mark.parametrize(
    ("noisy", "sent"),
    [
        (-0.3, 0.0),
        (-0.0, 0.0),
        (1.7, 1.0),
        (1.0, 1.0),
        (np.nan, 0.0),
        (np.inf, 0.0),
        (-np.inf, 0.0),
        (1e300, 1.0),
        (1e-300, 0.0),
    ],
)
def test_a_metric_leaves_within_its_bounds_and_finite_whatever_noise_made_of_it(noisy: float, sent: float) -> None:
    metrics = replied(stored({"loss": noisy, "accuracy": noisy})).metrics
    assert metrics == {"loss": 2.5 * sent, "accuracy": sent}
    assert not any(np.signbit(value) for value in metrics.values())


def test_a_metric_leaves_as_the_nearest_fp32_number_and_within_its_bound_as_such() -> None:
    third = {"loss": 2 * np.log(3)}
    reply = replied(StoredRelease(payload(UPDATE, SPEC, {"loss": 5.0}, third), ""))
    assert reply.metrics == {"loss": float(np.float32(2 * np.log(3)))}


@pytest.mark.parametrize(
    "means",
    [{}, {"loss": 0.5}, {"loss": 0.5, "accuracy": 0.5, "count": 0.5}, {"loss": 0.5, "f1": 0.5}],
    ids=["none", "one missing", "one too many", "another"],
)
def test_other_metrics_than_the_plans_do_not_leave(means: dict[str, float]) -> None:
    with pytest.raises(AdapterError, match="release: metrics"):
        payload(UPDATE, SPEC, means, BOUNDS)


def test_metrics_that_no_plan_asks_for_do_not_leave() -> None:
    with pytest.raises(AdapterError, match="release: metrics"):
        payload(UPDATE, SPEC, {"loss": 0.5})


def test_no_reply_has_a_field_beyond_the_allow_list() -> None:
    fields = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Release, Refusal, Pending)}
    assert fields == {
        Release: {"site", "run_id", "round", "request_digest", "update", "head", "metrics", "schema_version"},
        Refusal: {"site", "reason"},
        Pending: {"site"},
    }
    assert egress.refuse("north", RefusalReason.BUDGET) == Refusal("north", RefusalReason.BUDGET)
    assert egress.pending("north") == Pending("north")


@pytest.mark.parametrize(
    ("stand", "status", "reason"),
    [
        (entry(Decision.APPROVED), PlanStatus.READY, None),
        (entry(Decision.WAITING), PlanStatus.WAITING, None),
        (entry(Decision.REFUSED, RefusalReason.BUDGET), PlanStatus.REFUSED, RefusalReason.BUDGET),
        (RefusalReason.CODE_MISMATCH, PlanStatus.REFUSED, RefusalReason.CODE_MISMATCH),
    ],
)
def test_a_description_shows_the_stand_and_a_statement_only_of_an_approved_plan(
    stand: PlanEntry | RefusalReason, status: PlanStatus, reason: RefusalReason | None
) -> None:
    shown = describe(stand)
    assert (shown.status, shown.refusal) == (status, reason)
    assert shown.privacy == (STATEMENT if status is PlanStatus.READY else None)
    assert (shown.site, shown.tasks, shown.max_rank, shown.public_size) == ("north", ("causal-lm",), 8, 40)


def test_with_fixed_keys_no_epsilon_is_claimed_and_all_else_is_stated() -> None:
    shown = describe(entry(Decision.APPROVED), fixed_keys=True).privacy
    assert shown == dataclasses.replace(STATEMENT, epsilon=None)
