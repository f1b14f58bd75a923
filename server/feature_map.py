"""A public linear map before the head, taken from texts that the server holds itself.

Under DP each coordinate of the head pays for itself in noise, so it pays to have few of them that say much: the pooled
states of several levels, joined, and of these the principal components, brought to more equal scales. Nothing private
goes into it, so it costs no ε; labels are not looked at, so the server's own scores stay honest as far as labels go.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from common.adapter import FEATURE_MAP, AdapterState

RIDGE = 3.0
"""Shrinkage of the scales, as a multiple of the mean variance of the components kept: 0 would whiten fully, which lifts
components that say little."""


def fitted(features: npt.NDArray[np.float32], rank: int) -> AdapterState:
    """The map z = P (x - m) as ``feature_map.weight`` P [rank, D] and ``feature_map.bias`` -P m [rank].

    The rows of P are the principal components v_i of the features (Pearson 1901), each divided by √(λ_i + r·mean(λ)),
    with λ_i their variances and r the ridge; then all by one number, so that the mean norm of z is 1. Where there are
    fewer texts than coordinates, the last rows are zero.

    Args:
        features: [n, D] of the server's own texts; rows that are not finite are left out.
        rank: coordinates to keep.
    """
    finite = features[np.isfinite(features).all(axis=1)].astype(np.float64)
    weight = np.zeros((rank, features.shape[1]))
    if len(finite) > 1:
        found = PCA(n_components=min(rank, *finite.shape), svd_solver="full").fit(finite)
        variances = found.explained_variance_
        components = found.components_ / np.sqrt(variances + RIDGE * variances.mean())[:, None]
        norm = np.linalg.norm((finite - found.mean_) @ components.T, axis=1).mean()
        weight[: len(components)] = components / norm if norm > 0 else 0.0
    mean = finite.mean(axis=0) if len(finite) else np.zeros(features.shape[1])
    tensors = {"weight": weight, "bias": -weight @ mean}
    return {f"{FEATURE_MAP}{name}": array.astype(np.float32) for name, array in tensors.items()}
