"""Small sites for the tests of this folder; ``from small_sites import …`` works here as in ``tests/privacy``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The test folders are no packages; last, so that nothing is hidden by a module beside this file.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "privacy")]

from small_sites import classifier

from common.adapted import AdaptedModel


@pytest.fixture(scope="session")
def model(tiny_bert: Path) -> AdaptedModel:
    """A tiny classifier that no test changes."""
    return classifier(tiny_bert)
