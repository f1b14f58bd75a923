"""How surely the audit names each planted fault at ``--quick``, and how often it accuses the engine as it is.

    python benchmarks/audit_power.py --repeats 20 --correct 20

Keys, coins and noise are fresh in every repetition. Shown for each fault: in how many repetitions the right check named
it; by how much its figure lay outside the allowed range, in units of the range's half width; and for a statistical
check how many standard deviations that is beyond the bound, whose normal distribution function is the power (2.33 is
99 %). The half width of a two-sided check is at least 4.5 standard deviations (its level is at most 6.25e-6), so that
the count of deviations is an understatement. Exact checks have no noise in them: they name a fault always or never.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from environment import RESULTS, environment
from scipy import stats

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests" / "privacy")]

from planted_faults import FAULTS, Fault

from client.privacy.audit.canaries import Estimate
from client.privacy.audit.run import QUICK, audit
from client.privacy.audit.verdicts import LEVEL, Verdict
from common.config import RunConfig
from common.privacy.privacy_loss import gaussian_mu
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection

PHASES = (
    PhaseSection(name="head", rounds=4, sample_rate=1.0, train=("head",), clip_norm=0.5, budget_share=0.7),
    PhaseSection(name="lora", rounds=4, steps=2, sample_rate=0.25, train=("head", "lora"), budget_share=0.3),
)


def settings(fault: Fault | None) -> RunConfig:
    """The small run of the tests."""
    privacy: dict[str, Any] = {} if fault is None else {"noise": fault.noise}
    if fault is not None and fault.by_patient:
        privacy |= {"unit": "patient", "max_examples_per_unit": 4}
    task, lora = TaskSection(labels=("urgent", "routine", "review")), LoraSection(r=4, layers=2)
    return RunConfig(task=task, lora=lora, phase=PHASES, privacy=PrivacySection(**privacy))


def excess(verdict: Verdict) -> float:
    """Distance of the figure from the middle of the allowed range, in units of its half width."""
    if verdict.figure is None or not math.isfinite(verdict.figure) or verdict.most is None:
        return math.inf
    least = -verdict.most if verdict.least is None else verdict.least
    half = (verdict.most - least) / 2
    return abs(verdict.figure - (verdict.most + least) / 2) / half if half else math.inf


def deviations_beyond(verdict: Verdict, estimate: Estimate | None) -> float:
    """How many standard deviations of the figure lie between it and the bound that it has to break."""
    if verdict.name == "epsilon":
        assert estimate is not None
        claimed = gaussian_mu(estimate.claimed_epsilon, estimate.delta)
        deviation = math.sqrt((4 + estimate.mu**2) / estimate.canaries)
        return float((estimate.mu - claimed) / deviation - stats.norm.isf(LEVEL))
    return float(stats.norm.isf(LEVEL / 2)) * (excess(verdict) - 1)


def power_of(name: str, fault: Fault, repeats: int) -> dict[str, Any]:
    """One fault, so many times."""
    named, excesses, beyond = 0, [], []
    parts = ("canaries", "ledger") if fault.part == "ledger" else (fault.part,)
    for _ in range(repeats):
        with fault.plant():
            found = audit(settings(fault), 1000, QUICK, parts=parts)
        verdict = next(each for each in found.verdicts if each.name == fault.check)
        named += not verdict.held and fault.suspected in verdict.suspects
        excesses.append(excess(verdict))
        if verdict.false_alarm:
            beyond.append(deviations_beyond(verdict, found.estimate))
    mean = sum(beyond) / len(beyond) if beyond else None
    return {
        "fault": name,
        "check": fault.check,
        "kind": "exact" if mean is None else "statistical",
        "repeats": repeats,
        "named": named,
        "least_excess": None if math.isinf(min(excesses)) else round(min(excesses), 3),
        "deviations_beyond": None if mean is None else round(mean, 2),
        "power": None if mean is None else float(stats.norm.cdf(mean)),
    }


def main() -> None:
    """Prints a line for each fault and writes ``results/audit_power.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--correct", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "audit_power.json")
    options = parser.parse_args()
    begun = time.monotonic()
    accused = []
    for _ in range(options.correct):
        accused += [verdict.name for verdict in audit(settings(None), 1000, QUICK).failed]
    print(f"engine as it is: {options.correct} audits, accused {len(accused)} times {accused}", flush=True)
    rows = []
    for name, fault in FAULTS.items():
        rows.append(power_of(name, fault, options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "environment": environment(),
        "seconds": round(time.monotonic() - begun),
        "correct_engine": {"audits": options.correct, "accused": accused},
        "faults": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
