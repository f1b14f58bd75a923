"""Metrics join the Gaussian mechanism of each step: what one unit moves, the noise, and what the figures mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load
from scipy import stats
from small_sites import (
    SECRET,
    classifier,
    encoded,
    flat,
    language_model,
    names_of,
    phase,
    plan_for,
    policy_for,
    random_state,
    request_for,
    shown,
    site_for,
    void_gradients,
)

from client.privacy.mechanism import DPSGD, NoPrivacy, PrivacyMechanism, mechanism_for
from client.privacy.metrics import row_metrics, unit_metrics
from client.privacy.noisy_sum import GridSum
from client.privacy.sampling import RoundSecret, poisson_sample
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.config import RunConfig
from common.cuts import INPUT
from common.examples import Batch, Examples
from common.messages import PhaseStatement, PlanStatus, Refusal, RefusalReason, Release, Tensors
from common.privacy.metrics import NoiseSplit, metric_bounds
from common.sections import PrivacySection
from common.tasks.base import Encoded
from common.toml_settings import validate
from server.progress import Bars
from simulations.simulate import simulate

BOTH = ("loss", "accuracy")
Items = Sequence[Encoded | None]
Build = Callable[..., AdaptedModel]
KINDS = pytest.mark.parametrize("kind", ["classifier", "language_model"])


@pytest.fixture
def build(tiny_bert: Path, tiny_llama: Path) -> Build:
    def built(kind: str, **settings: Any) -> AdaptedModel:
        return classifier(tiny_bert, **settings) if kind == "classifier" else language_model(tiny_llama, **settings)

    return built


@pytest.fixture
def model(tiny_bert: Path) -> AdaptedModel:
    return classifier(tiny_bert)


def exact(rate: float = 1.0, public_size: int = 1, secret: RoundSecret = SECRET, steps: int = 1) -> PrivacyMechanism:
    """DP-SGD with noise too small to see."""
    return DPSGD(PhaseStatement("phase", rate, 1e-30, 1.0, steps), public_size, secret, "fast", BOTH, 0.5)


def trained(
    model: AdaptedModel,
    items: Items | Examples,
    mechanism: PrivacyMechanism,
    received: Tensors | None = None,
    secret: RoundSecret = SECRET,
    steps: int = 1,
    most: int = 64,
) -> AdapterState:
    """One round of the real trainer. Its metrics stay with the mechanism."""
    return train_round(
        model,
        items if isinstance(items, Examples) else Examples(items, model.task),
        random_state(model) if received is None else received,
        phase(steps=steps, learning_rate=0.1),
        names_of(model, ("head", "B")),
        mechanism,
        secret,
        16 if isinstance(items, Examples) else 4,
        most,
    )


def measured(model: AdaptedModel, items: Items | Examples, mechanism: PrivacyMechanism | None = None) -> Any:
    """Sums of loss and accuracy over the units of one full-batch step, as shares of their bounds: [2]."""
    mechanism = mechanism or exact()
    trained(model, items, mechanism)
    return np.array([mechanism.means()[name] for name in BOTH])


def logits_of(model: AdaptedModel, item: Encoded) -> npt.NDArray[np.float64]:
    """Of one example in a pass of its own."""
    model.load(random_state(model))
    ids = torch.tensor(item.ids, dtype=torch.long)[None]
    with torch.no_grad():
        return model.top(ids, torch.ones_like(ids), INPUT)[0].double().numpy()


def partly_right(model: AdaptedModel, items: Items) -> list[Encoded]:
    """A random language model hardly ever predicts a token: every third one of its completions is made what it does."""
    found = [item for item in items if item is not None]
    if model.task.name != "causal-lm":
        return found
    changed = []
    for item in found:
        target, predicted = item.target.copy(), logits_of(model, item).argmax(-1)
        for place in range(1, len(target)):
            if target[place] != -100 and place % 3 == 0:
                target[place] = predicted[place - 1]
        changed.append(Encoded(item.ids, target))
    return changed


def alone(model: AdaptedModel, item: Encoded) -> npt.NDArray[np.float64]:
    """Loss and accuracy of one example by numpy, as shares of their bounds."""
    logits, target = logits_of(model, item), item.target
    if model.task.name == "causal-lm":
        logits, target = logits[:-1], target[1:]
        logits, target = logits[target != -100], target[target != -100]
    logits, target = np.atleast_2d(logits), np.atleast_1d(target)
    if not len(target):
        return np.zeros(2)
    chances = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    loss = float(np.mean(-chances[np.arange(len(target)), target]))
    accuracy = float(np.mean(logits.argmax(-1) == target))
    return np.array([min(1.0, loss / (2 * math.log(logits.shape[-1]))), accuracy])


def broken_at(item: Encoded | None, token: int) -> Encoded:
    assert item is not None
    ids = item.ids.copy()
    ids[1] = token
    return Encoded(ids, item.target)


# -------------------------------------------------------------------------------------------------------- the account


def test_the_noise_of_gradient_and_metrics_worked_out_by_hand() -> None:
    split = NoiseSplit(2, 0.2)
    assert split.gradient(2.0) == pytest.approx(2.2360679775)  # 2 / sqrt(0.8)
    assert split.metric(2.0) == pytest.approx(6.3245553203)  # 2 * sqrt(10)
    stated = PhaseStatement("phase", 0.5, 2.0, 1.0, 12)
    assert split.of_mean(stated, 4, 100) == pytest.approx(6.3245553203 / (2 * 50))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("metrics", [1, 2, 7])
def test_gradient_and_metrics_together_cost_what_the_ledger_holds(sigma: float, share: float, metrics: int) -> None:
    split = NoiseSplit(metrics, share)
    together = 1 / split.gradient(sigma) ** 2 + metrics / split.metric(sigma) ** 2
    assert together == pytest.approx(1 / sigma**2, rel=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_without_metrics_the_noise_is_the_ledgers_to_the_last_bit(share: float) -> None:
    assert NoiseSplit(0, share).gradient(0.7) == 0.7


def test_the_bounds_follow_from_the_number_of_outcomes_alone(build: Build) -> None:
    for kind, outcomes in (("classifier", 3), ("language_model", 259)):
        model = build(kind)
        assert model.task.outcomes(model.network) == outcomes
    assert metric_bounds(("accuracy", "loss"), 3) == {"accuracy": 1.0, "loss": pytest.approx(2.1972245773)}
    assert metric_bounds((), 3) == {}


# ------------------------------------------------------------------------------------------------- what one unit moves


@contextmanager
def sums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[npt.NDArray[np.float64], float]]]:
    """Watches each step's sum before its noise, and the deviation of the noise, both as executed."""
    seen: list[tuple[npt.NDArray[np.float64], float]] = []
    take = GridSum.take

    def taken(self: GridSum, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        whole = torch.cat(self._sums).double().numpy() * self.grid.spacing
        noisy = take(self, secret, step)
        drawn = torch.cat([each.flatten() for each in noisy]).double().numpy() - whole
        seen.append((whole, float(np.std(drawn))))
        return noisy

    with monkeypatch.context() as patch:
        patch.setattr(GridSum, "take", taken)
        yield seen


def whitened(
    model: AdaptedModel, items: Items, sigma: float, metrics: Sequence[str], share: float, monkeypatch: Any
) -> list[float]:
    """By how much each unit moves the joint sum of one step, in standard deviations of the noise as it was drawn."""
    statement = PhaseStatement("phase", 1.0, sigma, 0.03, 1)
    with sums(monkeypatch) as seen:
        for left_out in [None, *range(len(items))]:
            kept = [None if index == left_out else item for index, item in enumerate(items)]
            trained(model, kept, DPSGD(statement, 8, SECRET, "secure", metrics, share))
    (whole, deviation), *others = seen
    return [float(np.linalg.norm(whole - other)) / deviation for other, _ in others]


@pytest.mark.parametrize(("metrics", "share"), [(BOTH, 0.5), (BOTH, 0.05), (("loss",), 0.5), (("accuracy",), 0.3)])
def test_no_unit_moves_gradient_and_metrics_together_by_more_than_the_ledgers_noise_allows(
    model: AdaptedModel, metrics: tuple[str, ...], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deviation is known from a draw of some 600 values, so to 3 %; a share of 0.5 forgotten would show as 41 %."""
    sigma = 1.7
    moved = whitened(model, encoded(model, 8), sigma, metrics, share, monkeypatch)
    assert max(moved) <= 1.1 / sigma
    assert min(moved) > 0.6 / sigma, "all of them are clipped"


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_a_unit_whose_gradient_is_clipped_and_whose_metrics_are_all_one_moves_them_by_exactly_that(
    model: AdaptedModel, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigma, clip_norm, three = 1.7, 0.03, encoded(model, 3)
    ones = lambda logits, targets: torch.ones(len(targets))  # noqa: E731
    monkeypatch.setattr(model.task, "per_example_accuracy", ones)
    loss = model.task.per_example_loss
    monkeypatch.setattr(model.task, "per_example_loss", lambda logits, targets: loss(logits, targets) + 50.0)
    deviations = []
    statement = PhaseStatement("phase", 1.0, sigma, clip_norm, 1)
    with sums(monkeypatch) as seen:
        for items in (three, [*three[:2], None]):
            mechanism = DPSGD(statement, 8, SECRET, "secure", BOTH, share)
            trained(model, items, mechanism)
            deviations.append(mechanism._sum.deviation)  # type: ignore[attr-defined]
    (whole, drawn), (other, _) = seen
    moved = whole - other
    assert np.linalg.norm(moved[:-2]) == pytest.approx(clip_norm, rel=1e-5)
    assert drawn == pytest.approx(deviations[0], rel=0.1), "the noise that is drawn is the noise that is asked for"
    joint = float(np.linalg.norm(moved)) / deviations[0]
    assert 0.99999 / sigma < joint <= 1 / sigma


def test_metrics_of_a_unit_never_exceed_one_also_when_a_mean_rounds_up() -> None:
    rows = torch.full((7, 1), 1 / 7, dtype=torch.float32) * (1 + 1e-6)
    units = unit_metrics(rows, torch.zeros(7, dtype=torch.int64))
    assert float(rows.sum()) > 1 and units.tolist() == [[1.0]] + [[0.0]] * 6


# ------------------------------------------------------------------------------------------------------------ the noise


def released_without_data(rounds: int, steps: int, noise: str, share: float, learn: bool = False) -> Any:
    """Standardised noise of ``rounds`` releases at a site without data: gradient [rounds] and metrics [rounds, 2]."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    parameters = dict(network.named_parameters())
    statement = PhaseStatement("phase", 0.25, 1.3, 0.5, steps)
    gradients, metrics = [], []
    for number in range(rounds):
        before = next(iter(parameters.values())).detach().clone()
        mechanism = DPSGD(statement, 40, RoundSecret.fixed(5, "north", number), noise, BOTH, share)
        with mechanism.attach(network, parameters, torch.optim.SGD(parameters.values(), lr=10.0)):
            for step in range(steps):
                mechanism.step(step)
        gradients.append(float(before - next(iter(parameters.values())).detach()))
        metrics.append([mechanism.means()[name] for name in BOTH])
        torch.nn.utils.vector_to_parameters(before.flatten(), parameters.values())
    split = NoiseSplit(2, share)
    z = np.array(gradients) / (split.gradient(1.3) * 0.5 * math.sqrt(steps))
    return z, np.array(metrics) / split.of_mean(statement, steps, 40)


@pytest.mark.parametrize(("noise", "steps", "share"), [("secure", 1, 0.5), ("secure", 3, 0.05), ("fast", 2, 0.3)])
def test_released_noise_has_the_stated_deviation_and_all_of_it_is_independent(
    noise: str, steps: int, share: float
) -> None:
    rounds = 3000
    gradient, metrics = released_without_data(rounds, steps, noise, share)
    values = np.column_stack([gradient, metrics])
    for column in values.T:
        assert abs(np.std(column) - 1) < 5 / math.sqrt(2 * rounds)
        assert abs(np.mean(column)) < 5 / math.sqrt(rounds)
        assert stats.kstest(column, "norm").pvalue > 1e-6
    correlations = np.corrcoef(values.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(rounds)


def test_a_crash_measures_the_same_again_and_another_round_has_other_noise(model: AdaptedModel) -> None:
    statement = PhaseStatement("phase", 0.5, 1.0, 1.0, 2)
    found = []
    for secret in (SECRET, SECRET, RoundSecret.fixed(0, "site", 2)):
        mechanism = DPSGD(statement, 8, secret, "secure", BOTH, 0.05)
        update = trained(model, encoded(model, 8), mechanism, secret=secret, steps=2)
        found.append((mechanism.means(), flat(update).tobytes()))
    assert found[0] == found[1]
    assert found[0][0].keys() == found[2][0].keys() and not set(found[0][0].values()) & set(found[2][0].values())


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_without_metrics_the_share_changes_no_byte(model: AdaptedModel, noise: str) -> None:
    statement = PhaseStatement("phase", 0.5, 1.0, 1.0, 2)
    updates = [
        flat(trained(model, encoded(model, 8), mechanism_for(privacy, statement, 8, SECRET), steps=2)).tobytes()
        for privacy in (
            PrivacySection(noise=noise, metrics_share=0.5),  # type: ignore[arg-type]
            PrivacySection(noise=noise),  # type: ignore[arg-type]
        )
    ]
    plain = flat(trained(model, encoded(model, 8), DPSGD(statement, 8, SECRET, noise), steps=2)).tobytes()
    assert updates == [plain, plain]


# ------------------------------------------------------------------------------------------------ what the figures mean


@KINDS
def test_the_sums_are_those_of_each_example_alone(build: Build, kind: str) -> None:
    model = build(kind)
    items = partly_right(model, encoded(model, 10))
    expected = sum(alone(model, item) for item in items if item is not None)
    assert 0.5 < expected[0] < 9.5 and 0 < expected[1] < 10, "something is measured"
    for mechanism in (exact(), NoPrivacy(PhaseStatement("phase", 1.0, 0.0, 1.0, 1), 1, SECRET, BOTH)):
        assert measured(model, items, mechanism) == pytest.approx(expected, abs=1e-5)


@KINDS
def test_a_metric_of_a_row_depends_on_no_other_row(build: Build, kind: str) -> None:
    model = build(kind)
    items = [item for item in encoded(model, 3) if item is not None]
    targets = model.task.collate([item.target for item in items], 48)
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, *targets.shape, 7, generator=generator)
    targets = torch.where(targets < 0, targets, targets % 7)
    expected = model.task.per_example_accuracy(logits, targets)
    assert expected.shape == (3,) and expected.dtype == torch.float32
    for index in range(3):
        mine = (torch.arange(3) == index).view(-1, *[1] * (logits.dim() - 1))
        mixed = torch.where(mine, logits, others)
        assert torch.equal(model.task.per_example_accuracy(mixed, targets)[index], expected[index])


def test_a_loss_counts_up_to_its_bound(model: AdaptedModel) -> None:
    received = {name: array * 100 for name, array in random_state(model).items()}
    mechanism = exact()
    trained(model, encoded(model, 8), mechanism, received)
    wrong = 8 - round(mechanism.means()["accuracy"])
    assert wrong > 0 and mechanism.means()["loss"] == pytest.approx(wrong, abs=0.2), "each wrong one counts once"


@KINDS
def test_void_rows_and_rows_that_fill_a_batch_measure_nothing(build: Build, kind: str) -> None:
    model = build(kind)
    items = encoded(model, 5)
    assert measured(model, [items[0], None, *items[1:], None]) == pytest.approx(measured(model, items), abs=1e-6)
    assert np.abs([measured(model, [None] * 6), measured(model, [])]).max() < 1e-20, "noise alone"


@KINDS
@pytest.mark.parametrize("fault", ["not finite", "fails"])
@pytest.mark.parametrize("mechanism", [DPSGD, NoPrivacy])
def test_an_example_without_a_finite_loss_or_one_that_fails_contributes_zero_and_the_others_what_they_did(
    build: Build, kind: str, fault: str, mechanism: type[DPSGD] | type[NoPrivacy]
) -> None:
    def of_kind() -> PrivacyMechanism:
        nothing = PhaseStatement("phase", 1.0, 0.0, 1.0, 1)
        return exact() if mechanism is DPSGD else NoPrivacy(nothing, 1, SECRET, BOTH)

    model = build(kind)
    void_gradients(model, token=5)
    items = encoded(model, 8)
    token = 5 if fault == "not finite" else int(model.network.config.vocab_size) + 7
    broken, removed = [*items[:3], broken_at(items[3], token), *items[4:]], [*items[:3], None, *items[4:]]
    expected = measured(model, removed, of_kind())
    assert measured(model, broken, of_kind()) == pytest.approx(expected, abs=1e-5)
    assert measured(model, items, of_kind())[0] > expected[0] + 1e-3, "it would have counted"


def test_a_row_whose_loss_alone_is_not_finite_measures_nothing_of_its_unit(model: AdaptedModel) -> None:
    """A logit of minus infinity can have a finite gradient."""
    logits = torch.tensor([[1.0, 0, 0], [-torch.inf, 0, 0], [torch.nan, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    targets, weights = torch.zeros(5, dtype=torch.int64), torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0])
    batch = Batch(logits, logits, targets, weights, np.arange(4), np.array([0, 0, 1, 2]))
    losses = model.task.per_example_loss(logits, targets) * weights
    rows = row_metrics(BOTH, model.task, batch, logits, losses, 3)
    assert rows[0].tolist() == pytest.approx([0.5 * 0.5514447 / (2 * math.log(3)), 0.5])  # -ln(e / (e + 2))
    assert rows[4].tolist() == [0.0, 0.0], "a row that fills the batch"
    units = unit_metrics(rows, batch.slots())
    assert units[:2].tolist() == [[0.0, 0.0]] * 2 and units[2].tolist() == pytest.approx(
        [0.5514447 / (2 * math.log(3)), 1.0]
    )


def test_a_unit_whose_gradient_alone_is_not_finite_contributes_zero() -> None:
    rows = torch.full((4, 2), 0.5)
    gradients = [torch.ones(4, 3), torch.ones(4, 2)]
    gradients[0][1, 2], gradients[1][2, 0], gradients[1][3, 1] = torch.nan, torch.inf, 3e38
    found = unit_metrics(rows, None, gradients)
    assert found.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]


def test_a_unit_of_several_examples_counts_once_with_their_mean(model: AdaptedModel) -> None:
    items = [item for item in encoded(model, 9) if item is not None]
    units = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2])
    each = [alone(model, item) for item in items]
    expected = sum(np.mean([each[index] for index in np.flatnonzero(units == unit)], axis=0) for unit in range(3))
    assert measured(model, Examples(items, model.task, units=units)) == pytest.approx(expected, abs=1e-5)


