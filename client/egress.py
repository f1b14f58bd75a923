"""The one gate out of a site: whatever leaves is built here, from an allow-list.

An update that arrives here is already private, and so is a metric; what is checked is form. Values that are not finite
(an overflow of the received adapter, which the coordinator chose) are sent as zero: that is post-processing of a
private value.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from safetensors.numpy import load, save

from client.privacy.ledger import Decision, PlanEntry, StoredRelease
from common.adapter import AdapterSpec
from common.errors import AdapterError
from common.messages import (
    Pending,
    PlanStatus,
    PrivacyStatement,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    Tensors,
    TrainRequest,
    joined,
    parted,
)

LARGEST = 1e30
"""Values beyond it are clamped, so that no reply can carry an extreme exponent."""


NO_METRICS: Mapping[str, float] = MappingProxyType({})


def release(
    update: Tensors,
    spec: AdapterSpec,
    means: Mapping[str, float] = NO_METRICS,
    bounds: Mapping[str, float] = NO_METRICS,
) -> bytes:
    """The bytes of a release: exactly the tensors of ``spec`` and the metrics of ``bounds``, fp32, finite and bounded.

    Args:
        means: each metric as a share of its bound, noise included.
        bounds: largest value of each metric that the plan asks for.

    Raises:
        AdapterError: another layout, or other metrics.
    """
    spec.check(update, "release")
    if means.keys() != bounds.keys():
        raise AdapterError(f"release: metrics {sorted(means)} instead of {sorted(bounds)}; this is a defect")
    clean = {
        name: np.clip(np.nan_to_num(update[name], nan=0.0, posinf=0.0, neginf=0.0), -LARGEST, LARGEST) + np.float32(0)
        for name in spec.names
    }
    shares = {name: np.clip(np.nan_to_num(means[name], nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0) for name in bounds}
    metrics = {name: float(share * bounds[name]) + 0.0 for name, share in shares.items()}
    return save(joined({name: np.ascontiguousarray(array, np.float32) for name, array in clean.items()}, metrics))


def reply(site: str, request: TrainRequest, request_digest: str, stored: StoredRelease) -> Release:
    """A stored release as the reply to the request it was made for."""
    update, metrics = parted(load(stored.payload))
    return Release(site, request.run_id, request.round, request_digest, update, stored.head, metrics)


def refuse(site: str, reason: RefusalReason) -> Refusal:
    """A refusal: the reason alone."""
    return Refusal(site, reason)


def pending(site: str) -> Pending:
    """The plan awaits a person."""
    return Pending(site)


def description(
    site: str,
    entry: PlanEntry | RefusalReason,
    code_digest: str,
    tasks: tuple[str, ...],
    max_rank: int,
    public_size: int,
    fixed_keys: bool,
) -> SiteDescription:
    """The site's public description. With fixed test keys no ε is claimed."""
    if isinstance(entry, RefusalReason):
        status: PlanStatus = PlanStatus.REFUSED
        refusal: RefusalReason | None = entry
        statement: PrivacyStatement | None = None
    else:
        status = {
            Decision.APPROVED: PlanStatus.READY,
            Decision.WAITING: PlanStatus.WAITING,
            Decision.REFUSED: PlanStatus.REFUSED,
            Decision.CLOSED: PlanStatus.REFUSED,
        }[entry.decision]
        refusal, statement = entry.refusal, entry.statement if entry.decision is Decision.APPROVED else None
    if statement is not None and fixed_keys:
        fields = {**vars(statement), "epsilon": None}
        statement = PrivacyStatement(**fields)
    return SiteDescription(site, status, refusal, code_digest, tasks, max_rank, public_size, statement)
