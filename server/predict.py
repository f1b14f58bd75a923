"""Applies a finished adapter to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.adapted import AdaptedModel
from common.adapter import load_adapter
from common.cuts import INPUT
from common.data.read import read_rows
from common.errors import AdapterError, DataError, ModelError
from common.examples import Examples
from common.model import Placement, load_base, locate
from common.sections import LoraSection, TaskSection
from common.tasks.base import Encoded, Predicts
from common.tasks.registry import task_of
from common.toml_settings import validate

ROWS = 32


def predict(
    adapter: Path, source: Path, columns: Mapping[str, str], model: str | None = None
) -> Iterator[dict[str, Any]]:
    """One answer per row of the file, in order; a row that cannot be read gives ``{"error": …}``.

    Args:
        columns: field → column of the inputs.
        model: base model, if it is to be found elsewhere than when the adapter was trained.

    Raises:
        AdapterError: not an adapter of this base model.
        DataError: file or column missing.
        ModelError: the base model is not where it is said to be.
    """
    if not source.expanduser().exists():
        raise DataError(f"--input {source}: no such file; give an existing csv, jsonl or parquet file")
    state, card = load_adapter(adapter)
    settings = validate(TaskSection, card["task"], f"{adapter}/consilium.json")
    task = task_of(settings)
    base = load_base(_located(model, card["model"]), task, Placement.choose(), card["pooling"])
    if base.digest != card["model_digest"]:
        raise AdapterError(
            f"adapter {adapter}: was trained on another base model ({card['model_digest'][:12]}, this is "
            f"{base.digest[:12]}); give the right one with --model"
        )
    adapted = AdaptedModel(base, task, validate(LoraSection, card["lora"], f"{adapter}/consilium.json"))
    adapted.spec.check(state, f"adapter {adapter}")
    adapted.load(state)
    assert isinstance(task, Predicts)
    rows = read_rows(str(source), "test", task.inputs, dict(columns))
    yield from task.predict(lambda encoded: _logits(adapted, encoded), adapted.network, base.tokenizer, rows)


def _located(given: str | None, usual: str) -> Path:
    try:
        return locate(given or usual)
    except ModelError as error:
        if given is None:
            raise ModelError(f"{error}; if it has moved, say with --model where it is") from None
        raise ModelError(f"--model {given}: {str(error).partition(': ')[2]}") from None


def _logits(model: AdaptedModel, encoded: Sequence[Encoded | None]) -> list[torch.Tensor]:
    """Logits of each row, in order."""
    examples = Examples(encoded, model.task)
    results: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in examples.batches(np.arange(len(examples)), ROWS, model, INPUT):
            logits = model.top(batch.inputs, batch.mask, INPUT)
            results.update({int(index): logits[row] for row, index in enumerate(batch.indices)})
    return [results[index] for index in range(len(examples))]
