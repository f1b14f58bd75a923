"""What the server does with a round's combined update Δ: heavy-ball SGD, FedAdam, FedYogi.

Δ stands for a negative gradient, so every optimiser *adds* its step. Moments are part of the aggregator's state, and so
of the checkpoint: ``velocity`` and ``second``. A tensor without an update in a round keeps value and moments.
Post-processing of private updates: free under DP, though noise in Δ goes into the second moment as well, where it makes
adaptive steps more even. With secure sums: works as it is, since Δ alone is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState
from common.errors import ConfigError, did_you_mean
from common.messages import Tensors
from common.sections import PhaseSection

VELOCITY, SECOND = "velocity", "second"
Moments = Mapping[str, Tensors]
_Array = npt.NDArray[np.float32]


class ServerOptimizer(Protocol):
    """θ, moments and Δ → θ and moments."""

    def step(self, adapter: Tensors, moments: Moments, update: Tensors) -> tuple[AdapterState, dict[str, AdapterState]]:
        """Adapter and moments after one step, fp32; what is given stays as it is.

        Args:
            moments: may hold other parts as well.
            update: Δ of some or all tensors.
        """
        ...


class HeavyBall:
    """v ← β v + Δ; θ ← θ + η v (FedAvgM, Hsu et al. 2019, arXiv 1909.06335). Without momentum nothing is kept."""

    def __init__(self, phase: PhaseSection) -> None:
        self.rate, self.momentum = np.float32(phase.server_learning_rate), phase.server_momentum

    def step(self, adapter: Tensors, moments: Moments, update: Tensors) -> tuple[AdapterState, dict[str, AdapterState]]:
        """Starts at v = Δ."""
        after, velocity = _copies(adapter), dict(moments.get(VELOCITY, {}))
        for name, delta in update.items():
            velocity[name] = self.momentum * velocity[name] + delta if name in velocity else delta
            after[name] = (after[name] + self.rate * velocity[name]).astype(np.float32)
        return after, {VELOCITY: velocity if self.momentum else {}}


class _Adaptive:
    """m ← β₁ m + (1-β₁) Δ; v ← second(v, Δ²); θ ← θ + η m / (√v + τ) (Reddi et al. 2021, arXiv 2003.00295, Alg. 2).

    m starts at 0 and v at τ², without bias correction, as in the paper.
    """

    def __init__(self, phase: PhaseSection) -> None:
        self.rate = np.float32(phase.server_learning_rate)
        self.first, self.second = np.float32(phase.server_momentum), np.float32(phase.server_second_moment)
        self.adaptivity = np.float32(phase.server_adaptivity)

    def step(self, adapter: Tensors, moments: Moments, update: Tensors) -> tuple[AdapterState, dict[str, AdapterState]]:
        """β₁ is ``server_momentum``, β₂ ``server_second_moment``, τ ``server_adaptivity``."""
        after, one = _copies(adapter), np.float32(1)
        velocity, second = dict(moments.get(VELOCITY, {})), dict(moments.get(SECOND, {}))
        for name, delta in update.items():
            m = self.first * velocity.get(name, np.zeros_like(delta)) + (one - self.first) * delta
            v = self._moved(second.get(name, np.full_like(delta, self.adaptivity**2)), np.square(delta))
            after[name] = (after[name] + self.rate * m / (np.sqrt(v) + self.adaptivity)).astype(np.float32)
            velocity[name], second[name] = m.astype(np.float32), v
        return after, {VELOCITY: velocity, SECOND: second}

    def _moved(self, v: _Array, square: _Array) -> _Array:
        raise NotImplementedError


class FedAdam(_Adaptive):
    """v ← β₂ v + (1-β₂) Δ²."""

    def _moved(self, v: _Array, square: _Array) -> _Array:
        moved: _Array = (self.second * v + (np.float32(1) - self.second) * square).astype(np.float32)
        return moved


class FedYogi(_Adaptive):
    """v ← v - (1-β₂) Δ² sign(v - Δ²): moves by at most (1-β₂) Δ², so it forgets a large v slowly."""

    def _moved(self, v: _Array, square: _Array) -> _Array:
        moved: _Array = (v - (np.float32(1) - self.second) * square * np.sign(v - square)).astype(np.float32)
        return moved


def _copies(adapter: Tensors) -> AdapterState:
    return {name: np.asarray(array, np.float32) for name, array in adapter.items()}


OPTIMIZERS: dict[str, Callable[[PhaseSection], ServerOptimizer]] = {
    "sgd": HeavyBall,
    "adam": FedAdam,
    "yogi": FedYogi,
}
"""``phase.server_optimizer`` → its optimiser."""


def optimizer_for(phase: PhaseSection) -> ServerOptimizer:
    """The phase's server optimiser.

    Raises:
        ConfigError: unknown; lists the known ones.
    """
    chosen = phase.server_optimizer
    if chosen not in OPTIMIZERS:
        known = did_you_mean(chosen, OPTIMIZERS)
        raise ConfigError(f"phase.{phase.name}.server_optimizer = '{chosen}': unknown{known}")
    return OPTIMIZERS[chosen](phase)
