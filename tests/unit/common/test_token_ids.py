"""Token ids alone are those of the tokenizer's own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.tasks.token_ids import token_ids

TEXTS = ["", "rash", "[CLS] </s> a mark in a text", "fièvre 39 °C, 寒気", "child with cough " * 30, "x\n\ty  z"]


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    folder: Path = request.getfixturevalue(request.param)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return loaded


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("longest", [None, 8])
def test_they_are_those_of_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, longest: int | None, special_tokens: bool
) -> None:
    expected = [
        tokenizer(text, truncation=longest is not None, max_length=longest, add_special_tokens=special_tokens)
        for text in TEXTS
    ]
    found = token_ids(TEXTS, tokenizer, longest, special_tokens)
    assert found == [one["input_ids"] for one in expected]
    assert max(map(len, found)) == (8 if longest else max(len(one["input_ids"]) for one in expected))


def test_what_another_call_has_set_changes_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = token_ids(TEXTS, tokenizer)
    padding = {"padding": "max_length"} if tokenizer.pad_token is not None else {}
    tokenizer(TEXTS, truncation=True, max_length=4, **padding)
    assert token_ids(TEXTS, tokenizer) == expected


def test_no_text_has_no_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert token_ids([], tokenizer) == []


class Marked:
    """A tokenizer that does more than its backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.backend_tokenizer = tokenizer.backend_tokenizer

    def __call__(self, texts: list[str], **asked: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *ids] for ids in self._tokenizer(texts, **asked)["input_ids"]]}


class Slow(Marked):
    """One that has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        del self.backend_tokenizer


@pytest.mark.parametrize("kind", [Marked, Slow])
def test_a_tokenizer_that_does_more_than_its_backend_has_its_way(
    tokenizer: PreTrainedTokenizerBase, kind: type[Marked]
) -> None:
    expected = [[1, *ids] for ids in token_ids(TEXTS, tokenizer, 8)]
    assert token_ids(TEXTS, kind(tokenizer), 8) == expected  # type: ignore[arg-type]
