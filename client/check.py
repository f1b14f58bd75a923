"""``consilium site check``: the only place where faults in a site's data are told, and only at the site."""

from __future__ import annotations

from typing import Any

import numpy as np

from client.assemble import UNIT, policy_of, rows_of
from client.config import SiteConfig
from common.config import TaskSection
from common.data.split import count
from common.data.units import NO_UNIT, count_units, units_of
from common.model import Placement, load_base, locate
from common.tasks.base import Fault
from common.tasks.registry import task_of
from common.toml_settings import validate

SHOWN = 20


def check_site(config: SiteConfig, task_name: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Reads all data, encodes every row as a plan would, and says what would be shared.

    Args:
        labels: the plan's label names (sequence classification).

    Raises:
        ConsiliumError: settings, models or files cannot be used at all.
    """
    settings = validate(TaskSection, {"name": task_name, "labels": labels}, "--task/--labels")
    task = task_of(settings)
    base = load_base(locate(config.models[0]), task, Placement.choose("cpu"), settings.pooling)
    data = {}
    for name, entry in config.data.items():
        rows = rows_of(entry, task.fields)
        ids = rows.pop(UNIT, None)
        _, faults = task.encode(rows, base.tokenizer)
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
    shared = {
        "site": config.site.name,
        "populations": {
            name: {"public_size": one.public_size, "unit": one.unit}
            for name, one in policy_of(config).populations.items()
        },
        "tasks": list(config.policy.tasks),
        "max_rank": config.policy.max_rank,
    }
    remarks = []
    if not config.policy.coordinator_keys:
        remarks.append("policy.coordinator_keys is empty: no plan can run here; add the coordinator's public key")
    return {"data": data, "shared": shared, "remarks": remarks}
