"""Sums of clipped gradients and the noise on them: on an integer grid for release, or in floating point for speed.

============  ==========================================================================================================
``secure``    each contribution is rounded toward zero onto a grid, the sum is exact, the noise is a correctly rounded
              Gaussian from a cryptographic stream: see :mod:`common.privacy.noise` and PRIVACY.md
``fast``      floating point and torch's generator, reproducible from the round's secret; its low-order bits can tell of
              the data (Mironov 2012), and its seed has 32 bits, so it is for simulations and never leaves a real site
============  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from client.privacy.sampling import RoundSecret
from common.privacy.noise import Grid, fast_gaussian, rounded_gaussian


class NoisySum(Protocol):
    """The sum of one step's contributions, which leaves this object only with noise on it.

    It has the shapes of the *parameters* it is made for, and whatever is summed up beside their gradients.
    """

    def add(self, gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> None:
        """Adds ``factors[p][i] · gradients[p][i]`` of all units i; all of it, or where it raises nothing.

        Args:
            gradients: one fp32 tensor [units, numel] for each parameter p; they are overwritten.
            factors: what each unit is scaled down by, one tensor [units] for each parameter.
        """
        ...

    def take(self, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        """Sum plus N(0, deviation²) on every coordinate, fp32, one tensor for each parameter; the sum is then empty."""
        ...


class GridSum:
    """``secure``."""

    def __init__(self, parameters: Sequence[torch.Tensor], deviation: float) -> None:
        self.parameters, self.deviation = list(parameters), deviation
        self.grid = Grid.of(deviation)
        self._sums = self._empty()

    def _empty(self) -> list[torch.Tensor]:
        return [torch.zeros(p.numel(), dtype=torch.int64, device=p.device) for p in self.parameters]

    def add(self, gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> None:
        """Exact, so the order of units and batches does not matter."""
        sums = [self.grid.summed(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True)]
        self._sums = [before + more for before, more in zip(self._sums, sums, strict=True)]

    def take(self, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        """The sum is an integer, so rounding the noise alone is rounding sum and noise together."""
        sizes = [len(each) for each in self._sums]
        drawn = rounded_gaussian(secret.derive("noise", step), self.deviation / self.grid.spacing, sum(sizes))
        noise = torch.split(torch.from_numpy(drawn), sizes)
        noisy = [each + part.to(each.device) for each, part in zip(self._sums, noise, strict=True)]
        self._sums = self._empty()
        return [self.grid.value(each).view_as(p) for each, p in zip(noisy, self.parameters, strict=True)]


class FloatSum:
    """``fast``."""

    def __init__(self, parameters: Sequence[torch.Tensor], deviation: float) -> None:
        self.parameters, self.deviation = list(parameters), deviation
        self._sums = self._empty()

    def _empty(self) -> list[torch.Tensor]:
        return [
            torch.zeros(p.numel(), device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in self.parameters
        ]

    def add(self, gradients: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> None:
        """One matrix-vector product for each parameter."""
        sums = [factor @ gradient for gradient, factor in zip(gradients, factors, strict=True)]
        self._sums = [before + more for before, more in zip(self._sums, sums, strict=True)]

    def take(self, secret: RoundSecret, step: int) -> list[torch.Tensor]:
        """Noise in the order of the parameters."""
        sizes = [len(each) for each in self._sums]
        noise = torch.split(fast_gaussian(secret.derive("noise", step), self.deviation, sum(sizes)), sizes)
        noisy = [each + drawn.to(each) for each, drawn in zip(self._sums, noise, strict=True)]
        self._sums = self._empty()
        return [each.view_as(p) for each, p in zip(noisy, self.parameters, strict=True)]


SUMS: dict[str, type[GridSum] | type[FloatSum]] = {"secure": GridSum, "fast": FloatSum}
"""The plan's ``privacy.noise`` → its sum."""
