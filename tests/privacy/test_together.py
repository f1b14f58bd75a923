"""Sites whose rows share passes of the base: each gets what it would get alone, and nothing of another's.

What a site gets alone (``Site.train``, itself checked against plain autograd and by brute force elsewhere) is the
expected value throughout. Both do the same arithmetic in another order, so they differ by rounding: a row lies in
another place of its batch, and a sum has another order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_sites import (
    classifier,
    encoded,
    language_model,
    names_of,
    phase,
    plan_for,
    policy_for,
    random_state,
    shown,
    site_for,
    void_gradients,
)

from client.privacy.linear_maps import OwnWeights, Rows
from client.privacy.noisy_sum import FloatSum
from client.privacy.per_sample import per_sample_gradients
from client.privacy.row_independence import Probed
from client.site import Site
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.errors import CoverageError
from common.examples import Examples
from common.messages import Release, TrainReply
from common.model import Placement
from common.plan import Plan
from common.requests import RoundRequest
from common.sections import LoraSection, PrivacySection
from common.tasks.base import Encoded
from simulations.together.serving import train_sites
from simulations.together.training import _Lane

TOLERANCE = 1e-5
"""Of each tensor of an update, relative to its largest entry."""
ROUNDING = 2.0**-22
"""What a weight of about one may differ by where an update was added to it in fp32 and taken off again."""

NONE = PrivacySection(mechanism="none", epsilon=None)
FAST = PrivacySection(noise="fast")

Items = Sequence[Encoded | None] | Callable[[], Examples]


@dataclass
class Pair:
    """Two sets of the same sites: with the same data, policies and seeds, and ledgers of their own."""

    plan: Plan
    model: AdaptedModel
    alone: list[Site]
    together: list[Site]

    def run(self, adapter: AdapterState, round: int = 1) -> tuple[list[AdapterState], list[AdapterState]]:
        """The updates of one round, one after the other and together."""
        request = RoundRequest.of(self.plan, self.model, round, adapter).to({})
        expected = [updates(site.train(request)) for site in self.alone]
        return expected, [updates(reply) for reply in train_sites([(site, request) for site in self.together])]


def updates(reply: TrainReply | Exception) -> AdapterState:
    """What a release says, its metrics under names of their own."""
    if isinstance(reply, Exception):
        raise reply
    assert isinstance(reply, Release), reply
    return dict(reply.update)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., Pair]:
    """``pair(model, plan, [items of each site])``."""

    probed = Probed()

    def build(model: AdaptedModel, plan: Plan, sites: Sequence[Items], rows: int = 4) -> Pair:
        def one(kind: str, number: int, items: Items) -> Site:
            privacy = {"allow_no_privacy": plan.privacy.mechanism == "none", "secure_noise": False}
            policy = policy_for(model, unit=plan.privacy.unit, metrics=("loss", "accuracy"), **privacy)
            site = site_for(tmp_path / kind / str(number), model, items, policy, fixed_seed=number, rows=rows)
            site.resources = replace(site.resources, probed=probed)
            site.describe(shown(plan))
            return site

        return Pair(plan, model, *([one(kind, *each) for each in enumerate(sites)] for kind in ("alone", "together")))

    return build


@pytest.fixture(autouse=True)
def fails_aloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that falls back to one site after the other would pass every comparison."""
    if "may_fall_back" in request.fixturenames:
        return

    def refuse(site: Site, work: Any) -> Any:
        if "together" in str(site.ledger.folder):
            raise AssertionError("the site was trained alone")
        return real(site, work)

    real = Site.trained
    monkeypatch.setattr(Site, "trained", refuse)


