"""A worker: one engine behind a base URL, with its health, its circuit breaker, its load, and the leases on it.

How a leg ended is an `Outcome`; one table says for each what follows from it:

    outcome          retry elsewhere?   the breaker hears    meaning
    SERVED           no                 success              a whole answer with any status not named below
    FAILED           yes                failure (answer)     status 500, 502, 504, or 503 without Retry-After
    BUSY             yes                nothing              429, or 503 with Retry-After: back-pressure, not a fault
    REFUSED          yes                failure (contact)    nobody listens: the engine is gone
    UNREACHABLE      yes                failure (contact)    no route, no name, TLS failed
    UNCONNECTED      yes                failure (contact)    no connection in time
    BROKEN           yes                failure (contact)    the connection broke before a byte of the answer came
    INVALID          yes                failure (answer)     the answer is not HTTP
    CUT              no                 failure (contact)    the connection broke inside the answer
    TIMEOUT          no                 failure (answer)     no answer in time; the engine may be at work, so no retry
    SILENT           no                 failure (answer)     the answer began, and nothing more of it came
    STALE            no                 nothing              a kept connection had been closed; sent again on a new one
    STARVED          no                 nothing              the router has no descriptor left for a connection
    GONE             no                 nothing              the client left
    ABANDONED        no                 nothing              the router gave the leg up

The breaker is a table too (h11's way): rows are states, columns what is heard.

                 success           failure                        time is up    healthy probe
    CLOSED       count = 0         count + 1; at threshold OPEN   -             - (the row of failures goes on)
    OPEN         - (late answer)   - (late failure)               HALF_OPEN     CLOSED if opened by contact failures
    HALF_OPEN    CLOSED *          OPEN, for twice as long        -             CLOSED if opened by contact failures

    * after `successes` probes in a row. In HALF_OPEN one request at a time may pass.

What an answer failure opened, only served requests close: an engine whose /health is fine while every generation fails
is no use. A probe of /health does prove that a lost listener is back, so it closes what refused connections opened.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.outliers import place
from sglang_router.core.report import NOTHING, EngineReport

if TYPE_CHECKING:
    from collections.abc import Callable


class Health(enum.Enum):
    """What the health checks say. A STARTING worker's process has never been healthy. DOWN is not theirs to say:
    whoever runs the engine gave it up, and nobody listens there."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DOWN = "down"


