"""(a) Neighbour replay: what one unit changes, with the noise known and taken off.

Twin sites share their keys (``fixed_seed``), so they draw the same noise, and the difference of two releases of one
step is exactly the difference of their clipped sums. Every phase of the plan is replayed twice, as one step at q = 1:

loud
    the plan's clip norm, which every gradient exceeds: one unit must move the sum by C at most.
quiet
    a clip norm far above every gradient: nothing is clipped, so a loss that depends on the other units shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from client.privacy.audit.probe import Folders, NoRelease, Probe, Subject, audited_phase, closing, slices_of, subject_of
from client.privacy.audit.subjects import (
    LENGTH,
    NOT_A_NUMBER,
    OUTLIER,
    OUTSIDE,
    Unit,
    example,
    examples_of_units,
    failing,
    random_adapter,
    small_model,
)
from client.privacy.audit.verdicts import FloatArray, Verdict, within
from common.adapted import AdaptedModel
from common.config import RunConfig
from common.sections import EXAMPLE, PhaseSection

PART = "replay"
PUBLIC_SIZE = 64
LEARNING_RATE = 64.0 * 1024
"""η/(q·public_size) is then 1024: adding the update to the adapter and taking it off again hardly rounds it."""
QUIET = 256.0
"""Clip norm of the quiet replay, in units of max(1, C)."""
ROUNDING = 2e-6
"""Differences of sums are known up to this share of their sizes (fp32, 2^-24 at each of a few operations)."""
PHYSICAL_BATCH = 4


@dataclass(frozen=True)
class Replay:
    """Sums of all data sets in one round."""

    phase: PhaseSection
    subject: Subject
    round: int
    sums: dict[str, FloatArray]

    def moved(self, one: str, other: str) -> FloatArray:
        """By how much the sums of two data sets differ."""
        return self.sums[one] - self.sums[other]

    def rounding(self, *names: str) -> float:
        """What floating point may add to a difference of these sums."""
        return ROUNDING * float(sum(np.linalg.norm(self.sums[name]) for name in names))

    @property
    def loud(self) -> bool:
        """Whether the plan's own clip norm is in use."""
        return self.phase.name.endswith("-loud")


def replay(config: RunConfig, seed: int, folders: Folders, done: Callable[[], None]) -> list[Verdict]:
    """All verdicts of the part."""
    grouped = config.unit != EXAMPLE
    clip_norm = max(phase.clip_norm for phase in config.phases)
    model = small_model(config, clip_norm)
    subject = subject_of(config, model, PUBLIC_SIZE, _phases(config), run_id="replay", delta=1e-5)
    data = data_sets(model, grouped, config.privacy.max_examples_per_unit)
    rows = max(PHYSICAL_BATCH, config.privacy.max_examples_per_unit)
    sums: dict[str, list[FloatArray]] = {}
    missing: dict[str, str] = {}
    for name, units in data.items():
        try:
            sums[name] = _sums(subject, units, grouped, seed, folders, rows)
        except NoRelease as error:
            missing[name] = str(error)
        done()
    rounds = [
        Replay(phase, subject, index + 1, {name: each[index] for name, each in sums.items()})
        for index, phase in enumerate(subject.plan.phases)
    ]
    verdicts = [_answered(data, missing)]
    if {"nothing", "base"} <= sums.keys():
        halved = _public_size(config, subject, seed, folders, rounds, rows)
        verdicts += [_denominator(rounds, halved), _sensitivity(rounds), _independence(rounds), *_zeros(rounds)]
        verdicts += [_unit_mean(rounds)] if grouped else []
    return verdicts


