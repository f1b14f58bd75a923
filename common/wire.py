"""Messages ⇄ Flower records. Every key that crosses the network stands here and nowhere else. Torch-free.

A message's content is one ``ConfigRecord`` of scalars and, where it carries tensors, one ``ArrayRecord`` with a single
array: all tensors by canonical name in their number format, little-endian, as one safetensors file.

Where some are int8 the file is also deflated (RFC 1950). That is the one thing on the way whose size depends on values:
on those of the message, which at this place are either the coordinator's own or private already, so its size tells
nothing that the message does not. It is inflated up to the size announced, and never beyond ``LARGEST_TRANSFER``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.numpy import load, save

from common.errors import WireError
from common.messages import (
    LARGEST_TRANSFER,
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
    WireTensors,
)

Record = RecordDict
"""A message's content as Flower carries it."""

HEADER = "consilium"
TENSORS = "tensors"
PACKED = "safetensors"
"""Name and kind of the one array in which all tensors of a message travel."""
DEFLATED = "safetensors+zlib"
"""Its kind where it is deflated; its shape is then the size it is inflated to."""
STORED_TYPES = (np.float32, np.uint16, np.int8)
"""What tensors are made of, in any number format."""
TRAIN_TYPE = "train"
DESCRIBE_TYPE = "query.describe"
NODE_AGENT = "agent"
"""Key of the SuperNode's ``--node-config`` that holds the agent's address."""
NODE_CERTIFICATES = ("agent-authority", "agent-certificate", "agent-key")
"""Keys of ``--node-config`` for an agent behind mTLS."""
NODE_AGENT_TIMEOUT = "agent-timeout"
"""Key of ``--node-config``: seconds the relay waits for the agent to accept its connection; 10 unless given."""
UNAVAILABLE = "unavailable"
"""The whole content of a reply to any message when the relay has no answer from its agent."""
RUN_CONFIG = "config"
"""Key of the run config that holds the resolved settings as one JSON string."""


_FIELDS: Mapping[str, type] = {
    "kind": str,
    "schema_version": int,
    "run_id": str,
    "plan": str,
    "plan_digest": str,
    "adapter_digest": str,
    "code_digest": str,
    "signature": str,
    "witness": str,
    "head": str,
    "metrics": str,
    "round": int,
    "request_digest": str,
    "site": str,
    "status": str,
    "refusal": str,
    "reason": str,
    "tasks": list,
    "max_rank": int,
    "public_size": int,
    "privacy": str,
}
"""Every header field that may cross the network, and its type."""

_SITE_NAME = re.compile(r"[^\W_][\w.-]{0,79}")
"""Names become parts of paths at the coordinator."""


def describe_request_to_record(request: DescribeRequest) -> RecordDict:
    """As sent by the coordinator."""
    return _record(asdict(request))


def describe_request_from_record(record: RecordDict) -> DescribeRequest:
    """As read by the relay."""
    return DescribeRequest(**_fields(record, "run_id", "plan", "code_digest", "signature", "witness", "schema_version"))


def description_to_record(description: SiteDescription) -> RecordDict:
    """As sent by the relay."""
    privacy = json.dumps(asdict(description.privacy)) if description.privacy else ""
    return _record(
        {
            "site": description.site,
            "status": description.status.value,
            "refusal": description.refusal.value if description.refusal else "",
            "code_digest": description.code_digest,
            "tasks": list(description.tasks),
            "max_rank": description.max_rank,
            "public_size": description.public_size,
            "privacy": privacy,
            "schema_version": description.schema_version,
        }
    )


