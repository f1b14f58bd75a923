"""What rounding takes away from a release stays at the site and goes into the next one, once and never twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from small_ledgers import approved, fund, open_ledger, rows
from small_sites import encoded, phase, plan_for, shown, site_for

from client import egress
from client.agent import Agent
from client.app import relay_train
from client.egress import Rounding
from client.privacy.sampling import RoundSecret
from client.site import Site
from common import number_formats, wire
from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, AdapterState
from common.messages import Refusal, RefusalReason, Release, TrainRequest
from common.number_formats import NumberFormat
from common.plan import Plan
from common.requests import RoundRequest, start_of, touched_before
from common.rpc import AgentAddress, RemoteSite
from common.sections import PhaseSection, WireSection

SPEC = AdapterSpec.of("base", {"a": (4,), "b": (384, 8)})
ROUNDS = 4


def update(seed: int) -> AdapterState:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SPEC.shapes}


def drawn(seed: int) -> number_formats.Draw:
    secret = RoundSecret.fixed(seed, "north", 1)
    return lambda name, n: secret.uniform(f"rounding {name}", 0, n)


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_is_kept_add_up_to_the_updates() -> None:
    """Σ sent + e = Σ u: nothing that rounding takes away is lost, and nothing is counted twice."""
    residual, sent = None, {name: np.zeros(shape) for name, shape in SPEC.shapes}
    for seed in range(6):
        rounding = Rounding("int8", drawn(seed), residual, SPEC.names)
        outgoing = egress.release(update(seed), SPEC, rounding=rounding)
        for name, array in number_formats.decode(load(outgoing.payload), SPEC, "int8").items():
            sent[name] += array
        residual = outgoing.residual
        assert residual is not None
    kept = load(residual)
    for name in SPEC.names:
        assert np.allclose(sent[name] + kept[name], sum(update(seed)[name] for seed in range(6)), atol=1e-5)
        assert 0 < np.abs(kept[name]).max() < 8 / 127, "less than one scale, however many rounds there were"


def test_the_residual_of_a_round_is_what_rounding_took_away_by_hand() -> None:
    """Scale 1, drawn always 0: each number goes down. The residual makes 1.75 + 0.75 = 2.5 of the second round."""
    spec = AdapterSpec.of("base", {"x": (3,)})
    zero: number_formats.Draw = lambda name, n: np.zeros(n)  # noqa: E731
    first = egress.release(
        {"x": np.array([127, 1.75, -0.25], np.float32)}, spec, rounding=Rounding("int8", zero, None, "x")
    )
    assert load(first.payload)["x"].tolist() == [127, 1, -1]
    assert load(first.residual or b"")["x"].tolist() == [0.0, 0.75, 0.75]
    second = egress.release(
        {"x": np.array([127, 1.75, 0], np.float32)}, spec, rounding=Rounding("int8", zero, first.residual, "x")
    )
    assert load(second.payload)["x"].tolist() == [127, 2, 0]
    assert load(second.residual or b"")["x"].tolist() == [0.0, 0.5, 0.75]


def test_tensors_that_do_not_feed_back_keep_nothing_and_add_nothing() -> None:
    before = egress.release(update(1), SPEC, rounding=Rounding("int8", drawn(1), None, SPEC.names)).residual
    outgoing = egress.release(update(2), SPEC, rounding=Rounding("int8", drawn(2), before, ("a",)))
    alone = egress.release(update(2), SPEC, rounding=Rounding("int8", drawn(2)))
    assert load(outgoing.residual or b"").keys() == {"a"} and alone.residual is None
    assert np.array_equal(load(outgoing.payload)["b"], load(alone.payload)["b"])
    assert not np.array_equal(load(outgoing.payload)["a"], load(alone.payload)["a"])


def test_a_tensor_that_waits_for_its_turn_keeps_its_residual() -> None:
    """As A and B do in ``rolora``."""
    both = egress.release(update(1), SPEC, rounding=Rounding("int8", drawn(1), None, SPEC.names)).residual
    only_a = SPEC.part(["a"])
    after = egress.release(
        {"a": update(2)["a"]}, only_a, rounding=Rounding("int8", drawn(2), both, SPEC.names)
    ).residual
    assert both is not None and after is not None
    assert np.array_equal(load(after)["b"], load(both)["b"])
    assert not np.array_equal(load(after)["a"], load(both)["a"])


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_the_size_of_a_release_is_the_formats_whatever_its_values(form: NumberFormat) -> None:
    hard = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0, 0.0]
    sizes = set()
    for value in (None, *hard):
        values = (
            update(1) if value is None else {name: np.full(shape, value, np.float32) for name, shape in SPEC.shapes}
        )
        outgoing = egress.release(values, SPEC, rounding=Rounding(form, drawn(1), None, SPEC.names))
        sizes.add(len(outgoing.payload))
        decoded = number_formats.decode(load(outgoing.payload), SPEC, form)
        assert all(np.isfinite(array).all() for array in decoded.values())
    assert len(sizes) == 1


def test_fp32_and_bf16_round_nothing_away_that_is_kept() -> None:
    for form in ("fp32", "bf16"):
        assert egress.release(update(1), SPEC, rounding=Rounding(form)).residual is None


# ---- the ledger -----------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    """Nothing after it is executed."""


def cut(*_: object, **__: object) -> None:
    raise PowerCut


def test_release_and_residual_are_stored_both_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = approved(open_ledger(tmp_path))
    ledger.record(fund(ledger, 1), b"first", residual=b"old")
    second = fund(ledger, 2)
    with monkeypatch.context() as patch:
        patch.setattr("client.privacy.rounds.count", cut)  # the last thing of the transaction
        with pytest.raises(PowerCut):
            ledger.record(second, b"second", residual=b"new")
    assert ledger.release("plan", 2, "request") is None
    assert ledger.residual("plan", "head") == b"old"
    assert rows(tmp_path, "SELECT payload FROM residuals") == [(b"old",)]
    ledger.record(second, b"second", residual=b"new")
    ledger.close()
    with open_ledger(tmp_path)._file.reading():  # as the next process finds it
        assert rows(tmp_path, "SELECT phase, payload FROM residuals") == [("head", b"new")]


def test_a_residual_is_of_its_phase_alone_and_ends_with_the_plan(tmp_path: Path) -> None:
    ledger = approved(open_ledger(tmp_path))
    ledger.record(fund(ledger, 1), b"release", residual=b"of the head")
    assert (ledger.residual("plan", "head"), ledger.residual("plan", "lora")) == (b"of the head", None)
    ledger.record(fund(ledger, 2, phase="lora"), b"release", residual=b"of the lora phase")
    assert (ledger.residual("plan", "head"), ledger.residual("plan", "lora")) == (None, b"of the lora phase")
    ledger.close_plan("plan", "it is over")
    assert rows(tmp_path, "SELECT * FROM residuals") == []
    assert b"of the lora phase" not in (tmp_path / "ledger.sqlite").read_bytes()
    ledger.close()


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(model: AdaptedModel) -> Plan:
    return quantised(model, phase(rounds=ROUNDS))


def quantised(model: AdaptedModel, *phases: PhaseSection, up: str = "int8", **settings: Any) -> Plan:
    return plan_for(model, phases, wire=WireSection(up=up), **settings)  # type: ignore[arg-type]


def ready(folder: Path, model: AdaptedModel, plan: Plan, seed: int = 5) -> Site:
    site = site_for(folder, model, encoded(model, 12), fixed_seed=seed)
    site.describe(shown(plan))
    return site


def asked(plan: Plan, model: AdaptedModel, round: int) -> TrainRequest:
    """The same adapter in every round, so that what differs is the site's."""
    generator, adapter = np.random.default_rng(3), start_of(plan, model, model.spec)
    touched = touched_before(plan, model, round)
    moved = {name: generator.standard_normal(adapter[name].shape).astype(np.float32) for name in sorted(touched)}
    return RoundRequest.of(plan, model, round, {**adapter, **moved}).to({})


