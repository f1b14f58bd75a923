"""(b) Noise: its scale, its shape, and that nothing in it repeats.

A site without data releases noise alone. With keys from the operating system its releases are, in units of σC·√steps,
independent standard normal values, over coordinates, layers, steps, rounds, plans and sites, and again after an older
copy of the ledger was put back.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy import stats

from client.privacy.audit.probe import (
    Folders,
    NoRelease,
    Probe,
    Subject,
    audited_phase,
    closing,
    slices_of,
    subject_of,
)
from client.privacy.audit.subjects import small_model, zero_adapter
from client.privacy.audit.verdicts import (
    LEVEL,
    Comparison,
    FloatArray,
    Verdict,
    correlation,
    correlation_limit,
    deviation_range,
    within,
    worst_of,
)
from common.adapter import AdapterState
from common.config import RunConfig
from common.examples import Examples
from common.messages import PhaseStatement

PART = "noise"
MOST_ROUNDS = 64
"""Of a phase at one site: every two of them are compared."""
MOST_SITES = 40


@dataclass
class Noise:
    """What was released, in units of the standard deviation that it should have."""

    subject: Subject
    statements: Mapping[str, PhaseStatement]
    sites: dict[str, dict[int, FloatArray]] = field(default_factory=dict)
    """Site → round → values."""
    other_plan: dict[int, FloatArray] = field(default_factory=dict)
    """The first site's rounds of another plan with the same public seed."""
    before: list[FloatArray] = field(default_factory=list)
    after: list[FloatArray] = field(default_factory=list)
    """Rounds of one site, and the same rounds for another adapter once an older copy of its ledger was put back."""

    def add(self, rounds: dict[int, FloatArray], probe: Probe, round: int) -> None:
        """Asks for one more round."""
        rounds[round] = self.standard(probe, round, zero_adapter(self.subject.model), self.subject)

    def standard(self, probe: Probe, round: int, adapter: AdapterState, subject: Subject) -> FloatArray:
        """The noise of one round, divided by the deviation that the statement promises."""
        phase = self.subject.plan.phase_of(round)
        stated = self.statements[phase.name]
        moved, parts = self.subject.moved(round), slices_of(self.subject, round)
        steps = np.concatenate([np.full(part.stop - part.start, moved[name]) for name, part in parts.items()])
        scale = subject.noise(stated) * phase.clip_norm * np.sqrt(steps)
        found: FloatArray = probe.noisy_sum(round, adapter, subject.plan) / scale
        return found

    def of_phase(self, name: str) -> Iterable[tuple[int, FloatArray]]:
        """(round, values) of all sites in one phase."""
        rounds = self.subject.rounds_of(next(p for p in self.subject.plan.phases if p.name == name))
        return [(round, z) for site in self.sites.values() for round, z in site.items() if round in rounds]


def measure(
    config: RunConfig, public_size: int, values: int, folders: Folders, done: Callable[[], None]
) -> list[Verdict]:
    """All verdicts of the part.

    Args:
        values: noise values to look at in each phase, at least.
    """
    model = small_model(config, 1.0)
    phases = [audited_phase(phase) for phase in config.phases]
    rates = subject_of(config, model, public_size, phases)
    # η = q·public_size, so that nothing is scaled before it is rounded to fp32.
    phases = [audited_phase(phase, learning_rate=rates.rate(phase) * public_size) for phase in phases]
    subject = subject_of(config, model, public_size, phases)
    try:
        found = _collect(
            subject, subject_of(config, model, public_size, phases, run_id="audit-2"), values, folders, done
        )
    except NoRelease as error:
        return [within(PART, "noise-released", "a site without data releases noise", 0.0, 1.0, suspects=str(error))]
    return [
        *_scales(found), _shape(found), _coordinates(found), _rounds(found), _sites(found),
        _repeats(
            "plans-independent", "two plans with the same public seed get different noise at one site",
            [(found.sites["north"][round], z) for round, z in found.other_plan.items()],
            "noise is seeded from the plan, or from the number of the round",
        ),
        _repeats(
            "restore-independent",
            "after an older copy of the ledger was put back, another request for the same round gets other noise",
            list(zip(found.before, found.after, strict=True)),
            "noise is a function of what the ledger holds, so a restored copy uses it again",
        ),
    ]  # fmt: skip


