"""The metrics of a round: from a forward pass to the rows, from rows to units, and over the steps of the round.

A unit's metrics are the means over its examples in this step, each in [0, 1] as a share of the metric's bound. A unit
whose loss or gradient is not finite contributes exactly zero to them as it does to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from common.examples import Batch
from common.privacy.metrics import metric_bounds
from common.tasks.base import Task

RowMetrics = Callable[[], torch.Tensor]
"""What the last forward pass measured: [B, k] fp32, weighted as the loss is, and NaN where the loss is not finite."""


def row_metrics(
    names: Sequence[str], task: Task, batch: Batch, logits: torch.Tensor, losses: torch.Tensor, outcomes: int
) -> torch.Tensor:
    """Metrics of each row times its weight, [B, k].

    Args:
        losses: [B], weighted already.
        outcomes: among how many labels or tokens the model chooses.
    """
    logits, losses = logits.detach(), losses.detach()
    bounds = metric_bounds(names, outcomes)
    measured: dict[str, Callable[[], torch.Tensor]] = {
        "loss": lambda: torch.minimum(losses / bounds["loss"], batch.weights),
        "accuracy": lambda: task.per_example_accuracy(logits, batch.targets) * batch.weights,
    }
    rows = torch.stack([measured[name]() for name in names], dim=1)
    return rows.masked_fill(~torch.isfinite(losses)[:, None], torch.nan)


def unit_metrics(
    rows: torch.Tensor, slots: torch.Tensor | None, gradients: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Metrics of each unit in [0, 1], [B, k]; zero where the unit has no finite loss or gradient.

    Args:
        rows: [B, k].
        slots: [B] which unit of the batch a row belongs to; ``None``: each row is a unit of its own.
        gradients: of each unit, one tensor [B, numel] for each parameter, not yet clipped; none where it is known that
            they are finite.
    """
    units = rows if slots is None else torch.zeros_like(rows).index_add_(0, slots, rows)
    finite = torch.isfinite(units).all(dim=1)
    # A sum is quick and shows whether there is anything to look for.
    if gradients and not bool(torch.stack([gradient.sum() for gradient in gradients]).sum().isfinite()):
        for gradient in gradients:
            finite &= torch.isfinite(gradient).all(dim=1)
    return units.masked_fill(~finite[:, None], 0.0).clamp(0.0, 1.0)  # a mean of ones may round above one


class RoundMeans:
    """Sums over the units of each step, and what they come to at the end of the round."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums = np.zeros(len(self.names))
        self._steps = 0

    def add(self, sums: torch.Tensor) -> None:
        """The sums of a further step, [k], as shares of the bounds."""
        self._sums += sums.double().cpu().numpy()
        self._steps += 1

    def over(self, expected_batch: float) -> dict[str, float]:
        """Mean of each metric, as a share of its bound; with noise in it, it need not lie in [0, 1].

        Args:
            expected_batch: q · public_size, the public number of units in a step.
        """
        return dict(zip(self.names, (self._sums / (self._steps * expected_batch)).tolist(), strict=True))