def _phases(config: RunConfig) -> list[PhaseSection]:
    """Each different way of training in the plan, loud and quiet."""
    found: dict[tuple[object, ...], PhaseSection] = {}
    for phase in config.phases:
        found.setdefault((phase.train, phase.layers, phase.algorithm, phase.clip_norm), phase)
    fixed = {
        "rounds": 1, "steps": 1, "sample_rate": 1.0, "batch_size": None, "learning_rate": LEARNING_RATE,
        "budget_share": 1.0,
    }  # fmt: skip
    return [
        audited_phase(phase, **fixed, name=f"{phase.name[:58]}-{kind}", clip_norm=clip_norm)
        for phase in found.values()
        for kind, clip_norm in (("loud", phase.clip_norm), ("quiet", QUIET * max(1.0, phase.clip_norm)))
    ]


def data_sets(model: AdaptedModel, grouped: bool, most: int) -> dict[str, list[Unit]]:
    """``base``; ``base`` with one unit more, of each kind, at its end; the kinds alone; and none."""
    generator = np.random.default_rng(2)

    def unit(length: int, token: int | None = None, count: int = 1) -> Unit:
        return tuple(example(model, generator, length, token) for _ in range(count))

    sizes = (1, 2, 1, 1, 3) if grouped else (1,) * 5
    # Two or three short units share a physical batch with the unit that is added, which is short as well.
    base = [unit(length, count=size) for length, size in zip((9, 14, 30, 40, 20), sizes, strict=True)]
    one = unit(12)
    kinds: dict[str, Unit] = {
        "ordinary": one,
        "outlier": unit(11, OUTLIER),
        "long": unit(LENGTH),
        "void": (None,),
        "nan": unit(10, NOT_A_NUMBER),
        "failing": (failing(example(model, generator, 10)),),
        "outside": unit(10, OUTSIDE),
    }
    if grouped:
        kinds["many"] = unit(13, count=2 * most + 2)
        kinds["copies"] = one * min(most, 5)
        kinds["partly nan"] = (*one, *unit(10, NOT_A_NUMBER)) if most > 1 else kinds["nan"]
    sets: dict[str, list[Unit]] = {"nothing": [], "base": base, "base less one": base[:-1], "voids": [(None,)] * 5}
    sets |= {f"base and {kind}": [*base, added] for kind, added in kinds.items()}
    sets |= {kind: [kinds[kind]] for kind in ("ordinary", "outlier", "long")}
    return sets


def _sums(
    subject: Subject, units: Sequence[Unit], grouped: bool, seed: int, folders: Folders, rows: int
) -> list[FloatArray]:
    examples = examples_of_units(subject.model, units, grouped)
    adapter = random_adapter(subject.model)
    with closing(Probe(folders(), subject, examples, seed, rows=rows)) as probe:
        assert probe.statement.phases
        return [probe.noisy_sum(round, adapter) for round in range(1, subject.plan.rounds + 1)]


# ------------------------------------------------------------------------------------------------------------ verdicts


def _answered(data: dict[str, list[Unit]], missing: dict[str, str]) -> Verdict:
    where = "; ".join(f"{name}: {what}" for name, what in missing.items())
    return within(
        PART,
        "release-always-sent",
        "every data set is answered with a release, also an empty one and one with a unit that yields NaN or fails",
        float(len(missing)),
        most=0,
        where=where or f"{len(data)} data sets",
        suspects="whether a release comes depends on a unit: a NaN or a failure is answered with a refusal or an error",
    )


def _public_size(
    config: RunConfig, subject: Subject, seed: int, folders: Folders, rounds: Sequence[Replay], rows: int
) -> float:
    """Size of a release of noise at a site of twice the public size, relative to the first site's; half is right."""
    doubled = subject_of(config, subject.model, 2 * PUBLIC_SIZE, subject.plan.phases, run_id="replay", delta=1e-5)
    try:
        sums = _sums(doubled, [], False, seed, folders, rows)
    except NoRelease:
        return float("nan")
    # noisy_sum has multiplied by the public size; without that the release itself is half as large.
    ratios = [_ratio(sums[each.round - 1], each.sums["nothing"]) / 2 for each in rounds]
    return max(ratios, key=lambda ratio: abs(ratio - 0.5))


