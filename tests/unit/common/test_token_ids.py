"""Token ids alone are those of the tokenizer's own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.tasks.token_ids import only_asks_its_backend, token_ids

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
    assert not only_asks_its_backend(kind(tokenizer))  # type: ignore[arg-type]


class Folding(PreTrainedTokenizerFast):
    """One that prepares texts before its backend sees them, and so reads some of them otherwise."""

    def _encode_plus(self, text: Any, *given: Any, **asked: Any) -> Any:
        return super()._encode_plus([one.lower() for one in text], *given, **asked)


class Shifting(PreTrainedTokenizerFast):
    """One that changes what its backend says."""

    def _convert_encoding(self, *given: Any, **asked: Any) -> Any:
        named, encodings = super()._convert_encoding(*given, **asked)
        return {**named, "input_ids": [[1, *ids] for ids in named["input_ids"]]}, encodings


class Plain(PreTrainedTokenizerFast):
    """One that adds nothing of its own."""


def of_words(kind: type[PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "fever": 1, "cough": 2, "mild": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return kind(tokenizer_object=backend, unk_token="[UNK]")


def test_real_tokenizers_take_the_short_way(tokenizer: PreTrainedTokenizerBase) -> None:
    assert only_asks_its_backend(tokenizer) and only_asks_its_backend(of_words(Plain))


@pytest.mark.parametrize("first", ["fever", "Fever", ""])
def test_the_kind_of_tokenizer_decides_how_texts_are_read_and_never_one_of_them(first: str) -> None:
    folding, shifting = of_words(Folding), of_words(Shifting)
    assert not only_asks_its_backend(folding) and not only_asks_its_backend(shifting)
    assert token_ids([first, "Mild COUGH"], folding, 16)[1] == token_ids(["Mild COUGH"], folding, 16)[0] == [3, 2]
    assert token_ids([first, "mild cough"], shifting, 16)[1] == [1, 3, 2]
    assert token_ids([first, "Mild COUGH"], of_words(Plain), 16)[1] == [0, 0]


def test_truncation_is_set_without_a_look_at_the_texts(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    call = PreTrainedTokenizerFast.__call__

    def watched(self: Any, text: Any, **asked: Any) -> Any:
        shown.extend(text)
        return call(self, text, **asked)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", watched)
    assert only_asks_its_backend(tokenizer)
    assert token_ids(["fever", "rash"], tokenizer, 8) and shown == [""]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_text_that_no_tokenizer_takes_is_refused_wherever_it_stands(
    tokenizer: PreTrainedTokenizerBase, at: int
) -> None:
    texts = ["fever", "rash"]
    texts.insert(at, "half a \ud800 character")
    with pytest.raises(TypeError):
        token_ids(texts, tokenizer, 8)
    assert [token_ids([text], tokenizer, 8)[0] for text in ("fever", "rash")] == token_ids(
        ["fever", "rash"], tokenizer, 8
    )