def test_one_broken_example_silences_its_whole_unit(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    void_gradients(model, token=5)
    items = encoded(model, 6)
    units = np.array([0, 0, 1, 1, 1, 2])
    broken = [*items[:3], broken_at(items[3], 5), *items[4:]]
    gone = [item if unit != 1 else None for item, unit in zip(items, units, strict=True)]
    found, expected = (measured(model, Examples(each, model.task, units=units)) for each in (broken, gone))
    assert found == pytest.approx(expected, abs=1e-6)


def test_at_most_so_many_examples_of_a_unit_are_measured_and_they_are_those_that_are_learnt_from(
    model: AdaptedModel,
) -> None:
    items = [item for item in encoded(model, 6) if item is not None]
    examples = Examples(items, model.task, units=np.zeros(6, np.int64))
    seen = []
    for number in range(8):
        secret = RoundSecret.fixed(3, "north", number)
        mechanism = exact(secret=secret)
        trained(model, examples, mechanism, secret=secret, most=1)
        seen.append(mechanism.means()["loss"])
    each = [alone(model, item)[0] for item in items]
    assert all(min(abs(value - one) for one in each) < 1e-5 for value in seen)
    assert len({round(value, 5) for value in seen}) > 1, "drawn afresh"


def test_the_mean_is_over_the_drawn_units_and_all_steps_with_the_public_denominator(model: AdaptedModel) -> None:
    items = [item for item in encoded(model, 12) if item is not None]
    mechanism = exact(rate=0.4, public_size=50, steps=3)
    train_round(
        model,
        Examples(items, model.task),
        random_state(model),
        phase(steps=3, learning_rate=1e-12),
        names_of(model, ("head",)),
        mechanism,
        SECRET,
        4,
    )
    each = [alone(model, item) for item in items]
    total = sum(each[index] for step in range(3) for index in poisson_sample(12, 0.4, SECRET, step))
    found = [mechanism.means()[name] for name in BOTH]
    assert found == pytest.approx(total / (3 * 0.4 * 50), abs=1e-5)


def test_the_measured_adapter_is_the_one_in_training(model: AdaptedModel) -> None:
    """With large steps the second step's loss is that of the adapter after the first."""
    items = encoded(model, 8)
    losses = []
    for steps in (1, 2):
        mechanism = exact(steps=steps)
        trained(model, items, mechanism, steps=steps)
        losses.append(mechanism.means()["loss"] * steps)
    assert abs((losses[1] - losses[0]) - losses[0]) > 1e-4


# ----------------------------------------------------------------------------------------------------- site and run


def test_a_site_releases_the_plans_metrics_and_the_same_again_when_asked_again(
    model: AdaptedModel, tmp_path: Path
) -> None:
    plan = plan_for(model, privacy=PrivacySection(metrics=BOTH))
    site = site_for(tmp_path, model, encoded(model, 12), policy=policy_for(model, metrics=BOTH))
    assert site.describe(shown(plan)).status is PlanStatus.READY
    request = request_for(plan, random_state(model))
    first, again = site.train(request), site.train(request)
    assert isinstance(first, Release) and isinstance(again, Release)
    assert list(first.metrics) == ["accuracy", "loss"] and first.metrics == again.metrics
    bounds = metric_bounds(BOTH, 3)
    assert all(0 <= value <= bounds[name] * (1 + 1e-6) for name, value in first.metrics.items())
    assert not any(name.startswith("metrics/") for name in first.update)
    stored = site.ledger.release(plan.digest(), 1, request.digest())
    assert stored is not None and not isinstance(stored, RefusalReason)
    assert {"metrics/loss", "metrics/accuracy"} <= load(stored.payload).keys()


def test_a_site_whose_policy_does_not_list_them_refuses_the_plan(model: AdaptedModel, tmp_path: Path) -> None:
    plan = plan_for(model, privacy=PrivacySection(metrics=BOTH))
    site = site_for(tmp_path, model, encoded(model, 12), policy=policy_for(model, metrics=("loss",)))
    description = site.describe(shown(plan))
    assert (description.status, description.refusal) == (PlanStatus.REFUSED, RefusalReason.POLICY)
    reply = site.train(request_for(plan, random_state(model)))
    assert reply == Refusal("north", RefusalReason.POLICY)


def test_asking_for_metrics_changes_nothing_that_is_stated_or_charged(model: AdaptedModel, tmp_path: Path) -> None:
    statements = []
    for name, metrics in (("with", BOTH), ("without", ())):
        site = site_for(tmp_path / name, model, encoded(model, 12), policy=policy_for(model, metrics=BOTH))
        plan = plan_for(model, privacy=PrivacySection(metrics=metrics))
        statements.append((site.describe(shown(plan)).privacy, site.ledger.reserved("site")))
    assert statements[0] == statements[1]


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="a metric appears twice"):
        PrivacySection(metrics=("loss", "loss"))


