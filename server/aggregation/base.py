"""What an aggregation algorithm is: state in, state out, so that a checkpoint is just the state.

A round is ``accumulate`` once per admitted reply, in site-name order, then ``finish``. Memory does not grow with the
number of replies. Algorithms register by decorator in their own file plus one import line in ``registry.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState
from common.config import PhaseSection
from common.errors import AdapterError, ConfigError, did_you_mean
from common.messages import Tensors

Sums = Mapping[str, npt.NDArray[np.float64]]
S = TypeVar("S")


class Aggregator(Protocol[S]):
    """Folds updates θ_local − θ_received into a global adapter."""

    def __init__(self, phase: PhaseSection) -> None: ...

    def init(self, adapter: Tensors) -> S:
        """The state at the start of a phase."""
        ...

    def accumulate(self, state: S, update: Tensors, weight: float) -> S:
        """Adds one admitted update. The order of calls does not matter beyond rounding."""
        ...

    def finish(self, state: S) -> tuple[S, AdapterState]:
        """Closes the round: the next state and the new global adapter."""
        ...

    def save(self, state: S) -> dict[str, npt.NDArray[Any]]:
        """The state between two rounds as arrays."""
        ...

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> S:
        """The state from its arrays."""
        ...


@dataclass(frozen=True)
class MeanState:
    """A global adapter, the server's momentum, and the weighted sum of the round so far."""

    adapter: Tensors
    velocity: Tensors = field(default_factory=dict)
    sums: Sums = field(default_factory=dict)
    weight: float = 0.0


class WeightedMean:
    """Weighted mean of the updates, tensor by tensor, with heavy-ball momentum at the server.

    With weights w_k: Δ = Σ w_k Δ_k / Σ w_k; v ← β v + Δ; θ ← θ + η_s v (FedAvgM, Hsu et al. 2019, arXiv 1909.06335).
    Sums are kept in fp64 and rounded once. All of it is post-processing of private updates.
    """

    def __init__(self, phase: PhaseSection) -> None:
        self.learning_rate, self.momentum = phase.server_learning_rate, phase.server_momentum

    def init(self, adapter: Tensors) -> MeanState:
        """Zero velocity, empty sum."""
        return MeanState(dict(adapter))

    def accumulate(self, state: MeanState, update: Tensors, weight: float) -> MeanState:
        """Adds ``weight · update``.

        Raises:
            AdapterError: the update has other tensors or shapes than the adapter or the round's earlier replies.
        """
        for name, array in update.items():
            if name not in state.adapter or state.adapter[name].shape != array.shape:
                raise AdapterError(f"update: '{name}' {list(array.shape)} does not fit the global adapter")
        if state.sums and state.sums.keys() != update.keys():
            raise AdapterError("update: another set of tensors than the round's earlier replies")
        sums = {
            name: weight * array.astype(np.float64) + (state.sums[name] if state.sums else 0.0)
            for name, array in update.items()
        }
        return replace(state, sums=sums, weight=state.weight + weight)

    def finish(self, state: MeanState) -> tuple[MeanState, AdapterState]:
        """θ ← θ + η_s (β v + mean)."""
        adapter = {name: np.asarray(array, np.float32) for name, array in state.adapter.items()}
        velocity = dict(state.velocity)
        for name, total in state.sums.items():
            mean = (total / state.weight).astype(np.float32)
            velocity[name] = self.momentum * velocity[name] + mean if name in velocity else mean
            adapter[name] = (adapter[name] + np.float32(self.learning_rate) * velocity[name]).astype(np.float32)
        return MeanState(adapter, velocity if self.momentum else {}), adapter

    def save(self, state: MeanState) -> dict[str, npt.NDArray[Any]]:
        """``adapter/NAME`` and ``velocity/NAME``."""
        arrays: dict[str, npt.NDArray[Any]] = {f"adapter/{name}": array for name, array in state.adapter.items()}
        arrays.update({f"velocity/{name}": array for name, array in state.velocity.items()})
        return arrays

    def load(self, arrays: Mapping[str, npt.NDArray[Any]]) -> MeanState:
        """The inverse of :meth:`save`."""
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {"adapter": {}, "velocity": {}}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            parts[part][name] = array
        return MeanState(parts["adapter"], parts["velocity"])


_AGGREGATORS: dict[str, Callable[[PhaseSection], Aggregator[Any]]] = {}
A = TypeVar("A")


def register(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator: makes an aggregator known under ``phase.algorithm``."""

    def add(aggregator: type[A]) -> type[A]:
        _AGGREGATORS[name] = aggregator  # type: ignore[assignment]
        return aggregator

    return add


def create(phase: PhaseSection) -> Aggregator[Any]:
    """The phase's aggregator.

    Raises:
        ConfigError: unknown algorithm; lists the known ones.
    """
    if phase.algorithm not in _AGGREGATORS:
        raise ConfigError(
            f"phase.{phase.name}.algorithm = '{phase.algorithm}': unknown{did_you_mean(phase.algorithm, _AGGREGATORS)}"
        )
    return _AGGREGATORS[phase.algorithm](phase)


def known_aggregators() -> tuple[str, ...]:
    """Names of all registered aggregators."""
    return tuple(sorted(_AGGREGATORS))
