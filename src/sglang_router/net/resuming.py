"""A relay whose stream another worker continues when its own dies (`--resume-streams`).

    worker --> EventSplitter --> [rewrite, in a following leg] --> client         whole events only, in chunks of ours
                                          |
                                     a copy of them: read when 16 KiB have gathered, or after a break
    break  --> core.resume.go_on --> a body for another worker, which becomes the next leg
                                 --> the events that were missing: the text was complete
                                 --> refused: the error event, as without the option

Everything else is `net.relay`'s: this class only steps in where that one has a head to pass on, content, or a failure
after the head. It is used when the option is on; streams that could not be continued pass through it as they would
through the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.generation import DONE
from sglang_router.core.request import read
from sglang_router.core.resume import GENERATIONS, Next, ResumeRules, go_on, refusal
from sglang_router.core.worker import Outcome, outcome_of_status
from sglang_router.errors import RouterError, StreamBroken
from sglang_router.net.relay import Relay
from sglang_router.wire.response import Chunked, Framing, ResponseHead, Sized, UntilClose
from sglang_router.wire.sse import EventSplitter, chunk, payloads

if TYPE_CHECKING:
    from sglang_router.core.request import Endpoint
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.service import Service
    from sglang_router.wire.request import Request

_READ_AT = 16384
"""Bytes of events that are kept as they came: their text is a tenth of that."""
_FAULT = b'data: {"error"'  # no text contains it: its quotes would be escaped


class _Error(msgspec.Struct):
    code: int | str | None = None


class _Fault(msgspec.Struct):
    error: _Error


class Stream:
    """What is kept of one stream. `failed` is what came since the worker said that it failed."""

    __slots__ = (
        "_barren",
        "_endpoint",
        "_following",
        "_generation",
        "_gone_on",
        "_pending",
        "_size",
        "_splitter",
        "_through",
        "_tokens",
        "chunked",
        "failed",
        "until_close",
    )

    def __init__(self, endpoint: Endpoint, rules: ResumeRules) -> None:
        self._endpoint = endpoint
        self._generation = GENERATIONS[endpoint.name](rules.max_bytes)
        self._splitter = EventSplitter()
        self._pending: list[bytes] = []
        self._size = 0
        self._through = False  # nothing is kept any more
        self._following = False
        self._tokens = 0
        self._barren = 0
        self._gone_on = False  # the leg has begun
        self.chunked = False  # the client is sent chunks
        self.until_close = False
        self.failed = b""

    def begin(self, framing: Framing) -> None:
        """A leg begins."""
        self._gone_on = True
        self.until_close = isinstance(framing, UntilClose)

    def feed(self, data: bytes) -> bytes:
        """What the client is to be sent for this content, in its coding.

        Raises: msgspec.MsgspecError for events of a following leg that are not understood.
        """
        if self._through:
            if self._splitter.held:
                data, self._splitter.held = self._splitter.held + data, b""
            return self.coded(data)
        if self.failed:
            self.failed += data
            return b""
        whole = self._splitter.feed(data)
        if not whole:
            return b""
        if (at := whole.find(_FAULT)) >= 0 and _is_fault(whole[at:]):
            self.failed = whole[at:] + self._splitter.held
            self._splitter.held = b""
            whole = whole[:at]
        if self._following:
            whole = self._rewritten(whole)
        if not self._generation.reason:
            self._pending.append(whole)
            self._size += len(whole)
            if self._size >= _READ_AT:
                self._read()
                self._through = bool(self._generation.reason) and not self._following
        return self.coded(whole)

    def coded(self, data: bytes) -> bytes:
        return chunk(data) if self.chunked and data else data

    def end(self) -> bytes:
        """What ends the answer, behind what was held back."""
        rest = self._splitter.held + self.failed
        return self.coded(rest) + b"0\r\n\r\n" if self.chunked else rest

    def is_cut(self) -> bool:
        """Whether a stream that ended with its connection ended too early."""
        if not self.until_close or self._through:
            return False
        self._read()
        generation = self._generation
        return not (generation.done or generation.finished or generation.reason)

    def go_on(self, body: bytes) -> Next:
        """What follows a break; `body` is the client's own."""
        self._read()
        if self._gone_on:
            self._barren = self._barren + 1 if self._generation.tokens == self._tokens else 0
            self._tokens = self._generation.tokens
            self._gone_on = False
        return go_on(self._endpoint, body, self._generation, self._barren)

    def follow(self) -> None:
        """The rest is asked of another worker. The beginning of an event that was held back is nobody's now."""
        self._generation.follow()
        self._following = True
        self._splitter = EventSplitter()
        self.failed = b""

    def let_fail(self) -> bytes:
        """From now on everything goes to the client as it is: first of all what the worker said of its failure."""
        self._through = True
        self._generation.reason = self._generation.reason or "unreadable"
        failed, self.failed = self.failed, b""
        return self.coded(failed)

    def _read(self) -> None:
        if self._pending:
            events = b"".join(self._pending)
            self._pending.clear()
            self._size = 0
            self._generation.read([data for _, data in payloads(events) if data])

    def _rewritten(self, events: bytes) -> bytes:
        rewrite = self._generation.rewrite
        passed = []
        for event, data in payloads(events):
            if not data or data == DONE:
                passed.append(event)
            elif (ours := rewrite(data)) is not None:
                passed.append(as_event(ours))
        return b"".join(passed)


