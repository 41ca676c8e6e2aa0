"""A small core for tests of what talks to a store, and scenes in which several share one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine

from sglang_router.config.store_urls import parse_store_url
from sglang_router.routing.shared.records import SharedReading, SharedTopic
from sglang_router.sharing.fleet_key import FleetKey
from sglang_router.sharing.leading import Leader
from sglang_router.sharing.link import StoreLink
from sglang_router.sharing.login import StoreLogin
from sglang_router.sharing.sharing import FleetSharing
from sglang_router.sharing.valkey_store import ValkeyStore

WITHIN = 15.0
HELD_FOR = 1.2
"""Seconds for which the leadership is held."""


class SmallCore:
    """Tells what a test gives it, and keeps what it hears.

    tells    what is told at the next flush
    heard    topic, payload, and whether it is from the past, of each message
    applied  how many of them were applied
    lost     topics of which something could not be written, each time
    keys     the keys that it was given
    """

    interval = 0.005

    def __init__(self) -> None:
        self.connected = False
        self.tells: list[tuple[SharedTopic, bytes]] = []
        self.heard: list[tuple[SharedTopic, bytes, bool]] = []
        self.applied = 0
        self.lost: list[SharedTopic] = []
        self.keys: list[bytes] = []
        self.flushes = 0
        self.losses = 0

    @property
    def reading(self) -> SharedReading:
        return SharedReading(self.connected, (), 0, 0, 0, 0, 0, 0, 0, {})

    def use_key(self, key: bytes) -> None:
        self.keys.append(key)

    def outgoing(self, now: float) -> list[tuple[SharedTopic, bytes]]:
        self.flushes += 1
        tells, self.tells = self.tells, []
        return tells

    def missed(self, topic: SharedTopic) -> None:
        self.lost.append(topic)

    def leave(self) -> list[tuple[SharedTopic, bytes]]:
        return [(SharedTopic.LOADS, b"left")]

    def receive(self, topic: SharedTopic, payload: bytes, old: bool = False) -> None:
        self.heard.append((topic, payload, old))

    def apply(self, now: float, budget: int) -> bool:
        self.applied = min(self.applied + budget, len(self.heard))
        return self.applied < len(self.heard)

    def store_lost(self) -> None:
        self.losses += 1

    def look(self, now: float) -> None:
        """Nothing expires."""

    def payloads(self, topic: SharedTopic) -> list[bytes]:
        """Return what was heard of a topic, in its order."""
        return [payload for each, payload, _ in self.heard if each is topic]


class Sharer:
    """One router as the store sees it: a small core, and all that is real of the rest."""

    def __init__(
        self,
        url: str,
        prefix: str = "test",
        key: bytes = b"k" * 32,
        *,
        fixed: bool = False,
        context: Callable[[], ssl.SSLContext] | None = None,
        within: float = 1.5,
    ) -> None:
        parsed = parse_store_url(url)
        self.core = SmallCore()
        self.link = StoreLink(parsed.shown, time.monotonic, random.Random(1))
        self.key = FleetKey(key, fixed=fixed)
        self.name = random.randbytes(8).hex()
        self.login = StoreLogin(parsed.user, parsed.password)
        self.store = ValkeyStore(parsed, self.login, prefix, context, within)
        self.sharing = FleetSharing(self.core, self.store, self.link, self.key, self.name, 1 << 20)
        self.sharing.leader = Leader(self.store, self.name, time.monotonic, held_for=HELD_FOR)

    async def connected(self) -> None:
        await until(lambda: self.link.connected, self.link)

    async def hears(self, topic: SharedTopic, payload: bytes) -> None:
        await until(lambda: payload in self.core.payloads(topic), self.link)


async def until(holds: Callable[[], bool], about: object = "") -> None:
    """Wait until something holds; look at it often, for no event tells."""
    end = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < end, about
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def sharers(*given: Sharer, lead: bool = False) -> AsyncIterator[tuple[Sharer, ...]]:
    """Yield sharers that run."""
    for each in given:
        each.sharing.start(lead=lead)
    try:
        yield given
    finally:
        await asyncio.gather(*(each.sharing.close() for each in given))


def play(scene: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run a scene; it ends within a minute."""
    asyncio.run(asyncio.wait_for(scene(), 60.0))
