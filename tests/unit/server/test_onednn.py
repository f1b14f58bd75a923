"""Evaluation by oneDNN gives what torch's own linear maps give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from torch.profiler import profile

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from server import onednn
from server.evaluation import Evaluator, held_out
from server.onednn import linear_maps

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

needs_onednn = pytest.mark.skipif(not onednn._known(), reason="oneDNN is of no use on this machine")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, no oneDNN is known, as on other machines."""
    return lambda: monkeypatch.setattr(onednn, "_known", lambda: False)


def maps_done(work: Callable[[], object]) -> int:
    """How many linear maps oneDNN does meanwhile."""
    with profile() as told:
        work()
    return sum(one.count for one in told.key_averages() if one.key == "mkldnn::_linear_pointwise")


@needs_onednn
@pytest.mark.parametrize(
    ("name", "layers", "seed"), [("tiny_bert", 2, 4), ("tiny_bert", None, 3), ("tiny_llama", 2, 4)]
)
def test_scores_and_metrics_are_those_of_torchs_own_linear_maps(
    name: str,
    layers: int | None,
    seed: int,
    request: pytest.FixtureRequest,
    triage_data: Path,
    adapted_model: Load,
    random_adapter: Draw,
    without: Callable[[], None],
) -> None:
    model = adapted_model(request.getfixturevalue(name), lora={"layers": layers})
    subject = Evaluator(model, {"test": held_out(model, str(triage_data), "test", {}, None)})
    state = random_adapter(model, seed)
    fast = subject.scores(state, "test")
    assert maps_done(lambda: subject.scores(state, "test")) > 0
    without()
    plain = subject.scores(state, "test")
    assert maps_done(lambda: subject.scores(state, "test")) == 0
    assert len(set(plain["predicted"])) > 1
    assert np.array_equal(fast["predicted"], plain["predicted"]) and np.array_equal(fast["label"], plain["label"])
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-5, atol=1e-5)
    assert subject.metrics_of(fast) == pytest.approx(subject.metrics_of(plain), rel=1e-5)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_is_that_of_higher_precision_whatever_its_shape(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    for shape, rows in (((3, 5, 16), 8), ((1, 384), 1536), ((32, 384), 8), ((7, 8), 1)):
        given = torch.randn(shape, generator=draw)
        weight = torch.randn(rows, shape[-1], generator=draw)
        added = torch.randn(rows, generator=draw) if bias else None
        with torch.no_grad(), linear_maps():
            found = linear(given, weight, added)
            turned = linear(given.transpose(0, -2), weight, added)  # not contiguous
        exact = given.double() @ weight.double().T + (0 if added is None else added.double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * shape[-1] ** 0.5)
        torch.testing.assert_close(turned.transpose(0, -2), found, rtol=1e-5, atol=1e-5 * shape[-1] ** 0.5)


@needs_onednn
def test_gradients_and_other_number_formats_are_left_to_torch() -> None:
    given, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    found: list[torch.Tensor] = []

    def others() -> None:
        with linear_maps():
            found.extend(torch.autograd.grad(linear(given, weight).sum(), weight))
            with torch.no_grad():
                linear(given.double(), weight.double())
                linear(given.bfloat16(), weight.bfloat16())
                with torch.autocast("cpu", torch.bfloat16):
                    linear(given, weight)

    assert maps_done(others) == 0
    torch.testing.assert_close(found[0], given.sum(dim=0).expand(3, 8))


def test_nothing_changes_where_it_is_not_known(without: Callable[[], None]) -> None:
    without()
    given, weight = torch.randn(4, 8), torch.randn(3, 8)
    with torch.no_grad(), linear_maps():
        found = linear(given, weight)
    assert torch.equal(found, linear(given, weight))
