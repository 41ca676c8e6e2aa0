"""How many requests a worker runs at once, as its engine tells: a decode worker never gets more of them.

    limit = the engine's window (max_running_requests) - what others run there, but at least 1

A list of prompts counts as many times as it has prompts: each of them has a room of its own. One that is longer than
the window gets a worker that has no other request.

A decode engine of SGLang admits at most its window. What comes above that waits there unseen, while the prefill worker
of its pair holds the computed cache for it until a deadline passes. So it waits in the router's queue instead.

What others run there follows from what the engine reports to run and to have queued, less the requests that are known:
the router's own, and those of routers that share what they know. A report is a moment old, so it counts only what the
last reports all show.

Routers that share what they know fill a window together. Each may always have its part of it, limit / routers: else
one with a queue takes each room that gets free, and the requests of another one never begin (as for `Pool.has_room`).
"""

from __future__ import annotations

from typing import Final

_REPORTS: Final = 3


class Window:
    """See the module.

    limit    the most requests of these routers; 0: the engine tells no window
    more     prompts there of lists in flight, besides the first one of each: a lease counts once for its worker's load
    routers  that fill it together, this one included
    """

    __slots__ = ("_foreign", "_most", "limit", "more", "routers")

    def __init__(self) -> None:
        self.limit = 0
        self.more = 0
        self.routers = 1
        self._most = 0
        self._foreign: list[int] = []

    def __repr__(self) -> str:
        return f"<Window {self.limit} of {self._most}>"

    def told(self, most: int, there: int | None, load: int) -> None:
        """Take a report, also one that is as the last one: those of this router may be others now.

        most   requests that the engine runs at once
        there  requests that it has just counted, running and queued; None: it has not counted
        load   leases there, of all routers that are known
        """
        if there is not None:
            self._foreign = [*self._foreign[1 - _REPORTS :], max(there - load - self.more, 0)]
        self._most = most
        foreign = min(self._foreign) if len(self._foreign) == _REPORTS else 0
        self.limit = max(most - foreign, 1) if most else 0

    def full(self, load: int, own: int, rooms: int = 1) -> bool:
        """Return whether a worker has no room for a request.

        load   leases there, of all routers that are known; own: those of this router
        rooms  prompts of the request
        """
        taken = self.more + rooms
        if not 0 < self.limit < load + taken or not load:
            return False
        return own + taken > self.limit // self.routers if self.routers > 1 else True
