"""Several populations, several budgets: only where a person of the site vouches, signed, that they share nobody.

Otherwise one person's rows in two data sets would be paid for from two budgets, each of which promises to be the whole.
The statement names the data sets too: one that is added or moved may bring persons of another population, so somebody
must vouch again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from client.config import SiteConfig
from common.config import SCHEMA_VERSION
from common.durable import put
from common.errors import ConfigError
from common.signing import SEPARATION, SigningKey, verify
from common.toml_settings import read_toml, validate

REMEDY = "have it signed again with 'consilium site separate'"
STATEMENT = "separation.json"
"""Where the statement is written unless ``site.toml`` says otherwise."""


def statement_of(config: SiteConfig) -> str:
    """What a person vouches for. Names are quoted, so that no two settings have the same statement."""
    populations = [
        f"{_quoted(population)} (data sets: {', '.join(map(_quoted, _data_of(config, population))) or 'none'})"
        for population in sorted(config.populations)
    ]
    return (
        f"At site {_quoted(config.site.name)} no person belongs to more than one of these populations: "
        f"{'; '.join(populations)}."
    )


def read_unsigned(path: Path, populations: Sequence[str], key: SigningKey) -> SiteConfig:
    """The settings a statement is to be signed for. ``[separation]`` may be missing yet: it is filled in.

    Args:
        populations: those the person means; they must be the ones that are declared.

    Raises:
        ConfigError: the settings are wrong, declare other populations, or pin another key.
    """
    tables = {"separation": {"statement": STATEMENT, "key": key.public}, **read_toml(path)}
    config = validate(SiteConfig, tables, str(path))
    assert config.separation is not None
    if sorted(populations) != sorted(config.populations) or len(populations) < 2:
        raise ConfigError(
            f"POPULATION = {', '.join(populations)}: {path} declares {', '.join(sorted(config.populations))}; "
            "name each of them once, and sign only where there are several"
        )
    if config.separation.key != key.public:
        raise ConfigError(
            f"separation.key: pins another key than --key holds, which is {key.public}; sign with the pinned one, or "
            "pin this one"
        )
    statement = path.resolve().parent / config.separation.statement
    return config.model_copy(update={"separation": config.separation.model_copy(update={"statement": statement})})


def sign_separation(config: SiteConfig, key: SigningKey) -> None:
    """Writes the signed statement in the place of any other.

    Raises:
        ConfigError: the file cannot be written.
    """
    assert config.separation is not None
    path, text = config.separation.statement, statement_of(config)
    signature = key.sign(SEPARATION, text.encode())
    content = {"schema_version": SCHEMA_VERSION, "statement": text, "signature": signature}
    try:
        put(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"separation.statement: {path} cannot be written ({error.strerror}); give a path in a folder that can"
        ) from None


def check_separation(config: SiteConfig) -> None:
    """Passes with one population, or with a statement about exactly the declared ones, signed by the pinned key.

    Raises:
        ConfigError: it is missing, damaged, about other populations or data sets, or signed by another key.
    """
    if config.separation is None:
        return
    path = config.separation.statement
    text, signature = _read(path)
    if not verify(config.separation.key, SEPARATION, text.encode(errors="replace"), signature):
        raise ConfigError(f"separation.statement: {path} is not signed by separation.key; {REMEDY}")
    if text != statement_of(config):
        raise ConfigError(
            f"separation.statement: {path} is about another site, other populations or other data sets; {REMEDY}"
        )


def _read(path: Path) -> tuple[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, text, signature = content["schema_version"], content["statement"], content["signature"]
    except OSError as error:
        raise ConfigError(f"separation.statement: {path} cannot be read ({error.strerror}); {REMEDY}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"separation.statement: {path} is damaged; {REMEDY}") from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ConfigError(
            f"separation.statement: schema_version {version} of {path} is newer than this installation knows "
            f"({SCHEMA_VERSION}); update it"
        )
    return str(text), str(signature)


def _data_of(config: SiteConfig, population: str) -> list[str]:
    return sorted(name for name, entry in config.data.items() if entry.population == population)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
