"""A stored reply, read tensor by tensor: thousands of them can be folded in the memory of a few.

The format is safetensors: eight bytes with the length of the header, the header as JSON, the tensors' raw bytes. A
tensor is a view of the file (``mmap``), so folding it copies nothing. A file is open only while one of its views is
alive: whoever holds many replies, and reads one tensor after the other, holds their names alone.
"""

from __future__ import annotations

import json
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import OutputError
from common.messages import METRIC

_LENGTH_BYTES = 8
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U16": np.dtype("<u2"), "I8": np.dtype("i1")}


class _Place(NamedTuple):
    """Where a tensor lies in the data of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class SpilledReply(Mapping[str, npt.NDArray[Any]]):
    """What :meth:`server.checkpoint.RunFolder.store_reply` has stored; arrays cannot be written to.

    Args:
        path: the file; it must stay where it is as long as the reply is read.

    Raises:
        OutputError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                self._first = _LENGTH_BYTES + length
                size = path.stat().st_size
                if self._first > size:
                    raise ValueError("cut short")
                self._places = _layout(file.read(length))
            self._end = self._first + max((place.start + _bytes(place) for place in self._places.values()), default=0)
            if self._end > size:
                raise ValueError("cut short")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None
        self._view: Callable[[], mmap.mmap | None] = lambda: None

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A view of one tensor.

        Raises:
            OutputError: the file is gone or was cut.
        """
        dtype, shape, start = self._places[name]
        if (view := self._view()) is None:
            try:
                with self.path.open("rb") as file:
                    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if self._end > len(view):
                    raise ValueError("cut short")
            except (OSError, ValueError) as error:
                raise self._damaged(error) from None
            self._view = weakref.ref(view)
        return np.frombuffer(view, dtype, prod(shape), self._first + start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; none is read."""
        return sum(_bytes(place) for place in self._places.values())

    def parted(self) -> tuple[Mapping[str, npt.NDArray[Any]], dict[str, float]]:
        """The update, still unread, and the metrics: what :func:`common.messages.joined` has joined."""
        metrics = {name.removeprefix(METRIC): self[name].item() for name in sorted(self) if name.startswith(METRIC)}
        return _Update(self), metrics

    def _damaged(self, error: Exception) -> OutputError:
        return OutputError(
            f"{self.path}: is damaged or gone ({type(error).__name__}); restore the folder from a copy, or remove its "
            "rounds folder and --resume: the sites send the same releases again, at no cost"
        )


class _Update(Mapping[str, npt.NDArray[Any]]):
    """A reply without its metrics."""

    def __init__(self, reply: SpilledReply) -> None:
        self._reply = reply

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name.startswith(METRIC):
            raise KeyError(name)
        return self._reply[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._reply if not name.startswith(METRIC))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@lru_cache(maxsize=64)  # all replies of a round have the same header
def _layout(header: bytes) -> dict[str, _Place]:
    content: dict[str, Any] = json.loads(header)
    content.pop("__metadata__", None)
    return {
        name: _Place(_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0])
        for name, entry in sorted(content.items())
    }


def _bytes(place: _Place) -> int:
    return place.dtype.itemsize * prod(place.shape)
