"""What the tasks of this room need of what knows and decides: `routing.shared`, which is pure."""

from __future__ import annotations

from typing import Protocol

from sglang_router.routing.shared.records import SharedReading, SharedTopic


class Core(Protocol):
    """What one router tells the others, and what it does with what they tell.

    connected  whether the store is reached: what others said is then fresh
    interval   seconds after which `outgoing` is to be called again
    """

    connected: bool

    @property
    def interval(self) -> float: ...

    @property
    def reading(self) -> SharedReading: ...

    def use_key(self, key: bytes) -> None:
        """Name things by another key of the fleet, and forget what was heard by the one before."""

    def outgoing(self, now: float) -> list[tuple[SharedTopic, bytes]]:
        """Return the messages that are due; [] for nothing."""

    def missed(self, topic: SharedTopic) -> None:
        """Take note that messages of a topic that `outgoing` returned last could not be written."""

    def leave(self) -> list[tuple[SharedTopic, bytes]]:
        """Return the last messages: the others forget this router's load at once."""

    def receive(self, topic: SharedTopic, payload: bytes, old: bool = False) -> None:
        """Queue a message. old: from the past, newest first: only what is not known yet counts."""

    def apply(self, now: float, budget: int) -> bool:
        """Apply a piece of what is queued; return whether there is more."""

    def store_lost(self) -> None:
        """Hear that the store has lost what it had."""

    def look(self, now: float) -> None:
        """Forget the routers that are silent."""
