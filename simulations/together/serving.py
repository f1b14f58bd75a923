"""Training requests to several simulated sites, answered together.

Each site checks, reserves, releases and records for itself, in that order, as when it is asked alone; only the training
in between is shared. Whatever goes wrong at one site is that site's answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

from client.site import Site, Work
from common.messages import SiteService, TrainReply, TrainRequest
from simulations.together.training import Trained, train_together

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


def train_sites(asked: Sequence[tuple[SiteService, TrainRequest]]) -> list[TrainReply | Exception]:
    """The reply of each site, or what it raised. No site may be asked twice."""
    replies: dict[int, TrainReply | Exception] = {}
    begun: dict[int, tuple[Site, Work]] = {}
    with ExitStack() as answering:
        for number, (site, request) in enumerate(asked):
            if not isinstance(site, Site):
                replies[number] = _attempt(site.train, request)
                continue
            answering.enter_context(site.answering())
            work = _attempt(site.begin, request)
            if isinstance(work, Work):
                begun[number] = site, work
            else:
                replies[number] = work
        for group in _groups(begun):
            for number, trained in _trained(group).items():
                site, work = group[number]
                finished = trained if isinstance(trained, Exception) else _attempt(site.finish, work, *trained)
                replies[number] = finished
    return [replies[number] for number in range(len(asked))]


def _attempt(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | Exception:
    try:
        return call(*arguments, **named)
    except Exception as error:
        return error


def _groups(begun: dict[int, tuple[Site, Work]]) -> list[dict[int, tuple[Site, Work]]]:
    """Sites that train the same request, of the same model, in physical batches of the same rows.

    One request is one plan, round and received adapter, so also one rank.
    """
    groups: dict[tuple[int, str, int], dict[int, tuple[Site, Work]]] = {}
    for number, (site, work) in begun.items():
        groups.setdefault((id(work.model), work.digest, work.rows), {})[number] = site, work
    return list(groups.values())


def _trained(group: dict[int, tuple[Site, Work]]) -> dict[int, Trained | Exception]:
    """Together, and one after the other where that cannot be: the secrets are the same, and so are the updates."""
    if len(group) > 1 and _can_share(next(iter(group.values()))[1]):
        try:
            return dict(zip(group, train_together([work for _, work in group.values()]), strict=True))
        except Exception as error:
            log.warning("%d sites train one after the other: %s", len(group), error)
    return {number: _attempt(site.trained, work) for number, (site, work) in group.items()}


def _can_share(work: Work) -> bool:
    """Dropout draws for the rows of a pass at once, which would not be what each site draws for its own."""
    return work.model.lora.dropout == 0
