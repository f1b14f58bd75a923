"""Whether one sweep is better than another, or one run than another, and how sure that is.

Two sweeps are paired cell by cell: the same choices, the same seed. The paired t-test (Student 1908) takes the
differences for draws from one normal distribution; Wilcoxon's signed-rank test (1945) only for symmetric ones, and is
given from six pairs on, below which it cannot reach p < 0.05.

Two runs that keep their answers to the same examples are compared by McNemar's exact test (1947): of the examples that
one run alone answers rightly, each is as likely the first's as the second's if the runs are equally good. It takes the
examples for independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common.errors import ConfigError, DataError, OutputError, did_you_mean
from simulations.records import read_record

LEAST_FOR_WILCOXON = 6
CONFIDENCE = 0.95
SPLITS = ("validation", "test")
DIGESTS = "evaluation_data_digests"


def compare(first: Path, second: Path, metric: str | None = None, split: str | None = None) -> dict[str, Any]:
    """What two folders of one kind say about each other; differences are second - first.

    Args:
        metric: default: the one that chose the best round.
        split: default: ``test``, where both have it.

    Raises:
        OutputError: a folder holds no finished run or sweep, or they hold one of each.
        DataError: they were evaluated on other data, or have nothing in common.
        ConfigError: a metric or split that is not there.
    """
    kinds = [_kind(folder) for folder in (first, second)]
    if kinds[0] != kinds[1]:
        raise OutputError(f"{first} holds a {kinds[0]} and {second} a {kinds[1]}; compare two of one kind")
    found = {"kind": kinds[0], "first": str(first), "second": str(second)}
    return {**found, **(_runs if kinds[0] == "run" else _sweeps)(first, second, metric, split)}


def _kind(folder: Path) -> str:
    for name, kind in (("sweep.json", "sweep"), ("summary.json", "run")):
        if (folder / name).is_file():
            return kind
    raise OutputError(
        f"{folder}: holds no finished run or sweep (neither summary.json nor sweep.json); finish it first"
    )


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def _sweeps(first: Path, second: Path, metric: str | None, split: str | None) -> dict[str, Any]:
    sides = [_completed(folder) for folder in (first, second)]
    names = [name for name in sides[0] if name in sides[1]]
    if not names:
        raise DataError(
            f"{first} and {second}: have no finished cell in common; sweep both over the same values and seeds"
        )
    pairs = [(sides[0][name], sides[1][name]) for name in names]
    split, metric = _chosen(pairs, metric, split)
    for name in names:
        _same_data(first / "cells" / name, second / "cells" / name, split)
    differences = [_figure(b, split, metric) - _figure(a, split, metric) for a, b in pairs]
    by_choice: dict[str, list[float]] = {}
    for (row, _), difference in zip(pairs, differences, strict=True):
        title = ", ".join(f"{key} {value}" for key, value in row["choices"].items()) or "all"
        by_choice.setdefault(title, []).append(difference)
    return {
        "metric": metric,
        "split": split,
        "pairs": [
            {"cell": name, "first": _figure(a, split, metric), "second": _figure(b, split, metric), "difference": one}
            for name, (a, b), one in zip(names, pairs, differences, strict=True)
        ],
        "left_out": sorted({*sides[0], *sides[1]} - set(names)),
        "by_choices": {title: paired_test(values) for title, values in by_choice.items()},
        **paired_test(differences),
    }


def _completed(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        row["cell"]: row for row in read_record(folder / "sweep.json", "cells")["cells"] if row["status"] == "completed"
    }


def paired_test(differences: Sequence[float]) -> dict[str, Any]:
    """Mean difference, its confidence interval and p by the paired t-test, and p by Wilcoxon's test where it can tell.

    ``None`` wherever there is nothing to say: of a single pair, and of pairs that all differ by the same.
    """
    from scipy import stats

    n, mean = len(differences), fmean(differences)
    found: dict[str, Any] = {
        "n": n, "difference": mean, "standard_deviation": stdev(differences) if n > 1 else None,
        "confidence": CONFIDENCE, "confidence_interval": None, "t_test_p": None, "wilcoxon_p": None,
    }  # fmt: skip
    if n < 2 or max(differences) - min(differences) <= 1e-12 * max(1.0, abs(mean)):
        return found
    tested = stats.ttest_1samp(differences, 0.0)
    interval = tested.confidence_interval(CONFIDENCE)
    found |= {"confidence_interval": [float(interval.low), float(interval.high)], "t_test_p": float(tested.pvalue)}
    if n >= LEAST_FOR_WILCOXON:
        found["wilcoxon_p"] = float(stats.wilcoxon(differences).pvalue)
    return found


# ---- runs -----------------------------------------------------------------------------------------------------------


def _runs(first: Path, second: Path, metric: str | None, split: str | None) -> dict[str, Any]:
    sides = tuple(read_record(folder / "summary.json", "metric", *SPLITS) for folder in (first, second))
    split, metric = _chosen([(sides[0], sides[1])], metric, split)
    _same_data(first, second, split)
    shown = [name for name in sides[0][split] if name in sides[1][split] and name != "examples"]
    figures = {
        name: {
            "first": sides[0][split][name],
            "second": sides[1][split][name],
            "difference": _figure(sides[1], split, name) - _figure(sides[0], split, name),
        }
        for name in shown
    }
    own, others = _answers(first, split), _answers(second, split)
    tested = None if own is None or others is None else mcnemar(own, others)
    return {"metric": metric, "split": split, "n": 1, "metrics": figures, "mcnemar": tested}


def _answers(folder: Path, split: str) -> list[bool] | None:
    """Which examples of the split the run answers rightly; ``None`` where it has kept no such answers."""
    file = folder / "answers.json"
    if not file.is_file() or split not in _digests(folder):
        return None
    kept = read_record(file, "split", "right")
    return list(kept["right"]) if kept["split"] == split else None


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """How many examples only one of two runs answers rightly, and the exact two-sided p of such a division.

    Args:
        first: of each example, whether it is answered rightly.
        second: the other run's answers, to the same examples in the same order.

    Raises:
        OutputError: the numbers of answers differ.
    """
    from scipy import stats

    if len(first) != len(second):
        raise OutputError(
            f"answers.json: {len(first)} answers cannot be paired with {len(second)} on the same data; one file is "
            "damaged, restore it from a copy"
        )
    pairs = list(zip(first, second, strict=True))
    only = pairs.count((True, False)), pairs.count((False, True))
    p = float(stats.binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0
    return {"examples": len(pairs), "only_first_right": only[0], "only_second_right": only[1], "p": p}


# ---- both -----------------------------------------------------------------------------------------------------------


def _chosen(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], metric: str | None, split: str | None
) -> tuple[str, str]:
    """Split and metric that all have."""
    rows = [row for pair in pairs for row in pair]
    if split is None:
        split = "test" if all(row["test"] for row in rows) else "validation"
    if not all(row[split] for row in rows):
        raise ConfigError(f"--split {split}: not all of the runs have such figures; use --split validation")
    known = set.intersection(*({name for name, value in row[split].items() if value is not None} for row in rows))
    known.discard("examples")
    metrics = {str(row["metric"]) for row in rows}
    if metric is None:
        if len(metrics) > 1:
            raise ConfigError(f"--metric: is missing; the runs were chosen by {' and '.join(sorted(metrics))}")
        metric = metrics.pop()
    if metric not in known:
        raise ConfigError(f"--metric {metric}: not all of the runs have it{did_you_mean(metric, known)}")
    return split, metric


def _figure(row: Mapping[str, Any], split: str, metric: str) -> float:
    value = row[split][metric]
    return math.nan if value is None else float(value)


def _same_data(first: Path, second: Path, split: str) -> None:
    """Raises DataError where two runs were not evaluated on the same rows."""
    digests = [_digests(folder).get(split) for folder in (first, second)]
    if digests[0] != digests[1]:
        raise DataError(
            f"{first} and {second}: were evaluated on different {split} data; their figures cannot be paired"
        )


def _digests(folder: Path) -> dict[str, str]:
    """Split → digest of the rows that a run was evaluated on."""
    return dict(read_record(folder / "manifest.json", DIGESTS)[DIGESTS])


def in_words(content: Mapping[str, Any]) -> str:
    """The comparison as a person reads it."""
    what = f"{content['split']} {content['metric']}"
    head = f"{content['second']} - {content['first']}"
    return "\n".join([head, *(_of_runs(content) if content["kind"] == "run" else _of_sweeps(content, what))])


def _of_runs(content: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  {content['split']} {name.replace('_', '-')}: {one['first']:.4f} → {one['second']:.4f}  "
        f"({one['difference']:+.4f})"
        for name, one in content["metrics"].items()
    ]
    tested = content["mcnemar"]
    if tested is None:
        advice = "One pair of runs proves nothing: another seed may turn it round. Compare sweeps of several seeds."
        return [*lines, advice]
    return [
        *lines,
        f"{tested['examples']} examples: {tested['only_first_right']} are right in the first run alone, "
        f"{tested['only_second_right']} in the second alone; McNemar's exact test p = {tested['p']:.3g}",
        "This covers which examples the split happens to hold, not the seed: another one may turn it round. Compare "
        "sweeps of several seeds.",
    ]


def _of_sweeps(content: Mapping[str, Any], what: str) -> list[str]:
    width = max(len(pair["cell"]) for pair in content["pairs"])
    lines = [
        f"  {pair['cell']:<{width}}  {pair['first']:.4f} → {pair['second']:.4f}  ({pair['difference']:+.4f})"
        for pair in content["pairs"]
    ]
    if len(content["by_choices"]) > 1:
        lines += ["by setting:", *(f"  {title}: {_result(one)}" for title, one in content["by_choices"].items())]
    lines.append(f"{what}, all pairs: {_result(content)}")
    if content["n"] == 1:
        lines.append("One pair proves nothing: another seed may turn it round. Sweep both over several seeds.")
    else:
        lines.append("This covers the spread over seeds (and settings), not which examples the split happens to hold.")
    if content["left_out"]:
        lines.append(f"left out, since the other sweep has no such finished cell: {', '.join(content['left_out'])}")
    return lines


def _result(one: Mapping[str, Any]) -> str:
    text = f"n = {one['n']}, difference {one['difference']:+.4f}"
    if one["confidence_interval"] is None:
        return text if one["n"] == 1 else f"{text} in every pair, so there is no spread to test against"
    low, high = one["confidence_interval"]
    text += f", {one['confidence']:.0%} confidence interval {low:+.4f} to {high:+.4f}"
    text += f", paired t-test p = {one['t_test_p']:.3g}"
    return text if one["wilcoxon_p"] is None else f"{text}, Wilcoxon p = {one['wilcoxon_p']:.3g}"
