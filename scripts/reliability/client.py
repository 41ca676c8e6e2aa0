"""One client's connection, which reports how a request ended and notices every surplus byte.

    Connection.ask(question) -> Result        one of

    answered   the whole right answer
    failed     an error status instead of it; `reason` is the router's code, or the engine's status
    cut        the answer began and ended early, and said so: an error event, or a connection without a clean end
    left       the client disconnected on purpose
    refused    no process listens
    lost       the connection ended without an answer
    wrong      bytes are missing, duplicated or of another answer; two answers; none within the time

llhttp (httptools) parses the answers, so that a second answer, or a byte after the first, is noticed.
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import NamedTuple, cast

import httptools
from scripts.reliability.answers import Question, aborted, error_event, fault_of

PATIENCE = 40.0
"""Seconds that a client waits for the end of its answer; then the answer counts as missing."""


class Fate(enum.Enum):
    ANSWERED = "answered"
    FAILED = "failed"
    CUT = "cut"
    LEFT = "left"
    REFUSED = "refused"
    LOST = "lost"
    WRONG = "wrong"


class Result(NamedTuple):
    """The result of a request. Times of the monotonic clock, in seconds."""

    fate: Fate
    reason: str
    began: float
    ended: float


class Connection(asyncio.Protocol):
    """One connection to the router; see the module."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        # of the connection
        self.usable = False
        self.fault = ""
        self._used = False
        # of the request
        self._end: asyncio.Future[None] | None = None
        self._expecting = False
        self._begun = self._whole = False
        self._code = ""
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, question: Question, *, close: bool, leave: float = 0.0) -> Result:
        """Send a request and wait for the end of its answer; `leave`: disconnect after this many seconds."""
        began = time.monotonic()
        self._end = asyncio.get_running_loop().create_future()
        self._expecting = True
        self._begun = self._whole = False
        self._code = ""
        self._body = []
        if self.usable:
            self.transport.write(question.raw(close))
        else:  # closed since the last check
            self._over()
        try:
            await asyncio.wait_for(self._end, leave or PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):
            self.transport.abort()
            self.usable = False
            fate, reason = (Fate.LEFT, "") if leave else (Fate.WRONG, f"no end of the answer within {PATIENCE:g} s")
            return Result(fate, reason, began, time.monotonic())
        fate, reason = self._judge(question)
        self._used = True
        if close or fate is not Fate.ANSWERED:
            self.usable = self.usable and fate is Fate.FAILED and not close
            if not self.usable:
                self.transport.close()
        return Result(fate, reason, began, time.monotonic())

    def _judge(self, question: Question) -> tuple[Fate, str]:
        body = b"".join(self._body)
        if self.fault:
            return Fate.WRONG, self.fault
        if not self._begun:
            return Fate.LOST, "on a kept connection" if self._used else "on a new connection"
        status = self._parser.get_status_code()
        if status != 200:
            return (Fate.FAILED, self._code or f"http_{status}") if self._whole else (Fate.CUT, f"http_{status}")
        if aborted(body):
            return Fate.CUT, "aborted by the engine"
        fault = fault_of(question, body, self._whole)
        if fault:
            return Fate.WRONG, fault
        if self._whole:
            return Fate.ANSWERED, ""
        return Fate.CUT, error_event(body) or "without a word"

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        if not self._expecting:
            self.fault = self.fault or "bytes after the answer"
            self.usable = False
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fault = self.fault or f"not HTTP: {error}"
            self._over()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._over()

    # -- httptools -----------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._begun or not self._expecting:
            self.fault = self.fault or "a second answer"
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-smg-error-code":
            self._code = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._whole = True
        self.usable = self.usable and self._parser.should_keep_alive()
        self._over()

    def _over(self) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        self._expecting = False
