"""A head that is as sure as it is right, for the phase that comes after it.

A head that was trained alone, and without noise, can be many times too sure of its answers: its loss still falls where
the texts are already told apart. What trains below it then gets gradients from wrongly answered texts alone, and hardly
learns. So before a next phase starts from such a head, weight and bias are divided by one temperature T, that which
minimises the mean log loss (natural logarithm) of the server's own validation texts: temperature scaling (Guo et al.
2017, arXiv 1706.04599, section 4.2). No answer changes by it (but for a tie that rounding decides), which is why it is
no setting. The adapters of the head's own phase are evaluated and kept as they are.

It is done where a task's loss is that log loss of one label for each text, which is looked at and not declared. The
labels of the validation texts are used, as they are when a round is chosen by them: they are the server's own, and the
rest is post-processing of what was released, so it costs no ε. Figures on these texts know their labels by one more
number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from common.adapter import AdapterState
from common.messages import Tensors
from common.sections import PhaseSection
from server.linear_head import Floats, Head, HeldOutFeatures

MOST = 1e4
"""The largest factor by which a head is made more or less sure."""

Labels = npt.NDArray[np.int64]


def log_losses(logits: Floats, labels: Labels) -> Floats:
    """-log p of each text's label [n], from logits [n, K]."""
    losses: Floats = logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return losses


def best_temperature(logits: Floats, labels: Labels) -> float | None:
    """The T > 0 that minimises the mean log loss of ``logits / T``.

    The loss is convex in b = 1/T, with the slope mean(Σ_k p_k z_k - z_label), p the softmax of b·z; its only zero is
    the minimum.

    Args:
        logits: [n, K].
        labels: [n] in 0…K-1.

    Returns:
        ``None`` where no T within a factor of ``MOST`` is best: where all texts are answered rightly, ever smaller ones
        are better; where answers are no better than chance, ever larger ones.
    """
    given = logits[np.arange(len(labels)), labels]

    def slope(exponent: float) -> float:
        return float(np.mean((softmax(np.exp(exponent) * logits, axis=1) * logits).sum(axis=1) - given))

    end = float(np.log(MOST))
    if not (len(labels) and slope(-end) < 0 < slope(end)):
        return None
    return float(np.exp(-brentq(slope, -end, end, xtol=1e-12)))


class Calibrator:
    """Calibrates the heads of one run.

    Args:
        held_out: what they see of the server's own validation texts.
    """

    def __init__(self, held_out: HeldOutFeatures) -> None:
        self.held_out = held_out

    def calibrated(self, adapter: Tensors, phase: PhaseSection) -> AdapterState:
        """What a next phase starts from, after a phase that ended with this adapter: its head calibrated, where the
        phase trained a linear head alone, on features that no adapter changes; else as it is."""
        state = {name: np.asarray(array) for name, array in adapter.items()}
        head = self.held_out.head_of(adapter) if phase.train == ("head",) else None
        best = None if head is None else self._temperature(head, self.held_out.seen(adapter))
        return state if head is None or best is None else self.held_out.with_head(adapter, head.times(1 / best))

    def _temperature(self, head: Head, features: Floats) -> float | None:
        """The best temperature of a head; ``None`` where there is none, or the task's loss is another."""
        texts, task = self.held_out.texts.encoded, self.held_out.model.task
        used = np.isfinite(features).all(axis=1) & np.array([text is not None for text in texts])
        targets = task.collate([text.target for text, use in zip(texts, used, strict=True) if use and text], 1)
        logits = head.logits(features[used])
        labels = targets.numpy()
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not _within(labels, logits.shape[1]):
            return None
        losses = task.per_example_loss(torch.from_numpy(logits), targets).double().numpy()
        own = losses.shape == labels.shape and np.allclose(losses, log_losses(logits, labels), rtol=1e-3, atol=1e-4)
        return best_temperature(logits, labels) if own else None


def _within(labels: Labels, classes: int) -> bool:
    return bool(((labels >= 0) & (labels < classes)).all())
