"""Decide who is to blame for the failures of a request, and let them hear of it.

    failed(trail, lease, ...)    a leg is over: load - 1; what it failed goes into the trail of its request
    decide(tag, trail, ...)      the request has ended: workers hear of its failures, or not; breaks are remembered
    blame(failures, now)         workers hear of failures

`routing.trail` has the rules. The router owns the trails and calls this.
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.events import Listener, Quarantined
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.outcome import Hears, Outcome
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.quarantine import Quarantine
from sglang_router.routing.trail import MOST_BREAKS, Failure, Trail

_UNREAD: Final = frozenset(
    (
        *(Outcome.REJECTED, Outcome.BUSY, Outcome.FAILED),
        *(Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.STARVED),
    )
)
"""After these a worker is not believed to have the prompt in its cache."""


class Judge:
    """See the module. listener: hears Quarantined."""

    def __init__(self, fleet: Fleet, quarantine: Quarantine, listener: Listener) -> None:
        self._fleet = fleet
        self._quarantine = quarantine
        self._listener = listener

    def __repr__(self) -> str:
        return f"<Judge {self._quarantine!r}>"

    def failed(self, trail: Trail, lease: Lease, outcome: Outcome, status: int, now: float) -> Failure | None:
        """Close the lease of a leg; return the failure that it adds to the trail, if any."""
        failure = trail.failed(lease, outcome, status, now)
        worker = lease.worker
        if outcome in _UNREAD and not worker.removed:
            self._fleet.pools.of(worker).policy.unread(lease.choice, lease.facts)
        return failure

    def half(self, trails: dict[int, Trail], tag: RequestTag, lease: Lease, outcome: Outcome, now: float) -> None:
        """Close the lease of a leg while the other one of its pair goes on; a failure is kept among the trails."""
        trail = trails.get(tag.number) or Trail(lease.facts)
        if not lease.closed:
            self.failed(trail, lease, outcome, 0, now)
        if trail.failures:
            trails[tag.number] = trail

    def decide(self, tag: RequestTag, trail: Trail, outcome: Outcome, now: float, undecided: bool = False) -> None:
        """Decide who is to blame for the failures of a request that has ended with this outcome.

        undecided  another worker was asked, and had no time to answer
        """
        self.blame(trail.release(now), now, not undecided and not trail.blames_request(outcome))
        if outcome is Outcome.SERVED:
            if self._quarantine.broken:
                self._quarantine.served(trail.facts)
            return
        for failure in trail.breaks:
            lease = failure.lease
            broken = self._quarantine.broke(trail.facts, lease.worker, lease.life, now)
            if broken >= MOST_BREAKS:
                self._listener.quarantined(Quarantined(tag, broken))

    def blame(self, failures: list[Failure], now: float, guilty: bool = True) -> None:
        """Let the workers hear of these failures; or, if they are not guilty, only that the legs are over."""
        for failure in failures:
            self._fleet.hear(failure.lease, failure.outcome.hears if guilty else Hears.NOTHING, now)
