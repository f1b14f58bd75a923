"""The page's sentences. Each says no more than what the run's records support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from common.privacy.in_words import odds_in_words
from common.sections import EXAMPLE, PhaseSection
from server.report_page.content import BASE, TRAINED, Content, Metrics, Status
from server.report_page.participation import REASONS
from server.report_page.records import Round

SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MOST_LABELS = 12
SHARES = ("accuracy", "macro_f1", "rouge_l")
"""Metrics between 0 and 1, shown in per cent."""
NAMES = {"macro_f1": "mean F1", "rouge_l": "ROUGE-L"}
STATUS = {
    Status.COMPLETED: "Finished",
    Status.RUNNING: "Still running",
    Status.FAILED: "Stopped by an error",
    Status.UNFINISHED: "Not finished",
}
PARTS = {"head": "the classification layer", "lora": "the adapter (LoRA)"}


def counted(number: int, thing: str, things: str = "") -> str:
    """``one site``, ``nine sites``, ``40 sites``."""
    name = thing if number == 1 else things or f"{thing}s"
    return f"{SMALL[number] if 0 <= number < len(SMALL) else f'{number:,}'} {name}"


def metric_name(metric: str) -> str:
    """A metric's name for the reader."""
    return NAMES.get(metric, metric.replace("_", " "))


def figure(metric: str, value: float | None) -> str:
    """A metric's value; shares in per cent."""
    if value is None:
        return "–"
    return (
        f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        if metric in SHARES
        else f"{value:.3f}"
        if abs(value) < 10
        else f"{value:,.1f}"
    )


def short(metric: str, value: float) -> str:
    """A value on an axis; shares in per cent."""
    return f"{100 * value:g} %" if metric in SHARES else f"{value:g}"


def noisy_figure(metric: str, record: Round) -> str:
    """The sites' own metric in a round, with the deviation of the privacy noise in it."""
    value, noise = (record.get(key, {}).get(metric) for key in ("site_metrics", "site_metrics_noise"))
    if value is None:
        return ""
    return figure(metric, value) if noise is None else f"{figure(metric, value)} ± {figure(metric, noise)}"


def size(number: float) -> str:
    """Bytes for the reader."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("the last unit takes everything")


def power(value: float) -> str:
    """A small number as a power of ten: ``10⁻⁵``, ``2.5·10⁻⁶``."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if float(mantissa) == 1 else f"{float(mantissa):g}·10{digits}"


def duration(seconds: float) -> str:
    """Seconds for the reader."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def when(text: Any) -> str:
    """A time stamp to the minute."""
    try:
        return f"{datetime.fromisoformat(str(text)):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return ""


def ranges(numbers: Sequence[int]) -> str:
    """``1–3, 7``."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{group[0]}–{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)


def is_simulation(content: Content) -> bool:
    """Whether the sites were played by one machine."""
    return bool(content.records.manifest.get("kind") == "simulation")


def headline(content: Content) -> str:
    """The page's title."""
    number = len(content.records.sites)
    what = "simulated site" if is_simulation(content) else "site"
    if not content.rounds:
        return (
            f"Training one model at {counted(number, what)}: not begun" if number else "Training one model: not begun"
        )
    trained = "trained one model" if number == 1 else "trained one model together"
    return f"{_capital(counted(number, what))} {trained}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def state(content: Content) -> str:
    """How far the run is."""
    done, planned = len(content.rounds), content.planned_rounds
    text = f"{STATUS[content.status]}: {done} of {counted(planned, 'planned round')}"
    if content.status is Status.COMPLETED and done < planned:
        return f"{text}; phases stopped early, where the model no longer became better."
    return f"{text}."


def story(content: Content) -> Iterator[str]:
    """What was done, for a reader who was not there."""
    config, manifest = content.records.config, content.records.manifest
    yield f"{headline(content)}. The base model is “{manifest.get('model', config.model.name)}”, {_task(content)}."
    yield _data(content)
    yield _rounds(content)
    yield _travelled(content)
    if config.privacy.mechanism != "none":
        yield _protected(content)


def _task(content: Content) -> str:
    task = content.records.config.task
    if task.name == "causal-lm":
        return "to answer in free text"
    if not task.labels:
        return f"for the task “{task.name}”"
    more = f" and {len(task.labels) - MOST_LABELS} more" if len(task.labels) > MOST_LABELS else ""
    classes = counted(len(task.labels), "class", "classes")
    return f"to sort texts into {classes}: {', '.join(task.labels[:MOST_LABELS])}{more}"


def _data(content: Content) -> str:
    config, sizes = content.records.config, [one.public_size for one in content.accounts]
    if not sizes:
        return "No site has taken part yet."
    unit = config.unit
    declared = f"{sum(sizes):,} {unit}s, from {min(sizes):,} to {max(sizes):,} at one site"
    if len(sizes) == 1:
        declared = f"{sizes[0]:,} {unit}s"
    if is_simulation(content):
        where = f"from “{config.data.path}”" if config.data.path else "of the simulation's own"
        return (
            f"This was a simulation: all sites were played by the coordinator's own machines, on data {where}. "
            f"Together they had {declared}."
        )
    return (
        f"Each site used its own data under the name “{config.data.name}”, and declared how much that is: "
        f"{declared}. The declared figures are all the coordinator knows of the data."
    )


def _rounds(content: Content) -> str:
    phases = [f"{counted(one.settings.rounds, 'round')} on {_trained(one.settings)}" for one in content.phases]
    cohort = content.records.config.server.cohort
    asked = "every site that took part" if cohort == 1 else f"{cohort:.0%} of the sites, drawn anew each time"
    return (
        f"The plan was {', then '.join(phases)}. In each round the coordinator asked {asked}; each trained the "
        "same small addition to the model on its own data, and the changes were combined into one."
    )


