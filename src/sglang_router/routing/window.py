"""How many requests a worker runs at once, as its engine tells: a decode worker never gets more of them.

    limit = the engine's window (max_running_requests) - what others run there, but at least 1

A list of prompts counts as many times as it has prompts: each of them has a room of its own. One that is longer than
the window gets a worker that has no other request.

A decode engine of SGLang admits at most its window. What comes above that waits there unseen, while the prefill worker
of its pair holds the computed cache for it until a deadline passes. So it waits in the router's queue instead.

What others run there follows from what the engine reports to run and to have queued, less the router's own requests. A
report is a moment old, so it counts only what the last reports all show.
"""

from __future__ import annotations

from typing import Final

_REPORTS: Final = 3


class Window:
    """See the module.

    limit  the most requests of this router; 0: the engine tells no window
    more   prompts there of lists in flight, besides the first one of each: a lease counts once for its worker's load
    """

    __slots__ = ("_foreign", "_most", "limit", "more")

    def __init__(self) -> None:
        self.limit = 0
        self.more = 0
        self._most = 0
        self._foreign: list[int] = []

    def __repr__(self) -> str:
        return f"<Window {self.limit} of {self._most}>"

    def told(self, most: int, there: int | None, load: int) -> None:
        """Take a report, also one that is as the last one: those of this router may be others now.

        most   requests that the engine runs at once
        there  requests that it has just counted, running and queued; None: it has not counted
        load   leases of this router there
        """
        if there is not None:
            self._foreign = [*self._foreign[1 - _REPORTS :], max(there - load - self.more, 0)]
        self._most = most
        foreign = min(self._foreign) if len(self._foreign) == _REPORTS else 0
        self.limit = max(most - foreign, 1) if most else 0

    def full(self, load: int, rooms: int = 1) -> bool:
        """Return whether a worker has no room for a request.

        load   leases of this router there; rooms: prompts of the request
        """
        return 0 < self.limit < load + self.more + rooms and load > 0
