"""Messages that wait to be applied: bounded, opened when their turn comes.

What exceeds the bound is dropped: the oldest loads first, because the next message replaces them; then the oldest
placements. Orders are few; as long as there is anything else, none is dropped.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from sglang_router.routing.shared.records import SharedTopic

_ORDER: Final = (SharedTopic.ORDERS, SharedTopic.LOADS, SharedTopic.PLACEMENTS)
"""Whose messages are applied first."""
_DROPPED: Final = (SharedTopic.LOADS, SharedTopic.PLACEMENTS, SharedTopic.ORDERS)
MOST_PAYLOAD: Final = 1 << 16


class Received:
    """A message. old: of the past, see `SharedState.receive`."""

    __slots__ = ("old", "payload", "topic")

    def __init__(self, topic: SharedTopic, payload: bytes, old: bool) -> None:
        self.topic = topic
        self.payload = payload
        self.old = old


class Inbox:
    """See the module. most: bytes; dropped: counts what is lost, by reason; size: bytes that wait."""

    __slots__ = ("_most", "_queues", "dropped", "size")

    def __init__(self, most: int) -> None:
        self._most = most
        self._queues: dict[SharedTopic, deque[Received]] = {topic: deque() for topic in _ORDER}
        self.dropped: Counter[str] = Counter()
        self.size = 0

    def __repr__(self) -> str:
        return f"<Inbox of {self.size} bytes, {sum(self.dropped.values())} dropped>"

    def put(self, topic: SharedTopic, payload: bytes, old: bool) -> None:
        """Add a message; drop what is too much then."""
        if len(payload) > MOST_PAYLOAD:
            self.dropped["too_long"] += 1
            return
        self._queues[topic].append(Received(topic, payload, old))
        self.size += len(payload)
        while self.size > self._most:
            queue = next(self._queues[each] for each in _DROPPED if self._queues[each])
            self.size -= len(queue.popleft().payload)
            self.dropped["late"] += 1

    def take(self) -> Received | None:
        """Return the next message, and remove it; None without one."""
        for topic in _ORDER:
            queue = self._queues[topic]
            if queue:
                waiting = queue.popleft()
                self.size -= len(waiting.payload)
                return waiting
        return None
