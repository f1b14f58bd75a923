"""``consilium site check``: the only place where faults in a site's data are told, and only at the site."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from client.assemble import UNIT, policy_of, rows_of
from client.config import SiteConfig
from client.exposure import TRUSTING, welcome_users
from client.policy import Policy, rounded
from common.code import code_digest
from common.data.read import Rows
from common.data.split import count, select
from common.data.units import NO_UNIT, count_units, units_of
from common.errors import ConfigError, DataError
from common.messages import UNDERSTATED
from common.model import Placement, digest_of, load_base, locate
from common.sections import TaskSection
from common.tasks.base import Fault, Task
from common.tasks.registry import task_of
from common.tasks.sequence_classification import SequenceClassification
from common.toml_settings import validate

SHOWN = 20
MOST_IDS = 10_000
"""Whole numbers up to here may be labels given by id."""


def check_site(
    config: SiteConfig, task_name: str = "", labels: tuple[str, ...] = (), source: Path | None = None
) -> dict[str, Any]:
    """Reads all data, encodes every row as a plan would, and says what would be shared.

    Args:
        task_name: empty: the first task that the policy allows.
        labels: the plan's label names (sequence classification); none: those that occur, whatever a plan may name.
        source: ``site.toml``; with it, what would keep the agent from starting is told too.

    Raises:
        ConsiliumError: settings, models or files cannot be used at all.
    """
    task_name = task_name or next(iter(config.policy.tasks), SequenceClassification.name)
    assumed = () if labels or task_name != SequenceClassification.name else labels_in(config)
    settings = validate(TaskSection, {"name": task_name, "labels": labels or assumed}, "--task/--labels")
    task = task_of(settings)
    base = load_base(locate(config.models[0]), task, Placement.choose("cpu"), settings.pooling)
    data = {}
    for name, entry in config.data.items():
        rows = rows_of(entry, task.fields)
        ids = rows.pop(UNIT, None)
        faults = list(_faults(task, rows, base.tokenizer))
        units = np.arange(count(rows)) if ids is None else units_of(ids)
        faults += [Fault(int(row), UNIT, "names no unit") for row in np.flatnonzero(units == NO_UNIT)]
        data[name] = {
            "population": entry.population,
            "unit": config.populations[entry.population].unit,
            "rows": count(rows),
            "units": count_units(units),
            "faults": len({fault.row for fault in faults}),
            "first_faults": [vars(fault) for fault in faults[:SHOWN]],
        }
    policy = policy_of(config)
    shared = {
        "site": config.site.name,
        "populations": {
            name: {"public_size": one.public_size, "unit": one.unit} for name, one in policy.populations.items()
        },
        "tasks": list(config.policy.tasks),
        "max_rank": config.policy.max_rank,
        "code_digest": code_digest(),
    }
    models = {name: digest_of(locate(name)) for name in config.models}
    remarks = [*_remarks(config, models, source), *_understated(policy, data)]
    remarks += [_assumption(assumed)] if assumed else []
    return {"data": data, "models": models, "shared": shared, "remarks": remarks}


def print_report(report: dict[str, Any]) -> None:
    """What :func:`check_site` found, for people."""
    for name, entry in report["data"].items():
        print(
            f"data '{name}': {entry['rows']} rows, {entry['units']} privacy units ({entry['unit']}); "
            f"{entry['faults']} rows cannot be learnt from (they contribute zero)"
        )
        for fault in entry["first_faults"]:
            print(f"  row {fault['row']}: {fault['field']} {fault['reason']}")
    for name, digest in report["models"].items():
        print(f"base model '{name}': {digest}")
    print(f"what this site shows the coordinator: {json.dumps(report['shared'])}")
    for remark in report["remarks"]:
        print(f"remark: {remark}")


def _faults(task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Fault]:
    """Of every row; one that makes the task or the tokenizer fail is a fault too."""
    try:
        yield from task.encode(rows, tokenizer)[1]
        return
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        pass
    for index in range(count(rows)):
        try:
            found = task.encode(select(rows, [index]), tokenizer)[1]
        except KeyboardInterrupt:
            raise
        except BaseException:
            found = [Fault(index, "row", "cannot be encoded")]
        yield from (replace(fault, row=index) for fault in found)


def labels_in(config: SiteConfig) -> tuple[str, ...]:
    """The labels that occur in the site's data, in no plan's order; of ids all up to the largest.

    Raises:
        DataError: there are fewer than two, so the column is hardly one of labels.
    """
    values: set[str] = set()
    for entry in config.data.values():
        values |= {str(value) for value in rows_of(entry, SequenceClassification.fields)["label"] if value is not None}
    if values and all(value.isdecimal() for value in values) and (largest := max(map(int, values))) < MOST_IDS:
        values = {str(value) for value in range(largest + 1)}
    if len(values) < 2:
        raise DataError(
            "data.NAME.columns: the column of 'label' holds fewer than two labels; name another, or say with --labels "
            "which labels a plan would have"
        )
    return tuple(sorted(values))


def _assumption(labels: tuple[str, ...]) -> str:
    few = ", ".join(map(repr, labels[:SHOWN])) + (", ..." if len(labels) > SHOWN else "")
    return f"every label that occurs was taken for a label of the plan ({len(labels)}: {few}); name a plan's: --labels"


def _understated(policy: Policy, data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Data sets with more units than a coordinator, who knows the declared size alone, counts on."""
    for name, entry in data.items():
        declared = policy.populations[entry["population"]].public_size
        if entry["units"] > UNDERSTATED * declared:
            yield (
                f"populations.{entry['population']}.public_size = {declared}: data '{name}' holds {entry['units']} "
                f"privacy units, more than {UNDERSTATED:g} times as many; what is promised holds all the same, but a "
                "coordinator may find this site's updates too long to be honest and turn them away, and what they "
                f"spent stays spent. Declare {rounded(entry['units'])} before the agent first starts: then it is fixed"
            )


def _remarks(config: SiteConfig, models: dict[str, str], source: Path | None) -> Iterator[str]:
    """What does not stop this check, and would stop the agent or every plan."""
    if not config.policy.coordinator_keys:
        yield "policy.coordinator_keys is empty: no plan can run here; add the coordinator's public key"
    for name, digest in models.items():
        if digest not in config.policy.base_models:
            yield (
                f"the agent will not start: policy.base_models does not list the weights of '{name}', whose digest is "
                f"{digest}; add it once these files were reviewed"
            )
    if config.testing is not None:
        yield "[testing] fixed keys are in use: no privacy is claimed; take the section out before real data come"
    if source is not None:
        try:
            if welcome_users(config, source) == frozenset({os.geteuid()}):
                yield TRUSTING
        except ConfigError as error:
            yield f"the agent will not start: {error}"