@pytest.mark.parametrize("share", [0.0, -0.1, 0.51, 1.0, math.nan])
def test_the_share_of_the_metrics_lies_above_zero_and_is_at_most_a_half(share: float) -> None:
    with pytest.raises(ValueError, match="metrics_share"):
        PrivacySection(metrics_share=share)


def simulated(tiny_bert: Path, triage_data: Path, out: Path, **privacy: Any) -> dict[str, Any]:
    """A small federation; its first round starts from the same adapter whatever the mechanism."""
    tables = {
        "model": {"name": str(tiny_bert)},
        "task": {"name": "sequence-classification", "labels": ["urgent", "routine", "review"], "max_length": 32},
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 2},
        "privacy": privacy,
        "phase": [
            {"name": "head", "rounds": 2, "sample_rate": 1.0, "train": ["head"]},
            {"name": "lora", "rounds": 1, "steps": 2, "sample_rate": 0.5, "train": ["head", "lora"]},
        ],
    }
    console = Console(file=StringIO())
    return simulate(validate(RunConfig, tables, "test"), out, False, lambda title, rounds: Bars(title, rounds, console))


def test_a_simulation_shows_the_sites_metrics_and_under_privacy_they_are_the_exact_ones_plus_the_stated_noise(
    tiny_bert: Path, triage_data: Path, tmp_path: Path
) -> None:
    free = simulated(tiny_bert, triage_data, tmp_path / "free", mechanism="none", metrics=BOTH)
    private = simulated(tiny_bert, triage_data, tmp_path / "private", metrics=BOTH, metrics_share=0.4)
    rounds = [json.loads(line) for line in (tmp_path / "private" / "rounds.jsonl").read_text().splitlines()]
    assert rounds == private["rounds"] and "site_metrics" not in rounds[0]
    assert free["rounds"][1]["site_metrics_noise"] == {"loss": 0.0, "accuracy": 0.0}
    for name, bound in metric_bounds(BOTH, 3).items():
        one, other = (run["rounds"][1]["site_metrics"][name] for run in (free, private))
        noise = private["rounds"][1]["site_metrics_noise"][name]
        assert 0 < one < bound and one != other
        assert abs(one - other) < 5 * noise
        # By hand: three sites of 40, 25 and 12 weighted by size, q = 1, one step.
        sigma = next(iter(private["sites"].values()))["privacy"]["phases"][0]["noise_multiplier"]
        assert noise == pytest.approx(bound * sigma * math.sqrt(2 / 0.4) * math.sqrt(3) / 77)
    best = private["rounds"][private["best_round"]]
    assert private.get("site_metrics") == best.get("site_metrics")


def test_a_run_without_metrics_says_nothing_of_them(tiny_bert: Path, triage_data: Path, tmp_path: Path) -> None:
    summary = simulated(tiny_bert, triage_data, tmp_path / "out")
    assert "site_metrics" not in json.dumps(summary)
