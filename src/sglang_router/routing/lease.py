"""A lease: one unit of load on one worker. Taking it is the load change; it is closed exactly once.

lease = fleet.lease(worker)            load + 1
lease.streams(uncached, now)           a stream is sent: from now on its first byte is awaited
lease.began(now)                       the first byte of the answer arrived
lease.close(outcome, now)              load - 1; breaker and outlier detection hear how the leg ended
lease.close(outcome, now, held=True)   load - 1; they hear later, by `Fleet.hear`, what is made of it
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.outliers import bucket_of
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.session_table import Session
from sglang_router.routing.worker import Worker


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
        "bucket",
        "choice",
        "closed",
        "facts",
        "first_byte",
        "life",
        "number",
        "sent_at",
        "session",
        "silent",
        "tag",
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
        self._close = close

    def __repr__(self) -> str:
        return f"<Lease {self.number} on {self.worker.url}{', closed' * self.closed}>"

    def streams(self, uncached: int, now: float) -> None:
        """Note that a stream is sent. uncached: bytes of prompt that the worker must read first; negative: unknown."""
        worker = self.worker
        worker.waiting += 1
        self.sent_at = now
        self.bucket = bucket_of(uncached, worker.waiting, worker.load) if uncached >= 0 else 0

    def began(self, now: float) -> None:
        """Note that the first byte of the answer arrived. A closed lease ignores it: the leg failed before."""
        if not self.closed and self.sent_at >= 0.0 and self.first_byte < 0.0:
            worker = self.worker
            worker.waiting -= 1
            if self._unread:
                self._unread = False
                worker.unread -= 1
            self.first_byte = max(now - self.sent_at, 0.0)  # a timer may fire a little early, before a planned sending

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
            self._close(self, outcome, now, held)
