"""The one gate out of a site: whatever leaves is built here, from an allow-list.

An update that arrives here is already private, and so is a metric; what is checked is form. Values that are not finite
(an overflow of the received adapter, which the coordinator chose) are sent as zero: that is post-processing of a
private value. So is writing the update in the plan's number format, and adding to it what rounding took away from
earlier releases (error feedback: Seide et al. 2014, Interspeech, §3; Karimireddy et al. 2019, arXiv 1901.09847).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from client.privacy.ledger import Decision, PlanEntry, StoredRelease
from common import number_formats
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
    WireTensors,
    joined,
    parted,
)

LARGEST = number_formats.LARGEST
"""Values beyond it are clamped, so that no reply can carry an extreme exponent, and every number format can say them:
whether a release comes must not depend on its numbers."""

NO_METRICS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Rounding:
    """How a release is written: the plan's number format, and what goes with rounding at random."""

    form: number_formats.NumberFormat = "fp32"
    draw: number_formats.Draw | None = None
    """For int8, from the round's secret, so that a round executed again gives the same release."""
    residual: bytes | None = None
    """What rounding has taken away from earlier releases of the phase, as :class:`Outgoing` held it."""
    feeds_back: Collection[str] = ()
    """Tensors of which it is added to the next release."""
    last: bool = False
    """Whether there is no next release of the phase, so that nothing is to be kept."""


@dataclass(frozen=True)
class Outgoing:
    """A release, and what stays behind."""

    payload: bytes
    residual: bytes | None
    """What rounding has taken away so far; stored with the release, and never sent. ``None``: nothing is to be kept."""


def release(
    update: Tensors,
    spec: AdapterSpec,
    means: Mapping[str, float] = NO_METRICS,
    bounds: Mapping[str, float] = NO_METRICS,
    rounding: Rounding = Rounding(),
) -> Outgoing:
    """Exactly the tensors of ``spec`` and the metrics of ``bounds``, finite and bounded, in the plan's number format.

    Its size is a function of ``spec``, ``bounds`` and the format alone.

    Args:
        means: each metric as a share of its bound, noise included.
        bounds: largest value of each metric that the plan asks for.

    Raises:
        AdapterError: another layout, or other metrics.
    """
    spec.check(update, "release")
    if means.keys() != bounds.keys():
        raise AdapterError(f"release: metrics {sorted(means)} instead of {sorted(bounds)}; this is a defect")
    clean = {name: _bounded(update[name]) for name in spec.names}
    shares = {name: np.clip(np.nan_to_num(means[name], nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0) for name in bounds}
    metrics = {name: float(share * bounds[name]) + 0.0 for name, share in shares.items()}
    encoded, residual = _rounded(clean, spec, rounding)
    return Outgoing(save(joined(encoded, metrics)), residual)


def _bounded(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    finite = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    return np.ascontiguousarray(np.clip(finite, -LARGEST, LARGEST) + np.float32(0), np.float32)


def _rounded(clean: Tensors, spec: AdapterSpec, rounding: Rounding) -> tuple[WireTensors, bytes | None]:
    """With u the update, e the residual and Q the rounding: sends Q(u + e), keeps e ← (u + e) − Q(u + e)."""
    residual = {} if rounding.residual is None else load(rounding.residual)
    before = {name: array for name, array in residual.items() if name in rounding.feeds_back}
    wanted = {name: _bounded(clean[name] + before[name]) if name in before else clean[name] for name in spec.names}
    encoded = number_formats.encode(wanted, rounding.form, rounding.draw)
    sent = number_formats.decode(encoded, spec, rounding.form)
    after = {**before, **{name: wanted[name] - sent[name] for name in spec.names if name in rounding.feeds_back}}
    return encoded, save(after) if after and not rounding.last else None


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
