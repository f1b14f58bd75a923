"""An adapter's layout and file format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.adapter import (
    CARD_FILE,
    WEIGHTS_FILE,
    AdapterSpec,
    kaiming_rows,
    load_adapter,
    orthonormal_rows,
    save_adapter,
)
from common.errors import AdapterError

SPEC = AdapterSpec.of("base", {"b": (2, 3), "a": (4,)})


def tensors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {"a": np.zeros(4, np.float32), "b": np.zeros((2, 3), np.float32), **changes}


def test_a_spec_lists_its_tensors_in_name_order_however_they_were_given() -> None:
    assert SPEC.names == ("a", "b")
    assert AdapterSpec.of("base", {"a": (4,), "b": (2, 3)}) == SPEC
    assert SPEC.part(["b"]).shapes == (("b", (2, 3)),)


def test_the_digest_is_over_base_names_and_shapes() -> None:
    by_hand = hashlib.sha256(b'["base", [["a", [4]], ["b", [2, 3]]]]').hexdigest()
    assert SPEC.digest() == by_hand
    others = (
        AdapterSpec.of("other", {"a": (4,), "b": (2, 3)}),
        AdapterSpec.of("base", {"a": (4,), "c": (2, 3)}),
        AdapterSpec.of("base", {"a": (4,), "b": (3, 2)}),
    )
    assert len({SPEC.digest(), *(other.digest() for other in others)}) == 4


def test_tensors_of_the_same_layout_pass() -> None:
    SPEC.check(tensors(), "reply")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": np.zeros(4, np.float32)}, r"'b' is missing \(1 missing, 0 unknown\)"),
        (tensors(c=np.zeros(1, np.float32)), r"'c' is not part of it \(0 missing, 1 unknown\)"),
        ({}, r"'a' is missing \(2 missing, 0 unknown\)"),
        (tensors(b=np.zeros((3, 2), np.float32)), r"'b' is float32\[3, 2\], expected float32\[2, 3\]"),
        (tensors(b=np.zeros((2, 3), np.float64)), r"'b' is float64\[2, 3\], expected float32\[2, 3\]"),
        (tensors(a=np.zeros((4, 1), np.float32)), r"'a' is float32\[4, 1\], expected float32\[4\]"),
    ],
)
def test_tensors_of_another_layout_are_refused_by_name(wrong: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(AdapterError, match=rf"^reply: .*{message}.*; use an adapter made with the same model"):
        SPEC.check(wrong, "reply")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 32), (32, 32)])
def test_rows_are_orthonormal_and_a_pure_function_of_seed_and_name(rows: int, columns: int) -> None:
    matrix = orthonormal_rows(rows, columns, 7, "layer")
    assert matrix.shape == (rows, columns) and matrix.dtype == np.float32 and matrix.flags.c_contiguous
    np.testing.assert_allclose(matrix.astype(np.float64) @ matrix.T.astype(np.float64), np.eye(rows), atol=1e-6)
    assert np.array_equal(matrix, orthonormal_rows(rows, columns, 7, "layer"))
    if columns > 1:
        assert not np.array_equal(matrix, orthonormal_rows(rows, columns, 8, "layer"))
        assert not np.array_equal(matrix, orthonormal_rows(rows, columns, 7, "other"))


def test_orthonormal_rows_prefer_no_direction() -> None:
    """Under the Haar measure E[q qᵀ] = I / columns; without fixing R's signs the first entry would be one-sided."""
    first = np.stack([orthonormal_rows(1, 4, seed, "x")[0] for seed in range(2000)]).astype(np.float64)
    np.testing.assert_allclose(first.mean(axis=0), np.zeros(4), atol=0.05)
    np.testing.assert_allclose(first.T @ first / len(first), np.eye(4) / 4, atol=0.03)


def test_more_rows_than_columns_cannot_be_orthonormal() -> None:
    with pytest.raises(AdapterError, match=r"lora\.r = 5 exceeds the input width 4 of 'x'; choose a smaller rank"):
        orthonormal_rows(5, 4, 0, "x")


def test_the_usual_start_of_a_is_uniform_within_one_over_the_root_of_the_width() -> None:
    matrix = kaiming_rows(64, 100, 3, "x")
    assert matrix.dtype == np.float32 and np.abs(matrix).max() <= 0.1
    assert matrix.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)  # of a uniform distribution on ±0.1
    assert np.array_equal(matrix, kaiming_rows(64, 100, 3, "x"))


def test_a_saved_adapter_is_loaded_bit_for_bit_with_its_card(tmp_path: Path) -> None:
    state = tensors(b=np.arange(6, dtype=np.float32).reshape(3, 2).T)  # not contiguous
    card = {"task": {"name": "x", "labels": ["ja", "später"]}, "epsilon": None}
    save_adapter(tmp_path / "deep" / "adapter", state, {"peft_type": "LORA"}, card)
    again, card_again = load_adapter(tmp_path / "deep" / "adapter")
    assert card_again == card
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)
    assert json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text()) == {"peft_type": "LORA"}
    assert set(load_file(tmp_path / "deep" / "adapter" / WEIGHTS_FILE)) == {"a", "b"}


@pytest.mark.parametrize("missing", [WEIGHTS_FILE, CARD_FILE])
def test_a_folder_without_one_of_its_files_is_no_adapter(tmp_path: Path, missing: str) -> None:
    save_adapter(tmp_path, tensors(), {}, {})
    (tmp_path / missing).unlink()
    with pytest.raises(AdapterError, match=rf"{missing} is missing; give the DIR/adapter folder of a finished run"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("damaged", [WEIGHTS_FILE, CARD_FILE])
def test_a_damaged_file_is_told_as_such(tmp_path: Path, damaged: str) -> None:
    save_adapter(tmp_path, tensors(), {}, {})
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-1] + b"\xff" * 20)
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(tmp_path)
