"""A lease: one unit of load on one worker. Taking it is the load change; it is closed exactly once.

lease = fleet.lease(worker)            load + 1
lease.sent(uncached, streams, now, 0)  a request is sent: its prompt is work in front of others, see `routing.work`
lease.streams(uncached, now)           it is a stream: from now on its first byte is awaited
lease.began(now)                       the first byte of the answer arrived
lease.close(outcome, now)              load - 1; breaker and outlier detection hear how the leg ended
lease.close(outcome, now, held=True)   load - 1; they hear later, by `Fleet.hear`, what is made of it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.outliers import bucket_of
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.session_table import Session
from sglang_router.routing.work import Work
from sglang_router.routing.worker import Worker

_SERVED: Final = Outcome.SERVED


class Lease:
    """See the module.

    number      unique in this process, rising; what the relay reports about a leg names it
    closed      whether it was closed
    bucket      of a stream: in which circumstances it was sent, see `routing.outliers`; 0: its time is not compared
    sent_at     when a stream was sent, seconds of the caller's clock; negative before
    first_byte  seconds from sending to the first byte of the answer; negative without one
    silent      the worker refused connections when the lease was taken: an answer means that it is back
    life        which process of the worker has it, see `Worker.life`
    alone       no other prompt waited to be read by the worker when the lease was taken
    work        the work that it is part of; None: it was not sent, or after a delay
    uncached    bytes of its prompt that the worker must read
    due         when its prompt is believed to be read, by the clock of `work`
    beside      requests in flight there when it was sent; of a stream, when it began

    The router's own notes on the leg:

    tag         of its request
    facts       of its request
    choice      of its worker
    session     to which the request belongs; None: it is no part of one, or nobody asks
    """

    __slots__ = (
        "_close",
        "_unread",
        "alone",
        "beside",
        "bucket",
        "choice",
        "closed",
        "due",
        "facts",
        "first_byte",
        "life",
        "number",
        "sent_at",
        "session",
        "silent",
        "tag",
        "uncached",
        "work",
        "worker",
    )

    tag: RequestTag
    facts: Facts
    choice: Choice

    def __init__(self, number: int, worker: Worker, close: Callable[[Lease, Outcome, float, bool], None]) -> None:
        self.number = number
        self.worker = worker
        self.closed = False
        self.bucket = 0
        self.sent_at = self.first_byte = -1.0
        self.silent = worker.gone_silent
        self.life = worker.life
        self.alone = not worker.unread
        worker.unread += 1
        self._unread = True
        self.session: Session | None = None
        self.work: Work | None = None
        self.uncached = self.beside = 0
        self.due = 0.0
        self._close = close

    def __repr__(self) -> str:
        return f"<Lease {self.number} on {self.worker.url}{', closed' * self.closed}>"

    def occupy(self, rooms: int) -> None:
        """Take as much of the worker's window as a list has prompts; `close` gives it back."""
        window, close, more = self.worker.window, self._close, rooms - 1
        window.more += more

        def give_back(lease: Lease, outcome: Outcome, now: float, held: bool) -> None:
            window.more -= more
            close(lease, outcome, now, held)

        self._close = give_back

    def sent(self, uncached: int, streams: bool, now: float, delay: float) -> None:
        """Note that a request is sent, after a delay. uncached: as for `streams`.

        With a delay it is no work: until then the worker may read other prompts, which need not wait for it. Nor is
        a WebSocket: nobody knows which part of its time is.
        """
        work = self.worker.work
        if work.active and delay <= 0.0 and not self.facts.endpoint.tunnel:
            self.work = work
            self.beside = self.worker.load
            self.uncached = read = uncached if uncached > 0 else 0
            self.due = work.sent(self, read, streams, now)
        if streams:
            self.streams(uncached, now + delay)

    def streams(self, uncached: int, now: float) -> None:
        """Note that a stream is sent. uncached: bytes of prompt that the worker must read first; negative: unknown."""
        worker = self.worker
        worker.waiting += 1
        self.sent_at = now
        self.bucket = bucket_of(uncached, worker.waiting, worker.load) if uncached >= 0 else 0

    def began(self, now: float) -> None:
        """Note that the first byte of the answer arrived, or that a WebSocket is open.

        A closed lease ignores it: the leg failed before.
        """
        if not self.closed and self.sent_at >= 0.0 and self.first_byte < 0.0:
            worker = self.worker
            worker.waiting -= 1
            if self._unread:
                self._unread = False
                worker.unread -= 1
            self.first_byte = max(now - self.sent_at, 0.0)  # a timer may fire a little early, before a planned sending
            if self.work is not None:
                self.beside = self.worker.load
                self.work.began(self, self.uncached, now)
        elif self._unread:
            self._unread = False
            self.worker.unread -= 1

    def close(self, outcome: Outcome, now: float, held: bool = False) -> None:
        """End the lease with the outcome of its leg. A second call does nothing.

        held  a failure is not held against the worker yet: `Fleet.hear` follows
        """
        if not self.closed:
            self.closed = True
            if self._unread:
                self._unread = False
                self.worker.unread -= 1
            if self.sent_at >= 0.0 and self.first_byte < 0.0:
                self.worker.waiting -= 1
                self.bucket = 0  # no first byte: there is no time to compare
            if self.work is not None:
                self._end_work(self.work, outcome is _SERVED, now)
            self._close(self, outcome, now, held)

    def _end_work(self, work: Work, served: bool, now: float) -> None:
        if self.first_byte < 0.0:
            work.ended(self, self.due, self.uncached, now, self.beside if served else 0)
        elif served:
            work.answered(now - self.sent_at - self.first_byte, self.beside)
