"""Which tensors travel, and that the adapter a site makes of them is the one that was meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.algorithms import LOCAL_RULES
from common.errors import WireError
from common.messages import INITIAL, TrainRequest, tensor_digest
from common.plan import Plan
from common.requests import NOTHING, Held, Received, RoundRequest, kept_after, received, start_of, touched_before
from common.sections import PhaseSection, PrivacySection, WireSection
from common.tensor_groups import layer_of
from server.aggregation.low_rank import leading
from server.aggregation.registry import aggregator_for


@pytest.fixture(scope="module")
def model(adapted_model: Callable[..., AdaptedModel], tiny_bert: Path) -> AdaptedModel:
    return adapted_model(tiny_bert, lora={"r": 4, "layers": 2}, pooling="mean")


def phase(name: str, algorithm: str = "ffa", rounds: int = 2, **settings: Any) -> PhaseSection:
    return PhaseSection(
        **{"name": name, "rounds": rounds, "sample_rate": 1.0, "algorithm": algorithm, "train": ("lora",), **settings}
    )


HEAD = phase("head", train=("head",))


def plan_for(model: AdaptedModel, *phases: PhaseSection, **wire: str) -> Plan:
    return Plan(
        run_id="run",
        seed=3,
        data="default",
        model_digest=model.base.digest,
        task=model.task.settings,  # type: ignore[attr-defined]
        lora=model.lora,
        privacy=PrivacySection(epsilon=8.0),
        phases=phases,
        wire=WireSection(**wire),  # type: ignore[arg-type]
        adapter_digest=model.spec.digest(),
        code_digest="0" * 64,
    )


def groups(model: AdaptedModel, names: frozenset[str]) -> set[str]:
    found = {model.group_of(name) for name in names}
    assert names == {name for name in model.spec.names if model.group_of(name) in found}
    return {str(group) for group in found}


# ---- what the plan says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "touched", "kept"),
    [
        ("ffa", [set(), {"B"}, {"B"}], [set(), set()]),
        ("fedit", [set(), {"A", "B"}, {"A", "B"}], [set(), set()]),
        ("fedex", [set(), {"A", "B"}, {"A", "B"}], [set(), set()]),
        ("la-lora", [set(), {"A", "B"}, {"A", "B"}], [set(), set()]),
        ("rolora", [set(), {"B"}, {"A", "B"}], [set(), {"B"}]),
        ("fedsvd", [set(), {"A", "B"}, {"A", "B"}], [set(), set()]),
        ("flexlora", [set(), {"A", "B"}, {"A", "B"}], [set(), set()]),
    ],
)
def test_what_is_touched_and_kept_by_hand(
    model: AdaptedModel, algorithm: str, touched: list[set[str]], kept: list[set[str]]
) -> None:
    plan = plan_for(model, HEAD, phase("lora", algorithm))
    assert [groups(model, touched_before(plan, model, round)) for round in (1, 2)] == [set(), {"head"}]
    assert [groups(model, touched_before(plan, model, round)) for round in (3, 4, 5)] == [
        {"head"} | one for one in touched
    ]
    assert [groups(model, kept_after(plan, model, round)) for round in (1, 2, 3, 4)] == [
        set(),
        set(),
        *({"head"} | one for one in kept),
    ]


def test_a_phase_of_the_top_layer_leaves_the_other_as_it_was(model: AdaptedModel) -> None:
    plan = plan_for(model, phase("lora", rounds=1, layers=1), phase("all", rounds=1))
    assert {layer_of(name) for name in touched_before(plan, model, 2)} == {3}


@pytest.mark.parametrize("algorithm", sorted(LOCAL_RULES))
def test_what_no_round_has_touched_is_at_the_server_bit_for_bit_as_the_plan_starts(
    model: AdaptedModel, algorithm: str
) -> None:
    """Through rounds of large updates, with momentum and averaging where the algorithm takes them."""
    settings = {} if algorithm in ("fedex", "flexlora") else {"server_momentum": 0.9, "server_average": 0.5}
    plan = plan_for(model, HEAD, phase("lora", algorithm, rounds=3, layers=1, **settings))
    start = start_of(plan, model, model.spec)
    adapter, generator = dict(start), np.random.default_rng(0)
    for one in plan.phases:
        aggregator = aggregator_for(one)
        state = aggregator.init(adapter)
        for index in range(1, one.rounds + 1):
            for _ in range(2):
                trained = model.trained_in(one, index)
                update = {name: generator.standard_normal(start[name].shape).astype(np.float32) for name in trained}
                state = aggregator.accumulate(state, update, 1.0)
            state, _ = aggregator.finish(state)
            saved = aggregator.save(state)
            adapter = {
                name.removeprefix("adapter/"): array for name, array in saved.items() if name.startswith("adapter/")
            }
            round = index + (0 if one.name == "head" else 2)
            untouched = set(model.spec.names) - touched_before(plan, model, round + 1)
            assert untouched or LOCAL_RULES[algorithm].own_rank
            assert all(adapter[name].tobytes() == start[name].tobytes() for name in untouched)


def test_a_smaller_rank_starts_with_what_the_coordinator_sends_to_it(model: AdaptedModel) -> None:
    plan = plan_for(model, phase("lora", "flexlora"))
    whole = start_of(plan, model, model.spec)
    small = start_of(plan, model, model.spec.at_rank(2))
    assert {name: array.tobytes() for name, array in small.items()} == {
        name: array.tobytes() for name, array in leading(whole, 2).items()
    }


# ---- there and back -------------------------------------------------------------------------------------------------


def arrived(
    plan: Plan, model: AdaptedModel, request: TrainRequest, held: Held = NOTHING, rank: int = 4
) -> Received | None:
    return received(plan, model, model.spec.at_rank(rank), request, held)


def moved(plan: Plan, model: AdaptedModel, round: int, random: AdapterState) -> AdapterState:
    """A global adapter as it may be before a round."""
    start = start_of(plan, model, model.spec)
    return {**start, **{name: random[name] for name in touched_before(plan, model, round)}}


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("algorithm", sorted(LOCAL_RULES))
def test_in_full_and_in_part_make_the_same_adapter_and_the_same_request(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState], algorithm: str, form: str
) -> None:
    plan = plan_for(model, HEAD, phase("lora", algorithm), down=form)
    held, confirmed = NOTHING, {}
    adapter = moved(plan, model, 1, random_adapter(model))
    for round in range(1, 5):
        asked = RoundRequest.of(plan, model, round, adapter)
        in_full, in_part = asked.to({}), asked.to(confirmed)
        assert in_full.digest() == in_part.digest() == asked.digest()
        assert in_part.adapter.keys() <= in_full.adapter.keys()
        one, other = arrived(plan, model, in_full), arrived(plan, model, in_part, held)
        assert one is not None and other is not None
        assert one.digests == other.digests == asked.digests
        assert {name: array.tobytes() for name, array in one.adapter.items()} == {
            name: array.tobytes() for name, array in other.adapter.items()
        }
        untouched = set(model.spec.names) - touched_before(plan, model, round)
        assert all(one.adapter[name].tobytes() == adapter[name].tobytes() for name in untouched), "never rounded"
        held, confirmed = other.held(kept_after(plan, model, round)), dict(asked.confirmed)
        changed = random_adapter(model, seed=round)
        kept = kept_after(plan, model, round)
        adapter = {
            name: array if name in kept else changed[name] if name in touched_before(plan, model, round + 1) else array
            for name, array in adapter.items()
        }


def test_the_first_request_carries_no_tensor_and_what_is_held_does_not_travel_again(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    plan = plan_for(model, HEAD, phase("lora"))
    first = RoundRequest.of(plan, model, 1, start_of(plan, model, model.spec))
    assert first.to({}).adapter == {} and set(first.digests.values()) == {INITIAL}
    third = RoundRequest.of(plan, model, 3, moved(plan, model, 3, random_adapter(model)))
    assert {model.group_of(name) for name in third.to({}).adapter} == {"head"}
    fourth = RoundRequest.of(plan, model, 4, moved(plan, model, 4, random_adapter(model)))
    assert {model.group_of(name) for name in fourth.to(third.confirmed).adapter} == {"B"}


def test_a_tensor_that_changed_after_all_is_sent_although_the_site_holds_an_older_one(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    """A server that moves the head in a LoRA phase, say by momentum: bits decide, not the plan."""
    plan = plan_for(model, HEAD, phase("lora"))
    third = RoundRequest.of(plan, model, 3, moved(plan, model, 3, random_adapter(model)))
    held = arrived(plan, model, third.to({}))
    assert held is not None
    fourth = RoundRequest.of(plan, model, 4, moved(plan, model, 4, random_adapter(model, seed=9)))
    assert {model.group_of(name) for name in fourth.to(third.confirmed).adapter} == {"head", "B"}
    again = arrived(plan, model, fourth.to(third.confirmed), held.held(kept_after(plan, model, 3)))
    assert again is not None and again.digests == fourth.digests


def test_what_the_seed_gives_is_named_and_not_covered_by_the_digest(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's linear algebra may differ in the last bit."""
    plan = plan_for(model, phase("lora"))
    request = RoundRequest.of(plan, model, 1, start_of(plan, model, model.spec)).to({})
    other = {name: np.nextafter(array, np.float32(9)) for name, array in start_of(plan, model, model.spec).items()}
    monkeypatch.setattr("common.requests.start_of", lambda *_: other)
    there = arrived(plan, model, request)
    assert there is not None and there.adapter == other


