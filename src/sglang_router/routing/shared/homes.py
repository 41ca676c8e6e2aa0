"""Where sessions are at home, by the word of all routers: the worker of each, by the keyed hash of its key.

    tell(key, worker, now)      a request of a session went to its home here: told when that is new, and every 30 s
    find(key, since, now)       where it is at home, if that was heard later than `since`

What came last in the stream counts, this router's own messages too, which come back: so all routers end up with the
same home for a session that began at two of them at once.

Only what clients name is told: a session that is recognised by its messages has a name at its own router alone, and is
found by its prompt.

At most `_MOST` sessions, in two generations of which the older is dropped when the younger is full; about 250 bytes
each.
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.shared.members import Members
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.worker import Worker

_MOST: Final = 1 << 16
_AGAIN: Final = 30.0
"""Seconds of use after which a home is told again: so a new router hears of it, and one that dropped it."""
MOST_TOLD: Final = 256
"""Homes of one message: 4 kB."""
_MOST_PENDING: Final = 16 * MOST_TOLD


class SharedHomes:
    """See the module. crowded: homes that were too many to be told."""

    __slots__ = ("_half", "_members", "_old", "_pending", "_secret", "_young", "crowded")

    def __init__(self, members: Members, secret: Secret, most: int = _MOST) -> None:
        self._members = members
        self._secret = secret
        self._half = most // 2
        self._young: dict[int, tuple[int, float]] = {}  # name of the worker, and when it was heard
        self._old: dict[int, tuple[int, float]] = {}
        self._pending: dict[int, int] = {}  # to be told
        self.crowded = 0

    def __repr__(self) -> str:
        return f"<SharedHomes of {len(self)} sessions>"

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def forget(self) -> None:
        """Know nothing: the fleet has another key."""
        self._young, self._old, self._pending = {}, {}, {}

    def find(self, key: bytes, since: float) -> Worker | None:
        """Return the home of a session, if that was heard after a time and its cache is still the same."""
        found = self._get(self._name(key))
        if found is None or found[1] <= since:
            return None
        member = self._members.known(found[0])
        return None if member is None or member.emptied_at >= found[1] else member.worker

    def tell(self, key: bytes, home: Worker, now: float) -> None:
        """Take note that a request of a session goes to its home, or to another worker for once."""
        member = self._members.of(home)
        if member is None:
            return
        session = self._name(key)
        found = self._get(session)
        if found is not None and found[0] == member.name and now - found[1] < _AGAIN:
            return
        self._set(session, member.name, now)
        if len(self._pending) < _MOST_PENDING:
            self._pending[session] = member.name
        else:
            self.crowded += 1

    def gather(self) -> list[int]:
        """Return sessions and workers to tell of, by turns, as many as fit into a message."""
        found = []
        for session in list(self._pending)[:MOST_TOLD]:
            found += [session, self._pending.pop(session)]
        return found

    def hear(self, session: int, home: int, old: bool, now: float) -> None:
        """Take what a router told. old: it is from the past, so it counts only if nothing is known.

        What this router is about to tell comes later in the stream, and counts.
        """
        if session not in self._pending and (not old or self._get(session) is None):
            self._set(session, home, now)

    def _name(self, key: bytes) -> int:
        return self._secret.name(b"session", key)

    def _get(self, session: int) -> tuple[int, float] | None:
        return self._young.get(session) or self._old.get(session)

    def _set(self, session: int, home: int, now: float) -> None:
        self._young[session] = (home, now)
        if len(self._young) > self._half:
            self._old, self._young = self._young, {}
