"""Cohorts and weights: public, reproducible, and no site takes over."""

from __future__ import annotations

from collections import Counter

import pytest

from server.sampling import LARGEST_WEIGHT, cohort, weights

SITES = [f"site-{index}" for index in range(10)]


def test_everybody_is_asked_by_default_in_name_order() -> None:
    assert cohort(["b", "c", "a"], share=1.0, minimum=1, seed=0, round=1) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("share", "minimum", "size"), [(0.5, 1, 5), (0.41, 1, 5), (0.01, 1, 1), (0.01, 4, 4), (0.5, 99, 10), (1.0, 1, 10)]
)
def test_the_cohort_is_the_share_rounded_up_and_at_least_the_quorum(share: float, minimum: int, size: int) -> None:
    drawn = cohort(SITES, share, minimum, seed=0, round=1)
    assert len(drawn) == len(set(drawn)) == size
    assert set(drawn) <= set(SITES) and list(drawn) == sorted(drawn)


def test_a_cohort_is_a_function_of_seed_and_round_and_not_of_the_order_of_sites() -> None:
    first = cohort(SITES, 0.3, 1, seed=7, round=2)
    assert cohort(SITES[::-1], 0.3, 1, seed=7, round=2) == first
    assert all(type(site) is str for site in first)
    assert len({cohort(SITES, 0.3, 1, seed=7, round=round) for round in range(1, 30)}) > 10
    assert len({cohort(SITES, 0.3, 1, seed=seed, round=2) for seed in range(30)}) > 10


def test_over_many_rounds_every_site_is_asked_about_equally_often() -> None:
    asked = Counter(site for round in range(1, 2001) for site in cohort(SITES, 0.3, 1, seed=0, round=round))
    assert set(asked) == set(SITES)
    assert all(asked[site] == pytest.approx(600, abs=5 * (2000 * 0.3 * 0.7) ** 0.5) for site in SITES)


def test_uniform_weights_are_one() -> None:
    assert weights({"a": 10, "b": 4000}, "uniform") == {"a": 1.0, "b": 1.0}


def test_declared_sizes_are_weights() -> None:
    assert weights({"a": 10, "b": 40, "c": 25}, "public-size") == {"a": 10.0, "b": 40.0, "c": 25.0}


def test_a_site_that_declares_a_huge_size_does_not_take_over() -> None:
    found = weights({"a": 10, "b": 40, "liar": 10**12}, "public-size")
    assert found == {"a": 10.0, "b": 40.0, "liar": LARGEST_WEIGHT * 40}
