"""Decide, in one process, which worker gets a request, when the request is queued, and whether and where it is retried.

    ask(tag, facts, now)      the pool of the request --> candidates --> policy --> lease --> Plan
                                                      '-- no candidate, or no place: the queue (Wait), or a final error
    retry(tag, leg, ...)      another worker, or the same one after a pause; None when the rules allow no retry
    ended(tag, leg, ...)      the lease is closed; then queued requests may begin
    deliver(number, answer)   called with the answer to a request that was queued

A retry goes at once to a worker that has not failed this request. Only when there is none left does it return to a
worker that has, after a pause that grows (exponential, with jitter). A worker that answered BUSY, that broke off, or
whose host vanished gets no retry of the same request.

Whether a failure is the worker's doing or the request's, a second worker tells (`routing.trail`): what fails there
alike is the request's, and is not tried a third time. A request that broke two workers is refused when it comes again
(`routing.quarantine`). A request that has failed is never the probe of a half-open breaker.

A budget limits all retries together (`routing.retry_budget`), so that they do not overload a fleet in trouble. A retry
after a refused connection is free, because that attempt cost no engine anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from typing import Final

from sglang_router.errors import InternalError, QueueTimeout, RouterError
from sglang_router.routing.again import Again, NextTry
from sglang_router.routing.assignment import Asked, Assignment
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.decider import Deliver
from sglang_router.routing.events import LegEnded, Listener, Retried, WorkerChanged
from sglang_router.routing.facts import Facts
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.judge import Judge
from sglang_router.routing.keys import bounded
from sglang_router.routing.lease import Lease
from sglang_router.routing.legs import Legs
from sglang_router.routing.line import Queued
from sglang_router.routing.models import Serving
from sglang_router.routing.naming import keep_name
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.pair import ServingPair
from sglang_router.routing.pairing import Pairing
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Wait
from sglang_router.routing.quarantine import Quarantine
from sglang_router.routing.queue import PLACE, Queue
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.recorder import Recorder
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.roles import PREFILL
from sglang_router.routing.rules import RetryRules
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.trail import HOLD, Trail
from sglang_router.routing.truth import Truth
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

Soon = Callable[[Callable[[float], None]], None]
"""Calls a function with the time soon, after the current call: the event loop's `call_soon`."""


_SERVED: Final = Outcome.SERVED
_SILENT_BREAKS: Final = (Outcome.BROKEN, Outcome.LOST)


