"""The deadline of an exchange: which limit holds now, and what happens when it has passed.

    follow     REQUEST                the whole answer, from the complete request
    sending    FIRST_BYTE             a stream's first event, from sending its leg; comments do not extend it
    holding    PROGRESS               another answer whose head is there and whose body has not begun
    watch      PROGRESS, REQUEST      while the client has the head: looks a few times in --chunk-timeout-secs

Functions on an exchange, whose deadline is a value (`relay.deadlines`).
"""

from __future__ import annotations

from typing import Protocol

from sglang_router.errors import RouterError
from sglang_router.relay.deadlines import DUE_FIRST_BYTE, DUE_PROGRESS, DUE_REQUEST, ERRORS, Deadline, Due
from sglang_router.relay.leg import LOOKS, Leg
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import ROUTED, ExchangeState
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag


class Timed(Protocol):
    """An exchange, as this module uses it."""

    deadline: Deadline
    facts: Facts | None
    first_byte: float
    legs: tuple[Leg, ...]
    relay: Relay
    shown: Leg | None
    state: ExchangeState
    tag: RequestTag

    @property
    def planned(self) -> PlannedLeg | None:
        """The last leg; None: no worker was asked."""

    @property
    def stalled(self) -> bool:
        """Whether the client does not read."""

    def unqueue(self) -> None:
        """Leave the decider's queue."""

    def refuse(self, error: RouterError) -> None:
        """Answer with an error."""

    def failed(self, outcome: Outcome, error: RouterError) -> None:
        """Fail, unless a body handler can continue the answer."""


def overdue(exchange: Timed, now: float) -> None:
    """React to the deadline, which has passed, by its kind."""
    kind, shown = exchange.deadline[0], exchange.shown
    if kind is Due.QUEUE:
        exchange.relay.queued.pop(exchange.tag.number, None)
        exchange.refuse(exchange.relay.decider.expired(exchange.tag, now))
    elif kind is Due.PROGRESS and shown is not None and shown.progresses(exchange.stalled):
        watch(exchange, now)
    else:
        exchange.unqueue()
        exchange.failed(Outcome.SILENT if kind is Due.PROGRESS else Outcome.TIMEOUT, ERRORS[kind]())


def watch(exchange: Timed, now: float) -> None:
    """Set the next check of the answer's progress, or the request's own deadline when that is earlier."""
    timeouts = exchange.relay.timeouts
    look, end = now + timeouts.chunk / LOOKS, exchange.tag.start + timeouts.request
    exchange.deadline = (DUE_PROGRESS, look) if look < end else (DUE_REQUEST, end)


def sending(exchange: Timed, delay: float = 0.0) -> None:
    """Set the deadline for the first byte of a stream whose leg is sent now, or in `delay` seconds."""
    first = exchange.relay.clock() + delay + exchange.relay.timeouts.first_byte
    if first < exchange.deadline[1]:
        exchange.deadline = (DUE_FIRST_BYTE if exchange.state is ROUTED else DUE_PROGRESS, first)


def holding(exchange: Timed) -> None:
    """Extend the deadline of an answer that is held back. A stream's first event has one that is not extended, and so
    has the prefill leg of a pair: what the decode worker sends meanwhile says nothing of it."""
    if not exchange.tag.streaming and exchange.deadline[0] is not DUE_FIRST_BYTE:
        timeouts = exchange.relay.timeouts
        look, end = exchange.relay.clock() + timeouts.chunk, exchange.tag.start + timeouts.request
        exchange.deadline = (DUE_PROGRESS, look) if look < end else (DUE_REQUEST, end)


def unanswered(exchange: Timed) -> tuple[float, int, bool] | None:
    """Describe the request if it has no first byte; see `relay.clients.AnyExchange`."""
    facts, tag = exchange.facts, exchange.tag
    if exchange.first_byte >= 0.0 or facts is None:
        return None
    planned = exchange.planned
    if planned is None:
        return tag.start, len(facts.text), True
    if not facts.streaming:
        return None  # its answer comes all at once, so most of it may be computed already
    return tag.start, planned.total - planned.matched, False
