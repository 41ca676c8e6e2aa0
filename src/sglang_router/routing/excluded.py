"""Say why a worker was no candidate for a request: one word, for records of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sglang_router.routing.roles import DECODE
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.trail import Trail
from sglang_router.routing.worker import Worker

REASONS: Final[Mapping[str, str]] = {
    "paused": "the control plane has paused it, or released its memory",
    "draining": "it drains: it gets no new requests",
    "withheld": "its source lets it get no new requests: its pod is not ready, or ends",
    "starting": "it has not been healthy yet",
    "unhealthy": "its health checks fail",
    "down": "its process is gone",
    "failed": "it failed this request",
    "breaker_open": "its circuit breaker is open",
    "breaker_half_open": "its circuit breaker lets one request pass at a time, and that is in flight",
    "ejected": "it is ejected as an outlier",
    "full": "it has the most requests that one worker may have",
    "window": "it runs as many requests at once as its engine can",
    "elsewhere": "another worker keeps the response that the request follows",
    "slow_start": "it has an empty cache, and its share of the load",
    "no_room": "a session begins, and its cache has no room for the context of another one",
    "set_aside": "others come first in a retry: it is a rank of an engine that failed the request, or on trial",
}
"""Each reason in words."""


def reason(worker: Worker, most_load: int, trail: Trail | None, now: float, held: bool = False) -> str:
    """Return a key of REASONS for a worker that was no candidate.

    most_load  requests in flight that one worker may have; 0: no limit
    trail      the failed attempts of the request; None: there are none
    held       the request went to the worker that keeps the response which it follows
    """
    if worker.paused and not worker.draining:
        return "paused"
    if worker.withheld and not worker.draining:
        return "withheld"
    if not worker.in_rotation:
        return "draining"
    if worker.health is not Health.HEALTHY:
        return str(worker.health.value)
    if trail is not None and worker in trail.tries:
        return "failed"
    if worker.breaker is Breaker.OPEN:
        return "breaker_open"
    if not worker.lets_pass:
        return "breaker_half_open"
    if worker.ejected:
        return "ejected"
    if most_load and worker.load >= most_load:
        return "full"
    if worker.role == DECODE and worker.window.full(worker.load, worker.own_load):
        return "window"
    if held:
        return "elsewhere"
    if now < worker.warm_at:
        return "slow_start"
    return "no_room" if trail is None else "set_aside"
