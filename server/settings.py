"""The settings of a run on their way: into a folder as TOML, and into a Flower run as one JSON string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from common.config import RunConfig
from common.errors import ConfigError
from common.signing import SigningKey
from common.toml_settings import read_toml, validate
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
    """The settings as TOML, defaults written out and phases changed; fields that are empty are left out."""
    tables = config.model_dump(mode="json", exclude_none=True, exclude={"phase_changes"})
    tables["phase"] = [phase.model_dump(mode="json", exclude_none=True) for phase in config.phases]
    return tomli_w.dumps(tables)


def absolute(config: RunConfig) -> RunConfig:
    """The settings with every path made absolute: the ServerApp works in another folder, and so does an actor of Ray.

    A model or data set that is no path from here keeps its name: it may be one of the hub.
    """

    def whole(path: str | None) -> str | None:
        return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path

    def resolved(path: Path | None) -> Path | None:
        return path and path.expanduser().resolve()

    name, server, simulation = config.model.name, config.server, config.simulation
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": name if name == "minilm" else whole(name)}),
            "data": config.data.model_copy(update={"path": whole(config.data.path)}),
            "evaluation": config.evaluation.model_copy(update={"path": whole(config.evaluation.path)}),
            "server": server.model_copy(
                update={
                    "root_certificates": resolved(server.root_certificates),
                    "signing_key": resolved(server.signing_key),
                }
            ),
            "simulation": simulation.model_copy(update={"cache": resolved(simulation.cache)}),
        }
    )


def signing_key(config: RunConfig) -> SigningKey:
    """The coordinator's key.

    Raises:
        ConfigError: none is named, or it cannot be used.
    """
    if config.server.signing_key is None:
        raise ConfigError(
            "server.signing_key: is missing; sites take only plans signed by a key they know. Make one with "
            "'consilium server keygen FILE' and give its public half to the sites"
        )
    return SigningKey.load(config.server.signing_key)


def read_run(out: Path) -> RunConfig:
    """The settings of a run that is to be resumed.

    Raises:
        OutputError: the folder holds no run.
    """
    RunFolder(out).manifest()
    return validate(RunConfig, read_toml(out / "run.toml"), str(out / "run.toml"))