def description_from_record(record: RecordDict) -> SiteDescription:
    """As read by the coordinator."""
    header = _fields(
        record,
        "site",
        "status",
        "refusal",
        "code_digest",
        "tasks",
        "max_rank",
        "public_size",
        "privacy",
        "schema_version",
    )
    if not _SITE_NAME.fullmatch(header["site"]):
        raise WireError("description: the site's name is not made of letters, digits, dot, dash and underscore")
    if header["public_size"] < 1 or not all(isinstance(task, str) for task in header["tasks"]):
        raise WireError("description: the public size is not positive, or a task's name is not text")
    try:
        return SiteDescription(
            **{
                **header,
                "status": PlanStatus(header["status"]),
                "refusal": RefusalReason(header["refusal"]) if header["refusal"] else None,
                "tasks": tuple(header["tasks"]),
                "privacy": privacy_from_json(header["privacy"]) if header["privacy"] else None,
            }
        )
    except ValueError as error:
        raise WireError(f"description: cannot be read ({type(error).__name__})") from None


def privacy_from_json(text: str) -> PrivacyStatement:
    """A privacy statement from its JSON form.

    Raises:
        WireError: it is not one.
    """
    try:
        content = json.loads(text)
        phases = tuple(_statement(PhaseStatement, phase) for phase in content["phases"])
        return _statement(PrivacyStatement, {**content, "phases": phases})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"privacy statement: cannot be read ({type(error).__name__})") from None


def metrics_from_json(text: str) -> dict[str, float]:
    """A release's metrics from their JSON form. Whether they are those of the plan is for others to judge.

    Raises:
        WireError: not an object of numbers.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not all(type(value) is float for value in content.values()):
            raise TypeError
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"metrics: cannot be read ({type(error).__name__})") from None
    return content


_Statement = TypeVar("_Statement", PhaseStatement, PrivacyStatement)
_STATEMENT_FIELDS: Mapping[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def _statement(kind: type[_Statement], content: Mapping[str, Any]) -> _Statement:
    statement = kind(**content)
    for one in fields(kind):
        value = getattr(statement, one.name)
        if isinstance(value, bool) or not isinstance(value, _STATEMENT_FIELDS.get(str(one.type), tuple)):
            raise TypeError(one.name)
    return statement


def train_request_to_record(request: TrainRequest) -> RecordDict:
    """As sent by the coordinator."""
    header = {
        "run_id": request.run_id,
        "round": request.round,
        "plan_digest": request.plan_digest,
        "adapter_digest": request.adapter_digest,
        "schema_version": request.schema_version,
    }
    return _record(header, request.adapter)


def train_request_from_record(record: RecordDict) -> TrainRequest:
    """As read by the relay."""
    header = _fields(record, "run_id", "round", "plan_digest", "adapter_digest", "schema_version")
    return TrainRequest(**header, adapter=tensors_from_record(record))


def train_reply_to_record(reply: TrainReply) -> RecordDict:
    """As sent by the relay."""
    if isinstance(reply, Release):
        header = {
            "kind": "release",
            "site": reply.site,
            "run_id": reply.run_id,
            "round": reply.round,
            "request_digest": reply.request_digest,
            "head": reply.head,
            "metrics": json.dumps(dict(reply.metrics), sort_keys=True),
            "schema_version": reply.schema_version,
        }
        return _record(header, reply.update)
    if isinstance(reply, Refusal):
        return _record({"kind": "refusal", "site": reply.site, "reason": reply.reason.value})
    if isinstance(reply, Unavailable):
        return unavailable_record()
    return _record({"kind": "pending", "site": reply.site})


def train_reply_from_record(record: RecordDict) -> TrainReply:
    """As read by the coordinator.

    Raises:
        WireError: not one of the three kinds, or a field is missing.
    """
    (kind,) = _fields(record, "kind", exact=False).values()
    if kind == "release":
        header = _fields(
            record, "kind", "site", "run_id", "round", "request_digest", "head", "metrics", "schema_version"
        )
        del header["kind"]
        header["metrics"] = metrics_from_json(header["metrics"])
        return Release(**header, update=tensors_from_record(record))
    if kind == "refusal":
        header = _fields(record, "kind", "site", "reason")
        try:
            return Refusal(header["site"], RefusalReason(header["reason"]))
        except ValueError:
            raise WireError(f"reply: unknown refusal reason {header['reason']!r}") from None
    if kind == UNAVAILABLE:
        return Unavailable()
    if kind == "pending":
        return Pending(_fields(record, "kind", "site")["site"])
    raise WireError(f"reply: unknown kind {kind!r}")


def unavailable_record() -> RecordDict:
    """The same record whatever went wrong."""
    return _record({"kind": UNAVAILABLE})


def is_unavailable(record: RecordDict) -> bool:
    """Whether the relay had no answer."""
    return dict(record.config_records.get(HEADER, {})).get("kind") == UNAVAILABLE


def size_of(record: RecordDict) -> int:
    """Bytes of a message's tensors as they travel, scales and names included; a header of some hundred bytes is not."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def size_of_tensors(tensors: WireTensors) -> int:
    """:func:`size_of` a message that carries these."""
    return size_of(_record({}, tensors))


