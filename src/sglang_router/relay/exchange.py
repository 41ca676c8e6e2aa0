"""One relayed request of one client: from the complete request to the last byte of its answer.

    start --> ask the decider --> legs sent --> first byte --> bytes ... --> end                 without a failure
                  |                   ^           |
                  '-- queued ---------'           '-- failing status, or broken before that: retry, or the error

    state       meaning                                      deadline               when the deadline passes
    NEW         read, not decided yet                        none
    QUEUED      in the decider's queue                       QUEUE                  decider.expired: 408 or 503
    ROUTED      has a plan; no answer has begun yet          REQUEST, FIRST_BYTE    504
    ANSWERING   the client has the head                      PROGRESS, REQUEST      the answer breaks
    DONE        ended; later events are ignored              none

An answer begins with the first byte of its body, a stream of events with its first event (`relay.beginning`). Which
state may follow which is a table in `relay.moves`. Every exchange ends in `_end`, exactly once: the leases are closed
and one Finished event is emitted. Once the client has the head of an answer nothing is retried, unless a body handler
can continue it. If the worker breaks then, the client gets an error event (when the answer is a stream of events) and a
connection without a clean end.
"""

from __future__ import annotations

from sglang_router.errors import InternalError, RouterError, StreamBroken
from sglang_router.relay import failover, showing, timing
from sglang_router.relay.answered_ids import answered_id
from sglang_router.relay.body import BodyHandler
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.deadlines import DUE_REQUEST, NEVER, Deadline, Due
from sglang_router.relay.early import Early
from sglang_router.relay.handled import Handled
from sglang_router.relay.injected import UsageHider
from sglang_router.relay.leg import Leg
from sglang_router.relay.moves import EXCHANGE_MOVES, IllegalMove
from sglang_router.relay.pair import Pair, follow_pair
from sglang_router.relay.pending import Pending, error_of
from sglang_router.relay.reading import begin
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import ANSWERING, DONE, NEW, QUEUED, ROUTED, ExchangeState
from sglang_router.routing.decider import Delivered
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.events import Answered, Finished, FirstByte
from sglang_router.routing.facts import LARGE, Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Wait
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead


class Exchange:
    """See the module. It implements `relay.clients.AnyExchange` for its client connection and owns its legs.

    deadline    kind and moment; `Clients.sweep` calls `overdue` when it has passed
    facts       what routing needs of the request; None when it was refused before that
    early       what the client was sent before an answer had begun; None: nothing
    first_byte  seconds from the complete request to the first byte of the answer; negative: not sent yet
    handled     the body handler, where a stream has one
    hider       hides the usage that the engine is asked for and the client has not; None: nothing is added to the body
    keep_alive  the client's connection stays open after the answer
    legs        the leg in flight, whose answer the client gets; none before it is sent
    pair        the last pair of legs; None: the request had none
    relay       what all exchanges share
    request     the client's request; with another body for the leg that continues a stream
    shown       the leg whose answer the client gets; None before its head was sent
    state       see the table of the module
    status      that the client was sent; 0: nothing yet
    tag         identifies the request in events; set by `start`
    """

    __slots__ = (
        "_endpoint",
        "_pending",
        "_plan",
        "client",
        "deadline",
        "early",
        "facts",
        "first_byte",
        "handled",
        "hider",
        "keep_alive",
        "legs",
        "pair",
        "relay",
        "request",
        "shown",
        "state",
        "status",
        "tag",
    )

    tag: RequestTag

    def __init__(self, relay: Relay, endpoint: Endpoint, client: ClientConnection, request: Request) -> None:
        # per request
        self.relay = relay
        self.client = client
        self.request = request
        self._endpoint = endpoint
        self.keep_alive = request.keep_alive
        self.facts: Facts | None = None
        self.hider: UsageHider | None = None
        self.state = NEW
        self.deadline: Deadline = NEVER
        # per attempt
        self._plan: Plan | None = None
        self.legs: tuple[Leg, ...] = ()
        self.pair: Pair | None = None
        self._pending: Pending | None = None  # a failed leg whose retry the decider has not decided yet
        # per answer
        self.early: Early | None = None
        self.shown: Leg | None = None
        self.status = 0
        self.first_byte = -1.0
        self.handled: Handled | None = None

    def __repr__(self) -> str:
        kind, at = self.deadline
        due = "" if kind is Due.NEVER else f", {kind.value} due at {at:.3f}"
        legs = "".join(f", {leg!r}" for leg in self.legs)
        return f"<Exchange {self._endpoint.name} {self.state.name}{due}{legs}>"

    def _move(self, state: ExchangeState) -> None:
        if not EXCHANGE_MOVES[self.state] >> state & 1:
            raise IllegalMove(f"{state.name} in {self!r}")
        self.state = state

    # -- the client's side ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read the facts of the request and ask the decider."""
        client = self.client
        try:
            begin(self, self._endpoint, client.peer, client.clients)
        except RouterError as error:
            self.refuse(error)
        except Exception:  # a fault, of a policy for instance: the event loop logs it
            self.refuse(InternalError())
            raise

    def gone(self) -> None:
        """Give up the legs and end: the client closed its connection."""
        self.unqueue()
        self._end(Outcome.GONE, self.relay.clock())

    def unanswered_since(self) -> float | None:
        """Return when the request was complete; None once the client was sent a part of the answer."""
        return None if self.status else self.tag.start

    def pause(self) -> None:
        """Stop reading from the workers: the client does not read."""
        for leg in self.legs:
            leg.pause()

    def resume(self) -> None:
        """Read from the workers again: the client reads again."""
        for leg in self.legs:
            leg.resume()

    def overdue(self, now: float) -> None:
        """React to the deadline, which has passed."""
        timing.overdue(self, now)

    def unanswered(self) -> tuple[float, int, bool] | None:
        """Describe the request if it has no first byte; see `relay.clients.AnyExchange`."""
        return timing.unanswered(self)

    @property
    def planned(self) -> PlannedLeg | None:
        """The last leg; None: no worker was asked."""
        return None if self._plan is None else self._plan.legs[-1]

    @property
    def retries(self) -> int:
        """Attempts after the first."""
        return 0 if self._plan is None else self._plan.retries

    @property
    def stalled(self) -> bool:
        """Whether the client does not read what it is sent."""
        return self.client.stalled

    # -- the decision --------------------------------------------------------------------------------------------------

    def handle(self, handler: BodyHandler) -> None:
        """Let a handler follow the body of the answer."""
        self.handled = Handled(self, handler)

    def queue(self, wait: Wait, pending: Pending | None = None) -> None:
        """Wait for the decider, which answers later. pending: the failed leg for which it was asked for a retry."""
        if pending is None:
            self._move(QUEUED)
            self.deadline = (Due.QUEUE, wait.until)
        self._pending = pending
        self.relay.queued[self.tag.number] = self

    def unqueue(self) -> None:
        """Leave the decider's queue."""
        if self.relay.queued.pop(self.tag.number, None) is not None:
            self.relay.decider.withdraw(self.tag)

    def decided(self, answer: Delivered) -> None:
        """Act on the decider's late answer."""
        pending = self._pending
        if isinstance(answer, Wait):
            self.queue(answer, pending)
        elif pending is not None:
            self._pending = None
            failover.decided(self, pending, answer)
        elif isinstance(answer, Plan):
            self.follow(answer)
        else:
            self.refuse(answer or InternalError())

    def follow(self, plan: Plan, fresh: bool = False) -> None:
        """Send the legs of a plan. fresh: on new connections, as what must not be sent twice always is."""
        relay, planned = self.relay, plan.legs
        self._plan = plan
        if self.state is not ANSWERING:
            self._move(ROUTED)
        self.deadline = (DUE_REQUEST, self.tag.start + relay.timeouts.request)
        decoding = self.request.http10 or (self.handled is not None and self.handled.handler.decoding)
        last = Leg(self, planned[-1], relay.batch, self.client.transport, decoding)
        if len(planned) == 1 and not (plan.retries or self._endpoint.once):
            self.legs = (last,)
            relay.batch.leg(last)
        else:
            follow_pair(self, plan, last, fresh or self._endpoint.once)

    def sending(self, leg: Leg) -> None:
        """Set the deadline for the first byte of a stream whose leg is sent now."""
        timing.sending(self)

    def holding(self, leg: Leg) -> None:
        """Extend the deadline of an answer that is held back, because it has not begun."""
        timing.holding(self)

    # -- the worker's side (Owner) -------------------------------------------------------------------------------------

    def answered(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the head of a leg's answer: retry a failing status, pass anything else on to the client."""
        if self.shown is not None and self.handled is not None:
            self.handled.continued(leg, head, data, done)
            return
        if head.status >= 400 and failover.retry_status(self, leg, head, data, done):
            return
        if self.pair is None or not self.pair.holds(head, data, done):
            self.pass_on(leg, head, data, done)

    def _begin(self, leg: Leg) -> float:
        """Report the first byte of an answer to the decider; return the time."""
        now = self.relay.clock()
        if self.tag.streaming and leg.outcome is Outcome.SERVED:
            self.relay.decider.began(leg.planned, now)
        return now

    def pass_on(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Pass the answer of this leg on to the client."""
        relay, tag = self.relay, self.tag
        self._move(ANSWERING)
        self.shown = leg
        self.status = self.status or head.status
        now = self._begin(leg)
        self.first_byte = now - tag.start
        if self._endpoint.keeps and (kept := answered_id(self._endpoint.name, data)):
            relay.decider.holds(leg.planned, kept)
        if relay.listener.hears_first_byte:
            relay.listener.first_byte(FirstByte(tag, leg.planned, self.first_byte))
        if not done:
            timing.watch(self, now)
        showing.show(self, leg, head, data, done)
        if self.client.stalled:
            leg.pause()

    def say(self, data: bytes) -> None:
        """Send bytes that the router made, and that are no part of a worker's answer."""
        self.relay.batch.write(self.client.transport, data)

    def leg_done(self, leg: Leg) -> None:
        """End the exchange: the leg's answer is complete."""
        self.finish(leg.outcome)

    def leg_broken(self, leg: Leg, outcome: Outcome, detail: str) -> None:
        """Retry a broken leg if the client has no head yet; fail otherwise. A stale connection is simply replaced."""
        if outcome is Outcome.STALE and not leg.planned.rid:  # one with a name: see `relay.pair`
            leg.send(True)
            return
        self.relay.decider.suspect(leg.planned)
        error = error_of(outcome, detail)
        if self._pending is not None:  # it had answered with a failing status: that answer cannot be passed on now
            self._pending.error = error
        else:
            self.leg_failed(Pending(leg, outcome, error), error)

    def leg_failed(self, pending: Pending, error: RouterError) -> None:
        """Retry a failed leg if the client has no head yet; fail otherwise."""
        if self.state is ANSWERING or not failover.retry(self, pending):
            self.failed(pending.outcome, error)

    # -- for the body handler (Continuable) ----------------------------------------------------------------------------

    def retry(self, pending: Pending, facts: Facts) -> bool:
        """Ask the decider for another plan, for the rest of a broken stream; return False when there is none."""
        return failover.retry(self, pending, facts)

    def goes_on(self, leg: Leg) -> None:
        """Watch the answer of a leg that continues the broken one."""
        assert self.shown is not None
        self.shown.forget_looks()
        timing.watch(self, self._begin(leg))
        if self.client.stalled:
            leg.pause()

    def write(self, data: bytes) -> None:
        """Send bytes that a body handler made; none are progress too: the worker sent what the handler holds back."""
        if self.shown is not None:
            self.shown.pass_on(data, False)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, outcome: Outcome) -> None:
        """End the exchange: the whole answer is written."""
        self._end(outcome, now := self.relay.clock())
        self.client.done(self.keep_alive, now)

    def failed(self, outcome: Outcome, error: RouterError) -> None:
        """Fail, unless a body handler can continue the answer: there is no retry."""
        for leg in self.legs:
            leg.abort()
        if self.state is ANSWERING and outcome is not Outcome.TIMEOUT:
            if self.handled is not None and self.handled.broke(Pending(self.legs[-1], outcome, error)):
                return
            if outcome is not Outcome.SILENT:
                error = StreamBroken(str(error))
        self.fail(outcome, error)

    def fail(self, outcome: Outcome, error: RouterError, event: bytes = b"") -> None:
        """End with an error: as the answer if the client has no head yet, else as a break, with an error event or line.

        event  the error event; b"": the router's own for the error
        """
        answer = self.shown or self.early
        if answer is None or answer.framing is None:
            self.refuse(error, outcome)
            return
        if last := showing.last_words(answer, self._endpoint, self.request.path, error, event):
            self.say(last)
        self._end(outcome, self.relay.clock(), error.code)
        self.client.abort()

    def refuse(self, error: RouterError, outcome: Outcome | None = None) -> None:
        """Answer with an error of the router; nothing has been sent to the client yet."""
        self.status = error.status
        keep_alive = self.keep_alive and not error.close and not self.client.clients.draining
        answers, tag = self.relay.answers, self.tag
        decision = answers.decision(tag, self.planned, self.retries)
        self.client.write(answers.error(error, self.request, tag.raw_id, keep_alive, decision))
        now = self.relay.clock()
        self._end(outcome, now, error.code)
        self.client.done(keep_alive, now)

    def _end(self, outcome: Outcome | None, now: float, code: str = "") -> None:
        """End the exchange, exactly once: give up its legs, close the leases and emit Finished."""
        self._move(DONE)
        self.deadline = NEVER
        relay, tag, shown = self.relay, self.tag, self.shown
        planned: PlannedLeg | None = None
        usage = shown.usage() if shown is not None and outcome is Outcome.SERVED else None
        if (pair := self.pair) is not None:
            planned = pair.end(outcome, usage)
        for leg in self.legs:
            planned = leg.planned
            if leg.connection is not None:
                leg.abort()
            # A resumed answer, and its usage, is not that of the leg that ends now.
            relay.decider.ended(tag, planned, outcome or Outcome.ABANDONED, now, usage if leg is shown else None)
        if shown is not None:
            planned = shown.planned
        sent = shown.sent if shown else 0
        retries = 0 if self._plan is None else self._plan.retries
        answer = Answered(self.status, code, outcome, now - tag.start, self.first_byte, sent, retries)
        answer.usage = usage
        if pair is not None:
            answer.handoff = pair.handoff
        if self.handled is not None:
            answer.resumed, answer.unresumed = self.handled.handler.resumed, self.handled.handler.unresumed
        relay.listener.finished(Finished(tag, planned, answer))
        if tag.received > LARGE:
            relay.batch.bulk.discard(self.request)
        self.legs, self.shown, self.handled, self._pending, self.pair = (), None, None, None, None  # leave no cycle