def released(site: Site, plan: Plan, model: AdaptedModel, round: int) -> Release:
    reply = site.train(asked(plan, model, round))
    assert isinstance(reply, Release), reply
    return reply


def residual_of(site: Site, plan: Plan, name: str = "lora") -> AdapterState:
    stored = site.ledger.residual(plan.digest(), name)
    return {} if stored is None else load(stored)


def bits(update: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in update.items()}


def test_the_residual_is_of_the_noisy_update(model: AdaptedModel, plan: Plan, tmp_path: Path) -> None:
    """A twin with the same keys sends the noisy updates u in fp32: e ← (u + e) − Q(u + e), round by round. So nothing
    goes into the residual that the plan's ε has not paid for."""
    site = ready(tmp_path / "int8", model, plan)
    whole = quantised(model, phase(rounds=ROUNDS), up="fp32")
    twin = ready(tmp_path / "fp32", model, whole)
    before: AdapterState = {}
    for round in range(1, ROUNDS):
        reply, exact = released(site, plan, model, round), released(twin, whole, model, round).update
        spec = model.spec.part(exact)
        sent = number_formats.decode(reply.update, spec, "int8")
        after = residual_of(site, plan)
        assert after.keys() == set(exact)
        for name in exact:
            wanted = exact[name] + before.get(name, np.float32(0))
            assert np.array_equal(after[name], wanted - sent[name])
        before = after
    assert residual_of(twin, whole) == {}


