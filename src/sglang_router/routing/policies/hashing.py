"""Policies without memory of requests: consistent_hashing by a key in a header, prefix_hash by the prompt's beginning.

Both place a digest on a ring (Karger et al. 1997): each worker has `_POINTS` points on it, and a key belongs to the
first point clockwise whose worker is a candidate. A worker that leaves gives away only its own keys, and gets the same
ones back when it returns. The digest is BLAKE2b, so that several routers in front of the same workers agree without
talking to each other.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

_POINTS: Final = 150


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


class _Ring:
    """Points of workers by URL. A walk visits each worker once.

    The points are sorted when the next walk begins: a thousand workers that are added at once are sorted once.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []
        self._sorted = True
        self._workers: dict[str, Worker] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, worker: Worker) -> None:
        """Add a worker's points."""
        self._workers[worker.url] = worker
        url = worker.url
        self._points += [(_digest(f"{url}#{point}".encode()), url) for point in range(_POINTS)]
        self._sorted = False

    def remove(self, worker: Worker) -> None:
        """Remove a worker's points."""
        del self._workers[worker.url]
        self._points = [point for point in self._points if point[1] != worker.url]

    def walk(self, key: bytes) -> Iterator[Worker]:
        """Yield all workers, clockwise from the key's point."""
        if not self._sorted:
            self._points.sort()
            self._sorted = True
        points, seen = self._points, set()
        start = bisect_left(points, (_digest(key), ""))
        for index in range(len(points)):
            url = points[(start + index) % len(points)][1]
            if url not in seen:
                seen.add(url)
                yield self._workers[url]


class _OnRing(Policy):
    """A policy that keeps the workers of its pool on a ring."""

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self._ring = _Ring()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._ring)} workers, turn {self._turn}>"

    def added(self, worker: Worker) -> None:
        """Add a worker's points to the ring."""
        self._ring.add(worker)

    def removed(self, worker: Worker) -> None:
        """Remove a worker's points from the ring."""
        self._ring.remove(worker)


class ConsistentHashing(_OnRing):
    """The worker that the header X-SMG-Routing-Key hashes to; without the header the least loaded."""

    name = "consistent_hashing"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the first candidate on the ring after the routing key; without a key the least loaded one."""
        if not facts.routing_key:
            return self.least_loaded(candidates, "no_key")
        return Choice(next(w for w in self._ring.walk(facts.routing_key) if w in candidates), "key")


class PrefixHash(_OnRing):
    """The worker that the beginning of the prompt hashes to, with bounded load (Mirrokni et al. 2016).

    A worker that already has more than `hash_load_factor` times its share of the running requests is skipped.
    """

    name = "prefix_hash"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the first candidate with room on the ring after the hash of the text's beginning."""
        if len(facts.text) <= facts.scaffold:
            return self.least_loaded(candidates, "no_text")
        running = candidates.roster.running(candidates.mask) + 1
        room = math.ceil(self.settings.hash_load_factor * running / len(candidates))
        key = facts.namespace + b"\0" + facts.text[: self.settings.prefix_hash_bytes]
        branch = "prefix"
        for worker in self._ring.walk(key):
            if worker in candidates:
                if worker.load < room:
                    return Choice(worker, branch)
                branch = "overflow"
        return self.least_loaded(candidates, "overflow")
