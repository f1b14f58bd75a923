"""``from small_sites import …`` works in the tests beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

# The test folders are no packages; last, so that nothing is hidden by a module beside this file.
sys.path.append(str(Path(__file__).parent))
