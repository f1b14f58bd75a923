"""Whatever a trainer does, no byte that its data chose leaves by another way than the numbers of a whole release.

Trainers are drawn at random: they raise errors of any kind whose texts quote a patient, with causes and notes that do
so too; they log what they see; they return tensors too many, too few, of other shapes and types, named after a patient,
sparse, not finite. Each is tried twice, with two patients. All that a relay can see of the answer, and what it makes of
it for Flower, must be the same for both, or the numbers of a release in their one form.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sites import classifier, encoded, phase, plan_for, random_state, request_for, shown, site_for

import client.app
import client.site
from client.agent import FAULT, Agent
from client.egress import LARGEST
from common import wire
from common.adapted import AdaptedModel
from common.errors import (
    AdapterError,
    ConfigError,
    ConnectionFailed,
    DataError,
    LedgerError,
    ModelError,
    PrivacyError,
)
from common.messages import Release, TrainRequest
from common.plan import Plan
from common.protos import site_pb2 as pb
from common.rpc import AgentAddress, RemoteSite, train_reply_of, train_request_frames

PATIENTS = "Jane-Roe-4711", "Q"
"""Of different lengths, so that a size would tell them apart."""
EXAMPLES = 20

ERRORS: tuple[type[Exception], ...] = (
    *(ValueError, KeyError, RuntimeError, MemoryError, OSError, StopIteration, RecursionError, UnicodeError, EOFError),
    *(ArithmeticError, AssertionError, TimeoutError, sqlite3.OperationalError, grpc.RpcError, ExceptionGroup),
    *(AdapterError, ConfigError, DataError, LedgerError, ModelError, PrivacyError, ConnectionFailed),
)
"""Not ``WireError``: it says that the request is at fault, and only what reads requests raises it."""

Tensors = dict[str, np.ndarray[Any, Any]]
Outcome = Callable[[str, Tensors], Tensors]
"""From a patient's name and tensors of the right layout to what the trainer returns, or raises."""


def raises(kind: type[Exception], chained: bool, noted: bool) -> Outcome:
    def outcome(patient: str, right: Tensors) -> Tensors:
        error = ExceptionGroup(patient, [ValueError(patient)]) if kind is ExceptionGroup else kind(patient)
        if noted:
            error.add_note(f"while {patient} was read")
        if chained:
            raise error from KeyError(patient)
        raise error

    return outcome


def changed(change: Callable[[str, Tensors], object]) -> Outcome:
    def outcome(patient: str, right: Tensors) -> Tensors:
        change(patient, right)
        return right

    return outcome


def first(right: Tensors) -> str:
    return min(right)


WRONG: dict[str, Outcome] = {
    "one tensor less": changed(lambda patient, right: right.pop(first(right))),
    "nothing": lambda patient, right: {},
    "one named after the patient": changed(lambda patient, right: right.update({patient: np.ones(1, np.float32)})),
    "a hidden metric": changed(lambda patient, right: right.update({f"metrics/{patient}": np.ones((), np.float32)})),
    "as long as the name": changed(
        lambda patient, right: right.update({first(right): np.ones(len(patient), np.float32)})
    ),
    "turned": changed(lambda patient, right: right.update({first(right): right[first(right)][None]})),
}
"""Trainers of another layout."""


def holed(value: float, share: int) -> Outcome:
    """Every so many numbers another value, from a place on that the patient decides."""

    def outcome(patient: str, right: Tensors) -> Tensors:
        for array in right.values():
            array.reshape(-1)[len(patient) % share :: share] = value
        return right

    return outcome


outcomes = st.one_of(
    st.tuples(st.just(False), st.builds(raises, st.sampled_from(ERRORS), st.booleans(), st.booleans())),
    st.tuples(st.just(False), st.sampled_from(sorted(WRONG)).map(WRONG.__getitem__)),
    st.tuples(
        st.just(True),
        st.builds(
            holed, st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 1.0]), st.integers(1, 50)
        ),
    ),
)
"""Whether a release comes of it, and what the trainer does."""


