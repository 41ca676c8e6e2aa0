"""Send the client the head of an answer, and the first bytes of its body.

show         an answer has begun
open_early   none has, but something must be sent (`--sse-keepalive-secs`): see `relay.early`
last_words   it broke: the event, or the line, that says so
"""

from __future__ import annotations

from typing import Final, Protocol

from sglang_router.errors import RouterError
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.early import Early, continues, early_head
from sglang_router.relay.handled import Handled
from sglang_router.relay.injected import UsageHider
from sglang_router.relay.leg import Leg
from sglang_router.relay.relay import Relay
from sglang_router.relay.whole_events import hide, hides
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.wire.framing import Chunked, chunk
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.sse import error_event, last_event

_LINE_END: Final = b"}\n"


class Showing(Protocol):
    """An exchange, as this module uses it."""

    client: ClientConnection
    early: Early | None
    handled: Handled | None
    hider: UsageHider | None
    keep_alive: bool
    relay: Relay
    request: Request
    status: int
    tag: RequestTag

    @property
    def planned(self) -> PlannedLeg | None:
        """The last leg; None: no worker was asked."""

    @property
    def retries(self) -> int:
        """Attempts after the first."""

    def say(self, data: bytes) -> None:
        """Send bytes that the router made."""

    def finish(self, outcome: Outcome) -> None:
        """End the exchange: the whole answer is written."""


def show(exchange: Showing, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
    """Send the answer of a leg, which has begun."""
    handled, early = exchange.handled, exchange.early
    if early is not None:
        data = early.join(leg, data)
        if handled is not None and continues(head) and handled.begin(leg, head):
            handled.data(leg, data, done)
        else:
            early.take(leg, head, data, done, exchange.request.path, exchange.hider)
        return
    exchange.status = head.status
    framing = leg.framing
    assert framing is not None
    keep_alive = exchange.keep_alive and not exchange.client.clients.draining
    answers, tag = exchange.relay.answers, exchange.tag
    bytes_out, leg.chunked, exchange.keep_alive = answers.client_head(
        head, framing, exchange.request, tag.raw_id, keep_alive, answers.decision(tag, leg.planned, exchange.retries)
    )
    leg.events = (not done or handled is not None) and head.events
    if handled is not None and handled.begin(leg, head):
        exchange.say(bytes_out)
        if data or done:
            handled.data(leg, data, done)
        return
    if exchange.hider is not None and head.events and hides(framing):
        exchange.say(bytes_out)
        hide(leg, exchange.hider, data, done)
        return
    leg.show(bytes_out, data, done)
    if done:
        exchange.finish(leg.outcome)


def open_early(exchange: Showing) -> Early:
    """Send the head of a stream before an answer has begun."""
    head, framing = early_head()
    keep_alive = exchange.keep_alive and not exchange.client.clients.draining
    answers, tag, planned = exchange.relay.answers, exchange.tag, exchange.planned
    bytes_out, chunked, exchange.keep_alive = answers.client_head(
        head, framing, exchange.request, tag.raw_id, keep_alive, answers.decision(tag, planned, exchange.retries)
    )
    exchange.status, exchange.early = head.status, Early(chunked)
    exchange.say(bytes_out)
    return exchange.early


def last_words(answer: Leg | Early, endpoint: Endpoint, path: bytes, error: RouterError, event: bytes) -> bytes | None:
    """Return what tells the client that its answer broke; nothing where that cannot be told.

    answer  what the client was sent of it
    event   the error event; b"": the router's own for the error
    """
    framing = answer.framing
    if answer.events and framing is not None:
        return last_event(event or error_event(path, error), framing, answer.chunked)
    if not endpoint.lines or not isinstance(answer, Leg):
        return None
    line = error.body(path) + b"\n"
    if not answer.chunked:
        return line if isinstance(framing, Chunked) and answer.last.endswith(_LINE_END) else None
    whole = isinstance(framing, Chunked) and framing.gap == 0 and answer.last.endswith(_LINE_END + b"\r\n")
    return chunk(line) if whole else None
