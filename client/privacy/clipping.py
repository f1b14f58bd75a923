"""From per-example gradients to the clipped gradients of privacy units.

The contribution of a unit is the mean gradient of its chosen examples (their weights already hold the 1/m), scaled down
to norm C over all trained parameters together. A unit whose gradient is not finite contributes exactly zero: whether a
release is sent, and what it weighs, must not depend on any one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from common.errors import CoverageError


def unit_gradients(parameters: Mapping[str, nn.Parameter], rows: int, slots: torch.Tensor | None) -> list[torch.Tensor]:
    """Gradient of each unit, fp32 (or fp64 where the model is), one tensor [rows, numel] for each parameter.

    Args:
        rows: rows of the physical batch; also the number of units returned, so that shapes tell nothing.
        slots: [rows] which unit of the batch a row belongs to; ``None``: each row is a unit of its own.

    Raises:
        CoverageError: a parameter received no per-example gradient of the expected shape.
    """
    gradients = []
    for name, parameter in parameters.items():
        gradient = getattr(parameter, "grad_sample", None)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != (rows, *parameter.shape):
            raise CoverageError(f"privacy: '{name}' received no per-example gradient; it cannot be clipped")
        flat = gradient.reshape(rows, -1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32)).contiguous()
        gradients.append(flat if slots is None else torch.zeros_like(flat).index_add_(0, slots, flat))
    return gradients


def clip_factors(gradients: Sequence[torch.Tensor], clip_norm: float) -> torch.Tensor:
    """min(1, C/‖g‖) of each unit, [rows] of the gradients' type (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1).

    The norm is summed in fp64 and the factor rounded down, so that rounding never lets a contribution exceed C. The
    gradient of a unit that is not finite is set to zero in place.
    """
    squares = torch.zeros(len(gradients[0]), dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        squares += torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64) ** 2
    finite = torch.isfinite(squares)
    if not bool(finite.all()):
        for gradient in gradients:
            gradient[~finite] = 0.0
    norms = torch.where(finite, squares, 0.0).sqrt()
    dtype = gradients[0].dtype
    factors = torch.clamp(clip_norm * (1 - 2 * torch.finfo(dtype).eps) / norms.clamp(min=1e-300), max=1.0).to(dtype)
    return torch.where(factors < torch.finfo(dtype).tiny, 0.0, factors)  # a subnormal one could be rounded up by much
