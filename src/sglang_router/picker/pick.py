"""One request of a gateway: from the whole request to the last byte of the answer that the gateway relays.

    start --> ask the decider --> where to --> head of the answer --> pieces ... --> done
                  |
                  '-- queued, or refused

It is to the decider what `relay.exchange.Exchange` is: the facts are read by the same functions, the lease is closed
exactly once, and one Finished event is told. But the gateway owns the connection to the worker. So nothing is retried
here, no stream is continued on another worker, and the time limits for parts of an answer are the gateway's. What is
left of them is --request-timeout-secs, after which the lease is closed, whatever the gateway does.

    state       meaning                                  deadline     when it passes
    NEW         read, not decided yet                    none
    QUEUED      in the decider's queue                   QUEUE        decider.expired: 408 or 503
    ROUTED      the gateway is told where to             REQUEST      504 for the gateway, if it still listens
    ANSWERING   the head of the answer has passed        REQUEST      the stream of the gateway breaks
    DONE        ended; what still comes is ignored       none
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NamedTuple, Protocol

from sglang_router.app.parts import App
from sglang_router.errors import InternalError, Overdue, RouterError, WorkerUnreachable
from sglang_router.picker.envoy_words import outcome_of
from sglang_router.picker.passing import Passing
from sglang_router.picker.replies import fields_of
from sglang_router.relay.answered_ids import answered_id
from sglang_router.relay.body import BodyHandler
from sglang_router.relay.clients import Clients
from sglang_router.relay.deadlines import DUE_REQUEST, NEVER, Deadline, Due
from sglang_router.relay.injected import UsageHider, with_ask
from sglang_router.relay.moves import EXCHANGE_MOVES, IllegalMove
from sglang_router.relay.outgoing import Outgoing
from sglang_router.relay.reading import begin
from sglang_router.relay.renaming import renamed
from sglang_router.relay.states import ANSWERING, DONE, NEW, QUEUED, ROUTED, ExchangeState
from sglang_router.routing.decider import Delivered
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.events import Answered, Finished, FirstByte
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Wait
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.tolerant import in_utf8
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker
from sglang_router.wire.gathering import Body
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.splice import Spliced, splice, splice_at

log: Final = logging.getLogger("sglang_router.picker")

_PAIRS: Final = (
    "The endpoint picker names one worker for a request, and pairs of prefill and decode workers need two. Remove the"
    " workers with these roles, or send requests to the router's own port."
)
_SERVED_BRANCH: Final = "served"
"""Branch of a lease on a worker that the gateway has chosen among those it was told."""


class ErrorAnswer(NamedTuple):
    """The router's whole answer to a request that goes nowhere."""

    status: int
    fields: Headers
    body: bytes


class Caller(Protocol):
    """The stream of a gateway, as its request sees it.

    peer     address of the client, as far as the gateway tells
    among    names of the only workers that may get the request; None: any may
    clients  where the request is registered
    """

    peer: str
    among: frozenset[str] | None
    clients: Clients

    def overrun(self) -> None:
        """Break off: the answer has taken too long."""


