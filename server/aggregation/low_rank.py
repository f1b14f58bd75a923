"""Products of thin matrices B A, summed and cut to a rank without multiplying them out.

The SVD of B A [d, k] of rank r comes from thin QRs and the SVD of an r × r matrix: B = Q_B R_B, Aᵀ = Q_A R_A, hence
B A = Q_B (R_B R_Aᵀ) Q_Aᵀ; with R_B R_Aᵀ = U S Vᵀ that is (Q_B U) S (Q_A V)ᵀ. It costs O((d + k) r²), the SVD of the
product itself O(d k min(d, k)). All of it is done in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.adapter import lora_pairs, rank_of
from common.errors import AdapterError
from common.messages import Tensors

Matrix = npt.NDArray[np.float64]
AnyMatrix = npt.NDArray[Any]


def refactor(b: AnyMatrix, a: AnyMatrix, rank: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The best approximation of ``b @ a`` of a rank (Eckart-Young), as B' = U S and A' = Vᵀ.

    Args:
        b: [d, r].
        a: [r, k].
        rank: at most k. Above r, or where the product has less, it is filled up: B' with zeros, A' with further
            orthonormal rows, so that every direction can be learnt in.

    Returns:
        B' [d, rank] with columns in falling order of norm and A' [rank, k] with orthonormal rows, both fp32. In each
        row of A' the entry of largest magnitude is positive, which settles the signs.

    Raises:
        AdapterError: the rank exceeds k.
    """
    if rank > a.shape[1]:
        raise AdapterError(f"lora.r = {rank} exceeds the input width {a.shape[1]} of an adapter; choose a smaller rank")
    left, values, right = singular(b, a, rank)
    return (left * values).astype(np.float32), np.ascontiguousarray(right, np.float32)


def singular(b: AnyMatrix, a: AnyMatrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The ``rank`` largest singular triplets of ``b @ a``: U [d, rank], S [rank], Vᵀ [rank, k].

    Where the product has fewer, S is zero, the columns of U are zero, and the rows of Vᵀ are still orthonormal.
    """
    missing = max(0, rank - a.shape[0])
    # A Householder QR fills zero columns up with orthonormal ones.
    q_a, r_a = np.linalg.qr(np.pad(a.astype(np.float64), ((0, missing), (0, 0))).T)
    q_b, r_b = np.linalg.qr(np.pad(b.astype(np.float64), ((0, 0), (0, missing))))
    u, values, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=True)
    left, kept = np.zeros((b.shape[0], rank)), np.zeros(rank)
    found = min(rank, len(values))
    left[:, :found], kept[:found] = q_b @ u[:, :found], values[:found]
    right = vt[:rank] @ q_a.T
    signs = np.sign(right[np.arange(rank), np.abs(right).argmax(axis=1)])
    return left * signs, kept, right * signs[:, np.newaxis]


def leading(adapter: Tensors, rank: int) -> Tensors:
    """An adapter with the first ``rank`` columns of each B and rows of each A; other tensors as they are.

    Of factors in the order of their SVD that is each product's best approximation of this rank, and so it is while B is
    zero. The algorithms that let sites choose their rank keep the global adapter like this.
    """
    if rank == rank_of(adapter):
        return adapter
    cut = dict(adapter)
    for b, a in lora_pairs(adapter):
        cut[b], cut[a] = np.ascontiguousarray(adapter[b][:, :rank]), np.ascontiguousarray(adapter[a][:rank])
    return cut


@dataclass(frozen=True)
class Products:
    """Σ w B A of many pairs of one shape [d, k], without loss.

    Pairs are stacked, so the stack's rank is the sum of theirs, until its factors would outgrow the matrix itself; from
    there on the sum is the matrix. So memory is at most d · k numbers, however many pairs come.
    """

    b: Matrix | None
    """The stacked B [d, m]; ``None`` once ``a`` is the sum itself."""
    a: Matrix
    """The stacked A [m, k], or the sum [d, k]."""
    size: float = 0.0
    """Σ |w| ‖B‖ ‖A‖, which rounding is relative to: terms may cancel."""

    @classmethod
    def none(cls, rows: int, columns: int) -> Products:
        """The empty sum [rows, columns]."""
        return cls(np.zeros((rows, 0)), np.zeros((0, columns)))

    def plus(self, b: AnyMatrix, a: AnyMatrix, weight: float = 1.0) -> Products:
        """The sum with ``weight · b @ a`` added; a product of zero leaves it as it is."""
        if not (weight and np.any(b) and np.any(a)):
            return self
        b, a = weight * b.astype(np.float64), a.astype(np.float64)
        size = self.size + float(np.linalg.norm(b) * np.linalg.norm(a))
        if self.b is None:
            return Products(None, self.a + b @ a, size)
        left, right = np.hstack([self.b, b]), np.vstack([self.a, a])
        if left.size + right.size > len(b) * a.shape[1]:
            return Products(None, left @ right, size)
        return Products(left, right, size)

    def factors(self) -> tuple[Matrix, Matrix]:
        """Two matrices whose product is the sum."""
        if self.b is not None:
            return self.b, self.a
        d, k = self.a.shape
        return (np.eye(d), self.a) if d <= k else (self.a, np.eye(k))

    def least(self) -> tuple[Matrix, Matrix]:
        """Factors [d, m] and [m, k] of the sum with the least m: singular values that are nothing but rounding in fp64
        of what was summed are left out, so m is at most min(d, k)."""
        b, a = self.factors()
        left, values, right = singular(b, a, min(len(b), len(a), a.shape[1]))
        kept = values > max(len(b), a.shape[1]) * np.finfo(np.float64).eps * self.size
        return (left * values)[:, kept], right[kept]
