"""The body handler of streams that another worker continues when their own dies (`--resume-streams`).

    worker --> EventSplitter --> [rewrite, in a following leg] --> client         whole events only, in our own chunks
                                          |
                                     a copy of them: read when 16 KiB have gathered, or after a break
    break  --> resume.continuation.go_on --> a body for another worker: NextLeg
                                         --> only the end was missing, and the router sends it: Complete
                                         --> a reason why it cannot be continued: Broken

A stream that could not be continued has a handler too (`NotResumable`): it passes everything on and stores the reason.
`handlers_of` makes both. `app.build` gives it to the relay, which depends on nothing else in this package.
"""

from __future__ import annotations

import msgspec

from sglang_router.relay.body import BodyHandler, Broken, Complete, Handlers, Next, NextLeg, Unintelligible
from sglang_router.relay.injected import UsageHider
from sglang_router.resume.continuation import GENERATIONS, ResumeRules, go_on, refusal
from sglang_router.resume.generation import DONE
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.facts import LARGE, Facts, read
from sglang_router.wire.framing import LAST_CHUNK, Chunked, Framing, Sized, UntilClose, chunk
from sglang_router.wire.gathering import Body
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.sse import EventSplitter, payloads

_READ_AT = 16384
"""Bytes of events that are kept unchanged before they are read; their text takes about a tenth of that."""
_FAULT = b'data: {"error"'  # never part of a text: quotes inside a JSON string are escaped


class _Error(msgspec.Struct):
    """The error of an error event."""

    code: int | str | None = None


class _Fault(msgspec.Struct):
    """An error event."""

    error: _Error


def handlers_of(rules: ResumeRules) -> Handlers:
    """Return the function that the relay calls to get the handler of each stream."""

    def handler(endpoint: Endpoint, body: Body, facts: Facts) -> BodyHandler:
        if len(body) > LARGE:  # it is not decoded, here as elsewhere
            return NotResumable("large")
        whole = bytes(body)
        reason = refusal(endpoint, whole, rules)
        return NotResumable(reason) if reason else ResumableStream(endpoint, whole, facts, rules)

    return handler


class NotResumable:
    """The handler of a stream that cannot be continued: pass everything on; after a break, tell the reason."""

    __slots__ = ("_reason", "hider", "unresumed")

    decoding = False
    failed = False
    torn = False
    resumed = 0

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.hider: UsageHider | None = None
        self.unresumed = ""

    def begin(self, head: ResponseHead, framing: Framing, chunked: bool, events: bool) -> None:
        """Return None: the body is passed on unchanged."""

    def broke(self) -> Next:
        """Store the reason; the stream stays broken."""
        self.unresumed = self._reason
        return Broken()

    # The methods below are never called: `begin` declines the body, and no leg follows.

    def follow(self, head: ResponseHead, framing: Framing) -> str:
        """Decline: no leg continues this stream."""
        return "no answer of this stream is continued"

    def feed(self, data: bytes) -> bytes:
        """Return the bytes unchanged."""
        return data

    def is_cut(self) -> bool:
        """Return False."""
        return False

    def end(self) -> bytes:
        """Return nothing."""
        return b""

    def follows(self) -> None:
        """Do nothing."""

    def no_leg(self) -> None:
        """Do nothing."""

    def let_fail(self) -> bytes:
        """Return nothing."""
        return b""


