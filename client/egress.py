"""The one gate out of a site: whatever leaves is built here, from an allow-list.

An update that arrives here is already private; what is checked is form. Values that are not finite (an overflow of the
received adapter, which the coordinator chose) are sent as zero: that is post-processing of a private value.
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load, save

from client.privacy.ledger import Decision, PlanEntry
from common.adapter import AdapterSpec
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
)

LARGEST = 1e30
"""Values beyond it are clamped, so that no reply can carry an extreme exponent."""


def release(update: Tensors, spec: AdapterSpec) -> bytes:
    """The bytes of a release: exactly the tensors of ``spec``, fp32, finite and bounded.

    Raises:
        AdapterError: another layout.
    """
    spec.check(update, "release")
    clean = {
        name: np.clip(np.nan_to_num(update[name], nan=0.0, posinf=0.0, neginf=0.0), -LARGEST, LARGEST) + np.float32(0)
        for name in spec.names
    }
    return save({name: np.ascontiguousarray(array, np.float32) for name, array in clean.items()})


def reply(site: str, request: TrainRequest, request_digest: str, payload: bytes) -> Release:
    """A stored release as the reply to the request it was made for."""
    return Release(site, request.run_id, request.round, request_digest, load(payload))


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
        }[entry.decision]
        refusal, statement = entry.refusal, entry.statement if entry.decision is Decision.APPROVED else None
    if statement is not None and fixed_keys:
        fields = {**vars(statement), "epsilon": None}
        statement = PrivacyStatement(**fields)
    return SiteDescription(site, status, refusal, code_digest, tasks, max_rank, public_size, statement)