@pytest.fixture
def may_fall_back() -> None:
    """To be trained one after the other is what is tested."""


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a comparison is one of gradients, and not of the noise that both have."""
    monkeypatch.setattr(
        "client.privacy.noisy_sum.fast_gaussian", lambda key, deviation, n: torch.zeros(n, dtype=torch.float64)
    )


def apart(found: AdapterState, expected: AdapterState) -> float:
    """Largest deviation of any tensor, relative to its largest entry, above what fp32 weights cannot tell."""
    assert found.keys() == expected.keys()
    return max(
        max(0.0, float(np.abs(found[name] - array).max()) - ROUNDING) / max(float(np.abs(array).max()), ROUNDING)
        for name, array in expected.items()
    )


def assert_alike(expected: Sequence[AdapterState], found: Sequence[AdapterState]) -> None:
    assert len(expected) == len(found) > 1
    assert max(apart(other, one) for one, other in zip(expected, found, strict=True)) <= TOLERANCE


def assert_all_learn(expected: Sequence[AdapterState]) -> None:
    """Every tensor of every site moves, and no site as another does."""
    for number, update in enumerate(expected):
        assert all(np.abs(array).max() > 0 for array in update.values())
        for other in expected[:number]:
            assert apart(update, other) > 0.01


UNEQUAL = (40, 7, 23, 90)
"""Rows of the sites, and so sizes of their batches."""


def ragged(model: AdaptedModel, sizes: Sequence[int] = UNEQUAL) -> list[list[Encoded | None]]:
    """Examples of each site, in several length buckets."""
    return [encoded(model, size, seed=number) for number, size in enumerate(sizes)]


# ------------------------------------------------------------------------------------------- the same as one at a time


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(
    ("layers", "algorithm", "privacy"),
    [(None, "fedit", FAST), (None, "la-lora", NONE), (2, "fedit", NONE), (2, "la-lora", FAST), (2, "ffa", FAST)],
    ids=lambda value: str(getattr(value, "mechanism", value)),
)
def test_a_classifier_gets_the_update_it_would_get_alone(
    pair: Callable[..., Pair], tiny_bert: Path, layers: int | None, algorithm: str, privacy: PrivacySection
) -> None:
    """All layers start from token ids, two of four from the cached prefix."""
    model = classifier(tiny_bert, LoraSection(r=4, alpha=8.0, layers=layers))
    plan = plan_for(model, [phase(algorithm=algorithm, steps=3, learning_rate=0.5)], privacy=privacy)
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert_all_learn(expected)
    assert_alike(expected, found)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(("layers", "privacy"), [(None, FAST), (2, NONE)], ids=["dp", "none"])
def test_a_language_model_gets_the_update_it_would_get_alone(
    pair: Callable[..., Pair], tiny_llama: Path, layers: int | None, privacy: PrivacySection
) -> None:
    model = language_model(tiny_llama, LoraSection(r=4, alpha=8.0, layers=layers))
    plan = plan_for(model, [phase(train=("lora",), algorithm="fedit", learning_rate=0.5)], privacy=privacy)
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert_all_learn(expected)
    assert_alike(expected, found)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("privacy", [FAST, NONE], ids=["dp", "none"])
def test_a_head_on_cached_features_gets_the_update_it_would_get_alone(
    pair: Callable[..., Pair], tiny_bert: Path, privacy: PrivacySection
) -> None:
    model = classifier(tiny_bert)
    plan = plan_for(model, [phase("head", train=("head",), sample_rate=1.0, learning_rate=0.5)], privacy=privacy)
    adapter = model.initial_state(0, True)
    assert model.cut_for(names_of(model, ["head"]), adapter).layer is None
    expected, found = pair(model, plan, ragged(model, (40, 7, 300, 90))).run(adapter)
    assert_all_learn(expected)
    assert_alike(expected, found)


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_with_noise_each_site_still_gets_its_own(pair: Callable[..., Pair], tiny_bert: Path, noise: str) -> None:
    model = classifier(tiny_bert)
    plan = plan_for(model, privacy=PrivacySection(noise=noise))
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert_all_learn(expected)
    assert_alike(expected, found)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adamw", "learning_rate": 0.01}, {"smoothing": 1.0}, {"proximal": 0.3}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("algorithm", ["la-lora"])
def test_each_site_has_an_optimiser_of_its_own(
    pair: Callable[..., Pair], tiny_bert: Path, algorithm: str, settings: dict[str, Any]
) -> None:
    model = classifier(tiny_bert)
    plan = plan_for(model, [phase(algorithm=algorithm, steps=4, **settings)], privacy=FAST)
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert_alike(expected, found)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("privacy", [FAST, NONE], ids=["dp", "none"])
def test_a_unit_of_several_examples_is_clipped_as_one(
    pair: Callable[..., Pair], tiny_bert: Path, privacy: PrivacySection
) -> None:
    model = classifier(tiny_bert)
    privacy = privacy.model_copy(update={"unit": "patient", "max_examples_per_unit": 3})
    plan = plan_for(model, [phase(sample_rate=0.5, learning_rate=0.5)], privacy=privacy)

    def patients(seed: int, count: int) -> Callable[[], Examples]:
        examples = Examples(
            encoded(model, count, seed), model.task, units=np.random.default_rng(seed).integers(0, count // 3, count)
        )
        return lambda: examples

    sites = [patients(seed, count) for seed, count in enumerate((40, 12, 61))]
    expected, found = pair(model, plan, sites).run(random_state(model))
    assert_all_learn(expected)
    assert_alike(expected, found)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("privacy", [FAST, NONE], ids=["dp", "none"])
def test_recomputed_layers_meet_the_same_sites_weights(
    pair: Callable[..., Pair], tiny_llama: Path, privacy: PrivacySection
) -> None:
    placement = Placement.choose("cpu", gradient_checkpointing=True)
    model = language_model(tiny_llama, placement=placement)
    plan = plan_for(model, [phase(train=("lora",), algorithm="fedit")], privacy=privacy)
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert_alike(expected, found)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "none"])
def test_metrics_are_each_sites_own(pair: Callable[..., Pair], tiny_bert: Path, mechanism: str) -> None:
    model = classifier(tiny_bert)
    privacy = NONE if mechanism == "none" else FAST
    plan = plan_for(model, privacy=privacy.model_copy(update={"metrics": ("loss", "accuracy")}))
    both = pair(model, plan, ragged(model))
    request = RoundRequest.of(plan, model, 1, random_state(model)).to({})
    expected = [site.train(request).metrics for site in both.alone]  # type: ignore[union-attr]
    found = [reply.metrics for reply in train_sites([(site, request) for site in both.together])]  # type: ignore[union-attr]
    assert len({metrics["loss"] for metrics in expected}) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE)


def test_rounds_follow_each_other_as_alone(pair: Callable[..., Pair], tiny_bert: Path) -> None:
    """What a site holds between rounds, and its own rounding residual, are as if it had been asked alone."""
    model = classifier(tiny_bert)
    both = pair(model, plan_for(model, [phase(algorithm="rolora")], privacy=FAST), ragged(model))
    adapter = random_state(model)
    for round in (1, 2, 3):
        expected, found = both.run(adapter, round)
        assert_alike(expected, found)
        adapter = {name: array + expected[0].get(name, 0) for name, array in adapter.items()}


# -------------------------------------------------------------------------------------------- nothing of another's data


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_a_site_without_examples_releases_its_own_noise_to_the_bit(
    pair: Callable[..., Pair], tiny_bert: Path, noise: str
) -> None:
    """Of an empty batch nothing is left to round: any bit of another site's rows, or of its noise, would show."""
    model = classifier(tiny_bert)
    plan = plan_for(model, privacy=PrivacySection(noise=noise))
    expected, found = pair(model, plan, [[], *ragged(model), []]).run(random_state(model))
    assert_alike(expected, found)
    for number in (0, -1):
        assert all(np.array_equal(found[number][name], array) for name, array in expected[number].items())


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(("layers", "privacy"), [(None, NONE), (2, FAST)], ids=["none", "dp"])
def test_other_rows_at_one_site_leave_the_others_updates_the_same_to_the_bit(
    pair: Callable[..., Pair], tiny_bert: Path, layers: int | None, privacy: PrivacySection
) -> None:
    """The rows keep their lengths, so every other row stays in its place; only then can bits be the same."""
    model = classifier(tiny_bert, LoraSection(r=4, alpha=8.0, layers=layers))
    plan = plan_for(model, [phase(steps=3, learning_rate=0.5)], privacy=privacy)
    items = ragged(model)
    changed = [[_other_text(item, model) for item in items[0]], *items[1:]]
    _, before = pair(model, plan, items).run(random_state(model))
    again = pair(model, plan_for(model, [phase(steps=3, learning_rate=0.5)], "again", privacy=privacy), changed)
    _, after = again.run(random_state(model))
    assert apart(after[0], before[0]) > 0.01
    for one, other in zip(before[1:], after[1:], strict=True):
        assert all(np.array_equal(other[name], array) for name, array in one.items())


