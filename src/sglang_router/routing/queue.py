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

By priority, and first come, first served within one: a new request is queued after those of its line (its pool of
workers) that begin before it (`routing.line`), and so are those that wait for a place. A queued request holds no place.
Requests are identified by their number (RequestTag.number).

When the queue is full, a request of a higher priority takes the slot of the newest one of the lowest priority, which is
refused in its place.

The rate limit is a token bucket (`routing.token_bucket`). A request takes its token when it arrives, whether it then
begins or is queued.

Retry-After is the time until all requests that are queued now will have begun, at the rate at which requests ended
lately; those of a lower priority than the refused one are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Final, Generic, TypeVar

from sglang_router.errors import Overload, QueueFull, RateLimited, SessionsFull, TooManyWaiting
from sglang_router.routing.line import MIXED, Line, Queued, order_of
from sglang_router.routing.rules import QueueRules
from sglang_router.routing.token_bucket import TokenBucket

T = TypeVar("T")

PLACE, ROOM, START, SESSION, PAUSED = "place", "room", "start", "session", "paused"
"""What a queued request waits for."""

_WEIGHT: Final = 1 / 16
"""Weight of the latest pause between two ends in the mean pause."""
_LONGEST: Final = 60.0
"""Longest Retry-After, in seconds: an estimate further ahead is not reliable."""


