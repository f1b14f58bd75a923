"""One label for one text: a linear head on pooled token states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from common.sections import TaskSection
from common.tasks.base import Encoded, Fault, LogitsOf, Scores, register
from common.tasks.token_ids import token_ids


@register
class SequenceClassification:
    """Cross-entropy of one label per text; accuracy and macro-F1."""

    name: ClassVar[str] = "sequence-classification"
    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    peft_type: ClassVar[str] = "SEQ_CLS"
    metric: ClassVar[str] = "accuracy"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")
    selects_pooling: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, settings: TaskSection) -> None:
        self.settings = settings
        self._ids = {label: index for index, label in enumerate(settings.labels)}

    def load_network(self, path: str, **options: Any) -> PreTrainedModel:
        """The base with a fresh linear head of one row per label."""
        network: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=len(self.settings.labels), **options
        )
        network.train(False)
        return network

    def label_id(self, value: Any) -> int | None:
        """The id of a label given by name or by integer id; ``None`` if it is not in the declared set.

        A whole float counts as an integer: one missing value turns a file's column of integers into floats, and must
        not decide how all the other rows are read.
        """
        if isinstance(value, str):
            if value in self._ids:
                return self._ids[value]
            value = int(value) if value.isdecimal() and len(value) < 10 else None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= value < len(self._ids):
            return int(value)
        return None

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Encoded | None], list[Fault]]:
        """Tokens cut at ``max_length``; a row with an empty text or a label outside the declared set is a fault."""
        faults: list[Fault] = []
        texts: list[str] = []
        for index, text in enumerate(rows["text"]):
            if not isinstance(text, str) or not text.strip():
                faults.append(Fault(index, "text", "is empty"))
            texts.append(text if isinstance(text, str) else "")
        labels = [self.label_id(value) for value in rows["label"]]
        faults += [
            Fault(index, "label", f"{rows['label'][index]!r} is not one of the declared labels")
            for index, label in enumerate(labels)
            if label is None
        ]
        broken = {fault.row for fault in faults}
        ids = token_ids(texts, tokenizer, self.settings.max_length)
        encoded = [
            None if index in broken else Encoded(np.asarray(ids[index], np.int32), np.asarray(labels[index], np.int64))
            for index in range(len(texts))
        ]
        return encoded, sorted(faults, key=lambda fault: fault.row)

    def collate(self, targets: Sequence[npt.NDArray[np.int64] | None], length: int) -> torch.Tensor:
        """Label ids [B]; a dummy row gets label 0."""
        return torch.tensor([0 if target is None else int(target) for target in targets], dtype=torch.long)

    def per_example_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [B] of logits [B, K]."""
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def per_example_accuracy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """1 where the label is predicted, else 0: fp32 [B] from logits [B, labels] and label ids [B]."""
        return (logits.argmax(dim=-1) == targets).float()

    def outcomes(self, network: PreTrainedModel) -> int:
        """The number of labels."""
        return len(self.settings.labels)

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
        """Loss, prediction and label of each example."""
        return {
            "loss": self.per_example_loss(logits, targets).cpu().numpy(),
            "predicted": logits.argmax(dim=-1).cpu().numpy(),
            "label": targets.cpu().numpy(),
        }

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Mean loss, accuracy, and F1 averaged over the labels that occur or are predicted."""
        return {
            "loss": float(scores["loss"].mean()),
            "accuracy": float(accuracy_score(scores["label"], scores["predicted"])),
            "macro_f1": float(f1_score(scores["label"], scores["predicted"], average="macro", zero_division=0)),
        }

    def predict(
        self,
        logits_of: LogitsOf,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Any]],
    ) -> Iterator[dict[str, Any]]:
        """Label and probability of each label."""
        texts = rows["text"]
        encoded, _ = self.encode({"text": texts, "label": [0] * len(texts)}, tokenizer)
        for item, logits in zip(encoded, logits_of(encoded), strict=True):
            if item is None:
                yield {"error": "text is empty"}
                continue
            chances = torch.softmax(logits.float(), dim=-1)
            named = dict(zip(self.settings.labels, (round(float(p), 6) for p in chances), strict=True))
            yield {"label": self.settings.labels[int(chances.argmax())], "probabilities": named}
