"""The workers as all routers know them: by the keyed hash of their URL.

    members.join(worker)      a worker of this router; members.part(worker): it is removed
    members.find(name)        the member of that name, registered here or not

Another router may know a worker before this one does, and forget it later: a member stays when its worker leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Final

from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.token_bucket import TokenBucket
from sglang_router.routing.worker import Worker

_MOST_STRANGE: Final = 1 << 14
"""Members that are no workers of this router."""
_DOUBTS_A_SECOND: Final = 0.1
_DOUBTS: Final = 4.0
"""Doubts of one worker that are heard at once; then so many a second."""
_WORDS_A_SECOND: Final = 1 / 30
_WORDS: Final = 4.0
"""Words of others that the cache of one worker is empty, likewise."""


class Member:
    """A worker, as routers name it.

    name     its keyed hash
    worker   as it is registered here; None: it is not

    What this router has told of it last:

    running  its requests in flight there
    until    when its prompts there are read, by its own clock
    sent     how many requests it sent there when it was registered before: other routers count on
    out      whether it is ejected or has an open breaker
    caches   which of its caches that was, see `Worker.caches`; identity: which registration

    doubts      how often others may still doubt it; words: and may say that its cache is empty
    emptied_at  when its cache was found empty, by this router or another one; minus infinity: never
    expected    another router said so while this one had lost the worker: what this one finds next is the same
    """

    __slots__ = (
        *("caches", "doubts", "emptied_at", "expected", "identity", "name", "out", "running", "sent", "until"),
        *("words", "worker"),
    )

    def __init__(self, name: int) -> None:
        self.name = name
        self.worker: Worker | None = None
        self.running = self.sent = 0
        self.until = 0.0
        self.out = False
        self.caches = 0
        self.identity = ""
        self.doubts = TokenBucket(_DOUBTS_A_SECOND, _DOUBTS)
        self.words = TokenBucket(_WORDS_A_SECOND, _WORDS)
        self.emptied_at = -math.inf
        self.expected = False

    def __repr__(self) -> str:
        return f"<Member {self.name:016x}: {self.worker!r}>"


class Members:
    """See the module. strange: number of members that are no workers of this router.

    forgotten  called with the name of one that is forgotten, because there are too many strange ones
    """

    __slots__ = ("_by_name", "_forgotten", "_here", "_secret", "_strange")

    def __init__(self, secret: Secret, forgotten: Callable[[int], None]) -> None:
        self._secret = secret
        self._forgotten = forgotten
        self._by_name: dict[int, Member] = {}
        self._here: dict[Worker, Member] = {}
        self._strange: dict[int, None] = {}  # names, the first one first

    def __repr__(self) -> str:
        return f"<Members: {len(self._here)} workers here, {self.strange} others>"

    @property
    def strange(self) -> int:
        return len(self._strange)

    @property
    def here(self) -> Collection[Member]:
        """Those that are workers of this router."""
        return self._here.values()

    def of(self, worker: Worker) -> Member | None:
        """Return the member of a worker that is registered here."""
        return self._here.get(worker)

    def name(self, url: str) -> int:
        """Return the name of the worker with a URL, registered or not."""
        return self._secret.worker(url)

    def instance(self, worker: Worker) -> int:
        """Return the name of the instance that a worker is, as its source tells; 0: it does not."""
        instance = worker.spec.instance
        return self._secret.name(b"instance", instance.encode()) if instance else 0

    def find(self, name: int) -> Member:
        """Return the member of a name, a new one if there is none; of too many, the first one is forgotten."""
        member = self._by_name.get(name)
        if member is None:
            member = self._by_name[name] = Member(name)
            self._estrange(name)
        return member

    def known(self, name: int) -> Member | None:
        """Return the member of a name; None when it was never heard of."""
        return self._by_name.get(name)

    def rename(self) -> dict[int, int]:
        """Name the workers by the key that the fleet has now; forget those of other routers. Return the new names by
        the old ones."""
        names = {}
        self._by_name, self._strange = {}, {}
        for worker, member in self._here.items():
            old, member.name = member.name, self._secret.worker(worker.url)
            names[old] = member.name
            self._by_name[member.name] = member
        return names

    def join(self, worker: Worker) -> Member:
        """Take note of a worker that is registered here."""
        member = self._here[worker] = self.find(self._secret.worker(worker.url))
        self._strange.pop(member.name, None)
        member.worker = worker
        member.running = 0
        member.until = 0.0
        member.out = member.expected = False
        return member

    def part(self, worker: Worker) -> None:
        """Take note that a worker is removed here."""
        member = self._here.pop(worker, None)
        if member is not None and member.worker is worker:
            member.worker = None
            member.sent += worker.work.requests
            self._estrange(member.name)

    def _estrange(self, name: int) -> None:
        self._strange[name] = None
        if len(self._strange) > _MOST_STRANGE:
            first = next(iter(self._strange))
            del self._strange[first], self._by_name[first]
            self._forgotten(first)
