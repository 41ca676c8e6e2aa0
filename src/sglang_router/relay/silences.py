"""Fill the silence of streams (`--sse-keepalive-secs`), for proxies that close connections on which nothing moves.

    look    every sweep: which streams were sent nothing for so long?      one pass, no timer per request
            these are sent one event that says nothing: a comment, on /v1/messages a ping

It stands between two events and between two chunks. Before an answer has begun, the head goes first: see `relay.early`.
A stream with a Content-Length cannot take it, nor one in which the client was sent a part of an event, nor one that is
no stream of events (lines of JSON, sound).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang_router.relay.clients import AnyExchange
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.leg import Leg
from sglang_router.relay.showing import open_early
from sglang_router.relay.states import ANSWERING, ROUTED
from sglang_router.relay.whole_events import ANY_END, WholeEvents
from sglang_router.wire.framing import Sized, chunk
from sglang_router.wire.sse import keep_alive_event


class KeepAlives:
    """See the module.

    exchanges  the exchanges in flight
    seconds    of silence
    """

    def __init__(self, exchanges: Iterable[AnyExchange], clock: Callable[[], float], seconds: float) -> None:
        self._exchanges = exchanges
        self._clock = clock
        self._seconds = seconds
        self._looks: dict[AnyExchange, tuple[int, float]] = {}  # bytes sent, and since when they are so many

    def __repr__(self) -> str:
        return f"<KeepAlives after {self._seconds:g} s: {len(self._looks)} streams>"

    def look(self) -> None:
        """Send an event where nothing was sent for so long."""
        now = self._clock()
        before, self._looks = self._looks, {}
        for exchange in self._exchanges:
            if not isinstance(exchange, Exchange) or (sent := silence(exchange)) is None:
                continue
            known, since = before.get(exchange, (-1, now))
            if known != sent:
                since = now
            elif now - since >= self._seconds:
                since = now
                fill(exchange)
            self._looks[exchange] = (sent, since)


def silence(exchange: Exchange) -> int | None:
    """Return how many bytes a stream was sent; None where an event that says nothing cannot be sent."""
    shown = exchange.shown
    if not exchange.tag.streaming or exchange.stalled:
        return None
    if shown is None:
        return 0 if exchange.state is ROUTED and _will_be_events(exchange) else None
    return shown.sent if exchange.state is ANSWERING and shown.events and not _torn(exchange, shown) else None


def _will_be_events(exchange: Exchange) -> bool:
    """Return whether a stream that has not begun will be one of events: not lines of JSON, nor sound."""
    return exchange.facts is not None and exchange.facts.endpoint.events


def _torn(exchange: Exchange, shown: Leg) -> bool:
    """Return whether the client may have a part of an event or of a chunk, or a body of known length."""
    framing = shown.framing
    if isinstance(framing, Sized) or (shown.chunked and framing is not None and framing.gap != 0):
        return True
    if exchange.handled is not None and shown.handled is exchange.handled:
        return exchange.handled.handler.torn
    if isinstance(shown.handled, WholeEvents):
        return shown.handled.torn
    return shown.ends == ANY_END


def fill(exchange: Exchange) -> None:
    """Send an event that says nothing."""
    answer = exchange.shown or exchange.early or open_early(exchange)
    event = keep_alive_event(exchange.request.path)
    exchange.say(chunk(event) if answer.chunked else event)
