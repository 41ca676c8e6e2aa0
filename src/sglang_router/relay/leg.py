"""One leg: a request sent to one worker, and the worker's answer.

    send --> connection (idle, opening, or a pause before a retry) --> begin --> data ... data(done)
                                                                         '--> broken

The answer is held back until it has begun (`relay.beginning`), and a stream of events is sent in whole events
(`relay.whole_events`).

A leg is the Sink of its connection. It reports the head and the end to its exchange and passes itself as an argument,
so an exchange can have several legs. The bytes in between go straight to the client: per chunk the connection parses
the framing, the leg counts bytes and the batch writes; no object is created.

The owner of a leg is its exchange; that of a prefill leg is `relay.pair`, which drops its body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from sglang_router.errors import RouterError, StreamBroken
from sglang_router.relay.batch import Batch
from sglang_router.relay.beginning import Beginning, begins
from sglang_router.relay.early import OneEvent
from sglang_router.relay.gathered import Gathered
from sglang_router.relay.injected import UsageHider, with_ask
from sglang_router.relay.relay import Relay
from sglang_router.relay.renaming import renamed, renamed_target
from sglang_router.relay.states import DONE, ExchangeState
from sglang_router.relay.upstream import UpstreamConnection
from sglang_router.relay.whole_events import ANY_END, CHUNKED_ENDS, PLAIN_ENDS, WholeEvents, split
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag
from sglang_router.routing.tolerant import in_utf8
from sglang_router.routing.usage import Usage
from sglang_router.wire.framing import Framing
from sglang_router.wire.gathering import Body
from sglang_router.wire.headers import UpgradeRequest, request_head
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.splice import Spliced, splice, splice_at
from sglang_router.wire.usage import SHORT, joined, usage_of

LOOKS: Final = 4
"""Checks of an answer's progress per `timeouts.chunk`: a silent answer ends after 1 to 1.25 times that timeout."""


_NOT_SENT: Final = (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED)
"""After a kept connection broke, these say that it was the worker's end, and not the end of an idle connection."""
_MAY_GO_ON: Final = (Outcome.BROKEN, Outcome.STALE, Outcome.CUT, Outcome.INVALID)
"""After these the engine may still have the leg."""


class Carrier(Protocol):
    """What carries a leg: a connection, one that is being opened, or the pause before a retry."""

    def abort(self) -> None:
        """Give the leg up; it hears nothing more."""

    def pause(self) -> None:
        """Stop reading the answer."""

    def resume(self) -> None:
        """Read the answer again."""


