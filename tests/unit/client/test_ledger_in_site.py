"""The ledger beneath a site's rounds: nothing is computed that is not charged, and a crash repeats the same release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_ledgers import rows, secrets_in
from small_sites import (
    classifier,
    encoded,
    flat,
    phase,
    plan_for,
    policy_for,
    random_state,
    request_for,
    shown,
    site_for,
)

import client.site
from client.privacy.sampling import RoundSecret
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.messages import RefusalReason, Release

REPOSITORY = Path(__file__).parents[3]


def test_no_gradient_is_computed_before_charge_and_secret_are_stored(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model)
    site = site_for(tmp_path, model, encoded(model, 8))
    site.describe(shown(plan))
    seen = []
    real = client.site.train_round

    def watched(*arguments: Any, **settings: Any) -> AdapterState:
        (charge,) = rows(tmp_path, "SELECT round, phase, sample_rate, steps, released_at FROM charges")
        seen.append((charge, [len(value) for value in secrets_in(tmp_path).values()]))
        return real(*arguments, **settings)

    monkeypatch.setattr(client.site, "train_round", watched)
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)
    assert seen == [((1, "lora", 0.25, 2, None), [32])]
    assert secrets_in(tmp_path) == {}


def test_after_a_crash_in_training_the_same_release_is_made_at_no_further_charge(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, items = plan_for(model), encoded(model, 20)
    request = request_for(plan, random_state(model))
    site = site_for(tmp_path / "a", model, items)
    site.describe(shown(plan))
    with monkeypatch.context() as patch:
        patch.setattr(client.site, "train_round", _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            site.train(request)
    (secret,) = secrets_in(tmp_path / "a").values()
    site.ledger.close()

    restarted = site_for(tmp_path / "a", model, items)
    release = restarted.train(request)
    assert isinstance(release, Release)
    assert len(restarted.ledger.charges(plan.digest())) == 1
    _same_update(release, _uninterrupted(tmp_path / "b", model, secret, items))
    again = restarted.train(request)
    assert isinstance(again, Release)
    _same_update(release, again)


def _power_cut(*_: object, **__: object) -> None:
    raise RuntimeError("power cut")


def _uninterrupted(folder: Path, model: AdaptedModel, secret: bytes, items: Any) -> Release:
    """The release of a site that happens to draw the same secret and never stops."""
    site = site_for(folder, model, items)
    site._fresh_secret = lambda round: RoundSecret(secret)  # type: ignore[method-assign]
    plan = plan_for(model)
    site.describe(shown(plan))
    release = site.train(request_for(plan, random_state(model)))
    assert isinstance(release, Release)
    return release


def _same_update(found: Release, expected: Release) -> None:
    assert np.array_equal(flat(found.update), flat(expected.update))
    assert {name: array.tobytes() for name, array in found.update.items()} == {
        name: array.tobytes() for name, array in expected.update.items()
    }


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path += ["tests", "tests/privacy"]
from client.privacy.mechanism import DPSGD
from small_sites import classifier, encoded, plan_for, random_state, request_for, shown, site_for
model = classifier(Path(sys.argv[1]))
plan = plan_for(model)
site = site_for(Path(sys.argv[2]), model, encoded(model, 20), durable=True)
step = DPSGD.step
def killed(*arguments):
    step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
DPSGD.step = killed
site.describe(shown(plan))
site.train(request_for(plan, random_state(model)))
"""


def test_after_a_kill_in_mid_round_the_same_release_is_made_at_no_further_charge(
    model: AdaptedModel, tiny_bert: Path, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tiny_bert), str(tmp_path)], cwd=REPOSITORY, timeout=120)
    assert killed.returncode == -9
    plan, items = plan_for(model), encoded(model, 20)
    (secret,) = secrets_in(tmp_path).values()
    assert rows(tmp_path, "SELECT round, released_at FROM charges") == [(1, None)]

    site = site_for(tmp_path, model, items)
    release = site.train(request_for(plan, random_state(model)))
    assert isinstance(release, Release)
    assert [row[0] for row in site.ledger.charges(plan.digest())] == [1]
    assert secrets_in(tmp_path) == {}
    _same_update(release, _uninterrupted(tmp_path / "b", model, secret, items))


def test_a_site_whose_secret_was_lost_refuses_the_round_and_goes_on_with_the_next(
    model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model)
    site = site_for(tmp_path, model, encoded(model, 8))
    site.describe(shown(plan))
    with monkeypatch.context() as patch:
        patch.setattr(client.site, "train_round", _power_cut)
        with pytest.raises(RuntimeError):
            site.train(request_for(plan, random_state(model)))
    for file in (tmp_path / "secrets").iterdir():
        file.unlink()
    refusal = site.train(request_for(plan, random_state(model)))
    assert getattr(refusal, "reason", None) is RefusalReason.SEED_LOST
    assert isinstance(site.train(request_for(plan, random_state(model), round=2)), Release)


def test_the_lifetime_budget_ends_with_the_plan_that_does_not_fit_any_more(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    policy = policy_for(model, lifetime_epsilon=12.0, max_epsilon=8.0)
    site = site_for(tmp_path, model, policy=policy)
    phases = [phase(rounds=1, steps=1)]
    refusals = [site.describe(shown(plan_for(model, phases, run_id=run))).refusal for run in ("a", "b", "c")]
    assert refusals[0] is None and refusals[-1] is RefusalReason.BUDGET
