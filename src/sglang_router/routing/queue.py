"""The queue: which requests may begin now, which wait and for what, which are refused; one queue for all reasons.

    why_wait, check_length, take_token     may a new request begin? If not: QueueFull, TooManyWaiting, RateLimited (429)
    begin(number)                          the request begins: it takes a place, where places are limited
    wait(number, item, line, why)          the request is queued:

        why     for                                            bound on the queue    longest wait
        PLACE   one of --max-concurrent-requests places        --queue-size          --queue-timeout-secs
        ROOM    a worker with room (--max-running-per-worker)  --queue-size          --queue-timeout-secs
        START   a worker that is still starting                4,096                 --startup-wait-secs
        PAUSED  a worker that is paused (docs/rl.md)           65,536                --rl-control-timeout-secs
        SESSION room for a new session (--session-admission)   --queue-size          --session-wait-secs

    first(...), remove(number)             the next request to begin; take a request out of the queue
    leave(number)                          the request ended: its place is free

Sessions that wait have a line of their own, and do not count for the others' bound.

First come, first served: a new request is queued after those of its line (its pool of workers), and after all that wait
for a place. A queued request holds no place. Requests are identified by their number (RequestTag.number).

The rate limit is a token bucket, stored as one number (GCRA, the virtual scheduling of ITU-T I.371): the moment when
the bucket will be full again. A request takes its token when it arrives, whether it then begins or is queued.

Retry-After is the time until all requests that are queued now will have begun, at the rate at which requests ended
lately.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Final, Generic, TypeVar

from sglang_router.errors import QueueFull, RateLimited, SessionsFull, TooManyWaiting
from sglang_router.routing.rules import QueueRules

T = TypeVar("T")

PLACE, ROOM, START, SESSION, PAUSED = "place", "room", "start", "session", "paused"
"""What a queued request waits for."""

_WEIGHT: Final = 1 / 16
"""Weight of the latest pause between two ends in the mean pause."""
_LONGEST: Final = 60.0
"""Longest Retry-After, in seconds: an estimate further ahead is not reliable."""
_ROUNDING: Final = 1e-6
"""Tolerance for rounding errors, in seconds, so that requests at exactly the rate limit pass."""


class TokenBucket:
    """A token bucket, full at the start.

    rate   tokens added per second
    burst  most tokens in it, at least 1; None: those of one second
    """

    __slots__ = ("_full_at", "_interval", "_slack")

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._interval = 1.0 / rate
        self._slack = (max(1.0, rate if burst is None else burst) - 1.0) * self._interval
        self._full_at = -math.inf

    def take(self, now: float) -> float:
        """Take a token and return 0.0; when there is none, return the seconds until there is one."""
        full_at = max(self._full_at, now)
        missing = full_at - now - self._slack
        if missing > _ROUNDING:
            return missing
        self._full_at = full_at + self._interval
        return 0.0


class Queued(Generic[T]):
    """A request in the queue.

    number  of the request
    item    what its owner needs to start it later
    line    requests of one line begin in order; those of other lines may overtake them
    why     PLACE, ROOM, START, SESSION or PAUSED
    since   when it was queued; seconds of the router's clock
    until   when it has waited too long
    """

    __slots__ = ("item", "line", "number", "since", "until", "why")

    def __init__(self, number: int, item: T, line: Hashable, why: str, since: float, until: float) -> None:
        self.number = number
        self.item = item
        self.line = line
        self.why = why
        self.since = since
        self.until = until

    def __repr__(self) -> str:
        return f"<Queued {self.number} for {self.why} since {self.since:.3f} until {self.until:.3f}>"


class Queue(Generic[T]):
    """See the module.

    idle     no limit is set and no request is queued: a request that finds a worker need not use the queue
    refused  number of refusals since the start, by error code
    rules    the limits
    """

    __slots__ = (
        "_bucket",
        "_busy_since",
        "_for_place",
        "_for_session",
        "_lines",
        "_most",
        "_pause",
        "_queued",
        "_running",
        "idle",
        "refused",
        "rules",
    )

    def __init__(self, rules: QueueRules) -> None:
        self.rules = rules
        self.refused = {RateLimited.code: 0, QueueFull.code: 0, TooManyWaiting.code: 0, SessionsFull.code: 0}
        self._queued: dict[int, Queued[T]] = {}
        # A dict keeps the order too, but to find its first key it skips all keys deleted before it: with 100,000
        # requests queued, removing one and adding one costs 17 us with a dict, 3 us with an OrderedDict.
        self._lines: dict[Hashable, OrderedDict[int, Queued[T]]] = {}
        self._for_place = 0  # queued requests that wait for a place
        self._for_session = 0  # those that wait to begin a session
        self._running: set[int] = set()  # requests that have a place, where places are limited
        self._most = math.inf if rules.max_concurrent is None else rules.max_concurrent
        self._bucket = None if rules.rate is None else TokenBucket(rules.rate, rules.burst)
        self._pause = 0.0  # mean seconds between two ends while requests are queued or all places are taken
        self._busy_since = 0.0  # the last end, or when the queue or the last place filled, whichever was later
        self.idle = not self.limited

    def __repr__(self) -> str:
        return f"<Queue {self.running} of {self._most} running, {len(self)} queued>"

    def __len__(self) -> int:
        return len(self._queued)

    def __iter__(self) -> Iterator[Queued[T]]:
        """Iterate over a copy of the queue, in the order of arrival; the queue may change meanwhile. O(n)."""
        return iter(list(self._queued.values()))

    @property
    def limited(self) -> bool:
        """Whether places or the rate are limited."""
        return self._most < math.inf or self._bucket is not None

    @property
    def running(self) -> int:
        """Number of requests that have a place; 0 where places are not limited."""
        return len(self._running)

    @property
    def sessions(self) -> int:
        """Number of queued requests that wait to begin a session."""
        return self._for_session

    @property
    def has_place(self) -> bool:
        """Whether a place is free."""
        return len(self._running) < self._most

    # -- new requests --------------------------------------------------------------------------------------------------

    def why_wait(self, line: Hashable) -> str:
        """Return why a new request must be queued even if a worker is free; "" when it need not.

        PLACE when no place is free or others wait for one, else the reason of the last request of its line.
        """
        if self._for_place or not self.has_place:
            return PLACE
        ahead = self._lines.get(line)
        return "" if ahead is None else ahead[next(reversed(ahead))].why

    def check_length(self, why: str, now: float) -> None:
        """Refuse a new request that would have to wait when the queue is full.

        Raises: QueueFull, TooManyWaiting, SessionsFull (429), with `retry_after`.
        """
        others = len(self._queued) - self._for_session
        if why == SESSION:
            if self._for_session >= self.rules.queue_size:
                self.refused[SessionsFull.code] += 1
                raise SessionsFull(retry_after=self.retry_after(now))
        elif why in (START, PAUSED):
            # No more may wait for a start than could run or wait afterwards.
            most = self.rules.most_starting if why == START else self.rules.most_paused
            if others >= min(most, self._most + self.rules.queue_size):
                self.refused[TooManyWaiting.code] += 1
                raise TooManyWaiting(retry_after=5.0)
        elif others >= self.rules.queue_size:
            self.refused[QueueFull.code] += 1
            raise QueueFull(retry_after=self.retry_after(now))

    def take_token(self, now: float) -> None:
        """Take a token, where the rate is limited.

        Raises: RateLimited (429), with `retry_after`.
        """
        missing = 0.0 if self._bucket is None else self._bucket.take(now)
        if missing:
            self.refused[RateLimited.code] += 1
            raise RateLimited(retry_after=missing)

    def begin(self, number: int, now: float) -> None:
        """Give a request a place, where places are limited."""
        if self._most < math.inf:
            self._running.add(number)
            if len(self._running) == self._most:
                self._busy_since = now

    def wait(self, number: int, item: T, line: Hashable, why: str, now: float) -> Queued[T]:
        """Queue a request, as the last one of its line."""
        queued = Queued(number, item, line, why, now, now + self._patience(why))
        if not self._queued and self.has_place:
            self._busy_since = now
        self._queued[number] = queued
        self._lines.setdefault(line, OrderedDict())[number] = queued
        self._for_place += why == PLACE
        self._for_session += why == SESSION
        self.idle = False
        return queued

    def now_for(self, queued: Queued[T], why: str) -> bool:
        """Change the reason why a request waits, and so its deadline; return False when it is the same."""
        if queued.why == why:
            return False
        self._for_place += (why == PLACE) - (queued.why == PLACE)
        self._for_session += (why == SESSION) - (queued.why == SESSION)
        queued.why = why
        queued.until = queued.since + self._patience(why)
        return True

    def line_waits_for(self, line: Hashable, why: str) -> list[Queued[T]]:
        """Make all requests of a line wait for this reason; return those that waited for another one before.

        Call it while a place is free, so that no request of the line waits for a place any more. The requests of a line
        all wait for the same reason, or for a place, so checking the first one is usually enough.
        """
        queue = self._lines[line]
        if not self._for_place and queue[next(iter(queue))].why == why:
            return []
        return [queued for queued in queue.values() if self.now_for(queued, why)]

    def regroup(self, line_of: Callable[[T], Hashable]) -> None:
        """Move each request to the line of its item, after lines were added or removed. The order remains.

        line_of  returns the line of an item

        A request that changes its line waits for a place until it is known what that line waits for.
        """
        lines: dict[Hashable, OrderedDict[int, Queued[T]]] = {}
        for number, queued in self._queued.items():
            line = line_of(queued.item)
            if line != queued.line:
                queued.line = line
                self.now_for(queued, PLACE)
            lines.setdefault(line, OrderedDict())[number] = queued
        self._lines = lines

    def rejoin(self, line: Hashable, other: Hashable, moves: Callable[[T], bool]) -> bool:
        """Move some requests of a line to another line, in the order of arrival; return whether there are any. O(n)

        moves  returns whether an item moves

        They wait for a place until it is known what the other line waits for.
        """
        waiting = self._lines.get(line, OrderedDict())
        moved = [queued for queued in waiting.values() if moves(queued.item)]
        if not moved:
            return False
        joined = self._lines.get(other, OrderedDict())
        for queued in moved:
            del waiting[queued.number]
            queued.line = other
            self.now_for(queued, PLACE)
            joined[queued.number] = queued
        self._lines[other] = OrderedDict(sorted(joined.items()))
        if not waiting:
            del self._lines[line]
        return True

    def _patience(self, why: str) -> float:
        if why == SESSION:
            return self.rules.session_timeout
        if why == PAUSED:
            return self.rules.paused_timeout
        return self.rules.start_timeout if why == START else self.rules.queue_timeout

    # -- queued and running requests -----------------------------------------------------------------------------------

    def first(self, passed_over: Collection[Hashable]) -> Queued[T] | None:
        """Return the oldest request of the lines that are not passed over; None when there is none."""
        heads = [line[next(iter(line))] for name, line in self._lines.items() if name not in passed_over]
        return min(heads, key=_number, default=None)

    def remove(self, number: int) -> Queued[T] | None:
        """Take a request out of the queue, at any position; return None when it is not there."""
        queued = self._queued.pop(number, None)
        if queued is not None:
            line = self._lines[queued.line]
            del line[number]
            if not line:
                del self._lines[queued.line]
            self._for_place -= queued.why == PLACE
            self._for_session -= queued.why == SESSION
            self.idle = not self._queued and not self.limited
        return queued

    def leave(self, number: int, now: float) -> None:
        """Free the place of a request that ended. A second call frees nothing more."""
        running = self._running
        if self._queued or len(running) == self._most:  # busy, so this pause tells how fast places become free
            pause = now - self._busy_since
            self._pause += (pause - self._pause) * (_WEIGHT if self._pause else 1.0)
            self._busy_since = now
        running.discard(number)

    def retry_after(self, now: float) -> float:
        """Return the estimated seconds until all requests queued now will have begun, for Retry-After."""
        pause = max(self._pause, now - self._busy_since)
        return min(max(pause * (len(self._queued) + 1), 1.0), _LONGEST)


def _number(queued: Queued[T]) -> int:
    return queued.number