def test_what_is_missing_or_another_is_told(model: AdaptedModel, random_adapter: Callable[..., AdapterState]) -> None:
    plan = plan_for(model, HEAD, phase("lora"))
    third = RoundRequest.of(plan, model, 3, moved(plan, model, 3, random_adapter(model)))
    whole = arrived(plan, model, third.to({}))
    assert whole is not None
    held = whole.held(kept_after(plan, model, 3))
    assert {model.group_of(name) for name in held.tensors} == {"head"}
    part = RoundRequest.of(plan, model, 4, moved(plan, model, 4, random_adapter(model))).to(third.confirmed)
    assert arrived(plan, model, part, held) is not None
    assert arrived(plan, model, part) is None, "a site that has started anew"
    older = Held(held.tensors, {name: tensor_digest(np.zeros(1)) for name in held.digests})
    assert arrived(plan, model, part, older) is None
    first = next(iter(part.adapter))
    bent = {**part.adapter, first: part.adapter[first] + np.float32(1)}
    assert arrived(plan, model, TrainRequest("run", 4, "p", bent, part.adapter_digest), held) is None


def test_a_tensor_that_is_named_as_the_start_although_it_was_trained_is_the_start_and_is_not_held(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    """A coordinator may put the head back; it cannot make a site hold the start under another's digest."""
    plan = plan_for(model, HEAD, phase("lora"))
    asked = RoundRequest.of(plan, model, 3, moved(plan, model, 3, random_adapter(model)))
    back = RoundRequest(asked.run_id, 3, asked.plan_digest, {}, dict.fromkeys(asked.digests, INITIAL), asked.kept)
    whole = arrived(plan, model, back.to({}))
    assert whole is not None
    start = start_of(plan, model, model.spec)
    assert {name: array.tobytes() for name, array in whole.adapter.items()} == {
        name: array.tobytes() for name, array in start.items()
    }
    assert whole.held(kept_after(plan, model, 3)) == NOTHING


Change = Callable[[Mapping[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    "change",
    [
        lambda sent: {**sent, "extra": np.zeros((2, 3), np.int8), "scale/extra": np.ones(2, np.float32)},
        lambda sent: {name: array for name, array in sent.items() if not name.startswith("scale/")},
        lambda sent: {name: array.astype(np.float32) for name, array in sent.items()},
        lambda sent: {n: np.full_like(a, np.nan) if n.startswith("scale/") else a for n, a in sent.items()},
        lambda sent: {n: np.full_like(a, 3e38) if n.startswith("scale/") else a for n, a in sent.items()},
        lambda sent: {name: array.ravel()[:-1] for name, array in sent.items()},
    ],
    ids=["one more", "no scales", "fp32", "nan", "huge", "shorter"],
)
def test_what_is_not_of_the_plans_layout_and_format_is_an_error(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState], change: Change
) -> None:
    plan = plan_for(model, HEAD, down="int8")
    request = RoundRequest.of(plan, model, 2, random_adapter(model)).to({})
    with pytest.raises(WireError):
        arrived(plan, model, TrainRequest("run", 2, "p", change(request.adapter), request.adapter_digest))


def test_sites_of_one_process_hold_equal_tensors_once(
    model: AdaptedModel, random_adapter: Callable[..., AdapterState]
) -> None:
    plan = plan_for(model, HEAD, phase("lora"), down="int8")
    request = RoundRequest.of(plan, model, 3, moved(plan, model, 3, random_adapter(model))).to({})
    kept = kept_after(plan, model, 3)
    one, other = (arrived(plan, model, request) for _ in range(2))
    assert one is not None and other is not None
    first, second = one.held(kept), other.held(kept)
    assert first.tensors and all(second.tensors[name] is array for name, array in first.tensors.items())
