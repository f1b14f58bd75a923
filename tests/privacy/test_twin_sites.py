"""Twin sites on D and D′, which differ in one record: with gradient sums stubbed to zero and noise fixed, nothing that
leaves one of them differs from what leaves the other, be it bytes, kinds of answers, statuses or sizes.

Everything is real but the sums: ``site.toml``, data files, tokenizer, agent, gRPC on a socket, relay, Flower records.
The model is hostile: one of its words is not a number, another lies outside its embedding, so that single records make
a forward pass yield NaN or fail.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from flwr.common.serde import recorddict_to_proto
from safetensors.numpy import load_file, save_file
from site_files import site_tables, write_site
from small_sites import classifier, language_model, phase, plan_for, random_state, request_for, shown
from transformers import AutoTokenizer

import client.app
import client.audit_log
from client.agent import Agent
from client.assemble import build_site
from client.config import read_site_config
from client.privacy.noisy_sum import GridSum
from client.privacy.sampling import RoundSecret
from common import wire
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.code import code_digest
from common.messages import TrainRequest
from common.plan import Plan
from common.protos import site_pb2 as pb
from common.rpc import AgentAddress, RemoteSite, train_request_frames
from common.signing import SigningKey
from common.tasks.causal_lm import CausalLM
from common.tasks.sequence_classification import SequenceClassification

FORBIDDEN = "forbidden"
"""A value that makes the task's own code raise."""

Row = Mapping[str, Any]
NOT_A_NUMBER, OUTSIDE = "kidney", "zebra"
"""Words of the hostile models: the embedding of one is NaN, the id of the other has no embedding."""

NOTES: list[Row] = [
    {"text": text, "label": label}
    for text, label in (
        ("man with mild cough since last night", "routine"),
        ("crushing chest pain today", "urgent"),
        ("wound check for two days . stitches out and test results of the week before", "review"),
        ("child with high fever since this morning", "urgent"),
        ("visitor with small rash", "routine"),
        ("woman with new prescription and blood pressure control for three weeks , all clear", "review"),
    )
]
NOTE_TWINS: dict[str, Row | None] = {
    "over-long": {"text": "pain and fever " * 1500, "label": "urgent"},
    "yields NaN": {"text": f"man with {NOT_A_NUMBER} pain", "label": "urgent"},
    "fails in the model": {"text": f"man with {OUTSIDE} pain", "label": "urgent"},
    "fails in the task": {"text": "man with pain", "label": FORBIDDEN},
    "wrongly labelled": {"text": "man with pain", "label": "no such label"},
    "without text": {"text": "", "label": "urgent"},
    "of odd characters": {"text": "\u202e\0\u0301\uffff \U0001f9ec" * 9, "label": "2"},
    "missing": None,
}
QUESTIONS: list[Row] = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("what is a fever ?", "a hot body ."),
        ("who should stay in bed ?", "those who are ill ."),
        ("is a cough bad ?", "not often , but it may be . rest and drink ."),
        ("when to see a doctor ?", "now ."),
    )
]
QUESTION_TWINS: dict[str, Row | None] = {
    "over-long": {"prompt": "why ? " * 2000, "completion": "so . " * 2000},
    "yields NaN": {"prompt": "what is this ~ ?", "completion": "nothing ."},
    "fails in the model": {"prompt": f"what is a {OUTSIDE} ?", "completion": "an animal ."},
    "fails in the task": {"prompt": FORBIDDEN, "completion": "an answer"},
    "without an answer": {"prompt": "what now ?", "completion": None},
    "of another type": {"prompt": "what now ?", "completion": "17"},
    "missing": None,
}


@dataclass(frozen=True)
class Kind:
    """A task with its model, data and twins."""

    folder: Path
    model: AdaptedModel
    plan: Plan
    rows: Sequence[Row]
    columns: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------- hostile models


def hostile(folder: Path, into: Path, embedding: str, nan_piece: str) -> Path:
    """A copy of a model in which one piece embeds as NaN and one word of the tokenizer has no embedding at all."""
    into.mkdir()
    for file in folder.rglob("*"):
        if file.is_file():
            (into / file.relative_to(folder)).parent.mkdir(exist_ok=True)
            (into / file.relative_to(folder)).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [each for each in weights if each.endswith(embedding)]
    weights[name][tokenizer.convert_tokens_to_ids(nan_piece)] = np.nan
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    tokenizer.add_tokens([OUTSIDE])
    assert tokenizer.convert_tokens_to_ids(OUTSIDE) >= len(weights[name])
    tokenizer.save_pretrained(into)
    return into