def _other_text(item: Encoded | None, model: AdaptedModel) -> Encoded:
    assert item is not None
    low, high = 6, int(model.network.config.vocab_size)
    return Encoded(low + (item.ids - low + 17) % (high - low), (item.target + 1) % 3)


@pytest.mark.usefixtures("no_noise")
def test_other_rows_of_other_lengths_leave_the_others_updates_the_same_but_for_rounding(
    pair: Callable[..., Pair], tiny_bert: Path
) -> None:
    """Rows then lie in other places, and a matrix product may round the last bit otherwise there."""
    model = classifier(tiny_bert)
    plans = [plan_for(model, [phase(steps=3, learning_rate=0.5)], run, privacy=FAST) for run in ("one", "two")]
    items = ragged(model)
    _, before = pair(model, plans[0], items).run(random_state(model))
    _, after = pair(model, plans[1], [encoded(model, 60, seed=99), *items[1:]]).run(random_state(model))
    assert apart(after[0], before[0]) > 0.01
    for one, other in zip(before[1:], after[1:], strict=True):
        assert apart(other, one) <= 1e-6


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("train", [("head",), ("lora",)])
def test_rows_that_meet_another_sites_weights_would_be_noticed(
    pair: Callable[..., Pair], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, train: tuple[str, ...]
) -> None:
    """The tests above can fail: with every row given to the next site, they do."""
    model = classifier(tiny_bert)
    plan = plan_for(model, [phase(train=train, steps=3, learning_rate=0.5)], privacy=FAST)
    right = Rows.of
    monkeypatch.setattr(
        Rows,
        "of",
        staticmethod(lambda sites, device: right([((site + 1) % len(UNEQUAL), n) for site, n in sites], device)),
    )
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    assert max(apart(other, one) for one, other in zip(expected, found, strict=True)) > 100 * TOLERANCE


