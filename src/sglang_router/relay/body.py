"""The interface of body handlers, which change the bodies of a request's answers or continue a broken answer.

A handler is chosen when a request is routed. Without one, bytes are passed on as they come. With one:

    begin(head, framing, ...)    the head of the first answer is about to be sent to the client
    follow(head, framing)        the head of an answer that continues a broken one
    feed(data) --> bytes         what the client is sent for these bytes; `failed`: the worker reported its own failure
    end() --> bytes              what ends the answer
    broke() --> Next             the answer broke: another leg, only the end is missing, or it stays broken

A handler takes and returns bytes. It uses no connection, no exchange and no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sglang_router.relay.injected import UsageHider
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.facts import Facts
from sglang_router.wire.framing import Framing
from sglang_router.wire.gathering import Body
from sglang_router.wire.response import ResponseHead


class Unintelligible(Exception):
    """The body of an answer that should continue a broken one cannot be parsed."""


class NextLeg:
    """Another worker continues the answer.

    events  bytes that the client is sent first
    body    the request body of the next leg, whose answer follows
    facts   the facts of that body, for routing
    """

    __slots__ = ("body", "events", "facts")

    def __init__(self, events: bytes, body: bytes, facts: Facts) -> None:
        self.events = events
        self.body = body
        self.facts = facts


class Complete:
    """Only the end of the answer was missing. rest: the bytes that complete it."""

    __slots__ = ("rest",)

    def __init__(self, rest: bytes) -> None:
        self.rest = rest


class Broken:
    """The answer stays broken."""

    __slots__ = ()


Next = NextLeg | Complete | Broken


class BodyHandler(Protocol):
    """The handler of one request's answers; see the module.

    hider      drops an event that the client did not ask for, before anything else; None: there is none
    decoding   legs pass the content on without its transfer coding
    failed     the worker reported in its answer that it failed
    torn       the client was sent a part of an event
    resumed    how often the answer was continued or completed
    unresumed  why a broken answer was not continued; "" otherwise
    """

    hider: UsageHider | None

    @property
    def decoding(self) -> bool:
        """Whether legs pass the content on without its transfer coding."""

    @property
    def failed(self) -> bool:
        """Whether the worker reported in its answer that it failed."""

    @property
    def torn(self) -> bool:
        """Whether the client was sent a part of an event, so that nothing can be sent in between."""

    @property
    def resumed(self) -> int:
        """How often the answer was continued or completed."""

    @property
    def unresumed(self) -> str:
        """Why a broken answer was not continued; "" otherwise."""

    def begin(self, head: ResponseHead, framing: Framing, chunked: bool, events: bool) -> Framing | None:
        """Take the first head; return the framing of what the client is sent, or None to pass the body on unchanged.

        chunked  the client is sent chunks
        events   the answer is a stream of events
        """

    def follow(self, head: ResponseHead, framing: Framing) -> str:
        """Take the head of a following answer; return what is wrong with it, or ""."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; return what the client is sent for them.

        Raises: Unintelligible, when they cannot be parsed.
        """

    def is_cut(self) -> bool:
        """Return whether an answer that ended with its connection is incomplete."""

    def end(self) -> bytes:
        """Return what ends the answer, after what was held back."""

    def broke(self) -> Next:
        """Return what follows a break at this point."""

    def follows(self) -> None:
        """Prepare for the leg of a NextLeg, which is about to be sent."""

    def no_leg(self) -> None:
        """Note that there was no worker, or no retry, for the leg of a NextLeg."""

    def let_fail(self) -> bytes:
        """Pass everything on unchanged from now on; return what was held back."""


Handlers = Callable[[Endpoint, Body, Facts], BodyHandler | None]
"""Returns the handler for a request (endpoint, body, facts); None: bodies are passed on unchanged."""


def no_handler(endpoint: Endpoint, body: Body, facts: Facts) -> None:
    """Return None: bodies are passed on unchanged."""
