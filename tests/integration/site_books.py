"""What lies on a site's disk, as somebody finds it who comes after the process has ended; and what must hold of it."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load

from client.audit_chain import Entry, read_entries
from client.audit_head import Head
from client.audit_log import verify
from client.privacy.counter import Counter
from common.messages import Release, parted
from common.privacy.accounting import Segment, filter_epsilon
from common.signing import SigningKey

Round = tuple[str, int]
"""Run id and round."""
AFTER_A_KILL = 1
"""So many transactions may the counter be behind the ledger, once the process was killed in between."""


@dataclass(frozen=True)
class Books:
    """A site's ledger, counter, secrets and audit log.

    Attributes:
        plans: run id → decision.
        decided: run ids of the plans that were approved, or refused by a person or for want of budget.
        reserved: (run id, phase) → (q, σ, steps).
        charged: round → (digest of the request, phase, steps, whether it is released).
        stored: round → the bytes that left, and the head that went along.
    """

    plans: dict[str, str]
    decided: set[str]
    reserved: dict[tuple[str, str], tuple[float, float, int]]
    charged: dict[Round, tuple[str, str, int, bool]]
    stored: dict[Round, tuple[bytes, str]]
    secrets: dict[Round, bytes]
    limit: float
    delta: float
    sequence: int
    counted: int
    trail: tuple[Entry, ...]

    @property
    def overspent(self) -> bool:
        """Whether more is reserved than the lifetime limit allows."""
        return filter_epsilon([Segment(*one) for one in self.reserved.values()], self.delta) > self.limit


def read_books(state: Path, counter: Path) -> Books:
    """Reads a copy: SQLite would mend what a killed process has left."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in state.glob("ledger.sqlite*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, scratch)
        with closing(sqlite3.connect(Path(scratch, "ledger.sqlite"))) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                return Books({}, set(), {}, {}, {}, {}, 0.0, 1e-5, 0, 0, _trail(state))
            runs = dict(db.execute("SELECT digest, run_id FROM plans"))
            sequence = db.execute("SELECT value FROM meta WHERE key='sequence'").fetchone()
            declared = db.execute("SELECT lifetime_epsilon, lifetime_delta FROM populations").fetchone()
            count = Counter(counter).read()
            return Books(
                plans={runs[digest]: status for digest, status in db.execute("SELECT digest, status FROM plans")},
                decided={run for (run,) in db.execute("SELECT run_id FROM plans WHERE decided_at IS NOT NULL")},
                reserved={
                    (runs[plan], phase): rest
                    for plan, phase, *rest in db.execute(
                        "SELECT plan, name, sample_rate, noise_multiplier, steps FROM reservations"
                    )
                },
                charged={
                    (runs[plan], round): (request, phase, steps, released is not None)
                    for plan, round, request, phase, steps, released in db.execute(
                        "SELECT plan, round, request_digest, phase, steps, released_at FROM charges"
                    )
                },
                stored={
                    (runs[plan], round): (payload, head)
                    for plan, round, payload, head in db.execute("SELECT plan, round, payload, head FROM releases")
                },
                secrets={
                    (runs.get(plan, plan), int(round)): file.read_bytes()
                    for file in (state / "secrets").glob("*-*")
                    for plan, _, round in [file.name.rpartition("-")]
                },
                limit=declared[0] if declared else 0.0,
                delta=declared[1] if declared else 1e-5,
                sequence=int(sequence[0]),
                counted=count.number if count else 0,
                trail=_trail(state),
            )


def _trail(state: Path) -> tuple[Entry, ...]:
    if not (state / "audit.jsonl").exists():
        return ()
    with (state / "audit.jsonl").open("rb") as stream:
        return tuple(read_entries(stream))