def as_event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def _is_fault(event: bytes) -> bool:
    """Whether an error event tells of the engine's own failure, not of the client's mistake."""
    try:
        code = msgspec.json.decode(payloads(event)[0][1], type=_Fault).error.code
        return code is None or int(code) >= 500
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        return False


class ResumingRelay(Relay):
    """See the module."""

    __slots__ = ("_asked", "_reason", "_stream", "resumed", "unresumed")

    def __init__(self, service: Service, client: Downstream, request: Request, endpoint: Endpoint) -> None:
        super().__init__(service, client, request, endpoint)
        self._asked = request  # by the client; `_request` is what the present worker is asked
        self._stream: Stream | None = None
        self._reason = ""
        self.resumed = 0
        self.unresumed = ""

    def start(self) -> None:
        super().start()
        rules = self._service.resuming
        if self._facts is None or not self._facts.streaming or self._ended or rules is None:
            return
        self._reason = refusal(self._endpoint, self._asked.body, rules)
        if not self._reason:
            self._stream = Stream(self._endpoint, rules)
            self.decoding = True

    # -- the worker's side ---------------------------------------------------------------------------------------------

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        stream = self._stream
        if stream is None:
            super().begin(head, framing, data, done)
            return
        if self._framing is not None:
            self._begin_following(head, framing, data, done)
            return
        if done:
            self._leg = None
        super().begin(head, framing, b"", False)
        if self._first_byte < 0.0:  # it was refused, and sent elsewhere
            return
        if isinstance(framing, Sized):
            self._stream = None
        elif isinstance(framing, Chunked):
            self._framing = Chunked()  # the client's: each of our writes is whole
        stream.chunked = self._chunked
        stream.begin(framing)
        if not self._sse or head.status != 200:
            stream.let_fail()
        if data or done:
            self.data(data, done)

    def _begin_following(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """The head of a worker that is to go on: the client has had one already."""
        leg, plan, stream = self._leg, self._plan, self._stream
        assert plan is not None
        assert stream is not None
        if done:
            self._leg = None
        kind = head.header(b"content-type") or b""
        if head.status != 200 or not kind.startswith(b"text/event-stream"):
            self._give_up_leg()
            outcome = outcome_of_status(head.status, head.header(b"retry-after") is not None)
            self._failed(outcome, StreamBroken(f"The worker that was to go on answered with status {head.status}."))
            return
        self.resumed += 1
        self._quiet = 0
        now = self._service.clock()
        plan.lease.began(now)
        self._watch(now)
        stream.begin(framing)
        if self._paused and leg is not None and not done:
            leg.pause()
        self.data(data, done)

    def data(self, data: bytes, done: bool) -> None:
        stream = self._stream
        if stream is None:
            super().data(data, done)
            return
        leg = self._leg
        if done:
            self._leg = None
        try:
            self._write(stream.feed(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
            self._give_up_leg()
            self._failed(Outcome.INVALID, StreamBroken("The worker that was to go on sends what is not understood."))
            return
        if stream.failed or (done and stream.is_cut()):
            if self._resumed(Outcome.FAILED if stream.failed else Outcome.CUT):
                if leg is not None and not done:
                    leg.abort()
                return
            self._write(stream.let_fail())
        if done:
            self._write(stream.end())
            self._finish()

    def _write(self, data: bytes) -> None:
        if data:
            self._sent += len(data)
            self._turn.write(self._transport, data)

    # -- a failure -----------------------------------------------------------------------------------------------------

    def _failed(self, outcome: Outcome, error: RouterError) -> None:
        if self._framing is None or outcome is Outcome.TIMEOUT:
            super()._failed(outcome, error)
        elif not self._resumed(outcome):
            if outcome is not Outcome.SILENT:  # whatever became of those that were to go on
                error = StreamBroken(str(error))
            super()._failed(outcome, error)

    def _resumed(self, outcome: Outcome) -> bool:
        """Has another worker go on, or ends the answer where nothing was missing. False: it stays broken."""
        stream, facts = self._stream, self._facts
        if stream is None or facts is None:
            self.unresumed = self._reason
            return False
        step = stream.go_on(self._asked.body)
        if step.refused:
            self.unresumed = self.unresumed or step.refused
            return False
        events = stream.coded(b"".join(map(as_event, step.events)))
        if not step.body:
            self.resumed += 1
            self._write(events + b"0\r\n\r\n" if stream.chunked else events)
            self._outcome = outcome
            self._finish()
            return True
        self._request = msgspec.structs.replace(self._asked, body=step.body)
        facts = read(self._endpoint, step.body, facts.routing_key)
        if not self._retried(outcome, facts):
            self.unresumed = "no_retry"
            return False
        self._facts = facts
        self._write(events)
        stream.follow()
        return True

    def _end(self, outcome: Outcome | None, code: str = "") -> None:
        self._request = self._asked
        super()._end(outcome, code)