def test_a_request_sent_again_gets_the_same_bytes_and_leaves_the_residual_alone(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    site = ready(tmp_path, model, plan)
    first, residual = released(site, plan, model, 1), residual_of(site, plan)
    for _ in range(2):
        assert bits(released(site, plan, model, 1).update) == bits(first.update)
        assert bits(residual_of(site, plan)) == bits(residual) != {}
    site.ledger.close()
    again = ready(tmp_path, model, plan)
    assert bits(released(again, plan, model, 1).update) == bits(first.update)
    assert bits(residual_of(again, plan)) == bits(residual)


@pytest.mark.parametrize(
    "where",
    ["client.egress.release", "client.privacy.rounds.record", "client.privacy.rounds.count"],
    ids=["after training, before the gate", "before the transaction", "at its end"],
)
def test_a_round_cut_off_before_its_release_is_stored_gives_the_same_release_from_the_old_residual(
    model: AdaptedModel, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The secret is on the disk, and rounding draws from it too."""
    whole = ready(tmp_path / "whole", model, plan)
    wanted = [bits(released(whole, plan, model, round).update) for round in (1, 2, 3)]
    site = ready(tmp_path / "cut", model, plan)
    assert bits(released(site, plan, model, 1).update) == wanted[0]
    old = bits(residual_of(site, plan))
    real = site.ledger.reserve
    site.ledger.reserve = lambda *given: _then(monkeypatch, where, real(*given))  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        site.train(asked(plan, model, 2))
    monkeypatch.undo()
    site.ledger.close()
    again = ready(tmp_path / "cut", model, plan, seed=99)  # another seed: the round's secret must come from the disk
    assert bits(residual_of(again, plan)) == old
    assert bits(released(again, plan, model, 2).update) == wanted[1]
    again.fixed_seed = 5
    assert bits(released(again, plan, model, 3).update) == wanted[2]


def _then(monkeypatch: pytest.MonkeyPatch, where: str, reservation: Any) -> Any:
    """The power is cut at that place, once the round is reserved."""
    monkeypatch.setattr(where, cut)
    return reservation


def test_a_new_phase_and_the_end_of_the_plan_drop_the_residual(model: AdaptedModel, tmp_path: Path) -> None:
    plan = quantised(model, phase("head", rounds=2, train=("head",)), phase("lora", rounds=2, train=("head", "lora")))
    site = ready(tmp_path, model, plan)
    released(site, plan, model, 1)
    assert residual_of(site, plan, "head")
    released(site, plan, model, 2)
    assert rows(tmp_path, "SELECT * FROM residuals") == [], "the last of its phase has no successor"
    released(site, plan, model, 3)
    assert residual_of(site, plan)
    released(site, plan, model, 4)
    assert rows(tmp_path, "SELECT * FROM residuals") == []


def test_a_phase_that_was_stopped_early_leaves_no_residual_to_the_next(model: AdaptedModel, tmp_path: Path) -> None:
    plan = quantised(model, phase("first", rounds=3), phase("second", rounds=3))
    site, fresh = ready(tmp_path / "both", model, plan), ready(tmp_path / "fresh", model, plan)
    released(site, plan, model, 1)
    assert residual_of(site, plan, "first")
    assert bits(released(site, plan, model, 4).update) == bits(released(fresh, plan, model, 4).update)
    assert rows(tmp_path / "both", "SELECT phase FROM residuals") == [("second",)]


@pytest.mark.parametrize("algorithm", ["fedsvd", "flexlora"])
def test_where_the_server_turns_the_frame_only_the_heads_residual_is_kept(
    model: AdaptedModel, tmp_path: Path, algorithm: str
) -> None:
    plan = quantised(model, phase(rounds=3, algorithm=algorithm))
    site = ready(tmp_path, model, plan)
    trained = {model.group_of(name) for name in number_formats.names_of(released(site, plan, model, 1).update)}
    assert "B" in trained
    assert {model.group_of(name) for name in residual_of(site, plan)} == {"head"}


def test_a_matrix_that_waits_for_its_turn_keeps_its_residual_over_the_round(
    model: AdaptedModel, tmp_path: Path
) -> None:
    plan = quantised(model, phase(rounds=4, algorithm="rolora", train=("lora",)))
    site = ready(tmp_path, model, plan)
    released(site, plan, model, 1)
    of_b = residual_of(site, plan)
    assert {model.group_of(name) for name in of_b} == {"B"}
    released(site, plan, model, 2)
    both = residual_of(site, plan)
    assert {model.group_of(name) for name in both} == {"A", "B"}
    assert bits({name: both[name] for name in of_b}) == bits(of_b)


def test_what_leaves_is_the_release_in_the_plans_format_and_never_the_residual(
    model: AdaptedModel, plan: Plan, tmp_path: Path
) -> None:
    site = ready(tmp_path, model, plan)
    for round in range(1, ROUNDS):
        reply = released(site, plan, model, round)
        spec = model.spec.part(model.trained_in(plan.phases[0], round))
        expected = number_formats.layout(spec, "int8")
        assert {name: (array.dtype, array.shape) for name, array in reply.update.items()} == expected
        record = wire.train_reply_to_record(reply)
        sent = b"".join(array.data for one in record.array_records.values() for array in one.values())
        kept = residual_of(site, plan)
        assert kept and not any(array.tobytes()[:64] in sent for array in kept.values())
    assert "residual" not in {one.name for one in fields(Release)}
    assert "residual" not in str(asdict(site.describe(shown(plan))))


# ---- what a site takes ----------------------------------------------------------------------------------------------


def _as_fp32(request: TrainRequest, spec: AdapterSpec) -> dict[str, np.ndarray]:
    return number_formats.decode(request.adapter, spec.part(number_formats.names_of(request.adapter)), "int8")


def _scales(value: float) -> Callable[[TrainRequest, AdapterSpec], dict[str, np.ndarray]]:
    return lambda request, _: {
        name: np.full_like(array, value) if name.startswith("scale/") else array
        for name, array in request.adapter.items()
    }


@pytest.mark.parametrize(
    "change",
    [_as_fp32, _scales(np.nan), _scales(np.inf), _scales(-1), _scales(3e38)],
    ids=["fp32", "not a number", "infinite", "negative", "overflowing"],
)
def test_a_request_in_another_format_or_with_scales_that_are_none_is_refused_and_costs_nothing(
    model: AdaptedModel, tmp_path: Path, change: Callable[[TrainRequest, AdapterSpec], dict[str, np.ndarray]]
) -> None:
    plan = plan_for(model, [phase(rounds=3)], wire=WireSection(down="int8"))
    site = ready(tmp_path, model, plan)
    request = asked(plan, model, 2)
    bent = TrainRequest("run", 2, plan.digest(), change(request, model.spec), request.adapter_digest)
    reply = site.train(bent)
    assert isinstance(reply, Refusal) and reply.reason is RefusalReason.ADAPTER_LAYOUT
    assert site.ledger.charges(plan.digest()) == []
    assert isinstance(site.train(request), Release)


def test_an_update_counts_from_the_adapter_as_it_was_decoded(model: AdaptedModel, tmp_path: Path) -> None:
    """The same site, once sent int8 and once sent in fp32 what that decodes to, computes the same."""
    plan, whole = (plan_for(model, [phase(rounds=3)], wire=WireSection(down=form)) for form in ("int8", "fp32"))
    rounded = asked(plan, model, 2)
    decoded = {**start_of(plan, model, model.spec), **_as_fp32(rounded, model.spec)}
    one = ready(tmp_path / "int8", model, plan).train(rounded)
    other = ready(tmp_path / "fp32", model, whole).train(RoundRequest.of(whole, model, 2, decoded).to({}))
    assert isinstance(one, Release) and isinstance(other, Release)
    assert bits(one.update) == bits(other.update)


# ---- what a site holds ----------------------------------------------------------------------------------------------


@pytest.fixture
def in_turn(model: AdaptedModel) -> Plan:
    """Head, then B and A in turn: much is held."""
    phases = (phase("head", rounds=1, train=("head",)), phase(rounds=4, algorithm="rolora", train=("lora",)))
    return plan_for(model, phases, wire=WireSection(down="int8", up="int8"))


def round_of(plan: Plan, model: AdaptedModel, round: int) -> RoundRequest:
    generator, adapter = np.random.default_rng(3), dict(start_of(plan, model, model.spec))
    for name in model.spec.names:
        moved = generator.standard_normal(adapter[name].shape).astype(np.float32)
        adapter[name] = moved if name in touched_before(plan, model, round) else adapter[name]
    return RoundRequest.of(plan, model, round, adapter)


def test_a_site_that_is_sent_only_what_changed_releases_the_same(
    model: AdaptedModel, in_turn: Plan, tmp_path: Path
) -> None:
    one, other = ready(tmp_path / "part", model, in_turn), ready(tmp_path / "full", model, in_turn)
    confirmed: Mapping[str, str] = {}
    left_out = 0
    for round in range(1, 6):
        request = round_of(in_turn, model, round)
        first, second = one.train(request.to(confirmed)), other.train(request.to({}))
        left_out += len(request.to({}).adapter) - len(request.to(confirmed).adapter)
        assert isinstance(first, Release) and isinstance(second, Release)
        assert first.request_digest == second.request_digest == request.digest()
        assert bits(first.update) == bits(second.update)
        confirmed = request.confirmed
    assert left_out > 0


def test_a_site_that_has_started_anew_says_what_is_missing_and_is_charged_for_nothing_until_it_has_it(
    model: AdaptedModel, in_turn: Plan, tmp_path: Path
) -> None:
    site = ready(tmp_path, model, in_turn)
    third, fourth = (round_of(in_turn, model, round) for round in (3, 4))
    assert isinstance(site.train(third.to({})), Release)
    site.ledger.close()
    again = ready(tmp_path, model, in_turn)
    reply = again.train(fourth.to(third.confirmed))
    assert isinstance(reply, Refusal) and reply.reason is RefusalReason.ADAPTER_MISSING
    assert [charge[0] for charge in again.ledger.charges(in_turn.digest())] == [3]
    full = again.train(fourth.to({}))
    assert isinstance(full, Release) and full.request_digest == fourth.digest()
    part = again.train(fourth.to(third.confirmed))
    assert isinstance(part, Release) and bits(part.update) == bits(full.update), "the same request, however it travels"


def test_what_a_site_holds_of_a_plan_it_forgets_when_that_is_closed(
    model: AdaptedModel, in_turn: Plan, tmp_path: Path
) -> None:
    site = ready(tmp_path, model, in_turn)
    other = plan_for(model, in_turn.phases, run_id="other", wire=in_turn.wire)
    site.describe(shown(other))
    for plan in (in_turn, other):
        assert isinstance(site.train(round_of(plan, model, 3).to({})), Release)
    assert set(site._held) == {in_turn.digest(), other.digest()}
    site.ledger.close_plan(in_turn.digest(), "it is over")
    assert isinstance(site.train(round_of(other, model, 4).to({})), Release)
    assert set(site._held) == {other.digest()}


def test_over_grpc_and_in_one_process_the_same_bytes_leave(model: AdaptedModel, in_turn: Plan, tmp_path: Path) -> None:
    """A simulation and a deployment differ in the transport alone: each round's record, through the real relay."""
    here, there = ready(tmp_path / "here", model, in_turn), ready(tmp_path / "there", model, in_turn)
    address = f"unix:{tmp_path / 'agent.sock'}"
    agent = Agent(there, address)
    agent.start()
    try:
        confirmed: Mapping[str, str] = {}
        for round in (1, 2, 3):
            request = round_of(in_turn, model, round)
            record = wire.train_request_to_record(request.to(confirmed))
            with RemoteSite(AgentAddress(address)) as remote:
                sent = [relay_train(record, service).array_records["tensors"] for service in (here, remote)]
            (one,), (other,) = (list(arrays.values()) for arrays in sent)
            assert (one.stype, one.data) == (other.stype, other.data) and one.stype == "safetensors+zlib"
            confirmed = request.confirmed
    finally:
        agent.stop(grace=0)
