"""The two legs of a prefill/decode pair, and what they mean to each other.

    SGLang      both are sent at once; the engines find each other by what the decider spliced into the bodies
    handoff     prefill first; its answer hands something over, and the decode leg is sent with it (`relay.handoff`)

The client gets the answer of the decode leg, which is the exchange's own leg. This module owns the prefill leg: its
body is read to its end and dropped.

    what happens                              then
    prefill has answered 2xx                  its lease is closed; decode goes on (handoff: is sent now)
    prefill fails, decode has not begun       decode is given up; retry, or the error
    prefill fails, decode has begun           the lease is closed with the failure; the client's stream goes on
    decode fails                              prefill is given up; retry, or the error (`failover`)
    decode's 5xx names the prefill            the same, and the prefill worker is to blame (`routing.guilt`)
    decode has ended well before prefill      prefill has LINGER seconds to end its answer, or its connection closes
    the client left, time is up, a break      both are given up

Given up: the connection closes, the engine is asked to end the leg if it knows it by a name (`relay.aborts`), and the
decider is told. Each leg is told to have ended exactly once, here or at the end of the exchange. A pair is `live` until
one leg is to blame (`give_up_but`) or the exchange ends (`end`); then the exchange has one leg, as without a pair.

A leg with a name (`PlannedLeg.rid`) is not sent twice: the engine may have read it before a kept connection broke, and
two legs with one name and one room find nobody. The pair is planned anew.

The prefill leg must answer by the deadline for the first byte, of a request that is no stream as well: an engine that
hangs does not hold its client until the request's own deadline.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from sglang_router.errors import PrefillFailed, RouterError
from sglang_router.relay import timing
from sglang_router.relay.deadlines import DUE_FIRST_BYTE, DUE_REQUEST
from sglang_router.relay.gathered import Gathered
from sglang_router.relay.handled import Handled
from sglang_router.relay.handoff import MOST, Handed, is_pushed, params_of
from sglang_router.relay.injected import UsageHider
from sglang_router.relay.leg import Leg, dispatch
from sglang_router.relay.logprobs import MOST as LONGEST
from sglang_router.relay.logprobs import PromptLogprobs, asked
from sglang_router.relay.pending import Pending, error_of
from sglang_router.relay.states import ExchangeState
from sglang_router.relay.timing import Timed
from sglang_router.routing.facts import LARGE, Facts
from sglang_router.routing.guilt import MOST_READ, names_prefill
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg
from sglang_router.routing.usage import Usage
from sglang_router.wire.framing import Chunked, Sized
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.usage import joined, usage_of

LINGER: Final = 5.0
"""Seconds that a prefill leg has to end its answer after that of decode has ended."""

log: Final = logging.getLogger("sglang_router.relay")


class Paired(Timed, Protocol):
    """An exchange, as this module uses it."""

    handled: Handled | None
    hider: UsageHider | None
    pair: Pair | None
    request: Request

    def pass_on(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Pass the answer of the decode leg on to the client."""

    def leg_failed(self, pending: Pending, error: RouterError) -> None:
        """Retry a failed leg if the client has no head yet; fail otherwise."""


