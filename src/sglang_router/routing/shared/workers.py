"""Workers that an operator adds or removes at one router, and all do (--shared-workers).

    said(url, described)    an operator has added a worker here, as described; None: he has removed it
    gather(...)          -> what the next message tells of it: descriptions, and names
    hear(...)               what a message tells, in the order of the stream

*The last word counts*, in the order of the stream. A word of this router is done here already when it is said. Until
its message comes back, what others say of that worker was said before it, and changes nothing.

A description is opaque here: `hands` read it, and add and remove. They leave workers alone that something else names:
options, a file, a source that looks for workers.

*A loopback address is another program on each machine*, so its name is another one, too. A router does not add a worker
that it would name otherwise than the message does: it would send prompts and its key to whatever listens there.

Routers that start later read all messages that the stream still has. What it has lost (`again`) is told once more, by
the first router of those that have it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Protocol

from sglang_router.routing.shared.members import Members

LONGEST: Final = 8192
"""Bytes of a description."""
_MOST_BYTES: Final = 1 << 15
"""Bytes of the descriptions in one message."""
_MOST_REMOVED: Final = 64
"""Workers that one message removes, so that it takes no more than milliseconds."""
_MOST: Final = 4096
"""Workers that are known to be added; and of which own words are not told yet, or have not come back."""


class WorkerHands(Protocol):
    """What adds and removes workers of this router."""

    def url(self, described: bytes) -> str:
        """Return the URL in a description. Raises: ValueError, for one that cannot be used."""

    def has(self, url: str) -> bool:
        """Return whether it is a worker here that an operator has added."""

    def add(self, described: bytes) -> None:
        """Add a worker, unless its URL is known."""

    def remove(self, url: str) -> None:
        """Remove a worker that an operator has added, if it is one."""


class SharedWorkers:
    """See the module. crowded: how many descriptions came that are too many."""

    __slots__ = ("_again", "_again_at", "_hands", "_known", "_members", "_pending", "_unheard", "crowded")

    def __init__(self, members: Members, hands: WorkerHands) -> None:
        self.crowded = 0
        self._members = members
        self._hands = hands
        self._known: OrderedDict[int, bytes] = OrderedDict()  # descriptions of those that are added, by name
        self._pending: dict[int, bytes] = {}  # own words that are not told yet; b"": it is removed
        self._unheard: dict[int, int] = {}  # the number of the message with the last own word, until it comes back
        self._again: dict[int, bytes] = {}  # what is told again at `_again_at`
        self._again_at = 0.0

    def __repr__(self) -> str:
        return f"<SharedWorkers: {len(self._known)}>"

    def said(self, url: str, described: bytes | None) -> None:
        """Take note of what an operator has done here. described: at most LONGEST bytes; None: it is removed."""
        name = self._members.name(url)
        self._pending[name] = described or b""
        self._again.pop(name, None)  # what held before is not told any more
        self._keep(name, described or b"")
        if len(self._pending) > _MOST:  # while the store is away
            del self._pending[next(iter(self._pending))]
            self.crowded += 1

    def gather(self, number: int, now: float, calm: bool) -> tuple[dict[int, bytes], list[int]]:
        """Return the descriptions of workers that are added, by name, and the names of those that are removed.

        number  of the message that tells it
        calm    see `SharedOrders.gather`
        """
        if self._again and calm and now >= self._again_at:
            self._pending |= {name: each for name, each in self._again.items() if name not in self._pending}
            self._again.clear()
        if not self._pending:
            return {}, []
        added: dict[int, bytes] = {}
        removed: list[int] = []
        size = 0
        for name, described in list(self._pending.items()):
            if size + len(described) > _MOST_BYTES or len(removed) == _MOST_REMOVED:
                break
            size += len(described)
            if described:
                added[name] = described
            else:
                removed.append(name)
            del self._pending[name]
            self._unheard[name] = number
        while len(self._unheard) > _MOST:
            del self._unheard[next(iter(self._unheard))]
        return added, removed

    def hear(self, own: bool, number: int, added: dict[int, bytes], removed: list[int]) -> None:
        """Do what a message tells. own: it is one of this router."""
        for name, described in added.items():
            if name == self._members.name(self._hands.url(described)):
                self._hear(own, number, name, described)
        for name in removed:
            self._hear(own, number, name, b"")

    def check(self, added: dict[int, bytes], removed: list[int]) -> None:
        """Check a message. Raises: ValueError, for one without sense."""
        if len(removed) > _MOST_REMOVED or sum(map(len, added.values())) > _MOST_BYTES + LONGEST:
            raise ValueError("too many workers in one message")
        for described in added.values():
            self._hands.url(described)

    def lost(self) -> None:
        """Hear that the store has lost what it had: own messages that it had may never come back."""
        self._unheard.clear()

    def again(self, at: float) -> None:
        """Tell at a time once more what is added and still there, as far as no other router does before."""
        urls = [(name, described, self._hands.url(described)) for name, described in self._known.items()]
        self._again = {name: described for name, described, url in urls if self._hands.has(url)}
        self._again_at = at

    def rename(self) -> None:
        """Name the workers by the key that the fleet has now."""
        known, pending = list(self._known.values()), [each for each in self._pending.values() if each]
        for names in (self._known, self._pending, self._unheard, self._again):
            names.clear()
        for described in known:
            self._known[self._members.name(self._hands.url(described))] = described
        for described in pending:
            self._pending[self._members.name(self._hands.url(described))] = described

    def _hear(self, own: bool, number: int, name: int, described: bytes) -> None:
        if own and self._unheard.get(name) == number:
            del self._unheard[name]
        if own or name in self._pending or name in self._unheard:
            return  # done already, or said before the own word
        self._again.pop(name, None)
        if described:
            if self._keep(name, described):
                self._hands.add(described)
            return
        known = self._known.get(name)
        self._keep(name, b"")
        member = self._members.known(name)
        if known is not None:
            self._hands.remove(self._hands.url(known))
        elif member is not None and member.worker is not None:  # how it was added, the stream has forgotten
            self._hands.remove(member.worker.spec.url)

    def _keep(self, name: int, described: bytes) -> bool:
        """Remember the last word of a worker; return whether there is room for it."""
        if not described:
            self._known.pop(name, None)
            return True
        if len(self._known) >= _MOST and name not in self._known:
            self.crowded += 1
            return False
        self._known[name] = described
        return True