def _collect(subject: Subject, second: Subject, values: int, folders: Folders, done: Callable[[], None]) -> Noise:
    nothing = Examples([], subject.model.task)
    with closing(Probe(folders(), subject, nothing, name="north")) as probe:
        found = Noise(subject, {phase.name: phase for phase in probe.statement.phases})
    wanted = _rounds_wanted(subject, values)
    sites = max(2, *(math.ceil(values / (len(rounds) * size)) for rounds, size in wanted))
    for index in range(min(sites, MOST_SITES)):
        name = "north" if index == 0 else f"site-{index}"
        found.sites[name] = {}
        with closing(Probe(folders(), subject, nothing, name=name)) as probe:
            assert probe.statement
            for rounds, _ in wanted:
                for round in rounds:
                    found.add(found.sites[name], probe, round)
            if index == 0:
                assert probe.describe(second.plan)
                adapter = zero_adapter(subject.model)
                for rounds, _ in wanted:
                    found.other_plan[rounds[0]] = found.standard(probe, rounds[0], adapter, second)
        done()
    _restore(found, [rounds[0] for rounds, _ in wanted], folders)
    done()
    return found


def _rounds_wanted(subject: Subject, values: int) -> list[tuple[range, int]]:
    """Of each phase the first rounds, as many as yield the wanted number of values, and the values of each."""
    wanted = []
    for phase in subject.plan.phases:
        rounds = subject.rounds_of(phase)
        size = sum(part.stop - part.start for part in slices_of(subject, rounds[0]).values())
        wanted.append((rounds[: min(MOST_ROUNDS, max(2, math.ceil(values / size / 2)))], size))
    return wanted


def _restore(found: Noise, rounds: list[int], folders: Folders) -> None:
    """Copies the folder of a site that has approved the plan, runs, puts the copy back, and runs again."""
    subject, folder, copy = found.subject, folders(), folders()
    nothing = Examples([], subject.model.task)
    with closing(Probe(folder, subject, nothing)) as probe:
        assert probe.statement
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    adapter = zero_adapter(subject.model)
    for target in (found.before, found.after):
        with closing(Probe(folder, subject, nothing)) as probe:
            target += [found.standard(probe, round, adapter, subject) for round in rounds]
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        adapter = {name: array + np.float32(2.0**-10) for name, array in adapter.items()}


# ------------------------------------------------------------------------------------------------------------ verdicts


def _scales(found: Noise) -> list[Verdict]:
    """Root mean square of each phase, and of each layer in each phase."""
    whole: list[Comparison] = []
    layers: list[tuple[str, FloatArray]] = []
    phases = found.subject.plan.phases
    for phase in phases:
        releases = list(found.of_phase(phase.name))
        together = np.concatenate([z for _, z in releases])
        low, high = deviation_range(len(together), LEVEL / len(phases))
        whole.append(Comparison(_rms(together), low, high, f"phase {phase.name}"))
        for name, part in slices_of(found.subject, releases[0][0]).items():
            same = [
                z[slices_of(found.subject, round)[name]] for round, z in releases if name in found.subject.names(round)
            ]
            layers.append((f"{name} in phase {phase.name}", np.concatenate(same)))
            assert part.stop > part.start
    each = [Comparison(_rms(z), *deviation_range(len(z), LEVEL / len(layers)), where) for where, z in layers]
    verdicts = []
    for comparisons, name, of in (
        (whole, "noise-scale", "of each phase"),
        (each, "noise-in-every-layer", "of each layer"),
    ):
        worst = worst_of(comparisons)
        claim = f"the noise {of} has standard deviation σC (figure in units of it; two-sided χ²)"
        verdicts.append(
            within(
                PART, name, claim, worst.figure, worst.least, worst.most, false_alarm=LEVEL, where=worst.where,
                suspects=_scale_suspects(found, worst),
            )
        )  # fmt: skip
    return verdicts


def _rms(z: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(z))))


def _scale_suspects(found: Noise, worst: Comparison) -> str:
    phase = next(p for p in found.subject.plan.phases if worst.where.endswith(f"phase {p.name}"))
    batch = found.subject.rate(phase) * found.subject.public_size
    ratio = worst.figure
    known = [
        (0.5, "the noise has half its scale"),
        (1 / batch, "the noise is divided by the batch"),
        (math.sqrt(phase.steps), "the steps of a round share their noise"),
        (batch, "the denominator is missing, or comes from the true number of units"),
    ]
    if ratio < 1e-3 / batch:
        return "there is no noise"
    for value, text in known:
        if abs(value - 1) > 0.02 and abs(ratio / value - 1) < 0.1:
            return text
    return f"the noise has {ratio:.3g} times its scale, or the denominator is wrong"


