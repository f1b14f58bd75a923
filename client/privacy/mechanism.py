"""The privacy mechanism of one round: sampler, clipping and noise in one object, so that they cannot disagree.

=====================  ==========================================================================================
case                   what happens
=====================  ==========================================================================================
empty batch            the step is taken with noise alone
all-zero gradient      contributes zero; noise is added
NaN or Inf gradient    that unit contributes exactly zero
a unit that fails      contributes exactly zero
a dummy row            has weight 0, so its gradient is zero before clipping
one bad example        its whole unit contributes zero
=====================  ==========================================================================================

The metrics that the plan asks for are further coordinates of the same sum, with their share of the noise and nothing to
decide on their own: :mod:`common.privacy.metrics` has the account.

The denominator is the *public* expected batch ``q · public_size``: neither the true number of rows nor the number drawn
ever enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.privacy.clipping import clip_factors, unit_gradients
from client.privacy.metrics import RoundMeans, RowMetrics, unit_metrics
from client.privacy.noisy_sum import SUMS, NoisySum
from client.privacy.per_sample import per_sample_gradients
from client.privacy.sampling import RoundSecret, poisson_sample
from common.messages import PhaseStatement
from common.privacy.metrics import NoiseSplit
from common.sections import PrivacySection

Losses = Callable[[], torch.Tensor]
"""Runs the forward pass and returns the weighted loss of each row, fp32 [B]."""


class PrivacyMechanism(Protocol):
    """Turns per-example losses into the gradient of one step."""

    metrics: tuple[str, ...]
    """What is measured beside the gradient."""
    by_unit: bool
    """Whether ``add`` needs the gradient of each unit; else the sum over a batch's units is as good."""

    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[None]:
        """Makes the model yield what ``accumulate`` needs, and starts with these parameters."""
        ...

    def start(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """The sum is empty, and from now on steps move these parameters: for ``add``, which needs no model."""
        ...

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Indices of the units that take part in this step."""
        ...

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None, measured: RowMetrics | None = None) -> None:
        """Adds the (clipped) gradients of one physical batch, and its metrics.

        Args:
            slots: int64 [B], which unit of the batch each row belongs to; ``None``: each row is a unit of its own.
            measured: asked after ``losses``; ``None`` if and only if there are no ``metrics``.
        """
        ...

    def add(
        self, gradients: Sequence[torch.Tensor], slots: torch.Tensor | None = None, measured: RowMetrics | None = None
    ) -> None:
        """Adds the (clipped) gradients of units, however they were computed, and their metrics. All or nothing.

        Args:
            gradients: of each unit, fp32 [units, numel] for each parameter, or [1, numel] of all of them; they are
                overwritten.
            slots, measured: as above.
        """
        ...

    def step(self, step: int) -> None:
        """Adds the noise, divides by the public expected batch, and lets the optimiser step."""
        ...

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps so far, as a share of its bound, with the noise that belongs on it."""
        ...


class DPSGD:
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1) with Poisson sampling of privacy units.

    Each step releases ``Σ_{u ∈ sample} clip_C(g_u) + N(0, σ²C² I)``, the Poisson-subsampled Gaussian mechanism with
    sensitivity C under add/remove of one unit; g_u is the mean gradient of the unit's chosen examples.

    With k metrics m_u ∈ [0, 1]^k and their share s, what a unit adds is the vector (clip_C(g_u), a·m_u) of norm at most
    √(C² + k·a²) = C/√(1-s) with a = C·√(s/(k(1-s))), and each coordinate gets N(0, σ²C²/(1-s)): the noise multiplier of
    the step is σ again.

    Args:
        statement: q, σ, C and steps as calibrated and as reserved in the ledger; nothing else decides them.
        public_size: the site's declared number of units.
        secret: the round's secret.
        noise: ``secure`` or ``fast``.
        metrics: what is measured beside the gradient.
        metrics_share: s.
    """

    by_unit = True

    def __init__(
        self,
        statement: PhaseStatement,
        public_size: int,
        secret: RoundSecret,
        noise: str = "secure",
        metrics: Sequence[str] = (),
        metrics_share: float = 0.0,
    ) -> None:
        self.statement, self.secret, self.noise = statement, secret, noise
        self.expected_batch = statement.sample_rate * public_size
        self.metrics, self._means = tuple(metrics), RoundMeans(metrics)
        self.split = NoiseSplit(len(self.metrics), metrics_share)

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Makes ``backward`` yield per-example gradients; refuses uncovered parameters."""
        with per_sample_gradients(model, parameters) as self._forget:
            self.start(parameters, optimizer)
            yield

    def start(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """With an empty sum of the parameters' shapes, and of the metrics."""
        deviation = self.split.gradient(self.statement.noise_multiplier) * self.statement.clip_norm
        summed: list[torch.Tensor] = list(parameters.values())
        if self.metrics:
            summed.append(summed[0].new_zeros(len(self.metrics)))
            # What a metric of 1 is in the sum, where all coordinates have the same noise; below it, for rounding.
            self._one = deviation / self.split.metric(self.statement.noise_multiplier) * (1 - 2.0**-22)
        self.parameters, self.optimizer = parameters, optimizer
        self._sum: NoisySum = SUMS[self.noise](summed, deviation)

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Poisson sampling at rate q."""
        return poisson_sample(n, self.statement.sample_rate, self.secret, step)

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None, measured: RowMetrics | None = None) -> None:
        """Per-unit gradients, clipped in fp32 to norm C over all parameters together, and summed.

        All or nothing: where it raises, the sum is what it was before, so that the units can be tried again.
        """
        try:
            rows = losses()
            rows.sum().backward()  # type: ignore[no-untyped-call]
            self.add(unit_gradients(self.parameters, len(rows), slots), slots, measured)
        finally:
            self._forget()

    def add(
        self, gradients: Sequence[torch.Tensor], slots: torch.Tensor | None = None, measured: RowMetrics | None = None
    ) -> None:
        """Clipped as in ``accumulate``, which ends here."""
        metrics = self._metrics(gradients, slots, measured)
        factors = [clip_factors(gradients, self.statement.clip_norm)] * len(gradients)
        unscaled = [torch.ones_like(factors[0])] * len(metrics)
        self._sum.add([*gradients, *metrics], [*factors, *unscaled])

    def _metrics(
        self, gradients: Sequence[torch.Tensor], slots: torch.Tensor | None, measured: RowMetrics | None
    ) -> list[torch.Tensor]:
        """The units' metrics as one part more of the sum, [units, k], or none."""
        if measured is None:
            return []
        return [unit_metrics(measured(), slots, gradients).to(gradients[0]) * self._one]

    def step(self, step: int) -> None:
        """Noise on the sum, then the public denominator, then the optimiser."""
        noisy = self._sum.take(self.secret, step)
        if self.metrics:
            self._means.add(noisy.pop() / self._one)
        for parameter, gradient in zip(self.parameters.values(), noisy, strict=True):
            parameter.grad = gradient / self.expected_batch
        self.optimizer.step()
        self.optimizer.zero_grad()

    def means(self) -> dict[str, float]:
        """With noise of deviation ``NoiseSplit.of_mean``."""
        return self._means.over(self.expected_batch)


class NoPrivacy:
    """No clipping, no noise, no claim: an explicit choice. Samples like DP-SGD, so that runs compare."""

    by_unit = False

    def __init__(
        self, statement: PhaseStatement, public_size: int, secret: RoundSecret, metrics: Sequence[str] = ()
    ) -> None:
        self.statement, self.secret = statement, secret
        self.expected_batch = statement.sample_rate * public_size
        self.metrics, self._means = tuple(metrics), RoundMeans(metrics)

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Needs nothing of the model."""
        self.start(parameters, optimizer)
        yield

    def start(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Without gradients."""
        self.parameters, self.optimizer = parameters, optimizer
        self._measured = torch.zeros(len(self.metrics))
        optimizer.zero_grad()

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Poisson sampling at rate q."""
        return poisson_sample(n, self.statement.sample_rate, self.secret, step)

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None, measured: RowMetrics | None = None) -> None:
        """Adds the gradient of the summed loss, unless it is not finite: then nothing is added and it raises.

        Raises:
            ValueError: some example of the batch has no finite gradient.
        """
        parameters = list(self.parameters.values())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        after = before
        try:
            losses().sum().backward()  # type: ignore[no-untyped-call]
            more = 0.0 if measured is None else unit_metrics(measured(), slots).sum(dim=0).cpu()
            after = [_added(old, parameter.grad) for old, parameter in zip(before, parameters, strict=True)]
            self._measured = self._measured + more
        finally:
            for parameter, gradient in zip(parameters, after, strict=True):
                parameter.grad = gradient

    def add(
        self, gradients: Sequence[torch.Tensor], slots: torch.Tensor | None = None, measured: RowMetrics | None = None
    ) -> None:
        """As ``accumulate`` does with the gradient of a batch.

        Raises:
            ValueError: some gradient is not finite.
        """
        parameters = list(self.parameters.values())
        sums = [each.sum(dim=0).view_as(parameter) for parameter, each in zip(parameters, gradients, strict=True)]
        after = [_added(parameter.grad, each) for parameter, each in zip(parameters, sums, strict=True)]
        more = 0.0 if measured is None else unit_metrics(measured(), slots).sum(dim=0).cpu()
        for parameter, gradient in zip(parameters, after, strict=True):
            parameter.grad = gradient
        self._measured = self._measured + more

    def step(self, step: int) -> None:
        """Divides by the public expected batch; an empty batch is a zero gradient."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad /= self.expected_batch
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._means.add(self._measured)
        self._measured = torch.zeros_like(self._measured)

    def means(self) -> dict[str, float]:
        """Without noise."""
        return self._means.over(self.expected_batch)


def _added(before: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if gradient is not None and not bool(torch.isfinite(gradient).all()):
        raise ValueError("a gradient is not finite")
    if before is None or gradient is None:
        return before if gradient is None else gradient
    return before + gradient


def mechanism_for(
    privacy: PrivacySection, statement: PhaseStatement, public_size: int, secret: RoundSecret
) -> PrivacyMechanism:
    """The plan's mechanism: ``dp-sgd`` or ``none``."""
    if privacy.mechanism == "none":
        return NoPrivacy(statement, public_size, secret, privacy.metrics)
    return DPSGD(statement, public_size, secret, privacy.noise, privacy.metrics, privacy.metrics_share)
