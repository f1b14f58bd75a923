"""What every task must keep to. A new task needs one entry in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.adapted import AdaptedModel
from common.cuts import INPUT
from common.errors import ConfigError, ModelError
from common.examples import Examples
from common.sections import TaskSection
from common.tasks.base import Encoded, Fault, Generates, Predicts, Task, known_tasks
from common.tasks.causal_lm import IGNORED, LONGEST_ANSWER
from common.tasks.registry import task_of

Rows = dict[str, list[Any]]
Load = Callable[..., AdaptedModel]


@dataclass(frozen=True)
class Case:
    """What the suite needs to know of a task."""

    settings: dict[str, Any]
    model: str
    good: Rows
    """Rows that can be learnt from, of different lengths."""
    bad: Rows
    """Rows that cannot be learnt from, each for one reason."""
    reasons: tuple[str, ...]
    """The field at fault in each of them."""


CASES: dict[str, Case] = {
    "sequence-classification": Case(
        settings={"labels": ("urgent", "routine", "review"), "max_length": 16},
        model="tiny_bert",
        good={
            "text": ["child with mild cough", "severe bleeding since this morning " * 5, "rash"],
            "label": ["routine", "urgent", 2],
        },
        bad={
            "text": ["", "  \n", None, 7, "rash", "rash"],
            "label": ["urgent", "urgent", "urgent", "urgent", "unheard-of", None],
        },
        reasons=("text", "text", "text", "text", "label", "label"),
    ),
    "causal-lm": Case(
        settings={"name": "causal-lm", "max_length": 48, "prompt_template": "Q: {prompt}\nA: "},
        model="tiny_llama",
        good={
            "prompt": ["what is a rash?", "why do i cough at night when i am cold? " * 3, "fever?"],
            "completion": ["a sign on the skin", "no.", "a high heat of the body, often by infection " * 3],
        },
        bad={"prompt": ["", "rash?", None, "rash?"], "completion": ["a sign", " ", "a sign", 3.5]},
        reasons=("prompt", "completion", "prompt", "completion"),
    ),
}


@dataclass(frozen=True)
class Subject:
    """One task under test."""

    case: Case
    task: Task
    tokenizer: PreTrainedTokenizerBase

    def encode(self, rows: Rows) -> tuple[list[Encoded | None], list[Fault]]:
        return self.task.encode(rows, self.tokenizer)

    def encoded(self) -> list[Encoded]:
        found, faults = self.encode(self.case.good)
        assert not faults and all(item is not None for item in found)
        return [item for item in found if item is not None]

    def logits(self, targets: torch.Tensor, seed: int) -> torch.Tensor:
        """Random logits of the right shape."""
        generator = torch.Generator().manual_seed(seed)
        classes = len(self.case.settings.get("labels", ())) or len(self.tokenizer)
        return 3 * torch.randn(*targets.shape, classes, generator=generator)

    def targets(self) -> torch.Tensor:
        return self.task.collate([item.target for item in self.encoded()], 48)


@pytest.fixture(params=sorted(CASES))
def subject(request: pytest.FixtureRequest) -> Subject:
    case = CASES[request.param]
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(case.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Subject(case, task_of(TaskSection(**case.settings)), tokenizer)


def row(rows: Rows, *indices: int) -> Rows:
    return {field: [values[index] for index in indices] for field, values in rows.items()}


def size(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def same(left: Encoded | None, right: Encoded | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.target, right.target)


# ---- every task -----------------------------------------------------------------------------------------------------


def test_every_registered_task_is_held_to_the_contract() -> None:
    assert set(known_tasks()) == set(CASES)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'causal-ml': unknown task \(did you mean 'causal-lm'\?\); known: causal-lm"
    ):
        task_of(TaskSection(name="causal-ml"))
    with pytest.raises(ConfigError, match=", ".join(known_tasks())):
        task_of(TaskSection(name="zzz"))


def test_a_task_describes_itself(subject: Subject) -> None:
    task = subject.task
    assert isinstance(task, Task)
    assert task.name == subject.case.settings.get("name", "sequence-classification")
    assert task.settings == TaskSection(**subject.case.settings)
    assert set(task.fields) == set(subject.case.good)


def test_rows_are_encoded_independently_of_each_other(subject: Subject) -> None:
    together = subject.encoded()
    for index in range(size(subject.case.good)):
        assert same(subject.encode(row(subject.case.good, index))[0][0], together[index])
    backwards, _ = subject.encode(row(subject.case.good, 2, 1, 0))
    assert all(same(one, other) for one, other in zip(backwards, reversed(together), strict=True))


def test_tokens_are_int32_targets_int64_and_none_is_longer_than_max_length(subject: Subject) -> None:
    for item in subject.encoded():
        assert item.ids.dtype == np.int32 and item.ids.ndim == 1
        assert 0 < len(item.ids) <= subject.case.settings["max_length"]
        assert item.target.dtype == np.int64 and item.target.shape in ((), item.ids.shape)


def test_a_row_that_cannot_be_learnt_from_is_a_fault_and_changes_no_other_row(subject: Subject) -> None:
    good, bad = subject.case.good, subject.case.bad
    mixed = {field: [*good[field][:1], *bad[field], *good[field][1:]] for field in good}
    encoded, faults = subject.encode(mixed)
    count = size(bad)
    assert [(fault.row, fault.field) for fault in faults] == list(enumerate(subject.case.reasons, 1))
    assert encoded[1 : count + 1] == [None] * count
    kept = [encoded[0], *encoded[count + 1 :]]
    assert all(same(one, other) for one, other in zip(kept, subject.encoded(), strict=True))


def test_no_rows_are_no_examples(subject: Subject) -> None:
    assert subject.encode({field: [] for field in subject.case.good}) == ([], [])


def test_targets_are_collated_independently_of_each_other(subject: Subject) -> None:
    targets = [item.target for item in subject.encoded()]
    together = subject.task.collate(targets, 48)
    assert together.dtype == torch.int64 and len(together) == 3
    for index, target in enumerate(targets):
        assert torch.equal(subject.task.collate([None, target, None], 48)[1], together[index])


def test_the_loss_is_one_fp32_number_per_example(subject: Subject) -> None:
    targets = subject.targets()
    for dtype in (torch.float32, torch.bfloat16):
        losses = subject.task.per_example_loss(subject.logits(targets, 0).to(dtype), targets)
        assert losses.shape == (3,) and losses.dtype == torch.float32 and losses.isfinite().all()


def test_the_loss_of_a_row_does_not_depend_on_any_other_row(subject: Subject) -> None:
    targets = subject.targets()
    logits, others = subject.logits(targets, 0), subject.logits(targets, 1) * 100
    expected = subject.task.per_example_loss(logits, targets)
    for index in range(3):
        mine = torch.arange(3) == index
        mixed_logits = torch.where(mine.view(-1, *[1] * (logits.dim() - 1)), logits, others)
        mixed_targets = torch.where(mine.view(-1, *[1] * (targets.dim() - 1)), targets, targets.roll(1, 0))
        assert torch.equal(subject.task.per_example_loss(mixed_logits, mixed_targets)[index], expected[index])
        assert torch.equal(
            subject.task.per_example_loss(logits[index : index + 1], targets[index : index + 1])[0], expected[index]
        )


def test_the_gradient_of_a_rows_loss_reaches_no_other_row(subject: Subject) -> None:
    targets = subject.targets()
    logits = subject.logits(targets, 0).requires_grad_()
    for index in range(3):
        (gradient,) = torch.autograd.grad(subject.task.per_example_loss(logits, targets)[index], logits)
        rows = gradient.flatten(1).abs().sum(dim=1)
        assert rows[index] > 0
        assert rows.sum() == rows[index]


def test_a_dummy_row_has_a_finite_loss_and_gradient(subject: Subject) -> None:
    targets = subject.task.collate([None, None], 48)
    logits = subject.logits(targets, 0).requires_grad_()
    losses = subject.task.per_example_loss(logits, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_metrics_do_not_depend_on_how_a_split_is_cut_into_batches(subject: Subject) -> None:
    targets = subject.targets()
    logits = subject.logits(targets, 0)
    whole = subject.task.metrics(subject.task.score(logits, targets))
    parts = [subject.task.score(logits[index : index + 1], targets[index : index + 1]) for index in range(3)]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    assert all(len(values) == 3 for values in joined.values())
    assert subject.task.metrics(joined) == pytest.approx(whole)
    assert {"loss", subject.task.metric} <= whole.keys() <= set(subject.task.metric_names)
    if not isinstance(subject.task, Generates):
        assert whole.keys() == set(subject.task.metric_names)
    assert all(type(value) is float for value in whole.values())


def test_predictions_are_one_answer_per_row_in_order(
    subject: Subject, request: pytest.FixtureRequest, adapted_model: Load
) -> None:
    task = subject.task
    assert isinstance(task, Predicts)
    model = adapted_model(request.getfixturevalue(subject.case.model), **subject.case.settings)
    inputs = {field: [*subject.case.good[field], ""] for field in task.inputs}

    def logits_of(encoded: Sequence[Encoded | None]) -> list[torch.Tensor]:
        batches = Examples(encoded, task).batches(np.arange(len(encoded)), 8, model, INPUT)
        found = {
            int(index): logits
            for batch in batches
            for index, logits in zip(batch.indices, model.top(batch.inputs, batch.mask, INPUT), strict=False)
        }
        return [found[index] for index in range(len(encoded))]

    with torch.no_grad():
        answers = list(task.predict(logits_of, model.network, model.base.tokenizer, inputs))
        alone = list(
            task.predict(
                logits_of, model.network, model.base.tokenizer, {field: values[2:3] for field, values in inputs.items()}
            )
        )
    assert len(answers) == 4
    assert all("error" not in answer for answer in answers[:3]) and "is empty" in answers[3]["error"]
    assert alone[0] == answers[2]


# ---- sequence classification ----------------------------------------------------------------------------------------


def classification(**settings: Any) -> Any:
    return task_of(TaskSection(labels=("urgent", "routine", "1"), **settings))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("urgent", 0),
        ("routine", 1),
        (0, 0),
        (2, 2),
        (np.int64(1), 1),
        ("0", 0),
        ("2", 2),
        ("1", 2),  # a label that is called so, before an id
        (3, None),
        (-1, None),
        ("3", None),
        ("-1", None),
        ("Urgent", None),
        ("", None),
        (None, None),
        (1.0, 1),  # what a column of integers becomes by one missing value
        (3.0, None),
        (0.5, None),
        (float("nan"), None),
        (float("inf"), None),
        ("9" * 5000, None),
        (True, None),
        ("²", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_label_is_given_by_name_or_by_integer_or_by_integer_as_text(given: Any, expected: int | None) -> None:
    assert classification().label_id(given) == expected


def test_classification_loss_is_the_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [np.log(2.0), 0.0, 0.0]])
    losses = classification().per_example_loss(logits, torch.tensor([1, 0]))
    np.testing.assert_allclose(losses, [np.log(3), np.log(2)], rtol=1e-6)  # softmax (1/3, 1/3, 1/3), (1/2, 1/4, 1/4)


def test_classification_metrics_by_hand() -> None:
    """Predictions 0 0 1 2 of labels 0 1 1 1: F1 of class 0 is 2/3, of class 1 is 1/2, of class 2 is 0."""
    scores = {
        "loss": np.array([1.0, 2.0, 3.0, 4.0]),
        "predicted": np.array([0, 0, 1, 2]),
        "label": np.array([0, 1, 1, 1]),
    }
    metrics = classification().metrics(scores)
    assert metrics == pytest.approx({"loss": 2.5, "accuracy": 0.5, "macro_f1": (2 / 3 + 1 / 2 + 0) / 3})


def test_classification_metrics_equal_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 3, generator=generator), torch.randint(3, (200,), generator=generator)
    task = classification()
    metrics = task.metrics(task.score(logits, labels))
    predicted = logits.argmax(dim=1)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))


def test_a_prediction_is_the_most_probable_label_and_probabilities_sum_to_1(tiny_bert: Path) -> None:
    task = classification()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    logits = torch.tensor([0.0, np.log(3.0), 0.0])
    (answer,) = task.predict(lambda encoded: [logits for _ in encoded], None, tokenizer, {"text": ["rash"]})
    assert answer == {"label": "routine", "probabilities": {"urgent": 0.2, "routine": 0.6, "1": 0.2}}


# ---- causal LM ------------------------------------------------------------------------------------------------------


def causal(**settings: Any) -> Any:
    return task_of(TaskSection(name="causal-lm", **settings))


@pytest.fixture
def bytewise(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """One token per byte, ``<s>`` in front."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def encode_one(task: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    (item,), faults = task.encode({"prompt": [prompt], "completion": [completion]}, tokenizer)
    assert item is not None and not faults
    return item