@dataclass
class Talkative:
    """A site whose trainer is told what to do, and that says aloud what it sees."""

    model: AdaptedModel
    plan: Plan
    listen: str
    rounds: Iterator[int] = field(default_factory=lambda: count(1))
    outcome: Outcome = WRONG["nothing"]
    patient: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors that a round trains."""

    def train_round(self, model: AdaptedModel, *arguments: Any, **named: Any) -> Tensors:
        """In the place of :func:`client.trainer.train_round`."""
        logging.getLogger("client.trainer").warning("now comes %s", self.patient)
        names = next(each for each in arguments if isinstance(each, tuple))
        self.shapes = dict(model.spec.part(names).shapes)
        right = {name: np.full(shape, 0.5, np.float32) for name, shape in self.shapes.items()}
        return self.outcome(self.patient, right)

    def answers(self, outcome: Outcome, patient: str) -> tuple[list[bytes], tuple[object, ...], bytes]:
        """Frames and status of the agent, and the relay's record, of the next round."""
        self.outcome, self.patient = outcome, patient
        request = request_for(self.plan, random_state(self.model), next(self.rounds))
        frames, status = self._asked(request)
        with RemoteSite(AgentAddress(self.listen)) as agent:
            message = wire.train_request_to_record(request)
            record = self._relayed(lambda: client.app.relay_train(message, agent))
        return frames, status, recorddict_to_proto(record).SerializeToString(deterministic=True)

    def _asked(self, request: TrainRequest) -> tuple[list[bytes], tuple[object, ...]]:
        with grpc.insecure_channel(self.listen) as channel:
            ask = channel.stream_stream(
                "/consilium.site.v1.SiteAgent/Train", pb.TrainRequestFrame.SerializeToString, lambda raw: raw
            )
            call, frames = ask(iter(list(train_request_frames(request))), timeout=30), []
            with suppress(grpc.RpcError):
                frames.extend(call)
            return frames, (call.code(), call.details(), *call.initial_metadata(), *call.trailing_metadata())

    @staticmethod
    def _relayed(relay: Callable[[], RecordDict]) -> RecordDict:
        """As :func:`client.app._through_agent` does it."""
        try:
            return relay()
        except Exception:
            return wire.unavailable_record()


@pytest.fixture(scope="module")
def talkative(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talkative]:
    model, folder = classifier(tiny_bert), tmp_path_factory.mktemp("talkative")
    plan = plan_for(model, [phase(rounds=4 * EXAMPLES + 40)])
    site = site_for(folder, model, encoded(model, 4))
    site.describe(shown(plan))
    agent = Agent(site, listen := f"unix:{folder / 'agent.sock'}")
    made = Talkative(model, plan, listen)
    agent.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.site, "train_round", made.train_round)
        yield made
    agent.stop(grace=0)
    site.ledger.close()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=outcomes)
def test_no_byte_that_the_data_chose_leaves_but_the_numbers_of_a_whole_release(
    talkative: Talkative, caplog: pytest.LogCaptureFixture, drawn: tuple[bool, Outcome]
) -> None:
    caplog.clear()
    comes, outcome = drawn
    ours, theirs = (talkative.answers(outcome, patient) for patient in PATIENTS)
    for frames, status, record in (ours, theirs):
        everything = b"".join([*frames, repr(status).encode(), record])
        assert PATIENTS[0].encode() not in everything
        assert bool(frames) == comes
        if not comes:
            assert status == (grpc.StatusCode.INTERNAL, FAULT)
            continue
        release = train_reply_of(pb.TrainReplyFrame.FromString(frame) for frame in frames)
        assert isinstance(release, Release) and release.metrics == {}
        assert {name: array.shape for name, array in release.update.items()} == talkative.shapes
        for array in release.update.values():
            assert array.dtype == np.float32 and np.isfinite(array).all() and np.abs(array).max() <= np.float32(LARGEST)
            assert not np.signbit(array[array == 0]).any()
    assert ours[1] == theirs[1]
    assert [len(frame) for frame in ours[0]] == pytest.approx([len(frame) for frame in theirs[0]], abs=2)
    assert comes or ours[2] == theirs[2]
    assert not [each for each in caplog.records if each.name in ("client.app", "common.rpc", "common.wire")]
