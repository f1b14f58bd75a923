"""``from soak import soak`` works in the tests beside this file, and what it needs of the other folders too."""

from __future__ import annotations

import sys
from pathlib import Path

# The test folders are no packages; last, so that nothing is hidden by a module beside this file.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]
