"""Sessions: which worker holds the context of each, and where its next request goes. In front of every policy.

    recognise(facts, now)                  names the session by its messages, when nothing else has
    place(facts, candidates, now)          which candidates the policy may choose from; changes nothing
    chosen(place, choice, facts, now)      learns the session's worker, its *home*; returns the session
    ended(session, now, served)            a leg of it is over

    `place` says     when                                                       candidates             the home
    NEW              unknown, or silent for longer than sessions are            all of them            is chosen
    FREE             the home is no candidate, or lost its cache                all of them            is chosen
    HOME             else, unless the home is overloaded                        the home only          stays
    LEAVE            overloaded, and at home for long enough                    the others             is chosen
    VISIT            far overloaded, but it moved a short time ago              the others             stays

The policy chooses from what is left, so that it learns as from every choice, and its own memory stays true. The branch
of a request that was sent home is "session".

*Overloaded.* To leave costs the prefill of a whole context somewhere else, so the queue at home must be much longer.
With known backlogs: longer than four times what the least burdened other one would take for its own backlog and for
the whole text, plus a second. Else by requests in flight: more than twice the mean of the other candidates, plus
`_SPARE` requests. Far overloaded is twice that. So no key, however many requests name it, piles up on one worker.

*Several routers* (`routing.shared.homes`) tell each other the homes of sessions, and what was told last counts: so the
requests of a session may come to any of them. Reservations are those of the sessions that a router has seen itself.

*No thrashing.* A session that left stays at its new home for a time to live (`routing.return_times`) before it may
leave again. A home that restarted or was emptied (`Worker.caches`) has nothing to stay for.

`routing.session_table` remembers the sessions, `routing.session_contexts` what they need of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.message_chains import MARK, MessageChains
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.session_contexts import SessionContexts
from sglang_router.routing.session_table import MOST_SESSIONS, Session, SessionTable
from sglang_router.routing.shared.homes import SharedHomes
from sglang_router.routing.worker import Worker

NEW, FREE, HOME, LEAVE, VISIT = "new", "free", "home", "leave", "visit"
"""Where a request of a session may go, see the module."""
BRANCH: Final = "session"
_FACTOR: Final = 2.0
"""How many times more requests in flight the home must have than the others."""
_FACTOR_TIME: Final = 4.0
"""How many times longer the backlog at home must be: to leave also evicts what others have cached elsewhere."""
_SPARE: Final = 8.0
"""Requests in flight that the home may have in any case: fewer are no queue."""
_SPARE_TIME: Final = 1.0
"""Seconds of backlog that the home may have in any case."""
_FAR: Final = 2.0

Backlog = Callable[[Worker, int, float], float]
"""Returns the seconds until a worker would have read so many bytes of a new request's text, which it has not cached;
negative: nobody knows."""


class Place:
    """Where a request of a session may go.

    kind     NEW, FREE, HOME, LEAVE or VISIT
    session  None for a new one
    told     its home by the word of another router; None: this one knows better, or nobody does
    """

    __slots__ = ("candidates", "kind", "session", "told")

    def __init__(self, kind: str, candidates: Candidates, session: Session | None, told: Worker | None = None) -> None:
        self.kind = kind
        self.candidates = candidates
        self.session = session
        self.told = told

    def __repr__(self) -> str:
        return f"<Place {self.kind}: {self.candidates!r}>"


class Sessions:
    """See the module.

    on        an option asks for sessions: otherwise nothing is called
    waits     new ones start only where they fit, and wait for that
    table     the sessions
    contexts  how much of the caches they need
    placed    how many requests were placed so far, by kind
    homes     where sessions are at home by the word of other routers; None: there are none
    """

    def __init__(
        self,
        on: bool = False,
        backlog: Backlog | None = None,
        most: int = MOST_SESSIONS,
        waits: bool = False,
        capacity: int = 0,
    ) -> None:
        """backlog: None: loads are compared; most: sessions that are remembered; capacity: see `SessionContexts`."""
        self.on = on
        self.waits = waits
        self.table = SessionTable(most)
        self.contexts = SessionContexts(self.table, capacity)
        self.placed = {NEW: 0, FREE: 0, HOME: 0, LEAVE: 0, VISIT: 0}
        self.homes: SharedHomes | None = None
        self._backlog = backlog
        self._chains = MessageChains()

    def __repr__(self) -> str:
        return f"<Sessions {self.placed}, {self.table!r}>"

    def recognise(self, facts: Facts) -> None:
        """Name the session of a request by its messages, when nothing has named it. Call it once for a request."""
        if not facts.session and facts.endpoint.generates:
            facts.session = self._chains.session(facts)

    def get(self, facts: Facts) -> Session | None:
        """Return the session of a request; None for a new one."""
        return self.table.get(_key(facts))

    def starts(self, facts: Facts, now: float) -> bool:
        """Return whether a request begins a session: none is live that it belongs to."""
        session = self.get(facts)
        if session is not None and self.table.lives(session, now):
            return False
        return self.homes is None or self.homes.find(_key(facts), now - self.table.returns.time_to_live) is None

    def begins(self, facts: Facts, now: float) -> bool:
        """Return whether a request begins a session that starts only where it fits.

        One that only its messages could name may as well be a single question: it does not wait.
        """
        return self.waits and facts.session != b"" and _named(facts) and self.starts(facts, now)

    def fitting(self, facts: Facts, candidates: Candidates, now: float) -> Candidates:
        """Return the candidates that may get a request now: if it begins a session, those on which that fits."""
        if not self.begins(facts, now):
            return candidates
        return self.contexts.fitting(facts, candidates, self.get(facts) is not None)

    # -- the decision --------------------------------------------------------------------------------------------------

    def place(self, facts: Facts, candidates: Candidates, now: float) -> Place:
        """Return which candidates may get a request of a session. There is at least one. Change nothing."""
        session = self.table.get(_key(facts))
        lives = session is not None and self.table.lives(session, now)
        told = None if self.homes is None else self._told(self.homes, facts, session if lives else None, now)
        if told is not None and told in candidates:
            home = told
        elif session is None or not lives:
            return Place(NEW, self.contexts.roomy(candidates), session)
        else:
            home, told = session.home, None
            if home not in candidates or not session.kept:
                return Place(FREE, candidates, session)
        others = candidates.mask & ~(1 << home.seat)
        excess = self._excess(home, candidates.those(others), facts, now) if others else 0.0
        if excess > 1.0:
            if session is None or now - session.moved_at >= self.table.returns.time_to_live:
                return Place(LEAVE, candidates.those(others), session)
            if excess > _FAR:
                return Place(VISIT, candidates.those(others), session, told)
        return Place(HOME, candidates.those(1 << home.seat), session, told)

    def _told(self, homes: SharedHomes, facts: Facts, session: Session | None, now: float) -> Worker | None:
        """Return the home of a session, if another router told that last; session: as it is known here."""
        if not _named(facts):
            return None
        home = homes.find(_key(facts), now - self.table.returns.time_to_live)
        return None if session is not None and home is session.home else home

    def _excess(self, home: Worker, others: Candidates, facts: Facts, now: float) -> float:
        """Return how burdened the home is, in units of what makes it overloaded."""
        if self._backlog is not None:
            here = self._backlog(home, 0, now)
            if 0.0 <= here <= _SPARE_TIME:
                return 0.0  # usual: no need to look at the others
            if here >= 0.0:
                size = len(facts.text)
                there = min([self._backlog(worker, size, now) for worker in others])
                if there >= 0.0:
                    return here / (_FACTOR_TIME * there + _SPARE_TIME)
        mean = others.roster.running(others.mask) / len(others)
        return home.load / (_FACTOR * mean + _SPARE)

    def name(self, place: Place, choice: Choice) -> None:
        """Name the reason of a choice, if it is this one's."""
        if place.kind == HOME:
            choice.branch = BRANCH

    def chosen(self, place: Place, choice: Choice, facts: Facts, now: float) -> Session:
        """Learn where a request of a session goes; return the session. Call it once for each leg."""
        kind, session, worker = place.kind, place.session, choice.worker
        self.placed[kind] += 1
        if session is None:
            session = self.table.enter(_key(facts), place.told or worker, now)
        elif place.told is not None:
            self.table.move(session, place.told)
        elif kind != HOME and kind != VISIT:
            if kind == LEAVE:
                session.moved_at = now
            self.table.move(session, worker)
        self.table.begins(session, now)
        self.contexts.reserve(session, facts, kind == NEW, kind != NEW or _named(facts))
        if self.homes is not None and _named(facts):
            self.homes.tell(session.key, session.home, now)
        return session

    def ended(self, session: Session, now: float, served: bool) -> None:
        """Take note that a leg of a session is over. served: a worker has answered it."""
        self.table.ended(session, now, served)

    # -- notices -------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """End the sessions whose time is up. Call it periodically."""
        for session in self.table.expire(now):
            self.contexts.ended(session)

    def lost(self, worker: Worker) -> None:
        """End the sessions of a worker that is gone, or lost its cache."""
        self.table.drop(worker)


def _named(facts: Facts) -> bool:
    """Return whether the client has named the session of a request."""
    return not facts.session.startswith(MARK)


def _key(facts: Facts) -> bytes:
    """Return the key of a request's session: what one worker has cached for a model is of no use to another model."""
    return facts.namespace + b"\0" + facts.session
