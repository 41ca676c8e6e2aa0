"""What Envoy says in place of a worker that it could not reach, or that broke off before its answer.

Such an answer looks like one of the worker's: status 503, with a sentence as its body. The sentence tells what the
circuit breaker should hear. No setting of Envoy's is needed for it.
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.outcome import Outcome

_BEGINS: Final = (b"upstream connect error or disconnect/reset before headers", b"no healthy upstream")
_REASONS: Final = (
    (b"connection timeout", Outcome.UNCONNECTED),
    (b"connection failure", Outcome.REFUSED),
    (b"connection termination", Outcome.BROKEN),
    (b"no healthy upstream", Outcome.UNREACHABLE),
)


def outcome_of(status: int, body: bytes) -> Outcome | None:
    """Return how the leg ended, if this is Envoy's own answer; None for an answer of the worker."""
    if status != 503 or not body.startswith(_BEGINS):
        return None
    return next((outcome for words, outcome in _REASONS if words in body), Outcome.BROKEN)
