"""Which workers may serve a request, and what it can wait for while none of them can.

    serving(facts)                    the pool of its model, or that of the worker that keeps what it asks for
    admitted(serving, facts, now)     the same, or the pool of a model that stands in for it; else an error
    candidates(serving, facts, now)   those of it that may take the request now
    line(serving, facts, now)         in which line it waits: sessions that begin have one of their own, and so has each
                                      worker that keeps what is continued
    rejoins, follow                   the same for queued requests, when their sessions end or begin
    awaited(serving, facts, now)      what it can wait for while there are none: ROOM, START or SESSION; else an error
    next_to_ask(facts, asked, now)    of what nobody knows who keeps it: the workers that were not asked yet

A request about something that a worker keeps (a response, a file) goes to that worker whatever its state: no other one
has it. A request that continues or uses it goes there as long as the worker takes requests, and waits for room there:
any other one would answer that there is no such thing. So does one that a fallback has begun, after its model is back.

Where a gateway names the only workers that may get a request (`Facts.among`), the others are no candidates for it,
whatever they keep, and it waits in a line of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from typing import Final, NamedTuple

from sglang_router.errors import QueueTimeout, RouterError, SessionsFull, WorkersFull, WorkersPaused, WorkersStarting
from sglang_router.routing.candidates import Candidates, candidates_of
from sglang_router.routing.facts import Facts
from sglang_router.routing.kept_ids import KeptIds
from sglang_router.routing.line import Queued
from sglang_router.routing.models import Serving
from sglang_router.routing.naming import Naming, adapter_of, rename
from sglang_router.routing.pair import ServingPair
from sglang_router.routing.pairs import Pairs
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.pool import Pool
from sglang_router.routing.pools import Pools
from sglang_router.routing.queue import PAUSED, PLACE, ROOM, SESSION, START, Queue
from sglang_router.routing.reasons import why_none
from sglang_router.routing.roles import PREFILL, ROLES
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.standing import awaits_continue
from sglang_router.routing.worker import Worker

_CONTINUED_AFTER: Final = 5.0
"""Retry-After in seconds while all workers are paused: nobody says for how long."""
HOLDER: Final = "holder"
"""Branch of a request that goes to the worker that keeps what it follows."""


class Asked(NamedTuple):
    """What the router needs to decide a queued request."""

    tag: RequestTag
    facts: Facts


class Assignment:
    """See the module.

    kept      who keeps responses, conversations, files and batches
    naming    aliases of models, and which model stands in for another
    sessions  where the sessions of requests are at home
    pairs     who serves in pairs
    """

    __slots__ = ("_pools", "kept", "naming", "pairs", "sessions")

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.kept = KeptIds()
        self.naming = Naming(pools)
        self.pairs = Pairs(pools, self.naming)
        self.sessions = Sessions()

    def __repr__(self) -> str:
        return f"<Assignment of {self._pools!r}, {self.kept!r}>"

    def holder(self, facts: Facts) -> Worker | None:
        """Return the worker that keeps what a request continues, uses or is about; None: nobody is known."""
        found = self.kept.holder(facts.follows) if facts.follows else None
        return found if found is None or facts.among is None or found.url in facts.among else None

    def serving(self, facts: Facts) -> Serving:
        """Return who serves a request; something without workers, if nobody does."""
        if not self._anywhere(facts):
            pools = self._pools
            return pools.only or (self.pairs.serving(facts) if pools.paired else self._named(facts))
        holder = self.holder(facts)
        if holder is not None:
            return self._pools.of(holder)
        keeping = self._keeping()
        with_workers = [pool for pool in keeping if pool.well()]  # whatever its model, any of them may keep it
        return (with_workers or keeping)[0]

    def _keeping(self) -> list[Pool]:
        """Return the pools whose workers keep responses: prefill workers answer nobody."""
        return [pool for pool in self._pools if pool.key.role != PREFILL] or list(self._pools)

    def refusal(self, serving: Serving, facts: Facts) -> RouterError | None:
        """Return the error for a request that nobody can serve; None for any other request."""
        pools = self._pools
        refusal = self.pairs.refusal(facts) if pools.paired and serving is pools.nobody else None
        return refusal or pools.refusal(serving, facts.model)

    def _anywhere(self, facts: Facts) -> bool:
        """Return whether any worker may answer a request, whatever model it serves."""
        endpoint = facts.endpoint  # not every worker of a pair answers at a WebSocket
        if not endpoint.anywhere or (endpoint.tunnel and self._pools.paired):
            return False
        return endpoint.about or not facts.model

    def _named(self, facts: Facts) -> Serving:
        """Return who serves the model of a request, where that is to be looked at."""
        if self.naming.on:
            found = self.naming.find(facts)
            return (self._continued(found, facts) or found) if facts.follows else found
        return self._pools.find(facts.model, adapter=adapter_of(facts))

    def _continued(self, serving: Serving, facts: Facts) -> Serving | None:
        """Let the fallback go on that keeps what a request continues; None: none of them does, or it takes no requests.

        It stood in for the model when that was stored; the model's own workers would say that there is no such thing.
        """
        holder = self.holder(facts)
        if holder is None or not holder.is_well or holder in serving.workers:
            return None
        for model in self.naming.fallbacks(facts):
            found = self._pools.find(model, holder.role, strict=True)
            if holder in found.workers:
                rename(facts, model)
                return found
        return None

    def admitted(self, serving: Serving, facts: Facts, now: float) -> Serving:
        """Return who serves a request: those, or the workers of another model that stands in for its own.

        Raises: RouterError, when it names a model that nobody serves, or none where it must.
        """
        if self.naming.on and (other := self.stands_in(serving, facts, now)) is not None:
            return other
        refusal = self.refusal(serving, facts)
        if refusal is not None:
            raise refusal
        return serving

    def stands_in(self, serving: Serving, facts: Facts, now: float) -> Serving | None:
        """Return who serves a request while its own model has no able worker; None: that has one, or nobody else has.

        The request bears the other model's name then.
        """
        if self._anywhere(facts) or serving.able(now):
            return None
        return self.instead(facts, now)

    def instead(self, facts: Facts, now: float) -> Serving | None:
        """Let the first fallback that has able workers serve a request; return them, or None, if there are none.

        The model's own workers are not looked at: call it when none of them can serve the request.
        """
        before = facts.model, facts.namespace, facts.asked
        for model in self.naming.fallbacks(facts):
            if any(self._pools.find(model, role, strict=True).workers for role in ROLES):
                rename(facts, model)
                serving = self.serving(facts)  # pairs do not serve every request
                if serving.able(now):
                    return serving
                facts.model, facts.namespace, facts.asked = before
        return None

    def candidates(self, serving: Serving, facts: Facts, now: float) -> Candidates:
        """Return the workers that may take a request now."""
        found = serving.candidates(now)
        if facts.among is not None:
            found = _within(found, facts.among)
        if (holder := self.holder(facts)) is not None:
            if facts.endpoint.about:
                return candidates_of([holder])
            able = serving.able(now)
            if holder in able:
                full = holder not in found and isinstance(serving.unavailable(now), WorkersFull)
                return (found if full else able).those(1 << holder.seat)
        if isinstance(serving, ServingPair):  # what a session needs, its prefill worker must hold
            return found
        return self.sessions.fitting(facts, found, now)

    def line(self, serving: Serving, facts: Facts, now: float) -> Hashable:
        """Return the line in which a request waits. A session that is live does not wait behind those that begin."""
        if not facts.endpoint.about and (holder := self.holder(facts)) is not None:
            return (serving, holder)
        if facts.among is not None:
            return (serving, facts.among)
        return (serving, SESSION) if self._begins(serving, facts, now) else serving

    def _begins(self, serving: Serving, facts: Facts, now: float) -> bool:
        """Return whether a session begins that needs room; what it needs of a pair, nobody looks at."""
        return self.sessions.begins(facts, now) and not isinstance(serving, ServingPair)

    def rejoins(self, queue: Queue[Asked], queued: Queued[Asked], now: float) -> bool:
        """Move a queued request to another line, if it belongs there now; return whether it does.

        For a session that ended while its request was queued begins anew, and nobody else may wait for that.
        """
        facts = queued.item.facts
        line = self.line(self.serving(facts), facts, now)
        return line != queued.line and queue.rejoin(queued.line, line, lambda item: item is queued.item)

    def follow(self, queue: Queue[Asked], begun: Collection[Queued[Asked]], now: float) -> bool:
        """Let the other requests of sessions that have begun wait no longer behind those that have not.

        begun  the requests that have begun, and were queued until now

        Return whether there are any.
        """
        names = {queued.item.facts.session for queued in begun} - {b""}
        moved = False
        for line in {queued.line for queued in begun}:
            if isinstance(line, tuple) and line[1] == SESSION:
                moved |= queue.rejoin(
                    line,
                    line[0],
                    lambda item: item.facts.session in names and not self.sessions.begins(item.facts, now),
                )
        return moved

    def next_to_ask(self, facts: Facts, asked: Container[Worker], now: float) -> tuple[Serving, Candidates] | None:
        """Return the workers to ask next for what is kept, after those that do not have it; None: there are none."""
        if self.holder(facts) is not None:
            return None
        for pool in self._keeping() if self._anywhere(facts) else [self.serving(facts)]:
            able = pool.able(now)
            left = able.those(able.set_of([worker for worker in able if worker not in asked]))
            if left:
                return pool, left
        return None

    def unavailable(self, serving: Serving, facts: Facts, now: float) -> RouterError:
        """Return the error that says why a request has no candidates."""
        refusal = self.refusal(serving, facts)
        if refusal is not None:
            return refusal
        error = serving.unavailable(now) if facts.among is None else _unavailable(serving, facts.among, now)
        halves = (serving.prefill, serving.decode) if isinstance(serving, ServingPair) else (serving,)
        if not isinstance(error, WorkersFull) and any(_is_paused(half, now) for half in halves):
            return WorkersPaused(retry_after=_CONTINUED_AFTER)
        return error

    def in_vain(self, queued: Queued[Asked], retry_after: float, now: float) -> RouterError:
        """Return the error for a request that has waited too long.

        retry_after  seconds after which another try may be worth it
        """
        facts, queued.item.tag.queued = queued.item.facts, now - queued.since
        if queued.why == SESSION:
            return SessionsFull(retry_after=retry_after)
        if queued.why != PLACE:
            error = self.unavailable(self.serving(facts), facts, now)
            if not isinstance(error, WorkersFull):
                return error
        return QueueTimeout(retry_after=retry_after)

    def awaited(self, serving: Serving, facts: Facts, now: float) -> str:
        """Return what a request without candidates can wait for: ROOM, START, PAUSED or SESSION.

        A session that begins waits for SESSION also while all workers are full: that is no reason to give it less time.

        Raises: RouterError, when waiting does not help.
        """
        found = serving.candidates(now)
        if found and (facts.among is None or _within(found, facts.among)):
            return SESSION if self.holder(facts) is None else ROOM
        error = self.unavailable(serving, facts, now)
        if isinstance(error, WorkersFull):
            return SESSION if self._begins(serving, facts, now) else ROOM
        if isinstance(error, WorkersStarting):
            return START
        if isinstance(error, WorkersPaused):
            return PAUSED
        raise error


def _is_paused(serving: Serving, now: float) -> bool:
    """Return whether only workers that the control plane has paused are missing."""
    return not serving.candidates(now) and awaits_continue(serving.workers)


def _within(candidates: Candidates, among: frozenset[str]) -> Candidates:
    """Return those candidates whose names are in a set."""
    return candidates.those(candidates.set_of([worker for worker in candidates if worker.url in among]))


def _unavailable(serving: Serving, among: frozenset[str], now: float) -> RouterError:
    """Return the error that says why none of the workers with these names is a candidate."""
    if _within(serving.able(now), among):
        return WorkersFull(retry_after=1.0)
    return why_none([worker for worker in serving.workers if worker.url in among], False, now)
