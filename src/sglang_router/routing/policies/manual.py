"""manual: all requests with the same X-SMG-Routing-Key go to the same worker.

A key that is new, or whose workers are all away, is assigned by `--assignment-mode`: random, min_load (fewest running
requests) or min_group (fewest keys). A key remembers its last two workers and prefers the older one, so that it returns
home after an outage. Keys that were not used for `--max-idle-secs` are forgotten; when they take more than
`_MOST_BYTES` of memory, the least recently used one is. Of a key longer than 64 bytes only a digest is kept.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.keys import bounded
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

_MOST_BYTES: Final = 256 << 20
_OVERHEAD: Final = 350
"""Bytes that a key costs beside its own: measured, with Python 3.11."""
_HOMES: Final = 2


class _Home:
    """What is remembered of one key: its workers, the oldest first; the one that served it last; when that was."""

    __slots__ = ("at", "homes", "used")

    def __init__(self, worker: Worker, now: float) -> None:
        self.homes = [worker]
        self.at = worker
        self.used = now


class Manual(Policy):
    """See the module. most_bytes: memory that the keys may take."""

    name = "manual"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self._homes: OrderedDict[bytes, _Home] = OrderedDict()  # by key, least recently used first
        self._held = 0  # bytes that they take
        self.most_bytes = _MOST_BYTES
        self._keys: Counter[Worker] = Counter()  # keys that a worker served last
        self._lot = rng.random()  # decides the next random assignment
        self._assign = {"random": self._random, "min_load": self.least_loaded, "min_group": self._fewest_keys}[
            settings.assignment_mode
        ]

    def __repr__(self) -> str:
        keys = {worker.url: count for worker, count in self._keys.items()}
        return f"<Manual {len(self._homes)} keys of {self._held} bytes {keys}, turn {self._turn}, lot {self._lot:.6f}>"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the worker to which the routing key is assigned, if it is a candidate; else assign one."""
        key = facts.routing_key
        if not key:
            return self._assign(candidates, "no_key")
        known = self._homes.get(bounded(key))
        if known is None:
            return self._assign(candidates, "vacant")
        for worker in known.homes:
            if worker in candidates:
                return Choice(worker, "occupied_hit")
        return self._assign(candidates, "occupied_miss")

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Remember the worker as the key's latest one."""
        super().chosen(choice, facts, now)
        key, worker = facts.routing_key, choice.worker
        if choice.branch != "occupied_hit":
            self._lot = self.rng.random()
        if not key:
            return
        key = bounded(key)
        known = self._homes.get(key)
        if known is None:
            self._homes[key] = _Home(worker, now)
            self._keys[worker] += 1
            self._held += _OVERHEAD + len(key)
            while self._held > self.most_bytes:
                self._forget_oldest()
            return
        known.used = now
        self._homes.move_to_end(key)
        if worker not in known.homes:
            known.homes = [*known.homes, worker][-_HOMES:]
        if worker is not known.at:
            self._leave(known.at)
            self._keys[worker] += 1
            known.at = worker

    def _random(self, candidates: Candidates, branch: str) -> Choice:
        return Choice(candidates[int(self._lot * len(candidates))], branch)

    def _fewest_keys(self, candidates: Candidates, branch: str) -> Choice:
        low = min(self._keys[worker] for worker in candidates)
        fewest = candidates.set_of(worker for worker in candidates if self._keys[worker] == low)
        return self.in_turn(candidates, fewest, branch)

    def _forget_oldest(self) -> None:
        key, known = self._homes.popitem(last=False)
        self._held -= _OVERHEAD + len(key)
        self._leave(known.at)

    def _leave(self, worker: Worker) -> None:
        if worker in self._keys:  # not if it was removed meanwhile
            self._keys[worker] -= 1

    def removed(self, worker: Worker) -> None:
        """Drop the worker's count of keys."""
        del self._keys[worker]

    def tidy(self, now: float, budget: int) -> bool:
        """Forget keys that were not used for `max_idle` seconds."""
        for _ in range(budget):
            oldest = next(iter(self._homes.values()), None)
            if oldest is None or oldest.used > now - self.settings.max_idle:
                return False
            self._forget_oldest()
        return True