class Breaker(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Hears(enum.Enum):
    """What the breaker hears of an outcome."""

    NOTHING = 0
    SUCCESS = 1
    ANSWER_FAILURE = 2
    CONTACT_FAILURE = 3


class Outcome(enum.Enum):
    """How a leg ended: (name, may be retried elsewhere, what the breaker hears)."""

    SERVED = ("served", False, Hears.SUCCESS)
    FAILED = ("failed", True, Hears.ANSWER_FAILURE)
    BUSY = ("busy", True, Hears.NOTHING)
    REFUSED = ("refused", True, Hears.CONTACT_FAILURE)
    UNREACHABLE = ("unreachable", True, Hears.CONTACT_FAILURE)
    UNCONNECTED = ("unconnected", True, Hears.CONTACT_FAILURE)
    BROKEN = ("broken", True, Hears.CONTACT_FAILURE)
    INVALID = ("invalid", True, Hears.ANSWER_FAILURE)
    CUT = ("cut", False, Hears.CONTACT_FAILURE)
    TIMEOUT = ("timeout", False, Hears.ANSWER_FAILURE)
    SILENT = ("silent", False, Hears.ANSWER_FAILURE)
    STALE = ("stale", False, Hears.NOTHING)
    STARVED = ("starved", False, Hears.NOTHING)
    GONE = ("gone", False, Hears.NOTHING)
    ABANDONED = ("abandoned", False, Hears.NOTHING)

    def __init__(self, label: str, retryable: bool, hears: Hears) -> None:
        self.label = label
        self.retryable = retryable
        self.hears = hears


_FAILURES = frozenset((500, 502, 503, 504))


def outcome_of_status(status: int, retry_after: bool) -> Outcome:
    """The outcome that a worker's status stands for. Any 4xx but 429 is the client's affair: the worker served."""
    if status == 429 or (status == 503 and retry_after):
        return Outcome.BUSY
    return Outcome.FAILED if status in _FAILURES else Outcome.SERVED


class BreakerRules(msgspec.Struct, frozen=True):
    """threshold: consecutive failures that open; successes: served probes that close; the timeouts are seconds open."""

    threshold: int = 4
    successes: int = 1
    timeout: float = 10.0
    max_timeout: float = 60.0
    enabled: bool = True


class HealthRules(msgspec.Struct, frozen=True):
    """Thresholds in consecutive checks; interval and timeout in seconds; endpoint is the path asked."""

    failure_threshold: int = 3
    success_threshold: int = 2
    interval: float = 10.0
    timeout: float = 5.0
    endpoint: str = "/health"
    enabled: bool = True


class WorkerSpec(msgspec.Struct, kw_only=True):
    """What an operator says of a worker. `priority` and `cost` are stored and shown; no policy reads them yet.

    url       base URL of the engine
    dp_rank   which of the engine's data-parallel ranks this is; None for an engine as a whole
    dp_aware  each rank of the engine is to be a worker of its own, see `core.ranks`
    """

    url: str
    dp_rank: int | None = None
    dp_aware: bool = False
    api_key: str | None = None
    model_id: str | None = None
    priority: int = 50
    cost: float = 1.0
    worker_type: str = "regular"
    runtime: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    health: HealthRules = HealthRules()


class Worker:
    """One engine. Fleet owns it and is the only one to change its state; everyone else reads.

    order      rises with each registration: the order of rotation
    slot       its bit in the prefix tree's owner masks, set by the policy that keeps a tree
    since      when it was registered or its process lost, seconds of the caller's clock
    warm_at    when its slow start is over
    url        what it is told apart by: the base URL, for a rank with "@" and its number
    report     what the engine said of itself last
    load       leases open now
    waiting    streams there that have no byte yet
    held_off   why it is held off as an outlier; "" if it is not
    processed  requests it answered (outcome SERVED)
    """

    __slots__ = (
        "breaker",
        "dp_rank",
        "draining",
        "failures",
        "gone_silent",
        "health",
        "health_failures",
        "health_successes",
        "held_off",
        "id",
        "key",
        "last_error",
        "load",
        "open_for",
        "opened_by",
        "order",
        "probing",
        "processed",
        "removed",
        "reopen_at",
        "report",
        "returning",
        "since",
        "slot",
        "spec",
        "successes",
        "url",
        "waiting",
        "warm_at",
    )

    def __init__(self, spec: WorkerSpec, worker_id: str, order: int, now: float) -> None:
        self.spec = spec
        self.order = order
        self.since = now
        self.dp_rank = spec.dp_rank
        self.url = spec.url if spec.dp_rank is None else f"{spec.url}@{spec.dp_rank}"
        self.id = worker_id
        self.key = spec.api_key.encode() if spec.api_key else None
        self.slot = -1
        self.load = 0
        self.waiting = 0
        self.held_off = ""
        self.processed = 0
        self.warm_at = 0.0
        self.report: EngineReport = NOTHING
        # health
        self.health = Health.STARTING if spec.health.enabled else Health.HEALTHY
        self.health_failures = 0
        self.health_successes = 0
        self.last_error = ""
        self.gone_silent = False  # it refused a connection: whoever listens there next is another process
        self.draining = False
        self.returning = False  # draining because it is about to be restarted
        self.removed = False
        # breaker
        self.breaker = Breaker.CLOSED
        self.failures = 0
        self.successes = 0
        self.opened_by = Hears.NOTHING
        self.open_for = 0.0
        self.reopen_at = 0.0
        self.probing: Lease | None = None  # the one request that HALF_OPEN let through

    def __repr__(self) -> str:
        state = [self.health.value, f"breaker {self.breaker.value}", f"load {self.load}"]
        state += ["draining"] * self.draining + ["removed"] * self.removed
        return f"<Worker {self.url}: {', '.join(state)}>"

    @property
    def in_rotation(self) -> bool:
        """Registered and not asked to drain; says nothing of health or breaker."""
        return not self.draining and not self.removed


class Lease:
    """One unit of load on one worker. Taking it is the load change; it is closed exactly once, however often asked."""

    __slots__ = ("_close", "closed", "first_byte", "place", "sent_at", "silent", "worker")

    def __init__(self, worker: Worker, close: Callable[[Lease, Outcome, float], None]) -> None:
        self.worker = worker
        self.closed = False
        self.place = 0  # of a stream: under which circumstances it was sent, see `core.outliers`
        self.sent_at = self.first_byte = -1.0
        self.silent = worker.gone_silent  # only an answer asked for in the silence shows that it is over
        self._close = close

    def streams(self, uncached: int, now: float) -> None:
        """A stream is sent, of which the worker has to read so many bytes of prompt first; negative: nobody knows."""
        worker = self.worker
        worker.waiting += 1
        self.sent_at = now
        self.place = place(uncached, worker.waiting, worker.load) if uncached >= 0 else 0

    def began(self, now: float) -> None:
        """The first byte of the answer is there."""
        if self.sent_at >= 0.0 and self.first_byte < 0.0:
            self.worker.waiting -= 1
            self.first_byte = now - self.sent_at

    def close(self, outcome: Outcome, now: float) -> None:
        """Ends the lease with what became of the leg. A second call does nothing."""
        if not self.closed:
            self.closed = True
            if self.sent_at >= 0.0 and self.first_byte < 0.0:
                self.worker.waiting -= 1
                self.place = 0  # there is no time to tell
            self._close(self, outcome, now)
