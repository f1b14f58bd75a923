"""How numbers are written for the journey: fp32, bf16, or int8 with one scale a row. Numpy only, no torch.

========  =============================================  ===========================================================
format    what stands under a tensor's name              rounding
========  =============================================  ===========================================================
``fp32``  the tensor                                     none
``bf16``  uint16: the upper half of each fp32            to the nearest, ties to even: off by at most 2⁻⁹ of a number
``int8``  integers in ±127, and their fp32 scales under  to the nearest, or at random without bias: off by less than
          ``scale/NAME``                                 one scale; scale = largest magnitude of the row / 127
========  =============================================  ===========================================================

A row runs along the tensor's longest axis, so that a B [384, 8] has 8 scales and not 384. Decoding is one product in
fp32, hence the same bits on every machine. The size of what is encoded is a function of names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterSpec
from common.errors import WireError
from common.messages import Tensors, WireTensors

NumberFormat = Literal["fp32", "bf16", "int8"]
Draw = Callable[[str, int], npt.NDArray[np.float64]]
"""(tensor's name, n) → n numbers in [0, 1), uniform and independent."""

SCALE = "scale/"
"""Marks the scales of a tensor; no tensor's name starts with it."""
LEVELS = 127
LARGEST = 1e30
"""Largest magnitude of a number that is encoded, and of a scale that is decoded: far from where fp32 overflows."""

_STORED: Mapping[NumberFormat, npt.DTypeLike] = {"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}
_UPPER_HALF = np.uint32(16)


def names_of(encoded: WireTensors) -> tuple[str, ...]:
    """Names of the encoded tensors, sorted."""
    return tuple(sorted(name for name in encoded if not name.startswith(SCALE)))


def part_of(encoded: WireTensors, names: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """Some of the encoded tensors."""
    return {name: array for name, array in encoded.items() if name.removeprefix(SCALE) in names}


def encode(tensors: Tensors, form: NumberFormat, draw: Draw | None = None) -> dict[str, npt.NDArray[Any]]:
    """The tensors as they travel.

    Args:
        draw: rounds ``int8`` at random: x/scale to one of its two neighbours, up with the probability that makes the
            mean exact (Alistarh et al. 2017, arXiv 1610.02132, §3.1). ``None``: to the nearest.

    Raises:
        WireError: a number is not finite or beyond ``LARGEST``, and the format is not fp32.
    """
    encoded: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], np.float32).reshape(np.shape(tensors[name]))
        if form == "fp32":
            encoded[name] = array
            continue
        if not np.max(np.abs(array), initial=0.0) <= LARGEST:  # NaN too
            raise WireError(
                f"wire: '{name}' holds numbers that are not finite or beyond {LARGEST:g}, which {form} cannot say; "
                "lower the learning rate"
            )
        if form == "bf16":
            encoded[name] = _to_bf16(array)
        else:
            uniform = None if draw is None else draw(name, array.size).reshape(array.shape)
            encoded[name], encoded[SCALE + name] = _to_int8(array, uniform)
    return encoded


def decode(encoded: WireTensors, spec: AdapterSpec, form: NumberFormat) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of ``spec`` as fp32.

    Raises:
        WireError: other tensors, shapes or types than the format's, or a scale that is none.
    """
    expected = layout(spec, form)
    if encoded.keys() != expected.keys():
        first = min(encoded.keys() ^ expected.keys())
        raise WireError(f"wire: '{first}' is missing, or is not part of the {form} layout")
    for name, (stored, shape) in expected.items():
        array = encoded[name]
        if array.dtype != stored or tuple(array.shape) != shape:
            raise WireError(f"wire: '{name}' is {array.dtype}{list(array.shape)}, expected {stored}{list(shape)}")
        if name.startswith(SCALE) and not bool(np.all((array >= 0) & (array <= LARGEST))):  # NaN too
            raise WireError(f"wire: '{name}' holds a scale that is negative, not finite or beyond {LARGEST:g}")
    if form == "fp32":
        return {name: encoded[name] for name in spec.names}
    if form == "bf16":
        return {name: (encoded[name].astype(np.uint32) << _UPPER_HALF).view(np.float32) for name in spec.names}
    return {name: _from_int8(encoded[name], encoded[SCALE + name]) for name in spec.names}


def layout(spec: AdapterSpec, form: NumberFormat) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name → type and shape of exactly the arrays in which a spec's tensors travel."""
    expected = {name: (np.dtype(_STORED[form]), shape) for name, shape in spec.shapes}
    if form == "int8":
        scales = {SCALE + name: (np.dtype(np.float32), (_rows(shape),)) for name, shape in spec.shapes}
        expected.update(scales)
    return expected


def _to_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Nearest, ties to even. No carry reaches the exponent of infinity: |x| ≤ ``LARGEST``."""
    bits = array.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> _UPPER_HALF) & np.uint32(1))
    return ((bits + half) >> _UPPER_HALF).astype(np.uint16)


def _to_int8(
    array: npt.NDArray[np.float32], uniform: npt.NDArray[np.float64] | None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    axis = _longest(array.shape)
    scales = np.abs(array).max(axis=axis, keepdims=True, initial=0.0) / np.float32(LEVELS)
    # fp64, so that a ratio is off by far less than what is rounded; a row of zeros has scale 0 and ratio 0
    ratios = np.divide(array, scales, out=np.zeros(array.shape), where=scales > 0, dtype=np.float64)
    rounded = np.rint(ratios) if uniform is None else np.floor(ratios + uniform)
    return np.clip(rounded, -LEVELS, LEVELS).astype(np.int8), np.asarray(scales, np.float32).reshape(-1)


def _from_int8(integers: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shape = list(integers.shape)
    if shape:
        shape[_longest(integers.shape) or 0] = 1
    return np.asarray(integers.astype(np.float32) * scales.reshape(shape), np.float32)


def _longest(shape: tuple[int, ...]) -> int | None:
    """The axis along which a row runs: the longest, and of equal ones the last. ``None``: a single number."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], axis)) if shape else None


def _rows(shape: tuple[int, ...]) -> int:
    count = 1
    axis = _longest(shape)
    for each, size in enumerate(shape):
        count *= 1 if each == axis else size
    return count