class Pair:
    """See the module. It is the owner (`leg.Owner`) of the prefill leg.

    decode   the exchange's own leg
    handed   what the last prefill leg of the exchange handed over; None: nothing is handed over
    hider    None: prefill's answer is not shown
    live     both legs still belong together
    prefill  the leg to the prefill worker
    """

    __slots__ = (
        "_exchange",
        "_first",
        "_held",
        "_last",
        "_logprobs",
        "_over",
        "_plan",
        "_timer",
        "decode",
        "facts",
        "handed",
        "hider",
        "live",
        "prefill",
        "relay",
        "request",
        "tag",
    )

    def __init__(self, exchange: Paired, plan: Plan, decode: Leg) -> None:
        self._exchange = exchange
        self._plan = plan
        relay = self.relay = exchange.relay
        self.facts: Facts | None = exchange.facts
        self.request = exchange.request
        self.tag = exchange.tag
        self.hider: UsageHider | None = None
        self.handed: Handed | None = None
        self.decode = decode
        self.prefill = Leg(self, plan.legs[0], relay.batch, decode.transport, True)
        self.live = True
        self._over = False  # the decider knows that prefill has ended
        self._first = self._last = b""  # how prefill's answer begins and ends, for its usage
        self._timer: asyncio.TimerHandle | None = None  # while it lingers
        streaming = exchange.tag.streaming
        wanted = not plan.handoff and asked(exchange.facts, exchange.request.body)
        self._logprobs = PromptLogprobs(streaming) if wanted else None
        self._held: tuple[ResponseHead, bytes, bool] | None = None  # decode's answer, until they are there

    def __repr__(self) -> str:
        state = "live" if self.live else "over"
        return f"<Pair {state}{', prefill has ended' * self._over}: {self.prefill!r}>"

    @property
    def state(self) -> ExchangeState:
        """The exchange's."""
        return self._exchange.state

    @property
    def handoff(self) -> str:
        """What became of what was handed over, see `handoff.RESULTS`; "" for nothing of the kind."""
        return "" if self.handed is None else self.handed.result

    @property
    def begun(self) -> bool:
        """Whether the answer of the decode leg has begun."""
        exchange, decode = self._exchange, self.decode
        return exchange.shown is decode or (exchange.handled is not None and decode.handled is exchange.handled)

    def send(self, fresh: bool) -> None:
        """Send the legs; of a handoff, the first one. fresh: on new connections."""
        exchange, plan = self._exchange, self._plan
        self.prefill.fresh = self.decode.fresh = fresh
        exchange.legs = () if plan.handoff else (self.decode,)
        timing.sending(exchange, plan.delay)
        dispatch(self.prefill, plan, self.relay)
        if not plan.handoff:
            dispatch(self.decode, plan, self.relay)

    def in_flight(self) -> tuple[Leg, ...]:
        """Return the legs of the exchange that have not ended."""
        legs = self._exchange.legs
        return legs if self._over or not self.live else (self.prefill, *legs)

    # -- called by the prefill leg (Owner) -----------------------------------------------------------------------------

    def sending(self, leg: Leg) -> None:
        """Do nothing: `send` has set the deadline."""

    def holding(self, leg: Leg) -> None:
        """Do nothing: the deadline stays."""

    def answered(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the head of prefill's answer."""
        good = 200 <= head.status < 300
        if good and self.tag.streaming and not self._over:
            self.relay.decider.began(leg.planned, self.relay.clock())
        if good and not self._plan.handoff:
            leg.handled = self
        elif good:
            leg.handled = Gathered(head, MOST, self._handed_over)
        else:
            leg.handled = Gathered(head, MOST_READ, self._refused)
        leg.handled.data(leg, data, done)

    def data(self, leg: Leg, data: bytes, done: bool) -> None:
        """Drop bytes of the answer (`leg.BodySink`)."""
        self._first = self._first or data
        self._last = joined(self._last, data)
        if self._logprobs is not None:
            self._logprobs.learn(data, done)
        if done:
            self.leg_done(leg)
        self._release()

    def leg_done(self, leg: Leg) -> None:
        """End the leg: its answer is complete."""
        if not self._settled():
            self._close(Outcome.SERVED, self._usage(self._first, self._last, self.tag.streaming))

    def _release(self) -> None:
        """Pass decode's answer on, if it was held and needs to be no longer."""
        if self._held is not None and self.live and (self._logprobs is None or self._logprobs.ready):
            (head, data, done), self._held = self._held, None
            self._pass_on(head, data, done)

    def leg_broken(self, leg: Leg, outcome: Outcome, detail: str) -> None:
        """Take the end without a complete answer."""
        if outcome is Outcome.STALE and not leg.planned.rid and not self._over:
            leg.send(True)
        elif not self._settled():
            self.relay.decider.suspect(leg.planned)
            if outcome is Outcome.CUT:  # the client has nothing of it
                outcome = Outcome.BROKEN
            self.fail(outcome, error_of(outcome, detail))

    def fail(self, outcome: Outcome, error: RouterError, event: bytes = b"") -> None:
        """Take the failure of the leg for good: the pair fails, unless decode's answer has begun."""
        self._failed(outcome, error, 0)

    # -- prefill's end -------------------------------------------------------------------------------------------------

    def _settled(self) -> bool:
        """Return whether the leg has ended already, as far as anybody cares; then it lingers no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._over

    def _refused(self, head: ResponseHead, body: bytes, done: bool) -> None:
        """Take an answer that is none: its status is no 2xx."""
        if not done:
            self.prefill.abort()
        if self._settled():
            return
        retry_after = head.header(b"retry-after")
        outcome = Outcome.of_status(head.status, retry_after is not None)
        if outcome is Outcome.SERVED:  # a status that leads nowhere
            outcome = Outcome.FAILED
        self._failed(outcome, PrefillFailed(head.status, body, retry_after), head.status)

    def _failed(self, outcome: Outcome, error: RouterError, status: int) -> None:
        if self.begun:
            self._close(outcome)
            return
        pending = Pending(self.prefill, outcome, error)
        pending.status = status
        self.prefill.outcome = outcome
        self.give_up_but(self.prefill, outcome)
        if outcome is Outcome.REJECTED:  # the request's own mistake
            self._exchange.failed(outcome, error)
        else:
            self._exchange.leg_failed(pending, error)

    def _close(self, outcome: Outcome, usage: Usage | None = None) -> None:
        """Tell the decider that prefill has ended; from now on the request has its own deadline."""
        self._over = True
        exchange, now = self._exchange, self.relay.clock()
        self.relay.decider.ended(self.tag, self.prefill.planned, outcome, now, usage)
        if exchange.deadline[0] is DUE_FIRST_BYTE and not self.tag.streaming:
            exchange.deadline = (DUE_REQUEST, self.tag.start + self.relay.timeouts.request)

    def _usage(self, first: bytes, last: bytes, streaming: bool) -> Usage | None:
        figures = usage_of(first, last, streaming)
        return None if figures is None else Usage(*figures)

    def _handed_over(self, head: ResponseHead, body: bytes, done: bool) -> None:
        """Take prefill's whole answer, and send the decode leg with what it hands over."""
        exchange, now = self._exchange, self.relay.clock()
        params = params_of(body) if done else b""
        what = "nothing" if done else f"more than {MOST} bytes"
        if params and not self.prefill.planned.mark and is_pushed(params):
            params, what = b"", "what it would push (--pd-kv-connector nixl_push)"
        usage = self._usage(body, body, False) if done else None
        if not done:
            self.prefill.abort()
        self.handed = Handed(params, now, usage)
        self._close(Outcome.SERVED, usage)
        if not params:
            worker = self.prefill.planned.target.name
            log.info("%s handed %s over for %s: decode computes the prompt", worker, what, self.tag.id)
        exchange.legs = (self.decode,)
        exchange.deadline = (DUE_REQUEST, self.tag.start + self.relay.timeouts.request)
        self.handed.give(self.decode.planned, now)
        self.decode.send()

    # -- decode's answer, with the log probabilities of the prompt -----------------------------------------------------

    def holds(self, head: ResponseHead, data: bytes, done: bool) -> bool:
        """Take decode's answer, if it is to be changed; return False for one that can be passed on."""
        logprobs = self._logprobs
        if logprobs is None or head.status != 200 or not self.live:
            return False
        if head.events:
            self._held = head, data, done
            self.decode.pause()
            self._release()
        else:
            self.decode.handled = Gathered(head, LONGEST, self._whole)
            self.decode.handled.data(self.decode, data, done)
        return True

    def _whole(self, head: ResponseHead, body: bytes, done: bool) -> None:
        """Take decode's whole answer; one that is too long is passed on unchanged."""
        if not done:
            self._logprobs = None
        self._held = head, body, done
        self._release()

    def _pass_on(self, head: ResponseHead, data: bytes, done: bool) -> None:
        exchange, decode, logprobs = self._exchange, self.decode, self._logprobs
        if logprobs is not None and head.events:
            exchange.hider = logprobs
        elif logprobs is not None:
            if isinstance(decode.framing, Chunked) and not decode.decoding:
                pieces: list[bytes] = []
                Chunked().feed(data, pieces)
                data = b"".join(pieces)
            data = logprobs.whole(data)
            head, decode.framing = head.resized(len(data)), Sized(0)
        exchange.pass_on(decode, head, data, done)
        if not exchange.stalled:
            decode.resume()

    # -- for the exchange ----------------------------------------------------------------------------------------------

    def blames_prefill(self, body: bytes) -> bool:
        """Return whether decode's error says that prefill failed it, and prefill can still be told so."""
        return self.live and not self._over and names_prefill(body)

    def give_up_but(self, blamed: Leg, outcome: Outcome) -> None:
        """Give up the leg that is not to blame: `blamed` failed, and is the exchange's only leg from now on.

        Of a pair that is not live any more, a decode leg alone has failed.
        """
        if self.handed is not None and blamed is not self.prefill:
            self.handed.take_back(blamed.planned, outcome)
        if not self.live:
            return
        self.live = False
        if blamed is self.prefill:
            self.decode.abort()
            self._tell(self.decode.planned, Outcome.ABANDONED)
        elif not self._over:
            self._tell(self.prefill.planned, Outcome.ABANDONED)
        self._over = True  # if it is to blame, the exchange tells it
        self.prefill.abort()
        self._exchange.legs = (blamed,)

    def end(self, outcome: Outcome | None, usage: Usage | None) -> PlannedLeg:
        """End what the exchange does not end itself, which ends with this outcome; return the last leg.

        usage  of the whole answer: corrected, where the prefill worker knows better
        """
        if usage is not None and self.handed is not None:
            self.handed.correct(usage)
        if not self.live:
            return self._plan.legs[-1]
        self.live = False
        left = Outcome.GONE if outcome is Outcome.GONE else Outcome.ABANDONED
        unsent = not self._exchange.legs
        if unsent:  # prefill is the last one then
            self._tell(self.decode.planned, left)
        if not self._over:
            self._over = True
            silent = outcome is Outcome.TIMEOUT and not self.begun
            if outcome is Outcome.SERVED and self.tag.received <= LARGE:  # a large body is freed now
                self._linger()
            else:
                self.prefill.abort()
            self._tell(self.prefill.planned, outcome if outcome is Outcome.SERVED or silent else left)
        return self.prefill.planned if unsent else self.decode.planned

    def _tell(self, leg: PlannedLeg, outcome: Outcome | None) -> None:
        self.relay.decider.ended(self.tag, leg, outcome or Outcome.ABANDONED, self.relay.clock())

    def _linger(self) -> None:
        """Let prefill end its answer, so that its connection can be used again."""
        if self.prefill.connection is not None:
            self._timer = self.relay.call_later(LINGER, self.prefill.abort)


def follow_pair(exchange: Paired, plan: Plan, last: Leg, fresh: bool) -> None:
    """Send the legs of a plan that is a pair, or a retry.

    last   the leg to the plan's last target
    fresh  they go on new connections
    """
    before = exchange.pair
    if len(plan.legs) > 1:
        exchange.pair = pair = Pair(exchange, plan, last)
        pair.send(fresh)
        return
    if plan.handoff and before is not None and before.handed is not None:
        before.handed.give(last.planned, exchange.relay.clock() + plan.delay)
    last.fresh = fresh
    exchange.legs = (last,)
    dispatch(last, plan, exchange.relay)
