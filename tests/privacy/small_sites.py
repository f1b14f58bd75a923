"""Tiny adapted models, encoded examples, plans and sites for tests of what happens inside a site."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from site_files import COORDINATOR

from client.audit_log import AuditLog
from client.config import WHOLE_SITE, PolicySection
from client.policy import Policy
from client.privacy.ledger import Ledger, Population
from client.privacy.mechanism import DPSGD, PrivacyMechanism
from client.privacy.sampling import RoundSecret
from client.site import Resources, Site
from client.trainer import train_round
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.examples import Examples
from common.messages import DescribeRequest, PhaseStatement, Tensors, TrainRequest
from common.model import Placement, load_base
from common.plan import Plan
from common.sections import EXAMPLE, LoraSection, PhaseSection, PrivacySection, TaskSection
from common.signing import PLAN, SigningKey
from common.tasks.base import Encoded
from common.tasks.registry import task_of

LABELS = ("urgent", "routine", "review")
CODE = "0" * 64
SECRET = RoundSecret.fixed(0, "site", 1)


# ------------------------------------------------------------------------------------------------ models and examples


def classifier(
    folder: Path,
    lora: LoraSection | None = None,
    placement: Placement | None = None,
    max_length: int = 48,
    **settings: Any,
) -> AdaptedModel:
    """A mean-pooled classifier of three labels; LoRA in the top two of its four layers.

    Args:
        settings: more of ``[task]``.
    """
    shape = {"labels": LABELS, "max_length": max_length, "pooling": "mean", **settings}
    task = task_of(TaskSection(name="sequence-classification", **shape))
    base = load_base(folder, task, placement or Placement.choose("cpu"), "mean")
    return AdaptedModel(base, task, lora or LoraSection(r=4, alpha=8.0, layers=2))


def language_model(
    folder: Path, lora: LoraSection | None = None, placement: Placement | None = None, max_length: int = 48
) -> AdaptedModel:
    """A causal language model; LoRA in the top two of its three layers."""
    task = task_of(TaskSection(name="causal-lm", max_length=max_length))
    base = load_base(folder, task, placement or Placement.choose("cpu"))
    return AdaptedModel(base, task, lora or LoraSection(r=4, alpha=8.0, layers=2))


def encoded(model: AdaptedModel, n: int, seed: int = 0, longest: int = 40) -> list[Encoded | None]:
    """``n`` examples of random tokens (from 6 on) and ragged lengths from 3 to ``longest``, in several buckets."""
    generator = np.random.default_rng(seed)
    vocabulary = int(model.network.config.vocab_size)
    items: list[Encoded | None] = []
    for length in generator.integers(3, longest + 1, n):
        ids = generator.integers(6, vocabulary, length).astype(np.int32)
        if model.task.name == "causal-lm":
            target = ids.astype(np.int64)
            target[: int(generator.integers(1, length))] = -100
        else:
            target = np.asarray(generator.integers(0, len(LABELS)), np.int64)
        items.append(Encoded(ids, target))
    return items


def random_state(model: AdaptedModel, seed: int = 1, scale: float = 0.3) -> AdapterState:
    """An adapter that is zero nowhere, as after some rounds."""
    generator = np.random.default_rng(seed)
    return {name: scale * generator.standard_normal(shape).astype(np.float32) for name, shape in model.spec.shapes}


def names_of(model: AdaptedModel, groups: Iterable[str]) -> tuple[str, ...]:
    """The tensors of the groups ``head``, ``A`` and ``B``."""
    return tuple(name for name in model.spec.names if model.group_of(name) in set(groups))


# ---------------------------------------------------------------------------------------------------------- mechanism


def clipped_sum(
    model: AdaptedModel,
    items: Examples | Sequence[Encoded | None],
    received: Tensors,
    names: Sequence[str],
    clip_norm: float = 1.0,
    rows: int = 4,
    mechanism: PrivacyMechanism | None = None,
    most: int = 1,
) -> AdapterState:
    """What one full-batch step of the real trainer and mechanism sums up, per tensor, with noise too small to see.

    The expected batch is 1 and the learning rate a power of two, so that the update is an exact multiple of that sum;
    a large one, so that adding it to the received adapter and taking that off again hardly rounds it.
    """
    statement = PhaseStatement("phase", 1.0, 1e-30, clip_norm, 1)
    update = train_round(
        model,
        items if isinstance(items, Examples) else Examples(items, model.task),
        received,
        PhaseSection(name="phase", rounds=1, sample_rate=1.0, learning_rate=1024.0, train=("lora",)),
        names,
        mechanism or DPSGD(statement, 1, SECRET, "fast"),
        SECRET,
        rows,
        most,
    )
    return {name: array / -1024 for name, array in update.items()}


def flat(state: Tensors) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All numbers of a state in name order."""
    return np.concatenate([np.asarray(state[name], np.float64).ravel() for name in sorted(state)])


