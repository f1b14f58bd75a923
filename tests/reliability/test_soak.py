"""A short soak in every run of the tests; ``make soak`` is the long one."""

from __future__ import annotations

from pathlib import Path

from mortal_sites import MortalSite, Parent, network_of, write_model
from soak import soak


def test_after_some_random_kills_every_site_is_brought_to_its_end(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with Parent() as parent:
        parent.rehearse(MortalSite(parent, tmp_path / "rehearsal", model, network_of(model)))
        tally = soak(8, 0, parent, model, tmp_path)
    assert tally.killed >= 8 and tally.events["releases received"] > 0
