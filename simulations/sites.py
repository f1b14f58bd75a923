"""The sites of a simulation, each made when it is first asked for.

A site that is never sampled is a name and the numbers of its rows. One that is sampled is an adapter, a ledger, an
audit log and a key. So what a simulation costs grows with the sites that take part, not with those that exist.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from client.privacy.ledger import Ledger
from client.site import Site

T = TypeVar("T")

OPEN_LEDGERS = 128
"""So many ledgers stay open, those that were used last, so that file handles do not grow with the sites."""


class MadeWhenAsked(Mapping[str, T]):
    """Name → value; each value is made once, when it is first asked for. Safe for several threads.

    Args:
        names: all that there are, whether made or not.
        make: name → value.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)  # a set that keeps its order
        self._make = make
        self._lock = threading.Lock()
        self.made: dict[str, T] = {}
        """Those that were asked for so far."""

    def __getitem__(self, name: str) -> T:
        if name not in self.made:
            with self._lock:
                if name not in self._names:
                    raise KeyError(name)
                if name not in self.made:
                    self.made[name] = self._make(name)
        return self.made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class OpenLedgers:
    """Closes the ledgers that were not used for longest; each opens again when it is used."""

    def __init__(self, most: int = OPEN_LEDGERS) -> None:
        self._most = most
        self._open: OrderedDict[str, Ledger] = OrderedDict()
        self._lock = threading.Lock()

    def used(self, name: str, ledger: Ledger) -> None:
        """Notes that a ledger is about to be used."""
        with self._lock:
            self._open[name] = ledger
            self._open.move_to_end(name)
            idle = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - self._most)]
        for ledger in idle:
            ledger.close()

    def close(self) -> None:
        """Closes all."""
        for ledger in self._open.values():
            ledger.close()


class SimulatedSites(Mapping[str, Site]):
    """The sites of an arm.

    Args:
        names: of all of them.
        make: name → site.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Site]) -> None:
        self._sites = MadeWhenAsked(names, make)
        self._ledgers = OpenLedgers()

    @property
    def made(self) -> Mapping[str, Site]:
        """Those that were asked for so far."""
        return self._sites.made

    def __getitem__(self, name: str) -> Site:
        site = self._sites[name]
        self._ledgers.used(name, site.ledger)
        return site

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def close(self) -> None:
        """Closes the ledgers."""
        self._ledgers.close()
