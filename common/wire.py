"""Messages ⇄ Flower records. Every key that crosses the network stands here and nowhere else. Torch-free.

A message's content is one ``ConfigRecord`` of scalars and, where it carries tensors, one ``ArrayRecord`` whose keys are
canonical tensor names and whose arrays are little-endian fp32.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import WireError
from common.messages import (
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
    Tensors,
    TrainReply,
    TrainRequest,
    Unavailable,
)

HEADER = "consilium"
TENSORS = "tensors"
TRAIN_TYPE = "train"
DESCRIBE_TYPE = "query.describe"
NODE_AGENT = "agent"
"""Key of the SuperNode's ``--node-config`` that holds the agent's address."""
NODE_CERTIFICATES = ("agent-authority", "agent-certificate", "agent-key")
"""Keys of ``--node-config`` for an agent behind mTLS."""
UNAVAILABLE = "unavailable"
"""The whole content of a reply to any message when the relay has no answer from its agent."""
RUN_CONFIG = "config"
"""Key of the run config that holds the resolved settings as one JSON string."""


def describe_request_to_record(request: DescribeRequest) -> RecordDict:
    """As sent by the coordinator."""
    return _record(asdict(request))


def describe_request_from_record(record: RecordDict) -> DescribeRequest:
    """As read by the relay."""
    return DescribeRequest(**_fields(record, "run_id", "plan", "code_digest", "schema_version"))


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
    fields = _fields(
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
    try:
        return SiteDescription(
            **{
                **fields,
                "status": PlanStatus(fields["status"]),
                "refusal": RefusalReason(fields["refusal"]) if fields["refusal"] else None,
                "tasks": tuple(fields["tasks"]),
                "privacy": privacy_from_json(fields["privacy"]) if fields["privacy"] else None,
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        raise WireError(f"description: cannot be read ({type(error).__name__})") from None


def privacy_from_json(text: str) -> PrivacyStatement:
    """A privacy statement from its JSON form."""
    fields = json.loads(text)
    fields["phases"] = tuple(PhaseStatement(**phase) for phase in fields["phases"])
    return PrivacyStatement(**fields)


def train_request_to_record(request: TrainRequest) -> RecordDict:
    """As sent by the coordinator."""
    header = {
        "run_id": request.run_id,
        "round": request.round,
        "plan_digest": request.plan_digest,
        "schema_version": request.schema_version,
    }
    return _record(header, request.adapter)


def train_request_from_record(record: RecordDict) -> TrainRequest:
    """As read by the relay."""
    return TrainRequest(
        **_fields(record, "run_id", "round", "plan_digest", "schema_version"), adapter=tensors_from_record(record)
    )


def train_reply_to_record(reply: TrainReply) -> RecordDict:
    """As sent by the relay."""
    if isinstance(reply, Release):
        header = {
            "kind": "release",
            "site": reply.site,
            "run_id": reply.run_id,
            "round": reply.round,
            "request_digest": reply.request_digest,
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
        fields = _fields(record, "kind", "site", "run_id", "round", "request_digest", "schema_version")
        del fields["kind"]
        return Release(**fields, update=tensors_from_record(record))
    if kind == "refusal":
        fields = _fields(record, "kind", "site", "reason")
        try:
            return Refusal(fields["site"], RefusalReason(fields["reason"]))
        except ValueError:
            raise WireError(f"reply: unknown refusal reason {fields['reason']!r}") from None
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


def tensors_to_record(tensors: Tensors) -> ArrayRecord:
    """fp32 arrays by canonical name."""
    return ArrayRecord({name: Array(np.ascontiguousarray(tensors[name], "<f4")) for name in sorted(tensors)})


def tensors_from_record(record: RecordDict) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The message's tensors.

    Raises:
        WireError: there are none, or one is not fp32.
    """
    try:
        arrays = {name: array.numpy() for name, array in record.array_records[TENSORS].items()}
    except Exception as error:
        raise WireError(f"message: its tensors cannot be read ({type(error).__name__})") from None
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise WireError(f"message: tensor '{name}' is {array.dtype}, expected float32")
    return arrays


def payload_bytes(record: RecordDict) -> int:
    """Bytes of tensor data a message carries."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def _record(header: dict[str, Any], tensors: Tensors | None = None) -> RecordDict:
    record = RecordDict({HEADER: ConfigRecord(header)})
    if tensors is not None:
        record[TENSORS] = tensors_to_record(tensors)
    return record


def _fields(record: RecordDict, *names: str, exact: bool = True) -> dict[str, Any]:
    """The named header fields; with ``exact`` any other field is an error too."""
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
    return {name: header[name] for name in names}
