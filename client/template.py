"""A new ``site.toml``: every setting there is, explained by the words that explain it in :mod:`client.config`."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

import client.config
from client.config import (
    WHOLE_SITE,
    DeviceSection,
    PolicySection,
    PopulationSection,
    SeparationSection,
    SiteConfig,
    SiteDataSection,
    SiteSection,
    TestingSection,
    TlsSection,
    read_site_config,
)
from common.errors import ConfigError
from common.sections import Section

WIDTH = 118

INTRODUCTION = """\
# site.toml: what this site decides for itself. 'consilium site check' tells whether it and the data fit together.
# A line that begins with '#' and no blank is a setting that is needed in some cases only.
"""

SECTIONS: Mapping[str, type[Section]] = {
    "site": SiteSection,
    "tls": TlsSection,
    f"populations.{WHOLE_SITE}": PopulationSection,
    "separation": SeparationSection,
    "data.default": SiteDataSection,
    "policy": PolicySection,
    "device": DeviceSection,
    "testing": TestingSection,
}
"""Table of the file → what may stand in it, in this order."""

CHOSEN: Mapping[str, Mapping[str, Any]] = {
    f"populations.{WHOLE_SITE}": {"lifetime_epsilon": 8.0},
    "policy": {
        "tasks": ["sequence-classification"],
        "lora_targets": ["attention"],
        "max_rank": 16,
        "max_epsilon": 3.0,
        "min_noise_multiplier": 0.5,
        "coordinator_keys": [],
    },
}
"""What has no default and must be written: cautious values to begin with."""

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "site": {"relay_user": "consilium-relay"},
    "tls": {"certificate": "site.pem", "key": "site.key", "authority": "relay-ca.pem"},
    "separation": {"statement": "separation.json", "key": "ed25519:..."},
    "data.default": {"columns": {"text": "note", "label": "diagnosis"}, "privacy_unit": "patient_id"},
    "device": {"physical_batch": 16, "threads": 8},
    "testing": {"noise": "fast", "seed": 0},
}
"""What stands in a line that is needed in some cases only."""

NOTES: Mapping[tuple[str, str], str] = {
    (
        "policy",
        "coordinator_keys",
    ): "Empty: no plan is looked at yet. Ask the coordinator for the key, and have it read "
    "out to you by somebody you know.",
}


def write_template(folder: Path, settings: Mapping[str, Mapping[str, Any]], models: tuple[str, ...]) -> Path:
    """Writes ``folder/site.toml``, for its owner alone.

    Args:
        settings: table → settings put over the cautious ones.

    Raises:
        ConfigError: there is one already, it cannot be written, or the settings contradict each other.
    """
    path = folder / "site.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            stream.write(template(settings, models))
    except FileExistsError:
        raise ConfigError(f"{path}: exists, and is never overwritten; edit it, or give another FOLDER") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another FOLDER") from None
    try:
        read_site_config(path)
    except ConfigError:
        path.unlink()
        raise
    return path


def template(settings: Mapping[str, Mapping[str, Any]], models: tuple[str, ...]) -> str:
    """The text of a ``site.toml`` with these settings, the cautious ones and the defaults."""
    explained = explanations()
    lines = [INTRODUCTION, *_lines("", SiteConfig, {"models": models}, explained)]
    for table, section in SECTIONS.items():
        values = {**CHOSEN.get(table, {}), **settings.get(table, {})}
        unused = all(field.is_required() for field in section.model_fields.values()) and not values
        lines += ["", *_comment(inspect.getdoc(section) or ""), f"{'#' if unused else ''}[{table}]"]
        lines += _lines(table, section, values, explained)
    return "\n".join(lines) + "\n"


def explanations() -> dict[tuple[str, str], str]:
    """(class, field) → the docstring below the field: the one place where a setting is explained."""
    found = {}
    for section in ast.parse(inspect.getsource(client.config)).body:
        if isinstance(section, ast.ClassDef):
            for field, below in zip(section.body, section.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and (text := _text(below)):
                    found[section.name, field.target.id] = inspect.cleandoc(text)
    return found


def _text(statement: ast.stmt) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _lines(
    table: str, section: type[Section], values: Mapping[str, Any], explained: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    examples = EXAMPLES.get(table, {})
    for name, field in section.model_fields.items():
        if table == "" and name in {key.partition(".")[0] for key in SECTIONS}:
            continue
        yield from _comment(f"{explained.get((section.__name__, name), '')} {NOTES.get((table, name), '')}")
        if name in values:
            yield f"{name} = {_toml(values[name])}"
        elif name in examples:
            yield f"#{name} = {_toml(examples[name])}"
        else:
            yield f"{name} = {_toml(field.get_default())}"


def _comment(text: str) -> list[str]:
    """Wrapped, in plain text: the marks of docstrings mean nothing here."""
    return [f"# {line}" for line in textwrap.wrap(text.replace("``", ""), WIDTH - 2)]


def _toml(value: Any) -> str:
    """On one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"value": plain}).removeprefix("value = ").removesuffix("\n")
