"""Libraries written in Rust (tokenizers) end a panic in Python as an exception that is no ``Exception``. What a record
brings about that way must not show outside either: no missing release, and no call without an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from small_sites import (
    classifier,
    plan_for,
    random_state,
    request_for,
    shown,
    site_for,
)

from client.agent import FAULT, Agent
from client.assemble import encode_each
from common.adapted import AdaptedModel
from common.examples import Examples
from common.messages import Release
from common.protos import site_pb2 as pb
from common.protos import site_pb2_grpc
from common.tasks.sequence_classification import SequenceClassification


class Panic(BaseException):
    """As ``pyo3_runtime.PanicException``."""


class Panicking:
    """A site in which whatever is asked ends so."""

    def describe(self, request: Any) -> Any:
        raise Panic("Jane Roe")

    train = describe


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdaptedModel:
    return classifier(tiny_bert)


def test_a_row_whose_encoding_panics_is_void_and_leaves_the_others(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_id = SequenceClassification.label_id

    def touchy(self: SequenceClassification, value: Any) -> int | None:
        if value == "panic":
            raise Panic("byte index 3 is not a char boundary of 'Jane Roe'")
        return label_id(self, value)

    monkeypatch.setattr(SequenceClassification, "label_id", touchy)
    rows = {"text": ["mild cough", "chest pain"], "label": ["routine", "panic"]}
    first, second = encode_each(rows, model)
    assert first is not None and second is None


def test_data_whose_reading_panics_yield_a_release_of_noise(model: AdaptedModel, tmp_path: Path) -> None:
    def panics() -> Examples:
        raise Panic("no")

    plan = plan_for(model)
    site = site_for(tmp_path, model, panics)
    site.describe(shown(plan))
    assert isinstance(site.train(request_for(plan, random_state(model))), Release)


@pytest.mark.parametrize("call", ["describe", "train"])
def test_a_panic_inside_the_site_is_answered_with_the_words_of_any_fault(tmp_path: Path, call: str) -> None:
    listen = f"unix:{tmp_path / 'agent.sock'}"
    agent = Agent(Panicking(), listen)
    agent.start()
    try:
        with grpc.insecure_channel(listen) as channel, pytest.raises(grpc.RpcError) as caught:
            stub = site_pb2_grpc.SiteAgentStub(channel)
            if call == "describe":
                stub.Describe(pb.DescribeRequest(run_id="run"), timeout=10)
            else:
                list(stub.Train(iter([pb.TrainRequestFrame(header=pb.TrainRequestHeader(run_id="run"))]), timeout=10))
    finally:
        agent.stop(grace=0)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, FAULT)
