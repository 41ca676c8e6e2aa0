"""manual: whoever sends the same X-SMG-Routing-Key stays on the same worker.

A key that is new, or whose workers are all away, is assigned by `--assignment-mode`: random, min_load (fewest running
requests) or min_group (fewest keys). A key remembers its last two workers and prefers the older, so that it returns
home after an outage. Keys that rest for `--max-idle-secs` are forgotten; beyond `_MOST_KEYS` the least recent one is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.policies.base import Choice, Policy

if TYPE_CHECKING:
    import random

    from sglang_router.core.policies.base import PolicySettings
    from sglang_router.core.request import Facts
    from sglang_router.core.worker import Worker

_MOST_KEYS = 1_000_000
_HOMES = 2


class _Entry(msgspec.Struct):
    homes: list[Worker]  # the oldest first
    at: Worker  # the one that served it last
    used: float


class Manual(Policy):
    """See the module."""

    name = "manual"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._keys: Counter[Worker] = Counter()  # keys that a worker served last
        self._assign = {"random": self._random, "min_load": self.least_loaded, "min_group": self._fewest_keys}[
            settings.assignment_mode
        ]

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        key = facts.routing_key
        if not key:
            return Choice(self._assign(candidates), "no_key")
        entry = self._entries.get(key)
        if entry is None:
            worker, branch = self._assign(candidates), "vacant"
            self._entries[key] = _Entry([worker], worker, now)
            self._keys[worker] += 1
            if len(self._entries) > _MOST_KEYS:
                self._forget_oldest()
            return Choice(worker, branch)
        entry.used = now
        self._entries.move_to_end(key)
        home = next((w for w in entry.homes if w in candidates), None)
        worker, branch = (home, "occupied_hit") if home else (self._assign(candidates), "occupied_miss")
        if home is None:
            entry.homes = [*entry.homes, worker][-_HOMES:]
        if worker is not entry.at:
            self._leave(entry.at)
            self._keys[worker] += 1
            entry.at = worker
        return Choice(worker, branch)

    def _random(self, candidates: tuple[Worker, ...]) -> Worker:
        return self.rng.choice(candidates)

    def _fewest_keys(self, candidates: tuple[Worker, ...]) -> Worker:
        low = min(self._keys[worker] for worker in candidates)
        return self.rotate([worker for worker in candidates if self._keys[worker] == low])

    def _forget_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self._leave(entry.at)

    def _leave(self, worker: Worker) -> None:
        if worker in self._keys:  # not if it was removed meanwhile
            self._keys[worker] -= 1

    def removed(self, worker: Worker) -> None:
        del self._keys[worker]

    def tidy(self, now: float, budget: int) -> bool:
        for _ in range(budget):
            entry = next(iter(self._entries.values()), None)
            if entry is None or entry.used > now - self.settings.max_idle:
                return False
            self._forget_oldest()
        return True
