"""What the answer to a health check says: whether the engine is well, and if not, what is wrong."""

from __future__ import annotations

import re

from sglang_router.errors import LoopDetected
from sglang_router.routing.spec import WorkerSpec
from sglang_router.workers.fetch import Fetched

ITSELF = "this URL is the router itself"
"""What is wrong with a worker to which the router's own requests come back (`wire.request_id`)."""
_MAY_HEAL = {408, 425, 429}
"""Statuses below 500 of an engine that may be ready in a moment."""
_API_PATH = re.compile(r"/(v1(/.*)?|health|generate)$")
"""How the URL of an endpoint ends that was given in place of a base URL."""


def wrong(answer: Fetched, spec: WorkerSpec) -> str | None:
    """Return what is wrong with a worker; None if it is well. Name the usual mistake in its URL."""
    if answer.ok:
        return None
    if _is_this_router(answer):
        return ITSELF
    endpoint = spec.health.endpoint
    slip = _API_PATH.search(spec.url)
    if slip is None or not 400 <= answer.status < 500:
        return f"GET {endpoint} answered {answer.status}"
    mistake = f"worker URLs are base URLs; remove {slip[0]} at the end of this one"
    return f"GET {slip[0]}{endpoint} answered {answer.status}: {mistake}"


def is_strange(answer: Fetched) -> bool:
    """Return whether no engine answers so, not even one that is not ready yet."""
    return not answer.ok and (_is_this_router(answer) or (answer.status < 500 and answer.status not in _MAY_HEAL))


def _is_this_router(answer: Fetched) -> bool:
    """Return whether the router's own request came back to it."""
    code = (b"x-smg-error-code", LoopDetected.code.encode())
    return answer.status == LoopDetected.status and code in answer.headers
