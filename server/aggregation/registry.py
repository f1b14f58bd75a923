"""All aggregation algorithms, each by one import line."""

from __future__ import annotations

from typing import Any

from common.config import PhaseSection
from server.aggregation import fedit, ffa
from server.aggregation.base import Aggregator, create, known_aggregators

__all__ = ["aggregator_for", "fedit", "ffa", "known_aggregators"]


def aggregator_for(phase: PhaseSection) -> Aggregator[Any]:
    """The phase's aggregator.

    Raises:
        ConfigError: unknown algorithm; lists the known ones.
    """
    return create(phase)
