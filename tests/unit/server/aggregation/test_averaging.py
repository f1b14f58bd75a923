"""The average of the global adapters: what is evaluated and kept, beside what travels on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.sections import PhaseSection
from server.aggregation.registry import aggregator_for

HEAD = "classifier.weight"


def run(updates: list[float], **settings: Any) -> tuple[list[float], list[float]]:
    """Kept and sent value of one number that starts at 0 and moves by each update."""
    aggregator = aggregator_for(PhaseSection(name="p", rounds=9, sample_rate=1.0, **settings))
    state, kept, sent = aggregator.init({HEAD: np.zeros(1, np.float32)}), [], []
    for value in updates:
        state = aggregator.accumulate(state, {HEAD: np.full(1, value, np.float32)}, 1.0)
        state, result = aggregator.finish(state)
        state = aggregator.load(aggregator.save(state))
        kept.append(result[HEAD].item())
        sent.append(aggregator.save(state)[f"adapter/{HEAD}"].item())
    return kept, sent


def test_the_average_by_hand_and_training_goes_on_from_the_last_adapter() -> None:
    """γ = 1/2 over the adapters 1, 2, 4, without the 0 before round 1: 1; (1/2 + 2)/(3/2); (1/4 + 1 + 4)/(7/4)."""
    kept, sent = run([1.0, 1.0, 2.0], server_average=0.5)
    assert sent == [1.0, 2.0, 4.0]
    assert kept == pytest.approx([1.0, 5 / 3, 3.0], rel=1e-6)


def test_without_averaging_the_last_adapter_is_kept() -> None:
    kept, sent = run([1.0, 1.0, 2.0])
    assert kept == sent == [1.0, 2.0, 4.0]


def test_a_long_average_of_a_noisy_walk_is_closer_to_its_centre_than_its_last_point() -> None:
    noise = np.random.default_rng(0).standard_normal(400)
    steps = np.diff(np.concatenate([[0.0], 1.0 + noise]))  # the adapters are 1 + noise
    kept, sent = run(steps.tolist(), server_average=0.98)
    assert np.std(np.array(kept[200:]) - 1) < 0.2 * np.std(np.array(sent[200:]) - 1)
    assert kept[-1] == pytest.approx(np.average(sent, weights=0.98 ** np.arange(399, -1, -1.0)), abs=1e-4)
