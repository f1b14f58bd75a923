"""What the sites' own metrics come to in a round: their weighted mean, and how much of it is noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

from common.messages import SiteDescription
from common.privacy.metrics import NoiseSplit
from common.sections import PhaseSection, PrivacySection


def site_metrics(
    metrics: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, float],
    sites: Mapping[str, SiteDescription],
    privacy: PrivacySection,
    phase: PhaseSection,
    bounds: Mapping[str, float],
) -> dict[str, dict[str, float | None]]:
    """Entries of the round's record; none where the plan asks for no metrics.

    Args:
        metrics: what each admitted site has released.
        bounds: largest value of each metric that the plan asks for.

    Returns:
        ``site_metrics``: mean of each metric; ``site_metrics_noise``: standard deviation of the privacy noise in it.
    """
    if not bounds:
        return {}
    total = math.fsum(weights[site] for site in metrics)
    noise = _noise({site: weights[site] / total for site in metrics}, sites, NoiseSplit.of(privacy), phase)
    means = {name: math.fsum(weights[site] * own[name] for site, own in metrics.items()) / total for name in bounds}
    return {
        "site_metrics": {**means},
        "site_metrics_noise": {name: None if noise is None else noise * bound for name, bound in bounds.items()},
    }


def _noise(
    shares: Mapping[str, float], sites: Mapping[str, SiteDescription], split: NoiseSplit, phase: PhaseSection
) -> float | None:
    """Standard deviation of the weighted mean in units of a metric's bound; ``None`` where a site does not state it."""
    deviations = []
    for site, share in shares.items():
        description = sites[site]
        stated = [one for one in (description.privacy.phases if description.privacy else ()) if one.name == phase.name]
        if not stated or not stated[0].sample_rate * description.public_size > 0:
            return None
        deviations.append(share * split.of_mean(stated[0], phase.steps, description.public_size))
    noise = math.hypot(*deviations)
    return noise if math.isfinite(noise) else None
