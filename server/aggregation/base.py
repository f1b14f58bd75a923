"""What an aggregation algorithm is: state in, state out, so that a checkpoint is just the state.

A round is ``accumulate`` once per admitted reply, in site-name order, then ``finish``. Memory does not grow with the
number of replies. An algorithm is put together from four small parts, and so are its settings:

==================  ==========================  ====================================================================
part                setting                     what it does
==================  ==========================  ====================================================================
combining rule      ``combine``                 makes one update of the round's: :class:`CombiningRule`
server optimiser    ``server_optimizer``        moves the adapter along it: ``optimizers.py``
algorithm           ``algorithm``               says what an update may hold; re-frames the adapter after the step
iterate averaging   ``server_average``          what is evaluated and kept: :func:`averaged`
==================  ==========================  ====================================================================

Algorithms and rules register by decorator in their own file plus one import line in ``registry.py``. All of it is
post-processing of private updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState
from common.errors import AdapterError, ConfigError, did_you_mean
from common.messages import Tensors
from common.sections import PhaseSection
from server.aggregation.optimizers import optimizer_for

S = TypeVar("S")
F = TypeVar("F")

Arrays = Mapping[str, npt.NDArray[Any]]
Parts = Mapping[str, Arrays]
"""What is kept between two rounds beside the adapter: name of the part → name → array."""


class Aggregator(Protocol[S]):
    """Folds updates θ_local − θ_received into a global adapter."""

    def __init__(self, phase: PhaseSection) -> None: ...

    def init(self, adapter: Tensors) -> S:
        """The state at the start of a phase."""
        ...

    def accumulate(self, state: S, update: Tensors, weight: float) -> S:
        """Adds one admitted update. The order of calls does not matter beyond rounding.

        What the round has folded so far may be changed in place: go on with the state returned, not with the one
        given. The update is read here or in a later call, and must not be changed until the round is finished.
        """
        ...

    def finish(self, state: S) -> tuple[S, AdapterState]:
        """Closes the round: the next state, and the global adapter to evaluate and keep."""
        ...

    def save(self, state: S) -> dict[str, npt.NDArray[Any]]:
        """The state between two rounds as arrays; ``adapter/NAME`` is what the next request carries."""
        ...

    def load(self, arrays: Arrays) -> S:
        """The state from its arrays."""
        ...


class CombiningRule(Protocol[F]):
    """Makes one update of the updates of a round. Which tensors they have is checked before they come here."""

    least: int
    """Fewest replies it can work with."""

    def __init__(self, phase: PhaseSection) -> None: ...

    def empty(self) -> F:
        """Nothing folded yet."""
        ...

    def add(self, folded: F, update: Tensors, weight: float) -> F:
        """Folds one update in; ``folded`` may be changed in place.

        Args:
            update: may read each tensor from disk when it is asked for; it stays readable until ``close`` returns.
            weight: positive; weights count relative to each other alone.
        """
        ...

    def close(self, folded: F) -> AdapterState:
        """The round's update, fp32. At least one update was added."""
        ...


@dataclass(frozen=True)
class RoundState:
    """A global adapter, what its optimiser and average remember, and what the open round has folded so far."""

    adapter: Tensors
    """What the next request carries."""
    parts: Parts = field(default_factory=dict)
    folded: Any = None
    names: frozenset[str] = frozenset()
    """Tensors of the open round's updates."""


