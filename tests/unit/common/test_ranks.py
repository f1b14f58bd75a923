"""One adapter at several ranks: its layout, its scale, its start, and the model it is loaded into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, AdapterState, kaiming_rows, lora_pairs, rank_of
from common.cuts import INPUT
from common.errors import AdapterError
from common.plan import Plan
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

SPEC = AdapterSpec.of("base", {"x.lora_A.weight": (4, 6), "x.lora_B.weight": (5, 4), "head": (3, 4)})


def test_another_rank_changes_the_pairs_and_nothing_else() -> None:
    shapes = dict(SPEC.at_rank(2).shapes)
    assert shapes == {"x.lora_A.weight": (2, 6), "x.lora_B.weight": (5, 2), "head": (3, 4)}
    assert SPEC.at_rank(4) == SPEC and SPEC.at_rank(2).at_rank(4).digest() == SPEC.digest()
    assert SPEC.at_rank(2).digest() != SPEC.digest()


def test_the_rank_of_tensors_is_that_of_their_pairs() -> None:
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SPEC.at_rank(3).shapes}
    assert rank_of(tensors) == 3
    assert rank_of({"head": tensors["head"]}) is None
    assert lora_pairs(tensors) == (("x.lora_B.weight", "x.lora_A.weight"),)
    assert lora_pairs(["x.lora_B.weight", "head"]) == ()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_the_same_at_every_rank(rslora: bool) -> None:
    """alpha = 12, r = 4: 3, or 6 with rsLoRA; at rank 9 alpha is 27, or 18."""
    lora = LoraSection(r=4, alpha=12.0, use_rslora=rslora)
    assert lora.scale == (6.0 if rslora else 3.0)
    assert (lora.at_rank(9).r, lora.at_rank(9).alpha) == (9, 18.0 if rslora else 27.0)
    assert lora.at_rank(4) is lora
    for rank in range(1, 65):
        assert lora.at_rank(rank).scale == pytest.approx(lora.scale, rel=1e-15)


def test_a_smaller_adapter_starts_with_the_first_rows_of_a_larger_one() -> None:
    """So a site of any rank makes its own start from the public seed, and it is what the coordinator cuts out."""
    for rank in (1, 3, 7):
        assert np.array_equal(kaiming_rows(rank, 20, 5, "x"), kaiming_rows(8, 20, 5, "x")[:rank])


# ---- a loaded model -------------------------------------------------------------------------------------------------


def logits(model: AdaptedModel) -> torch.Tensor:
    ids = torch.arange(1, 13, device=model.base.placement.device).reshape(2, 6)
    with torch.no_grad():
        return model.top(ids, torch.ones_like(ids), INPUT)


def at_rank(model: AdaptedModel, rank: int, seed: int = 1) -> AdapterState:
    generator = np.random.default_rng(seed)
    shapes = model.spec.at_rank(rank).shapes
    return {name: (0.3 * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 12])
def test_an_adapter_of_another_rank_computes_as_a_model_made_for_it(
    tiny_bert: Path, adapted_model: Load, rank: int, rslora: bool
) -> None:
    lora: dict[str, Any] = {"r": 4, "alpha": 6.0, "use_rslora": rslora, "layers": 2}
    model = adapted_model(tiny_bert, lora=lora)
    other = adapted_model(tiny_bert, lora=model.lora.at_rank(rank).model_dump())
    state = at_rank(model, rank)
    model.load(state)
    other.load(state)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-6)
    assert other.spec == model.spec.at_rank(rank)


def test_after_another_rank_the_models_own_is_as_before(
    tiny_bert: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model(tiny_bert)
    own = random_adapter(model)
    model.load(own)
    before = logits(model)
    for rank in (9, 2):
        model.load(at_rank(model, rank))
        assert not torch.equal(logits(model), before)
    model.load(own)
    assert torch.equal(logits(model), before)
    assert all(np.array_equal(model.state()[name], own[name]) for name in own)


def test_pairs_of_two_ranks_are_refused(tiny_bert: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    mixed = {**at_rank(model, 4), lora_pairs(model.spec.names)[-1][0]: np.zeros((32, 2), np.float32)}
    with pytest.raises(
        AdapterError, match=r"adapter: '.*lora_B\.weight' is float32\[32, 2\], expected float32\[32, 4\]"
    ):
        model.load(mixed)


# ---- what a plan asks of a site -------------------------------------------------------------------------------------


def plan(*algorithms: str, **phase: Any) -> Plan:
    phases = tuple(
        PhaseSection(name=f"p{index}", rounds=1, sample_rate=1.0, algorithm=algorithm, **phase)
        for index, algorithm in enumerate(algorithms)
    )
    return Plan(
        run_id="run",
        seed=0,
        data="default",
        model_digest="m",
        task=TaskSection(name="causal-lm"),
        lora=LoraSection(r=8),
        privacy=PrivacySection(),
        phases=phases,
        adapter_digest="a",
        code_digest="c",
    )


def test_a_site_chooses_its_rank_only_where_every_lora_phase_lets_it() -> None:
    assert [plan("flexlora").rank_at(most) for most in (2, 8, 64)] == [2, 8, 8]
    assert [plan("flexlora", "flexlora").rank_at(most) for most in (2, 64)] == [2, 8]
    for algorithm in ("fedit", "ffa", "fedsvd", "rolora", "la-lora", "fedex"):
        assert plan(algorithm).rank_at(2) == plan("flexlora", algorithm).rank_at(2) == 8


def test_a_site_that_claims_no_rank_at_all_is_asked_for_one() -> None:
    assert plan("flexlora").rank_at(0) == plan("flexlora").rank_at(-5) == 1