class Router(Listener):
    """See the module. It implements `routing.decider.Decider`; add it to the listeners of the fleet.

    listener   hears Routed and Retried
    retries    how often a request is retried, and after which pauses
    budget     limits all retries together
    rng        for the jitter of pauses
    soon       lets the router check the queue after the call that freed something
    check_now  requests a health check of a worker
    pairs      who serves in pairs, by which rules; naming: aliases of models, and which stands in for another
    tracer     hears LegEnded; None: nobody does
    quotas     of single clients and models; without rules at first
    """

    deliver: Deliver

    def __init__(
        self,
        fleet: Fleet,
        queue: Queue[Asked],
        listener: Listener,
        retries: RetryRules,
        budget: RetryBudget,
        rng: random.Random,
        soon: Soon,
        check_now: Callable[[Worker], None],
    ) -> None:
        self.fleet, self.queue, self.budget = fleet, queue, budget
        self.quarantine = Quarantine(rng)
        self.quotas = Quotas()
        self._judge = Judge(fleet, self.quarantine, listener)
        self._truth = Truth(fleet, soon)
        self._pools, self._who = fleet.pools, Assignment(fleet.pools)
        self.naming, self.pairs = self._who.naming, self._who.pairs
        self._again = Again(fleet, self._who, retries, rng)
        self._legs = Legs(fleet, self._who, listener)
        self._pairing = Pairing(fleet.pools, self._who, self._legs, rng)
        self._listener, self._soon, self.check_now = listener, soon, check_now
        self._leases = self._legs.open
        self.tracer: Callable[[LegEnded], None] | None = None
        self._trails: dict[int, Trail] = {}  # by number of the request; only of requests that are retried now
        self._scheduled = False  # `_let_in` will be called
        self._pools_seen = fleet.pools.version  # version of the pools to which the queue's lines belong

    def __repr__(self) -> str:
        return f"<Router {len(self._leases)} leases, {self.queue!r}, {self.budget!r}>"

    @property
    def sessions(self) -> Sessions:
        """What sends the requests of a session to the same worker. Set it before the first request: by default none."""
        return self._who.sessions

    @sessions.setter
    def sessions(self, sessions: Sessions) -> None:
        self._who.sessions = sessions

    @property
    def recorder(self) -> Recorder | None:
        """What keeps decisions; None: nobody does."""
        return self._legs.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._legs.recorder = recorder

    @property
    def leases(self) -> int:
        """Number of leases that are not ended."""
        return len(self._leases)

    def open_leases(self) -> Iterable[Lease]:
        """Return those leases, and those of failed legs whose retry is not decided."""
        return self._leases.values()

    # -- a new request -------------------------------------------------------------------------------------------------

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Plan | Wait:
        """Decide where a new request goes. Raises: RouterError, see `Decider.ask`."""
        if self.quotas.on:
            self.quotas.admit(tag, facts, now)
        if self._who.sessions.on:
            self._who.sessions.recognise(facts)
        pool = self._pools.only or self._who.serving(facts)
        if self.quarantine.broken:
            self.quarantine.check(facts, now)
        if self.queue.idle:
            special = facts.session or facts.follows or facts.among is not None
            candidates = self._who.candidates(pool, facts, now) if special else pool.candidates(now)
            if candidates.mask:
                self.budget.request(now)
                if self._pools.only is not None:  # the usual case
                    return Plan((self._legs.take(tag, facts, pool, candidates, now),))
                return self._plan(tag, facts, pool, candidates, now)
        return self._ask_queue(tag, facts, pool, now)

    def _ask_queue(self, tag: RequestTag, facts: Facts, pool: Serving, now: float) -> Plan | Wait:
        """Decide where a limit is set, requests are queued, or no worker can take the request now."""
        pool, queue = self._who.admitted(pool, facts, now), self.queue
        line, priority = self._who.line(pool, facts, now), self.quotas.priority(tag, facts)
        why = queue.why_wait(line, queue.rank(priority, now))
        if why != PLACE:
            queue.take_token(now)
            if not why:
                if candidates := self._who.candidates(pool, facts, now):
                    return self._begin(tag, facts, pool, candidates, now)
                why = self._who.awaited(pool, facts, now)
        lower = queue.check_length(why, now, priority)
        if why == PLACE:
            queue.take_token(now)
        if lower is not None:
            self.deliver(lower.number, queue.give_up(lower, now))
        queued = queue.wait(tag.number, Asked(tag, facts), line, why, now, priority)
        return Wait(queued.until, why)

    def _begin(self, tag: RequestTag, facts: Facts, pool: Serving, candidates: Candidates, now: float) -> Plan:
        """Plan a request, and let it take its place: in this order, so that a policy that fails takes none."""
        self.budget.request(now)
        plan = self._plan(tag, facts, pool, candidates, now)
        self.queue.begin(tag.number, now)
        return plan

    def _plan(
        self,
        tag: RequestTag,
        facts: Facts,
        pool: Serving,
        candidates: Candidates,
        now: float,
        trail: Trail | None = None,
        delay: float = 0.0,
        readers: Candidates | None = None,
    ) -> Plan:
        """Plan an attempt, which is sent after `delay`: one leg, or two of a pair. readers: see `Pairing.plan`."""
        if isinstance(pool, ServingPair):
            return self._pairing.plan(tag, facts, pool, candidates, now, trail, delay, readers)
        leg = self._legs.take(tag, facts, pool, candidates, now, trail, delay)
        return Plan((leg,), delay, 0 if trail is None else trail.retries)

    # -- a leg failed --------------------------------------------------------------------------------------------------

    def retry(
        self,
        tag: RequestTag,
        leg: PlannedLeg,
        facts: Facts,
        outcome: Outcome,
        now: float,
        continued: bool = False,
        status: int = 0,
    ) -> Plan | None:
        """Close the leg's lease with its outcome, and plan a retry if the rules allow one; see `Decider.retry`."""
        lease = self._leases.get(leg.lease) or self._pairing.lease_of(tag.number)
        if lease is None:
            return None
        trail = self._trails.pop(tag.number, None) or Trail(lease.facts)
        failure = self._judge.failed(trail, lease, outcome, status, now)
        self._pairing.failed(tag.number, lease, outcome)
        self.freed()
        # Whether a broken stream may go on is up to the body handler, unless this worker broke off before it answered.
        final = failure is not None and trail.is_final(failure) and not (continued and outcome not in _SILENT_BREAKS)
        facts.session = facts.session or lease.facts.session  # not read anew for the rest of a broken stream
        keep_name(facts, lease.facts)
        found: NextTry | None = None
        if outcome is Outcome.REJECTED and not continued:
            if status == 404 and facts.follows:
                found = self._again.not_found(trail, lease.worker, facts, now)
        elif (continued or outcome.retryable) and not final:
            found = self._again.after(trail, lease.worker, facts, outcome, self.budget, now, continued)
        if found is None:
            # A worker that rejects the continuation of a stream says nothing of the request.
            self._judge.decide(tag, trail, Outcome.CUT if continued else outcome, now)
            return None
        plan = self._plan(tag, facts, found.serving, found.candidates, now, trail, found.delay, found.readers)
        self._trails[tag.number] = trail
        if self._leases.pop(leg.lease, None) is not None:
            self._pairing.replaced(tag.number, leg)
        if lease.session is not None:
            self._who.sessions.ended(lease.session, now, False)
        self._listener.retried(Retried(tag, leg, outcome, plan.delay, status))
        return plan

    # -- what became of a leg ------------------------------------------------------------------------------------------

    def began(self, leg: PlannedLeg, now: float) -> None:
        """Tell the lease that the first byte of a stream's answer arrived."""
        lease = self._leases.get(leg.lease)
        if lease is None:
            return
        lease.began(now)
        if self._trails and not lease.closed and lease.worker.role != PREFILL:
            trail = self._trails.get(lease.tag.number)
            self._judge.blame([] if trail is None else trail.release(now), now)

    def ended(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, now: float, usage: Usage | None = None) -> None:
        """Close the leg's lease; with the last leg of a request free its place."""
        lease = self._leases.pop(leg.lease, None)
        if lease is None:
            return
        if self.tracer is not None:
            self.tracer(LegEnded(tag, leg, outcome, now, usage, lease.facts.session))
        last = not self._pairing.open or self._pairing.is_last(tag.number, lease, outcome, now)
        if lease.session is not None:
            self._who.sessions.ended(lease.session, now, outcome is _SERVED)
        if outcome is _SERVED and lease.facts.follows:
            self._who.kept.keep(lease.facts.follows, lease.worker)
        if outcome is _SERVED:
            self._truth.served(lease, usage, now)
        if not last:  # the end of the other leg decides who is to blame
            self._judge.half(self._trails, tag, lease, outcome, now)
            self._listener.half_ended(LegEnded(tag, leg, outcome, now, usage, lease.facts.session))
            self.freed()
            return
        if outcome is not _SERVED or self._trails or self.quarantine.broken:
            trail = self._trails.pop(tag.number, None) or Trail(lease.facts)
            if not lease.closed:  # `retry` has decided on the others
                self._judge.failed(trail, lease, outcome, 0, now)
                undecided = outcome is Outcome.GONE and lease.worker not in trail.tries
                self._judge.decide(tag, trail, outcome, now, undecided)
        else:
            lease.close(outcome, now)
        if not self.queue.idle:
            self.queue.leave(tag.number, now)
            self.freed()

    def holds(self, leg: PlannedLeg, response: bytes) -> None:
        """Take note that the leg's worker keeps a response with this id."""
        lease = self._leases.get(leg.lease)
        if lease is not None:
            self._who.kept.keep(bounded(response), lease.worker)

    def adopt(self, tag: RequestTag, leg: PlannedLeg, lease: Lease, now: float, paired: bool = False) -> None:
        """Take a leg that a decider before this one has planned. paired: it is one of two; roles may be unknown yet."""
        lease.number, lease.tag = leg.lease, tag
        self._leases[leg.lease] = lease
        if paired:
            self._pairing.adopted(tag.number, lease)
        self.queue.begin(tag.number, now)

    def suspect(self, leg: PlannedLeg) -> None:
        """Check the leg's worker now: its connection broke."""
        worker = self.fleet.by_url(leg.target.name)
        if worker is not None:
            self.check_now(worker)

    # -- the queue -----------------------------------------------------------------------------------------------------

    def expired(self, tag: RequestTag, now: float) -> RouterError:
        """Remove a request that waited too long from the queue; return the error that answers it."""
        queued = self.queue.remove(tag.number)
        after = self.queue.retry_after(now, 0 if queued is None else queued.priority)
        return QueueTimeout(retry_after=after) if queued is None else self._who.in_vain(queued, after, now)

    def withdraw(self, tag: RequestTag) -> None:
        """Remove a request whose client left from the queue."""
        self.queue.remove(tag.number)

    def refuse_stranded(self, error: RouterError, now: float) -> None:
        """Refuse, for a shutdown, all requests queued for a pool in which no worker can serve any more."""
        for queued in self.queue:
            if not self._who.serving(queued.item.facts).able(now):
                self.queue.remove(queued.number)
                self.deliver(queued.number, error)

    def look(self, now: float) -> None:
        """Start the queued requests that can begin now. Call it periodically.

        Time alone can make a worker a candidate: an open breaker becomes half-open, or a slow start advances. And it
        ends the time for which a failure is held against nobody.
        """
        for trail in self._trails.values():
            self._judge.blame(trail.release(now - HOLD), now)
        if self.quarantine.broken:
            self.quarantine.tidy(now)
        self._who.sessions.look(now)
        if len(self.queue):
            self._let_in(now)

    def worker_changed(self, event: WorkerChanged) -> None:
        """Check the queue: requests may wait for this worker, or in vain. Its sessions may have lost their home."""
        if event.what in ("removed", "restarted"):
            self._who.sessions.lost(event.worker)
        self.freed()

    def freed(self) -> None:
        """Check the queue after the current call, once: a worker may have room again."""
        if len(self.queue) and not self._scheduled:
            self._scheduled = True
            self._soon(self._let_in)

    def _let_in(self, now: float) -> None:
        """Start the queued requests that can begin now, first come, first served; refuse those that wait in vain."""
        self._scheduled, passed_over, begun = False, set[Hashable](), list[Queued[Asked]]()
        self._regroup(now)
        while self.queue.has_place and (queued := self.queue.first(passed_over)) is not None:
            try:
                answer = self._answer(queued.item, now)
            except Exception:  # a policy failed: the event loop logs it, and the others are let in after it
                self.freed()
                self.deliver(queued.number, InternalError())
                raise
            if not isinstance(answer, str):
                queued.item.tag.queued = now - queued.since
                self.deliver(queued.number, answer)
                begun.append(queued)
                continue
            if not self._who.rejoins(self.queue, queued, now):
                passed_over.add(queued.line)
            self._still_waits(queued.line, answer)
        if self._who.follow(self.queue, begun, now):
            self.freed()

    def _answer(self, asked: Asked, now: float) -> Plan | RouterError | str:
        """Return the answer to a queued request and remove it from the queue; or return what it still waits for."""
        try:
            pool = self._who.admitted(self._who.serving(asked.facts), asked.facts, now)
            if not (candidates := self._who.candidates(pool, asked.facts, now)):
                return self._who.awaited(pool, asked.facts, now)
        except RouterError as error:
            self.queue.remove(asked.tag.number)
            return error
        self.queue.remove(asked.tag.number)
        return self._begin(asked.tag, asked.facts, pool, candidates, now)

    def _still_waits(self, line: Hashable, why: str) -> None:
        """Keep the requests of a line queued. Deliver the new deadline of those that waited for something else."""
        for queued in self.queue.line_waits_for(line, why):
            self.deliver(queued.number, Wait(queued.until, why))

    def _regroup(self, now: float) -> None:
        """Move each queued request to the line of its pool, if pools were added or removed."""
        version = self.fleet.pools.version
        if self._pools_seen != version:
            self._pools_seen = version
            self.queue.regroup(lambda asked: self._who.line(self._who.serving(asked.facts), asked.facts, now))
