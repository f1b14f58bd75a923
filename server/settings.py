"""The settings of a run on their way: into a folder as TOML, and into a Flower run as one JSON string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from common.config import RunConfig, read_toml, validate
from server.checkpoint import RunFolder


@dataclass(frozen=True)
class Submission:
    """What ``consilium server run`` hands to the ServerApp."""

    run_id: str
    out: str
    """The run's folder, absolute, on the coordinator's machine."""
    resume: bool
    config: str
    """The resolved settings as JSON."""

    def to_json(self) -> str:
        """As passed through Flower's run config."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Submission:
        """As read by the ServerApp."""
        return cls(**json.loads(text))


def resolved_toml(config: RunConfig) -> str:
    """The settings as TOML, defaults written out; fields that are empty are left out."""
    tables = config.model_dump(mode="json", exclude_none=True)
    tables["phase"] = [phase.model_dump(mode="json", exclude_none=True) for phase in config.phases]
    return tomli_w.dumps(tables)


def read_run(out: Path) -> RunConfig:
    """The settings of a run that is to be resumed.

    Raises:
        OutputError: the folder holds no run.
    """
    RunFolder(out).manifest()
    return validate(RunConfig, read_toml(out / "run.toml"), str(out / "run.toml"))
