"""How a leg ended: one table says for each outcome whether another worker may be tried and what the breaker hears.

    outcome          retry elsewhere?   the breaker hears    meaning
    SERVED           no                 success              a whole answer with any status not named below
    FAILED           yes                failure (answer)     status 500, 502, 504, or 503 without Retry-After
    BUSY             yes                nothing              429, or 503 with Retry-After: back-pressure, not a fault
    REFUSED          yes                failure (contact)    connection refused: the engine is gone
    UNREACHABLE      yes                failure (contact)    no route, no name, TLS failed
    UNCONNECTED      yes                failure (contact)    no connection in time
    BROKEN           yes                failure (contact)    the connection broke before the first byte of the answer
    INVALID          yes                failure (answer)     the answer is not HTTP
    CUT              no                 failure (contact)    the connection broke inside the answer
    TIMEOUT          no                 failure (answer)     no answer in time; the engine may still compute: no retry
    SILENT           no                 failure (answer)     the answer began, and then nothing more arrived
    STALE            no                 nothing              an idle connection was already closed; the leg is resent
    STARVED          no                 nothing              the router has no file descriptor left for a connection
    GONE             no                 nothing              the client disconnected
    ABANDONED        no                 nothing              the router gave the leg up

A failed answer and a failed contact are told apart because different evidence repairs them, see `routing.breaker`.
The enums stand in a module of their own: they have an `__init__`, so that each member carries its row of the table as
plain attributes, and mypyc cannot compile such an enum.
"""

from __future__ import annotations

import enum


class Hears(enum.Enum):
    """What the breaker hears of an outcome."""

    NOTHING = 0
    SUCCESS = 1
    ANSWER_FAILURE = 2
    CONTACT_FAILURE = 3


_FAILURES = frozenset((500, 502, 503, 504))


class Outcome(enum.Enum):
    """How a leg ended: (label, may be retried elsewhere, what the breaker hears)."""

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

    @classmethod
    def of_status(cls, status: int, retry_after: bool) -> Outcome:
        """Return what a worker's status stands for. Any 4xx but 429 is the client's mistake: the worker served."""
        if status == 429 or (status == 503 and retry_after):
            return cls.BUSY
        return cls.FAILED if status in _FAILURES else cls.SERVED
