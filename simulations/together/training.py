"""Local training of one round at several sites in lock-step: each pass of the frozen base carries rows of many of them.

Every row meets its own site's adapter and head, and yields a gradient of its own; what a site's mechanism then clips,
sums, noises and steps with are the gradients of its own rows alone. Sampler, noise, optimiser and accounting are one of
each for each site, with the draws they make when the site trains alone, so the update differs from that one by rounding
(a row lies in another place of a batch, and a sum has another order).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from client.privacy.clipping import unit_gradients
from client.privacy.linear_maps import OwnWeights
from client.privacy.per_sample import per_sample_gradients
from client.site import Work
from client.trainer import Forward, drawn, moving, optimizer_for, update_of
from common.adapter import AdapterState
from common.cuts import Cut
from common.errors import ConsiliumError
from common.examples import Batch
from simulations.together.passes import Piece, filled, joined

log = logging.getLogger(__name__)

Trained = tuple[AdapterState, dict[str, float]]
"""A round's update, and the means of the plan's metrics."""


def train_together(works: Sequence[Work]) -> list[Trained]:
    """What ``Site.trained`` gives for each.

    Args:
        works: of one request, so of one plan, round and received adapter, and of one physical batch.

    Raises:
        ConsiliumError: the model cannot have weights for each site.
    """
    return _Group(works).train()


class _Lane:
    """One site of the group: its own tensors, optimiser and mechanism."""

    def __init__(self, work: Work, parameters: Mapping[str, nn.Parameter]) -> None:
        self.work, self.parameters = work, parameters
        self.mechanism = work.mechanism()
        self.optimizer = optimizer_for(work.phase, parameters)

    def batches(self, step: int, cut: Cut) -> Iterator[Batch]:
        """The site's own physical batches of a step."""
        work = self.work
        most, secret = work.plan.privacy.max_examples_per_unit, work.reservation.secret
        chosen = drawn(work.examples, self.mechanism, most, secret, step)
        return work.examples.batches(chosen, work.rows, work.model, cut)

    def trained(self) -> Trained:
        """What came of the round."""
        state = {name: one.detach().float().cpu().numpy().copy() for name, one in self.parameters.items()}
        return update_of(state, self.work.adapter.adapter), self.mechanism.means()


class _Group:
    def __init__(self, works: Sequence[Work]) -> None:
        first = works[0]
        self.model, self.phase, self.names = first.model, first.phase, first.names
        received = first.adapter.adapter
        self.model.load(received)
        self.cut = self.model.cut_for(self.names, received)
        with self.model.training(self.names) as parameters:
            stacks = {name: torch.stack([one.detach()] * len(works)) for name, one in parameters.items()}
        self.lanes = [
            _Lane(work, {name: nn.Parameter(stack[site]) for name, stack in stacks.items()})
            for site, work in enumerate(works)
        ]
        self.by_unit = self.lanes[0].mechanism.by_unit
        own = {parameters[name]: stack for name, stack in stacks.items()}
        self.own = OwnWeights(own, summed=not self.by_unit)

    def train(self) -> list[Trained]:
        """The round's steps, each for all sites before the next."""
        steps = range(self.phase.steps)
        for moved, some in groupby(steps, lambda step: moving(self.model, self.phase, self.names, step)):
            with (
                self.model.training(moved) as parameters,
                per_sample_gradients(self.model.peft, parameters, self.own) as forget,
            ):
                for lane in self.lanes:
                    lane.mechanism.start({name: lane.parameters[name] for name in moved}, lane.optimizer)
                for step in some:
                    for pieces in filled([lane.batches(step, self.cut) for lane in self.lanes]):
                        self._accumulate(pieces, parameters, forget)
                    for lane in self.lanes:
                        lane.mechanism.step(step)
        return [lane.trained() for lane in self.lanes]

    def _accumulate(
        self, pieces: Sequence[Piece], parameters: Mapping[str, nn.Parameter], forget: Callable[[], None]
    ) -> None:
        """One pass; if it fails, each of its units alone, and one that fails alone contributes zero to its own site.

        As in the training of a single site, and at the same shapes.
        """
        try:
            shares = self._shares(pieces, parameters, forget)
        except ConsiliumError:  # sites cannot share a pass of this model at all
            raise
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            self._each_alone(pieces, parameters, forget)
            return
        for piece, share in shares:
            try:
                self.lanes[piece.site].mechanism.add(*share)
            except Exception:
                self._each_alone([piece], parameters, forget)

    def _shares(
        self, pieces: Sequence[Piece], parameters: Mapping[str, nn.Parameter], forget: Callable[[], None]
    ) -> list[tuple[Piece, _Share]]:
        """Each piece's part of what one pass over all of them gives."""
        shared = joined(pieces, self.model, self.cut)
        self.own.rows = shared.rows
        metrics = self.lanes[0].mechanism.metrics
        forward = Forward(self.model, shared.batch, self.cut, metrics)
        try:
            forward.losses().sum().backward()  # type: ignore[no-untyped-call]
            rows = len(shared.batch.weights) if self.by_unit else len(pieces)
            gradients = unit_gradients(parameters, rows, shared.slots if self.by_unit else None)
        finally:
            forget()
        shares = []
        for number, (piece, own) in enumerate(shared.parts()):
            part = own if self.by_unit else slice(number, number + 1)
            measured = forward.measured()[own] if metrics else None
            shares.append((piece, _share(piece, [each[part] for each in gradients], measured)))
        return shares

    def _each_alone(
        self, pieces: Sequence[Piece], parameters: Mapping[str, nn.Parameter], forget: Callable[[], None]
    ) -> None:
        units = [unit for piece in pieces for unit in piece.by_unit()]
        if len(units) == 1:
            log.warning("a privacy unit failed in training and contributes zero; 'consilium site check' may tell why")
            return
        for unit in units:
            self._accumulate([unit], parameters, forget)


_Share = tuple[list[torch.Tensor], torch.Tensor | None, Callable[[], torch.Tensor] | None]
"""Unit gradients, slots and metrics, as a mechanism adds them."""


def _share(piece: Piece, gradients: list[torch.Tensor], measured: torch.Tensor | None) -> _Share:
    slots = piece.slots()
    device = gradients[0].device
    return (
        gradients,
        None if slots is None else torch.from_numpy(slots).to(device),
        None if measured is None else lambda: measured,
    )
