"""How a leg ended: one table says for each outcome whether another worker may be tried and what the breaker hears.

    outcome          retry elsewhere?   the breaker hears    meaning
    SERVED           no                 success              a whole answer with any status not named below
    REJECTED         no                 nothing              400 to 499 but 429: the worker refuses the request itself
    FAILED           yes                failure (answer)     status 500, 502, 504, or 503 without Retry-After
    BUSY             yes                nothing              429, 529, or 503 with Retry-After: no fault
    REFUSED          yes                failure (contact)    connection refused: the engine is gone
    UNREACHABLE      yes                failure (contact)    no route, no name, TLS failed
    UNCONNECTED      yes                failure (contact)    no connection in time
    LOST             yes                failure (contact)    a kept connection broke; then there was no new one
    BROKEN           yes                failure (break)      the connection broke before the first byte of the answer
    VANISHED         yes                nothing              its host stopped to answer: health has said so already
    INVALID          yes                failure (answer)     the answer is not HTTP
    CUT              no                 failure (break)      the connection broke inside the answer
    TIMEOUT          no                 failure (answer)     no answer in time; the engine may still compute: no retry
    SILENT           no                 failure (answer)     the answer began, and then nothing more arrived
    STALE            yes                nothing              a kept connection was closed: leg or pair are sent again
    STARVED          no                 nothing              the router has no file descriptor left for a connection
    GONE             no                 nothing              the client disconnected
    ABANDONED        no                 nothing              the router gave the leg up

Three kinds of failures are told apart because of what they prove, and what repairs them, see `routing.breaker`:

    failure (contact)    there is nobody. No request can cause it
    failure (break)      the worker had the request, and its connection broke. The request may have caused it
    failure (answer)     the worker had the request, and answered badly or not at all. The request may have caused it

What a request may have caused is not held against a worker at once, see `routing.trail`. A 4xx proves neither that the
worker can serve nor that it cannot.

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
    BREAK_FAILURE = 3
    CONTACT_FAILURE = 4


_FAILURES = frozenset((500, 502, 503, 504))


class Outcome(enum.Enum):
    """How a leg ended: (label, may be retried elsewhere, what the breaker hears)."""

    SERVED = ("served", False, Hears.SUCCESS)
    REJECTED = ("rejected", False, Hears.NOTHING)
    FAILED = ("failed", True, Hears.ANSWER_FAILURE)
    BUSY = ("busy", True, Hears.NOTHING)
    REFUSED = ("refused", True, Hears.CONTACT_FAILURE)
    UNREACHABLE = ("unreachable", True, Hears.CONTACT_FAILURE)
    UNCONNECTED = ("unconnected", True, Hears.CONTACT_FAILURE)
    LOST = ("lost", True, Hears.CONTACT_FAILURE)
    BROKEN = ("broken", True, Hears.BREAK_FAILURE)
    VANISHED = ("vanished", True, Hears.NOTHING)
    INVALID = ("invalid", True, Hears.ANSWER_FAILURE)
    CUT = ("cut", False, Hears.BREAK_FAILURE)
    TIMEOUT = ("timeout", False, Hears.ANSWER_FAILURE)
    SILENT = ("silent", False, Hears.ANSWER_FAILURE)
    STALE = ("stale", True, Hears.NOTHING)
    STARVED = ("starved", False, Hears.NOTHING)
    GONE = ("gone", False, Hears.NOTHING)
    ABANDONED = ("abandoned", False, Hears.NOTHING)

    def __init__(self, label: str, retryable: bool, hears: Hears) -> None:
        self.label = label
        self.retryable = retryable
        self.hears = hears

    @classmethod
    def of_status(cls, status: int, retry_after: bool) -> Outcome:
        """Return what a worker's status stands for. Any 4xx but 429 is the client's mistake."""
        if status in (429, 529) or (status == 503 and retry_after):
            return cls.BUSY
        if status in _FAILURES:
            return cls.FAILED
        return cls.REJECTED if 400 <= status < 500 else cls.SERVED


BREAKS = frozenset((Outcome.LOST, Outcome.BROKEN, Outcome.CUT))
"""A worker that had the whole request broke off: the request may be what ends it."""
