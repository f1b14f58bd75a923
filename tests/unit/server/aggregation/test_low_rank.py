"""Products of thin matrices: cut to a rank and summed without loss, by hand and against numpy's SVD of the matrix."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from common.errors import AdapterError
from server.aggregation.low_rank import Products, leading, refactor

SHAPES = [(7, 5), (5, 7), (3, 9), (9, 3), (6, 6)]


def pair(rows: int, columns: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart-Young by the SVD of the whole matrix."""
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# ---- refactor -------------------------------------------------------------------------------------------------------


def test_a_2_by_2_product_is_cut_to_its_larger_part_by_hand() -> None:
    """B A = [[0, 3], [4, 0]]: singular values 4 (from (0, 1) to (1, 0)) and 3 (from (1, 0) to (0, 1))."""
    b, a = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [2.0, 0.0]])
    left, right = refactor(b, a, 1)
    np.testing.assert_allclose(left, [[0], [4]], atol=1e-6)
    np.testing.assert_allclose(right, [[1, 0]], atol=1e-6)
    left, right = refactor(b, a, 2)
    np.testing.assert_allclose(left, [[0, 3], [4, 0]], atol=1e-6)
    np.testing.assert_allclose(right, [[1, 0], [0, 1]], atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_cut_is_the_best_approximation_of_its_rank(rows: int, columns: int, kept: int) -> None:
    b, a = pair(rows, columns, 3, seed=1)
    left, right = refactor(b, a, kept)
    np.testing.assert_allclose(left @ right, best_of_rank(b @ a, kept), atol=2e-6)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_factors_are_orthogonal_and_in_falling_order(rows: int, columns: int) -> None:
    b, a = pair(rows, columns, 3, seed=2)
    left, right = refactor(b, a, 3)
    np.testing.assert_allclose(right @ right.T, np.eye(3), atol=1e-6)
    squares = left.T @ left
    np.testing.assert_allclose(squares, np.diag(np.diag(squares)), atol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.diag(squares)), np.linalg.svd(b @ a)[1][:3], rtol=1e-6)
    assert (left.dtype, right.dtype) == (np.float32, np.float32)
    assert left.flags.c_contiguous and right.flags.c_contiguous


def test_signs_do_not_depend_on_how_the_product_was_written() -> None:
    b, a = pair(6, 5, 2, seed=3)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    for other_b, other_a in ((-b, -a), (b @ turn, turn.T @ a), (2 * b, a / 2)):
        for one, other in zip(refactor(b, a, 2), refactor(other_b, other_a, 2), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("b", [np.zeros((4, 2)), np.ones((4, 2)), np.zeros((1, 2))])
def test_a_product_of_lower_rank_is_filled_up_with_directions_that_can_be_learnt_in(b: np.ndarray) -> None:
    a = pair(4, 6, 2, seed=4)[1]
    left, right = refactor(b, a, 5)
    assert (left.shape, right.shape) == ((len(b), 5), (5, 6))
    np.testing.assert_allclose(right @ right.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-6)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"lora\.r = 6 exceeds the input width 5 .* smaller rank"):
        refactor(*pair(7, 5, 2, seed=0), 6)


def test_leading_columns_of_factors_in_svd_order_are_the_best_of_each_smaller_rank() -> None:
    b, a = pair(7, 6, 4, seed=5)
    left, right = refactor(b, a, 4)
    adapter = {"x.lora_A.weight": right, "x.lora_B.weight": left, "head": np.ones(3, np.float32)}
    for rank in (1, 2, 3, 4):
        cut = leading(adapter, rank)
        product = cut["x.lora_B.weight"] @ cut["x.lora_A.weight"]
        np.testing.assert_allclose(product, best_of_rank(b @ a, rank), atol=3e-6)
        assert cut["head"] is adapter["head"]
        assert all(array.flags.c_contiguous for array in cut.values())


# ---- sums of products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_sum_of_products_is_exact_however_many_come(rows: int, columns: int) -> None:
    total, whole = Products.none(rows, columns), np.zeros((rows, columns))
    for seed in range(12):
        b, a = pair(rows, columns, 2, seed)
        total, whole = total.plus(b, a, 0.5 + seed), whole + (0.5 + seed) * b @ a
        for left, right in (total.factors(), total.least()):
            np.testing.assert_allclose(left @ right, whole, rtol=1e-12, atol=1e-11)
        assert len(total.least()[1]) <= min(rows, columns)


def test_memory_never_exceeds_the_matrix_and_its_factors_are_stacked_before() -> None:
    """[60, 40] has 2400 numbers; a pair of rank 4 has 400, so six pairs are stacked and the seventh is not."""
    total = Products.none(60, 40)
    for count in range(1, 30):
        total = total.plus(*pair(60, 40, 4, seed=count))
        assert total.a.size + (0 if total.b is None else total.b.size) == min(400 * count, 2400)


def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    def peak(pairs: int) -> int:
        total = Products.none(120, 80)
        tracemalloc.start()
        try:
            for seed in range(pairs):
                total = total.plus(*pair(120, 80, 4, seed))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)
    assert peak(200) < 1.1 * peak(20)


def test_least_factors_have_the_rank_of_the_sum() -> None:
    b, a = pair(8, 6, 2, seed=1)
    total = Products.none(8, 6).plus(b, a).plus(b, 3 * a).plus(2 * b, a)
    assert len(total.a) == 2 * 3 or total.b is None
    assert len(total.least()[1]) == 2
    cancelled = total.plus(b, a, -6.0)
    assert len(cancelled.least()[1]) == 0
    assert len(Products.none(8, 6).least()[1]) == 0


def test_a_product_of_zero_adds_nothing() -> None:
    total = Products.none(3, 4).plus(*pair(3, 4, 1, seed=0))
    assert total.plus(np.zeros((3, 1)), np.ones((1, 4))) is total
    assert total.plus(np.ones((3, 1)), np.zeros((1, 4))) is total
