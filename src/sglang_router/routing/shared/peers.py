"""The other routers, as far as they were heard of lately, and what they have in flight.

A peer counts from its first message until it was silent for `expiry` seconds, or says that it ends. Messages of one
peer count in their order only: each has a number, and one that comes twice, or after a later one, is ignored: it does
not even show that the router is there. That holds for routers that are gone, too, so that nobody can let them count
again by writing their old messages once more. Clocks of routers are never compared: all times are those of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MOST_PEERS: Final = 256
MOST_NAMES: Final = 1 << 15
"""Workers of one peer, and its clients and models, that are remembered."""
HIGHEST: Final = (1 << 64) - 1
"""The last name."""
_MOST_ROUTERS: Final = 1 << 10


class Numbers:
    """The number of the last message of each router, also of those that are gone: of the last thousand."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, int] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Numbers of {len(self._last)} routers>"

    def is_next(self, router: bytes, number: int) -> bool:
        """Return whether a message is later than all before of its router; if so, it is the last one now."""
        if number <= self._last.get(router, -1):
            return False
        self._last[router] = number
        self._last.move_to_end(router)
        if len(self._last) > _MOST_ROUTERS:
            self._last.popitem(last=False)
        return True


class Peer:
    """Another router. Workers, clients and models are meant by their names.

    name      its name; heard: when its last message came; since: when the first one came
    running   its requests in flight, by worker
    meters    its requests in flight, by name of a client or model
    out       the workers that it has taken out
    sent      how many requests it has sent so far, by worker: the rest after 256
    until     until when the prompts there take, by worker, by the clock of this router
    held      its requests that no worker has, because none is ready
    """

    __slots__ = ("heard", "held", "meters", "name", "out", "running", "sent", "since", "until")

    def __init__(self, name: bytes, now: float) -> None:
        self.name = name
        self.heard = self.since = now
        self.running: dict[int, int] = {}
        self.meters: dict[int, int] = {}
        self.out: set[int] = set()
        self.sent: dict[int, int] = {}
        self.until: dict[int, float] = {}
        self.held = 0

    def __repr__(self) -> str:
        return f"<Peer {self.name.hex()}: {sum(self.running.values())} running, heard of at {self.heard:.3f}>"

    def tidy(self) -> None:
        """Remember no longer how many requests it sent to workers where it has nothing, if there are many."""
        if len(self.sent) > MOST_NAMES // 2:
            kept = self.running.keys() | self.until.keys() | self.out
            self.sent = {name: sent for name, sent in self.sent.items() if name in kept}


class Peers:
    """See the module. own: the name of this router, whose messages come back."""

    __slots__ = ("_expiry", "_numbers", "by_name", "own")

    def __init__(self, own: bytes, expiry: float) -> None:
        self.own = own
        self._expiry = expiry
        self._numbers = Numbers()
        self.by_name: dict[bytes, Peer] = {}

    def __repr__(self) -> str:
        return f"<Peers {list(self.by_name.values())}>"

    def __len__(self) -> int:
        return len(self.by_name)

    def hear(self, name: bytes, number: int, now: float) -> Peer | None:
        """Return the peer of a message that came; None when it is not a later one, or there are too many peers."""
        if not self._numbers.is_next(name, number):
            return None
        peer = self.by_name.get(name)
        if peer is None:
            if len(self.by_name) >= MOST_PEERS:
                return None
            peer = self.by_name[name] = Peer(name, now)
        peer.heard = now
        return peer

    def silent(self, now: float) -> list[Peer]:
        """Return the peers that were silent for too long."""
        return [peer for peer in self.by_name.values() if now - peer.heard > self._expiry]

    def forget(self, peer: Peer) -> None:
        """Let a peer count no more."""
        self.by_name.pop(peer.name, None)
