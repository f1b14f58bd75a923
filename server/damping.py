"""A shorter step of the server where the noise of a round would move the adapter too far.

A learning rate is part of the plan, so it is chosen before the coordinator knows how many units take part, and a step
that suits ten thousand of them is too long for one thousand: the noise of a mean falls with their number. The
coordinator knows the noise from what the sites state, all of it public, and can shorten its own step: post-processing,
free of ε. With ``server.weights = "uniform"`` a site that declares very few units shortens everybody's step, since its
noise is that large; by size it adds no more than any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from common.messages import SiteDescription
from common.sections import PhaseSection


def deviation(phase: PhaseSection, sites: Mapping[str, SiteDescription], weights: Mapping[str, float]) -> float:
    """Deviation of the noise in each number of the round's weighted mean update.

    A step of site k adds η·σ_k·C/(q_k·n_k); T steps add up to √T of it, and the mean to √(Σ w_k²·…²)/Σ w_k. 0 without
    noise.
    """
    total = 0.0
    for site, weight in weights.items():
        privacy = sites[site].privacy
        stated = next((one for one in privacy.phases if one.name == phase.name), None) if privacy else None
        if stated is not None:
            batch = stated.sample_rate * sites[site].public_size
            total += (weight * stated.noise_multiplier * stated.clip_norm / batch) ** 2
    return phase.learning_rate * sqrt(phase.steps * total) / sum(weights.values())


def damped(phase: PhaseSection, sites: Mapping[str, SiteDescription], weights: Mapping[str, float]) -> PhaseSection:
    """The phase with a server's step so short that a round's noise has at most ``phase.server_noise``."""
    if phase.server_noise is None:
        return phase
    noise = phase.server_learning_rate * deviation(phase, sites, weights)
    share = min(1.0, phase.server_noise / noise) if noise > 0 else 1.0
    return phase.model_copy(update={"server_learning_rate": phase.server_learning_rate * share})
