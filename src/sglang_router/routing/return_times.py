"""Learn how long sessions pause, and so after which pause one has ended: from the gaps between their requests.

    gap          from the end of a session's last request to the arrival of its next one
    buckets      0.5 s, 0.7 s, 1 s ... 4.5 h: each half an octave; old counts fade, so that a change of habits is learnt
    time_to_live = twice the gap that 98 of 100 do not exceed, within [FLOOR, CEILING]; `UNKNOWN` before 20 gaps
    usual        = the gap that 95 of 100 do not exceed, at least FLOOR / 2 and at most the time to live

Sessions are remembered for CEILING, so that also a gap above the present time to live is seen: otherwise it could only
shrink.
"""

from __future__ import annotations

from typing import Final

FLOOR: Final = 60.0
"""Shortest time to live, in seconds: people think, tools compile."""
CEILING: Final = 3600.0
"""Longest time to live, in seconds: after that, hardly an engine still has the context."""
UNKNOWN: Final = 900.0
"""Time to live in seconds before enough gaps are known."""
_ENOUGH: Final = 20
_SHARE: Final = 0.98
_USUAL: Final = 0.95
_FACTOR: Final = 2.0
_FIRST: Final = 0.5
_STEP: Final = 1.4142135623730951
_BUCKETS: Final = 30
_FADES_AT: Final = 1024
"""Gaps after which all counts are halved."""


class ReturnTimes:
    """See the module. time_to_live, usual: in seconds."""

    __slots__ = ("_bounds", "_counts", "_total", "time_to_live", "usual")

    def __init__(self) -> None:
        self._bounds = [_FIRST * _STEP**place for place in range(_BUCKETS)]
        self._counts = [0] * _BUCKETS
        self._total = 0
        self.time_to_live = self.usual = UNKNOWN

    def __repr__(self) -> str:
        return f"<ReturnTimes of {self._total} gaps: {self.time_to_live:.0f} s to live>"

    def add(self, gap: float) -> None:
        """Learn a gap of so many seconds."""
        place = 0
        while place < _BUCKETS - 1 and self._bounds[place] < gap:
            place += 1
        self._counts[place] += 1
        self._total += 1
        if self._total >= _FADES_AT:
            self._counts = [count >> 1 for count in self._counts]
            self._total = sum(self._counts)
        if self._total >= _ENOUGH:
            self.time_to_live = min(max(_FACTOR * self._quantile(_SHARE), FLOOR), CEILING)
            self.usual = min(max(self._quantile(_USUAL), FLOOR / 2), self.time_to_live)

    def _quantile(self, share: float) -> float:
        """Return the bound that this share of the gaps does not exceed."""
        wanted = share * self._total
        seen = 0
        for place, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return self._bounds[place]
        return self._bounds[-1]
