"""What happened, as records. The core makes them, listeners hear them; the core knows no listener.

    Routed          a request got a worker (also for each retry)
    Retried         a leg failed and another one follows; where none follows, Finished tells how the last leg ended
    Finished        a request ended, however it ended: exactly one for every request that was accepted
    WorkerChanged   a worker was added, removed, or changed its health, breaker or draining

Nothing of a prompt is in any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_router.core.request import Facts
    from sglang_router.core.worker import Outcome, Worker


class Routed(msgspec.Struct, frozen=True, gc=False):
    """A decision. `branch` is the policy's reason; `matched` and `total` are bytes of routing text."""

    facts: Facts
    worker: Worker
    policy: str
    branch: str
    matched: int
    total: int
    retry: int


class Retried(msgspec.Struct, frozen=True, gc=False):
    """A leg failed on this worker and another one follows after `delay` seconds (0: at once)."""

    worker: Worker
    outcome: Outcome
    delay: float


class Finished(msgspec.Struct, frozen=True, gc=False):
    """The end of a request. Bytes that were no request (bad HTTP, too slow) end with an empty method and path.

    worker      the worker of the last leg; None when none was ever found
    branch      the policy's reason for that worker
    matched     bytes of routing text that worker was believed to hold, of `total`
    status      what the client was sent; 0 when it left before
    code        the router's error code, or "" for a worker's own answer
    outcome     how the last leg ended; None when there was none
    duration    seconds from the whole request in to the last byte out
    first_byte  seconds to the first byte of the answer; negative when there was none
    sent        bytes of the answer
    retries     legs beyond the first
    client      the name of the client's key, "" where none is asked for
    resumed     how often another worker went on with the stream, or the router completed it
    unresumed   why a stream that broke was not continued, a key of core.resume.REASONS; "" without --resume-streams
    """

    method: str
    path: str
    endpoint: str
    request_id: str
    peer: str
    streaming: bool
    model: str
    worker: Worker | None
    branch: str
    matched: int
    total: int
    status: int
    code: str
    outcome: Outcome | None
    duration: float
    first_byte: float
    received: int
    sent: int
    retries: int
    client: str = ""
    resumed: int = 0
    unresumed: str = ""


class WorkerChanged(msgspec.Struct, frozen=True, gc=False):
    """A worker changed, from `old` to `new`; `what` is added, removed, health, breaker, draining or restarted."""

    worker: Worker
    what: str
    old: str
    new: str


class Listener:
    """Hears events, on the event loop's thread: must be quick and must not raise. Subclasses define what they hear."""

    def routed(self, event: Routed) -> None: ...
    def retried(self, event: Retried) -> None: ...
    def finished(self, event: Finished) -> None: ...
    def worker_changed(self, event: WorkerChanged) -> None: ...


class Listeners(Listener):
    """Hands each event to the listeners that define its method, in the order they were added."""

    def __init__(self) -> None:
        self._routed: list[Callable[[Routed], None]] = []
        self._retried: list[Callable[[Retried], None]] = []
        self._finished: list[Callable[[Finished], None]] = []
        self._worker_changed: list[Callable[[WorkerChanged], None]] = []

    def add(self, listener: Listener) -> None:
        kind = type(listener)
        if kind.routed is not Listener.routed:
            self._routed.append(listener.routed)
        if kind.retried is not Listener.retried:
            self._retried.append(listener.retried)
        if kind.finished is not Listener.finished:
            self._finished.append(listener.finished)
        if kind.worker_changed is not Listener.worker_changed:
            self._worker_changed.append(listener.worker_changed)

    def routed(self, event: Routed) -> None:
        for hear in self._routed:
            hear(event)

    def retried(self, event: Retried) -> None:
        for hear in self._retried:
            hear(event)

    def finished(self, event: Finished) -> None:
        for hear in self._finished:
            hear(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        for hear in self._worker_changed:
            hear(event)
