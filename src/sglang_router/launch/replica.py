"""A replica: one engine that this launcher runs, known by its rank. Its state, and who is told of it.

    STARTING --> LOADING --> HEALTHY          it runs; LOADING once it has written a line
        |           |           |
        +-----------+-----------+--> RESTARTING --> STARTING     it died or hung; started again after a pause
        |                       |
        '--> FAILED             '--> STOPPING --> STOPPED        asked to end: scaled down, or the launcher ends

The rank is what stays: GPUs, port and log file follow from it, whatever process holds it at the moment.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from sglang_router.core.worker import Worker

TAIL = 20
"""Lines of its log that are kept of each replica, to be shown when it fails."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """How one replica is started.

    argv     the command
    env      variables set beside the launcher's own environment
    url      base URL on which it will listen
    runtime  which kind of engine it is, as GET /workers shows it
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    url: str
    runtime: str


class State(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    HEALTHY = "healthy"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Replica:
    """One rank. The supervisor owns it and is the only one to change it; everyone else reads.

    since       moment of the present state, seconds of the launcher's clock
    started_at  moment its present process was started
    restarts    how often it was started again, in all
    pid         of the engine's process; 0 when there is none
    exit        how the last process ended: status, or minus the signal; None while there was no end
    reason      why it is RESTARTING or FAILED, one sentence; else ""
    tail        the last lines of its log
    """

    __slots__ = (
        "exit",
        "next_start",
        "pid",
        "rank",
        "reason",
        "restarts",
        "since",
        "started_at",
        "state",
        "tail",
        "worker",
    )

    def __init__(self, rank: int, now: float) -> None:
        self.rank = rank
        self.state = State.STARTING
        self.since = now
        self.started_at = now
        self.next_start = 0.0
        self.restarts = 0
        self.pid = 0
        self.exit: int | None = None
        self.reason = ""
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.worker: Worker | None = None

    @property
    def last_line(self) -> str:
        return self.tail[-1] if self.tail else ""


class Reporter(Protocol):
    """Whoever shows people what replicas do. Called on the event loop: quick, and never raises."""

    def changed(self, replica: Replica) -> None:
        """Its state is another one."""

    def line(self, replica: Replica, text: str) -> None:
        """It wrote a line to its log (standard output or error), without the newline."""
