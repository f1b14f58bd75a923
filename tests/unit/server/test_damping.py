"""The server's step is shortened by what the noise of a round is, and by nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from common.messages import PhaseStatement, PlanStatus, PrivacyStatement, SiteDescription
from common.sections import PhaseSection
from server.damping import damped, deviation


def phase(**settings: Any) -> PhaseSection:
    return PhaseSection(**{"name": "p", "rounds": 1, "sample_rate": 0.5, "steps": 4, "learning_rate": 10.0, **settings})


def site(size: int, noise: float | None = 2.0) -> SiteDescription:
    stated = PhaseStatement("p", sample_rate=0.5, noise_multiplier=noise or 0.0, clip_norm=0.25, steps=4)
    privacy = PrivacyStatement(8.0, 1e-5, "example", "add-remove-one", "prv", 4, (stated,))
    return SiteDescription("s", PlanStatus.READY, None, "", (), 8, size, None if noise is None else privacy)


SITES = {"one": site(100), "two": site(400)}
WEIGHTS = {"one": 100.0, "two": 400.0}


def test_the_noise_of_a_round_by_hand() -> None:
    """Each weighted sum has 100·2·0.25/50 = 1 and 400·2·0.25/200 = 1, so √2 over 500; √4 steps, at a rate of 10."""
    assert deviation(phase(), SITES, WEIGHTS) == pytest.approx(10 * 2 * 2**0.5 / 500)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 0.5), (0.0282842712, 0.5), (0.01, 0.5 * 0.01 / 0.0282842712)])
def test_a_step_is_shortened_to_the_limit_and_never_lengthened(limit: float, expected: float) -> None:
    """At a server's rate of 0.5 the noise is 0.5 · 0.0566 = 0.0283."""
    found = damped(phase(server_noise=limit, server_learning_rate=0.5), SITES, WEIGHTS)
    assert found.server_learning_rate == pytest.approx(expected)


def test_without_a_limit_or_without_noise_nothing_changes() -> None:
    free = {"one": site(100, None), "two": site(400, 0.0)}
    for settings, sites in (({}, SITES), ({"server_noise": 1e-9}, free)):
        assert damped(phase(**settings), sites, WEIGHTS) == phase(**settings)
