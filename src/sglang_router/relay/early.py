"""A stream whose head the client was sent before its answer had begun (`--sse-keepalive-secs`).

The head says status 200 and a stream of events. From then on the client cannot be told another status. Retries go on
until the first event, and what comes of them is told in the stream:

    a stream of events      its events follow
    any other answer        one event with its body; for an error, without a clean end
    an error of the router  an error event, without a clean end
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from sglang_router.errors import speaks_anthropic
from sglang_router.relay.injected import UsageHider
from sglang_router.relay.whole_events import WholeEvents
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.framing import LAST_CHUNK, Chunked, Framing, UntilClose, chunk
from sglang_router.wire.response import ResponseHead, framing_of, parse_head

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_MOST: Final = 1 << 20
"""Most bytes of an answer that is sent as one event."""


def early_head() -> tuple[ResponseHead, Framing]:
    """Return the head of a stream that has not begun."""
    head = parse_head(_HEAD)
    assert head is not None
    return head, framing_of(head)


class EarlyLeg(Protocol):
    """A leg, as this module sees it."""

    framing: Framing | None
    decoding: bool
    chunked: bool
    events: bool
    ends: tuple[bytes, ...]

    def handle_by(self, sink: WholeEvents | OneEvent | None) -> None:
        """Let `sink` take the body."""

    def pass_on(self, data: bytes, done: bool) -> None:
        """Send bytes to the client; `done`: they are the last."""

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Take the end of the leg without a complete answer."""

    def fail_late(self, detail: str, event: bytes = b"") -> None:
        """End the answer with an error event: `event`, or one of the router's."""


class Early:
    """What the client has, as `shown` has it otherwise: whole events, in whole chunks.

    chunked  the client is sent chunks
    """

    __slots__ = ("chunked", "framing")

    events = True

    def __init__(self, chunked: bool) -> None:
        self.chunked = chunked
        self.framing: Framing = Chunked() if chunked else UntilClose()

    def join(self, leg: EarlyLeg, data: bytes) -> bytes:
        """Prepare a leg whose answer begins now; return the content of its body so far."""
        leg.chunked, leg.events = self.chunked, True
        if isinstance(leg.framing, Chunked) and not leg.decoding:
            pieces: list[bytes] = []
            Chunked().feed(data, pieces)
            data, leg.decoding = b"".join(pieces), True
        return data

    def take(
        self, leg: EarlyLeg, head: ResponseHead, data: bytes, done: bool, path: bytes, hider: UsageHider | None
    ) -> None:
        """Send the answer of a leg as a part of the stream.

        data   the content so far
        hider  drops an event that the client did not ask for; None: all are sent
        """
        closes, leg.framing = isinstance(leg.framing, UntilClose), self.framing
        sink: WholeEvents | OneEvent = OneEvent(head.status, path)
        if continues(head):
            sink = WholeEvents(None, returns=False, closes=closes, hider=hider)
        leg.handle_by(sink)
        sink.data(leg, data, done)


def continues(head: ResponseHead) -> bool:
    """Return whether an answer is a stream whose events can follow."""
    return head.events and head.status == 200


class OneEvent:
    """Sends an answer that is no stream as one event."""

    __slots__ = ("_body", "_named", "_status")

    def __init__(self, status: int, path: bytes) -> None:
        self._status = status
        self._named = speaks_anthropic(path) or path == b"/v1/responses"  # their clients go by the name of an event
        self._body = bytearray()

    def data(self, leg: EarlyLeg, data: bytes, done: bool) -> None:
        """Collect the body; send it at its end."""
        self._body += data
        if not done and len(self._body) <= _MOST:
            leg.pass_on(b"", False)
            return
        try:
            line = msgspec.json.format(bytes(self._body), indent=-1)
        except (msgspec.MsgspecError, RecursionError):
            leg.fail_late(f"The worker answered with status {self._status}, and not with a stream of events or JSON.")
            return
        event = b"data: %b\n\n" % line
        if self._status >= 400:
            leg.fail_late(f"The worker answered with status {self._status}.", b"event: error\n" * self._named + event)
        else:
            leg.pass_on(chunk(event) + LAST_CHUNK if leg.chunked else event, True)
