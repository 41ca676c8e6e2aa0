"""Hold an answer back until it has begun: engines send a head long before they know whether they can answer.

    answer                  begins with                       until then
    a stream of events      its first whole event             nothing goes to the client; a break is retried elsewhere
    lines of JSON           its first whole line              the same (Ollama's streams)
    any other answer        the first byte of its body        the same

Comments and pings are no event: they are held too, and sent with the first event. A first event that is an error with
a status makes the answer one with that status: 429 and 5xx are retried, and what is not retried reaches the client
with that status, and the event's data as JSON. An error without a known status is passed on as it came. A first line
that is an error has no status, and stands for 500.

What has visibly begun, which is the usual case, is never held (`begins`). A beginning of more than MOST_HELD bytes is
passed on.
"""

from __future__ import annotations

from typing import Protocol

from sglang_router.relay.whole_events import USUAL_ENDS
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.error_events import FirstEvent, FirstSaid
from sglang_router.wire.framing import Chunked, Framing, Sized, UntilClose
from sglang_router.wire.response import ResponseHead, json_head
from sglang_router.wire.sse import MOST_HELD


class HeldLeg(Protocol):
    """A leg, as this module sees it."""

    framing: Framing | None
    decoding: bool

    def abort(self) -> None:
        """Give the connection up."""

    def begun(self, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the answer: it has begun, and `data` came so far."""

    def holding(self) -> None:
        """Take note that the worker sent something that is held."""

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Take the end without an answer."""


def begins(head: ResponseHead, framing: Framing, data: bytes, done: bool) -> bool:
    """Return whether an answer has visibly begun, and not with an error event."""
    if head.events:
        return data.endswith(USUAL_ENDS) and b"data:" in data and b"error" not in data and b"ping" not in data
    if head.lines:  # the first one may be an error, also where the answer ends with it
        return False
    return done or (data != b"" and not isinstance(framing, Chunked)) or head.status == 101


class Beginning:
    """The beginning of one leg's answer, while it is held. It is the sink of the leg's body."""

    __slots__ = ("_coding", "_events", "_head", "_held", "_said", "_size")

    def __init__(self, head: ResponseHead, framing: Framing, decoding: bool) -> None:
        self._head = head
        self._events = head.events
        self._said = FirstSaid(head.lines) if head.events or head.lines else None
        self._coding = Chunked() if isinstance(framing, Chunked) and not decoding else None
        self._held: list[bytes] = []  # as it came
        self._size = 0

    def __repr__(self) -> str:
        return f"<Beginning of {self._head.status}: {self._size} bytes held>"

    def data(self, leg: HeldLeg, data: bytes, done: bool) -> None:
        """Hold bytes of the body, or pass the answer on when it has begun."""
        self._held.append(data)
        self._size += len(data)
        content = data
        if self._coding is not None:
            pieces: list[bytes] = []
            self._coding.feed(data, pieces)
            content = b"".join(pieces)
        closed = done and isinstance(leg.framing, UntilClose)
        first = self._first(content, done and not closed)
        if first is not None and first.status:
            self._fail(leg, first, done)
        elif first is None and closed and self._events:
            leg.broken(Outcome.BROKEN, "The worker closed the connection before the first event of its answer.")
        elif first is not None or done or self._size > MOST_HELD:
            leg.begun(self._head, b"".join(self._held), done)
        else:
            leg.holding()

    def _first(self, content: bytes, ended: bool) -> FirstEvent | None:
        """Return the first event, once it is there; for an answer that is no stream, its first byte counts as one.

        ended  the worker ended the answer: it need not end its last event
        """
        if self._said is None:
            return FirstEvent() if content else None
        return self._said.feed(content, ended)

    def _fail(self, leg: HeldLeg, first: FirstEvent, done: bool) -> None:
        """Make the answer one with the status of its first event."""
        if not done:
            leg.abort()  # whatever follows the error, nobody is sent it
        known = Outcome.of_status(first.status, False) is not Outcome.SERVED
        leg.framing = Sized(0)
        leg.begun(json_head(first.status if known else 500, len(first.body)), first.body, True)
