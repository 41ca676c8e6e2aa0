"""Requests that broke workers, and are refused for a while when they come again.

    broke(facts, worker, life, now)   a request ended without an answer after this worker had broken off
    check(facts, now)                 raises RequestBreaksWorkers for one that broke two; call it while `broken` has any
    served(facts)                     it was answered after all: it is harmless

A prompt can end an engine, and clients try again: without a memory each try would end two more engines.

    1 worker broken                                     remembered; the request may come again
    2 workers broken                                    refused for SOON seconds from then on
    ... and both were found gone afterwards             refused for LATER seconds

*Found gone* tells a prompt that ends engines from a network that dropped connections: the worker refused connections,
became unhealthy, was removed, or is another process now. One process counts once, however many copies of a request
were in flight there, or at its data-parallel ranks, when it ended.

A request is recognised by a keyed hash of its endpoint, of its method and target where the endpoint does not tell them,
and of the length, the first and the last `_PART` bytes of its body. A hash is computed only after a break, and, while
requests are remembered, for a request of the same endpoint and length. At most MOST are remembered; the oldest is
forgotten first.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Final

from sglang_router.errors import RequestBreaksWorkers
from sglang_router.routing.facts import Facts
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.states import Health
from sglang_router.routing.trail import MOST_BREAKS
from sglang_router.routing.worker import Worker

SOON: Final = 10.0
"""Seconds until a health check has told whether the workers are gone."""
LATER: Final = 300.0
MOST: Final = 256
_PART: Final = 32768


def fingerprint(key: bytes, facts: Facts) -> bytes:
    """Return the keyed hash by which a request is recognised; b"" while it is not known."""
    body, size = facts.body, len(facts.body)
    if isinstance(body, Imprint):
        return body.digest
    digest = blake2b(b"%b\0%b\0%d\0" % (facts.endpoint.path, facts.target, size), digest_size=16, key=key)
    digest.update(body[:_PART])
    digest.update(body[max(_PART, size - _PART) :])
    return digest.digest()


class _Broken:
    """The engines that a request broke, each with its life, and the worker of it; when the last one was; its shape."""

    __slots__ = ("last", "shape", "workers")

    def __init__(self, shape: tuple[bytes, int]) -> None:
        self.shape = shape
        self.workers: dict[tuple[str, int], Worker] = {}
        self.last = 0.0

    def until(self) -> float:
        """Return until when the request is refused."""
        if len(self.workers) < MOST_BREAKS:
            return 0.0
        gone = sum(_gone(worker, life) for (_, life), worker in self.workers.items())
        return self.last + (LATER if gone >= MOST_BREAKS else SOON)


class Quarantine:
    """See the module.

    broken  what is remembered, by hash; the oldest first
    rng     draws the key of the hash
    """

    __slots__ = ("_key", "_rng", "_shapes", "broken")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._key = b""  # drawn when it is needed
        self.broken: dict[bytes, _Broken] = {}
        self._shapes: dict[tuple[bytes, int], int] = {}  # how many of them have this endpoint and length

    def __repr__(self) -> str:
        return f"<Quarantine of {len(self.broken)} requests>"

    def use(self, key: bytes) -> None:
        """Use this key of the hash: other processes compute fingerprints with it."""
        self._key = key

    def broke(self, facts: Facts, worker: Worker, life: int, now: float) -> int:
        """Remember that a request broke a worker; return how many it has broken, 0 if this one was known already, or
        if the request is not known by its fingerprint."""
        name, shape = self._hash(facts), _shape(facts)
        if not name:
            return 0
        broken = self.broken.pop(name, None)
        if broken is None:
            broken = _Broken(shape)
            self._shapes[shape] = self._shapes.get(shape, 0) + 1
        self.broken[name] = broken
        broken.last = now
        if len(self.broken) > MOST:
            self._forget(next(iter(self.broken)))
        if (worker.spec.url, life) in broken.workers:
            return 0
        broken.workers[worker.spec.url, life] = worker
        return len(broken.workers)

    def check(self, facts: Facts, now: float) -> None:
        """Raise RequestBreaksWorkers for a request that broke several workers a short time ago."""
        broken = self._find(facts)
        if broken is not None and now < (until := broken.until()):
            raise RequestBreaksWorkers(retry_after=until - now)

    def served(self, facts: Facts) -> None:
        """Forget a request that was answered."""
        if self._find(facts) is not None:
            self._forget(self._hash(facts))

    def tidy(self, now: float) -> None:
        """Forget the requests that broke nothing for a while."""
        while self.broken and (oldest := next(iter(self.broken.items())))[1].last + LATER <= now:
            self._forget(oldest[0])

    def _find(self, facts: Facts) -> _Broken | None:
        return self.broken.get(self._hash(facts)) if _shape(facts) in self._shapes else None

    def _forget(self, name: bytes) -> None:
        shape = self.broken.pop(name).shape
        self._shapes[shape] -= 1
        if not self._shapes[shape]:
            del self._shapes[shape]

    def _hash(self, facts: Facts) -> bytes:
        self._key = self._key or self._rng.randbytes(32)
        return fingerprint(self._key, facts)


def _shape(facts: Facts) -> tuple[bytes, int]:
    return facts.endpoint.path, len(facts.body)


def _gone(worker: Worker, life: int) -> bool:
    """Return whether the process that was broken has been found gone."""
    lost = worker.gone_silent or worker.life > life
    return lost or worker.removed or worker.health is not Health.HEALTHY
