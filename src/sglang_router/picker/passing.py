"""The body of an answer while the gateway passes it on: when it begins, how, and what is kept from the client.

    passing = Passing(status, fields, hider)     the head has come
    passing.feed(data, done)                     for each piece; returns what the client gets of it

An answer begins as in `relay.beginning`: a stream of events with the first one that is no comment and no ping, lines of
JSON with the first, any other answer with its first byte. But the client has it already, so a first event that is an
error only tells how the worker has done.
"""

from __future__ import annotations

from typing import Final

from sglang_router.relay.injected import UsageHider
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.usage import Usage
from sglang_router.wire.error_events import FirstSaid
from sglang_router.wire.request import Headers
from sglang_router.wire.sse import MOST_HELD, EventSplitter
from sglang_router.wire.usage import HEAD, joined, usage_of

_EVENTS: Final = b"text/event-stream"
_LINES: Final = b"application/x-ndjson"
_OF_WORKER: Final = 429
"""Statuses from here on tell by themselves how the worker has done."""


class Passing:
    """See the module.

    begun    the answer has begun
    first    how it began, as far as it is looked at
    last     how it ends, as far as it is looked at
    outcome  how the worker has done, by the status and by what the answer began with
    sent     bytes that the client got
    """

    __slots__ = ("_hider", "_looked", "_said", "_splitter", "begun", "first", "last", "outcome", "sent")

    def __init__(self, status: int, fields: Headers, hider: UsageHider | None) -> None:
        named = dict(fields)
        kind = named.get(b"content-type", b"").lower()
        readable = named.get(b"content-encoding", b"identity").lower() == b"identity"
        events, lines = (readable and kind.startswith(each) for each in (_EVENTS, _LINES))
        self.outcome = Outcome.of_status(status, b"retry-after" in named)
        self._said = FirstSaid(lines) if (events or lines) and status < _OF_WORKER else None
        self._hider = hider
        self._splitter = EventSplitter() if hider is not None and events else None
        self._looked = self.sent = 0
        self.begun = False
        self.first = self.last = b""

    def __repr__(self) -> str:
        return f"<Passing {self.outcome.label} {self.sent} bytes{'' if self.begun else ', not begun'}>"

    def feed(self, data: bytes, done: bool) -> bytes:
        """Take a piece; return what the client gets. done: it is the last one."""
        if not self.begun:
            self._look(data, done)
        if self._splitter is not None and self._hider is not None:
            data = self._hider.feed(self._splitter.feed(data))
            if done:
                data += self._hider.last(self._splitter.take())
        self.sent += len(data)
        self.last = joined(self.last, data)
        return data

    def _look(self, data: bytes, done: bool) -> None:
        """See whether the answer begins."""
        self.first += data[: HEAD - len(self.first)]
        self._looked += len(data)
        if self._said is None:
            self.begun = done or data != b""
            return
        said = self._said.feed(data, done)
        if said is not None and said.status:
            outcome = Outcome.of_status(said.status, False)
            self.outcome = Outcome.FAILED if outcome is Outcome.SERVED else outcome
        self.begun = said is not None or done or self._looked > MOST_HELD

    def usage(self, streaming: bool) -> Usage | None:
        """Return the tokens that the worker tells; None: it tells nothing. streaming: a stream was asked for."""
        last = self._hider.hidden if self._hider is not None and self._hider.hidden else self.last
        figures = usage_of(self.first, last, streaming)
        return None if figures is None else Usage(*figures)
