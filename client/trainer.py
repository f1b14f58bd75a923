"""Local training of one round: from the received adapter to the update, through the privacy mechanism."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from client import noised_gradient
from client.privacy.mechanism import PrivacyMechanism
from client.privacy.metrics import row_metrics
from client.privacy.sampling import RoundSecret, examples_of
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.algorithms import LOCAL_RULES
from common.cuts import Cut
from common.errors import ConsiliumError
from common.examples import Batch, Examples
from common.messages import Tensors
from common.sections import PhaseSection
from common.tasks.base import Task

log = logging.getLogger(__name__)


def train_round(
    model: AdaptedModel,
    examples: Examples,
    received: Tensors,
    phase: PhaseSection,
    names: Iterable[str],
    mechanism: PrivacyMechanism,
    secret: RoundSecret,
    rows: int,
    most: int = 1,
) -> AdapterState:
    """Runs the phase's local steps and returns θ_local − θ_received of exactly ``names``, fp32.

    A step moves those of them that the algorithm moves in it. The others are frozen meanwhile: they are no part of the
    vector that is clipped and noised. Each step is one release of the mechanism, with randomness of its own. What is
    measured on the way stays with the mechanism.

    Args:
        rows: rows of one physical batch; with units of several examples at least ``most``.
        most: examples that one privacy unit contributes to a step, at most.
    """
    names = tuple(names)
    model.load(received)
    cut = model.cut_for(names, received)
    with torch.random.fork_rng():
        with model.training(names) as parameters:
            optimizer = optimizer_for(phase, parameters)
        for moved, steps in groupby(range(phase.steps), lambda step: moving(model, phase, names, step)):
            with model.training(moved) as parameters, mechanism.attach(model.peft, parameters, optimizer):
                for step in steps:
                    torch.manual_seed(secret.torch_seed("dropout", step))
                    chosen = drawn(examples, mechanism, most, secret, step)
                    for batch in examples.batches(chosen, rows, model, cut):
                        _accumulate(model, mechanism, examples, batch, rows, cut)
                    mechanism.step(step)
    return update_of(model.state(names), received)


def drawn(
    examples: Examples, mechanism: PrivacyMechanism, most: int, secret: RoundSecret, step: int
) -> npt.NDArray[np.int64]:
    """The examples of a step: at most ``most`` of each unit that the mechanism has sampled."""
    return examples_of(examples.units, mechanism.sample(examples.unit_count, step), most, secret, step)


def update_of(trained: AdapterState, received: Tensors) -> AdapterState:
    """θ_local − θ_received of the trained tensors."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a hostile adapter; the egress gate sends zeros then
        return {name: array - np.asarray(received[name]) for name, array in trained.items()}


def _accumulate(
    model: AdaptedModel, mechanism: PrivacyMechanism, examples: Examples, batch: Batch, rows: int, cut: Cut
) -> None:
    """One physical batch; if it fails, each of its units alone, and one that fails alone contributes zero.

    The shape stays the same, so the other units' gradients are the same either way. Whatever kind of error it is:
    which units are there must not decide whether a release comes.
    """
    forward = Forward(model, batch, cut, mechanism.metrics)
    try:
        mechanism.accumulate(forward.losses, batch.slots(), forward.measured if mechanism.metrics else None)
    except ConsiliumError:  # the phase or the model cannot be trained at all, with any example
        raise
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        units = batch.by_unit()
        if len(units) == 1:
            log.warning("a privacy unit failed in training and contributes zero; 'consilium site check' may tell why")
            return
        for unit in units:
            for alone in examples.batches(unit, rows, model, cut):
                _accumulate(model, mechanism, examples, alone, rows, cut)


class Forward:
    """One forward pass over a physical batch, and what it shows beside the loss."""

    def __init__(self, model: AdaptedModel, batch: Batch, cut: Cut, metrics: Sequence[str]) -> None:
        self.model, self.batch, self.cut, self.metrics = model, batch, cut, metrics

    def losses(self) -> torch.Tensor:
        """Weighted loss of each row [B]."""
        task, batch = self.model.task, self.batch
        logits = self.model.top(batch.inputs, batch.mask, self.cut)
        losses = weighted_losses(task, batch, logits)
        if self.metrics:
            outcomes = task.outcomes(self.model.network)
            self._rows = row_metrics(self.metrics, task, batch, logits, losses, outcomes)
        return losses

    def measured(self) -> torch.Tensor:
        """Weighted metrics of each row [B, k], of the pass that gave the losses."""
        return self._rows


def weighted_losses(task: Task, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Weighted loss of each row [B]; exactly zero where the row's weight is zero."""
    losses = task.per_example_loss(logits, batch.targets)
    return torch.where(batch.weights > 0, losses * batch.weights, torch.zeros_like(losses))


def moving(model: AdaptedModel, phase: PhaseSection, names: Iterable[str], step: int) -> tuple[str, ...]:
    """Those of the trained tensors that a step, from 0, moves."""
    rule = LOCAL_RULES[phase.algorithm]
    return tuple(name for name in names if rule.moves(model.group_of(name), step + 1))


def optimizer_for(phase: PhaseSection, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """One for the whole round; it leaves alone what has no gradient in a step.

    Args:
        parameters: all that the round trains, by canonical name, with the values that were received.
    """
    optimizer = _fresh(phase, parameters.values())
    noised_gradient.prepare(optimizer, phase, parameters)
    return optimizer


def _fresh(phase: PhaseSection, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(list(parameters), lr=phase.learning_rate, weight_decay=0.0)
    return torch.optim.SGD(list(parameters), lr=phase.learning_rate)
