"""What a site does to a step's noised gradient before its optimiser sees it: smoothing, then the proximal pull.

Both are functions of what the mechanism has released already and of the received adapter, so they are post-processing:
they change neither the sensitivity nor the noise of a step, and cost no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from common.sections import PhaseSection


def prepare(optimizer: torch.optim.Optimizer, phase: PhaseSection, parameters: Mapping[str, nn.Parameter]) -> None:
    """Lets the phase's ``smoothing`` and ``proximal`` act before each step of the optimiser.

    A parameter without a gradient, which the step does not move, is left alone.

    Args:
        parameters: by canonical name, with the values that were received.
    """
    if not (phase.smoothing or phase.proximal):
        return
    received = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def act(*_: Any) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            if phase.smoothing:
                parameter.grad = smoothed(name, parameter.grad, phase.smoothing)
            if phase.proximal:
                # ∇ of (μ/2)‖θ - θ_received‖² (FedProx, Li et al. 2018, arXiv 1812.06127, eq. 2).
                parameter.grad = parameter.grad + phase.proximal * (parameter.detach() - received[name])

    optimizer.register_step_pre_hook(act)


def smoothed(name: str, gradient: torch.Tensor, width: float) -> torch.Tensor:
    """A matrix of a LoRA pair under a Gaussian low-pass filter; anything else as it is.

    A [r, k] is filtered along its inputs and B [d, r] along its outputs, as LA-LoRA does (arXiv 2602.19926); the fixed
    filter [1, 4, 6, 4, 1]/16 of its authors has width 1. Taps of distance j weigh exp(-j²/2w²) up to 2w, and at the
    border those that are left are scaled to sum 1, so a constant stays what it is.

    Args:
        width: w, in entries.
    """
    if ".lora_A." in name:
        return _filtered(gradient, width)
    return _filtered(gradient.T, width).T.contiguous() if ".lora_B." in name else gradient


def _filtered(rows: torch.Tensor, width: float) -> torch.Tensor:
    """Each row [n] of ``rows`` [m, n] under the filter."""
    reach, length = math.ceil(2 * width), rows.shape[1]
    padded = functional.pad(torch.cat([rows, torch.ones_like(rows[:1])]), (reach, reach))
    taps = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    sums = torch.zeros_like(padded[:, :length])
    for start, tap in enumerate(taps):
        sums += tap * padded[:, start : start + length]
    return sums[:-1] / sums[-1:]
