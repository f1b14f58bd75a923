"""Linear maps y = x·Wᵀ + b of a forward pass: one for all rows, or for each row that of the site it belongs to.

The base model is frozen, so rows of several sites can share one pass through it, if each row meets its own site's
adapter and head. A row's result depends on its own site's weights alone: the products are batched over rows, or done
for one site's rows after the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common.errors import CoverageError


class LinearMap(Protocol):
    """A map, its weights detached from autograd."""

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], of one map or stacked."""
        ...

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """y [B, …, out] of x [B, …, in]."""
        ...

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient of x [B, …, in] from that of y [B, …, out]."""
        ...


@dataclass(frozen=True)
class SharedMap:
    """The same weights for every row."""

    weight: torch.Tensor
    """[out, in]"""
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As :class:`LinearMap`."""
        return _product(x, self.weight, self.bias)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """As :class:`LinearMap`."""
        return _product(gradient, self.weight.t(), None)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [B, …, in] · Wᵀ + b.

    The CPU's matrix product is two to four times slower with few columns than with few rows, so a low-rank map is
    computed as (W·xᵀ)ᵀ there.
    """
    if x.is_cuda or x.dtype != torch.float32 or 4 * len(weight) > weight.shape[1] or x.dim() < 3:
        return functional.linear(x, weight, bias)
    narrow = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    output = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    if bias is None:
        output.view(narrow.shape).copy_(narrow)
    else:
        torch.add(narrow, bias, out=output.view(narrow.shape))
    return output


@dataclass(frozen=True)
class Rows:
    """Which site each row of a pass belongs to."""

    sites: torch.Tensor
    """[B] number of each row's site."""
    runs: tuple[tuple[int, slice], ...]
    """Site and rows of each stretch of rows."""
    run_of: torch.Tensor
    """[B] number of each row's stretch."""

    @classmethod
    def of(cls, stretches: Sequence[tuple[int, int]], device: torch.device) -> Rows:
        """So many rows of this site, then so many of that one: (site, number of rows) of each stretch."""
        counts = [count for _, count in stretches]
        ends = [0, *accumulate(counts)]
        runs = tuple((site, slice(*ends[number : number + 2])) for number, (site, _) in enumerate(stretches))
        numbers = np.repeat(np.arange(len(runs)), counts)
        sites = np.array([site for site, _ in stretches], np.int64)[numbers]
        return cls(torch.from_numpy(sites).to(device), runs, torch.from_numpy(numbers).to(device))

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over each stretch, [runs, …] of [B, …]."""
        return values.new_zeros(len(self.runs), *values.shape[1:]).index_add_(0, self.run_of, values)


@dataclass(frozen=True)
class SiteMaps:
    """Each site's own weights for its own rows."""

    weight: torch.Tensor
    """[S, out, in]"""
    bias: torch.Tensor | None
    """[S, out]"""
    rows: Rows

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As :class:`LinearMap`."""
        return self._product(x, self.weight, self.bias)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """As :class:`LinearMap`."""
        return self._product(gradient, self.weight.mT, None)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) != len(self.rows.sites):
            raise CoverageError(
                f"privacy: a map works on {len(x)} rows where the pass has {len(self.rows.sites)}; sites can share a "
                "pass only where every trained map has one row for each example (simulation.sites_per_pass = 1)"
            )
        if x.dim() == 2:  # a product for each row alone would be slow, and to copy a head for each row as well
            parts = [
                functional.linear(x[run], weight[site], None if bias is None else bias[site])
                for site, run in self.rows.runs
            ]
            return torch.cat(parts)
        own, flat = weight[self.rows.sites], x.flatten(1, -2)
        narrow = 4 * own.shape[1] <= own.shape[2]  # few rows are faster than few columns
        output = torch.bmm(own, flat.mT).mT.contiguous() if narrow else torch.bmm(flat, own.mT)
        if bias is not None:
            output += bias[self.rows.sites].unsqueeze(1)
        return output.view(*x.shape[:-1], -1)


class OwnWeights:
    """What the sites of a group have in place of a model's parameters.

    Args:
        stacks: parameter → the sites' own values [S, *shape].
        summed: whether the gradients of each stretch of rows are wanted as one sum, not row by row.
    """

    def __init__(self, stacks: Mapping[nn.Parameter, torch.Tensor], summed: bool = False) -> None:
        self._stacks = {id(parameter): stack for parameter, stack in stacks.items()}
        self.summed = summed
        self.rows: Rows | None = None
        """Of the pass that is under way."""

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._stacks

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """[S, *shape]."""
        return self._stacks[id(parameter)]


def map_of(
    weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, own: OwnWeights | None, dtype: torch.dtype | None
) -> LinearMap:
    """The map of a module in the pass that is under way.

    Args:
        transposed: whether the weight is stored as [in, out].
        own: what sites have in place of weight and bias; both or neither.
        dtype: to compute in; ``None``: as the weights are.
    """
    if own is None or weight not in own:
        values = weight.detach(), None if bias is None else bias.detach()
    else:
        values = own.of(weight), None if bias is None else own.of(bias)
    matrix, offset = values
    if dtype is not None:
        matrix, offset = matrix.to(dtype), None if offset is None else offset.to(dtype)
    matrix = matrix.mT if transposed else matrix
    if own is None or weight not in own:
        return SharedMap(matrix, offset)
    assert own.rows is not None, "a pass says which rows are whose"
    return SiteMaps(matrix, offset, own.rows)
