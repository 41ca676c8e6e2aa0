"""Slow start: a worker with an empty cache gets a growing share of the requests, not all of them.

Such a worker has the shortest queue and the smallest tree, so that every policy would send it all that no other worker
wants. For `seconds` its load may be at most a share, growing from none to all, of the mean load of the others; above
that it is no candidate for the moment. One request it may always have. Where all workers are new, there is no share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.worker import Worker


class SlowStart:
    """The workers of a pool in slow start.

    seconds  how long it lasts; 0: there is none
    running  whether there are such workers
    """

    __slots__ = ("_first", "_last", "_set", "_workers", "running", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running = False
        self._workers: list[Worker] = []
        self._set = 0  # those of them that are able
        self._first = math.inf  # when the slow start of the first of them is over
        self._last = 0.0  # and that of the last

    def __repr__(self) -> str:
        return f"<SlowStart of {len(self._workers)} workers>"

    def changed(self, workers: Iterable[Worker], able: Candidates, now: float) -> None:
        """Take note of workers whose state has changed, and of the able ones."""
        if self.running or any(now < worker.warm_at for worker in workers):
            self._workers = list(dict.fromkeys([*self._workers, *workers]))
            self._look(able, now)

    def _look(self, able: Candidates, now: float) -> None:
        """Find out again who is in slow start."""
        roster = able.roster
        self._workers = [w for w in self._workers if now < w.warm_at and w.seat >= 0 and w.roster is roster]
        self._set = able.set_of(self._workers)
        ends = [worker.warm_at for worker in self._workers]
        self._first, self._last = min(ends, default=math.inf), max(ends, default=0.0)
        self.running = bool(ends)

    def with_their_share(self, able: Candidates, now: float) -> int:
        """Return the set of the able workers that have their share."""
        if now >= self._first:
            self._look(able, now)
        roster, warming = able.roster, self._set
        others = able.mask & ~warming
        if not others or not warming:
            return 0
        mean = roster.running(others) / others.bit_count()
        found = 0
        least = math.ceil(self._share(self._last, mean, now))
        for worker in able.those(warming & roster.at_least(least)):
            if worker.load >= self._share(worker.warm_at, mean, now):
                found |= worker.bit
        return found

    def _share(self, warm_at: float, mean: float, now: float) -> float:
        """Return the load that a worker may have whose slow start is over at this time."""
        return max(1.0, mean * (1.0 - (warm_at - now) / self.seconds))
