"""Gaussian noise that can be released: a grid, and a Gaussian rounded to it without error.

Floating-point noise on a floating-point sum tells more than its account says: which of the closely spaced numbers can
come out depends on the sum (Mironov 2012, "On significance of the least significant bits for differential privacy").
Here everything is a whole number of grid spacings g, a power of two::

    Σ_u trunc(clip_C(g_u) / g)  +  floor(N(0, σ²C²) / g + 1/2)          exact, in int64

The sum S is whole, and adding a whole number commutes with rounding: floor(S + N/g + 1/2) = S + floor(N/g + 1/2). So
this is the Gaussian mechanism of sensitivity C on contributions that happen to lie on the grid, rounded afterwards, and
the account of the real-valued mechanism holds for it without a further term. The whole argument stands in PRIVACY.md,
section "Noise".

The rounded Gaussian is Box and Muller's (1958, Annals of Mathematical Statistics 29) of two uniforms with endlessly
many bits, of which only as many are drawn as decide the integer. Float64 and an error bound decide nearly all values;
the others get more bits of the same uniforms and interval arithmetic. The method is that of correctly rounded
elementary functions (Ziv 1991, ACM Transactions on Mathematical Software 17), so the result depends on the key alone,
and not on machine, threads or version of a mathematical library.
"""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass
from hashlib import shake_256

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from mpmath.ctx_iv import MPIntervalContext
from mpmath.libmp import fhalf, mpf_add, mpf_floor, to_int

from common.errors import PrivacyError

Integers = npt.NDArray[np.int64]

GRID_BITS = 24
"""The grid is 2²⁴ to 2²⁵ times finer than the noise: as fine as fp32 shows a number of the noise's size."""

DEVIATIONS = (2.0**-60, 2.0**60)
"""Standard deviations a grid is made for; the grid and all multiples in use are then normal fp32 numbers."""

SPACINGS_PER_DEVIATION = (1.0, 2.0**32)
"""Standard deviations of the rounded Gaussian, in spacings."""

LARGEST = 2**40
"""Coordinates of one contribution are limited to this many spacings; see :meth:`Grid.rounded`."""

_ERROR = 2.0**-43
_LEAST_WORD = np.uint64(2**46)
_CHUNK = 2**16
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 2**18, 2**26


@dataclass(frozen=True)
class Grid:
    """Whole multiples of a power of two, so that scaling by it is exact in floating point.

    Attributes:
        spacing: distance g of neighbouring points.
    """

    spacing: float

    @classmethod
    def of(cls, deviation: float) -> Grid:
        """The grid for noise of this standard deviation σC: g = 2^(⌊log₂ σC⌋ - 24).

        Raises:
            PrivacyError: the deviation is outside [2⁻⁶⁰, 2⁶⁰].
        """
        least, most = DEVIATIONS
        if not least <= deviation <= most:
            raise PrivacyError(
                f"noise_multiplier x clip_norm = {deviation!r} must lie in [{least:.0e}, {most:.0e}]: "
                "choose a clip norm nearer to the size of a gradient"
            )
        return cls(math.ldexp(1.0, math.frexp(deviation)[1] - 1 - GRID_BITS))

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Each value in spacings, rounded toward zero, int64: no coordinate and so no norm ever grows.

        Scaling by a power of two and truncating are exact. What is not finite becomes 0. Beyond ±2⁴⁰ spacings a value
        is cut, also toward zero; no clipped contribution is, unless σ < 2⁻¹⁵, since C/g ≤ 2²⁵/σ. So the sum of 2²² of
        them fits int64. Should a sum ever not fit, it wraps modulo 2⁶⁴, which is post-processing like any other: it
        would ruin the model and not the guarantee, whereas an error would tell of the data.

        Args:
            values: fp32 or fp64, any shape and device.
        """
        return self._truncated(values * (1 / self.spacing))

    def summed(self, gradients: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Σ_i rounded(factors[i] · gradients[i]), int64 [numel]; exact, so the order does not matter.

        Args:
            gradients: fp32 [units, numel]; overwritten.
            factors: clip factors, fp32 [units], with room for the rounding of the product (a relative 2⁻²⁴).
        """
        units, numel = gradients.shape
        # Blocks bound what is held twice, and on a CPU fit its cache.
        block = _BLOCK_ON_CPU if gradients.device.type == "cpu" else _BLOCK_ELSEWHERE
        width = max(1, block // max(units, 1))
        sums = torch.empty(numel, dtype=torch.int64, device=gradients.device)
        for start in range(0, numel, width):
            # Two products: factor / g in one number could be subnormal, and rounded up by more than a relative 2⁻²⁴.
            scaled = gradients[:, start : start + width].mul_(factors[:, None]).mul_(1 / self.spacing)
            torch.sum(self._truncated(scaled), 0, out=sums[start : start + width])
        return sums

    @staticmethod
    def _truncated(scaled: torch.Tensor) -> torch.Tensor:
        """Overwrites its argument."""
        return scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-LARGEST, LARGEST).to(torch.int64)

    def value(self, multiples: torch.Tensor) -> torch.Tensor:
        """Whole multiples of the spacing (int64) as fp32, the nearest there is.

        fp32 has 24 bits, so large multiples lose their lowest ones here. Whatever is done to a noisy sum is
        post-processing; done to a sum without noise it would not be.
        """
        return multiples.to(torch.float32) * self.spacing


