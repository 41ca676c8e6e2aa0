"""The desk: answers the questions of all relays, in the process that decides.

    Ask, Retry            --> Router.ask, Router.retry       --> Planned, Waits, Refused, NoRetry
    Began, Ended, Done    --> Router.began, Router.ended
    Done, Unasked, Shown     --> the listeners of this process: metrics and access log
    Router.deliver        --> Planned, Waits, Refused
    look                  every sweep: requests that were queued for too long are refused
    adopt                 requests that an earlier decider has planned
    leave                 a relay is gone: its queued requests are withdrawn, its leases closed, its requests ended

A relay numbers its requests for itself; the router gets numbers of the desk, in the order of arrival. Times are those
of the messages, but never go back: a relay may be a moment behind another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from sglang_router.errors import InternalError, RouterError
from sglang_router.processes import messages
from sglang_router.processes.facing import OUTCOMES, answered_of, facts_of, tag_of, tag_unasked, usage_of
from sglang_router.processes.failures import failure_of
from sglang_router.processes.message import PlannedOne
from sglang_router.processes.messages import OpenLeg, Planned
from sglang_router.processes.ports import RelayPort
from sglang_router.routing.decider import Delivered
from sglang_router.routing.events import Answered, Finished, FirstByte, Listener
from sglang_router.routing.facts import Facts
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Target, Wait
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.router import Router
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

_ADOPTED: Final = "adopted"
"""Reason in the choice of a leg that an earlier decider has planned."""


class OpenedRequest:
    """A request that a relay has asked for and not ended.

    number  the relay's
    legs    planned so far, the latest last
    plans   how many there were
    answer  the legs of the plan that answered the last question
    until   when it was queued for too long; None: it is not queued
    """

    __slots__ = ("answer", "facts", "legs", "number", "plans", "port", "tag", "until")

    def __init__(self, port: RelayPort, number: int, tag: RequestTag, facts: Facts) -> None:
        self.port = port
        self.number = number
        self.tag = tag
        self.facts = facts
        self.legs: list[PlannedLeg] = []
        self.plans = 0
        self.answer: tuple[PlannedLeg, ...] = ()
        self.until: float | None = None

    def leg(self, lease: int) -> PlannedLeg | None:
        """Return the leg with this lease."""
        for leg in reversed(self.legs):
            if leg.lease == lease:
                return leg
        return None


class Desk:
    """See the module.

    router    decides
    listener  hears what relays tell
    place     returns the number by which relays know a target
    """

    def __init__(self, router: Router, listener: Listener, place: Callable[[Target], int]) -> None:
        self._router = router
        self._listener = listener
        self._place = place
        self._numbers = itertools.count(1)
        self._open: dict[int, OpenedRequest] = {}  # by the desk's number
        self._queued: dict[int, OpenedRequest] = {}  # those of them that wait
        self._now = 0.0
        router.deliver = self.deliver

    def __repr__(self) -> str:
        return f"<Desk {len(self._open)} requests, {len(self._queued)} queued>"

    @property
    def requests(self) -> int:
        """Number of requests that have not ended."""
        return len(self._open)

    def _at(self, now: float) -> float:
        if now > self._now:
            self._now = now
        return self._now

    # -- questions -----------------------------------------------------------------------------------------------------

    def ask(self, port: RelayPort, ask: messages.Ask) -> None:
        """Answer where a new request goes."""
        text = ask.text
        if text is None:
            text = port.text(ask.at, ask.length)
        each = self._enter(port, ask, facts_of(ask, text))
        try:
            answer = self._router.ask(each.tag, each.facts, self._at(ask.now))
        except RouterError as error:
            port.put(messages.Refused(ask.number, failure_of(error), each.tag.limits))
            return
        except Exception:  # a policy failed
            port.put(messages.Refused(ask.number, failure_of(InternalError())))
            raise
        self._answer(each, answer)

    def _enter(self, port: RelayPort, ask: messages.Ask, facts: Facts) -> OpenedRequest:
        tag = tag_of(ask, next(self._numbers))
        each = self._open[tag.number] = port.requests[ask.number] = OpenedRequest(port, ask.number, tag, facts)
        return each

    def retry(self, port: RelayPort, retry: messages.Retry) -> None:
        """Answer where a request goes after a leg failed."""
        each = port.leases.get(retry.lease) or port.requests.get(retry.number)
        leg = None if each is None else each.leg(retry.lease)  # of a pair it may have ended, and be blamed now
        if each is None or leg is None:
            port.put(messages.NoRetry(retry.number))
            return
        facts = each.facts
        if retry.facts is not None:
            facts = facts_of(retry.facts, retry.facts.text or b"")
            if not retry.continued:  # what was missing of an adopted request
                each.facts = facts
        self._learn(each, retry.digest)
        each.answer = ()
        outcome, now = OUTCOMES[retry.outcome], self._at(retry.now)
        try:
            plan = self._router.retry(each.tag, leg, facts, outcome, now, retry.continued, retry.status)
        except Exception:  # a policy failed
            port.put(messages.NoRetry(retry.number))
            raise
        if plan is None:
            port.put(messages.NoRetry(retry.number))
        else:
            port.leases.pop(retry.lease, None)
            self._plan(each, plan)

    def _learn(self, each: OpenedRequest, digest: bytes) -> None:
        if digest and isinstance(each.facts.body, Imprint):
            each.facts.body.digest = digest

    # -- answers -------------------------------------------------------------------------------------------------------

    def deliver(self, number: int, answer: Delivered) -> None:
        """Send the router's late answer."""
        each = self._open.get(number)
        if each is None or answer is None:
            return
        if isinstance(answer, RouterError):
            self._unqueue(each)
            each.port.put(messages.Refused(each.number, failure_of(answer), each.tag.limits))
        else:
            self._answer(each, answer)

    def _answer(self, each: OpenedRequest, answer: Plan | Wait) -> None:
        if isinstance(answer, Plan):
            self._plan(each, answer)
        else:
            each.until = answer.until
            self._queued[each.tag.number] = each
            each.port.put(messages.Waits(each.number, answer.until, answer.why))

    def _plan(self, each: OpenedRequest, plan: Plan) -> None:
        port, legs = each.port, plan.legs
        self._unqueue(each)
        each.answer = legs
        each.plans += 1
        each.legs += legs
        sent = []
        for leg in legs:
            port.leases[leg.lease] = each
            place = self._place(leg.target)
            sent.append(
                PlannedOne(
                    leg.lease,
                    place,
                    leg.branch,
                    leg.matched,
                    leg.total,
                    leg.splice,
                    leg.rid,
                    leg.model,
                    leg.mark,
                )
            )
        port.put(Planned(each.number, sent, plan.delay, plan.retries, plan.handoff, each.tag.limits))

    def _unqueue(self, each: OpenedRequest) -> None:
        if each.until is not None:
            each.until = None
            del self._queued[each.tag.number]

    def look(self, now: float) -> None:
        """Refuse the requests that were queued for too long."""
        late = [each for each in self._queued.values() if each.until is not None and each.until <= now]
        for each in late:
            self._unqueue(each)
            error = self._router.expired(each.tag, self._at(now))
            each.port.put(messages.Refused(each.number, failure_of(error), each.tag.limits))

    # -- what became of it ---------------------------------------------------------------------------------------------

    def began(self, port: RelayPort, began: messages.Began) -> None:
        """Take note that a stream's answer began."""
        each = port.leases.get(began.lease)
        leg = None if each is None else each.leg(began.lease)
        if leg is not None:
            self._router.began(leg, began.now)  # it was not sent at once

    def holds(self, port: RelayPort, holds: messages.Holds) -> None:
        """Take note that a worker keeps a response."""
        each = port.leases.get(holds.lease)
        leg = None if each is None else each.leg(holds.lease)
        if leg is not None:
            self._router.holds(leg, holds.response)

    def ended(self, port: RelayPort, ended: messages.Ended) -> None:
        """End a leg."""
        self._end(port, ended, ended.outcome, usage_of(ended))

    def _end(self, port: RelayPort, told: messages.Ended | messages.Done, outcome: int, usage: Usage | None) -> None:
        each = port.leases.pop(told.lease, None)
        leg = None if each is None else each.leg(told.lease)
        if each is not None and leg is not None:
            self._learn(each, told.digest)
            self._router.ended(each.tag, leg, OUTCOMES[outcome], self._at(told.now), usage)

    def done(self, port: RelayPort, done: messages.Done) -> None:
        """End a request, and its last leg if that ends now."""
        answer = answered_of(done.answer)
        if done.ended >= 0:
            self._end(port, done, done.ended, answer.usage)
        each = port.requests.pop(done.number, None)
        if each is not None:
            del self._open[each.tag.number]
            if done.taken >= 0:
                each.tag.received = done.taken
            self._listener.finished(Finished(each.tag, each.leg(done.lease), answer))

    def withdraw(self, port: RelayPort, withdraw: messages.Withdraw) -> None:
        """Take a request out of the queue; end the legs of an answer that crossed this message."""
        each = port.requests.get(withdraw.number)
        if each is None:
            return
        if each.until is not None:
            self._unqueue(each)
            self._router.withdraw(each.tag)
        for leg in each.answer:
            if port.leases.pop(leg.lease, None) is not None:
                self._router.ended(each.tag, leg, Outcome.GONE, self._at(withdraw.now))

    def suspect(self, port: RelayPort, suspect: messages.Suspect) -> None:
        """Check a worker now."""
        self._router.suspect(PlannedLeg(0, Target("", name=suspect.name), ""))

    def shown(self, port: RelayPort, shown: messages.Shown) -> None:
        """Tell that an answer began."""
        each = port.requests.get(shown.number)
        leg = None if each is None else each.leg(shown.lease)
        if each is not None and leg is not None:
            self._listener.first_byte(FirstByte(each.tag, leg, shown.seconds))

    def told(self, port: RelayPort, told: messages.Unasked) -> None:
        """Tell the end of a request that was never asked for."""
        leg = None if told.leg is None else self._leg_of(told.leg)
        self._listener.finished(Finished(tag_unasked(told, next(self._numbers)), leg, answered_of(told.answer)))

    # -- relays that come and go ---------------------------------------------------------------------------------------

    def adopt(self, port: RelayPort, request: messages.OpenRequest, now: float) -> None:
        """Take a request over that an earlier decider has planned."""
        each = self._enter(port, request.ask, facts_of(request.ask, b""))
        for known in request.legs:
            leg = self._leg_of(known)
            each.legs.append(leg)
            worker = self._worker_of(known)
            if worker is not None:
                lease = self._router.fleet.lease(worker, False)
                lease.facts, lease.choice = each.facts, Choice(worker, _ADOPTED)
                if each.tag.streaming and not known.began:
                    lease.streams(-1, known.since)
                elif known.began:
                    lease.began(self._at(now))
                self._router.adopt(each.tag, leg, lease, self._at(now), len(request.legs) > 1)
                port.leases[leg.lease] = each

    def _worker_of(self, known: OpenLeg) -> Worker | None:
        worker = self._router.fleet.by_url(known.name)
        return worker if worker is not None and worker.id == known.worker_id else None

    def _leg_of(self, known: OpenLeg) -> PlannedLeg:
        worker = self._worker_of(known)
        target = Target(known.name, name=known.name, worker_id=known.worker_id) if worker is None else worker.target
        return PlannedLeg(known.lease, target, known.branch, known.matched, known.total)

    def leave(self, port: RelayPort, now: float) -> None:
        """End all requests of a relay that is gone, as if their clients had left."""
        now = self._at(now)
        for each in port.requests.values():
            del self._open[each.tag.number]
            if each.until is not None:
                self._unqueue(each)
                self._router.withdraw(each.tag)
            last = None
            for leg in each.legs:
                last = leg
                if port.leases.pop(leg.lease, None) is not None:
                    self._router.ended(each.tag, leg, Outcome.GONE, now)
            answer = Answered(0, "", Outcome.GONE, now - each.tag.start, retries=max(each.plans - 1, 0))
            self._listener.finished(Finished(each.tag, last, answer))
        port.requests.clear()
        port.leases.clear()