# ------------------------------------------------------------------------------------------------------ what goes wrong


POISON = 5


def poisoned(model: AdaptedModel) -> list[list[Encoded | None]]:
    """The second site has four units whose text contains a token that no other text contains."""
    sites = ragged(model)
    for number in range(4):
        item = sites[1][number]
        assert item is not None
        sites[1][number] = Encoded(np.append(item.ids, POISON).astype(np.int32), item.target)
    return sites


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(
    ("how", "layers", "privacy"),
    [("not a number", 2, FAST), ("not a number", None, NONE), ("an error", None, FAST), ("an error", 2, NONE)],
    ids=lambda value: str(getattr(value, "mechanism", value)),
)
def test_a_unit_that_fails_contributes_zero_to_its_own_site_alone(
    pair: Callable[..., Pair],
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    layers: int | None,
    privacy: PrivacySection,
) -> None:
    monkeypatch.setattr(Probed, "fault", lambda self, model, names, rows: "")  # its tokens are random
    model = classifier(tiny_bert, LoraSection(r=4, alpha=8.0, layers=layers))
    plan = plan_for(model, [phase(sample_rate=1.0, learning_rate=0.5)], privacy=privacy)
    fine = pair(
        model, plan_for(model, [phase(sample_rate=1.0, learning_rate=0.5)], "fine", privacy=privacy), ragged(model)
    )
    _, without = fine.run(random_state(model))
    if how == "not a number":
        void_gradients(model, POISON)
    else:
        fail_on(model, POISON)
    expected, found = pair(model, plan, poisoned(model)).run(random_state(model))
    assert_all_learn(expected)
    assert_alike(expected, found)
    assert apart(found[1], without[1]) > 0.01
    for number in (0, 2, 3):
        assert apart(found[number], without[number]) <= TOLERANCE


def fail_on(model: AdaptedModel, token: int) -> None:
    """Every pass that contains the token fails."""
    embedding: Any = model.network.get_input_embeddings()
    plain = embedding.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        if bool((ids == token).any()):
            raise RuntimeError("a text that cannot be read")
        result: torch.Tensor = plain(ids)
        return result

    embedding.forward = forward


