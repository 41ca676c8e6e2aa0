"""The states of a worker: its health, and its breaker with the events that the breaker hears.

`routing.breaker` holds the table of the breaker, `routing.fleet` changes the health of workers. Enums have a module of
their own, because mypyc does not compile them (`scripts/compile_rule.py`).
"""

from __future__ import annotations

import enum


class Health(enum.Enum):
    """The result of the health checks.

    The process of a STARTING worker has never been healthy. DOWN is not set by checks: the part that runs the engine
    gave it up, and nothing listens there.
    """

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DOWN = "down"


class Breaker(enum.Enum):
    """The state of a circuit."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(enum.Enum):
    """The events of a circuit: the columns of the table. The probe is the one request that HALF_OPEN lets pass."""

    SUCCESS = "success"
    FAILURE = "failure"
    PROBE_SUCCESS = "probe success"
    PROBE_FAILURE = "probe failure"
    TIME_UP = "time up"
    CHECK_PASSED = "check passed"
    PROCESS_LOST = "process lost"
    DOUBTED = "doubted"
