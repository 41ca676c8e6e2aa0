"""The request-body budget: limit the bytes of requests that the router holds, over all clients of a port.

    hold = budget.hold()      one per client connection
    hold.grow(n)              n bytes arrived
    hold.release()            give them back; a second call gives back nothing more

When the budget is exhausted, a connection in the middle of a body stops reading and is queued with `park`. As bytes are
released, parked connections read again, first come, first served.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Parked(Protocol):
    """A connection that does not read because the budget is exhausted."""

    def read_on(self) -> None:
        """Read again."""


class ByteBudget:
    """See the module.

    held   bytes held by all connections
    limit  bytes above which the budget is exhausted
    """

    __slots__ = ("_parked", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._parked: OrderedDict[Parked, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.held} of {self.limit} bytes, {len(self._parked)} parked>"

    @property
    def exhausted(self) -> bool:
        """Whether more bytes are held than the limit allows."""
        return self.held > self.limit

    def hold(self) -> Hold:
        """Return an empty hold for a connection."""
        return Hold(self)

    def park(self, connection: Parked) -> None:
        """Queue a connection until the budget has room."""
        self._parked[connection] = None

    def unpark(self, connection: Parked) -> None:
        """Remove a connection from the queue; do nothing when it is not there."""
        self._parked.pop(connection, None)

    def read_on(self) -> None:
        """Let the first parked connection read again, if the budget has room."""
        if self._parked and self.held < self.limit:
            connection, _ = self._parked.popitem(last=False)
            connection.read_on()


class Hold:
    """The part of a budget that one connection holds. size: in bytes."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.size = 0

    def __repr__(self) -> str:
        return f"<Hold {self.size} bytes>"

    def grow(self, size: int) -> None:
        """Add bytes that arrived."""
        self.size += size
        self._budget.held += size

    def release(self) -> None:
        """Give back all bytes, and let the next parked connection read."""
        budget = self._budget
        budget.held -= self.size
        self.size = 0
        if budget._parked:
            budget.read_on()