def test_only_the_completion_and_its_end_are_learnt(bytewise: PreTrainedTokenizerBase) -> None:
    item = encode_one(causal(prompt_template="Q: {prompt} A:"), bytewise, "why?", " so")
    assert bytewise.decode(item.ids) == "<s>Q: why? A: so</s>"
    learnt = item.target != IGNORED
    assert learnt.tolist() == [False] * (1 + len("Q: why? A:")) + [True] * (len(" so") + 1)
    assert bytewise.decode(item.ids[learnt]) == " so</s>"
    assert np.array_equal(item.target[learnt], item.ids[learnt])


def test_a_chat_template_takes_the_place_of_the_prompt_template(bytewise: PreTrainedTokenizerBase) -> None:
    task = causal(prompt_template="chat")
    with pytest.raises(ModelError, match=r"task\.prompt_template = 'chat': this tokenizer has no chat template"):
        task.encode({"prompt": ["why?"], "completion": ["so"]}, bytewise)
    bytewise.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    item = encode_one(task, bytewise, "why?", "so")
    assert bytewise.decode(item.ids) == "<s>[user] why?\n[assistant] so</s>"
    assert bytewise.decode(item.ids[item.target != IGNORED]) == "so</s>"


def test_a_prompt_that_leaves_too_little_room_loses_its_middle(bytewise: PreTrainedTokenizerBase) -> None:
    task = causal(prompt_template="{prompt}", max_length=16)
    item = encode_one(task, bytewise, "abcdefghijklmnopqrst", "0123456789")
    assert bytewise.decode(item.ids) == "<s>abcde" + "opqrst" + "0123"  # 12 of 16 for the prompt, 4 for the completion
    assert bytewise.decode(item.ids[item.target != IGNORED]) == "0123"


