"""A token bucket, stored as one number (GCRA, the virtual scheduling of ITU-T I.371): the moment when it is full again.

take(now)         take a token; or return how long there is none
missing(now)      the same without taking one
left(now)         how many tokens there are
filled_in(now)    how long until it is full again
spend(n, now)     take n tokens, also when there are fewer: then there is none for longer
owe(n, now, s)    the same by the word of another, who may be wrong: not for longer than s seconds
fill_in(t, now, s)  the same: it is full again in t seconds at the earliest
"""

from __future__ import annotations

import math
from typing import Final

_ROUNDING: Final = 1e-6
"""Tolerance for rounding errors, in seconds, so that requests at exactly the rate limit pass."""


class TokenBucket:
    """See the module. It is full at the start.

    rate   tokens added per second
    burst  most tokens in it, at least 1; None: those of one second
    size   the same, as a number
    """

    __slots__ = ("_full_at", "_interval", "_slack", "size")

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self.size = max(1.0, rate if burst is None else burst)
        self._interval = 1.0 / rate
        self._slack = (self.size - 1.0) * self._interval
        self._full_at = -math.inf

    def missing(self, now: float) -> float:
        """Return the seconds until there is a token; 0.0 when there is one."""
        missing = max(self._full_at, now) - now - self._slack
        return missing if missing > _ROUNDING else 0.0

    def filled_in(self, now: float) -> float:
        """Return the seconds until it is full."""
        return max(self._full_at - now, 0.0)

    def left(self, now: float) -> float:
        """Return the tokens in it; 0.0 while more were spent than there were."""
        return max(self.size - self.filled_in(now) / self._interval, 0.0)

    def spend(self, tokens: float, now: float) -> None:
        """Take tokens."""
        self._full_at = max(self._full_at, now) + tokens * self._interval

    def owe(self, tokens: float, now: float, seconds: float) -> None:
        """Take tokens that somebody else says were spent. If that is more than there are, there is none for `seconds`
        at most because of it."""
        full_at = max(self._full_at, now)
        latest = now + self.size * self._interval + seconds
        self._full_at = max(full_at, min(full_at + tokens * self._interval, latest))

    def fill_in(self, filled_in: float, now: float, seconds: float) -> None:
        """Let it be full again in `filled_in` seconds at the earliest, because somebody else says so. There is no token
        for `seconds` at most because of it."""
        self._full_at = max(self._full_at, now + min(filled_in, self.size * self._interval + seconds))

    def take(self, now: float) -> float:
        """Take a token and return 0.0; when there is none, return the seconds until there is one."""
        missing = self.missing(now)
        if not missing:
            self.spend(1.0, now)
        return missing
