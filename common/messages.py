"""The typed requests and replies between the coordinator and a site, and the interface a site offers.

Nothing here knows how messages travel: ``common/wire.py`` maps them to Flower records, ``common/rpc.py`` to protobuf.
Tensors are numpy arrays by canonical name (plain PEFT names); no torch, no pydantic, since the relay imports this
module anew for every message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

SCHEMA_VERSION = 1
UNDERSTATED = 1.1
"""A site's true number of privacy units is counted on to be at most so many times its declared public size."""
Tensors = Mapping[str, npt.NDArray[np.float32]]
"""Canonical name → fp32 array."""
WireTensors = Mapping[str, npt.NDArray[Any]]
"""Tensors in the number format they travel in (:mod:`common.number_formats`); in fp32 the tensors themselves."""
LARGEST_TRANSFER = 512 << 20
"""Bytes of tensor data in one message; more is refused with the figure."""
INITIAL = "initial"
"""In place of a tensor's digest: as it is before round 1, which each side makes from the plan's public seed. The bits
are not covered, since the linear algebra of two machines may round differently."""


class RefusalReason(StrEnum):
    """Why a site does not serve a request. A closed list, computed from policy, plan and ledger alone; never a figure,
    never anything that depends on the data."""

    POLICY = "policy"
    """The plan asks for something the site's policy does not allow."""
    BUDGET = "budget"
    """The plan does not fit under the lifetime budget of the population."""
    TOO_SMALL = "too-small"
    """The declared public size is too small for the plan's batch."""
    UNKNOWN_PLAN = "unknown-plan"
    """The plan was never described to this site, or belongs to another run."""
    PLAN_CHANGED = "plan-changed"
    """The run id is known with another plan."""
    SIGNATURE = "signature"
    """The plan is not signed by a coordinator key that the site has pinned."""
    CODE_MISMATCH = "code-mismatch"
    """Coordinator or relay run other code than the agent."""
    CLOSED = "closed"
    """The plan has ended at this site: it expired, its data were changed or withdrawn, or a person closed it."""
    BLOCKED = "blocked"
    """The site has stopped itself, because its ledger or audit log may be an older copy; people there must look."""
    OUT_OF_ORDER = "out-of-order"
    """The round lies before one already served, or outside the plan."""
    REQUEST_CHANGED = "request-changed"
    """The round was already served for another request."""
    ADAPTER_LAYOUT = "adapter-layout"
    """The adapter in the request does not have the plan's layout or number format."""
    ADAPTER_MISSING = "adapter-missing"
    """The request leaves out tensors that the site does not hold (any more); asked in full, it answers."""
    MODEL = "model"
    """The plan's model cannot be trained privately as the plan asks: one record could move another's gradient."""
    SEED_LOST = "seed-lost"
    """A reserved round can no longer be executed as the same release."""


class PlanStatus(StrEnum):
    """What a site thinks of a plan."""

    READY = "ready"
    WAITING = "waiting"
    REFUSED = "refused"


@dataclass(frozen=True)
class PhaseStatement:
    """What was calibrated for one phase, from the plan and the declared public size alone."""

    name: str
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    """Steps over all rounds of the phase."""


@dataclass(frozen=True)
class PrivacyStatement:
    """What one site was promised for one plan, all rounds included, whether or not they were executed."""

    epsilon: float | None
    """``None``: no privacy is claimed (mechanism ``none``, or fixed test keys)."""
    delta: float | None
    unit: str
    neighbouring: str
    accountant: str
    steps: int
    phases: tuple[PhaseStatement, ...]


