"""Deadlines as values: a kind and a moment. Each client connection and each exchange owns exactly one.

The kind says which limit passed. A kind with an entry in `ERRORS` is answered with that error; the owner handles the
other kinds. Moments are seconds of the router's clock.
"""

from __future__ import annotations

import math
from enum import Enum

from sglang_router.errors import (
    BufferFull,
    FirstByteTimeout,
    Overdue,
    RequestTimeout,
    RouterError,
    StreamSilent,
)


class Due(Enum):
    """What must happen before the deadline."""

    NEVER = "never"  # nothing: there is no deadline
    # of a client connection
    HEAD = "head"  # the request's head is complete
    BODY = "body"  # the next bytes of the body arrive, and on the whole not too slowly
    BUDGET = "budget"  # the request-body budget has room, so that reading continues
    PROBE = "probe"  # the answer begins; otherwise see whether a client that has ended its sending side still reads
    PRESENT = "present"  # such a client does not reset the connection
    IDLE = "idle"  # another request begins
    LINGER = "linger"  # the client reads the last answer, while what it sends is discarded
    SEND = "send"  # the client reads more of what it was sent, which is more than the socket takes
    CLOSE = "close"  # the client reads more of what was written before the close
    # of an exchange
    QUEUE = "queue"  # the request leaves the queue
    REQUEST = "request"  # the whole answer is sent
    FIRST_BYTE = "first_byte"  # the worker sends the first byte of a stream's answer
    PROGRESS = "progress"  # the worker sends more of the answer


# Constants, because looking up a member on its class costs as much as a call.
DUE_BODY, DUE_IDLE = Due.BODY, Due.IDLE
DUE_REQUEST, DUE_FIRST_BYTE, DUE_PROGRESS = Due.REQUEST, Due.FIRST_BYTE, Due.PROGRESS

Deadline = tuple[Due, float]

NEVER: Deadline = (Due.NEVER, math.inf)

ERRORS: dict[Due, type[RouterError]] = {
    Due.HEAD: RequestTimeout,
    Due.BODY: RequestTimeout,
    Due.BUDGET: BufferFull,
    Due.REQUEST: Overdue,
    Due.FIRST_BYTE: FirstByteTimeout,
    Due.PROGRESS: StreamSilent,
}
"""The error for a deadline that passed: the answer if none has begun, else the reason why the answer breaks."""
