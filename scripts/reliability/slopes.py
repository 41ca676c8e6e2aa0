"""Fit a line to the figures of each minute, and limit how much it may rise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tolerance(NamedTuple):
    """How much a column may grow: a share of its mean, but at least `least`."""

    column: str
    share: float
    least: float

    def of(self, values: Sequence[float]) -> float:
        mean = sum(values) / len(values) if values else 0.0
        return max(self.share * mean, self.least)


def growth(values: Sequence[float]) -> float:
    """Return by how much the least-squares line rises from the first value to the last; 0 for fewer than two values."""
    count = len(values)
    if count < 2:
        return 0.0
    middle, mean = (count - 1) / 2, sum(values) / count
    across = sum((at - middle) * (value - mean) for at, value in enumerate(values))
    return across / sum((at - middle) ** 2 for at in range(count)) * (count - 1)
