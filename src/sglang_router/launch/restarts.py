"""Decide when a replica may be restarted: after a pause that grows, and only a limited number of times.

    end of the process      1st    2nd    3rd    4th    5th    6th
    pause before the next   1 s    2 s    4 s    8 s    16 s   none: the replica stays down

Only restarts within the window count: a replica that ran well for that long starts again with the first pause. The
module has no clock; callers pass the time. The pauses have no jitter: the replicas of a launcher share no server that
many restarts at once could overload.
"""

from __future__ import annotations

from collections import deque

import msgspec


class RestartRules(msgspec.Struct, frozen=True, kw_only=True):
    """Backoffs and window in seconds; `most` restarts within the window are allowed."""

    initial_backoff: float = 1.0
    max_backoff: float = 60.0
    multiplier: float = 2.0
    most: int = 5
    window: float = 600.0


class RestartHistory:
    """The restarts of one replica."""

    def __init__(self, rules: RestartRules) -> None:
        self._rules = rules
        self._allowed: deque[float] = deque()

    def pause(self, now: float) -> float | None:
        """The process ended: return the seconds to wait before the next start, or None to leave the replica down."""
        rules = self._rules
        while self._allowed and now - self._allowed[0] > rules.window:
            self._allowed.popleft()
        if len(self._allowed) >= rules.most:
            return None
        pause = rules.initial_backoff
        for _ in self._allowed:  # a loop, because a power would overflow
            pause = min(pause * rules.multiplier, rules.max_backoff)
        self._allowed.append(now)
        return min(pause, rules.max_backoff)

    def forget(self) -> None:
        """Forget earlier restarts, because an operator asked for a restart."""
        self._allowed.clear()
