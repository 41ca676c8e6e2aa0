"""A replica: one engine that this launcher runs, identified by its rank. Its state, and the port for its reporter.

    STARTING --> LOADING --> HEALTHY          the process runs; LOADING once it has written a line
        |           |           |
        +-----------+-----------+--> RESTARTING --> STARTING     it died or hung; it is started again after a pause
        |                       |
        '--> FAILED             '--> STOPPING --> STOPPED        it was scaled down, or the launcher ends

A restart replaces the process, but not the rank. GPUs, port and log file belong to the rank.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Protocol

import msgspec

from sglang_router.routing.worker import Worker

TAIL = 20
"""Lines of each replica's log that are kept, to be shown when it fails."""


class EngineCommand(msgspec.Struct, frozen=True, kw_only=True):
    """How to start one replica.

    argv     the command
    env      variables to set in addition to the launcher's own environment
    url      base URL of the engine once it listens
    runtime  kind of engine, as GET /workers shows it
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    url: str
    runtime: str


class ReplicaState(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    HEALTHY = "healthy"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class EngineReplica:
    """One rank. Only the supervisor and its keepers change it; everyone else reads.

    since       when its current state began, seconds of the launcher's clock
    started_at  when its current process was started
    next_start  when its next process is to be started, in state RESTARTING
    restarts    number of restarts in all
    pid         process id of the engine; 0 without a process
    exit        how the last process ended: exit status, or minus the signal; None if none has ended
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
        self.state = ReplicaState.STARTING
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


class ReplicaReporter(Protocol):
    """Shows people what replicas do. It is called on the event loop: it must not block and must not raise."""

    def changed(self, replica: EngineReplica) -> None:
        """A replica has changed its state."""

    def line(self, replica: EngineReplica, text: str) -> None:
        """A replica has written a line (to standard output or error); `text` has no newline."""
