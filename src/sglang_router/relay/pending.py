"""Failed legs: the client's error for each outcome, and what to do if the decider answers that nothing follows."""

from __future__ import annotations

from typing import Final

from sglang_router.errors import (
    ConnectTimeout,
    InternalError,
    RouterError,
    StreamBroken,
    TooManyConnections,
    WorkerBroken,
    WorkerInvalid,
    WorkerTimeout,
    WorkerUnreachable,
)
from sglang_router.relay.body import NextLeg
from sglang_router.relay.leg import Leg
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.response import ResponseHead

ERRORS: Final[dict[Outcome, type[RouterError]]] = {
    Outcome.REFUSED: WorkerUnreachable,
    Outcome.UNREACHABLE: WorkerUnreachable,
    Outcome.UNCONNECTED: ConnectTimeout,
    Outcome.STARVED: TooManyConnections,
    Outcome.LOST: WorkerBroken,
    Outcome.BROKEN: WorkerBroken,
    Outcome.STALE: WorkerBroken,
    Outcome.VANISHED: WorkerBroken,
    Outcome.INVALID: WorkerInvalid,
    Outcome.CUT: StreamBroken,
    Outcome.TIMEOUT: WorkerTimeout,
}
"""The client's error when the last leg of its request ended with this outcome."""


def error_of(outcome: Outcome, detail: str) -> RouterError:
    """Return the client's error for the outcome of a leg; `detail` is its message."""
    return ERRORS.get(outcome, InternalError)(detail)


class Pending:
    """A failed leg for which the decider is asked for a retry; it may answer later.

    leg               the leg that failed
    blamed            the leg whose worker is to blame: the same, or the prefill leg of its pair
    outcome           how it ended
    status            of its failing answer; 0 without one
    error             the answer if there is no retry
    head, data, done  without an error, the leg's own answer: head, bytes of the body, whether these are all
    step              the body handler's next leg, to be sent with the new plan; None when no stream is continued
    """

    __slots__ = ("blamed", "data", "done", "error", "head", "leg", "outcome", "status", "step")

    def __init__(self, leg: Leg, outcome: Outcome, error: RouterError | None = None) -> None:
        self.leg = self.blamed = leg
        self.outcome = outcome
        self.status = 0
        self.error = error
        self.head: ResponseHead | None = None
        self.data = b""
        self.done = False
        self.step: NextLeg | None = None

    def __repr__(self) -> str:
        return f"<Pending {self.outcome.label}: {self.leg!r}>"
