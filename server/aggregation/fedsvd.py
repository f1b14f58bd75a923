"""FedSVD (Lee et al. 2025, arXiv 2505.12805): B is averaged, then the server takes A anew from the SVD of B A.

With B A = U S Vᵀ of rank r, A ← Vᵀ and B ← U S, by QR and an r × r SVD (``low_rank.py``). The product stays what it is,
A has orthonormal rows again, and the columns of B come in falling order of weight.

The new A spans the rows of the old one, so the model moves in the subspace of the first A for ever. The change of frame
is a rotation R = A A'ᵀ, B' = B R; plain SGD, clipping by the whole norm and isotropic noise do not see a rotation, so
with them (and an orthonormal start) ``fedsvd`` *is* ``ffa``. It differs where coordinates are treated one by one: AdamW
at the sites, FedAdam or FedYogi at the server, median and trimmed mean, and rounding on the wire.

Under DP: post-processing of B; noise enters linearly, as in ``ffa``. With secure sums: works as it is, the sum of B is
enough. A has to travel down in every round, but not up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState
from common.messages import Tensors
from server.aggregation.base import AVERAGE, Parts, register
from server.aggregation.ffa import FFALoRA
from server.aggregation.low_rank import refactor
from server.aggregation.optimizers import SECOND, VELOCITY

_Array = npt.NDArray[np.float32]


@register("fedsvd")
class FedSVD(FFALoRA):
    """Averages B (and the head); an update of A is a layout error."""

    def reframe(self, before: Tensors, adapter: AdapterState, parts: Parts) -> tuple[AdapterState, Parts]:
        """Each pair whose B has moved in the round, and what is remembered of it, in the frame of its new A.

        A pair that has not moved keeps its bits: rounds of zero updates change nothing.
        """
        adapter, turned = dict(adapter), {part: dict(arrays) for part, arrays in parts.items()}
        for b in [name for name in adapter if ".lora_B." in name and not np.array_equal(adapter[name], before[name])]:
            a = b.replace(".lora_B.", ".lora_A.")
            old = adapter[a].astype(np.float64)
            adapter[b], adapter[a] = refactor(adapter[b], adapter[a], len(old))
            rotation = old @ adapter[a].T.astype(np.float64)
            for part, arrays in turned.items():
                if b in arrays:
                    arrays[b] = _rotated(part, arrays[b], rotation)
            if AVERAGE in turned:
                turned[AVERAGE][a] = adapter[a]
        return adapter, turned


def _rotated(part: str, b: _Array, rotation: npt.NDArray[np.float64]) -> _Array:
    """What is remembered of B, after B' = B R.

    Velocity and average are linear in B: X A = (X R) A' exactly, since A' spans the rows of A. Of the second moment
    only the diagonal is known, so its entries are taken for uncorrelated: E[(Σ_j g_j R_ji)²] = Σ_j E[g_j²] R_ji².
    """
    by = {VELOCITY: rotation, AVERAGE: rotation, SECOND: np.square(rotation)}[part]
    rotated: _Array = (b.astype(np.float64) @ by).astype(np.float32)
    return rotated
