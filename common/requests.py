"""Which tensors of an adapter travel in a request, and how a site makes the whole adapter of them again.

Two kinds stay at home. What no round so far has trained, and no server has moved, each side makes from the plan's
public seed. What a site was sent for a round that it answered, and that this round did not change, it still holds. The
digest of a request covers the whole adapter either way, so a site that has lost what it held is asked again for the
same thing, in full.

Seeded tensors are named in the digest, not covered by it: the linear algebra of two machines may differ in the last
bit. That is harmless, since an update counts from what the site had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import numpy.typing as npt

from common import number_formats
from common.adapted import AdaptedModel
from common.adapter import AdapterSpec, AdapterState
from common.algorithms import LOCAL_RULES, Matrix
from common.messages import INITIAL, Tensors, TrainRequest, WireTensors, adapter_digest, tensor_digest
from common.plan import Plan
from common.sections import PhaseSection

# ---- what a plan says of an adapter's tensors -----------------------------------------------------------------------


def starts_orthonormal(phases: tuple[PhaseSection, ...]) -> bool:
    """How A starts: as the plan's LoRA phases ask, which all ask the same (:mod:`server.prepare`)."""
    return {LOCAL_RULES[phase.algorithm].orthonormal_a for phase in phases if "lora" in phase.train} != {False}


def moved_by_server(phase: PhaseSection) -> tuple[Matrix, ...]:
    """Matrices that a server puts into another frame between two rounds of the phase, beside adding updates."""
    rule = LOCAL_RULES[phase.algorithm]
    if "lora" not in phase.train:
        return ()
    return ("A", "B") if rule.own_rank else rule.server_moves


def touched_before(plan: Plan, model: AdaptedModel, round: int) -> frozenset[str]:
    """Tensors that any round before this one may have changed; the others are as the plan starts.

    Of the plan alone, not of what was really executed: both sides come to the same answer.
    """
    # A feature map is the server's own, and where a head starts then depends on it.
    touched = {name for name in model.spec.names if model.maps_features and model.group_of(name) in ("map", "head")}
    first = 1
    for phase in plan.phases:
        served = min(phase.rounds, round - first)
        first += phase.rounds
        if served < 1:
            break
        one_of_each = {LOCAL_RULES[phase.algorithm].trains(index): index for index in range(served, 0, -1)}
        for index in one_of_each.values():
            touched.update(model.trained_in(phase, index))
        touched.update(name for name in model.spec.names if model.group_of(name) in moved_by_server(phase))
    return frozenset(touched)


def kept_after(plan: Plan, model: AdaptedModel, round: int) -> frozenset[str]:
    """Of the touched tensors those that a round leaves as they are: a site that answers it goes on holding them."""
    phase = plan.phase_of(round)
    changed = {*model.trained_in(phase, plan.round_of_phase(round))}
    changed.update(name for name in model.spec.names if model.group_of(name) in moved_by_server(phase))
    return touched_before(plan, model, round) - changed


def start_of(plan: Plan, model: AdaptedModel, spec: AdapterSpec) -> AdapterState:
    """The adapter before round 1, from public information only. Made once for a model and its replicas; not to be
    written to.

    Args:
        spec: of a rank up to the model's; a smaller adapter starts with the first rows of A.
    """
    key, original = (plan.seed, starts_orthonormal(plan.phases)), model.original
    if _starts.get(original, (None, {}))[0] != key:
        _starts[original] = (key, model.initial_state(*key))
    whole = _starts[original][1]
    return {name: np.ascontiguousarray(whole[name][tuple(map(slice, shape))]) for name, shape in spec.shapes}


_starts: WeakKeyDictionary[AdaptedModel, tuple[tuple[int, bool], AdapterState]] = WeakKeyDictionary()


# ---- the coordinator's side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundRequest:
    """The request of a round, before it is known which site lacks what of it."""

    run_id: str
    round: int
    plan_digest: str
    tensors: WireTensors = field(repr=False)
    """Encoded: everything that was touched."""
    digests: Mapping[str, str] = field(repr=False)
    """Of the whole adapter, as a site decodes it: name → digest or ``INITIAL``."""
    kept: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, plan: Plan, model: AdaptedModel, round: int, adapter: Tensors) -> RoundRequest:
        """The request to train ``adapter`` in a round.

        Args:
            adapter: at the rank of the sites that are asked.

        Raises:
            WireError: the plan's number format cannot say a number of the adapter.
        """
        touched = touched_before(plan, model, round)
        encoded = number_formats.encode({name: adapter[name] for name in touched}, plan.wire.down)
        spec = AdapterSpec.of(model.base.digest, {name: adapter[name].shape for name in touched})
        decoded = number_formats.decode(encoded, spec, plan.wire.down)
        digests = {name: tensor_digest(decoded[name]) if name in touched else INITIAL for name in model.spec.names}
        return cls(plan.run_id, round, plan.digest(), encoded, digests, kept_after(plan, model, round))

    def to(self, held: Mapping[str, str]) -> TrainRequest:
        """To a site that holds tensors of these digests; in full to one that holds nothing."""
        travel = {name for name, digest in self.digests.items() if digest not in (INITIAL, held.get(name))}
        tensors = number_formats.part_of(self.tensors, travel)
        return TrainRequest(self.run_id, self.round, self.plan_digest, tensors, self._adapter_digest)

    def digest(self) -> str:
        """The request's digest: the same to whichever site."""
        return TrainRequest(self.run_id, self.round, self.plan_digest, {}, self._adapter_digest).digest()

    @cached_property
    def _adapter_digest(self) -> str:
        return adapter_digest(self.digests)

    @cached_property
    def confirmed(self) -> Mapping[str, str]:
        """What a site holds once it has answered: name → digest."""
        return {name: self.digests[name] for name in self.kept}


# ---- the site's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Tensors that a site goes on holding after a round, with their digests."""

    tensors: Tensors = field(default_factory=dict, repr=False)
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)


NOTHING = Held()


@dataclass(frozen=True)
class Received:
    """The whole adapter of a request, decoded and filled in."""

    adapter: AdapterState = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)

    def held(self, kept: frozenset[str]) -> Held:
        """What of it outlives the round: never what the plan's seed gives anyway."""
        digests = {name: self.digests[name] for name in kept if self.digests[name] != INITIAL}
        return Held({name: _shared(digest, self.adapter[name]) for name, digest in digests.items()}, digests)


def received(
    plan: Plan, model: AdaptedModel, spec: AdapterSpec, request: TrainRequest, held: Held = NOTHING
) -> Received | None:
    """The whole adapter; ``None`` if what travels and what is held do not make the adapter that the request names.

    Args:
        spec: of the whole adapter, at the site's rank.

    Raises:
        WireError: what travels is not of this layout, or not in the plan's number format.
    """
    travelled = number_formats.names_of(request.adapter)
    adapter = number_formats.decode(request.adapter, spec.part(travelled), plan.wire.down)
    digests = {name: tensor_digest(array) for name, array in adapter.items()}
    at_home = {name: held.digests.get(name, INITIAL) for name in spec.names if name not in adapter}
    digests.update(at_home)
    if adapter_digest(digests) != request.adapter_digest:
        return None
    start = start_of(plan, model, spec) if INITIAL in at_home.values() else {}
    for name, digest in at_home.items():
        adapter[name] = start[name] if digest == INITIAL else held.tensors[name]
    return Received(adapter, digests)


_in_memory: WeakValueDictionary[str, npt.NDArray[Any]] = WeakValueDictionary()


def _shared(digest: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The array; sites of one process that hold equal ones hold it once."""
    return _in_memory.setdefault(digest, array)
