"""The request-body budget: limit the bytes of requests that the router holds, over all clients of a port.

    hold = budget.hold(connection)       one per client connection
    hold.grow(n)                         n bytes arrived
    hold.admits(length, received, now)   may this body be read on? False: wait, unread, until `connection.read_on()`
    hold.complete(size)                  the whole body is here
    hold.release()                       the answer is written, or the connection closed

A large body (more than `SMALL` bytes) is admitted before it is read: its announced length must fit beside what was
admitted before; what does not fit waits in line, unread, first come, first served. So what was admitted always ends.
If all bodies were read in step instead, all would stop half-way when the budget is full, and none could end.

    state       what is counted                            as        bounded by
    PLAIN       what arrived                               small     SMALL and a head for each connection
    SMALL_BODY  what arrived of an incomplete small body   small     the same
    IN_LINE     what came together with the head           in line   one read of each connection
    HELD        the length of a complete body              large     `limit`, less an eighth, or less what is small
    ADMITTED    the announced length                       large     the same
    PAUSED      what was reserved so far                   large     the same

    from / to    PLAIN  SMALL_BODY  IN_LINE  HELD  ADMITTED  PAUSED
    PLAIN                   x          x               x
    SMALL_BODY     x                   x               x
    IN_LINE        x                                   x
    HELD           x
    ADMITTED       x                           x                 x
    PAUSED         x                                   x             (the table is `relay.moves.HOLD_MOVES`)

Small bodies always have room: they cost about as much as their connection. An eighth of the limit is theirs; when they
need more, large bodies get less. One large body alone may take the whole limit.

A chunked body does not announce its length. Once it is large, it reserves what recent ones needed, and more as it
grows. If there is no room it is PAUSED; those are served before the line. The oldest of them always reads on, even
above the limit: otherwise several that wait for each other could fill the budget for ever.

Pace: a body is late when it takes longer than a grace and one second for each `rate` bytes that have arrived. While
others wait for the budget, `late` lists the large bodies that are later than `GRACE`, the slowest first.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from typing import Final, Protocol

from sglang_router.relay.moves import HOLD_MOVES, IllegalMove
from sglang_router.relay.states import ADMITTED, HELD, IN_LINE, PAUSED, PLAIN, SMALL_BODY, HoldState

SMALL: Final = 65536
"""Bytes of a body up to which it never waits."""
GRACE: Final = 5.0
"""Seconds of slowness that a body may have while others wait for the budget."""
_STEP: Final = 262144
"""Most bytes that a growing body reserves beyond what has arrived, while it is small."""
_SHARES: Final = (0, 0, 2, 1, 1, 1)
"""By state of a hold: whether its bytes count as small (0), large (1) or in line (2)."""


class Reader(Protocol):
    """A client connection, as the budget sees it."""

    def read_on(self) -> None:
        """Read the body, or the rest of it: it is admitted."""

    def overdue(self, now: float) -> None:
        """Refuse the body: the client sends it too slowly."""


class ByteBudget:
    """See the module.

    limit  bytes that large bodies and the reserve of small ones may take together
    rate   bytes per second that a client should send of a body; 0: any
    """

    __slots__ = (
        "_ages",
        "_expected",
        "_growing",
        "_line",
        "_paused",
        "_reading",
        "_reserve",
        "_shares",
        "_step",
        "limit",
        "rate",
    )

    def __init__(self, limit: int, rate: int = 16_000) -> None:
        self.limit = limit
        self.rate = rate
        self._reserve = limit // 8
        self._shares = [0, 0, 0]  # bytes that count as small, large, in line
        self._line: OrderedDict[Hold, None] = OrderedDict()  # IN_LINE
        self._reading: dict[Hold, None] = {}  # ADMITTED
        self._growing: OrderedDict[Hold, None] = OrderedDict()  # incomplete chunked bodies: ADMITTED or PAUSED; by age
        self._paused: list[tuple[int, Hold]] = []  # PAUSED: a heap by age
        self._step = min(_STEP, limit // 16)
        self._expected = self._step  # bytes of recent chunked bodies
        self._ages = 0  # growing bodies so far

    def __repr__(self) -> str:
        small, large, line = self._shares
        return (
            f"<ByteBudget {small} bytes small, {large} large of {self.limit}, {len(self._growing)} growing,"
            f" {len(self._line)} in line with {line}>"
        )

    @property
    def held(self) -> int:
        """Bytes counted for all connections."""
        return sum(self._shares)

    @property
    def short(self) -> bool:
        """Whether a body waits."""
        return bool(self._line or self._paused)

    def hold(self, reader: Reader) -> Hold:
        """Return an empty hold for a connection."""
        return Hold(self, reader)

    def late(self, now: float) -> list[Hold]:
        """Return the large bodies that are slower than allowed while others wait, the slowest first."""
        return sorted((each for each in self._reading if each.due(GRACE) < now), key=lambda each: each.due(GRACE))

    # -- room ----------------------------------------------------------------------------------------------------------

    def _fits(self, more: int) -> bool:
        small, large, _ = self._shares
        room = self.limit - max(self._reserve, small)
        return large + more <= room or not large

    def _enter(self, hold: Hold, need: int, grows: bool) -> bool:
        """Admit a body, or put it at the end of the line."""
        hold.need, hold.grows = need, grows
        if not self.short and self._fits(need):
            self._admit(hold)
            return True
        hold.move(IN_LINE)
        self._line[hold] = None
        return False

    def _admit(self, hold: Hold) -> None:
        """Reserve what a body needs: a new one, or one that was paused."""
        hold.move(ADMITTED)
        hold.resize(max(hold.need, hold.size))
        hold.since = -math.inf  # unknown, until the connection says when it reads
        self._reading[hold] = None
        if hold.grows and hold not in self._growing:
            self._ages += 1
            hold.age = self._ages
            self._growing[hold] = None

    def _extend(self, hold: Hold, need: int) -> bool:
        """Reserve more for a growing body, or pause it."""
        hold.need = need + max(self._step, need >> 2)
        if self._may_grow(hold):
            hold.resize(hold.need)
            return True
        hold.move(PAUSED)
        del self._reading[hold]
        heapq.heappush(self._paused, (hold.age, hold))
        return False

    def _may_grow(self, hold: Hold) -> bool:
        return self._fits(hold.need - hold.size) or next(iter(self._growing)) is hold

    def wake(self) -> None:
        """Let those that wait read, as far as there is room: growing bodies by age, then the line in order."""
        while self.short:
            if self._paused:
                hold = self._paused[0][1]
                if not self._may_grow(hold):
                    return
                heapq.heappop(self._paused)
            else:
                hold = next(iter(self._line))
                if not self._fits(hold.need):
                    return
                del self._line[hold]
            self._admit(hold)
            hold.reader.read_on()

    def leave(self, hold: Hold) -> None:
        """Forget where the hold of a large body stands; its bytes stay counted."""
        self._line.pop(hold, None)
        self._reading.pop(hold, None)
        self._growing.pop(hold, None)
        if hold.state is PAUSED:
            self._paused.remove((hold.age, hold))
            heapq.heapify(self._paused)

    def grown(self, size: int) -> None:
        """Learn how large chunked bodies are."""
        self._expected += (min(size, self._reserve) - self._expected) // 8

    def expect(self, received: int) -> int:
        """Return what a chunked body should reserve, of which so much has arrived."""
        return max(self._expected, received + self._step)


class Hold:
    """The part of a budget that one connection holds.

    size     bytes counted
    reader   the connection
    state    see the table of the module
    need     IN_LINE and PAUSED: the size that it waits for
    grows    the body is chunked
    age      of a growing body: smaller is older
    since    seconds of the clock when reading of the body began; what arrived before is not measured
    """

    __slots__ = (
        "_base",
        "_budget",
        "_received",
        "_share",
        "_shares",
        "age",
        "grows",
        "need",
        "reader",
        "since",
        "size",
        "state",
    )

    def __init__(self, budget: ByteBudget, reader: Reader) -> None:
        self._budget = budget
        self._shares = budget._shares
        self._share = 0  # what the bytes count as
        self.reader = reader
        self.size = 0
        self.state: HoldState = PLAIN
        # of an incomplete or large body
        self.need = 0
        self.grows = False
        self.age = 0
        self.since = -math.inf
        self._received = 0  # bytes of the body
        self._base = 0  # of these, before `since`

    def __repr__(self) -> str:
        waits = f", waits for {self.need}" if self.state in (IN_LINE, PAUSED) else ""
        return f"<Hold {self.state.name} {self.size} bytes{waits}>"

    def grow(self, size: int) -> None:
        """Add bytes that arrived and were not reserved before."""
        self.size += size
        self._shares[self._share] += size

    def resize(self, size: int) -> None:
        """Count this many bytes."""
        self._shares[self._share] += size - self.size
        self.size = size

    def move(self, state: HoldState) -> None:
        """Change the state, and what the bytes count as."""
        if not HOLD_MOVES[self.state] >> state & 1:
            raise IllegalMove(f"{state.name} in {self!r}")
        self._shares[self._share] -= self.size
        self._share = _SHARES[state]
        self._shares[self._share] += self.size
        self.state = state

    def begin(self, now: float) -> None:
        """Note that a part of a small body is here, and the rest is awaited from now on."""
        self.state = SMALL_BODY
        self.since = now
        self._received = self._base = 0

    def admits(self, length: int, received: int, now: float) -> bool:
        """Return whether a body may be read on. If not, `read_on` of the connection is called later.

        length    the announced length; -1: the body is chunked
        received  bytes of it that are here
        """
        if self.size < received and self.state is PLAIN:  # it came behind another request, whose end released it
            self.grow(received - self.size)
        self._received = received
        need = max(length, received)
        if self.state is IN_LINE or self.state is PAUSED:
            return False
        if need > SMALL and self.state is not ADMITTED:
            if self.state is SMALL_BODY:
                self.complete(received)
            grows = length < 0
            if not self._budget._enter(self, self._budget.expect(received) if grows else need, grows):
                return False
        elif need > self.size and self.state is ADMITTED and not self._budget._extend(self, need):
            return False
        if self.since == -math.inf:
            self.since, self._base = now, received
            if self.state is PLAIN:
                self.begin(now)
                self._received = self._base = received
        return True

    def due(self, grace: float) -> float:
        """Return when the body, as far as it has come, is later than `grace` allows; the client then is too slow."""
        rate = self._budget.rate
        if not rate or self.since == -math.inf or self.state not in (SMALL_BODY, ADMITTED):
            return math.inf
        return self.since + grace + (self._received - self._base) / rate

    def complete(self, size: int) -> None:
        """Note that the whole body is here: nothing more is reserved, and it waits for no client."""
        self.since = -math.inf
        if self.state is SMALL_BODY:
            self.state = PLAIN
        elif self.state is ADMITTED:
            budget = self._budget
            budget.leave(self)
            self.move(HELD)
            if self.grows:
                budget.grown(size)
                self.resize(size)
                budget.wake()

    def release(self) -> None:
        """Give back all bytes, and let others read."""
        budget = self._budget
        self._shares[self._share] -= self.size
        self.size = 0
        if self.state:
            budget.leave(self)
            self.move(PLAIN)
            self.since = -math.inf
        if budget._line or budget._paused:
            budget.wake()
