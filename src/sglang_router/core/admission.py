"""Admission: who may begin now, who waits, who is refused.

    enter(ticket, now) --> all places taken and the queue full  --> QueueFull     429, Retry-After
                       --> no token in the bucket               --> RateLimited   429, Retry-After
                       --> a place is free                      --> True: begin
                       '-> no place is free                     --> False: it waits

    leave(ticket, now)     a running one ended: its place passes to the first that waits, which is returned
                           a waiting one's client left: its place in the queue is free at once
                           anyone else: nothing, so that leaving twice does no harm

Who has waited too long is told so by its own connection, whose deadline that is, and leaves.

A place is handed over, never free for a moment, so nobody overtakes: while one waits, all places are taken. The limit
on places and the limit on rate know nothing of each other; one request takes one place and one token.

The bucket is kept as one number (GCRA, the virtual scheduling of ITU-T I.371): the moment when it will be full again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from sglang_router.errors import QueueFull, RateLimited

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T", bound=Hashable)

_WEIGHT = 1 / 16
"""Share of the newest departure in the mean pause between two."""
_LONGEST = 60.0
"""Seconds; the longest Retry-After told: nobody knows more of the future."""
_ROUNDING = 1e-6
"""Seconds; what sums of floats may be off, so that requests at exactly the rate pass."""


class AdmissionRules(msgspec.Struct, frozen=True):
    """What is allowed; None: no limit.

    max_concurrent  requests under way at once, >= 1
    queue_size      requests that may wait; 0: none
    rate            requests per second, > 0
    burst           requests that may come at once after a pause, >= 1; None: one second's worth
    """

    max_concurrent: int | None = None
    queue_size: int = 100
    rate: float | None = None
    burst: float | None = None


class Waiting(Generic[T]):
    """First in, first out, `size` tickets at most; each operation takes the same time however many wait."""

    # A plain dict keeps the order too, but finds its first key only past all that were deleted before it: with 100,000
    # waiting, taking one and adding one costs 17 us in a dict, 3 us here.
    __slots__ = ("_tickets", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._tickets: OrderedDict[T, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[T]:
        return iter(self._tickets)

    def __contains__(self, ticket: T) -> bool:
        return ticket in self._tickets

    def __repr__(self) -> str:
        return f"<Waiting {len(self)} of {self.size}>"

    @property
    def full(self) -> bool:
        return len(self._tickets) >= self.size

    def add(self, ticket: T) -> bool:
        """Puts a new ticket at the end; False when there is no room."""
        if len(self._tickets) >= self.size:
            return False
        self._tickets[ticket] = True
        return True

    def remove(self, ticket: T) -> bool:
        """Takes one out, wherever it stands; False when it does not wait."""
        return self._tickets.pop(ticket, False)

    def pop(self) -> T:
        """Takes the first one out. Raises: KeyError when none waits."""
        return self._tickets.popitem(last=False)[0]


class TokenBucket:
    """`rate` tokens per second flow in, `burst` fit in; it begins full."""

    __slots__ = ("_full_at", "_interval", "_slack")

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._interval = 1.0 / rate
        self._slack = (max(1.0, rate if burst is None else burst) - 1.0) * self._interval
        self._full_at = -math.inf

    def take(self, now: float) -> float:
        """Takes a token and gives 0.0; or takes none and gives the seconds until there is one."""
        full_at = self._full_at
        if full_at < now:
            full_at = now
        missing = full_at - now - self._slack
        if missing > _ROUNDING:
            return missing
        self._full_at = full_at + self._interval
        return 0.0


class Admission(Generic[T]):
    """Lets tickets in by the rules; see the module. A ticket is whatever stands for one request, and enters once.

    waiting  those who wait, in order; only to be read
    refused  refusals by error code since the start
    """

    __slots__ = ("_bucket", "_busy_since", "_limited", "_most", "_pause", "_running", "refused", "rules", "waiting")

    def __init__(self, rules: AdmissionRules) -> None:
        self.rules = rules
        self.waiting: Waiting[T] = Waiting(rules.queue_size)
        self.refused = {RateLimited.code: 0, QueueFull.code: 0}
        self._running: set[T] = set()
        self._most = math.inf if rules.max_concurrent is None else rules.max_concurrent
        self._bucket = None if rules.rate is None else TokenBucket(rules.rate, rules.burst)
        self._limited = self._bucket is not None or self._most < math.inf
        self._pause = 0.0  # mean seconds between two departures while all places are taken
        self._busy_since = 0.0  # the last departure, or when the last place was taken, whichever was later

    def __repr__(self) -> str:
        return f"<Admission {self.running} of {self._most} running, {len(self.waiting)} waiting>"

    @property
    def running(self) -> int:
        return len(self._running)

    def enter(self, ticket: T, now: float) -> bool:
        """Lets a new ticket begin (True) or wait (False).

        Raises: QueueFull, RateLimited (429), with `retry_after`; the ticket is not in then.
        """
        running = self._running
        if not self._limited:
            running.add(ticket)
            return True
        begins = len(running) < self._most
        if not begins and self.waiting.full:
            self.refused[QueueFull.code] += 1
            raise QueueFull(retry_after=self.wait(now))
        if self._bucket is not None:
            missing = self._bucket.take(now)
            if missing:
                self.refused[RateLimited.code] += 1
                raise RateLimited(retry_after=missing)
        if begins:
            running.add(ticket)
            if len(running) == self._most:
                self._busy_since = now
        else:
            self.waiting.add(ticket)
        return begins

    def leave(self, ticket: T, now: float) -> T | None:
        """Ends a ticket that runs or waits. Returns the one that runs in its place from now on, if one waited."""
        running = self._running
        if ticket not in running:
            self.waiting.remove(ticket)
            return None
        if len(running) == self._most:
            pause = now - self._busy_since
            self._pause += (pause - self._pause) * (_WEIGHT if self._pause else 1.0)
            self._busy_since = now
        running.remove(ticket)
        if not self.waiting:
            return None
        following = self.waiting.pop()
        running.add(following)
        return following

    def wait(self, now: float) -> float:
        """Seconds until those who wait now will have begun, by the pace of late: what Retry-After should say."""
        pause = max(self._pause, now - self._busy_since)
        return min(max(pause * (len(self.waiting) + 1), 1.0), _LONGEST)
