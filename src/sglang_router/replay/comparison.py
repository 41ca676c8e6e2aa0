"""Several runs of each policy: the mean of each figure over the seeds, and how far it may be off.

The half-width is that of a 95 % confidence interval (Student's t). It needs at least two seeds; with one there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sglang_router.replay.result import Result

_T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95 %, by degrees of freedom; beyond these 2."""


class Figure(NamedTuple):
    """mean over the seeds, and the half-width of its confidence interval; NaN with a single seed."""

    mean: float
    half: float


def figure_of(values: Sequence[float]) -> Figure:
    """Return the figure of some runs."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Figure(mean, math.nan)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    t = _T95[count - 1] if count <= len(_T95) else 2.0
    return Figure(mean, t * deviation / math.sqrt(count))


class Row:
    """One policy. figures: over its runs, by name."""

    def __init__(self, label: str, runs: Sequence[Result], slo_ttft: float, slo_itl: float) -> None:
        self.label = label
        self.runs = runs
        found = [run.figures(slo_ttft, slo_itl) for run in runs]
        self.figures = {name: figure_of([each[name] for each in found]) for name in found[0]}

    def __repr__(self) -> str:
        return f"<Row {self.label}: {len(self.runs)} runs>"