class Owner(Protocol):
    """An exchange, as its legs see it."""

    facts: Facts | None
    hider: UsageHider | None
    relay: Relay
    request: Request
    tag: RequestTag

    @property
    def state(self) -> ExchangeState:
        """How far the exchange is."""

    def sending(self, leg: Leg) -> None:
        """Prepare for a stream's answer: the leg is sent now."""

    def holding(self, leg: Leg) -> None:
        """Take note that the worker sent something of an answer that is held back, because it has not begun."""

    def answered(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the head of the answer, with the first bytes of the body; `done`: these are all."""

    def leg_done(self, leg: Leg) -> None:
        """End a leg whose answer is complete."""

    def leg_broken(self, leg: Leg, outcome: Outcome, detail: str) -> None:
        """Take the end of a leg without a complete answer; `detail` says why, for people."""

    def fail(self, outcome: Outcome, error: RouterError, event: bytes = b"") -> None:
        """End with an error; `event`: the error event, where it is not the router's own."""


class BodySink(Protocol):
    """Takes the body of an answer that is not passed on unchanged."""

    def data(self, leg: Leg, data: bytes, done: bool) -> None:
        """Take bytes of the body; `done`: they are the last."""


class Pause:
    """The pause before a leg of a retry is sent. It can be aborted like a connection."""

    __slots__ = ("_timer",)

    def __init__(self, timer: asyncio.TimerHandle) -> None:
        self._timer = timer

    def abort(self) -> None:
        """Give the leg up: it is not sent."""
        self._timer.cancel()

    def pause(self) -> None:
        """Do nothing: nothing is read yet."""

    def resume(self) -> None:
        """Do nothing: nothing is read yet."""


class Leg:
    """See the module.

    planned     the leg as the plan has it: target, lease, splice
    bodyless    the answer has no body, whatever its head says
    connection  what carries the leg; None before it is sent and after its end
    decoding    take the answer's content without its transfer coding
    framing     of the answer, as far as the client has it; None before the head
    outcome     how the leg ended, as far as is known
    sent        bytes of the answer's body that were sent to the client
    chunked     the client is sent chunks
    ends        how reads usually end, see `relay.whole_events`
    events      the answer is a stream of events
    fresh       it is sent on a new connection: the end of a kept one could not be told from a break
    handled     takes the body; None: it goes to the client unchanged
    first       how the body that the client was sent begins: the first read
    last        how it ends: the last read of a stream in which usage may stand, else up to `wire.usage.TAIL` bytes
    transport   of the client's connection
    """

    __slots__ = (
        "_batch",
        "_exchange",
        "_quiet",
        "_resent",
        "_seen",
        "bodyless",
        "chunked",
        "connection",
        "decoding",
        "ends",
        "events",
        "first",
        "framing",
        "fresh",
        "handled",
        "last",
        "outcome",
        "planned",
        "sent",
        "transport",
    )

    def __init__(
        self, exchange: Owner, planned: PlannedLeg, batch: Batch, transport: asyncio.Transport, decoding: bool
    ) -> None:
        self._exchange = exchange
        self._batch = batch
        self.transport = transport
        self.planned = planned
        self.connection: Carrier | None = None
        self.decoding = decoding
        self.fresh = self.bodyless = False
        self._resent = False  # a kept connection broke on it, and it was sent again
        # per answer
        self.framing: Framing | None = None
        self.handled: BodySink | None = None
        self.outcome = Outcome.SERVED
        self.sent = 0
        self.chunked = False
        self.events = False
        self.ends = ANY_END
        self.first = self.last = b""
        self._seen = 0  # `sent` at the last check
        self._quiet = 0  # checks in a row without new bytes

    def __repr__(self) -> str:
        answer = "no answer yet" if self.framing is None else f"{self.sent} bytes sent"
        carried = "not carried" if self.connection is None else type(self.connection).__name__
        return f"<Leg to {self.planned.target.name}: {carried}, {answer}, {self.outcome.label}>"

    # -- towards the worker --------------------------------------------------------------------------------------------

    def send(self, again: bool = False) -> None:
        """Send the leg's request. `again`: a kept connection broke on it, so take a new one."""
        exchange, planned = self._exchange, self.planned
        if exchange.state is DONE:  # the client left between two stages of the batch
            return
        self._resent = again
        relay, request, tag, target = exchange.relay, exchange.request, exchange.tag, planned.target
        connections = relay.connections.known.get(target) or relay.connections.at(target)
        body: Body | Spliced = request.body
        members = planned.splice if exchange.hider is None else with_ask(planned.splice)
        method, path = request.method, request.target
        if planned.model and exchange.facts is not None:
            body = renamed(request.body, exchange.facts, planned.model, members)
            if exchange.facts.endpoint.anywhere:
                path = renamed_target(request, exchange.facts, planned.model)
        elif members:
            place = None if exchange.facts is None else exchange.facts.place
            body = splice_at(request.body, place, members) if place else splice(in_utf8(request.body), members)
        if tag.streaming:
            exchange.sending(self)
        self.bodyless = method == b"HEAD"
        start = connections.origin.start(method, path)
        if relay.traces is not None:
            start += relay.traces.fields(tag, planned.lease, request.headers)
        request_id = tag.raw_id + planned.mark if planned.mark else tag.raw_id
        head = request_head(request, start, request_id, len(body), target.key, relay.forward)
        self.connection = connections.send(self, head, body, again or self.fresh)

    def send_after(self, delay: float, call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle]) -> None:
        """Send the leg's request in `delay` seconds."""
        self.connection = Pause(call_later(delay, self.send))

    def abort(self) -> None:
        """Give the leg up: its exchange hears nothing more of it, and its engine is asked to end it."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
            if self.planned.rid and isinstance(connection, UpstreamConnection):  # it was sent
                self._disown()

    def _disown(self) -> None:
        """Ask the engine to end the leg, which would wait for its partner."""
        exchange = self._exchange
        exchange.relay.aborts.abort(self.planned, exchange.request.headers)

    def pause(self) -> None:
        """Stop reading the answer: the client does not read."""
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        """Read the answer again: the client reads again."""
        if self.connection is not None:
            self.connection.resume()

    def progresses(self, stalled: bool) -> bool:
        """Check the answer's progress; return whether new bytes came within the last `LOOKS` checks.

        Checking now and then costs less than a time stamp on each chunk. While the client does not read (`stalled`),
        the worker may be silent.
        """
        if stalled or self.sent != self._seen:
            self.forget_looks()
        else:
            self._quiet += 1
        return self._quiet < LOOKS

    def forget_looks(self) -> None:
        """Forget the last checks: the worker was allowed to be silent."""
        self._seen, self._quiet = self.sent, 0

    # -- called by the connection (Sink) -------------------------------------------------------------------------------

    def connected(self, connection: UpstreamConnection) -> None:
        """Take the connection that was opened for the leg."""
        self.connection = connection
        if isinstance(self._exchange.request, UpgradeRequest):
            connection.switches = True

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """Take the head of the answer, with the first bytes of the body; `done`: these are all."""
        if done:
            self.connection = None
        self.framing = framing
        if (
            (done and head.plain and not self._exchange.tag.streaming)  # usual
            or head.status >= 429
            or begins(head, framing, data, done)
        ):
            self._exchange.answered(self, head, data, done)
        else:
            self.handled = beginning = Beginning(head, framing, self.decoding)
            beginning.data(self, data, done)

    def data(self, data: bytes, done: bool) -> None:
        """Send bytes of the body to the client, or pass them to `handled`."""
        if done:
            self.connection = None
        if self.handled is not None:
            self.handled.data(self, data, done)
            return
        if not data.endswith(self.ends) and not done:
            split(self, data)
            return
        size = len(data)
        self.sent += size
        if not self.events:
            self.last = joined(self.last, data)
        elif size > SHORT:
            self.last = data
        self._batch.write(self.transport, data)
        if done:
            self._exchange.leg_done(self)

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Report the end of the leg without a complete answer."""
        self.connection = None
        if self.planned.rid and outcome in _MAY_GO_ON:
            self._disown()
        if self._resent and outcome in _NOT_SENT:
            outcome = Outcome.LOST
        elif isinstance(self.handled, (Beginning, Gathered)):
            if outcome is Outcome.CUT:
                outcome, detail = Outcome.BROKEN, "The worker closed the connection after the head of its answer."
        elif outcome is Outcome.INVALID and self.framing is not None:
            outcome = Outcome.CUT
        self._exchange.leg_broken(self, outcome, detail)

    # -- called by what handles the body -------------------------------------------------------------------------------

    def begun(self, head: ResponseHead, data: bytes, done: bool) -> None:
        """Report the answer, which was held until it began."""
        self.handled = None
        self._exchange.answered(self, head, data, done)

    def holding(self) -> None:
        """Report that the worker sent something that is held."""
        self._exchange.holding(self)

    def show(self, head: bytes, data: bytes, done: bool) -> None:
        """Send the head, and the first bytes of the body, to the client."""
        if self.events:
            self.ends = CHUNKED_ENDS if self.chunked else PLAIN_ENDS
        if done or data.endswith(self.ends):
            self.sent = len(data)
            self.first = self.last = data
            self._batch.write(self.transport, head + data)
        else:
            self._batch.write(self.transport, head)
            split(self, data)

    def handle_by(self, sink: WholeEvents | OneEvent | None) -> None:
        """Let `sink` take the body from now on; None: bytes pass as they come."""
        self.handled = sink

    def pass_on(self, data: bytes, done: bool) -> None:
        """Send bytes of the body to the client; none are progress too: the worker sent what is held back."""
        if data:
            self.sent += len(data)
            self.first = self.first or data
            if not self.events:
                self.last = joined(self.last, data)
            elif len(data) > SHORT:
                self.last = data
            self._batch.write(self.transport, data)
        else:
            self.forget_looks()
        if done:
            self._exchange.leg_done(self)

    def usage(self) -> Usage | None:
        """Return what the engine told of the answer that the client was sent; None: nothing, or of an earlier one."""
        hider, last, facts = self._exchange.hider, self.last, self._exchange.facts
        if facts is not None and facts.endpoint.about:  # a stored response repeats what it took when it was made
            return None
        if hider is not None and hider.hidden:
            last = hider.hidden
        figures = usage_of(self.first, last, self._exchange.tag.streaming)
        return None if figures is None else Usage(*figures)

    def fail_late(self, detail: str, event: bytes = b"") -> None:
        """End the answer, which is no fault of its worker's, with an error event: `event`, or one of the router's."""
        self._exchange.fail(self.outcome, StreamBroken(detail), event)


def dispatch(leg: Leg, plan: Plan, relay: Relay) -> None:
    """Send a leg of a plan: after its delay, at once for a retry, else with this turn's batch."""
    if plan.delay:
        leg.send_after(plan.delay, relay.call_later)
    elif plan.retries:
        leg.send()
    else:
        relay.batch.leg(leg)
