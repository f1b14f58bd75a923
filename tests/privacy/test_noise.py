"""The grid and the Gaussian rounded to it: exact, independent, and telling nothing by their lowest bits."""

from __future__ import annotations

import hashlib
import hmac
import math
from fractions import Fraction

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from client.privacy.clipping import clip_factors
from client.privacy.sampling import RoundSecret
from common.errors import PrivacyError
from common.privacy import noise
from common.privacy.noise import Grid, estimate, fast_gaussian, rounded_gaussian

KEY = hashlib.sha256(b"test").digest()
CERTAIN = 1e-4
"""Significance of every test below; keys are fixed, so each passes always or never."""

DEVIATIONS = [1.5, 1.4 * 2**24, 2.0**32]
MANY = 400_000


@pytest.fixture(scope="module")
def many() -> npt.NDArray[np.int64]:
    """Values of the finest noise in use: the grid of deviation 1.4 · 2ᵏ."""
    return rounded_gaussian(KEY, 1.4 * 2**24, MANY)


def secret(round: int = 1) -> RoundSecret:
    return RoundSecret.fixed(7, "north", round)


def cells(deviation: float, reach: int) -> npt.NDArray[np.float64]:
    """P(k) for |k| < reach, and what lies beyond in the outer two."""
    edges = np.arange(-reach, reach) + 0.5
    return np.diff(np.concatenate([[0.0], stats.norm.cdf(edges, scale=deviation), [1.0]]))


# ----------------------------------------------------------------------------------------------------------- reference


REFERENCE_BITS = 64 + 256


def uniforms(key: bytes, pairs: int) -> list[tuple[int, int]]:
    """The first 320 bits of both uniforms of each pair, by the published description of the streams."""
    first = hmac.digest(key, b"first bits", "sha256")
    words = Cipher(algorithms.ChaCha20(first, bytes(16)), None).encryptor().update(bytes(16 * pairs))
    return [
        (
            with_further_bits(key, int.from_bytes(words[16 * pair : 16 * pair + 8], "little"), b"U", pair),
            with_further_bits(key, int.from_bytes(words[16 * pair + 8 : 16 * pair + 16], "little"), b"V", pair),
        )
        for pair in range(pairs)
    ]


def with_further_bits(key: bytes, word: int, name: bytes, pair: int) -> int:
    seed = hmac.digest(key, b"further bits", "sha256") + name + pair.to_bytes(8, "big")
    return (word << 256) + int.from_bytes(hashlib.shake_256(seed).digest(32), "big")


