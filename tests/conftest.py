"""Models and data small enough to run in milliseconds, and the way to the real ones where they are present.

The tiny models have random weights from a fixed seed, spread wide enough that texts, layers and adapters make a
difference to the logits.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from common.adapted import AdaptedModel
    from common.adapter import AdapterState

# Before anything of Hugging Face is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[2] / "shared"

TRIAGE_LABELS = ("urgent", "routine", "review")
"""The classes of ``triage_data``, in the order of their ids."""

TRIAGE_SITES = {"north": 40, "south": 25, "west": 12}
"""Training rows of each site of ``triage_data``."""

_COMPLAINTS = {
    "urgent": "crushing chest pain|sudden weakness of one arm|severe bleeding|short of breath at rest|high fever",
    "routine": "mild cough|sore throat|small rash|back pain after work|runny nose",
    "review": "wound check|blood pressure control|new prescription|test results|stitches out",
}
_PEOPLE = "man|woman|child|patient|visitor"
_TIMES = "since this morning|since last night|for two days|for three weeks|today"

_MORE_WORDS = """
a about after all also an and answer are as ask at be before between body but by can care clear cold could day did do
does doctor dose down drug ear each ear effect eye face feel few find first foot from give go good had hand has have he
head health heart help her his hospital hot hour how i if ill in infection is it kidney knee know left leg less like
liver long lung make many may me medicine minute more most much must muscle my neck need night no not note now nurse of
on one only or other our over part place question rate right risk same see she should side sign skin sleep slow so
some stay stomach stop strong such take ten than that the their them then there these they this time to too treat
treatment two under unit until up use very was water we week well were what when where which who why will with year yes
you your . , : ; ? ! - % 0 1 2 3 4 5 6 7 8 9
"""


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of 4 layers and hidden size 32, a WordPiece tokenizer, and mean pooling declared."""
    import torch
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({*_MORE_WORDS.split(), *" ".join(_texts()).split(), *TRIAGE_LABELS})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "##s", "##ing", "##ed", "##ly"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 3 layers and hidden size 32, and a tokenizer with one token per byte of UTF-8."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapted_model() -> Callable[..., AdaptedModel]:
    """Loads a model folder anew with an adapter attached: ``adapted_model(folder, lora={"r": 4}, pooling="mean")``.

    ``lora`` are settings of ``[lora]``, further arguments settings of ``[task]``; the labels are those of
    ``triage_data`` unless given.
    """

    def load(folder: Path, lora: dict[str, Any] | None = None, dtype: str = "float32", **task: Any) -> AdaptedModel:
        from common.adapted import AdaptedModel
        from common.model import Placement, load_base
        from common.sections import LoraSection, TaskSection
        from common.tasks.registry import task_of

        settings = TaskSection(**{"labels": TRIAGE_LABELS, **task})
        bound = task_of(settings)
        base = load_base(folder, bound, Placement.choose("cpu", dtype), settings.pooling)
        return AdaptedModel(base, bound, LoraSection(**{"r": 4, **(lora or {})}))

    return load


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., AdapterState]:
    """``random_adapter(model, seed, scale)``: an adapter none of whose tensors is zero."""

    def draw(model: AdaptedModel, seed: int = 0, scale: float = 0.3) -> AdapterState:
        import numpy as np

        generator = np.random.default_rng(seed)
        shapes = model.spec.shapes
        return {name: (scale * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes}

    return draw


@pytest.fixture(scope="session")
def triage_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (77 rows of 3 sites), validation.csv and test.csv (30 each); columns text, label,
    hospital. No text occurs twice, and its words belong to the vocabulary of ``tiny_bert``."""
    folder = tmp_path_factory.mktemp("triage")
    notes = _notes()
    north, south, west = TRIAGE_SITES.values()
    hospitals = ["north"] * north + ["south"] * south + ["west"] * west
    _write(folder / "train.csv", notes, hospitals)
    for split in ("validation", "test"):
        _write(folder / f"{split}.csv", notes, (list(TRIAGE_SITES) * 10))
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; the test is skipped where it is absent."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real small models beside the repository; the test is skipped where it is absent."""
    return _shared("models")


def _shared(kind: str) -> Path:
    folder = SHARED / kind
    if not folder.is_dir():
        pytest.skip(f"needs the real {kind} in ../shared/{kind} beside the repository")
    return folder


def _texts() -> list[str]:
    return [
        *(text.replace("|", " ") for text in _COMPLAINTS.values()),
        _PEOPLE.replace("|", " "),
        _TIMES.replace("|", " "),
    ]


def _notes() -> Iterator[tuple[str, str]]:
    """Text and label, the classes in turn; 375 different texts."""
    pools = [
        [
            (f"{person} with {complaint} {time}", label)
            for time in _TIMES.split("|")
            for person in _PEOPLE.split("|")
            for complaint in _COMPLAINTS[label].split("|")
        ]
        for label in TRIAGE_LABELS
    ]
    turns = [iter(pool) for pool in pools]
    for turn in cycle(turns):
        note = next(turn, None)
        if note is None:
            return
        yield note


def _write(path: Path, notes: Iterator[tuple[str, str]], hospitals: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "hospital"])
        for hospital, (text, label) in zip(hospitals, notes, strict=False):
            rows.writerow([text, label, hospital])