class ResumableStream:
    """The handler of one stream, and all that is kept of the stream. See the module and `relay.body.BodyHandler`."""

    __slots__ = (
        "_body",
        "_chunked",
        "_closed",
        "_endpoint",
        "_events",
        "_failed",
        "_following",
        "_generation",
        "_gone_on",
        "_passes",
        "_pending",
        "_routing_key",
        "_size",
        "_splitter",
        "_tokens",
        "_until_close",
        "_without_progress",
        "hider",
        "resumed",
        "unresumed",
    )

    decoding = True

    def __init__(self, endpoint: Endpoint, body: Body, facts: Facts, rules: ResumeRules) -> None:
        # per stream
        self._endpoint = endpoint
        self._body = body  # of the client's request
        self._routing_key = facts.routing_key
        self._generation = GENERATIONS[endpoint.name](rules.max_bytes)
        self._pending: list[bytes] = []  # events not read yet
        self._size = 0  # bytes of `_pending`
        self._passes = False  # everything is passed on, nothing is kept any more
        self._closed = False  # the answer is not a stream, so it cannot be continued
        self._chunked = False  # the client is sent chunks
        self._events = False  # the answer is a stream of events
        self.hider: UsageHider | None = None
        self.resumed = 0
        self.unresumed = ""
        # per leg
        self._splitter = EventSplitter()
        self._following = False  # this leg is not the first
        self._until_close = False  # the answer ends when the connection closes
        self._failed = b""  # bytes from the worker's error event on
        # over all legs
        self._gone_on = False  # the current leg has begun to answer
        self._tokens = 0  # tokens of the text at the last break
        self._without_progress = 0  # legs in a row that broke at the same token

    def __repr__(self) -> str:
        state = "passes" if self._passes else "failed" if self._failed else "kept"
        return (
            f"<ResumableStream {self._endpoint.name} {state}, resumed {self.resumed}, {self._generation.tokens} tokens>"
        )

    @property
    def failed(self) -> bool:
        """Whether the worker sent an error event that reports its own failure."""
        return bool(self._failed)

    @property
    def torn(self) -> bool:
        """Whether the client was sent a part of an event: one that is too long, or of an answer that is no stream."""
        return self._splitter.torn or not self._events

    # -- heads ---------------------------------------------------------------------------------------------------------

    def begin(self, head: ResponseHead, framing: Framing, chunked: bool, events: bool) -> Framing | None:
        """Take the first head; decline a body of known length, pass on what is not a stream of events."""
        if isinstance(framing, Sized):
            self._closed = True
            return None
        self._chunked, self._events = chunked, events
        self._leg_begins(framing)
        if not events or head.status != 200:
            self.let_fail()
        return Chunked() if isinstance(framing, Chunked) else framing  # towards the client: each write is whole chunks

    def follow(self, head: ResponseHead, framing: Framing) -> str:
        """Take the head of a following leg; return why it does not continue the stream, or ""."""
        if head.status != 200 or not head.events:
            return f"The next worker did not continue the stream; it answered with status {head.status}."
        self.resumed += 1
        self._leg_begins(framing)
        return ""

    def _leg_begins(self, framing: Framing) -> None:
        self._gone_on = True
        self._until_close = isinstance(framing, UntilClose)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """Return what the client is sent for these bytes of the leg's answer: whole events, rewritten and in chunks.

        Raises: Unintelligible, when events of a following leg cannot be parsed.
        """
        if self._passes:
            return self._coded(self._whole(data) if self._events else data)
        if self._failed:
            self._failed += data
            return b""
        whole = self._whole(data)
        if not whole:
            return b""
        if (at := whole.find(_FAULT)) >= 0 and _is_fault(whole[at:]):
            self._failed = whole[at:] + self._splitter.take()
            whole = whole[:at]
        return self._coded(self._kept(whole))

    def _whole(self, data: bytes) -> bytes:
        """Return the whole events that these bytes complete, less what the client did not ask for."""
        whole = self._splitter.feed(data)
        return whole if self.hider is None else self.hider.feed(whole)

    def _kept(self, whole: bytes) -> bytes:
        """Rewrite whole events of a following leg, and keep a copy."""
        if self._following:
            whole = self._rewritten(whole)
        if not self._generation.reason:
            self._pending.append(whole)
            self._size += len(whole)
            if self._size >= _READ_AT:
                self._read()
                self._passes = bool(self._generation.reason) and not self._following
        return whole

    def _coded(self, data: bytes) -> bytes:
        """Encode bytes as the client is sent them."""
        return chunk(data) if self._chunked else data

    def end(self) -> bytes:
        """Return what is still held of the answer, and the last chunk."""
        rest = self._splitter.take()
        if self.hider is not None:
            rest = self.hider.last(rest)
        rest = self._coded(rest + self._failed)
        return rest + LAST_CHUNK if self._chunked else rest

    def is_cut(self) -> bool:
        """Return whether a stream that ends with its connection ended too early."""
        if not self._until_close or self._passes:
            return False
        self._read()
        generation = self._generation
        return not (generation.done or generation.finished or generation.reason)

    def _read(self) -> None:
        """Read the events that are kept."""
        if self._pending:
            events = b"".join(self._pending)
            self._pending.clear()
            self._size = 0
            self._generation.read([data for _, data in payloads(events) if data])

    def _rewritten(self, events: bytes) -> bytes:
        """Rewrite the events of a following leg.

        Raises: Unintelligible, when one cannot be parsed.
        """
        rewrite = self._generation.rewrite
        passed = []
        try:
            for event, data in payloads(events):
                if not data or data == DONE:
                    passed.append(event)
                elif (ours := rewrite(data)) is not None:
                    passed.append(_as_event(ours))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
            self._gone_on = False  # it does not go on, but it does not break either
            raise Unintelligible("The next worker's events cannot be parsed.") from None
        return b"".join(passed)

    # -- a break -------------------------------------------------------------------------------------------------------

    def broke(self) -> Next:
        """Decide what follows the break: another leg, the missing end, or nothing."""
        if self._closed:
            return Broken()
        self._read()
        if self._gone_on:
            self._without_progress = self._without_progress + 1 if self._generation.tokens == self._tokens else 1
            self._tokens = self._generation.tokens
            self._gone_on = False
        step = go_on(self._endpoint, self._body, self._generation, self._without_progress)
        if step.refused:
            self.unresumed = self.unresumed or step.refused
            return Broken()
        events = self._coded(b"".join(map(_as_event, step.events)))
        if not step.body:
            self.resumed += 1
            return Complete(events + LAST_CHUNK if self._chunked else events)
        return NextLeg(events, step.body, read(self._endpoint, step.body, self._routing_key))

    def follows(self) -> None:
        """Start the next leg; drop the incomplete event of the broken one, which the client was never sent."""
        self._generation.follow()
        self._following = True
        self._splitter = EventSplitter()
        self._failed = b""

    def no_leg(self) -> None:
        """Store the reason: there was no worker, or no retry, for the next leg."""
        self.unresumed = "no_retry"

    def let_fail(self) -> bytes:
        """Pass everything on from now on; return what was kept of the worker's error event."""
        self._passes = True
        self._generation.reason = self._generation.reason or "unreadable"
        failed, self._failed = self._failed, b""
        return self._coded(failed)


def _as_event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def _is_fault(event: bytes) -> bool:
    """Return whether an error event reports a failure of the engine (no code, or 500 and above), not of the client."""
    try:
        code = msgspec.json.decode(payloads(event)[0][1], type=_Fault).error.code
        return code is None or int(code) >= 500
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return False