# --------------------------------------------------------------------------------------------------- plans and sites


def phase(name: str = "lora", **settings: Any) -> PhaseSection:
    """A phase of head and LoRA training."""
    return PhaseSection(
        **{"name": name, "rounds": 3, "steps": 2, "sample_rate": 0.25, "train": ("head", "lora"), **settings}
    )


def plan_for(model: AdaptedModel, phases: Sequence[PhaseSection] = (), run_id: str = "run", **settings: Any) -> Plan:
    """A plan of the model's task and layout."""
    fields: dict[str, Any] = {
        "run_id": run_id,
        "seed": 0,
        "data": "default",
        "model_digest": model.base.digest,
        "task": model.task.settings,  # type: ignore[attr-defined]
        "lora": model.lora,
        "privacy": PrivacySection(epsilon=8.0),
        "phases": tuple(phases) or (phase(),),
        "adapter_digest": model.spec.digest(),
        "code_digest": CODE,
    }
    return Plan(**{**fields, **settings})


def policy_for(
    model: AdaptedModel, public_size: int = 40, data: Sequence[str] = ("default",), unit: str = EXAMPLE, **settings: Any
) -> Policy:
    """A policy that welcomes :func:`plan_for`.

    Args:
        settings: fields of ``[policy]``, and ``lifetime_epsilon`` of the population.
    """
    lifetime = settings.pop("lifetime_epsilon", 50.0)
    section = PolicySection(
        **{
            "base_models": (model.base.digest,),
            "tasks": ("sequence-classification", "causal-lm"),
            "lora_targets": ("attention",),
            "max_rank": 64,
            "max_epsilon": 10.0,
            "min_noise_multiplier": 1e-3,
            "coordinator_keys": (COORDINATOR.public,),
            "approval": "automatic",
            **settings,
        }
    )
    population = Population(WHOLE_SITE, unit, public_size, lifetime, 1e-5)
    return Policy(section, {WHOLE_SITE: population}, dict.fromkeys(data, WHOLE_SITE))


def site_for(
    folder: Path,
    model: AdaptedModel,
    items: Sequence[Encoded | None] | Callable[[], Examples] = (),
    policy: Policy | None = None,
    fixed_seed: int | None = None,
    rows: int = 4,
    durable: bool = False,
    key: SigningKey | None = None,
    fingerprint: Callable[[Plan], str] = lambda plan: "",
    **settings: Any,
) -> Site:
    """A site with a ledger and an audit log of its own under ``folder``."""
    if callable(items):
        give = items
    else:
        examples = Examples(items, model.task)

        def give() -> Examples:
            return examples

    return Site(
        "north",
        policy or policy_for(model),
        Ledger(folder, durable=durable),
        AuditLog(folder / "audit.jsonl", durable=durable, site="north", key=key or SigningKey.fresh()),
        Resources(lambda plan: model, lambda plan, model: give(), rows, fingerprint),
        CODE,
        fixed_seed=fixed_seed,
        **settings,
    )


def shown(plan: Plan, code_digest: str = CODE, key: SigningKey = COORDINATOR, witness: str = "") -> DescribeRequest:
    """The question whether a site takes part in a plan."""
    signature = key.sign(PLAN, plan.digest().encode())
    return DescribeRequest(plan.run_id, plan.canonical(), code_digest, signature, witness)


def request_for(plan: Plan, adapter: Tensors, round: int = 1) -> TrainRequest:
    """The request of one round."""
    return TrainRequest(plan.run_id, round, plan.digest(), adapter)


def letters(index: int) -> str:
    """a, b, c … for run ids."""
    return string.ascii_lowercase[index]


def void_gradients(model: AdaptedModel, token: int) -> None:
    """Makes every text that contains ``token`` yield NaN: its embedding is not a number."""
    with torch.no_grad():
        embedding: Any = model.network.get_input_embeddings()
        embedding.weight[token] = torch.nan