def _trained(phase: PhaseSection) -> str:
    return " and ".join(PARTS[part] for part in phase.train)


def _travelled(content: Content) -> str:
    up = sum(one.bytes_up for one in content.phases)
    metrics = content.records.config.privacy.metrics
    beside = f", and with them, with noise, each site's mean {' and '.join(metrics)}" if metrics else ""
    what = f"changes of the adapter's numbers{beside}: {size(up)} in all"
    return (
        f"What was accepted from the sites was {what}. A reply of any other form does not count; refused, rejected and "
        "late replies are listed below."
    )


def _protected(content: Content) -> str:
    privacy = content.records.config.privacy
    stated = [one.stated for one in content.accounts if one.stated is not None]
    if not stated or len(stated) < len(content.accounts):
        return "Not every site states an ε, so this run promises no privacy as a whole; see the table by site."
    return (
        "Each site states that it added noise before anything left it, so that the whole plan costs any one "
        f"{content.records.config.unit} a privacy loss of ε = {max(stated):.2f} at most (the plan allows "
        f"{privacy.epsilon:g}). What that means stands under Privacy."
    )


def result(content: Content) -> str | None:
    """The result in one sentence."""
    base, trained = content.score(BASE), content.score(TRAINED)
    if base is None or trained is None or not content.rounds:
        return None
    split, before, after, more = "validation", base.validation, trained.validation, ""
    if base.test and trained.test:
        split, before, after = "test", base.test, trained.test
    elif trained.test:
        examples = int(trained.test.get("examples") or 0)
        more = f" On {examples:,} test examples it is {figure(content.metric, trained.test.get(content.metric))}."
    if before is None or after is None:
        return None
    old, new = (figure(content.metric, one.get(content.metric)) for one in (before, after))
    examples = int(after.get("examples") or 0)
    better = "" if content.higher_is_better else " (lower is better)"
    final = "" if content.status is Status.COMPLETED else " so far"
    return (
        f"On {examples:,} {split} examples held by the coordinator, {metric_name(content.metric)} went from "
        f" {old} before training to {new}{final}{better}.{more}"
    )


def fairness(content: Content) -> str | None:
    """How evenly the sites are served, in one sentence."""
    found = content.by_site
    if found is None or len(found.sites) < 2:
        return None
    worst, best = found.sites[0], found.sites[-1]
    value = [figure(content.metric, one.best.get(content.metric)) for one in (worst, best)]
    spread = f"{100 * found.spread:.1f} points" if content.metric in SHARES else f"{found.spread:.3f}"
    text = f"Worst served is {worst.site} with {value[0]}, best {best.site} with {value[1]}: a spread of {spread}."
    if found.worse_than_base:
        names = ", ".join(found.worse_than_base[:5]) + (" and others" if len(found.worse_than_base) > 5 else "")
        return f"{text} For {counted(len(found.worse_than_base), 'site')} ({names}) the model became worse by training."
    return f"{text} At no site is the model worse than before training."


def last_served(content: Content) -> str | None:
    """Which site is worst served after the last evaluated round, in one sentence."""
    known = [one for one in content.courses if one.last is not None]
    if len(known) < 2:
        return None
    worst, best = known[0], known[-1]
    value = [figure(content.metric, one.last) for one in (worst, best)]
    return (
        f"After round {worst.points[-1][0]} the worst served is {worst.site} with {value[0]}, the best {best.site} "
        f"with {value[1]}."
    )


def error_of(metric: str, scores: Metrics, examples: int) -> str:
    """Standard error of a site's accuracy, from the number of its examples; empty for other metrics."""
    value = scores.get(metric)
    if metric != "accuracy" or value is None or not examples:
        return ""
    return f"± {100 * (value * (1 - value) / examples) ** 0.5:.1f}"


def meaning(content: Content) -> Iterator[str]:
    """What ε promises."""
    stated = [(one.stated, one.delta or 0.0, one.unit) for one in content.accounts if one.stated is not None]
    if not stated:
        return
    yield odds_in_words(*max(stated))
    yield "The smaller ε is, the stronger the promise. It holds whatever else the reader knows, now or later."
    yield "It covers all rounds of the plan as approved, whether they were executed or not; nothing is given back."
    yield (
        "Combining the sites' changes, choosing the best round and publishing the adapter use only what had already "
        "left the sites, and cost nothing more."
    )


def limits(content: Content) -> Iterator[str]:
    """What ε does not promise."""
    config = content.records.config
    unit = config.unit
    yield (
        f"It protects any one {unit}, added or removed. What is true of many is learnt: that is the purpose. Whoever "
        f"has k {unit}s at a site has k times the ε."
    )
    if unit == EXAMPLE:
        yield "One example is one row. If a person has several rows, the person is protected less than the row."
    yield "A person with records at several sites has the sum of the sites' ε."
    yield (
        "It is the cost of this run alone. What other runs have cost a site, and the site's own lifetime limit, stand "
        "in the site's ledger, which the coordinator cannot see."
    )
    yield (
        "The coordinator's held-out data, with which the figures on this page were measured and the best round was "
        "chosen, are not protected by it."
    )
    if is_simulation(content):
        yield (
            "In a simulation sampling and noise come from a public seed: the figure says what the same plan promises "
            "where they are secret. Each simulated run starts with a fresh ledger, and choosing settings by comparing "
            "runs is not charged."
        )
    if config.privacy.noise == "fast":
        yield "The noise was made in floating point (“fast”): fit for simulations, not for release."


def reason(code: str) -> str:
    """Why a site was not heard, for a reader who did not write the software."""
    return REASONS.get(code, code)
