"""How many requests a worker runs at once, as its engine tells: a decode worker never gets more of them.

    limit = the engine's window (max_running_requests) - what others run there, but at least 1

A decode engine of SGLang admits at most its window. What comes above that waits there unseen, while the prefill worker
of its pair holds the computed cache for it until a deadline passes. So it waits in the router's queue instead.

What others run there follows from what the engine reports to run and to have queued, less the router's own requests. A
report is a moment old, so it counts only what the last reports all show.
"""

from __future__ import annotations

from typing import Final

_REPORTS: Final = 3


class Window:
    """See the module. limit: the most requests of this router; 0: the engine tells no window."""

    __slots__ = ("_foreign", "_most", "limit")

    def __init__(self) -> None:
        self.limit = 0
        self._most = 0
        self._foreign: list[int] = []

    def __repr__(self) -> str:
        return f"<Window {self.limit} of {self._most}>"

    def told(self, most: int | None, there: int | None, mine: int) -> None:
        """Take a report.

        most   requests that the engine runs at once; None: it does not tell
        there  requests that it runs and has queued; None: it does not tell
        mine   requests of this router there
        """
        self._most = most or 0
        self._foreign = [*self._foreign[1 - _REPORTS :], max((there or 0) - mine, 0)]
        foreign = min(self._foreign) if len(self._foreign) == _REPORTS else 0
        self.limit = max(self._most - foreign, 1) if self._most else 0

    def full(self, load: int) -> bool:
        """Return whether a worker with so many requests of this router has no room for another one."""
        return 0 < self.limit <= load