class Queue(Generic[T]):
    """See the module.

    idle     no limit is set and no request is queued: a request that finds a worker need not use the queue
    refused  number of refusals since the start, by error code
    rules    the limits
    """

    __slots__ = (
        "_bucket",
        "_busy_since",
        "_by_priority",
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
        self._lines: dict[Hashable, Line[T]] = {}  # none is empty
        self._by_priority: dict[int, int] = {}  # number of queued requests
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

    def use(self, rules: QueueRules, running: Iterable[int]) -> None:
        """Let other limits count from now on; what is queued stays so. running: the requests that have begun.

        The bucket of the rate limit stays as full as it is, unless the rate changes: then it is full.
        """
        if (rules.rate, rules.burst) != (self.rules.rate, self.rules.burst):
            self._bucket = None if rules.rate is None else TokenBucket(rules.rate, rules.burst)
        self.rules = rules
        self._most = math.inf if rules.max_concurrent is None else rules.max_concurrent
        self._running = set() if rules.max_concurrent is None else set(running)
        self.idle = not self._queued and not self.limited

    # -- new requests --------------------------------------------------------------------------------------------------

    def rank(self, priority: int, now: float) -> float:
        """Return the rank of a request that is queued now, see `routing.line`."""
        return now - priority * self.rules.aging

    def why_wait(self, line: Hashable, rank: float = math.inf) -> str:
        """Return why a new request must be queued even if a worker is free; "" when it need not.

        PLACE when no place is free or others wait for one, else the reason of those of its line that begin before it.

        rank  of the new request; infinity: all of its line begin before it
        """
        if self._for_place or not self.has_place:
            return PLACE
        ahead = self._lines.get(line)
        other = None if ahead is None else ahead.before(rank)
        return "" if other is None else other.why

    def check_length(self, why: str, now: float, priority: int = 0) -> Queued[T] | None:
        """Find a slot for a new request that has to wait: None when the queue is not full, else the request that must
        give its slot up (`give_up`).

        Raises: QueueFull, TooManyWaiting, SessionsFull (429), with `retry_after`, when there is none.
        """
        others = len(self._queued) - self._for_session
        if why == SESSION:
            full = self._for_session >= self.rules.queue_size
        elif why in (START, PAUSED):
            # No more may wait for a start than could run or wait afterwards.
            most = self.rules.most_starting if why == START else self.rules.most_paused
            full = others >= min(most, self._most + self.rules.queue_size)
        else:
            full = others >= self.rules.queue_size
        if not full:
            return None
        lower = self._newest_below(priority, why == SESSION)
        if lower is None:
            raise self._full(why, now, priority)
        return lower

    def _newest_below(self, priority: int, session: bool) -> Queued[T] | None:
        """Return the newest request of the lowest priority below this one, of those that count for the same bound."""
        if min(self._by_priority, default=priority) >= priority:
            return None
        lowest = [line.lowest() for line in self._lines.values()]
        found = [each for each in lowest if each.priority < priority and (each.why == SESSION) is session]
        return max(found, key=lambda each: (-each.priority, each.number), default=None)

    def _full(self, why: str, now: float, priority: int) -> Overload:
        """Count a refusal for a full queue; return its error."""
        error: Overload
        if why in (START, PAUSED):
            error = TooManyWaiting(retry_after=5.0)
        else:
            estimate = self.retry_after(now, priority)
            error = SessionsFull(retry_after=estimate) if why == SESSION else QueueFull(retry_after=estimate)
        self.refused[error.code] += 1
        return error

    def give_up(self, queued: Queued[T], now: float) -> Overload:
        """Take a request out of the queue, for one of a higher priority; return the error that answers it."""
        self.remove(queued.number)
        return self._full(queued.why, now, queued.priority)

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

    def wait(self, number: int, item: T, line: Hashable, why: str, now: float, priority: int = 0) -> Queued[T]:
        """Queue a request, as the last one of its priority in its line."""
        until = now + self._patience(why)
        queued = Queued(number, item, line, why, now, until, priority, self.rank(priority, now))
        if not self._queued and self.has_place:
            self._busy_since = now
        self._queued[number] = queued
        waiting = self._lines.get(line)
        if waiting is None:
            waiting = self._lines[line] = Line()
        waiting.add(queued)
        self._by_priority[priority] = self._by_priority.get(priority, 0) + 1
        self._for_place += why == PLACE
        self._for_session += why == SESSION
        self.idle = False
        return queued

    def now_for(self, queued: Queued[T], why: str) -> bool:
        """Change the reason why a request waits, and so its deadline; return False when it is the same."""
        if queued.why == why:
            return False
        line = self._lines.get(queued.line)
        if line is not None:
            line.why = MIXED
        self._for_place += (why == PLACE) - (queued.why == PLACE)
        self._for_session += (why == SESSION) - (queued.why == SESSION)
        queued.why = why
        queued.until = queued.since + self._patience(why)
        return True

    def line_waits_for(self, line: Hashable, why: str) -> list[Queued[T]]:
        """Make all requests of a line wait for this reason; return those that waited for another one before.

        Call it while a place is free. Usually all of them wait for one reason, which is known without a look at each.
        """
        queue = self._lines[line]
        if queue.why == why:
            return []
        changed = [queued for queued in queue if self.now_for(queued, why)]
        queue.why = why
        return changed

    def regroup(self, line_of: Callable[[T], Hashable]) -> None:
        """Move each request to the line of its item, after lines were added or removed. The order remains.

        line_of  returns the line of an item

        A request that changes its line waits for a place until it is known what that line waits for.
        """
        lines: dict[Hashable, Line[T]] = {}
        for queued in sorted(self._queued.values(), key=order_of):
            line = line_of(queued.item)
            if line != queued.line:
                self.now_for(queued, PLACE)
                queued.line = line
            lines.setdefault(line, Line()).add(queued)
        self._lines = lines

    def rejoin(self, line: Hashable, other: Hashable, moves: Callable[[T], bool]) -> bool:
        """Move some requests of a line to another line, in their order; return whether there are any. O(n)

        moves  returns whether an item moves

        They wait for a place until it is known what the other line waits for.
        """
        waiting: Line[T] = self._lines.get(line, Line())
        moved = [queued for queued in waiting if moves(queued.item)]
        if not moved:
            return False
        for queued in moved:
            waiting.remove(queued)
            self.now_for(queued, PLACE)
            queued.line = other
        joined: Line[T] = self._lines.get(other, Line())
        self._lines[other] = Line(sorted([*joined, *moved], key=order_of))
        if not len(waiting):
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
        """Return the request that begins next, of the lines that are not passed over; None when there is none."""
        heads = [line.first() for name, line in self._lines.items() if name not in passed_over]
        return min(heads, key=order_of, default=None)

    def remove(self, number: int) -> Queued[T] | None:
        """Take a request out of the queue, at any position; return None when it is not there."""
        queued = self._queued.pop(number, None)
        if queued is not None:
            line = self._lines[queued.line]
            line.remove(queued)
            if not len(line):
                del self._lines[queued.line]
            left = self._by_priority[queued.priority] - 1
            if left:
                self._by_priority[queued.priority] = left
            else:
                del self._by_priority[queued.priority]
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

    def retry_after(self, now: float, priority: int = 0) -> float:
        """Return the estimated seconds until all requests queued now that a new one of this priority would not overtake
        will have begun, for Retry-After."""
        pause = max(self._pause, now - self._busy_since)
        ahead = sum(count for each, count in self._by_priority.items() if each >= priority)
        return min(max(pause * (ahead + 1), 1.0), _LONGEST)
