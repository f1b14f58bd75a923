"""What all runs of a sweep cost together: against a second library, and whoever is left out is missed."""

from __future__ import annotations

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from common.privacy.accounting import Segment, epsilon
from simulations.sweep_grid import cells_of, read_axis
from simulations.sweep_privacy import ANY_SITE, Spent, compose, same_sites, sentences

BARE = Spent(None, None)


def private(*segments: Segment, delta: float = 1e-5) -> Spent:
    return Spent(segments, delta)


NORTH = [
    private(Segment(0.1, 1.2, 20), Segment(1.0, 6.0, 4)),
    private(Segment(0.1, 2.4, 20)),
    private(Segment(0.2, 3.0, 5)),
]
SOUTH = [
    private(Segment(0.1, 4.0, 20), Segment(1.0, 9.0, 4)),
    private(Segment(0.1, 4.0, 20)),
    private(Segment(0.1, 4.0, 5)),
]
RUNS = [{"north": one, "south": two} for one, two in zip(NORTH, SOUTH, strict=True)]


def pld_epsilon(*spent: Spent, delta: float = 1e-5) -> float:
    """dp-accounting's composition of every segment, one after the other."""
    total = pld.identity(value_discretization_interval=1e-3)
    for one in spent:
        for segment in one.segments or ():
            step = pld.from_gaussian_mechanism(
                segment.noise_multiplier, sampling_prob=segment.sample_rate, value_discretization_interval=1e-3
            )
            total = total.compose(step.self_compose(segment.steps))
    return float(total.get_epsilon_for_delta(delta))


def test_the_composed_epsilon_is_that_of_every_run_at_the_worst_site() -> None:
    composed = compose(RUNS, same_sites=True)
    assert composed.site == "north" and (composed.runs, composed.private_runs) == (3, 3)
    reference = pld_epsilon(*NORTH)
    assert composed.epsilon == composed.private_epsilon
    assert reference <= composed.private_epsilon <= reference + 0.03  # an upper bound, by about 0.01
    for left_out in range(3):
        without = pld_epsilon(*(one for number, one in enumerate(NORTH) if number != left_out))
        assert composed.private_epsilon > without + 0.05


def test_it_exceeds_every_single_run_and_is_below_their_sum() -> None:
    composed = compose(RUNS, same_sites=True).private_epsilon
    alone = [epsilon(one.segments or (), 1e-5) for one in NORTH]
    assert max(alone) < composed < sum(alone)


def test_one_run_without_privacy_makes_it_infinite_and_the_private_ones_are_stated_apart() -> None:
    composed = compose([*RUNS, {"north": BARE, "south": BARE}], same_sites=True)
    assert composed.epsilon is None and (composed.runs, composed.private_runs) == (4, 3)
    assert composed.private_epsilon == compose(RUNS, same_sites=True).private_epsilon
    said = " ".join(sentences(composed, 4))
    assert "selection not charged" in said and "infinite" in said and f"{composed.private_epsilon:.3f}" in said


def test_where_people_may_change_site_the_bound_covers_every_way_they_can_go() -> None:
    bound = compose(RUNS, same_sites=False)
    assert bound.site == ANY_SITE
    crossing = [SOUTH[0], NORTH[1], NORTH[2]], [NORTH[0], SOUTH[1], NORTH[2]], NORTH, SOUTH
    uneven = [{"north": one, "south": two} for one, two in zip(NORTH[1:], SOUTH[1:], strict=True)]
    within = compose(uneven, same_sites=False).private_epsilon
    for way in crossing:
        assert pld_epsilon(*way[1:]) <= within <= bound.private_epsilon


def test_the_smallest_delta_of_a_site_is_the_one_that_holds() -> None:
    runs = [{"north": private(Segment(0.1, 2.0, 10))}, {"north": private(Segment(0.1, 2.0, 10), delta=1e-6)}]
    composed = compose(runs, same_sites=True)
    assert composed.delta == 1e-6
    assert composed.private_epsilon == epsilon([Segment(0.1, 2.0, 20)], 1e-6)


def test_a_sweep_that_never_began_has_spent_nothing() -> None:
    composed = compose([{}, {}], same_sites=True)
    assert (composed.epsilon, composed.runs) == (0.0, 0)
    assert "nothing was spent" in " ".join(sentences(composed, 2))


@pytest.mark.parametrize(
    ("data", "over", "same"),
    [
        ({"site_column": "hospital"}, "privacy.epsilon=1,8", True),
        ({"site_column": "hospital"}, "data.site_column=hospital,ward", False),
        ({"sites": 3}, "privacy.epsilon=1,8", False),
    ],
)
def test_people_stay_at_their_site_where_a_column_says_so_and_no_axis_changes_it(
    data: dict[str, object], over: str, same: bool
) -> None:
    axis = read_axis(over)
    tables = {"task": {"labels": ["a", "b"]}, "data": data}
    assert same_sites(cells_of(tables, [], [axis], 1, ""), [axis]) is same
