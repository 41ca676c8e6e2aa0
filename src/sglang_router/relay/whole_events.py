"""Send the client whole events only, so that an error event never follows half of one.

    read ends with an event   the usual case: the leg passes the bytes on as they came (`Leg.data`)
    it does not               a `WholeEvents` takes over: it sends whole events, in chunks of its own, and keeps the
                              rest; when nothing is kept and the worker's chunk ends too, the leg passes bytes on again

While bytes pass as they came, the client stands between two events and between two chunks. Whether a read ends so is
seen from its last bytes alone: in a chunked body, the end of an event in front of the CRLF of its chunk. The byte in
front is part of that, for a chunk that holds nothing but a newline ends alike (`1`, CRLF, LF, CRLF).
"""

from __future__ import annotations

from typing import Final, Protocol

from sglang_router.errors import WorkerInvalid
from sglang_router.relay.injected import UsageHider
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.framing import LAST_CHUNK, Chunked, Framing, Sized, UntilClose, chunk
from sglang_router.wire.sse import EventSplitter

ANY_END: Final[tuple[bytes, ...]] = (b"",)
"""Ends of reads of an answer that is no stream of events: any."""
CHUNKED_ENDS: Final = (b"}\n\n\r\n", b"]\n\n\r\n", b"}\r\n\r\n\r\n", b"]\r\n\r\n\r\n")
"""Usual ends of reads of a chunked stream; others are looked at more closely."""
PLAIN_ENDS: Final = (b"\n\n", b"\n\r\n", b"\r\r")
"""Ends of reads of a stream without chunks."""
USUAL_ENDS: Final = (*CHUNKED_ENDS, b"}\n\n", b"}\r\n\r\n")
"""Usual ends of the first read of a stream, chunked or not."""


class SplitLeg(Protocol):
    """A leg, as this module sees it."""

    framing: Framing | None
    decoding: bool
    chunked: bool
    events: bool
    ends: tuple[bytes, ...]

    def pass_on(self, data: bytes, done: bool) -> None:
        """Send bytes to the client; `done`: they are the last."""

    def handle_by(self, sink: WholeEvents | None) -> None:
        """Let `sink` take the body from now on; None: bytes pass as they come."""

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Take the end of the leg without a complete answer."""


def split(leg: SplitLeg, data: bytes) -> None:
    """Take a read that does not end as usual: pass it on after all, or let a `WholeEvents` take over."""
    if not leg.chunked:
        _take_over(leg, None, data)
        return
    assert isinstance(leg.framing, Chunked)
    content = _content(data, leg.framing)
    if content is None:
        leg.ends = ANY_END
        leg.pass_on(data, False)
        return
    if leg.framing.gap == 0 and content.endswith(PLAIN_ENDS):
        leg.pass_on(data, False)
        return
    worker, leg.framing = leg.framing, Chunked()
    leg.decoding = True
    _take_over(leg, worker, content)


def _content(data: bytes, framing: Chunked) -> bytes | None:
    """Return the content of a read that began between two chunks. framing: of the worker's answer, after the read.

    None: it did not begin there. The read before ended with content that looks like the end of a chunk, so that it is
    not known any more where events end.
    """
    coding, pieces = Chunked(), list[bytes]()
    try:
        coding.feed(data, pieces)
    except WorkerInvalid:
        return None
    return b"".join(pieces) if coding.place == framing.place else None


def _take_over(leg: SplitLeg, worker: Chunked | None, content: bytes) -> None:
    sink = WholeEvents(worker, closes=isinstance(leg.framing, UntilClose))
    leg.handle_by(sink)
    sink.data(leg, content, False)


def hides(framing: Framing | None) -> bool:
    """Return whether an event can be left out of an answer: not if its head has told its length."""
    return not isinstance(framing, Sized)


def hide(leg: SplitLeg, hider: UsageHider, data: bytes, done: bool) -> None:
    """Send the events of an answer but the one that `hider` drops. data: the body as it came so far."""
    leg.events = True
    closes = isinstance(leg.framing, UntilClose)
    if isinstance(leg.framing, Chunked):
        if not leg.decoding:
            pieces = list[bytes]()
            Chunked().feed(data, pieces)
            data, leg.decoding = b"".join(pieces), True
        leg.framing = Chunked()  # towards the client: each write is whole chunks
    sink = WholeEvents(None, returns=False, closes=closes, hider=hider)
    leg.handle_by(sink)
    sink.data(leg, data, done)


class WholeEvents:
    """Sends whole events of one leg's answer; see the module.

    worker   the worker's framing, if it is chunked and so is the client's; else None
    returns  bytes may pass as they come again
    closes   the worker ends the answer by closing: inside an event, that is a break
    hider    drops the event that the client did not ask for; None: all are sent
    """

    __slots__ = ("_closes", "_hider", "_returns", "_splitter", "_worker")

    def __init__(
        self,
        worker: Chunked | None,
        *,
        returns: bool = True,
        closes: bool = False,
        hider: UsageHider | None = None,
    ) -> None:
        self._worker = worker
        self._returns = returns
        self._closes = closes
        self._hider = hider
        self._splitter = EventSplitter()

    @property
    def torn(self) -> bool:
        """Whether the client was sent a part of an event, which is too long to be kept."""
        return self._splitter.torn

    def __repr__(self) -> str:
        return f"<WholeEvents{' holds' * self._splitter.holds}{' torn' * self.torn}>"

    def data(self, leg: SplitLeg, data: bytes, done: bool) -> None:
        """Take content of the body."""
        splitter, worker = self._splitter, self._worker
        whole = splitter.feed(data)
        if self._hider is not None:
            whole = self._hider.feed(whole)
        if done:
            rest = splitter.take()
            if self._closes and rest.strip(b"\r\n"):
                leg.pass_on(chunk(whole) if leg.chunked else whole, False)
                leg.broken(Outcome.CUT, "The worker broke off inside an event of its answer.")
                return
            whole += rest if self._hider is None else self._hider.last(rest)
        elif self._returns and not splitter.holds and not splitter.torn and (worker is None or worker.gap == 0):
            self._return(leg)
        sent = chunk(whole) if leg.chunked else whole
        leg.pass_on(sent + LAST_CHUNK if done and leg.chunked else sent, done)

    def _return(self, leg: SplitLeg) -> None:
        if self._worker is not None:
            leg.framing = self._worker
            leg.decoding = False
        leg.handle_by(None)
