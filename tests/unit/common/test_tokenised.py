"""Memory-mapped tokens: the same rows as in memory, found again, and nothing that stays behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.adapted import AdaptedModel
from common.cuts import INPUT
from common.data.load import tokenise_all
from common.errors import DataError
from common.examples import Examples
from common.model import BaseModel, Placement, load_base
from common.sections import TaskSection
from common.tasks.base import Task
from common.tasks.registry import task_of
from common.tokenised import ROWS_AT_ONCE, tokenise

LABELS = ("urgent", "routine", "review")
ROWS = {
    "text": ["mild cough today", "high fever since last night and short of breath", "wound check"],
    "label": [1, 0, 2],
}


@pytest.fixture(scope="module")
def classifier() -> Task:
    return task_of(TaskSection(labels=LABELS, max_length=32))


@pytest.fixture(scope="module")
def base(tiny_bert: Path, classifier: Task) -> BaseModel:
    return load_base(tiny_bert, classifier, Placement.choose("cpu"), "mean")


def same(one: Any, other: Any) -> bool:
    return (
        one.ids.dtype == other.ids.dtype
        and one.target.shape == other.target.shape
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.target, other.target)
    )


def test_mapped_rows_equal_the_encoded_ones_row_for_row(base: BaseModel, classifier: Task) -> None:
    many = {field: values * (ROWS_AT_ONCE // 2) for field, values in ROWS.items()}  # more than are encoded at once
    encoded, _ = classifier.encode(many, base.tokenizer)
    mapped, faults = tokenise(many, classifier, base.tokenizer)
    assert faults == [] and len(mapped) == len(encoded) > ROWS_AT_ONCE
    assert all(same(one, other) for one, other in zip(mapped, encoded, strict=True))


def test_targets_of_a_token_each_keep_their_shape(tiny_llama: Path) -> None:
    task = task_of(TaskSection(name="causal-lm", max_length=48))
    base = load_base(tiny_llama, task, Placement.choose("cpu"), "model")
    rows = {field: ["a question", "of another length", "x"] for field in task.fields}
    encoded, _ = task.encode(rows, base.tokenizer)
    mapped, _ = tokenise(rows, task, base.tokenizer)
    assert all(same(one, other) for one, other in zip(mapped, encoded, strict=True))


def test_a_part_has_the_chosen_rows_in_the_chosen_order_and_copies_none(base: BaseModel, classifier: Task) -> None:
    mapped, _ = tokenise(ROWS, classifier, base.tokenizer)
    part = mapped.part([2, 0]).part([1, 0, 1])
    assert [same(one, mapped[row]) for one, row in zip(part, [0, 2, 0], strict=True)] == [True] * 3
    assert np.shares_memory(part[0].ids, mapped[0].ids)
    assert part.lengths.tolist() == [len(mapped[row].ids) for row in (0, 2, 0)]
    with pytest.raises(ValueError, match="read-only"):
        part[0].ids[0] = 0


def test_batches_of_mapped_and_of_encoded_rows_are_the_same(
    adapted_model: Callable[..., AdaptedModel], tiny_bert: Path, classifier: Task
) -> None:
    model = adapted_model(tiny_bert, max_length=32, pooling="mean")
    encoded, _ = classifier.encode(ROWS, model.base.tokenizer)
    mapped, _ = tokenise(ROWS, classifier, model.base.tokenizer)
    chosen = np.arange(3)
    pairs = zip(
        Examples(mapped, model.task).batches(chosen, 2, model, INPUT),
        Examples(encoded, model.task).batches(chosen, 2, model, INPUT),
        strict=True,
    )
    for one, other in pairs:
        for field in ("inputs", "mask", "targets", "weights"):
            assert getattr(one, field).equal(getattr(other, field))
    assert Examples(mapped, model.task)._content == Examples(encoded, model.task)._content


def test_the_same_rows_are_encoded_once(
    base: BaseModel, classifier: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = tokenise(ROWS, classifier, base.tokenizer, tmp_path)
    monkeypatch.setattr(type(classifier), "encode", lambda *_: pytest.fail("encoded again"))
    again, _ = tokenise(ROWS, classifier, base.tokenizer, tmp_path)
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize("changed", ["rows", "settings"])
def test_other_rows_or_settings_are_encoded_anew(
    base: BaseModel, classifier: Task, tmp_path: Path, changed: str
) -> None:
    tokenise(ROWS, classifier, base.tokenizer, tmp_path)
    rows = {**ROWS, "label": [1, 0, 1]} if changed == "rows" else ROWS
    task = task_of(TaskSection(labels=LABELS, max_length=16)) if changed == "settings" else classifier
    tokenise(rows, task, base.tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_is_told_and_made_anew(
    base: BaseModel, classifier: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = tokenise(ROWS, classifier, base.tokenizer, tmp_path)
    [path] = tmp_path.iterdir()
    whole = [item.ids.tolist() for item in first]
    content = bytearray(path.read_bytes())
    where = content.index(np.asarray(first[1].ids, np.int32).tobytes())
    content[where] ^= 1
    del first
    for damaged in (bytes(content), bytes(content[: len(content) // 2]), b""):
        path.write_bytes(damaged)
        found, _ = tokenise(ROWS, classifier, base.tokenizer, tmp_path)
        assert [item.ids.tolist() for item in found] == whole
        del found
    assert caplog.text.count("damaged") == 3


def test_without_a_folder_no_file_stays(
    base: BaseModel, classifier: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mapped, _ = tokenise(ROWS, classifier, base.tokenizer)
    assert os.listdir(tmp_path) == [] and len(mapped) == 3 and mapped[1].ids.size


def test_a_row_that_cannot_be_learnt_from_is_named_by_its_number(base: BaseModel, classifier: Task) -> None:
    rows = {"text": ["cough"] * ROWS_AT_ONCE + ["", "cough"], "label": [0] * (ROWS_AT_ONCE + 2)}
    with pytest.raises(DataError, match=f"row {ROWS_AT_ONCE}: text is empty"):
        tokenise_all(rows, classifier, base.tokenizer, "here")