def rounded_gaussian(key: bytes, deviation: float, n: int) -> Integers:
    """``n`` independent values of floor(N(0, deviation²) + 1/2), int64 [n].

    Exact: what differs from true Gaussians is that the bits come from ChaCha20 and SHAKE-256, which nobody is known to
    tell from random ones without the key. The first m values are the same for every n ≥ m.

    Args:
        key: 32 secret bytes, used for this call alone.
        deviation: standard deviation in grid spacings, in [1, 2³²].

    Raises:
        PrivacyError: the deviation is outside its range.
    """
    least, most = SPACINGS_PER_DEVIATION
    if not least <= deviation <= most:
        raise PrivacyError(f"deviation = {deviation!r} grid spacings must lie in [{least:g}, {most:g}]: use Grid.of")
    # One key, one purpose. The nonce is constant since the key is fresh.
    stream = Cipher(algorithms.ChaCha20(hmac.digest(key, b"first bits", "sha256"), bytes(16)), None).encryptor()
    further = hmac.digest(key, b"further bits", "sha256")
    values = np.empty(n + n % 2, np.int64)
    for start in range(0, len(values), 2 * _CHUNK):
        chunk = values[start : start + 2 * _CHUNK].reshape(-1, 2)
        words = np.frombuffer(stream.update(bytes(8 * chunk.size)), "<u8").reshape(-1, 2)
        nearest, undecided = _first_attempt(words, deviation)
        chunk[:] = nearest
        for pair, which in np.argwhere(undecided).tolist():
            chunk[pair, which] = _decided(words[pair], further, start // 2 + pair, which, deviation)
    return values[:n]


def estimate(
    words: npt.NDArray[np.uint64], deviation: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Box and Muller in float64 from the first 64 bits of each uniform, with a bound on its error.

    With U, V ∈ [w, w + 1)·2⁻⁶⁴, R = √(-2 ln U) and x = deviation · R · (cos 2πV, sin 2πV), and with 64 units in the
    last place (2⁻⁴⁶ of the result at most) granted to each library function, of which all in use promise 4 or better:

    - relative error of U: 2⁻⁴⁶ for the unseen bits, as w ≥ 2⁴⁶, and 2⁻⁵³ for rounding w. This moves ln U by 2⁻⁴⁵·⁹,
      and R by 2 · 2⁻⁴⁵·⁹ / R at most, since |√a - √b| = |a - b| / (√a + √b);
    - the logarithm: 2⁻⁴⁶ · R²/2, which moves R by 2⁻⁴⁶ R; the square root: 2⁻⁴⁶ R;
    - 2πV: 2π (2⁻⁶⁴ + 2⁻⁵³ + 2⁻⁵²) < 2⁻⁴⁸·⁷; cosine or sine: 2⁻⁴⁶;
    - products, and the sums x ± bound + 1/2 that follow: a few times 2⁻⁵³, of x or of 1/2.

    Together deviation · (2⁻⁴⁴·⁹/R + 2⁻⁴⁴·³ R), and the bound is deviation · 2⁻⁴³ (1/R + R): the rest covers that the
    computed R stands for R, second-order terms, and the sum's 1/2, as 1/R + R ≥ 2 and deviation ≥ 1.

    Args:
        words: [pairs, 2], w of U and of V.

    Returns:
        x and its bound, each [pairs, 2]; the bound is infinite where w < 2⁴⁶ in U.
    """
    uniform = torch.from_numpy(words.astype(np.float64) * 2.0**-64)
    radius = uniform[:, 0].log().abs_().mul_(2.0).sqrt_()
    angle = uniform[:, 1] * (2.0 * math.pi)
    values = torch.stack([angle.cos(), angle.sin()], 1).mul_((radius * deviation)[:, None])
    bound = (radius + 1 / radius) * (deviation * _ERROR)
    bound[torch.from_numpy(words[:, 0] < _LEAST_WORD)] = math.inf
    return values.numpy(), bound[:, None].expand(-1, 2).numpy()


def _first_attempt(words: npt.NDArray[np.uint64], deviation: float) -> tuple[Integers, npt.NDArray[np.bool_]]:
    values, bound = estimate(words, deviation)
    with np.errstate(invalid="ignore"):  # an infinite bound, which decides nothing
        low, high = np.floor(values - bound + 0.5), np.floor(values + bound + 0.5)
        return low.astype(np.int64), low != high


def _decided(words: npt.NDArray[np.uint64], further: bytes, pair: int, which: int, deviation: float) -> int:
    """The value of one coordinate, from as many more bits of its pair's uniforms as it takes.

    After the first 256 further bits fewer than one value in 2¹⁰⁰ is left; each doubling makes that rarer, so the loop
    ends with probability one, and no error remains that would have to enter delta.
    """
    interval = MPIntervalContext()
    bits = 256
    while True:
        interval.prec = bits + 128
        uniforms = []
        for name, word in zip((b"U", b"V"), words.tolist(), strict=True):
            # SHAKE-256 of more bytes begins with the fewer: the uniform stays the same and gains bits at its end.
            more = shake_256(further + name + pair.to_bytes(8, "big")).digest(bits // 8)
            low = (word << bits) + int.from_bytes(more, "big")
            uniforms.append(interval.mpf([low, low + 1]) / interval.mpf(2) ** (bits + 64))
        if uniforms[0].a > 0:
            radius = interval.sqrt(-2 * interval.log(uniforms[0]))
            angle = 2 * interval.pi * uniforms[1]
            value = interval.mpf(deviation) * radius * (interval.sin(angle) if which else interval.cos(angle))
            ends = [to_int(mpf_floor(mpf_add(end, fhalf))) for end in value._mpi_]
            if ends[0] == ends[1]:
                return int(ends[0])
        bits *= 2


def fast_gaussian(key: bytes, deviation: float, n: int) -> torch.Tensor:
    """``n`` values of N(0, deviation²) in fp32 from torch's generator: for simulations, never for a release.

    The generator keeps 32 bits of its seed, so the noise of a release could be found by trying them all, and the values
    are floating point.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "big"))
    return torch.randn(n, generator=generator, dtype=torch.float32).mul_(deviation)