@dataclass
class Auditor:
    """Compares what was found on the disk after each life of a site with all that was found and received before.

    Attributes:
        received: every release that the coordinator got, by round.
    """

    state: Path
    counter: Path
    books: Books | None = None
    received: dict[Round, Release] = field(default_factory=dict)
    _secrets: defaultdict[Round, set[bytes]] = field(default_factory=lambda: defaultdict(set))

    def receive(self, release: Release) -> None:
        """A release arrives at the coordinator, perhaps once more."""
        before = self.received.setdefault((release.run_id, release.round), release)
        assert same_release(before, release), f"round {release.round} of {release.run_id} was released twice"

    def inspect(self, killed: bool = True) -> Books:
        """What lies on the disk now, if all is as it must be.

        Args:
            killed: whether the last process was, and could not finish what it had begun.

        Raises:
            AssertionError: it is not.
        """
        books = read_books(self.state, self.counter)
        self._nothing_is_forgotten(books)
        self._charges_cover_releases(books)
        self._one_secret_for_each_round(books, killed)
        self._trail_is_whole(books)
        behind = books.sequence - books.counted
        assert 0 <= behind <= (AFTER_A_KILL if killed else 0), f"the counter is {behind} behind the ledger"
        assert not books.overspent, "more is reserved than the lifetime limit allows"
        self.books = books
        return books

    def _nothing_is_forgotten(self, books: Books) -> None:
        before = self.books
        if before is None:
            return
        assert before.plans.keys() <= books.plans.keys()
        assert before.reserved.items() <= books.reserved.items(), "a reservation was changed or forgotten"
        assert {r: c[:3] for r, c in before.charged.items()}.items() <= {
            r: c[:3] for r, c in books.charged.items()
        }.items(), "a charge was changed or forgotten"
        for round, release in before.stored.items():
            assert books.stored.get(round) == release or books.plans[round[0]] == "closed", "a release was changed"
        assert books.trail[: len(before.trail)] == before.trail, "the audit log's past was changed"

    def _charges_cover_releases(self, books: Books) -> None:
        steps: defaultdict[tuple[str, str], int] = defaultdict(int)
        for (run, _), (_, phase, count, _) in books.charged.items():
            steps[run, phase] += count
        for phase, count in steps.items():
            assert count <= books.reserved[phase][2], f"{count} steps of {phase} are charged, more than reserved"
        released = {round for round, charge in books.charged.items() if charge[3]}
        assert books.stored.keys() <= released
        assert self.received.keys() <= released, "a release was received that is not in the ledger"
        for round, release in self.received.items():
            assert books.charged[round][0] == release.request_digest
            if round in books.stored:
                payload, head = books.stored[round]
                assert (payload_of(release), release.head) == (tensors_of(payload), head), "another release was sent"

    def _one_secret_for_each_round(self, books: Books, killed: bool) -> None:
        needed = {
            round for round, charge in books.charged.items() if not charge[3] and books.plans[round[0]] == "approved"
        }
        assert needed <= books.secrets.keys(), "the secret of a charged round is gone"
        assert killed or books.secrets.keys() <= needed, "a secret outlived its round"
        for round in books.secrets.keys() & books.charged.keys():
            self._secrets[round].add(books.secrets[round])
            assert len(books.secrets[round]) == 32 and len(self._secrets[round]) == 1, f"{round} has several secrets"

    def _trail_is_whole(self, books: Books) -> None:
        log = self.state / "audit.jsonl"
        if not books.trail:
            assert not books.charged
            return
        key = SigningKey.load(self.state / "site.key").public
        newest = max(
            (Head.parse(release.head) for release in self.received.values()), key=lambda head: head.lines, default=None
        )
        verdict = verify(log, newest, key)
        assert verdict.intact, verdict.fault
        lines: defaultdict[Round, set[object]] = defaultdict(set)
        for entry in books.trail:
            if entry.event == "round released":
                lines[str(entry.details["run"]), int(str(entry.details["round"]))].add(entry.details["release"])
        for round, digests in lines.items():
            assert len(digests) == 1, f"the audit log tells of several releases of {round}"
        for round, (payload, _) in books.stored.items():
            assert lines[round] == {hashlib.sha256(payload).hexdigest()}, "the audit log tells of another release"


def tells_all(books: Books) -> None:
    """The audit log knows of every plan and every decision in the ledger, once an agent has started after a kill.

    Raises:
        AssertionError: it does not.
    """
    shown = {entry.details["run"]: entry.details["plan"] for entry in books.trail if entry.event == "plan received"}
    assert shown.keys() == books.plans.keys(), "the audit log does not know every plan"
    decided = {entry.details["plan"] for entry in books.trail if entry.event == "plan decided"}
    closed = {entry.details["plan"] for entry in books.trail if entry.event == "plan closed"}
    for run in books.decided:
        assert shown[run] in decided, f"the audit log does not know what was decided about {run}"
    for run, decision in books.plans.items():
        assert decision != "closed" or shown[run] in closed, f"the audit log does not know that {run} was closed"


Tensors = tuple[dict[str, bytes], dict[str, float]]


def tensors_of(payload: bytes) -> Tensors:
    """What stored bytes hold."""
    update, metrics = parted(load(payload))
    return {name: array.tobytes() for name, array in update.items()}, dict(metrics)


def payload_of(release: Release) -> Tensors:
    """What a reply holds."""
    return {name: array.tobytes() for name, array in release.update.items()}, dict(release.metrics)


def same_release(one: Release, other: Release) -> bool:
    """Whether two replies tell the same, bit by bit."""
    return (payload_of(one), one.head, one.request_digest) == (payload_of(other), other.head, other.request_digest)
