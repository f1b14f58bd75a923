"""Named places in the life of a site at which its process dies, as in a power cut: nothing after them is executed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import client.agent
import client.cli
import client.egress
import client.privacy.ledger_file
import client.privacy.plans
import client.privacy.rounds
import client.site
import common.rpc
from client.audit_log import AuditLog
from client.privacy.counter import Counter
from client.privacy.ledger import Ledger
from client.privacy.mechanism import DPSGD
from client.privacy.secret_files import SecretFiles

Strike = Callable[[], object]
"""What happens at the place: it kills the process, or raises where a test stays in one process."""


def die() -> None:
    """As ``kill -9`` from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillPoint:
    """Just before, or just after, certain calls of a function.

    Attributes:
        owner: the class or module that holds it.
        chosen: tells the calls that are meant by their arguments.
    """

    owner: Any
    name: str
    after: bool = False
    chosen: Callable[..., bool] = lambda *given, **named: True

    def replacement(self, strike: Strike = die, nth: int = 1) -> Callable[..., Any]:
        """The function that strikes at the ``nth`` of the calls that are meant."""
        real, left = getattr(self.owner, self.name), nth

        def mortal(*given: Any, **named: Any) -> Any:
            nonlocal left
            meant = self.chosen(*given, **named)
            left -= meant
            if meant and not left and not self.after:
                strike()
            result = real(*given, **named)
            if meant and not left and self.after:
                strike()
            return result

        return mortal

    def arm(self, strike: Strike = die, nth: int = 1) -> None:
        """Puts it in place, for the rest of this process's life."""
        setattr(self.owner, self.name, self.replacement(strike, nth))


@dataclass(frozen=True)
class FrameCut(KillPoint):
    """Among the frames of a message that has tensors.

    Attributes:
        frames: after so many; 0: in the middle.
    """

    frames: int = 0

    def replacement(self, strike: Strike = die, nth: int = 1) -> Callable[[Any], Iterator[Any]]:
        """The frames up to the place."""
        real, left = getattr(self.owner, self.name), nth

        def mortal(message: Any) -> Iterator[Any]:
            nonlocal left
            frames = list(real(message))
            meant = len(frames) > 1
            left -= meant
            last = min(self.frames or len(frames) // 2, len(frames)) if meant and not left else -1
            for number, frame in enumerate(frames):
                if number == last:
                    strike()
                yield frame
            if last == len(frames):
                strike()

        return mortal


def line(event: str) -> Callable[..., bool]:
    """Calls of ``AuditLog.append`` for one event."""
    return lambda log, told, **details: told == event


def number(wanted: int) -> Callable[..., bool]:
    """Calls of ``Counter.advance`` to one number; of a new site's one plan, 1 is its approval."""
    return lambda counter, count: count.number == wanted


def named(end: str) -> Callable[..., bool]:
    """Calls of ``os.replace`` that put a file of this name in place."""
    return lambda part, whole: Path(whole).name == end


def replaced(end: str) -> Callable[..., bool]:
    """Of these, those that put it in the place of another; the first head is signed when an agent starts."""
    return lambda part, whole: Path(whole).name == end and Path(whole).exists()


def opened(start: str) -> Callable[..., bool]:
    """Calls of ``os.open`` for a file whose name begins so."""
    return lambda path, *rest, **named: Path(os.fsdecode(path)).name.startswith(start)


FIRST_START = {
    "the site's key is made, but still empty": KillPoint(os, "open", after=True, chosen=opened("site.key")),
    "the ledger's tables are made, but not committed": KillPoint(client.privacy.ledger_file, "migrate", after=True),
    "the ledger is made, its counter is not": KillPoint(Counter, "put"),
    "the counter is written, but not in place": KillPoint(os, "replace", chosen=named("consilium.counter")),
    "ledger and counter are made, no population is declared": KillPoint(Ledger, "declare"),
}
DESCRIBE = {
    "the plan is received, but not committed": KillPoint(client.privacy.plans, "receive", after=True),
    "the plan is received, the audit log does not know": KillPoint(AuditLog, "append", chosen=line("plan received")),
    "the plan is approved, but not committed": KillPoint(client.privacy.plans, "approve", after=True),
    "the approval is committed, but not counted": KillPoint(Counter, "advance", chosen=number(1)),
    "the approval is counted, the audit log does not know": KillPoint(AuditLog, "append", chosen=line("plan decided")),
    "the plan is approved, nobody was told": KillPoint(client.egress, "description"),
}
TRAIN = {
    "before the round is reserved": KillPoint(Ledger, "reserve"),
    "the secret's file is made, but still empty": KillPoint(os, "write", chosen=lambda file, value: len(value) == 32),
    "the secret is stored, the round is not charged": KillPoint(SecretFiles, "write", after=True),
    "the round is charged, but not committed": KillPoint(client.privacy.rounds, "reserve", after=True),
    "the charge is committed, but not counted": KillPoint(Counter, "advance", chosen=number(2)),
    "the charge is counted, the audit log does not know": KillPoint(AuditLog, "append", chosen=line("round reserved")),
    "before the first step of training": KillPoint(client.site, "train_round"),
    "after the first of two steps of training": KillPoint(DPSGD, "step", after=True),
    "after training, before the gate": KillPoint(client.egress, "release"),
    "past the gate, the audit log does not know": KillPoint(AuditLog, "append", chosen=line("round released")),
    "the audit log tells of the release, its head is not signed": KillPoint(
        AuditLog, "append", after=True, chosen=line("round released")
    ),
    "the head is signed, but not in place": KillPoint(os, "replace", chosen=replaced("audit.jsonl.head")),
    "the head is stored, the release is not": KillPoint(Ledger, "record"),
    "the release is stored, but not committed": KillPoint(client.privacy.rounds, "record", after=True),
    "the release is committed, but not counted": KillPoint(Counter, "advance", chosen=number(3)),
    "the release is counted, the secret is still there": KillPoint(SecretFiles, "delete"),
    "the release is stored, nothing is sent": KillPoint(client.egress, "reply"),
    "only the reply's header is sent": FrameCut(client.agent, "train_reply_frames", frames=1),
    "half of the reply is sent": FrameCut(client.agent, "train_reply_frames"),
    "all of the reply is sent, but not its end": FrameCut(client.agent, "train_reply_frames", frames=1 << 30),
}
POINTS = {**FIRST_START, **DESCRIBE, **TRAIN}
"""Of the agent: what is the case at the place → the place."""
CHANGED_POLICY = {
    "another policy is remembered, the audit log does not know": KillPoint(
        AuditLog, "append", chosen=line("policy changed")
    ),
    "the audit log knows of another policy, the agent does not serve": KillPoint(
        AuditLog, "append", chosen=line("agent started")
    ),
}
"""Of an agent that starts with another policy than the last."""
RELAY = {
    "half of the request is sent": FrameCut(common.rpc, "train_request_frames"),
    "all of the request is sent": FrameCut(common.rpc, "train_request_frames", frames=1 << 30),
    "the reply's header has come": KillPoint(common.rpc, "_tensors"),
}
"""Of the relay."""
PERSON = {
    "the decision is committed, but not counted": KillPoint(Counter, "advance"),
    "the decision is counted, the audit log does not know": KillPoint(AuditLog, "append"),
    "the audit log knows, nobody was told": KillPoint(client.cli, "_tell_decision"),
}
"""Of a command that decides about a plan."""