def _ratio(one: FloatArray, other: FloatArray) -> float:
    """Of two sizes; 1 where nothing was released at all, which is for other checks to find."""
    sizes = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    return 1.0 if sizes == (0.0, 0.0) else sizes[0] / max(sizes[1], 1e-300)


def _denominator(rounds: Sequence[Replay], halved: float) -> Verdict:
    """Five void units and none: both are noise alone, and of the same size."""
    ratios = [_ratio(each.sums["voids"], each.sums["nothing"]) for each in rounds if "voids" in each.sums]
    ratio = max(ratios, key=lambda value: abs(value - 1), default=float("nan"))
    by_size = not abs(halved - 0.5) <= 1e-5 and abs(ratio - 1) <= 1e-5
    return within(
        PART,
        "public-denominator",
        "a release is divided by q · public_size: neither the true number of units nor the number drawn enters",
        halved / 0.5 if by_size else ratio,
        1 - 1e-5,
        1 + 1e-5,
        where="twice the public size" if by_size else "five void units against none",
        suspects="the denominator does not follow the declared public size"
        if by_size
        else "the denominator comes from the true number of units",
    )


def _sensitivity(rounds: Sequence[Replay]) -> Verdict:
    """‖sum(D ∪ u) − sum(D)‖ ≤ C."""
    worst, suspects, where, allowed = 0.0, "", "", 1.0
    for each in rounds:
        clip_norm = each.phase.clip_norm
        for one, other in _neighbours(each):
            moved = float(np.linalg.norm(each.moved(one, other)))
            limit = clip_norm + each.rounding(one, other)
            if moved / limit > worst / allowed:
                worst, allowed = moved / clip_norm, limit / clip_norm
                where, suspects = f"{one} ({each.phase.name})", _overshoot(rounds, each, one, other)
    return within(
        PART,
        "sensitivity",
        "adding or removing one unit moves the clipped sum by the clip norm C at most (figure in units of C)",
        worst,
        most=allowed,
        where=where,
        suspects=suspects,
    )


def _neighbours(each: Replay) -> list[tuple[str, str]]:
    kinds = ("ordinary", "outlier", "long", "many", "copies")
    pairs = [(f"base and {kind}", "base") for kind in kinds]
    pairs += [("base", "base less one"), *((kind, "nothing") for kind in kinds)]
    return [(one, other) for one, other in pairs if one in each.sums and other in each.sums]


def _overshoot(rounds: Sequence[Replay], each: Replay, one: str, other: str) -> str:
    """What the way in which a difference exceeds C looks like."""
    moved, clip_norm = each.moved(one, other), each.phase.clip_norm
    size = float(np.linalg.norm(moved))
    if one.removeprefix("base and ") in ("many", "copies"):
        ordinary = float(np.linalg.norm(each.moved("base and ordinary", "base")))
        if ordinary <= clip_norm + each.rounding("base and ordinary", "base"):
            return "the privacy unit is ignored: each example of a unit is clipped and counted on its own"
    quiet = rounds[each.round].moved(one, other) if each.loud else moved
    unclipped = {}
    for name, part in slices_of(each.subject, each.round).items():
        whole = float(np.linalg.norm(quiet[part]))
        if whole > 1e-3 * float(np.linalg.norm(quiet)):
            unclipped[name] = abs(float(np.linalg.norm(moved[part])) / whole - 1) < 0.02
    if all(unclipped.values()):
        return "gradients are not clipped"
    if any(unclipped.values()):
        return f"{', '.join(name for name, whole in unclipped.items() if whole)} escapes clipping"
    ratio = size / clip_norm
    if ratio < 4.5 and abs(ratio - round(ratio)) < 2e-3:
        return f"gradients are clipped to {round(ratio)} times the clip norm, or a unit is added {round(ratio)} times"
    return "clipping is not by unit: the contributions of other units change with it"


