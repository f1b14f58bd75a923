"""The privacy mechanism of one round: sampler, clipping and noise in one object, so that they cannot disagree.

=====================  ==========================================================================================
case                   what happens
=====================  ==========================================================================================
empty batch            the step is taken with noise alone
all-zero gradient      contributes zero; noise is added
NaN or Inf gradient    that unit contributes exactly zero
a unit that fails      contributes exactly zero
a dummy row            has weight 0, so its gradient is zero before clipping
=====================  ==========================================================================================

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
from opacus.optimizers import DPOptimizer
from torch import nn

from client.privacy.per_sample import finite_rows, per_sample_gradients
from client.privacy.sampling import RoundSecret, poisson_sample
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

    def accumulate(self, losses: Losses) -> None:
        """Adds the (clipped) gradients of one physical batch."""
        ...

    def step(self, step: int) -> None:
        """Adds the noise, divides by the public expected batch, and lets the optimiser step."""
        ...


class SecretNoise(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimiser with noise from the round's secret instead of a seeded torch generator."""

    def draw(self, secret: RoundSecret, step: int) -> None:
        """The step's standard normal values, one per trained number, in the parameters' order."""
        self._normal = secret.normal("noise", step, sum(parameter.numel() for parameter in self.params))

    def add_noise(self) -> None:
        """N(0, σ²C²) on every coordinate of the clipped sum, which then is the gradient."""
        deviation = self.noise_multiplier * self.max_grad_norm
        start = 0
        for parameter in self.params:
            drawn = torch.from_numpy(deviation * self._normal[start : start + parameter.numel()])
            start += parameter.numel()
            noise = drawn.view_as(parameter).to(parameter.device, parameter.dtype)
            parameter.grad = parameter.summed_grad + noise


class DPSGD:
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1) with Poisson sampling, via Opacus.

    Each step releases ``Σ_{i ∈ sample} clip_C(g_i) + N(0, σ²C² I)``, the Poisson-subsampled Gaussian mechanism with
    sensitivity C under add/remove of one unit.

    Args:
        statement: q, σ, C and steps as calibrated and as reserved in the ledger; nothing else decides them.
        public_size: the site's declared size.
        secret: the round's secret.
    """

    def __init__(self, statement: PhaseStatement, public_size: int, secret: RoundSecret) -> None:
        self.statement, self.secret = statement, secret
        self.expected_batch = statement.sample_rate * public_size

    @contextmanager
    def attach(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Hooks the model and wraps the optimiser; refuses uncovered parameters."""
        with per_sample_gradients(model, parameters) as self._forget:
            self.parameters = parameters
            self.optimizer = SecretNoise(
                optimizer,
                noise_multiplier=self.statement.noise_multiplier,
                max_grad_norm=self.statement.clip_norm,
                expected_batch_size=None,
                loss_reduction="sum",
            )
            self._clear()
            try:
                yield
            finally:
                for parameter in parameters.values():
                    if hasattr(parameter, "summed_grad"):
                        del parameter.summed_grad

    def sample(self, n: int, step: int) -> npt.NDArray[np.int64]:
        """Poisson sampling at rate q."""
        return poisson_sample(n, self.statement.sample_rate, self.secret, step)

    def accumulate(self, losses: Losses) -> None:
        """Per-example gradients, clipped in fp32 to norm C over all parameters together, and summed.

        All or nothing: where it raises, the sum is what it was before, so that the examples can be tried again.
        """
        before = self._sums()
        try:
            rows = losses()
            rows.sum().backward()  # type: ignore[no-untyped-call]
            finite_rows(self.parameters, len(rows))
            for parameter in self.parameters.values():
                parameter.summed_grad = None  # type: ignore[attr-defined]
            self.optimizer.clip_and_accumulate()
            after = [old + new for old, new in zip(before, self._sums(), strict=True)]
        except Exception:
            self._put(before)
            raise
        finally:
            self._forget()
        self._put(after)

    def step(self, step: int) -> None:
        """Noise N(0, σ²C²) on the sum, then the public denominator, then the optimiser."""
        self.optimizer.draw(self.secret, step)
        self.optimizer.add_noise()
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad /= self.expected_batch
        self.optimizer.original_optimizer.step()
        self._clear()

    def _clear(self) -> None:
        """An empty sum: also what an empty batch leaves, so that the step is noise alone."""
        self._forget()
        self._put([torch.zeros_like(parameter) for parameter in self.parameters.values()])

    def _sums(self) -> list[torch.Tensor]:
        return [parameter.summed_grad for parameter in self.parameters.values()]  # type: ignore[attr-defined]

    def _put(self, sums: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters.values(), sums, strict=True):
            parameter.summed_grad = value  # type: ignore[attr-defined]


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

    def accumulate(self, losses: Losses) -> None:
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


def mechanism_for(name: str, statement: PhaseStatement, public_size: int, secret: RoundSecret) -> PrivacyMechanism:
    """The plan's mechanism: ``dp-sgd`` or ``none``."""
    if name == "none":
        return NoPrivacy(statement, public_size, secret)
    return DPSGD(statement, public_size, secret)
