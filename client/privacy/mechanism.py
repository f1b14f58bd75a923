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

The denominator is the *public* expected batch ``q · public_size``: neither the true number of rows nor the number drawn
ever enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.privacy.clipping import clip_factors, unit_gradients
from client.privacy.noisy_sum import SUMS, NoisySum
from client.privacy.per_sample import per_sample_gradients
from client.privacy.sampling import RoundSecret, poisson_sample
from common.config import PrivacySection
from common.messages import PhaseStatement

Losses = Callable[[], torch.Tensor]
"""Runs the forward pass and returns the weighted loss of each row, fp32 [B]."""


class PrivacyMechanism(Protocol):
    """Turns per-example losses into the gradient of one step."""

    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[None]:
        """Prepares the model for the round."""
        ...

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Indices of the units that take part in this step."""
        ...

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None) -> None:
        """Adds the (clipped) gradients of one physical batch.

        Args:
            slots: int64 [B], which unit of the batch each row belongs to; ``None``: each row is a unit of its own.
        """
        ...

    def step(self, step: int) -> None:
        """Adds the noise, divides by the public expected batch, and lets the optimiser step."""
        ...


class DPSGD:
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1) with Poisson sampling of privacy units.

    Each step releases ``Σ_{u ∈ sample} clip_C(g_u) + N(0, σ²C² I)``, the Poisson-subsampled Gaussian mechanism with
    sensitivity C under add/remove of one unit; g_u is the mean gradient of the unit's chosen examples.

    Args:
        statement: q, σ, C and steps as calibrated and as reserved in the ledger; nothing else decides them.
        public_size: the site's declared number of units.
        secret: the round's secret.
        noise: ``secure`` or ``fast``.
    """

    def __init__(self, statement: PhaseStatement, public_size: int, secret: RoundSecret, noise: str = "secure") -> None:
        self.statement, self.secret, self.noise = statement, secret, noise
        self.expected_batch = statement.sample_rate * public_size

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Makes ``backward`` yield per-example gradients; refuses uncovered parameters."""
        deviation = self.statement.noise_multiplier * self.statement.clip_norm
        with per_sample_gradients(model, parameters) as self._forget:
            self.parameters, self.optimizer = parameters, optimizer
            self._sum: NoisySum = SUMS[self.noise](list(parameters.values()), deviation)
            yield

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Poisson sampling at rate q."""
        return poisson_sample(n, self.statement.sample_rate, self.secret, step)

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None) -> None:
        """Per-unit gradients, clipped in fp32 to norm C over all parameters together, and summed.

        All or nothing: where it raises, the sum is what it was before, so that the units can be tried again.
        """
        try:
            rows = losses()
            rows.sum().backward()  # type: ignore[no-untyped-call]
            gradients = unit_gradients(self.parameters, len(rows), slots)
            self._sum.add(gradients, clip_factors(gradients, self.statement.clip_norm))
        finally:
            self._forget()

    def step(self, step: int) -> None:
        """Noise N(0, σ²C²) on the sum, then the public denominator, then the optimiser."""
        for parameter, noisy in zip(self.parameters.values(), self._sum.take(self.secret, step), strict=True):
            parameter.grad = noisy / self.expected_batch
        self.optimizer.step()
        self._forget()


class NoPrivacy:
    """No clipping, no noise, no claim: an explicit choice. Samples like DP-SGD, so that runs compare."""

    def __init__(self, statement: PhaseStatement, public_size: int, secret: RoundSecret) -> None:
        self.statement, self.secret = statement, secret
        self.expected_batch = statement.sample_rate * public_size

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Keeps the parameters and the optimiser."""
        self.parameters, self.optimizer = parameters, optimizer
        optimizer.zero_grad()
        yield

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Poisson sampling at rate q."""
        return poisson_sample(n, self.statement.sample_rate, self.secret, step)

    def accumulate(self, losses: Losses, slots: torch.Tensor | None = None) -> None:
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
            after = [_added(old, parameter.grad) for old, parameter in zip(before, parameters, strict=True)]
        finally:
            for parameter, gradient in zip(parameters, after, strict=True):
                parameter.grad = gradient

    def step(self, step: int) -> None:
        """Divides by the public expected batch; an empty batch is a zero gradient."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad /= self.expected_batch
        self.optimizer.step()
        self.optimizer.zero_grad()


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
        return NoPrivacy(statement, public_size, secret)
    return DPSGD(statement, public_size, secret, privacy.noise)
