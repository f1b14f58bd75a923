"""Where the power goes off between a request and its reply, and what makes it do so there.

Each place raises :class:`PowerCut` once it is reached, and everything before it really happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import client.egress
import client.privacy.rounds
from client.privacy.counter import Counter
from client.privacy.ledger import Ledger
from client.privacy.sampling import RoundSecret
from client.privacy.secret_files import SecretFiles

CRASHES = (
    "in the entropy",
    "after the secret, before the charge",
    "after the charge, before it is counted",
    "after the charge, before training",
    "after training, before the gate",
    "before the record",
    "in the record, before its commit",
    "after the record, before it is counted",
    "after the record, before the secret is deleted",
)


class PowerCut(Exception):
    """The process is gone: nothing after this line was executed."""


def cut_power(where: str | None, patch: pytest.MonkeyPatch) -> None:
    """Makes that place raise; "before training" is the training's own business."""
    places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "in the entropy": (RoundSecret, "from_system", _power_cut),
        "after the secret, before the charge": (SecretFiles, "write", _then_cut(SecretFiles.write)),
        "after the charge, before it is counted": (Counter, "advance", _power_cut),
        "after training, before the gate": (client.egress, "release", _power_cut),
        "before the record": (Ledger, "record", _power_cut),
        "in the record, before its commit": (Ledger, "record", _cut_inside(client.privacy.rounds, "count")),
        "after the record, before it is counted": (Ledger, "record", _cut_inside(Counter, "advance")),
        "after the record, before the secret is deleted": (SecretFiles, "delete", _power_cut),
    }
    if where in places:
        patch.setattr(*places[where])


def _power_cut(*_: object, **__: object) -> Any:
    raise PowerCut


def _then_cut(real: Callable[..., object]) -> Callable[..., Any]:
    def cut(*given: object) -> Any:
        real(*given)
        raise PowerCut

    return cut


def _cut_inside(owner: Any, name: str) -> Callable[..., Any]:
    """A record of a release that reaches ``owner.name``, and no further."""
    record = Ledger.record

    def cut(*given: object) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, _power_cut)
            record(*given)  # type: ignore[arg-type]

    return cut
