"""The sites' own metrics at the coordinator: averaged by weight, with the noise that is in them, and shown."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from common.messages import PhaseStatement, PlanStatus, PrivacyStatement, SiteDescription
from common.sections import PhaseSection, PrivacySection
from server.progress import rounds_table
from server.site_metrics import site_metrics

PHASE = PhaseSection(name="lora", rounds=3, steps=4, sample_rate=0.5)
PRIVACY = PrivacySection(metrics=("loss", "accuracy"), metrics_share=0.5)
BOUNDS = {"loss": 3.0, "accuracy": 1.0}
WEIGHTS = {"north": 300.0, "south": 100.0, "west": 1e9}
METRICS = {"north": {"loss": 1.0, "accuracy": 0.5}, "south": {"loss": 3.0, "accuracy": 0.9}}


def site(name: str, public_size: int, sigma: float, rate: float = 0.5, phase: str = "lora") -> SiteDescription:
    stated = PhaseStatement(phase, rate, sigma, 1.0, 12)
    privacy = PrivacyStatement(8.0, 1e-5, "example", "add-remove-one", "prv", 12, (stated,))
    return SiteDescription(name, PlanStatus.READY, None, "code", (), 8, public_size, privacy)


SITES = {"north": site("north", 300, 3.0), "south": site("south", 100, 2.0), "west": site("west", 1, 9.0)}


def averaged(sites: dict[str, SiteDescription], bounds: dict[str, float] = BOUNDS) -> dict[str, Any]:
    return site_metrics(METRICS, WEIGHTS, sites, PRIVACY, PHASE, bounds)


def test_the_mean_is_over_the_admitted_sites_by_their_weights() -> None:
    means = averaged(SITES)["site_metrics"]
    assert means == {"loss": pytest.approx((3 * 1.0 + 3.0) / 4), "accuracy": pytest.approx((3 * 0.5 + 0.9) / 4)}
    assert list(means) == ["loss", "accuracy"]


def test_the_noise_in_it_follows_from_what_the_sites_state() -> None:
    # sigma_m = sigma * sqrt(2 / 0.5) on each step's sum; four steps; north q n = 150, south 50.
    north, south = 3.0 * 2 / (2 * 150), 2.0 * 2 / (2 * 50)
    noise = math.sqrt((0.75 * north) ** 2 + (0.25 * south) ** 2)
    found = averaged(SITES)["site_metrics_noise"]
    assert found == {"loss": pytest.approx(3 * noise), "accuracy": pytest.approx(noise)}


def test_a_plan_without_metrics_has_no_entries() -> None:
    assert site_metrics({"north": {}, "south": {}}, WEIGHTS, SITES, PrivacySection(), PHASE, {}) == {}


@pytest.mark.parametrize(
    "odd",
    [
        SiteDescription("south", PlanStatus.READY, None, "code", (), 8, 100, None),
        site("south", 100, 2.0, phase="another"),
        site("south", 100, 2.0, rate=0.0),
        site("south", 100, 2.0, rate=math.nan),
        site("south", 100, math.nan),
        site("south", 100, 1e308),
    ],
    ids=["no statement", "another phase", "no rate", "odd rate", "odd noise", "endless noise"],
)
def test_a_site_that_states_nothing_useful_hides_the_noise_and_breaks_nothing(odd: SiteDescription) -> None:
    found = averaged({**SITES, "south": odd})
    assert found["site_metrics"] == averaged(SITES)["site_metrics"]
    assert found["site_metrics_noise"] == {"loss": None, "accuracy": None}


def shown(*more: dict[str, Any]) -> str:
    common: dict[str, Any] = {"phase": "lora", "metrics": {"f1": 0.5}, "seconds": {"evaluate": 1.0}}
    history = [{"round": index, **common, **entries} for index, entries in enumerate(({}, *more))]
    console = Console(file=StringIO(), width=132)
    console.print(rounds_table(history, 0))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_of_rounds_shows_them_with_their_noise() -> None:
    text = shown({"site_metrics": {"loss": 1.5}, "site_metrics_noise": {"loss": 0.0321}})
    assert "sites' loss" in text and "1.500 ± 0.032" in text and "privacy noise" in text


def test_the_table_shows_them_without_noise_where_that_is_unknown_and_no_column_where_there_are_none() -> None:
    assert "1.5000" in shown({"site_metrics": {"loss": 1.5}, "site_metrics_noise": {"loss": None}})
    assert "sites'" not in shown({})
