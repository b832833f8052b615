"""What rules ask of a series of numbers: its middle and its spread, by ways that a few wild values don't move."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

__all__ = ["falls", "median", "noise", "spread"]

_TO_SIGMA = 1.4826
"""The median distance from the median, times this, is the standard deviation of a normal distribution."""


def median(values: Sequence[float]) -> float:
    """The middle value; 0 of nothing."""
    return statistics.median(values) if values else 0.0


def spread(values: Sequence[float]) -> float:
    """Standard deviation by the median distance from the median."""
    middle = median(values)
    return _TO_SIGMA * median([abs(value - middle) for value in values])


def noise(values: Sequence[float]) -> float:
    """Standard deviation around a slow trend: from the differences of neighbours."""
    return spread([after - before for before, after in itertools.pairwise(values)]) / 2**0.5


def falls(values: Sequence[float]) -> float:
    """Share of the way that goes down, of all ups and downs: 1 falls only, 0.5 goes nowhere, 0 rises only."""
    moves = [after - before for before, after in itertools.pairwise(values)]
    way = sum(map(abs, moves))
    return sum(-move for move in moves if move < 0) / way if way else 0.5