class FedOpt:
    """The round of FedOpt (Reddi et al. 2021, arXiv 2003.00295, Algorithm 1), which every algorithm here shares.

    θ ← ServerOpt(θ, Δ), where Δ is the round's combined update. An algorithm overrides :meth:`check` and
    :meth:`reframe`.
    """

    def __init__(self, phase: PhaseSection) -> None:
        self.name, self.decay = phase.algorithm, phase.server_average
        self.rule, self.optimizer = rule_for(phase), optimizer_for(phase)

    # ---- the algorithm's own part -----------------------------------------------------------------------------------

    def check(self, adapter: Tensors, update: Tensors) -> None:
        """Refuses an update that does not fit the algorithm.

        Raises:
            AdapterError: starts with ``update:``.
        """
        for name in update:
            shape = tuple(update[name].shape)
            if name not in adapter or tuple(adapter[name].shape) != shape:
                raise AdapterError(f"update: '{name}' {list(shape)} does not fit the global adapter")

    def reframe(self, before: Tensors, adapter: AdapterState, parts: Parts) -> tuple[AdapterState, Parts]:
        """The same function of the model in another frame: adapter, moments and average after the step.

        Args:
            before: the adapter before the step.
            adapter: the adapter after it.
            parts: moments after it, average before it.
        """
        return adapter, parts

    # ---- the round --------------------------------------------------------------------------------------------------

    def init(self, adapter: Tensors) -> RoundState:
        """No memory, nothing folded."""
        return RoundState(dict(adapter))

    def accumulate(self, state: RoundState, update: Tensors, weight: float) -> RoundState:
        """Checks the update, then lets the rule fold it in.

        Raises:
            AdapterError: the update has other tensors or shapes than the adapter or the round's earlier replies.
        """
        self.check(state.adapter, update)
        names = frozenset(update)
        if state.names and state.names != names:
            raise AdapterError("update: another set of tensors than the round's earlier replies")
        folded = state.folded if state.names else self.rule.empty()
        return replace(state, folded=self.rule.add(folded, update, weight), names=names)

    def finish(self, state: RoundState) -> tuple[RoundState, AdapterState]:
        """Combine, step, re-frame, average."""
        update = self.rule.close(state.folded) if state.names else {}
        adapter, moments = self.optimizer.step(state.adapter, state.parts, update)
        adapter, parts = self.reframe(state.adapter, adapter, {**state.parts, **moments})
        if self.decay:
            parts = averaged(adapter, parts, self.decay)
        kept = {part: arrays for part, arrays in parts.items() if arrays}
        return RoundState(adapter, kept), dict(kept.get(AVERAGE, adapter))

    def save(self, state: RoundState) -> dict[str, npt.NDArray[Any]]:
        """``adapter/NAME``, and ``PART/NAME`` of whatever else is remembered."""
        parts = {"adapter": state.adapter, **state.parts}
        return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    def load(self, arrays: Arrays) -> RoundState:
        """The inverse of :meth:`save`."""
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {"adapter": {}}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = array
        return RoundState(parts.pop("adapter"), parts)


# ---- iterate averaging ----------------------------------------------------------------------------------------------

AVERAGE = "average"
"""Part of the state: the average of the global adapters."""
_COUNT = "averaged"


def averaged(adapter: Tensors, parts: Parts, decay: float) -> Parts:
    """The parts with this round's adapter in the average: θ̄_t = Σ_{i≤t} γ^{t-i} θ_i / Σ_{i≤t} γ^{t-i}.

    Weights of rounds 1 to t alone, i.e. with the bias correction of Adam (Kingma & Ba 2015, arXiv 1412.6980, §3), since
    the adapter before round 1 has learnt nothing and would fade only after 1/(1-γ) rounds. Written as a step towards
    the newest adapter, θ̄ + (θ - θ̄)(1-γ)/(1-γᵗ), so that an average of equal adapters is that adapter bit for bit.
    """
    rounds = int(parts[_COUNT]["rounds"].item()) + 1 if _COUNT in parts else 1
    share = np.float32((1 - decay) / (1 - decay**rounds))
    before = parts.get(AVERAGE, adapter)
    average = {name: before[name] + share * (array - before[name]) for name, array in adapter.items()}
    return {**parts, AVERAGE: average, _COUNT: {"rounds": np.array([rounds], np.int64)}}


# ---- known by name --------------------------------------------------------------------------------------------------

_AGGREGATORS: dict[str, Callable[[PhaseSection], Aggregator[Any]]] = {}
_RULES: dict[str, Callable[[PhaseSection], CombiningRule[Any]]] = {}
A = TypeVar("A")


def register(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator: makes an aggregator known under ``phase.algorithm``."""

    def add(aggregator: type[A]) -> type[A]:
        _AGGREGATORS[name] = aggregator  # type: ignore[assignment]
        return aggregator

    return add


def register_rule(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator: makes a combining rule known under ``phase.combine``."""

    def add(rule: type[A]) -> type[A]:
        _RULES[name] = rule  # type: ignore[assignment]
        return rule

    return add


def create(phase: PhaseSection) -> Aggregator[Any]:
    """The phase's aggregator.

    Raises:
        ConfigError: unknown algorithm, rule or optimiser; lists the known ones.
    """
    if phase.algorithm not in _AGGREGATORS:
        raise ConfigError(
            f"phase.{phase.name}.algorithm = '{phase.algorithm}': unknown{did_you_mean(phase.algorithm, _AGGREGATORS)}"
        )
    return _AGGREGATORS[phase.algorithm](phase)


def rule_for(phase: PhaseSection) -> CombiningRule[Any]:
    """The phase's combining rule.

    Raises:
        ConfigError: unknown; lists the known ones.
    """
    if phase.combine not in _RULES:
        known = did_you_mean(phase.combine, _RULES)
        raise ConfigError(f"phase.{phase.name}.combine = '{phase.combine}': unknown{known}")
    return _RULES[phase.combine](phase)


def known_aggregators() -> tuple[str, ...]:
    """Names of all registered aggregators."""
    return tuple(sorted(_AGGREGATORS))


def known_rules() -> tuple[str, ...]:
    """Names of all registered combining rules."""
    return tuple(sorted(_RULES))