def _shape(found: Noise) -> Verdict:
    """Kolmogorov–Smirnov against the normal distribution, after division by the measured deviation."""
    comparisons = []
    phases = found.subject.plan.phases
    for phase in phases:
        z = np.concatenate([z for _, z in found.of_phase(phase.name)])
        scale = _rms(z)
        distance = float(stats.kstest(z / scale, "norm").statistic) if scale > 0 else 0.0
        limit = float(stats.kstwobign.isf(LEVEL / len(phases))) / math.sqrt(len(z))
        comparisons.append(Comparison(distance, -limit, limit, f"phase {phase.name}"))
    worst = worst_of(comparisons)
    return within(
        PART, "noise-is-normal", "the noise has a normal distribution (Kolmogorov–Smirnov distance)", worst.figure,
        most=worst.most, false_alarm=LEVEL, where=worst.where, suspects="the noise is not Gaussian",
    )  # fmt: skip


def _coordinates(found: Noise) -> Verdict:
    """Each value against the one ``lag`` places on, for every lag; and each layer's first values against every other's,
    which are equal where a generator is seeded anew for each layer."""
    pairs: dict[str, tuple[FloatArray, FloatArray]] = {}
    for phase in found.subject.plan.phases:
        releases = list(found.of_phase(phase.name))
        by_layout: dict[tuple[str, ...], list[FloatArray]] = {}
        for round, z in releases:
            by_layout.setdefault(found.subject.names(round), []).append(z)
        for names, same in by_layout.items():
            stacked = np.stack(same)
            layout = slices_of(found.subject, next(r for r, _ in releases if found.subject.names(r) == names))
            for lag in range(1, stacked.shape[1] // 2 + 1):
                # Blocks of ``lag`` values in turn: no value is in two pairs, so the figure's distribution is exact.
                blocks = stacked[:, : stacked.shape[1] // (2 * lag) * 2 * lag].reshape(len(stacked), -1, 2, lag)
                pairs[f"lag {lag} in phase {phase.name}"] = (blocks[:, :, 0].ravel(), blocks[:, :, 1].ravel())
            for (one, first), (other, second) in combinations(layout.items(), 2):
                size = min(first.stop - first.start, second.stop - second.start)
                starts = (stacked[:, part.start : part.start + size].ravel() for part in (first, second))
                pairs[f"'{one}' and '{other}' in phase {phase.name}"] = (next(starts), next(starts))
    return _correlations(
        "coordinates-independent", "noise is independent over coordinates and layers (largest correlation)", pairs,
        "coordinates or layers share their noise",
    )  # fmt: skip


def _rounds(found: Noise) -> Verdict:
    """Every round of a site against every other with the same tensors."""
    pairs = {
        f"rounds {first} and {second} of {site}": (rounds[first], rounds[second])
        for site, rounds in found.sites.items()
        for first, second in combinations(rounds, 2)
        if found.subject.names(first) == found.subject.names(second)
    }
    return _correlations(
        "rounds-independent", "noise is independent over rounds (largest correlation)", pairs,
        "the rounds of a site share their noise",
    )  # fmt: skip


def _sites(found: Noise) -> Verdict:
    """Every site against the first."""
    first = found.sites["north"]
    pairs = {
        f"round {round} of north and {site}": (first[round], rounds[round])
        for site, rounds in found.sites.items()
        for round in rounds
        if site != "north"
    }
    return _correlations(
        "sites-independent", "two sites get different noise for the same plan (largest correlation)", pairs,
        "noise is seeded from the plan: whoever knows the plan can take it off",
    )  # fmt: skip


def _repeats(name: str, claim: str, pairs: list[tuple[FloatArray, FloatArray]], suspects: str) -> Verdict:
    named = {f"pair {index + 1}": pair for index, pair in enumerate(pairs)}
    return _correlations(name, f"{claim} (largest correlation)", named, suspects)


def _correlations(name: str, claim: str, pairs: Mapping[str, tuple[FloatArray, FloatArray]], suspects: str) -> Verdict:
    level = LEVEL / max(1, len(pairs))
    comparisons = []
    for where, (one, other) in pairs.items():
        limit = correlation_limit(len(one), level)
        comparisons.append(Comparison(correlation(one, other), -limit, limit, where))
    worst = worst_of(comparisons) if comparisons else Comparison(0.0, -1.0, 1.0, "nothing to compare")
    return within(
        PART, name, claim, worst.figure, worst.least, worst.most, false_alarm=LEVEL, where=worst.where,
        suspects=suspects,
    )  # fmt: skip
