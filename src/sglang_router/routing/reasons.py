"""Why a pool has no candidates, in words for the client, and when to retry."""

from __future__ import annotations

from collections import Counter
from typing import Final

from sglang_router.errors import NoWorkers, Unavailable, WorkersStarting
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

_RETRY_AFTER: Final = 5.0
"""Retry-After in seconds, when nothing better is known."""
_MOST_REASONS: Final = 3
"""Most reasons that an error names."""
_PROBED_AFTER: Final = 1.0
"""Seconds in which the one request of a half-open breaker may be back."""


def why_none(workers: list[Worker], elastic: bool, now: float) -> Unavailable:
    """Return the error for a request for which none of these workers is able.

    elastic  the autoscaler starts a worker when there is none
    """
    if not workers and not elastic:
        return NoWorkers(retry_after=_RETRY_AFTER)
    rotation = [w for w in workers if w.in_rotation]
    if _starting(workers, rotation, elastic):
        return WorkersStarting(_with_reasons(WorkersStarting.message, rotation), retry_after=_RETRY_AFTER)
    waits = [max(0.0, w.circuit.reopen_at - now) for w in rotation if w.breaker is Breaker.OPEN]
    waits += [_PROBED_AFTER for w in rotation if w.breaker is Breaker.HALF_OPEN]
    return Unavailable(_with_reasons(Unavailable.message, rotation), retry_after=min(waits, default=_RETRY_AFTER))


def _starting(workers: list[Worker], rotation: list[Worker], elastic: bool) -> bool:
    """Return whether a worker may become ready within seconds, without an operator."""
    if rotation:
        return all(w.health is Health.STARTING for w in rotation) and not all(w.hopeless for w in rotation)
    return elastic or any(w.returning for w in workers)


def _with_reasons(message: str, workers: list[Worker]) -> str:
    """Add to a message why these workers are not there: the most frequent reasons, without URLs."""
    counts = Counter(worker.reason for worker in workers if worker.reason)
    if not counts:
        return message
    most = counts.most_common(_MOST_REASONS)
    reasons = "; ".join(f"{reason.rstrip('.')} ({count} of {len(workers)})" for reason, count in most)
    return f"{message} Reasons: {reasons}."