@pytest.mark.usefixtures("no_noise")
def test_gradients_that_a_mechanism_cannot_add_are_that_units_alone(
    pair: Callable[..., Pair], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that fails has added nothing; the units are then tried one by one, and none is counted twice."""
    model = classifier(tiny_bert)
    both = pair(model, plan_for(model, [phase(learning_rate=0.5)], privacy=FAST), ragged(model))
    real = FloatSum.add

    def add(self: Any, gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> None:
        if int((gradients[0].abs().sum(dim=1) > 0).sum()) > 1:
            raise RuntimeError("only one unit at a time")
        real(self, gradients, factors)

    monkeypatch.setattr(FloatSum, "add", add)
    request = RoundRequest.of(both.plan, model, 1, random_state(model)).to({})
    found = [updates(reply) for reply in train_sites([(site, request) for site in both.together])]
    monkeypatch.setattr(FloatSum, "add", real)
    assert_alike([updates(site.train(request)) for site in both.alone], found)


# -------------------------------------------------------------------------------------------------- falling back, books


@pytest.mark.usefixtures("may_fall_back")
def test_sites_with_dropout_are_trained_one_after_the_other(pair: Callable[..., Pair], tiny_bert: Path) -> None:
    model = classifier(tiny_bert, LoraSection(r=4, alpha=8.0, layers=2, dropout=0.3))
    plan = plan_for(model, privacy=NONE)
    expected, found = pair(model, plan, ragged(model)).run(random_state(model))
    for one, other in zip(expected, found, strict=True):
        assert all(np.array_equal(other[name], array) for name, array in one.items())


@pytest.mark.usefixtures("may_fall_back")
@pytest.mark.parametrize("error", [CoverageError("no"), RuntimeError("no"), torch.OutOfMemoryError("no")])
def test_a_group_that_fails_is_trained_one_after_the_other_from_the_same_secrets(
    pair: Callable[..., Pair], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It fails after the first step, when every mechanism has drawn and every optimiser has moved."""
    model = classifier(tiny_bert)
    both = pair(model, plan_for(model, [phase(steps=2)]), ragged(model))
    stepped: list[int] = []
    real = _Lane.batches

    def batches(self: Any, step: int, cut: Any) -> Iterator[Any]:
        stepped.append(step)
        if step == 1:
            raise error
        return real(self, step, cut)

    monkeypatch.setattr(_Lane, "batches", batches)
    expected, found = both.run(random_state(model))
    assert 1 in stepped
    for one, other in zip(expected, found, strict=True):
        assert all(np.array_equal(other[name], array) for name, array in one.items())


def test_modules_that_cannot_have_weights_for_each_site_are_refused(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    model.peft.requires_grad_(False)
    norm = next(module for module in model.network.modules() if isinstance(module, torch.nn.LayerNorm))
    norm.weight.requires_grad_(True)
    own = OwnWeights({norm.weight: torch.ones(2, *norm.weight.shape)})
    with (
        pytest.raises(CoverageError, match="sites_per_pass"),
        per_sample_gradients(model.peft, {"norm": norm.weight}, own),
    ):
        pass


def test_ledgers_and_audit_logs_are_those_of_sites_asked_alone(pair: Callable[..., Pair], tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    both = pair(model, plan_for(model), ragged(model))
    both.run(random_state(model))
    both.run(random_state(model), 2)
    for alone, together in zip(both.alone, both.together, strict=True):
        assert [*_audit(alone)] == [*_audit(together)]
        assert _rows(alone) == _rows(together)
        assert [one for one, _ in _audit(together)].count("round released") == 2


def _audit(site: Site) -> Iterator[tuple[str, Any]]:
    """Events and what they say, without what is drawn or measured anew by every site."""
    for line in site.audit.path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        yield entry["event"], {key: entry.get(key) for key in ("run", "round", "plan", "request", "size", "decision")}


def _rows(site: Site) -> dict[str, int]:
    """How many rows each table of the ledger has."""
    with sqlite3.connect(site.ledger.folder / "ledger.db") as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {table: db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in tables}


def test_a_round_that_is_asked_for_again_is_the_stored_one(pair: Callable[..., Pair], tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    both = pair(model, plan_for(model), ragged(model))
    _, first = both.run(random_state(model))
    _, again = both.run(random_state(model))
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(other[name], array) for name, array in one.items())