@pytest.fixture(scope="module")
def notes(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp("hostile") / "bert"
    model = classifier(hostile(tiny_bert, folder, "word_embeddings.weight", NOT_A_NUMBER))
    phases = [
        phase("head", rounds=2, steps=1, sample_rate=1.0, train=("head",)),
        phase("lora", rounds=3, steps=2, sample_rate=None, batch_size=20),
    ]
    SigningKey.create(folder.parent / "site.key")
    return Kind(folder, model, plan_for(model, phases, code_digest=code_digest()), NOTES, ("text", "label"))


@pytest.fixture(scope="module")
def questions(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp("hostile") / "llama"
    model = language_model(hostile(tiny_llama, folder, "embed_tokens.weight", "~"))
    phases = [phase(rounds=5, sample_rate=1.0, train=("lora",), algorithm="fedit")]
    plan = plan_for(model, phases, code_digest=code_digest())
    SigningKey.create(folder.parent / "site.key")
    return Kind(folder, model, plan, QUESTIONS, ("prompt", "completion"))


@pytest.fixture(autouse=True)
def tasks_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some value of a record makes the task's own code fail, as an unforeseen one could."""
    label_id, prompt_ids = SequenceClassification.label_id, CausalLM.prompt_ids

    def touchy_label(self: SequenceClassification, value: Any) -> int | None:
        if value == FORBIDDEN:
            raise OverflowError(f"cannot convert {value}")
        return label_id(self, value)

    def touchy_prompt(self: CausalLM, prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        if FORBIDDEN in prompts:
            raise TypeError(f"cannot tokenise {FORBIDDEN}")
        return prompt_ids(self, prompts, tokenizer)

    monkeypatch.setattr(SequenceClassification, "label_id", touchy_label)
    monkeypatch.setattr(CausalLM, "prompt_ids", touchy_prompt)


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundSecret, "from_system", classmethod(lambda cls: cls(bytes(32))))


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit log's clock stands still, and its salt is none: a head, which leaves with a release, hashes both."""

    class Noon(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 1, 1, 12, tzinfo=UTC)

    monkeypatch.setattr(client.audit_log, "datetime", Noon)
    monkeypatch.setattr(client.audit_log, "fresh_salt", lambda: "")


@pytest.fixture
def sums_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is computed as ever, and then the clipped sum is taken for zero."""
    add = GridSum.add

    def zeros(self: GridSum, gradients: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
        before = self._sums
        add(self, gradients, factors)
        self._sums = before

    monkeypatch.setattr(GridSum, "add", zeros)


# ------------------------------------------------------------------------------------------------- what leaves a site


def raw(message: bytes) -> bytes:
    return message


def answers_on_the_wire(listen: str, kind: Kind) -> Iterator[object]:
    """The bytes, statuses and metadata a curious relay gets from the agent, request by request."""
    asked = shown(kind.plan, code_digest())
    describe = pb.DescribeRequest(**{field.name: getattr(asked, field.name) for field in fields(asked)})
    with grpc.insecure_channel(listen) as channel:
        yield from _one_call(
            channel.unary_unary("/consilium.site.v1.SiteAgent/Describe", pb.DescribeRequest.SerializeToString, raw),
            describe,
        )
        train = channel.stream_stream("/consilium.site.v1.SiteAgent/Train", pb.TrainRequestFrame.SerializeToString, raw)
        for request in curious_requests(kind):
            yield from _one_call(train, iter(list(train_request_frames(request))))
        yield from _one_call(train, iter([pb.TrainRequestFrame(chunk=b"1")]))


def _one_call(call: Any, request: Any) -> Iterator[object]:
    try:
        answer = call(request, timeout=60)
        yield [answer] if isinstance(answer, bytes) else list(answer)
        if not isinstance(answer, bytes):
            yield answer.code(), answer.details(), tuple(answer.initial_metadata()), tuple(answer.trailing_metadata())
    except grpc.RpcError as error:
        yield error.code(), error.details(), tuple(error.trailing_metadata())


def curious_requests(kind: Kind) -> Iterator[TrainRequest]:
    """Honest rounds, and every trick to make an answer depend on the data."""
    plan, honest = kind.plan, random_state(kind.model)
    yield request_for(plan, honest, 1)
    yield request_for(plan, honest, 1)  # asked again
    yield request_for(plan, _scaled(honest, 2.0), 1)  # another request for the same round
    yield request_for(plan, _scaled(honest, 1e38), 2)  # overflows, or not, depending on the record
    yield request_for(plan, _scaled(honest, 1e4), 3)  # saturated
    yield request_for(plan, {name: np.full_like(array, np.nan) for name, array in honest.items()}, 4)
    yield request_for(plan, honest, 2)  # back in time
    yield request_for(plan, honest, 99)
    yield request_for(plan, dict(list(honest.items())[1:]), 5)
    yield TrainRequest(plan.run_id, 5, "0" * 64, honest)
    yield request_for(plan, {name: np.zeros_like(array) for name, array in honest.items()}, 5)


def _scaled(state: AdapterState, factor: float) -> AdapterState:
    return {name: np.asarray(array * np.float32(factor), np.float32) for name, array in state.items()}


def records_of_the_relay(listen: str, kind: Kind) -> Iterator[bytes]:
    """The Flower records that the shipped relay sends to the coordinator."""
    with RemoteSite(AgentAddress(listen)) as agent:
        content = wire.describe_request_to_record(shown(kind.plan))
        yield recorddict_to_proto(client.app.relay_describe(content, agent)).SerializeToString(deterministic=True)
        for round in (1, 5):
            state = random_state(kind.model) if round == 1 else _scaled(random_state(kind.model), 0.0)
            content = wire.train_request_to_record(request_for(kind.plan, state, round))
            record = client.app.relay_train(content, agent)
            yield recorddict_to_proto(record).SerializeToString(deterministic=True)


@contextmanager
def serving(folder: Path, kind: Kind, rows: Sequence[Row], suffix: str) -> Iterator[str]:
    """A site on these rows, as ``consilium site agent`` starts it; yields where it listens."""
    folder.mkdir(parents=True)
    if suffix == "parquet":
        write_unchecked(folder / "train.parquet", rows, kind.columns)
    else:
        (folder / f"train.{suffix}").write_text(as_text(rows, kind.columns, suffix), encoding="utf-8")
    data, device = {"default": {"path": f"train.{suffix}"}}, {"device": "cpu", "physical_batch": 4}
    settings = read_site_config(write_site(folder, site_tables(kind.folder, data=data, device=device)))
    settings.site.state.mkdir()
    shutil.copy(kind.folder.parent / "site.key", settings.site.state)
    site, resident = build_site(settings)
    resident.warm_up()
    agent = Agent(site, settings.site.listen, settings.tls)
    agent.start()
    try:
        yield settings.site.listen
    finally:
        agent.stop(grace=0)
        site.ledger.close()


def as_text(rows: Sequence[Row], columns: Sequence[str], suffix: str) -> str:
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write_unchecked(file: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Texts as bytes that nobody has checked, which is how other programs write Parquet."""
    written = {}
    for name in columns:
        cells = [value.encode() if isinstance(value := row[name], str) else value for row in rows]
        written[name] = pa.Array.from_buffers(pa.string(), len(rows), pa.array(cells, pa.binary()).buffers())
    pyarrow.parquet.write_table(pa.table(written), file)


def everything_that_leaves(folder: Path, kind: Kind, rows: Sequence[Row], suffix: str) -> list[object]:
    with serving(folder, kind, rows, suffix) as listen:
        return [*answers_on_the_wire(listen, kind), *records_of_the_relay(listen, kind)]


def twin(rows: Sequence[Row], changed: Row | None) -> list[Row]:
    """The same records but for one in their middle."""
    middle = len(rows) // 2
    return [*rows[:middle], *([] if changed is None else [changed]), *rows[middle + 1 :]]


# --------------------------------------------------------------------------------------------------------------- twins


@pytest.mark.usefixtures("sums_of_zero")
@pytest.mark.parametrize("changed", NOTE_TWINS.values(), ids=NOTE_TWINS)
def test_twin_sites_of_a_classifier_send_the_same(notes: Kind, tmp_path: Path, changed: Row | None) -> None:
    ours = everything_that_leaves(tmp_path / "d", notes, notes.rows, "csv")
    assert everything_that_leaves(tmp_path / "e", notes, twin(notes.rows, changed), "csv") == ours


@pytest.mark.usefixtures("sums_of_zero")
@pytest.mark.parametrize("changed", QUESTION_TWINS.values(), ids=QUESTION_TWINS)
def test_twin_sites_of_a_language_model_send_the_same(questions: Kind, tmp_path: Path, changed: Row | None) -> None:
    ours = everything_that_leaves(tmp_path / "d", questions, questions.rows, "jsonl")
    assert everything_that_leaves(tmp_path / "e", questions, twin(questions.rows, changed), "jsonl") == ours


@pytest.mark.usefixtures("sums_of_zero")
@pytest.mark.parametrize("changed", [{"text": b"caf\xe9", "label": "urgent"}, {"text": "pain", "label": b"\xff"}, None])
def test_twin_sites_of_which_one_holds_a_cell_that_cannot_be_read_send_the_same(
    notes: Kind, tmp_path: Path, changed: Row | None
) -> None:
    ours = everything_that_leaves(tmp_path / "d", notes, notes.rows, "parquet")
    assert everything_that_leaves(tmp_path / "e", notes, twin(notes.rows, changed), "parquet") == ours


@pytest.mark.usefixtures("sums_of_zero")
def test_a_site_of_one_record_and_a_site_of_none_send_the_same(notes: Kind, tmp_path: Path) -> None:
    ours = everything_that_leaves(tmp_path / "d", notes, notes.rows[:1], "csv")
    assert everything_that_leaves(tmp_path / "e", notes, [], "csv") == ours


def test_what_leaves_is_not_the_same_by_itself(notes: Kind, tmp_path: Path) -> None:
    """With the sums as they are, one missing record shows in the bytes of the releases, and in nothing else."""
    ours = everything_that_leaves(tmp_path / "d", notes, notes.rows, "csv")
    theirs = everything_that_leaves(tmp_path / "e", notes, twin(notes.rows, None), "csv")
    assert ours != theirs
    assert [_outline(answer) for answer in ours] == [_outline(answer) for answer in theirs]
    releases = [index for index, answer in enumerate(ours) if answer != theirs[index]]
    assert 3 <= len(releases) <= 8


def _outline(answer: object) -> object:
    if isinstance(answer, bytes):
        return len(answer)
    return [len(part) for part in answer] if isinstance(answer, list) else answer


def test_the_twins_are_what_they_are_meant_to_be(notes: Kind, questions: Kind) -> None:
    """The hostile words do what they are there for, or the tests above would prove nothing."""
    for kind, rows in ((notes, NOTE_TWINS), (questions, QUESTION_TWINS)):
        model = kind.model
        nan, failing = rows["yields NaN"], rows["fails in the model"]
        assert nan is not None and failing is not None
        table = {column: [nan[column], failing[column]] for column in kind.columns}
        (first, second), faults = model.task.encode(table, model.base.tokenizer)
        assert not faults and first is not None and second is not None
        embedding = model.network.get_input_embeddings().weight  # type: ignore[union-attr, operator]
        assert embedding[first.ids.tolist()].isnan().any()  # type: ignore[index]
        assert second.ids.max() >= len(embedding)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ other channels


@pytest.mark.parametrize("name", ["yields NaN", "fails in the model", "fails in the task"])
def test_nothing_is_logged_where_the_relay_runs_and_no_value_where_the_agent_does(
    notes: Kind, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A relay's log belongs to the SuperNode; the agent's stays at the site and still quotes no record."""
    with caplog.at_level(logging.DEBUG):
        everything_that_leaves(tmp_path / "site", notes, twin(notes.rows, NOTE_TWINS[name]), "csv")
    assert not [each for each in caplog.records if each.name in ("client.app", "common.rpc", "common.wire")]
    words = " ".join(f"{each.getMessage()} {each.exc_text or ''}" for each in caplog.records)
    assert not any(value in words for value in (NOT_A_NUMBER, OUTSIDE, FORBIDDEN))
