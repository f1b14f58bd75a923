"""How long accounting takes: calibrating a plan, stating epsilon, and the lifetime limit of a ledger with a history.

    python benchmarks/accounting.py

Every figure is in milliseconds, as median, least and most of several runs. *Cold* means that all caches of the
accountants are emptied before each run, as after a start of the agent; *warm* is what a running agent needs. The
ledger is on disk and durable, with 5 plans of 3 phases approved and 100 rounds released.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import RESULTS, environment

from client.privacy.ledger import Decision, Ledger, Population, Reservation
from client.privacy.sampling import RoundSecret
from common.messages import PhaseStatement, PrivacyStatement
from common.privacy import accounting, renyi
from common.privacy.accounting import PhaseLoad, Segment, calibrate, epsilon, filter_epsilon

DELTA = 1e-5
PLANS, ROUNDS = 5, 100
LOADS = {
    "40 rounds at q=1, then 40 at q=0.1": [PhaseLoad(1.0, 40, 0.4), PhaseLoad(0.1, 40, 0.6)],
    "one phase: 1000 steps at q=0.01": [PhaseLoad(0.01, 1000, 1.0)],
    "one phase: 40 steps at q=1": [PhaseLoad(1.0, 40, 1.0)],
    "three phases: q=1, 0.1, 0.02": [PhaseLoad(1.0, 40, 4), PhaseLoad(0.1, 20, 6), PhaseLoad(0.02, 400, 2)],
}
RELEASE = bytes(600_000)  # an adapter of 150k parameters


def forget() -> None:
    """Empties the caches of the accountants."""
    accounting._epsilon.cache_clear()
    renyi._divergence_of_step.cache_clear()
    renyi._log_weights.cache_clear()


def timed(action: Callable[[], object], runs: int, before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Milliseconds of ``action``."""
    seen = []
    for _ in range(runs):
        before()
        start = time.perf_counter()
        action()
        seen.append((time.perf_counter() - start) * 1e3)
    return spread(seen)


def spread(seen: list[float]) -> dict[str, float]:
    """Of a list of milliseconds."""
    return {
        "median_ms": round(statistics.median(seen), 3),
        "least_ms": round(min(seen), 3),
        "most_ms": round(max(seen), 3),
        "runs": len(seen),
    }


def mixture(count: int) -> list[Segment]:
    """Unsampled segments of ``count`` unlike noises."""
    return [Segment(1.0, 10.0 * count**0.5 + index, 1 + index % 3) for index in range(count)]


def accountants() -> dict[str, Any]:
    """The stated epsilon of mixtures, and the lifetime figure of the same."""
    found: dict[str, Any] = {}
    for count in (15, 60):
        whole = mixture(count)
        half = [Segment(0.1, s.noise_multiplier / 4, s.steps) if k % 2 else s for k, s in enumerate(whole)]
        for name, segments in ((f"q=1, {count} segments", whole), (f"q=1 and q=0.1, {count} segments", half)):
            stated, lifetime = epsilon(segments, DELTA), filter_epsilon(segments, DELTA)
            found[name] = {
                "epsilon": round(stated, 4),
                "filter_epsilon": round(lifetime, 4),
                "epsilon_cold": timed(lambda s=segments: epsilon(s, DELTA), 5, forget),  # type: ignore[misc]
                "filter_cold": timed(lambda s=segments: filter_epsilon(s, DELTA), 5, forget),  # type: ignore[misc]
            }
    return found


def statement(index: int) -> PrivacyStatement:
    """A plan whose phases no other plan has."""
    phases = (
        PhaseStatement("head", 1.0, 40.0 + index, 1.0, 20),
        PhaseStatement("lora", 0.1 + index / 100, 4.0 + index / 10, 1.0, 40),
        PhaseStatement("polish", 0.02 + index / 1000, 2.0 + index / 20, 1.0, 40),
    )
    return PrivacyStatement(3.0, DELTA, "example", "add-remove-one", "prv", 100, phases)


def lifetime() -> dict[str, Any]:
    """A ledger with 100 released rounds over 5 runs: funding a further round, and approving a further plan."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        ledger.declare(Population("site", "example", 400, 50.0, DELTA))
        for index in range(PLANS + 40):
            ledger.receive(f"plan{index}", f"run{index}", "{}", "site", statement(index % (PLANS + 1)), None)
        assert all(ledger.approve(f"plan{index}") is Decision.APPROVED for index in range(PLANS))
        fund, record = [], []
        for number in range(ROUNDS):
            plan, round = f"plan{number % PLANS}", number // PLANS + 1
            start = time.perf_counter()
            reservation = ledger.reserve(plan, round, "request", "head", 1, RoundSecret.from_system)
            middle = time.perf_counter()
            assert isinstance(reservation, Reservation)
            ledger.record(reservation, RELEASE)
            fund.append((middle - start) * 1e3)
            record.append((time.perf_counter() - middle) * 1e3)
        later = iter(range(PLANS, PLANS + 40))
        found = {
            "history": f"{PLANS} plans of 3 unlike phases, {ROUNDS} rounds released",
            "fund_a_round_ms": spread(fund),
            "record_a_release_ms": spread(record),
            "decide_a_plan_cold": timed(lambda: ledger.approve(f"plan{next(later)}"), 10, forget),
            "decide_a_plan_warm": timed(lambda: ledger.approve(f"plan{next(later)}"), 20),
            "lifetime_figure_cold": timed(lambda: filter_epsilon(ledger.reserved("site"), DELTA), 10, forget),
            "lifetime_figure_warm": timed(lambda: filter_epsilon(ledger.reserved("site"), DELTA), 50),
        }
        ledger.close()
    return found


def main() -> None:
    """Measures everything and writes the result."""
    epsilon([Segment(0.5, 1.0, 1)], DELTA)  # brings Opacus and torch, which no figure should hold
    result = {
        "environment": environment(),
        "calibrate_cold": {
            f"{name}, epsilon {target:g}": timed(lambda p=loads, e=target: calibrate(p, e, DELTA), 5, forget)  # type: ignore[misc]
            for name, loads in LOADS.items()
            for target in (1.0, 8.0)
        },
        "mixtures": accountants(),
        "ledger": lifetime(),
    }
    (RESULTS / "accounting.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
