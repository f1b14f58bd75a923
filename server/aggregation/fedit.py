"""FedIT (Zhang et al. 2023, arXiv 2305.05644): the mean of A and the mean of B, each on its own.

The product of the means is not the mean of the products: mean(B)·mean(A) ≠ mean(BA). Under DP both noisy factors
multiply, which is why ``ffa`` wins at small ε. With secure sums: works as it is, one sum per tensor.
"""

from __future__ import annotations

from server.aggregation.base import FedOpt, register


@register("fedit")
class FedIT(FedOpt):
    """Averages every released tensor."""