def test_the_loss_is_the_mean_over_each_sequences_own_completion_by_hand() -> None:
    """Vocabulary of 2. Row 0 learns 1 token at probability 1/2; row 1 learns 2 tokens at 1/4 and 3/4."""
    even, skewed = [0.0, 0.0], [0.0, float(np.log(3.0))]
    logits = torch.tensor([[even, skewed, skewed], [skewed, skewed, even]])
    targets = torch.tensor([[IGNORED, 1, IGNORED], [IGNORED, 0, 1]])
    losses = causal().per_example_loss(logits, targets)
    np.testing.assert_allclose(losses, [np.log(2), (np.log(4) + np.log(4 / 3)) / 2], rtol=1e-6)


def test_a_token_is_predicted_from_the_one_before_it_and_the_prompt_adds_nothing() -> None:
    targets = torch.tensor([[IGNORED, IGNORED, 2, 1, IGNORED]])
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(causal().per_example_loss(logits, targets).sum(), logits)
    assert gradient.abs().sum(dim=2)[0].gt(0).tolist() == [False, True, True, False, False]


def test_a_long_sequence_weighs_as_much_as_a_short_one() -> None:
    """transformers' own loss averages over all tokens of the batch instead."""
    targets = torch.full((2, 41), IGNORED)
    targets[0, 1], targets[1, 1:] = 0, 0
    logits = torch.zeros(2, 41, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(causal().per_example_loss(logits, targets).sum(), logits)
    weights = gradient[:, :, 0].sum(dim=1)
    assert weights.tolist() == pytest.approx([-0.5, -0.5])


def test_perplexity_is_over_all_tokens_of_the_split() -> None:
    metrics = causal().metrics({"total": np.array([np.log(2.0), 3 * np.log(4.0)]), "tokens": np.array([1, 3])})
    assert metrics == pytest.approx({"loss": 7 / 4 * np.log(2), "perplexity": 2 ** (7 / 4)})
    endless = causal().metrics({"total": np.array([1e9]), "tokens": np.array([1])})
    assert np.isfinite(endless["perplexity"])


def test_rouge_is_that_of_greedy_answers(tiny_llama: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_llama, name="causal-lm", labels=(), max_length=64, prompt_template="Q: {prompt}\nA:")
    task: Any = model.task
    assert isinstance(task, Generates)
    prompts = ["why do i cough?", "what is a rash?"]

    def greedy(prompt: str) -> str:
        """One token after the other, without any cache."""
        ids = model.base.tokenizer(f"Q: {prompt}\nA:")["input_ids"]
        start = len(ids)
        while len(ids) - start < min(LONGEST_ANSWER, 32) and ids[-1] != model.base.tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model.network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return str(model.base.tokenizer.decode(ids[start:], skip_special_tokens=True))

    answers = [greedy(prompt) for prompt in prompts]
    predicted = list(task.predict(None, model.network, model.base.tokenizer, {"prompt": prompts}))
    assert [answer["completion"] for answer in predicted] == answers

    class Parrot:
        """Answers with words, so that the score is not zero."""

        def __call__(self, prompt: str, *_: Any) -> str:
            return {"one": "the rash is red", "two": "rest"}[prompt]

    rows: Mapping[str, list[str]] = {"prompt": ["one", "two"], "completion": ["the rash was red", "drink and rest"]}
    task._answer = Parrot()
    metrics = task.generated_metrics(model.network, model.base.tokenizer, rows)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    by_library = [
        scorer.score(reference, Parrot()(prompt))["rougeL"].fmeasure
        for prompt, reference in zip(*rows.values(), strict=True)
    ]
    # by hand: 3 of 4 words on either side give 3/4; 1 of 1 and 1 of 3 give 2·1·(1/3)/(4/3) = 1/2
    assert metrics == pytest.approx({"rouge_l": (3 / 4 + 1 / 2) / 2})
    assert metrics["rouge_l"] == pytest.approx(np.mean(by_library))
