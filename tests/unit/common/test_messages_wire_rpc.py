"""Every message through both of its forms and back; what is malformed is refused; nothing but the agreed fields."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from common import rpc, wire
from common.errors import WireError
from common.messages import (
    INITIAL,
    SCHEMA_VERSION,
    DescribeRequest,
    Pending,
    PhaseStatement,
    PlanStatus,
    PrivacyStatement,
    Refusal,
    RefusalReason,
    Release,
    SiteDescription,
    TrainReply,
    TrainRequest,
    Unavailable,
    adapter_digest,
    joined,
    parted,
    tensor_digest,
)
from common.protos import site_pb2 as pb

Tensors = dict[str, np.ndarray]

PHASE = PhaseStatement("lora", 0.25, 1.5, 1.0, 40)
PRIVACY = PrivacyStatement(7.9, 1e-5, "example", "add-remove-one", "prv", 40, (PHASE,))
DESCRIPTION = SiteDescription(
    "north", PlanStatus.READY, None, "c" * 64, ("causal-lm", "sequence-classification"), 64, 420, PRIVACY
)
REQUEST = TrainRequest(
    "run-1", 3, "p" * 64, {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, "<f4")}
)
RELEASE = Release(
    "north", "run-1", 3, "d" * 64, {"b": np.full((2, 3), -0.0, np.float32)}, '{"lines":3}', {"loss": 1.25}
)


def same(left: Any, right: Any) -> bool:
    """Equal messages, tensors compared bit for bit."""
    if type(left) is not type(right):
        return False
    for one in fields(left):
        mine, other = getattr(left, one.name), getattr(right, one.name)
        if one.name in ("adapter", "update"):
            if {k: (v.dtype, v.shape, v.tobytes()) for k, v in mine.items()} != {
                k: (v.dtype, v.shape, v.tobytes()) for k, v in other.items()
            }:
                return False
        elif mine != other:
            return False
    return True


# ---- any message, through either form -------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
positive = st.floats(min_value=1e-12, max_value=1e12)
shape = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    stored = st.sampled_from([np.float32, np.uint16, np.int8])
    drawn = draw(st.dictionaries(text, st.tuples(shape, stored, st.integers(0, 2**32 - 1)), max_size=4))
    return {name: any_bits(size, kind, seed) for name, (size, kind, seed) in drawn.items()}


def any_bits(size: tuple[int, ...], kind: type, seed: int) -> np.ndarray:
    """NaN and Inf included."""
    raw = np.random.default_rng(seed).bytes(int(np.prod(size)) * np.dtype(kind).itemsize)
    return np.frombuffer(bytearray(raw), kind).reshape(size)


requests = st.builds(
    TrainRequest,
    run_id=text,
    round=st.integers(1, 2**31),
    plan_digest=text,
    adapter=tensors(),
    adapter_digest=st.just("") | text,
    schema_version=st.just(1),
)
releases = st.builds(
    Release,
    site=text,
    run_id=text,
    round=st.integers(1, 2**31),
    request_digest=text,
    update=tensors(),
    head=text,
    metrics=st.dictionaries(text, st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3),
    schema_version=st.just(1),
)
replies = st.one_of(releases, st.builds(Refusal, text, st.sampled_from(RefusalReason)), st.builds(Pending, text))
phases = st.builds(PhaseStatement, text, positive, positive, positive, st.integers(0, 2**40))
statements = st.builds(
    PrivacyStatement,
    epsilon=st.none() | positive,
    delta=st.none() | positive,
    unit=text,
    neighbouring=text,
    accountant=text,
    steps=st.integers(0, 2**40),
    phases=st.lists(phases, max_size=3).map(tuple),
)
descriptions = st.builds(
    SiteDescription,
    site=st.from_regex(r"[a-zA-Z0-9é][\w.-]{0,40}", fullmatch=True),
    status=st.sampled_from(PlanStatus),
    refusal=st.none() | st.sampled_from(RefusalReason),
    code_digest=text,
    tasks=st.lists(text, max_size=3).map(tuple),
    max_rank=st.integers(0, 2**31),
    public_size=st.integers(1, 2**40),
    privacy=st.none() | statements,
    schema_version=st.just(1),
)


@settings(max_examples=40, deadline=None)
@given(requests)
def test_a_train_request_comes_through_both_forms_with_its_digest(request: TrainRequest) -> None:
    for again in (
        wire.train_request_from_record(wire.train_request_to_record(request)),
        rpc.train_request_of(rpc.train_request_frames(request)),
    ):
        assert same(again, request)
        assert again.digest() == request.digest()


@settings(max_examples=40, deadline=None)
@given(replies)
def test_a_reply_comes_through_both_forms(reply: TrainReply) -> None:
    assert same(wire.train_reply_from_record(wire.train_reply_to_record(reply)), reply)
    assert same(rpc.train_reply_of(rpc.train_reply_frames(reply)), reply)


@settings(max_examples=40, deadline=None)
@given(descriptions)
def test_a_description_comes_through_both_forms(description: SiteDescription) -> None:
    assert wire.description_from_record(wire.description_to_record(description)) == description
    assert rpc.description_of(rpc.description_to_proto(description)) == description


def test_a_describe_request_comes_through() -> None:
    request = DescribeRequest("run-1", '{"plan": "später"}', "c" * 64, "signed", "seen")
    assert wire.describe_request_from_record(wire.describe_request_to_record(request)) == request


def test_no_answer_is_the_same_record_whatever_went_wrong() -> None:
    record = wire.train_reply_to_record(Unavailable())
    assert wire.is_unavailable(record)
    assert wire.train_reply_from_record(record) == Unavailable()
    assert dict(record.config_records["consilium"]) == {"kind": "unavailable"}
    assert not wire.is_unavailable(wire.description_to_record(DESCRIPTION))
    assert not wire.is_unavailable(RecordDict({}))


def test_tensors_of_several_frames_come_through_and_can_be_written_to() -> None:
    """Torch warns of arrays it may not write to."""
    count = 3 * rpc.CHUNK // 4 + 5
    big = {"x": np.arange(count, dtype=np.float32), "y": np.float32(3).reshape(()), "z": np.zeros((0, 2), np.float32)}
    request = replace(REQUEST, adapter=big)
    frames = list(rpc.train_request_frames(request))
    assert len(frames) == 1 + 4 + 1  # header, x in four, y in one, nothing for z
    assert max(frame.ByteSize() for frame in frames) < 4 << 20
    for again in (rpc.train_request_of(frames), wire.train_request_from_record(wire.train_request_to_record(request))):
        assert same(again, request)
        assert all(array.flags.writeable for array in again.adapter.values())


def test_tensors_and_metrics_that_are_stored_together_come_apart_again() -> None:
    together = joined(RELEASE.update, {"loss": 1.25, "accuracy": 0.1})
    assert {name: (array.dtype, array.shape) for name, array in together.items()} == {
        "b": (np.float32, (2, 3)),
        "metrics/loss": (np.float32, ()),
        "metrics/accuracy": (np.float32, ()),
    }
    update, metrics = parted(together)
    assert update.keys() == {"b"} and update["b"] is RELEASE.update["b"]
    assert metrics == {"accuracy": float(np.float32(0.1)), "loss": 1.25}
    assert parted({"b": RELEASE.update["b"]})[1] == {}


def test_the_same_metrics_make_the_same_frames_in_whatever_order_they_come() -> None:
    one, other = ({"loss": 1.5, "accuracy": 0.5}, {"accuracy": 0.5, "loss": 1.5})
    first, second = (
        [frame.SerializeToString() for frame in rpc.train_reply_frames(replace(RELEASE, metrics=metrics))]
        for metrics in (one, other)
    )
    assert first == second


# ---- the request's digest -------------------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_the_order_of_tensors_or_on_their_memory_layout() -> None:
    backwards = {name: np.asfortranarray(REQUEST.adapter[name]) for name in reversed(list(REQUEST.adapter))}
    assert of(backwards).digest() == REQUEST.digest()


def of(adapter: Tensors) -> TrainRequest:
    """A request in which all of an adapter travels."""
    return TrainRequest(REQUEST.run_id, REQUEST.round, REQUEST.plan_digest, adapter)


def test_whatever_a_site_would_answer_differently_to_changes_the_digest() -> None:
    def with_b(array: np.ndarray) -> TrainRequest:
        return of({**REQUEST.adapter, "b": array})

    b = REQUEST.adapter["b"]
    others = [
        replace(REQUEST, run_id="run-2"),
        replace(REQUEST, round=4),
        replace(REQUEST, plan_digest="q" * 64),
        with_b(b.reshape(3, 2)),
        with_b(b.reshape(6)),
        with_b(np.nextafter(b, np.float32(9))),
        with_b(np.where(b == 0, np.float32(-0.0), b)),
        of({"a": REQUEST.adapter["a"], "c": b}),
        of({"a": REQUEST.adapter["a"]}),
        replace(REQUEST, adapter_digest=adapter_digest({"a": tensor_digest(REQUEST.adapter["a"]), "b": INITIAL})),
    ]
    assert len({request.digest() for request in (REQUEST, *others)}) == 1 + len(others)


def test_the_digest_of_a_request_is_that_of_the_whole_adapter_however_little_of_it_travels() -> None:
    for travels in ({}, {"a": REQUEST.adapter["a"]}, REQUEST.adapter):
        assert replace(REQUEST, adapter=travels).digest() == REQUEST.digest()


# ---- only the agreed fields -----------------------------------------------------------------------------------------

SENT: list[tuple[RecordDict, set[str], bool]] = [
    (
        wire.describe_request_to_record(DescribeRequest("r", "p", "c")),
        {"run_id", "plan", "code_digest", "signature", "witness", "schema_version"},
        False,
    ),
    (
        wire.description_to_record(DESCRIPTION),
        {
            "site",
            "status",
            "refusal",
            "code_digest",
            "tasks",
            "max_rank",
            "public_size",
            "privacy",
            "schema_version",
        },
        False,
    ),
    (
        wire.train_request_to_record(REQUEST),
        {"run_id", "round", "plan_digest", "adapter_digest", "schema_version"},
        True,
    ),
    (
        wire.train_reply_to_record(RELEASE),
        {"kind", "site", "run_id", "round", "request_digest", "head", "metrics", "schema_version"},
        True,
    ),
    (wire.train_reply_to_record(Refusal("north", RefusalReason.BUDGET)), {"kind", "site", "reason"}, False),
    (wire.train_reply_to_record(Pending("north")), {"kind", "site"}, False),
    (wire.train_reply_to_record(Unavailable()), {"kind"}, False),
]


@pytest.mark.parametrize(("record", "header", "has_tensors"), SENT)
def test_only_allow_listed_fields_travel(record: RecordDict, header: set[str], has_tensors: bool) -> None:
    assert set(record) == {"consilium", "tensors"} if has_tensors else {"consilium"}
    assert set(record.config_records["consilium"]) == header


def test_a_statement_travels_with_these_fields_and_no_others() -> None:
    sent = json.loads(str(wire.description_to_record(DESCRIPTION).config_records["consilium"]["privacy"]))
    assert set(sent) == {"epsilon", "delta", "unit", "neighbouring", "accountant", "steps", "phases"}
    assert set(sent["phases"][0]) == {"name", "sample_rate", "noise_multiplier", "clip_norm", "steps"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.TrainReplyFrame, {"release", "chunk", "refusal", "pending"}),
        (
            pb.ReleaseHeader,
            {"schema_version", "site", "run_id", "round", "request_digest", "layout", "head", "metrics"},
        ),
        (pb.Metric, {"name", "value"}),
        (pb.TensorLayout, {"name", "shape", "type"}),
        (
            pb.TrainRequestHeader,
            {"schema_version", "run_id", "round", "plan_digest", "layout", "adapter_digest"},
        ),
        (pb.Refusal, {"site", "reason"}),
        (pb.Pending, {"site"}),
        (pb.SiteDescription, {one.name for one in fields(SiteDescription)}),
        (pb.PrivacyStatement, {one.name for one in fields(PrivacyStatement)}),
        (pb.PhaseStatement, {one.name for one in fields(PhaseStatement)}),
    ],
)
def test_the_border_of_the_site_has_these_fields_and_no_others(message: Any, expected: set[str]) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == expected


# ---- malformed records ----------------------------------------------------------------------------------------------

READERS: list[tuple[Callable[[RecordDict], Any], RecordDict]] = [
    (wire.describe_request_from_record, SENT[0][0]),
    (wire.description_from_record, SENT[1][0]),
    (wire.train_request_from_record, SENT[2][0]),
    (wire.train_reply_from_record, SENT[3][0]),
    (wire.train_reply_from_record, SENT[4][0]),
    (wire.train_reply_from_record, SENT[5][0]),
]
IDS = ["describe", "description", "request", "release", "refusal", "pending"]


def changed(record: RecordDict, **header: Any) -> RecordDict:
    """The record with other header fields; ``None`` removes one."""
    merged = {**dict(record.config_records["consilium"]), **header}
    kept = {name: value for name, value in merged.items() if value is not None}
    return RecordDict({"consilium": ConfigRecord(kept), **record.array_records})


@pytest.mark.parametrize(("read", "record"), READERS, ids=IDS)
def test_a_record_with_a_missing_unknown_or_mistyped_field_is_refused(
    read: Callable[[RecordDict], Any], record: RecordDict
) -> None:
    with pytest.raises(WireError, match="has no header"):
        read(RecordDict({}))
    with pytest.raises(WireError, match=r"unknown \['loss'\]"):
        read(changed(record, loss=0.5))
    for name, value in dict(record.config_records["consilium"]).items():
        with pytest.raises(WireError):
            read(changed(record, **{name: None}))
        for wrong in (b"bytes", True, 1.5, [1], "text" if not isinstance(value, str) else 7):
            with pytest.raises(WireError):
                read(changed(record, **{name: wrong}))


@pytest.mark.parametrize(
    ("read", "record"), [each for each in READERS if "schema_version" in each[1].config_records["consilium"]]
)
def test_a_record_of_a_newer_schema_is_refused_as_such(read: Callable[[RecordDict], Any], record: RecordDict) -> None:
    with pytest.raises(WireError, match=r"schema_version 2 is newer than this installation knows; update it"):
        read(changed(record, schema_version=SCHEMA_VERSION + 1))


@pytest.mark.parametrize("site", ["", "..", "../x", "a/b", "a\\b", ".hidden", "-rf", "a\nb", "x" * 200, "a b", "a\0b"])
def test_a_site_whose_name_could_leave_its_folder_is_refused(site: str) -> None:
    with pytest.raises(WireError, match="the site's name"):
        wire.description_from_record(changed(SENT[1][0], site=site))


@pytest.mark.parametrize(
    "header",
    [
        {"status": "enthusiastic"},
        {"refusal": "because"},
        {"public_size": 0},
        {"public_size": -5},
        {"tasks": [1, 2]},
        {"privacy": "{"},
        {"privacy": "[]"},
        {"privacy": "7"},
        {"privacy": "{}"},
        {"privacy": "[" * 100_000},
        {"privacy": '{"epsilon": 1, "phases": 3}'},
        {"privacy": json.dumps({**json.loads(str(SENT[1][0].config_records["consilium"]["privacy"])), "n": 224})},
        {"privacy": str(SENT[1][0].config_records["consilium"]["privacy"]).replace("7.9", '"7.9"')},
        {"privacy": str(SENT[1][0].config_records["consilium"]["privacy"]).replace("7.9", "true")},
        {"privacy": str(SENT[1][0].config_records["consilium"]["privacy"]).replace("1.5", "null")},
    ],
    ids=str,
)
def test_a_description_whose_contents_are_wrong_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        wire.description_from_record(changed(SENT[1][0], **header))


def test_an_unknown_kind_or_reason_of_a_reply_is_refused() -> None:
    with pytest.raises(WireError, match="unknown kind 'metrics'"):
        wire.train_reply_from_record(changed(SENT[3][0], kind="metrics"))
    with pytest.raises(WireError, match="unknown refusal reason 'because of row 7'"):
        wire.train_reply_from_record(changed(SENT[4][0], reason="because of row 7"))


@pytest.mark.parametrize(
    "metrics",
    ["", "{", "7", "[]", "null", '{"loss": "1.0"}', '{"loss": 1}', '{"loss": true}', '{"loss": [1.0]}', "[" * 10**5],
)
def test_metrics_that_are_not_numbers_by_name_are_refused(metrics: str) -> None:
    with pytest.raises(WireError, match="metrics: cannot be read"):
        wire.train_reply_from_record(changed(SENT[3][0], metrics=metrics))


def packed(content: bytes, name: str = "safetensors", kind: str = "safetensors") -> ArrayRecord:
    return ArrayRecord({name: Array("float32", (len(content),), kind, content)})


def pickled() -> bytes:
    stream = BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    return stream.getvalue()


WHOLE = save({"x": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    "tensors",
    [
        packed(save({"x": np.ones(2)})),
        packed(save({"x": np.ones(2, np.float16)})),
        packed(save({"x": np.ones(2, np.int32)})),
        packed(WHOLE[:-1]),
        packed(WHOLE + b"\0"),
        packed(WHOLE.replace(b"[2]", b"[3]")),
        packed(b""),
        packed(pickled()),
        packed(WHOLE, name="x"),
        packed(WHOLE, kind="numpy.ndarray"),
        ArrayRecord({"x": Array(np.ones(2, np.float32))}),
        ArrayRecord({**packed(WHOLE), "more": Array(np.ones(2, np.float32))}),
    ],
    ids=[
        *("float64", "float16", "int32", "cut short", "too long", "other shape", "empty", "pickle", "other name"),
        *("other kind", "not packed", "one more"),
    ],
)
def test_tensors_that_are_not_whole_arrays_of_a_number_format_are_refused(tensors: ArrayRecord) -> None:
    record = RecordDict({**RECORD_HEADER, "tensors": tensors})
    with pytest.raises(WireError, match="message: "):
        wire.train_reply_from_record(record)


def deflated(content: bytes, announced: int | None = None, cut: int | None = None) -> ArrayRecord:
    packed = zlib.compress(content)[:cut]
    size = len(content) if announced is None else announced
    return ArrayRecord({"safetensors": Array("uint8", (size,), "safetensors+zlib", packed)})


@pytest.mark.parametrize(
    "tensors",
    [
        deflated(WHOLE, announced=len(WHOLE) - 1),
        deflated(WHOLE, announced=len(WHOLE) + 1),
        deflated(WHOLE, announced=0),
        deflated(WHOLE, announced=-1),
        deflated(WHOLE, announced=(512 << 20) + 1),
        deflated(WHOLE, cut=-1),
        deflated(WHOLE, cut=0),
        ArrayRecord({"safetensors": Array("uint8", (len(WHOLE),), "safetensors+zlib", zlib.compress(WHOLE) + b"\0")}),
        ArrayRecord({"safetensors": Array("uint8", (len(WHOLE), 1), "safetensors+zlib", zlib.compress(WHOLE))}),
        ArrayRecord({"safetensors": Array("uint8", (len(WHOLE),), "safetensors+zlib", WHOLE)}),
    ],
    ids=[
        "less",
        "more",
        "none",
        "negative",
        "above the limit",
        "cut",
        "empty",
        "goes on",
        "flat no more",
        "not deflated",
    ],
)
def test_a_deflated_message_that_is_not_what_it_announces_is_refused(tensors: ArrayRecord) -> None:
    with pytest.raises(WireError, match="message: its tensors cannot be read"):
        wire.train_reply_from_record(RecordDict({**RECORD_HEADER, "tensors": tensors}))


def test_nothing_is_inflated_beyond_the_limit_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RecordDict({**RECORD_HEADER, "tensors": deflated(WHOLE)})
    monkeypatch.setattr(wire, "LARGEST_TRANSFER", len(WHOLE))
    assert wire.train_reply_from_record(record)
    monkeypatch.setattr(wire, "LARGEST_TRANSFER", len(WHOLE) - 1)
    with pytest.raises(WireError, match="its tensors cannot be read"):
        wire.train_reply_from_record(record)


def test_no_more_is_inflated_than_was_announced() -> None:
    """A few bytes must not become gigabytes: 200 MiB of zeros that announce themselves as one KiB."""
    bomb = deflated(bytes(200 << 20), announced=1 << 10)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="its tensors cannot be read"):
            wire.train_reply_from_record(RecordDict({**RECORD_HEADER, "tensors": bomb}))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_only_messages_of_integers_are_deflated_and_their_size_is_what_travels() -> None:
    integers = {"b": np.zeros((384, 8), np.int8), "scale/b": np.ones(8, np.float32)}
    for tensors in (REQUEST.adapter, {"b": np.zeros((384, 8), np.uint16)}, {}):
        record = wire.train_request_to_record(replace(REQUEST, adapter=tensors))
        (array,) = record.array_records["tensors"].values()
        assert wire.size_of(record) == len(array.data) == len(save(dict(tensors))) == wire.size_of_tensors(tensors)
    record = wire.train_request_to_record(replace(REQUEST, adapter=integers))
    (array,) = record.array_records["tensors"].values()
    assert array.stype == "safetensors+zlib" and zlib.decompress(array.data) == save(integers)
    assert wire.size_of(record) == len(array.data) < 300 < len(save(integers))
    assert wire.size_of(wire.train_reply_to_record(Pending("north"))) == 0


def test_all_tensors_travel_as_one_array_since_flower_sends_each_by_requests_of_its_own() -> None:
    many = {f"layer.{number}": np.ones((2, 3), np.float32) for number in range(100)}
    (array,) = wire.tensors_to_record(many).values()
    assert set(load(array.data)) == set(many)


RECORD_HEADER = {"consilium": SENT[3][0].config_records["consilium"]}


def test_a_release_or_request_without_tensors_is_refused() -> None:
    with pytest.raises(WireError, match="its tensors cannot be read"):
        wire.train_reply_from_record(RecordDict(dict(RECORD_HEADER)))
    with pytest.raises(WireError, match="its tensors cannot be read"):
        wire.train_request_from_record(RecordDict({"consilium": SENT[2][0].config_records["consilium"]}))


# ---- malformed frames -----------------------------------------------------------------------------------------------


def header(*layout: tuple[str, tuple[int, ...]], version: int = SCHEMA_VERSION) -> pb.TrainRequestFrame:
    entries = [pb.TensorLayout(name=name, shape=shape) for name, shape in layout]
    return pb.TrainRequestFrame(
        header=pb.TrainRequestHeader(schema_version=version, run_id="r", round=1, plan_digest="p", layout=entries)
    )


def chunk(*values: float) -> pb.TrainRequestFrame:
    return pb.TrainRequestFrame(chunk=struct.pack(f"<{len(values)}f", *values))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "does not start with a header"),
        ([chunk(1.0)], "does not start with a header"),
        ([pb.TrainRequestFrame()], "does not start with a header"),
        ([header(("a", (2,)))], "the bytes of tensor 'a' do not match its shape"),
        ([header(("a", (2,))), chunk(1.0)], "the bytes of tensor 'a' do not match its shape"),
        ([header(("a", (2,))), chunk(1.0, 2.0, 3.0)], "the bytes of tensor 'a' do not match its shape"),
        ([header(("a", (2,))), chunk(1.0, 2.0), chunk(3.0)], "more bytes than its layout announces"),
        ([header(("a", (1,)), ("b", (1,))), chunk(1.0, 2.0)], "the bytes of tensor 'a' do not match its shape"),
        ([header(("a", (2,))), pb.TrainRequestFrame(chunk=b""), chunk(1.0, 2.0)], "do not match its shape"),
        ([header(("a", (1,)), ("a", (1,))), chunk(1.0), chunk(2.0)], "tensor 'a' is announced twice"),
        ([header(("a", (2,))), header(("a", (2,))), chunk(1.0, 2.0)], "something other than tensor data"),
        ([header(("a", (2,))), chunk(1.0, 2.0), pb.TrainRequestFrame()], "something other than tensor data"),
        ([header(version=SCHEMA_VERSION + 1)], "schema_version 2 is newer than this installation knows"),
    ],
)
def test_frames_that_are_missing_out_of_order_or_too_many_are_refused(
    frames: list[pb.TrainRequestFrame], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        rpc.train_request_of(frames)


def test_frames_of_an_unknown_type_of_element_are_refused() -> None:
    entry = pb.TensorLayout(name="a", shape=(1,))
    entry.type = 7  # type: ignore[assignment]  # an enum of proto3 takes what a newer version may mean
    head = pb.TrainRequestHeader(schema_version=1, run_id="r", round=1, plan_digest="p", layout=[entry])
    with pytest.raises(WireError, match="tensor 'a' has elements of a type"):
        rpc.train_request_of([pb.TrainRequestFrame(header=head), chunk(1.0)])
    with pytest.raises(WireError, match="tensor 'a' is float64"):
        list(rpc.train_request_frames(replace(REQUEST, adapter={"a": np.ones(1)})))


def refusal(reason: str) -> pb.TrainReplyFrame:
    return pb.TrainReplyFrame(refusal=pb.Refusal(site="north", reason=reason))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "does not start with a release, a refusal or a pending plan"),
        ([pb.TrainReplyFrame(chunk=b"1234")], "does not start with a release"),
        ([refusal("because of row 7")], "unknown refusal reason 'because of row 7'"),
        ([refusal("budget"), refusal("budget")], "goes on after a refusal"),
        ([pb.TrainReplyFrame(pending=pb.Pending(site="n")), pb.TrainReplyFrame(chunk=b"1234")], "goes on after a pend"),
        ([*rpc.train_reply_frames(RELEASE), refusal("budget")], "something other than tensor data"),
        ([pb.TrainReplyFrame(release=pb.ReleaseHeader(schema_version=2))], "schema_version 2 is newer"),
        (
            [pb.TrainReplyFrame(release=pb.ReleaseHeader(metrics=[pb.Metric(name="loss"), pb.Metric(name="loss")]))],
            "metric 'loss' is given twice",
        ),
    ],
)
def test_reply_frames_that_do_not_fit_are_refused(frames: list[pb.TrainReplyFrame], message: str) -> None:
    with pytest.raises(WireError, match=message):
        rpc.train_reply_of(frames)


@pytest.mark.parametrize("field", ["status", "refusal", "schema_version"])
def test_a_description_from_the_agent_with_unknown_words_is_refused(field: str) -> None:
    message = rpc.description_to_proto(DESCRIPTION)
    setattr(message, field, 2 if field == "schema_version" else "unheard-of")
    with pytest.raises(WireError):
        rpc.description_of(message)


# ---- too large ------------------------------------------------------------------------------------------------------


def endless() -> Iterator[pb.TrainRequestFrame]:
    """An announcement, after which no frame may be asked for."""
    yield header(("a", (1 << 28,)))
    raise AssertionError("tensor data were read")


def test_an_announcement_above_512_mib_is_refused_before_anything_is_read() -> None:
    assert rpc.LARGEST_TRANSFER == 512 << 20
    with pytest.raises(WireError, match="announces 1024 MiB, more than 512 MiB"):
        rpc.train_request_of(endless())


@pytest.mark.parametrize(
    "layout",
    [
        [("a", (1 << 32, 1 << 32))],  # 0 modulo 2**64
        [("a", (1 << 62, 3))],  # negative as a signed 64-bit number
        [("a", (1 << 63,)), ("b", (1 << 63,))],
        [("a", (1 << 20, 65)), ("b", (1 << 20, 64))],  # each below the limit, together above it
    ],
)
def test_an_announced_size_cannot_hide_behind_an_overflow_or_behind_several_tensors(
    layout: list[tuple[str, tuple[int, ...]]],
) -> None:
    with pytest.raises(WireError, match="more than 512 MiB"):
        rpc.train_request_of(iter([header(*layout)]))


def test_a_message_above_the_limit_is_not_sent_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "LARGEST_TRANSFER", 1 << 20)
    exact = {"a": np.zeros(1 << 18, np.float32)}
    assert list(rpc.train_request_frames(replace(REQUEST, adapter=exact)))
    above = {**exact, "b": np.zeros(1 << 18, np.float32)}
    for frames in (
        rpc.train_request_frames(replace(REQUEST, adapter=above)),
        rpc.train_reply_frames(replace(RELEASE, update=above)),
    ):
        with pytest.raises(WireError, match=r"2 MiB exceeds the limit of 1 MiB for one message; lower lora\.r"):
            next(iter(frames))
