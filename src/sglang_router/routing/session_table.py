"""The memory of sessions: who they are, where each is at home, and which of them are live.

    enter, get                 a new session; a known one, by its key
    begins, ended              a request of it is sent, and over
    move(session, worker)      it gets another home
    expire(now)                ends those that were silent for too long; call it periodically
    drop(worker)               the worker is gone, and what its sessions had there

A session is *live* from its first request until it was silent for the time to live (`routing.return_times`). It is
remembered for longer, so that a late return is noticed. `share(worker)` says what live sessions a worker has. What is
reserved for one counts until it was silent for longer than is usual: if it returns later, it counts again.

The number of sessions is bounded, each takes about 500 bytes; the least recently used are forgotten first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from sglang_router.routing.return_times import CEILING, ReturnTimes
from sglang_router.routing.worker import Worker

MOST_SESSIONS: Final = 1 << 16
_EXPIRED: Final = 256
"""Sessions that `expire` looks at in one call, at most."""


class Share:
    """What a worker has of the live sessions: how many they are, and how many tokens are set aside for them."""

    __slots__ = ("sessions", "tokens")

    def __init__(self) -> None:
        self.sessions = 0
        self.tokens = 0

    def __repr__(self) -> str:
        return f"<Share {self.sessions} sessions, {self.tokens} tokens>"


_NOTHING: Final = Share()


class Session:
    """A session.

    home      the worker that holds its context; caches: `Worker.caches` when it was sent there
    running   its requests in flight
    last      when the last one began or ended
    live      another request is expected
    served    a worker has answered one of its requests
    moved_at  when it left an overloaded home; minus infinity: never
    reserved  tokens that are set aside for it at its home; counted: they are in its home's share now
    first     tokens of the prompt with which it started; expected: those that it will have at its end, as was believed
              then; context: the most that it has had since
    """

    __slots__ = (
        "caches",
        "context",
        "counted",
        "expected",
        "first",
        "home",
        "key",
        "last",
        "live",
        "moved_at",
        "reserved",
        "running",
        "served",
    )

    def __init__(self, key: bytes, home: Worker, now: float) -> None:
        self.key = key
        self.home = home
        self.caches = home.caches
        self.running = 0
        self.last = now
        self.live = False
        self.served = False
        self.moved_at = -math.inf
        self.reserved = 0
        self.counted = False
        self.first = self.expected = self.context = 0

    def __repr__(self) -> str:
        state = "live" if self.live else "silent"
        return f"<Session at {self.home.url}, {state}, {self.running} running, last at {self.last:.3f}>"

    @property
    def kept(self) -> bool:
        """Whether its home still has the cache that it was sent to."""
        return self.caches == self.home.caches and not self.home.removed


class SessionTable:
    """See the module.

    most     sessions that are remembered
    returns  how long they pause
    live     number of live sessions
    """

    __slots__ = ("_counted", "_known", "_live", "_most", "_shares", "returns")

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self.returns = ReturnTimes()
        self._most = most
        self._known: OrderedDict[bytes, Session] = OrderedDict()  # by key, the least recently used first
        self._live: OrderedDict[bytes, Session] = OrderedDict()  # the same, those that are live
        self._counted: OrderedDict[bytes, Session] = OrderedDict()  # the same, those whose reservation counts
        self._shares: dict[Worker, Share] = {}

    def __repr__(self) -> str:
        return f"<SessionTable {len(self._live)} live of {len(self._known)}, {self.returns!r}>"

    def __len__(self) -> int:
        return len(self._known)

    @property
    def live(self) -> int:
        return len(self._live)

    def get(self, key: bytes) -> Session | None:
        """Return a known session; None for a new one."""
        return self._known.get(key)

    def share(self, worker: Worker) -> Share:
        """Return what a worker has of the live sessions."""
        return self._shares.get(worker, _NOTHING)

    def lives(self, session: Session, now: float) -> bool:
        """Return whether another request of a session is expected."""
        return session.running > 0 or (session.live and now - session.last <= self.returns.time_to_live)

    # -- the life of a session -----------------------------------------------------------------------------------------

    def enter(self, key: bytes, home: Worker, now: float) -> Session:
        """Remember a new session."""
        session = self._known[key] = Session(key, home, now)
        while len(self._known) > self._most:
            self._forget(next(iter(self._known.values())))
        return session

    def begins(self, session: Session, now: float) -> None:
        """Take note that a request of a session is sent."""
        if not session.running and session.last < now:
            self.returns.add(now - session.last)
        session.running += 1
        session.last = now
        if self._known.get(session.key) is session:
            self._known.move_to_end(session.key)
            if not session.live:
                session.live = True
                self._live[session.key] = session
                self._join(session)
            self._live.move_to_end(session.key)
            self._count(session)

    def ended(self, session: Session, now: float, served: bool) -> None:
        """Take note that a request of a session is over. One that no worker has ever served is no session."""
        session.running -= 1
        session.last = now
        session.served |= served
        if not session.served and not session.running:
            self._silence(session)
        elif session.live:
            self._live.move_to_end(session.key)
            self._count(session)

    def move(self, session: Session, worker: Worker) -> None:
        """Give a session another home, or the same with another cache."""
        if session.home is not worker:
            if session.live:
                self._leave(session)
            session.home = worker
            if session.live:
                self._join(session)
        session.caches = worker.caches

    def reserve(self, session: Session, tokens: int) -> None:
        """Set tokens aside for a session at its home, instead of those until now."""
        if session.counted:
            self._shares[session.home].tokens += tokens - session.reserved
        session.reserved = tokens

    def _count(self, session: Session) -> None:
        """Let the reservation of a live session count."""
        if not session.counted:
            session.counted = True
            self._counted[session.key] = session
            self._shares[session.home].tokens += session.reserved
        self._counted.move_to_end(session.key)

    def _discount(self, session: Session) -> None:
        if session.counted:
            session.counted = False
            del self._counted[session.key]
            self._shares[session.home].tokens -= session.reserved

    def _join(self, session: Session) -> None:
        share = self._shares.get(session.home)
        if share is None:
            share = self._shares[session.home] = Share()
        share.sessions += 1
        share.tokens += session.reserved if session.counted else 0

    def _leave(self, session: Session) -> None:
        share = self._shares[session.home]
        share.sessions -= 1
        share.tokens -= session.reserved if session.counted else 0
        if not share.sessions:
            del self._shares[session.home]

    def _silence(self, session: Session) -> None:
        """End a session: no further request is expected."""
        if session.live:
            self._discount(session)
            self._leave(session)
            session.live = False
            del self._live[session.key]
        session.reserved = 0

    def _forget(self, session: Session) -> None:
        self._silence(session)
        del self._known[session.key]

    # -- the end of sessions -------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Session]:
        """End the sessions that were silent for the time to live; return them. Forget those silent for `CEILING`."""
        self._release(now - self.returns.usual)
        ended = []
        for _ in range(min(_EXPIRED, len(self._live))):
            session = next(iter(self._live.values()))
            if self.lives(session, now):
                if not session.running:
                    break
                self._live.move_to_end(session.key)  # it is not silent, however long ago its last request began
            else:
                ended.append(session)
                self._silence(session)
        for _ in range(min(_EXPIRED, len(self._known))):
            session = next(iter(self._known.values()))
            if session.running:
                self._known.move_to_end(session.key)
            elif now - session.last > CEILING:
                self._forget(session)
            else:
                break
        return ended

    def _release(self, silent_since: float) -> None:
        """Let the reservations of sessions that have been silent since then no longer count."""
        for _ in range(min(_EXPIRED, len(self._counted))):
            session = next(iter(self._counted.values()))
            if session.running:
                self._counted.move_to_end(session.key)
            elif session.last < silent_since:
                self._discount(session)
            else:
                return

    def drop(self, worker: Worker) -> None:
        """End the sessions of a worker that is gone, or lost its cache. O(n)"""
        if worker in self._shares:
            for session in [session for session in self._live.values() if session.home is worker]:
                self._silence(session)