def _independence(rounds: Sequence[Replay]) -> Verdict:
    """sum(D ∪ u) − sum(D) = sum({u}) − sum(∅): what a unit contributes does not depend on who else is there."""
    worst, where, loud = 0.0, "", True
    for each in rounds:
        for kind in ("ordinary", "outlier", "long"):
            names = (f"base and {kind}", "base", kind, "nothing")
            if not all(name in each.sums for name in names):
                continue
            alone = each.moved(kind, "nothing")
            error = float(np.linalg.norm(each.moved(f"base and {kind}", "base") - alone))
            # Another row of the physical batch may round differently: 1e-4 of the contribution is far above that.
            figure = error / (1e-4 * float(np.linalg.norm(alone)) + each.rounding(*names))
            if not figure <= worst:
                worst, where, loud = figure, f"{kind} ({each.phase.name})", each.loud
    return within(
        PART,
        "units-independent",
        "what a unit contributes does not depend on the other units (figure in units of rounding)",
        worst,
        most=1.0,
        where=where,
        suspects="clipping acts on a whole batch instead of on each unit"
        if loud
        else "the loss or its gradient is averaged over the batch",
    )


def _zeros(rounds: Sequence[Replay]) -> list[Verdict]:
    """A unit without a gradient contributes nothing, and the others the same as without it."""
    return [
        _unchanged(
            rounds,
            "empty-is-noise",
            "void units contribute exactly zero: their release equals that of a site without data, bit for bit",
            (("voids", "nothing"), ("base and void", "base")),
            exact=True,
            suspects="units that cannot be learnt from change the release",
        ),
        _unchanged(
            rounds,
            "nan-contributes-zero",
            "a unit whose gradient is not finite contributes exactly zero, and all others the same, bit for bit",
            (("base and nan", "base"), ("base and partly nan", "base")),
            exact=True,
            suspects="a gradient that is not a number reaches the sum and the release",
        ),
        _unchanged(
            rounds,
            "failure-contributes-zero",
            "a unit that fails contributes zero, and the others the same as without it (figure in units of rounding)",
            (("base and failing", "base"), ("base and outside", "base")),
            exact=False,
            suspects="after a failure the units of its batch are added twice, or are lost",
        ),
    ]


def _unchanged(
    rounds: Sequence[Replay], name: str, claim: str, pairs: Sequence[tuple[str, str]], exact: bool, suspects: str
) -> Verdict:
    worst, where = 0.0, ""
    for each in rounds:
        for one, other in pairs:
            if one not in each.sums or other not in each.sums:
                continue
            error = float(np.linalg.norm(each.moved(one, other)))
            if not exact:
                clipped = 1e-4 * float(np.linalg.norm(each.moved("base", "nothing")))
                error /= clipped + each.rounding(one, other)
            if not error <= worst:
                worst, where = error, f"{one} ({each.phase.name})"
    return within(PART, name, claim, worst, most=0.0 if exact else 1.0, where=where, suspects=suspects)


def _unit_mean(rounds: Sequence[Replay]) -> Verdict:
    """k copies of one example are as much as the example."""
    worst, where = 0.0, ""
    for each in rounds:
        names = ("base and copies", "base and ordinary")
        if all(name in each.sums for name in names):
            error = float(np.linalg.norm(each.moved(*names)))
            scale = 1e-4 * float(np.linalg.norm(each.moved("base and ordinary", "base")))
            figure = error / (scale + each.rounding(*names, "base"))
            if not figure <= worst:
                worst, where = figure, each.phase.name
    return within(
        PART,
        "unit-is-a-mean",
        "a unit of several examples contributes their mean gradient, as one unit (figure in units of rounding)",
        worst,
        most=1.0,
        where=where,
        suspects="the privacy unit is ignored: the examples of a unit are added up",
    )
