"""A site's own LoRA rank: what its policy lets through, what it attaches, takes and gives."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft.tuners.lora import LoraLayer
from site_files import site_tables, write_site
from small_sites import (
    classifier,
    encoded,
    phase,
    plan_for,
    policy_for,
    random_state,
    request_for,
    shown,
    site_for,
)

from client.assemble import build_site
from client.config import read_site_config
from common.adapted import AdaptedModel
from common.adapter import lora_pairs
from common.messages import PlanStatus, Refusal, RefusalReason, Release
from common.sections import LoraSection
from server.aggregation.low_rank import leading

RANK = 2
"""What the site allows; the model's and the plan's rank is 4."""


def flexible(model: AdaptedModel, *algorithms: str, **settings: Any) -> Any:
    names = algorithms or ("flexlora",)
    return plan_for(model, [phase(f"p{k}", algorithm=name) for k, name in enumerate(names)], **settings)


def test_a_plan_above_the_sites_rank_is_welcome_only_where_the_site_may_choose(model: AdaptedModel) -> None:
    policy = policy_for(model, max_rank=RANK)
    assert policy.refusal(flexible(model)) is None
    assert policy.refusal(flexible(model, lora=LoraSection(r=1000, layers=2))) is None
    for algorithms in (("fedit",), ("fedex",), ("flexlora", "fedit")):
        assert policy.refusal(flexible(model, *algorithms)) is RefusalReason.POLICY


def test_a_site_takes_and_gives_its_own_rank_and_no_other(model: AdaptedModel, tmp_path: Path) -> None:
    site = site_for(tmp_path, model, encoded(model, 12), policy_for(model, max_rank=RANK))
    plan = flexible(model)
    assert site.describe(shown(plan)).status is PlanStatus.READY
    whole = random_state(model)
    for rank in (4, 3, 1):
        refusal = site.train(request_for(plan, leading(whole, rank)))
        assert isinstance(refusal, Refusal) and refusal.reason is RefusalReason.ADAPTER_LAYOUT
    release = site.train(request_for(plan, leading(whole, RANK)))
    assert isinstance(release, Release)
    model.spec.at_rank(RANK).check(release.update, "release")


def test_a_shared_model_gives_the_update_of_one_made_for_the_rank(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    """A simulation shares one model between ranks; an agent's is attached at the site's own."""
    plan, items, updates = flexible(model), encoded(model, 12), []
    own = classifier(tiny_bert, model.lora.at_rank(RANK))
    for name, one in (("shared", model), ("own", own)):
        policy = policy_for(model, max_rank=RANK)
        site = site_for(tmp_path / name, one, items, policy, fixed_seed=3)
        site.describe(shown(plan))
        release = site.train(request_for(plan, leading(random_state(model), RANK)))
        assert isinstance(release, Release)
        updates.append(release.update)
    assert any(np.any(array) for array in updates[0].values())
    for tensor, array in updates[0].items():
        np.testing.assert_allclose(updates[1][tensor], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_agent_attaches_its_own_rank_at_the_plans_scale(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, rslora: bool
) -> None:
    """A plan of an enormous rank costs a site no memory."""
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), ("mild cough", "routine"), ("chest pain", "urgent")])
    tables = site_tables(tiny_bert, device={"device": "cpu"})
    tables["policy"]["max_rank"] = RANK
    site, resident = build_site(read_site_config(write_site(tmp_path, tables)))
    lora = LoraSection(r=10**9, alpha=7e9, layers=2, use_rslora=rslora)
    attached = resident.model(flexible(model, lora=lora))
    assert {dict(attached.spec.shapes)[a][0] for _, a in lora_pairs(attached.spec.names)} == {RANK}
    scales = [module.scaling["default"] for module in attached.peft.modules() if isinstance(module, LoraLayer)]
    assert len(scales) == 4 and scales == pytest.approx([7e9 / (10**4.5 if rslora else 1e9)] * 4, rel=1e-12)
    site.ledger.close()
