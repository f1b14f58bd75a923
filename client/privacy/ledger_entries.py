"""What the ledger takes and gives: populations, plans, funded rounds, stored releases."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from client.privacy.sampling import RoundSecret
from common.messages import PhaseStatement, PrivacyStatement, RefusalReason


class Decision(StrEnum):
    """Where a plan stands at this site."""

    WAITING = "waiting"
    APPROVED = "approved"
    REFUSED = "refused"
    CLOSED = "closed"
    """It has ended: nothing of it is trained or sent again, and nothing of it is refunded."""


@dataclass(frozen=True)
class Population:
    """Whose budget it is."""

    name: str
    unit: str
    public_size: int
    lifetime_epsilon: float
    lifetime_delta: float


@dataclass(frozen=True)
class PlanEntry:
    """A plan as the ledger knows it."""

    digest: str
    run_id: str
    body: str
    decision: Decision
    refusal: RefusalReason | None
    statement: PrivacyStatement | None
    received_at: str
    decided_at: str | None = None
    population: str = ""
    signature: str = ""
    """The coordinator's, as it was shown."""
    closed_because: str = ""


@dataclass(frozen=True)
class Reservation:
    """A funded round: exactly one release of exactly this request, with exactly this secret."""

    plan: str
    round: int
    request_digest: str
    phase: PhaseStatement
    """q, σ and C as reserved; ``steps`` are those of this round."""
    secret: RoundSecret


@dataclass(frozen=True)
class StoredRelease:
    """What left for a round, to be sent again unchanged."""

    payload: bytes
    head: str
    """The signed head of the audit log that went with it."""