@dataclass(frozen=True)
class DescribeRequest:
    """Shows a site the plan of a run and asks whether it takes part."""

    run_id: str
    plan: str
    """The plan as canonical JSON."""
    code_digest: str
    """Digest of the code the relay was shipped with."""
    signature: str = ""
    """The coordinator's signature of the plan's digest (:mod:`common.signing`)."""
    witness: str = ""
    """The newest signed head of this site's audit log that the coordinator has seen; a site whose own log is shorter
    was put back to an older copy."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class SiteDescription:
    """A site's public description and its stand on the plan."""

    site: str
    status: PlanStatus
    refusal: RefusalReason | None
    code_digest: str
    tasks: tuple[str, ...]
    max_rank: int
    public_size: int
    """As declared in the site's policy; never the true count unless the site consents."""
    privacy: PrivacyStatement | None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class TrainRequest:
    """Asks for one round of local training. The round alone selects the phase; nothing else can be asked for."""

    run_id: str
    round: int
    """From 1 over all phases."""
    plan_digest: str
    adapter: WireTensors = field(repr=False)
    """The tensors that travel. Of the others the site holds what it was last sent, or what the plan starts with."""
    adapter_digest: str = ""
    """Of the whole adapter (:func:`adapter_digest`); left out where all of it travels in fp32."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.adapter_digest:
            digests = {name: tensor_digest(array) for name, array in self.adapter.items()}
            object.__setattr__(self, "adapter_digest", adapter_digest(digests))

    def digest(self) -> str:
        """SHA-256 over run, round, plan and the whole adapter, however much of it travels."""
        fields = ("train-request", self.run_id, str(self.round), self.plan_digest, self.adapter_digest)
        return hashlib.sha256("\0".join(fields).encode()).hexdigest()


@dataclass(frozen=True)
class Release:
    """The only thing of value that leaves a site: the privatised update of the round's trainable tensors."""

    site: str
    run_id: str
    round: int
    request_digest: str
    update: WireTensors = field(repr=False)
    """θ_local − θ_received of exactly the tensors this round trains, in the plan's number format."""
    head: str = ""
    """The signed head of the site's audit log at this release: how many lines, and the hash of the last."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the site's training examples in this round, under the plan's own budget: exactly those that the plan
    asks for. fp32 values."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Pending:
    """The plan still awaits the site's approval."""

    site: str


@dataclass(frozen=True)
class Refusal:
    """The site does not serve the request."""

    site: str
    reason: RefusalReason


@dataclass(frozen=True)
class Unavailable:
    """The relay could not get an answer from its agent. Carries nothing: the cause is logged at the site."""


TrainReply = Release | Pending | Refusal | Unavailable


class SiteService(Protocol):
    """What a site offers: in-process it is the ``Site`` itself, in a deployment a gRPC stub. One code path for both."""

    def describe(self, request: DescribeRequest) -> SiteDescription:
        """The site's description and its stand on the plan."""
        ...

    def train(self, request: TrainRequest) -> TrainReply:
        """One round of local training."""
        ...


METRIC = "metrics/"
"""Marks a metric among the tensors of a stored release; no tensor's name starts with it."""


def joined(update: WireTensors, metrics: Mapping[str, float]) -> dict[str, npt.NDArray[Any]]:
    """Tensors and metrics of a release in one mapping, each metric as an fp32 scalar."""
    return {**update, **{METRIC + name: np.array(value, np.float32) for name, value in metrics.items()}}


def parted(stored: WireTensors) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
    """What :func:`joined` has joined."""
    update = {name: array for name, array in stored.items() if not name.startswith(METRIC)}
    metrics = {name.removeprefix(METRIC): stored[name].item() for name in sorted(stored.keys() - update.keys())}
    return update, metrics


def tensor_digest(array: npt.NDArray[Any]) -> str:
    """SHA-256 over type, shape and raw little-endian bytes."""
    whole = np.asarray(array, order="C")
    state = hashlib.sha256(f"{whole.dtype.str}\0{whole.shape}\0".encode())
    state.update(whole.data)
    return state.hexdigest()


def adapter_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over each tensor's name and digest, in name order.

    Args:
        digests: name → :func:`tensor_digest` of the fp32 tensor, or ``INITIAL``.
    """
    lines = "".join(f"{name}\0{digests[name]}\0" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
