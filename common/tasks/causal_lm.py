"""Instruction tuning of a decoder: the completion is learnt, the prompt is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import ModelError
from common.sections import TaskSection
from common.tasks.base import Encoded, Fault, LogitsOf, Scores, register
from common.tasks.token_ids import token_ids

IGNORED = -100
"""Target of a token that is not learnt (prompt and padding)."""

LONGEST_ANSWER = 48
"""Tokens of a generated answer."""


@register
class CausalLM:
    """Mean cross-entropy of the completion's tokens, per sequence; perplexity, and ROUGE-L of generated text."""

    name: ClassVar[str] = "causal-lm"
    fields: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    peft_type: ClassVar[str] = "CAUSAL_LM"
    metric: ClassVar[str] = "perplexity"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "rouge_l", "loss")
    selects_pooling: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("prompt",)

    def __init__(self, settings: TaskSection) -> None:
        self.settings = settings

    def load_network(self, path: str, **options: Any) -> PreTrainedModel:
        """The base with its own language-model head."""
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
        network.train(False)
        return network

    def prompt_ids(self, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of each templated prompt, ready for the completion to follow.

        Raises:
            ModelError: ``prompt_template = "chat"`` and the tokenizer has no chat template.
        """
        if self.settings.prompt_template != "chat":
            return token_ids([self.settings.prompt_template.replace("{prompt}", one) for one in prompts], tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "task.prompt_template = 'chat': this tokenizer has no chat template; "
                "give a prompt_template that contains {prompt}"
            )
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [str(tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)) for one in chats]
        return token_ids(texts, tokenizer, special_tokens=False)

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[Encoded | None], list[Fault]]:
        """Prompt, completion and end-of-sequence, cut at ``max_length``.

        A prompt that would leave less than a quarter of the length to the completion loses its middle, so that
        something is always learnt.
        """
        faults = [
            Fault(index, field, "is empty")
            for index, pair in enumerate(zip(rows["prompt"], rows["completion"], strict=True))
            for field, value in zip(self.fields, pair, strict=True)
            if not isinstance(value, str) or not value.strip()
        ]
        broken = {fault.row for fault in faults}
        sound = [index for index in range(len(rows["prompt"])) if index not in broken]
        prompts = self.prompt_ids([rows["prompt"][index] for index in sound], tokenizer)
        completions = token_ids([rows["completion"][index] for index in sound], tokenizer, special_tokens=False)
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded: list[Encoded | None] = [None] * len(rows["prompt"])
        for index, given, learnt in zip(sound, prompts, completions, strict=True):
            encoded[index] = self._joined(given, learnt + ends)
        return encoded, faults

    def _joined(self, given: list[int], learnt: list[int]) -> Encoded:
        longest = self.settings.max_length
        room = longest - longest // 4
        if len(given) > room:
            given = given[: room // 2] + given[len(given) - (room - room // 2) :]
        ids = np.asarray((given + learnt)[:longest], np.int32)
        target = ids.astype(np.int64)
        target[: len(given)] = IGNORED
        return Encoded(ids, target)

    def collate(self, targets: Sequence[npt.NDArray[np.int64] | None], length: int) -> torch.Tensor:
        """Token targets [B, length], ``IGNORED`` on prompt and padding."""
        padded = np.full((len(targets), length), IGNORED, np.int64)
        for row, target in enumerate(targets):
            if target is not None:
                padded[row, : len(target)] = target
        return torch.from_numpy(padded)

    def per_example_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy [B] over each sequence's own completion tokens, from logits [B, T, V].

        The mean is per sequence: transformers' own loss averages over the whole batch, which would let one sequence
        move the gradients of the others.
        """
        total, count = self._totals(logits, targets)
        return total / count.clamp(min=1)

    def _totals(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        predicted, wanted = logits[:, :-1].float(), targets[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            predicted.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(dim=1), (wanted != IGNORED).sum(dim=1)

    def per_example_accuracy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Share of each sequence's own completion tokens that are the most likely ones, [B], from logits [B, T, V]."""
        wanted = targets[:, 1:]
        learnt = wanted != IGNORED
        right = (logits[:, :-1].argmax(dim=-1) == wanted) & learnt
        return right.sum(dim=1).float() / learnt.sum(dim=1).clamp(min=1)

    def outcomes(self, network: PreTrainedModel) -> int:
        """The size of the vocabulary."""
        return int(network.config.get_text_config().vocab_size)

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> Scores:
        """Summed loss and number of completion tokens of each example."""
        total, count = self._totals(logits, targets)
        return {"total": total.cpu().numpy(), "tokens": count.cpu().numpy()}

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Mean loss per token and perplexity; ROUGE-L and others that need generation are added by the evaluator."""
        loss = float(scores["total"].sum() / max(1, scores["tokens"].sum()))
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 80.0)))}

    def predict(
        self,
        logits_of: LogitsOf,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Any]],
    ) -> Iterator[dict[str, Any]]:
        """A greedy completion of each prompt."""
        for prompt in rows["prompt"]:
            if isinstance(prompt, str) and prompt.strip():
                yield {"completion": self._answer(prompt, network, tokenizer)}
            else:
                yield {"error": "prompt is empty"}

    def generated_metrics(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Sequence[Any]]
    ) -> dict[str, float]:
        """Mean ROUGE-L F-measure (Lin 2004) of greedy answers of at most ``LONGEST_ANSWER`` tokens."""
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        scores = [
            scorer.score(reference, self._answer(prompt, network, tokenizer))["rougeL"].fmeasure
            for prompt, reference in zip(rows["prompt"], rows["completion"], strict=True)
        ]
        return {"rouge_l": float(np.mean(scores))}

    def _answer(self, prompt: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
        """Greedy completion of one prompt."""
        ids = self.prompt_ids([prompt], tokenizer)[0][-(self.settings.max_length // 2) :]
        given = torch.tensor([ids], device=network.device)
        with torch.no_grad():
            answer = network.generate(  # type: ignore[operator]
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(LONGEST_ANSWER, self.settings.max_length // 2),
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        return str(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True))