class Pick:
    """See the module. It implements `relay.clients.AnyExchange`, and what `relay.reading` needs of an exchange.

    deadline    kind and moment; `Clients.sweep` calls `overdue` when it has passed
    first_byte  seconds from the whole request to the first byte of the answer; negative: it has not come
    hider       hides the usage that the engine is asked for and the client has not; None: nothing is added
    leg         the leg that the decider counts; None: there is none
    status      of the answer; 0: none so far
    told_of     the endpoints that the gateway was told, in order
    verdict     where the request goes, or why it goes nowhere; None: not decided yet
    """

    tag: RequestTag

    def __init__(self, app: App, endpoint: Endpoint, caller: Caller, request: Request) -> None:
        # per request
        self.relay = app.relay
        self.request = request
        self.state: ExchangeState = NEW
        self.deadline: Deadline = NEVER
        self.hider: UsageHider | None = None
        self.verdict: PlannedLeg | ErrorAnswer | None = None
        self.leg: PlannedLeg | None = None
        self.told_of: tuple[str, ...] = ()
        self._app = app
        self._endpoint = endpoint
        self._caller = caller
        self._facts: Facts | None = None
        self._rest: Outgoing | None = None  # of the body, while it is given back
        self._retries = 0
        self._awaited: asyncio.Future[None] | None = None
        # per answer
        self.status = 0
        self.first_byte = -1.0
        self._passing: Passing | None = None

    def __repr__(self) -> str:
        return f"<Pick {self._endpoint.name} {self.state.name}, {self.leg!r}>"

    def _move(self, state: ExchangeState) -> None:
        if not EXCHANGE_MOVES[self.state] >> state & 1:
            raise IllegalMove(f"{state.name} in {self!r}")
        self.state = state

    @property
    def facts(self) -> Facts | None:
        """What routing needs of the request; None: it is not read yet."""
        return self._facts

    @facts.setter
    def facts(self, facts: Facts | None) -> None:
        """`relay.reading` sets it before it asks. Which workers the gateway allows stands in no body."""
        self._facts = facts
        if facts is not None:
            facts.among = self._caller.among

    # -- the request ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read the facts of the request and ask the decider."""
        caller = self._caller
        caller.clients.exchanges.add(self)
        try:
            begin(self, self._endpoint, caller.peer, caller.clients)
        except RouterError as error:
            self.refuse(error)
        except Exception:  # a fault, of a policy for instance
            log.exception("the request %s of a gateway could not be decided", self.tag.id)
            self.refuse(InternalError())

    def handle(self, handler: BodyHandler) -> None:
        """Do nothing: the gateway has the connection to the worker, so no other one can continue the answer."""

    def gone(self) -> None:
        """End: the gateway has closed the stream, because the client left or the worker broke off."""
        if self.state is DONE:
            return
        leg, begun = self.leg, self.state is ANSWERING
        if self.relay.queued.pop(self.tag.number, None) is not None:
            self.relay.decider.withdraw(self.tag)
        if leg is not None and begun:
            self.relay.decider.suspect(leg)  # which of the two it was, the worker's health tells
        self._end(Outcome.GONE, self.relay.clock())

    def unanswered_since(self) -> float | None:
        """Return when the request was complete; None once the answer has begun."""
        return None if self.status else self.tag.start

    def pause(self) -> None:
        """Do nothing: the gateway pauses its worker itself."""

    def resume(self) -> None:
        """Do nothing: the gateway reads its worker itself."""

    def unanswered(self) -> tuple[float, int, bool] | None:
        """Describe the request if it has no first byte; see `relay.clients.AnyExchange`."""
        facts, leg = self._facts, self.leg
        if self.first_byte >= 0.0 or facts is None:
            return None
        if leg is None:
            return self.tag.start, len(facts.text), True
        return (self.tag.start, leg.total - leg.matched, False) if facts.streaming else None

    def overdue(self, now: float) -> None:
        """React to the deadline, which has passed."""
        if self.deadline[0] is Due.QUEUE:
            self.relay.queued.pop(self.tag.number, None)
            self.refuse(self.relay.decider.expired(self.tag, now))
        else:
            self._end(Outcome.TIMEOUT, now, Overdue.code)
            self._caller.overrun()

    # -- the decision --------------------------------------------------------------------------------------------------

    async def decision(self) -> PlannedLeg | ErrorAnswer:
        """Wait until the request is decided."""
        while self.verdict is None:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        return self.verdict

    def _decide(self, verdict: PlannedLeg | ErrorAnswer) -> None:
        self.verdict = verdict
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def queue(self, wait: Wait) -> None:
        """Wait for the decider, which answers later."""
        self._move(QUEUED)
        self.deadline = (Due.QUEUE, wait.until)
        self.relay.queued[self.tag.number] = self

    def decided(self, answer: Delivered) -> None:
        """Act on the decider's late answer."""
        if isinstance(answer, Plan):
            self.follow(answer)
        elif isinstance(answer, Wait):
            self.queue(answer)
        else:
            self.refuse(answer or InternalError())

    def follow(self, plan: Plan) -> None:
        """Take the decision."""
        if len(plan.legs) > 1:  # roles come from anywhere: files, pods, the control plane
            self._refuse_pair(plan)
            return
        self._move(ROUTED)
        self._retries = plan.retries
        self.leg = plan.legs[-1]
        self.deadline = (DUE_REQUEST, self.tag.start + self.relay.timeouts.request)
        self._decide(self.leg)

    def _refuse_pair(self, plan: Plan) -> None:
        """Give both legs back."""
        now = self.relay.clock()
        for leg in plan.legs:
            self.relay.decider.ended(self.tag, leg, Outcome.ABANDONED, now)
        log.warning(_PAIRS)
        self.refuse(InternalError(_PAIRS))

    def refuse(self, error: RouterError, outcome: Outcome | None = None) -> None:
        """End with an error of the router, which is the client's answer."""
        self.status = error.status
        self._end(outcome, self.relay.clock(), error.code)
        self._decide(self._error_answer(error))
        error.with_traceback(None)  # its frames refer to this object, whose request may hold it: avoid a cycle

    def lost(self, detail: str) -> None:
        """Ask for another worker: the address of this one cannot be found."""
        leg, facts, outcome = self.leg, self._facts, Outcome.UNREACHABLE
        assert leg is not None
        assert facts is not None
        self.verdict = None
        again = self.relay.decider.retry(self.tag, leg, facts, outcome, self.relay.clock())
        if isinstance(again, Plan):
            self.follow(again)
            if self.state is DONE or facts.among is None or again.legs[-1].target.name in facts.among:
                return
            outcome = Outcome.ABANDONED  # a retry may leave the subset
        self.refuse(WorkerUnreachable(detail), outcome)

    def begin(self, leg: PlannedLeg) -> None:
        """Begin to give the body back, as the worker gets it."""
        self._rest = Outgoing(self._outgoing(leg))

    def next(self) -> tuple[bytes, bool]:
        """Return the next piece of it, and whether more follows. Not behind the end of the request: it is freed."""
        assert self._rest is not None
        return bytes(self._rest.next()), not self._rest.done

    def _outgoing(self, leg: PlannedLeg) -> Body | Spliced:
        """Return the body as the worker gets it; see `relay.leg.Leg.send`."""
        body, facts = self.request.body, self._facts
        members = leg.splice if self.hider is None else with_ask(leg.splice)
        if leg.model and facts is not None:
            return renamed(body, facts, leg.model, members)
        if not members:
            return body
        place = None if facts is None else facts.place
        return splice_at(body, place, members) if place else splice(in_utf8(body), members)

    # -- the answer ----------------------------------------------------------------------------------------------------

    def answered(self, status: int, fields: Headers, served: Worker | None = None, tried: bool = False) -> None:
        """Take the head of the answer.

        served  the worker that has answered, if that is another one than was chosen
        tried   the gateway was told to try it next
        """
        if self.state is not ROUTED:
            return
        if served is not None:
            self._moved(served, tried)
        self._move(ANSWERING)
        self.status = status
        self._passing = Passing(status, fields, self.hider)

    def _moved(self, served: Worker, tried: bool) -> None:
        """Let the lease be one of the worker that served. The one that it was tried after did not answer."""
        relay, router, leg, facts, now = self.relay, self._app.router, self.leg, self._facts, self.relay.clock()
        assert leg is not None
        assert facts is not None
        relay.decider.ended(self.tag, leg, Outcome.UNREACHABLE if tried else Outcome.ABANDONED, now)
        lease = router.fleet.lease(served, False)
        lease.facts, lease.choice = facts, Choice(served, _SERVED_BRANCH)
        if facts.streaming:
            lease.streams(-1, now)
        self.leg = PlannedLeg(lease.number, served.target, _SERVED_BRANCH, 0, leg.total)
        router.adopt(self.tag, self.leg, lease, now)

    def data(self, data: bytes, done: bool) -> bytes:
        """Take a piece of the answer's body; return what the client gets of it."""
        passing = self._passing
        if self.state is not ANSWERING or passing is None:
            return data
        began = passing.begun
        data = passing.feed(data, done)
        if passing.begun and not began:
            self._begun(passing)
        if done:
            self._done(passing)
        return data

    def _begun(self, passing: Passing) -> None:
        """Report the first byte of the answer."""
        relay, tag, leg, now = self.relay, self.tag, self.leg, self.relay.clock()
        assert leg is not None
        self.first_byte = now - tag.start
        if tag.streaming and passing.outcome is Outcome.SERVED:
            relay.decider.began(leg, now)
        if self._endpoint.keeps and (kept := answered_id(self._endpoint.name, passing.first)):
            relay.decider.holds(leg, kept)
        if relay.listener.hears_first_byte:
            relay.listener.first_byte(FirstByte(tag, leg, self.first_byte))

    def _done(self, passing: Passing) -> None:
        """End: the whole answer has passed."""
        said = outcome_of(self.status, passing.last)
        if said is not None and self.leg is not None:
            self.relay.decider.suspect(self.leg)
        self._end(said or passing.outcome, self.relay.clock())

    def told(self) -> Headers:
        """Return the fields that are added to the head of the answer."""
        answers, tag = self.relay.answers, self.tag
        lines = answers.cors_fields(self.request.headers) + answers.decision(tag, self.leg, self._retries)
        return [(b"x-request-id", tag.raw_id), *fields_of(lines)]

    def _error_answer(self, error: RouterError) -> ErrorAnswer:
        """Return the answer for an error."""
        answers, tag = self.relay.answers, self.tag
        decision = answers.decision(tag, self.leg, self._retries)
        whole = answers.error(error, self.request, tag.raw_id, True, decision)
        head, _, body = whole.partition(b"\r\n\r\n")
        return ErrorAnswer(error.status, fields_of(head), body)

    def _end(self, outcome: Outcome | None, now: float, code: str = "") -> None:
        """End the request, exactly once: close the lease and emit Finished."""
        self._move(DONE)
        self.deadline = NEVER
        relay, tag, leg, passing = self.relay, self.tag, self.leg, self._passing
        usage: Usage | None = None
        if outcome is Outcome.SERVED and passing is not None and not self._endpoint.about:
            usage = passing.usage(tag.streaming)  # a stored response repeats what it took when it was made
        if leg is not None:
            relay.decider.ended(tag, leg, outcome or Outcome.ABANDONED, now, usage)
        duration = max(0.0, now - tag.start)
        sent = 0 if passing is None else passing.sent
        answer = Answered(self.status, code, outcome, duration, self.first_byte, sent, self._retries)
        answer.usage = usage
        relay.listener.finished(Finished(tag, leg, answer))
        self._caller.clients.exchanges.discard(self)
        self._facts = self._rest = None  # a gateway that reads nothing would keep the body
