"""Sites of real processes are killed, starved, damaged and misled; afterwards charged still covers released, nothing
was released twice, the audit log is whole, and the site is back by itself or says in one line why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comebacks import FIRST, RUN, SECOND, Foreseen, come_back, foresee
from kill_points import POINTS
from mortal_sites import MortalSite, Parent, network_of, write_model

NewSite = Callable[..., MortalSite]


@pytest.fixture(scope="module")
def new_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewSite]:
    """``new_site(population={…})``: a site in a folder of its own, with settings put over the usual ones."""
    folder = tmp_path_factory.mktemp("faults")
    model = write_model(folder / "model")
    network = network_of(model)
    with Parent() as parent:

        def make(**sections: object) -> MortalSite:
            return MortalSite(parent, tmp_path_factory.mktemp("site"), model, network, sections)  # type: ignore[arg-type]

        parent.rehearse(make())
        yield make


@pytest.fixture(scope="module")
def foreseen(new_site: NewSite) -> Foreseen:
    """What sites release that nobody kills."""
    return foresee(new_site(), FIRST) | foresee(new_site(), SECOND)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_a_site_comes_back_by_itself_and_releases_the_same_once(
    point: str, new_site: NewSite, foreseen: Foreseen
) -> None:
    come_back(new_site(), point, foreseen)
