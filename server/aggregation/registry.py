"""All aggregation algorithms and combining rules, each by one import line."""

from __future__ import annotations

from typing import Any

from common.sections import PhaseSection
from server.aggregation import fedex, fedit, fedsvd, ffa, flexlora, la_lora, mean, robust, rolora
from server.aggregation.base import Aggregator, create, known_aggregators, known_rules

__all__ = [
    "aggregator_for",
    "fedex",
    "fedit",
    "fedsvd",
    "ffa",
    "flexlora",
    "known_aggregators",
    "known_rules",
    "la_lora",
    "mean",
    "robust",
    "rolora",
]


def aggregator_for(phase: PhaseSection) -> Aggregator[Any]:
    """The phase's aggregator.

    Raises:
        ConfigError: unknown algorithm, combining rule or server optimiser; lists the known ones.
    """
    return create(phase)
