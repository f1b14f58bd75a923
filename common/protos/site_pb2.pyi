from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[ElementType]
    UINT16: _ClassVar[ElementType]
    INT8: _ClassVar[ElementType]
FLOAT32: ElementType
UINT16: ElementType
INT8: ElementType

class DescribeRequest(_message.Message):
    __slots__ = ("schema_version", "run_id", "plan", "code_digest", "signature", "witness")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    WITNESS_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    run_id: str
    plan: str
    code_digest: str
    signature: str
    witness: str
    def __init__(self, schema_version: _Optional[int] = ..., run_id: _Optional[str] = ..., plan: _Optional[str] = ..., code_digest: _Optional[str] = ..., signature: _Optional[str] = ..., witness: _Optional[str] = ...) -> None: ...

class PhaseStatement(_message.Message):
    __slots__ = ("name", "sample_rate", "noise_multiplier", "clip_norm", "steps")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    def __init__(self, name: _Optional[str] = ..., sample_rate: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., clip_norm: _Optional[float] = ..., steps: _Optional[int] = ...) -> None: ...

class PrivacyStatement(_message.Message):
    __slots__ = ("epsilon", "delta", "unit", "neighbouring", "accountant", "steps", "phases")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURING_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTANT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    delta: float
    unit: str
    neighbouring: str
    accountant: str
    steps: int
    phases: _containers.RepeatedCompositeFieldContainer[PhaseStatement]
    def __init__(self, epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., unit: _Optional[str] = ..., neighbouring: _Optional[str] = ..., accountant: _Optional[str] = ..., steps: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[PhaseStatement, _Mapping]]] = ...) -> None: ...

class SiteDescription(_message.Message):
    __slots__ = ("schema_version", "site", "status", "refusal", "code_digest", "tasks", "max_rank", "public_size", "privacy")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_SIZE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    site: str
    status: str
    refusal: str
    code_digest: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    max_rank: int
    public_size: int
    privacy: PrivacyStatement
    def __init__(self, schema_version: _Optional[int] = ..., site: _Optional[str] = ..., status: _Optional[str] = ..., refusal: _Optional[str] = ..., code_digest: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., max_rank: _Optional[int] = ..., public_size: _Optional[int] = ..., privacy: _Optional[_Union[PrivacyStatement, _Mapping]] = ...) -> None: ...

class TensorLayout(_message.Message):
    __slots__ = ("name", "shape", "type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    type: ElementType
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., type: _Optional[_Union[ElementType, str]] = ...) -> None: ...

class TrainRequestHeader(_message.Message):
    __slots__ = ("schema_version", "run_id", "round", "plan_digest", "layout", "adapter_digest")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    run_id: str
    round: int
    plan_digest: str
    layout: _containers.RepeatedCompositeFieldContainer[TensorLayout]
    adapter_digest: str
    def __init__(self, schema_version: _Optional[int] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., plan_digest: _Optional[str] = ..., layout: _Optional[_Iterable[_Union[TensorLayout, _Mapping]]] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class TrainRequestFrame(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: TrainRequestHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[TrainRequestHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class ReleaseHeader(_message.Message):
    __slots__ = ("schema_version", "site", "run_id", "round", "request_digest", "layout", "head", "metrics")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    site: str
    run_id: str
    round: int
    request_digest: str
    layout: _containers.RepeatedCompositeFieldContainer[TensorLayout]
    head: str
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    def __init__(self, schema_version: _Optional[int] = ..., site: _Optional[str] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., request_digest: _Optional[str] = ..., layout: _Optional[_Iterable[_Union[TensorLayout, _Mapping]]] = ..., head: _Optional[str] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("site", "reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    site: str
    reason: str
    def __init__(self, site: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Pending(_message.Message):
    __slots__ = ("site",)
    SITE_FIELD_NUMBER: _ClassVar[int]
    site: str
    def __init__(self, site: _Optional[str] = ...) -> None: ...

class TrainReplyFrame(_message.Message):
    __slots__ = ("release", "chunk", "refusal", "pending")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    release: ReleaseHeader
    chunk: bytes
    refusal: Refusal
    pending: Pending
    def __init__(self, release: _Optional[_Union[ReleaseHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., pending: _Optional[_Union[Pending, _Mapping]] = ...) -> None: ...