def exact_pair(u: int, v: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Box and Muller at 400 bits of two uniforms of 320 bits."""
    with mpmath.workprec(400):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(2 * u + 1, -REFERENCE_BITS - 1)))
        turns = mpmath.ldexp(2 * v + 1, -REFERENCE_BITS)
        return radius * mpmath.cospi(turns), radius * mpmath.sinpi(turns)


def exact_normals(key: bytes, n: int) -> list[mpmath.mpf]:
    return [value for u, v in uniforms(key, (n + 1) // 2) for value in exact_pair(u, v)][:n]


def nearest(value: mpmath.mpf, scale: float, offset: int = 0) -> int:
    with mpmath.workprec(400):
        return int(mpmath.floor(mpmath.mpf(scale) * value + offset + mpmath.mpf(0.5)))


# ----------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_every_value_is_the_correct_rounding_of_a_gaussian_computed_to_400_bits(deviation: float) -> None:
    expected = [nearest(value, deviation) for value in exact_normals(KEY, 3001)]
    assert rounded_gaussian(KEY, deviation, 3001).tolist() == expected


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_values_decided_by_interval_arithmetic_alone_are_the_same(
    deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = rounded_gaussian(KEY, deviation, 600)
    monkeypatch.setattr(noise, "_ERROR", 1e6)
    monkeypatch.setattr(noise, "_CHUNK", 64)
    assert np.array_equal(rounded_gaussian(KEY, deviation, 600), quick)


def test_a_less_exact_mathematical_library_gives_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of nearly half the bound, of either sign: hundreds of units in the last place."""
    rng = np.random.default_rng(0)

    def coarse(
        words: npt.NDArray[np.uint64], deviation: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        values, bound = estimate(words, deviation)
        error = np.where(np.isfinite(bound), bound, 0.0) * rng.choice([-0.45, 0.45], values.shape)
        changed.append(int((values + error != values).sum()))
        return values + error, bound

    changed: list[int] = []
    expected = rounded_gaussian(KEY, 2.0**32, 20_000)
    monkeypatch.setattr(noise, "estimate", coarse)
    assert np.array_equal(rounded_gaussian(KEY, 2.0**32, 20_000), expected)
    assert sum(changed) > 19_000


def test_the_error_bound_of_the_first_attempt_holds_with_room_to_spare() -> None:
    """Also at the ends of U, where its unseen bits matter most, and where cosine or sine nearly vanishes."""
    rng = np.random.default_rng(1)
    edges = [2**46, 2**46 + 1, 2**50 + 7, 2**63, 2**64 - 2**12 - 1, 2**64 - 2**20, 2**64 - 2**40 + 3]
    turns = [0, 1, 2**62 - 1, 2**62, 2**62 + 1, 2**63, 3 * 2**62 - 1, 2**64 - 1, 2**64 - 2**11]
    words = np.array([[u, v] for u in edges for v in turns], np.uint64)
    words = np.concatenate([words, rng.integers(2**46, 2**64, (1500, 2), np.uint64, endpoint=False)])
    values, bound = estimate(words, 2.0**24)
    largest = 0.0
    for unseen in (0, 2**256 - 1):
        for (u, v), found, allowed in zip(words.tolist(), values, bound, strict=True):
            exact = exact_pair((u << 256) + unseen, (v << 256) + unseen)
            for one, true, most in zip(found, exact, allowed, strict=True):
                largest = max(largest, abs(mpmath.mpf(one) - 2**24 * true) / most)
    assert 0.001 < largest < 1 / 32


@pytest.mark.parametrize("word", [0, 1, 2**46 - 1, 2**64 - 1, 2**64 - 2**10], ids=hex)
def test_uniforms_at_their_ends_give_exact_values_too(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, *_: object) -> None: ...

        def encryptor(self) -> Stream:
            return self

        def update(self, zeros: bytes) -> bytes:
            return np.array([word, 2**61], "<u8").tobytes() * (len(zeros) // 16)

    monkeypatch.setattr(noise, "Cipher", Stream)
    monkeypatch.setattr(noise, "_CHUNK", 1)
    found = rounded_gaussian(KEY, 1e7, 4).tolist()
    expected = []
    for pair in range(2):
        ends = with_further_bits(KEY, word, b"U", pair), with_further_bits(KEY, 2**61, b"V", pair)
        expected += [nearest(value, 1e7) for value in exact_pair(*ends)]
    assert found == expected
    if word == 0:
        assert math.hypot(found[0], found[1]) > 9.4e7, "the tails do not end where 64 bits do"


def test_a_value_that_lies_next_to_a_half_is_decided_by_further_bits() -> None:
    """Deviations that put one value within a rounding error of float64 of k + 1/2: half of them fall on each side."""
    normals = exact_normals(KEY, 60)
    below = naive = 0
    for index, value in enumerate(normals):
        target = math.floor(1.3 * 2**24 * float(value)) + 0.5
        deviation = float(target / value)
        if not 1 <= deviation <= 2**32:
            continue
        expected = nearest(value, deviation)
        assert rounded_gaussian(KEY, deviation, index + 1)[index] == expected
        below += expected < target
        naive += math.floor(deviation * float(value) + 0.5) != expected
    assert 10 < below < 50
    assert naive > 5, "float64 alone would have been wrong"


class Further:
    """Stands for SHAKE-256: what it returns for U and for V, by length in bytes."""

    def __init__(self, **bits: bytes) -> None:
        self.bits, self.asked = bits, list[int]()

    def __call__(self, seed: bytes) -> Further:
        self.name = seed[32:33].decode()
        return self

    def digest(self, length: int) -> bytes:
        self.asked.append(length)
        return self.bits[self.name][:length]


@pytest.mark.parametrize(("next_bits", "expected"), [(b"\x00", 1), (b"\xff", 0)], ids=["just above", "just below"])
def test_bits_are_drawn_until_the_value_is_decided(
    next_bits: bytes, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U = exp(-1/8) to 320 bits has a radius of 1/2, the border between 0 and 1: only the bits after them tell."""
    with mpmath.workprec(400):
        u = int(mpmath.floor(mpmath.ldexp(mpmath.exp(mpmath.mpf(-1) / 8), 320))).to_bytes(40, "big")
    further = Further(U=u[8:] + 32 * next_bits, V=bytes(64))
    monkeypatch.setattr(noise, "shake_256", further)
    words = np.array([int.from_bytes(u[:8], "big"), 0], "<u8")
    assert noise._decided(words, bytes(32), 0, 0, 1.0) == expected
    assert further.asked == [32, 32, 64, 64]


def test_a_uniform_of_zeros_draws_bits_until_it_is_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    further = Further(U=bytes(32) + 32 * b"\x40", V=bytes(64))
    monkeypatch.setattr(noise, "shake_256", further)
    value = noise._decided(np.array([0, 0], "<u8"), bytes(32), 0, 0, 100.0)
    assert value == round(100 * math.sqrt(-2 * (math.log(0x40 / 255) - 320 * math.log(2))))
    assert further.asked == [32, 32, 64, 64]


# ------------------------------------------------------------------------------------------------------------ keys


def test_the_key_decides_all_values_and_their_number_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounded_gaussian(KEY, 1e7, 1001)
    assert whole.dtype == np.int64 and whole.flags.c_contiguous and whole.flags.writeable
    for n in (0, 1, 2, 3, 128, 129, 1000, 1001):
        assert np.array_equal(rounded_gaussian(KEY, 1e7, n), whole[:n])
    monkeypatch.setattr(noise, "_CHUNK", 64)
    for n in (1, 127, 128, 129, 130, 1001):
        assert np.array_equal(rounded_gaussian(KEY, 1e7, n), whole[:n])


def test_every_bit_of_the_key_changes_all_values() -> None:
    whole = rounded_gaussian(KEY, 1e7, 2000)
    for bit in range(256):
        other = bytearray(KEY)
        other[bit // 8] ^= 1 << bit % 8
        changed = rounded_gaussian(bytes(other), 1e7, 2000)
        assert not (changed == whole).any()
        assert abs(np.corrcoef(whole, changed)[0, 1]) < 5 / math.sqrt(2000)


def test_after_a_restart_no_noise_is_repeated() -> None:
    """Secrets of the operating system: as if the process had started anew each time."""
    drawn = [rounded_gaussian(RoundSecret.from_system().derive("noise", 0), 1e7, 50) for _ in range(20)]
    assert len({tuple(values.tolist()) for values in drawn}) == 20


@pytest.mark.parametrize("deviation", [0.0, 0.999, 2.0**32 + 1, -5.0, math.inf, math.nan])
def test_a_deviation_outside_the_range_of_the_error_bound_is_refused(deviation: float) -> None:
    with pytest.raises(PrivacyError, match=r"grid spacings must lie in \[1, 4\.29497e\+09\]"):
        rounded_gaussian(KEY, deviation, 3)


# -------------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("deviation", [1.0, 1.5, 4.3])
def test_on_a_coarse_grid_every_integer_has_the_probability_of_its_cell(deviation: float) -> None:
    values = rounded_gaussian(KEY, deviation, MANY)
    reach = int(4 * deviation)
    observed = np.bincount(np.clip(values, -reach, reach) + reach, minlength=2 * reach + 1)
    expected = MANY * cells(deviation, reach)
    assert expected.min() > 5
    assert CERTAIN < stats.chisquare(observed, expected).pvalue < 1 - CERTAIN


def test_on_a_fine_grid_values_are_normal_far_into_the_tails(many: npt.NDArray[np.int64]) -> None:
    scaled = many / (1.4 * 2**24)
    assert stats.kstest(scaled, "norm").pvalue > CERTAIN
    for beyond in (2.0, 3.0, 4.0):
        low, high = stats.binom.ppf([CERTAIN, 1 - CERTAIN], MANY, stats.norm.sf(beyond))
        assert low <= (scaled > beyond).sum() <= high
        assert low <= (scaled < -beyond).sum() <= high


def test_the_first_four_moments_are_those_of_the_rounded_gaussian() -> None:
    """Tolerances: four standard errors, from the moments of twice the order; exact ones by summing over all cells."""
    for deviation in (1.5, 1.4 * 2**24):
        values = rounded_gaussian(KEY, deviation, MANY) / deviation
        if deviation < 2:
            points, weights = np.arange(-30, 31) / deviation, cells(deviation, 30)
            moments = [float((weights * points**power).sum()) for power in range(9)]
        else:
            moments = [1, 0, 1, 0, 3, 0, 15, 0, 105]
        for power in (1, 2, 3, 4):
            error = math.sqrt((moments[2 * power] - moments[power] ** 2) / MANY)
            assert abs((values**power).mean() - moments[power]) < 4 * error


def test_the_lowest_bits_are_uniform_and_independent_of_the_size(many: npt.NDArray[np.int64]) -> None:
    for group in (many, many[np.abs(many) > 2**25], many[np.abs(many) < 2**20]):
        assert stats.chisquare(np.bincount(group & 31, minlength=32)).pvalue > CERTAIN


# -------------------------------------------------------------------------------------------------------- independence


def correlations_vanish(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> bool:
    """Of the values, of their squares, and of one with the other's square."""
    a, b = (each / each.std() for each in (first, second))
    pairs = [(a, b), (a**2 - 1, b**2 - 1), (a, b**2 - 1), (a**2 - 1, b)]
    return all(abs(x @ y) / math.sqrt((x @ x) * (y @ y)) < 4.5 / math.sqrt(len(a)) for x, y in pairs)


def test_coordinates_are_independent_of_each_other(many: npt.NDArray[np.int64]) -> None:
    assert correlations_vanish(many[::2], many[1::2]), "the two values of a pair"
    for lag in (1, 2, 3, 4, 8, 64, 2 * noise._CHUNK, MANY // 2):
        assert correlations_vanish(many[:-lag], many[lag:])


def test_the_two_values_of_a_pair_are_independent_as_a_table_of_quadrants_and_sizes(
    many: npt.NDArray[np.int64],
) -> None:
    edges = stats.norm.ppf(np.arange(1, 8) / 8) * 1.4 * 2**24
    table = np.zeros((8, 8))
    np.add.at(table, (np.searchsorted(edges, many[::2]), np.searchsorted(edges, many[1::2])), 1)
    assert stats.chisquare(table.ravel()).pvalue > CERTAIN


def test_steps_rounds_and_labels_have_independent_noise() -> None:
    streams = [
        rounded_gaussian(secret(round).derive(label, step), 1e7, 4000)
        for round in (1, 2)
        for label in ("noise", "sample")
        for step in (0, 1, 2)
    ]
    assert all(
        correlations_vanish(a, b) and not (a == b).any() for i, a in enumerate(streams) for b in streams[i + 1 :]
    )


# ---------------------------------------------------------------------------------------------------------------- grid


def test_the_spacing_is_a_power_of_two_and_2_to_the_24_to_25_times_finer_than_the_noise() -> None:
    rng = np.random.default_rng(2)
    for deviation in [*np.exp2(rng.uniform(-59, 59, 500)), 1.0, 2.0**-60, 2.0**60, 0.5, 1.5, float(np.nextafter(1, 0))]:
        spacing = Grid.of(float(deviation)).spacing
        assert math.frexp(spacing)[0] == 0.5
        assert 2**24 <= Fraction(float(deviation)) / Fraction(spacing) < 2**25


@pytest.mark.parametrize("deviation", [0.0, -1.0, 1e-19, 2e18, math.inf, math.nan])
def test_a_deviation_without_a_grid_is_refused(deviation: float) -> None:
    with pytest.raises(PrivacyError, match="choose a clip norm"):
        Grid.of(deviation)


ADVERSARIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1e30, 0.1, -0.1, 1.0, 1 - 2.0**-24, 1 + 2.0**-23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviation", [2.0**-60, 3e-7, 1.0, 777.0, 2.0**60])
def test_rounding_goes_toward_zero_by_less_than_a_spacing_and_never_away(deviation: float, dtype: torch.dtype) -> None:
    grid = Grid.of(deviation)
    rng = np.random.default_rng(3)
    multiples = rng.integers(-(2**23), 2**23, 200)
    near = [m * grid.spacing * (1 + e) for m in multiples.tolist() for e in (0, 2.0**-23, -(2.0**-24))]
    wide = (rng.standard_normal(300) * np.exp2(rng.uniform(-140, 120, 300))).tolist()
    values = torch.tensor([*ADVERSARIAL, *near, *wide, *(deviation * rng.standard_normal(300))], dtype=dtype)
    before = values.clone()
    rounded = grid.rounded(values)
    assert rounded.dtype == torch.int64 and torch.equal(values, before), "the argument is left as it was"
    for value, multiple in zip(values.tolist(), rounded.tolist(), strict=True):
        exact, released = Fraction(value), multiple * Fraction(grid.spacing)
        assert abs(released) <= abs(exact) and released * exact >= 0
        assert abs(exact) - abs(released) < Fraction(grid.spacing) or abs(multiple) in (0, noise.LARGEST)
    inside = [m for m, v in zip(rounded.tolist(), values.tolist(), strict=True) if abs(v) < 2**39 * grid.spacing]
    assert noise.LARGEST not in map(abs, inside)


def test_what_is_not_finite_becomes_zero() -> None:
    assert Grid.of(1.0).rounded(torch.tensor([math.nan, math.inf, -math.inf, 1.0])).tolist() == [0, 0, 0, 2**24]


def test_the_norm_of_a_clipped_contribution_on_the_grid_is_at_most_the_clip_norm() -> None:
    """In exact arithmetic, with the product's rounding in fp32, for norms just at C and far from it."""
    rng = np.random.default_rng(4)
    for clip_norm in (1.0, 0.7, 1e-6, 1e6):
        for sigma in (0.3, 1.0, 50.0):
            grid = Grid.of(sigma * clip_norm)
            raw = rng.standard_normal((30, 64)) * np.exp2(rng.uniform(-20, 20, (30, 1)))
            raw[::3] *= clip_norm / np.linalg.norm(raw[::3], axis=1, keepdims=True)
            raw[1::3, 1:] = 0.0
            gradients = [torch.tensor(raw[:, :40], dtype=torch.float32), torch.tensor(raw[:, 40:], dtype=torch.float32)]
            factors = clip_factors(gradients, clip_norm)
            for unit in range(30):
                ks = [grid.summed(g[unit : unit + 1].clone(), factors[unit : unit + 1]) for g in gradients]
                square = sum(k**2 for k in torch.cat(ks).tolist()) * Fraction(grid.spacing) ** 2
                assert square <= Fraction(clip_norm) ** 2


@pytest.mark.parametrize("block", [1, 50, 2**18])
def test_the_sum_is_exact_in_any_order_and_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_BLOCK_ON_CPU", block)
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(7, 33, generator=generator) * 10
    gradients[2, 5] = math.nan
    factors = torch.rand(7, generator=generator)
    grid = Grid.of(0.37)
    products = (gradients * factors[:, None]).nan_to_num(nan=0.0).tolist()
    expected = [
        sum(int(Fraction(v) / Fraction(grid.spacing)) for v in column) for column in zip(*products, strict=True)
    ]
    assert grid.summed(gradients.clone(), factors).tolist() == expected
    order = torch.randperm(7, generator=generator)
    assert grid.summed(gradients[order], factors[order]).tolist() == expected


def test_a_factor_too_small_for_fp32_in_spacings_is_not_rounded_up() -> None:
    """g = 2³⁶ and factors near 2⁻⁹²: in spacings they would be subnormal, and round k to the next one now and then."""
    grid = Grid.of(2.0**60)
    rng = np.random.default_rng(9)
    for c in np.float32(rng.uniform(1.01, 1.99, 200)):
        factor = torch.tensor([float(c) * 2.0**-92])
        gradient = torch.tensor([[2.0**127 / float(c) * 2], [2.0**127 / float(c)]], dtype=torch.float64).float()
        for one in gradient:
            assert grid.summed(one[None].clone(), factor).tolist() == grid.rounded(one * factor).tolist()


def test_a_sum_of_nobody_is_zero() -> None:
    assert Grid.of(1.0).summed(torch.empty(0, 5), torch.empty(0)).tolist() == [0] * 5


def test_one_unit_more_moves_the_sum_by_exactly_its_own_multiples() -> None:
    """In floating point it does not: there the sum's rounding depends on the others."""
    generator = torch.Generator().manual_seed(6)
    gradients, factors, grid = torch.randn(50, 400, generator=generator), torch.full((50,), 0.03), Grid.of(1.0)
    whole, without = grid.summed(gradients.clone(), factors), grid.summed(gradients[:-1].clone(), factors[:-1])
    assert torch.equal(whole - without, grid.rounded(gradients[-1] * factors[-1]))
    in_floats = (factors @ gradients) - (factors[:-1] @ gradients[:-1])
    assert not torch.equal(in_floats, gradients[-1] * factors[-1])


def test_an_overflowing_sum_wraps_and_stays_a_function_of_the_true_one() -> None:
    most = 2**63 - 1
    wrapped = torch.tensor([most, -most - 1]) + torch.tensor([5, -7])
    assert wrapped.tolist() == [most + 5 - 2**64, -most - 1 - 7 + 2**64]


def test_multiples_leave_as_the_nearest_fp32() -> None:
    grid = Grid.of(0.01)
    multiples = rounded_gaussian(KEY, 0.01 / grid.spacing, 2000)
    values = grid.value(torch.from_numpy(multiples))
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy(), (multiples.astype(np.float64) * grid.spacing).astype(np.float32))


# ----------------------------------------------------------------------------------------- equal to the ideal mechanism


def test_sum_plus_rounded_noise_is_the_rounded_sum_of_the_real_numbers() -> None:
    """floor(S + N/g + 1/2) in exact arithmetic, with N to 400 bits, for sums of any size."""
    rng = np.random.default_rng(7)
    deviation = 1.4 * 2**24
    sums = rng.integers(-(2**45), 2**45, 500).tolist()
    released = [s + k for s, k in zip(sums, rounded_gaussian(KEY, deviation, 500).tolist(), strict=True)]
    assert released == [nearest(n, deviation, s) for s, n in zip(sums, exact_normals(KEY, 500), strict=True)]


def test_rounding_halves_up_commutes_with_whole_numbers_and_rounding_them_to_even_does_not() -> None:
    rng = np.random.default_rng(8)
    for s in rng.integers(-(2**40), 2**40, 300).tolist():
        for x in (Fraction(int(rng.integers(-(2**30), 2**30)), 2), Fraction(float(rng.standard_normal()) * 2**24)):
            assert math.floor(s + x + Fraction(1, 2)) == s + math.floor(x + Fraction(1, 2))
    assert round(1 + Fraction(1, 2)) != 1 + round(Fraction(1, 2))


def test_the_low_bits_of_floating_point_noise_tell_the_sum_and_those_of_the_grid_do_not() -> None:
    """Mironov 2012. One coordinate, noise of deviation 1, sums 0 and 1: does a small release show bits below 2⁻²⁴?

    Where 1 + N is small, N is near -1, a multiple of 2⁻²⁴, and so is the release. Where 0 + N is small, it has more.
    """
    noise_of_floats = fast_gaussian(KEY, 1.0, MANY)
    telling = []
    for total in (0.0, 1.0):
        release = (noise_of_floats + total).double()
        small = release[release.abs() < 1 / 16]
        assert len(small) > 1000
        telling.append(float((small * 2**24 != (small * 2**24).round()).double().mean()))
    assert telling[0] > 0.5 and telling[1] == 0.0, "one look at the bits rules one of the sums out"

    grid = Grid.of(1.0)
    multiples = torch.from_numpy(rounded_gaussian(KEY, 1.0 / grid.spacing, MANY))
    rests = []
    for total in (0.0, 1.0, 0.1, -1 / 3):
        released = multiples + grid.rounded(torch.tensor([total]))
        reals = released.double() * grid.spacing
        assert torch.equal(reals / grid.spacing, released.double()), "on the grid, whatever the sum"
        small = released[reals.abs() < 1 / 16]
        rests.append(torch.bincount(small & 15, minlength=16).numpy())
    assert stats.chi2_contingency(np.stack(rests)).pvalue > CERTAIN


# ---------------------------------------------------------------------------------------------------------------- fast


def test_fast_noise_is_normal_and_reproducible_from_its_key() -> None:
    values = fast_gaussian(KEY, 0.3, 100_000)
    assert values.dtype == torch.float32
    assert torch.equal(values, fast_gaussian(KEY, 0.3, 100_000))
    assert stats.kstest(values.numpy() / 0.3, "norm").pvalue > CERTAIN
    other = fast_gaussian(secret().derive("noise", 1), 0.3, 100_000)
    assert abs(np.corrcoef(values.numpy(), other.numpy())[0, 1]) < 4.5 / math.sqrt(100_000)


def test_fast_noise_can_be_found_by_trying_32_bits_and_rounded_noise_can_not() -> None:
    other = KEY[:4] + bytes(28)
    assert torch.equal(fast_gaussian(KEY, 1.0, 100), fast_gaussian(other, 1.0, 100))
    assert not (rounded_gaussian(KEY, 1e7, 100) == rounded_gaussian(other, 1e7, 100)).any()
