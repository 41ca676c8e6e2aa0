"""Events: records of what happened. Routing and relay emit them without knowing who listens.

    Routed          a request got a worker (also for each retry)
    Retried         a leg failed and another one follows; when none follows, Finished tells how the last leg ended
    Quarantined     a request broke several workers: it is refused for a while when it comes again
    LegEnded        a leg ended that is not retried; only for a router with a `tracer`
    FirstByte       the first byte of an answer is about to be sent to the client
    Finished        a request ended: exactly one event for every request, whatever its end
    WorkerChanged   the state of a worker changed: one of CHANGES

Each event about a request contains its RequestTag. No event contains any part of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sglang_router.routing.native import mypyc_attr
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

CHANGES: Final = (
    *("added", "removed", "restarted", "emptied", "health", "breaker", "outlier"),
    *("draining", "withheld", "paused", "updating", "role"),
)
"""What can change: the values of WorkerChanged.what. updating: its engine loads new weights, perhaps many times a
minute."""


class Routed:
    """The decider chose a worker.

    policy      name of the policy
    retries     attempts before this one
    candidates  how many workers the policy could choose from
    """

    __slots__ = ("candidates", "leg", "policy", "retries", "tag")

    def __init__(self, tag: RequestTag, leg: PlannedLeg, policy: str, retries: int, candidates: int = 0) -> None:
        self.tag = tag
        self.leg = leg
        self.policy = policy
        self.retries = retries
        self.candidates = candidates


class Retried:
    """A leg failed with `outcome`, and another attempt follows after `delay` seconds (0: at once).

    status  that the worker answered; 0: none
    """

    __slots__ = ("delay", "leg", "outcome", "status", "tag")

    def __init__(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, delay: float, status: int = 0) -> None:
        self.tag = tag
        self.leg = leg
        self.outcome = outcome
        self.delay = delay
        self.status = status


class LegEnded:
    """A leg ended, and no retry followed.

    at       when, seconds of the router's clock
    usage    what its engine told of the answer; None: nothing
    session  that the request belongs to; b"" when none was recognised
    """

    __slots__ = ("at", "leg", "outcome", "session", "tag", "usage")

    def __init__(
        self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, at: float, usage: Usage | None, session: bytes
    ) -> None:
        self.tag = tag
        self.leg = leg
        self.outcome = outcome
        self.at = at
        self.usage = usage
        self.session = session


class Quarantined:
    """A request ended without an answer, and has broken so many `workers`: it is refused when it comes again."""

    __slots__ = ("tag", "workers")

    def __init__(self, tag: RequestTag, workers: int) -> None:
        self.tag = tag
        self.workers = workers


class FirstByte:
    """The client gets the first byte of the answer, `seconds` after the request was complete."""

    __slots__ = ("leg", "seconds", "tag")

    def __init__(self, tag: RequestTag, leg: PlannedLeg, seconds: float) -> None:
        self.tag = tag
        self.leg = leg
        self.seconds = seconds


class Answered:
    """How a request was answered.

    status      status code that the client was sent; 0 when it left before that
    code        the router's error code; "" for a worker's own answer
    outcome     how the last leg ended; None when the request had no leg
    duration    seconds from the complete request to the last byte of the answer
    first_byte  seconds from the complete request to the first byte of the answer; negative when there was none
    sent        bytes of the answer's body, including the chunked coding of a stream
    retries     attempts after the first
    resumed     how often another worker continued the stream, or the router completed it
    unresumed   why a stream that broke was not continued, a key of resume.continuation.REASONS; "" otherwise
    usage       what the engine told of the whole answer; None: nothing
    handoff     what became of what a prefill worker handed over, see relay.handoff.RESULTS; "" otherwise
    """

    __slots__ = (
        *("code", "duration", "first_byte", "handoff", "outcome", "resumed"),
        *("retries", "sent", "status", "unresumed", "usage"),
    )

    def __init__(
        self,
        status: int,
        code: str = "",
        outcome: Outcome | None = None,
        duration: float = 0.0,
        first_byte: float = -1.0,
        sent: int = 0,
        retries: int = 0,
        resumed: int = 0,
        unresumed: str = "",
        usage: Usage | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.outcome = outcome
        self.duration = duration
        self.first_byte = first_byte
        self.sent = sent
        self.retries = retries
        self.resumed = resumed
        self.unresumed = unresumed
        self.usage = usage
        self.handoff = ""


class Finished:
    """A request ended. leg: the last one; None when the request never had a worker."""

    __slots__ = ("answer", "leg", "tag")

    def __init__(self, tag: RequestTag, leg: PlannedLeg | None, answer: Answered) -> None:
        self.tag = tag
        self.leg = leg
        self.answer = answer


class WorkerChanged:
    """The state of a worker changed from `old` to `new`. what: one of CHANGES."""

    __slots__ = ("new", "old", "what", "worker")

    def __init__(self, worker: Worker, what: str, old: str, new: str) -> None:
        self.worker = worker
        self.what = what
        self.old = old
        self.new = new


@mypyc_attr(allow_interpreted_subclasses=True)
class Listener:
    """Receives events on the event loop's thread: it must be quick and must not raise.

    A subclass defines the methods of the events that it needs.
    """

    @property
    def hears_routed(self) -> bool:
        """Whether it needs Routed; otherwise that need not be created."""
        return True

    def routed(self, event: Routed) -> None:
        """A request got a worker."""

    def retried(self, event: Retried) -> None:
        """A leg failed and another attempt follows."""

    def half_ended(self, event: LegEnded) -> None:
        """One leg of a pair ended before the other one. The end of that is told by Retried or Finished."""

    def quarantined(self, event: Quarantined) -> None:
        """A request broke several workers."""

    def first_byte(self, event: FirstByte) -> None:
        """The client gets the first byte of an answer."""

    def finished(self, event: Finished) -> None:
        """A request ended."""

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Several requests ended, in this order. Called in place of `finished` by what gathers events."""
        for event in events:
            self.finished(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        """The state of a worker changed."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Listeners(Listener):
    """Passes each event to the listeners that define its method, in the order in which they were added.

    hears_first_byte  whether a listener needs FirstByte; otherwise it need not be created
    """

    def __init__(self) -> None:
        self.hears_first_byte = False
        self._routed: list[Callable[[Routed], None]] = []
        self._retried: list[Callable[[Retried], None]] = []
        self._half_ended: list[Callable[[LegEnded], None]] = []
        self._quarantined: list[Callable[[Quarantined], None]] = []
        self._first_byte: list[Callable[[FirstByte], None]] = []
        self._finished: list[Callable[[Finished], None]] = []
        self._finished_all: list[Callable[[Sequence[Finished]], None]] = []
        self._worker_changed: list[Callable[[WorkerChanged], None]] = []

    def add(self, listener: Listener) -> None:
        """Add a listener. Which events it needs is read now; later changes have no effect."""
        kind = type(listener)
        if listener.hears_routed if isinstance(listener, Listeners) else kind.routed is not Listener.routed:
            self._routed.append(listener.routed)
        if kind.retried is not Listener.retried:
            self._retried.append(listener.retried)
        if kind.half_ended is not Listener.half_ended:
            self._half_ended.append(listener.half_ended)
        if kind.quarantined is not Listener.quarantined:
            self._quarantined.append(listener.quarantined)
        if listener.hears_first_byte if isinstance(listener, Listeners) else kind.first_byte is not Listener.first_byte:
            self._first_byte.append(listener.first_byte)
            self.hears_first_byte = True
        if kind.finished is not Listener.finished:
            self._finished.append(listener.finished)
            self._finished_all.append(listener.finished_all)
        if kind.worker_changed is not Listener.worker_changed:
            self._worker_changed.append(listener.worker_changed)

    @property
    def hears_routed(self) -> bool:
        """Whether a listener needs Routed."""
        return bool(self._routed)

    def routed(self, event: Routed) -> None:
        """Pass the event on."""
        for hear in self._routed:
            hear(event)

    def retried(self, event: Retried) -> None:
        """Pass the event on."""
        for hear in self._retried:
            hear(event)

    def half_ended(self, event: LegEnded) -> None:
        """Pass the event on."""
        for hear in self._half_ended:
            hear(event)

    def quarantined(self, event: Quarantined) -> None:
        """Pass the event on."""
        for hear in self._quarantined:
            hear(event)

    def first_byte(self, event: FirstByte) -> None:
        """Pass the event on."""
        for hear in self._first_byte:
            hear(event)

    def finished(self, event: Finished) -> None:
        """Pass the event on."""
        for hear in self._finished:
            hear(event)

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Pass the events on."""
        for hear in self._finished_all:
            hear(events)

    def worker_changed(self, event: WorkerChanged) -> None:
        """Pass the event on."""
        for hear in self._worker_changed:
            hear(event)
