"""A pair: a prefill worker reads the prompt of a request, a decode worker writes its answer.

A pair may take a request when a prefill worker may, and a decode worker whose window (`routing.window`) has room. For
the router's queue it is one thing: what waits for room waits for a decode worker. So pairs of the same halves are
equal, and lists of prompts, which need more room than others, wait in the same line.
"""

from __future__ import annotations

from typing import Final

from sglang_router.errors import NoWorkers, Unavailable, WorkersFull
from sglang_router.routing.candidates import Candidates, candidates_of
from sglang_router.routing.models import Serving
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.worker import Worker

_NOBODY: Final = candidates_of(())
_WINDOWS: Final = "Each decode worker runs as many requests at once as it can. Try again later."


class ServingPair:
    """See the module. It is a `routing.models.Serving`.

    prefill, decode  who serves each half
    rooms            how much of a window the request takes: as many as it has prompts
    """

    __slots__ = ("decode", "prefill", "rooms")

    def __init__(self, prefill: Serving, decode: Serving, rooms: int = 1) -> None:
        self.prefill = prefill
        self.decode = decode
        self.rooms = rooms

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServingPair) and self.prefill is other.prefill and self.decode is other.decode

    def __hash__(self) -> int:
        return hash((self.prefill, self.decode))

    def __repr__(self) -> str:
        return f"<ServingPair {self.prefill!r}, {self.decode!r}>"

    @property
    def policy(self) -> Policy:
        """The policy of the decode workers."""
        return self.decode.policy

    @property
    def workers(self) -> list[Worker]:
        """All workers of both halves."""
        return [*self.prefill.workers, *self.decode.workers]

    @property
    def is_whole(self) -> bool:
        """Whether each half has a worker that is believed to work."""
        return _works(self.prefill) and _works(self.decode)

    def candidates(self, now: float) -> Candidates:
        """Return the decode workers that may take a request now; none without a prefill worker for it."""
        return self.with_room(self.decode.candidates(now)) if self.prefill.candidates(now) else _NOBODY

    def able(self, now: float) -> Candidates:
        """Return the same, and the workers left out only because they are full: a retry exceeds a window."""
        return self.decode.able(now) if self.prefill.able(now) else _NOBODY

    def with_room(self, found: Candidates) -> Candidates:
        """Return the decode workers whose windows have room for the request. O(n), if the engines tell windows."""
        full = 0
        for worker in found:
            if worker.window.full(worker.load, worker.own_load, self.rooms):
                full |= 1 << worker.seat
        return found.those(~full) if full else found

    def unavailable(self, now: float) -> Unavailable:
        """Return the error that says which half has no worker, why, and when to retry."""
        if not self.prefill.candidates(now):
            return _of_role("prefill", self.prefill.unavailable(now), self.prefill)
        if self.decode.candidates(now):
            return WorkersFull(_WINDOWS, retry_after=1.0)
        return _of_role("decode", self.decode.unavailable(now), self.decode)


def _works(half: Serving) -> bool:
    """Return whether a half has a worker that is healthy, in rotation, and lets requests pass."""
    return any(worker.is_well for worker in half.workers)


def _of_role(role: str, error: Unavailable, half: Serving) -> Unavailable:
    """Return an error with the name of the role."""
    if not half.workers:
        return NoWorkers(
            f"There is no {role} worker: a request needs one prefill and one decode worker.",
            retry_after=error.retry_after,
        )
    return type(error)(f"Of the {role} workers: {error}", retry_after=error.retry_after)
