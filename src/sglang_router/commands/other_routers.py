"""Whether the other routers of a fleet have heard a drain, and the router that was asked what they have in flight.

    others = OtherRouters(door)
    others.missing(now)  -> why that is not sure yet, in words; "": it is. Ask it with each look at the worker.

A router tells the others through the store of `--shared-state`. While it does not reach that, the others go on to send
requests to the worker, and what they have in flight there is forgotten after three seconds: so no figure of them counts
until the store is reached. Then it takes a moment until all have heard of the drain and have told their figures.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from sglang_router.commands.answers import ReadinessAnswer
from sglang_router.commands.asking import NO_ROUTER, UNREADABLE, Failed, Reply

_HEARD: Final = 1.5
"""Seconds after which a few routers have told all their loads once more."""
_EACH: Final = 0.01
"""Seconds more for each other router: the more there are, the more rarely each tells what is new."""
_CONNECTED: Final = "connected"


class ReadinessDoor(Protocol):
    """The control plane of a router: `asking.Door`."""

    @property
    def shown(self) -> str:
        """Its URL, for people."""

    def ask(self, method: str, path: str) -> Reply:
        """Send one request and return the answer. Raises: Failed, when no router answers."""


class OtherRouters:
    """See the module. door: to the router that was asked.

    unreached  the router did not reach the store at the last look
    """

    __slots__ = ("_door", "_peers", "_since", "unreached")

    def __init__(self, door: ReadinessDoor) -> None:
        self._door = door
        self._since: float | None = None  # when the store was reached, and is since then
        self._peers = 0
        self.unreached = False

    def missing(self, now: float) -> str:
        """Return why the others may not have heard it, in words that follow "it"; "" when they have. now: in seconds.

        Raises: Failed, when no router answers.
        """
        reply = self._door.ask("GET", "/readiness")
        try:
            shared = msgspec.json.decode(reply.content, type=ReadinessAnswer).shared_state
        except UNREADABLE:
            raise Failed(NO_ROUTER, f"what answers at {self._door.shown} is no router.") from None
        self.unreached = shared is not None and shared.state != _CONNECTED
        if shared is None:
            return ""
        if self.unreached:
            self._since = None
            return f"may get requests of other routers: they cannot be told (store of --shared-state: {shared.state})"
        if self._since is None or shared.peers < self._peers:  # one left, or is not heard: the store may be silent
            self._since = now
        self._peers = shared.peers
        waits = now - self._since < _HEARD + _EACH * shared.peers
        return "waits for the figures of the other routers" if waits else ""
