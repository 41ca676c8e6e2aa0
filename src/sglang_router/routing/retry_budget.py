"""The retry budget: retries stay a small share of requests, so that they do not finish off failing workers.

    time     |--slot--|--slot--|- ... -|--slot--|       ten slots are one window; the oldest is cleared when a new
    requests |   812  |   790  |       |    31  |       one begins
    retries  |     0  |   160  |       |     6  |

    take(now): one more, if the retries of these slots are then  <=  ratio x their requests + floor x window

The bound, exactly: whenever a retry is allowed, it and all other retries since the window's oldest slot began are
within that bound, and the requests are counted over the same time. The newest slot is not over yet, so this looks back
over nine to ten slots; over one whole window, the retries of the slot before may come on top. Each request pays for
`ratio` retries once: a retry is counted for as long as the request that paid for it. So from the start on,

    retries  <=  ratio x requests + floor x window x windows begun

and workers that fail every request get at most 1 + ratio times the requests of its clients, plus the floor.
The floor lets a quiet router retry, whose few requests would allow no retry.
"""

from __future__ import annotations

import math
from typing import Final

from sglang_router.routing.rules import RetryBudgetRules

_SLOTS: Final = 10
_ROUNDING: Final = 1e-9
"""Retries; tolerance for float errors, so that 20 % of 10 requests are 2."""


class RetryBudget:
    """Counts requests and retries of the last window; both calls take the same time however many there were.

    requests, retries  in the window, as of the last call
    refused            retries that were not allowed, since the start
    """

    __slots__ = (
        "_free",
        "_number",
        "_ratio",
        "_requests",
        "_retries",
        "_slot",
        "_until",
        "_width",
        "refused",
        "requests",
        "retries",
    )

    def __init__(self, rules: RetryBudgetRules | None = None) -> None:
        rules = rules or RetryBudgetRules()
        self._width = rules.window / _SLOTS
        self.use(rules)
        self._requests = [0] * _SLOTS
        self._retries = [0] * _SLOTS
        self._number = 0  # of the newest slot, counted from time 0
        self._slot = 0  # its index in the lists
        self._until = -math.inf  # when it ends
        self.requests = self.retries = self.refused = 0

    def __repr__(self) -> str:
        return f"<RetryBudget {self.retries} retries of {self.requests} requests>"

    def use(self, rules: RetryBudgetRules) -> None:
        """Let another share and floor count from now on; the window stays as long as it was."""
        self._ratio = rules.ratio
        self._free = rules.floor * self._width * _SLOTS + _ROUNDING

    def request(self, now: float) -> None:
        """Count a client's request; its retries do not count as requests."""
        if now >= self._until:
            self._advance(now)
        self._requests[self._slot] += 1
        self.requests += 1

    def take(self, now: float) -> bool:
        """Return whether one more retry may be sent; if so, count it."""
        if now >= self._until:
            self._advance(now)
        if self.retries + 1 > self._ratio * self.requests + self._free:
            self.refused += 1
            return False
        self._retries[self._slot] += 1
        self.retries += 1
        return True

    def _advance(self, now: float) -> None:
        """Make the slot of this moment the newest one, and clear the slots that are older than a window."""
        number = math.floor(now / self._width)
        for late in range(max(self._number + 1, number - _SLOTS + 1), number + 1):
            slot = late % _SLOTS
            self.requests -= self._requests[slot]
            self.retries -= self._retries[slot]
            self._requests[slot] = self._retries[slot] = 0
        self._number = number
        self._slot = number % _SLOTS
        self._until = (number + 1) * self._width