def tensors_to_record(tensors: WireTensors) -> ArrayRecord:
    """All arrays in one: Flower sends every array on its own, in several HTTP requests."""
    packed = save({name: _little_endian(tensors[name]) for name in sorted(tensors)})
    if any(array.dtype == np.int8 for array in tensors.values()):
        return ArrayRecord({PACKED: Array("uint8", (len(packed),), DEFLATED, _deflated(packed))})
    return ArrayRecord({PACKED: Array("float32", (len(packed),), PACKED, packed)})


def tensors_from_record(record: RecordDict) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The message's tensors.

    Raises:
        WireError: there are none, or one is of a type that no number format has.
    """
    try:
        ((name, packed),) = record.array_records[TENSORS].items()
        if name != PACKED or packed.stype not in (PACKED, DEFLATED):
            raise ValueError
        arrays = load(packed.data if packed.stype == PACKED else _inflated(packed))
    except Exception as error:
        raise WireError(f"message: its tensors cannot be read ({type(error).__name__})") from None
    for name, array in arrays.items():
        if array.dtype not in STORED_TYPES:
            raise WireError(f"message: tensor '{name}' is {array.dtype}, expected float32, uint16 or int8")
    return arrays


def _little_endian(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _deflated(packed: bytes) -> bytes:
    return zlib.compress(packed, 6)


def _inflated(array: Array) -> bytes:
    """The announced number of bytes, no more and no fewer.

    Raises:
        ValueError: another number, or too many.
    """
    (size,) = array.shape
    if not 0 <= size <= LARGEST_TRANSFER:
        raise ValueError
    stream = zlib.decompressobj()
    inflated = stream.decompress(array.data, size + 1)  # 0 would mean: as many as there are
    if len(inflated) != size or not stream.eof or stream.unused_data:
        raise ValueError
    return inflated


def _record(header: dict[str, Any], tensors: WireTensors | None = None) -> RecordDict:
    record = RecordDict({HEADER: ConfigRecord(header)})
    if tensors is not None:
        record[TENSORS] = tensors_to_record(tensors)
    return record


def _fields(record: RecordDict, *names: str, exact: bool = True) -> dict[str, Any]:
    """The named header fields, each of its type; with ``exact`` any other field is an error too."""
    try:
        header = dict(record.config_records[HEADER])
    except KeyError:
        raise WireError("message: has no header; relay, agent and coordinator must run the same version") from None
    version = header.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise WireError(f"message: schema_version {version!r} is newer than this installation knows; update it")
    missing = [name for name in names if name not in header]
    unknown = sorted(set(header) - set(names)) if exact else []
    if missing or unknown:
        raise WireError(f"message: fields missing {missing}, unknown {unknown}; both sides must run the same version")
    for name in names:
        if isinstance(header[name], bool) or not isinstance(header[name], _FIELDS[name]):
            raise WireError(
                f"message: field '{name}' is {type(header[name]).__name__}, expected {_FIELDS[name].__name__}"
            )
    return {name: header[name] for name in names}
