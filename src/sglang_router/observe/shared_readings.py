"""How the metric families about other routers are read (--shared-state); see `observe.readings`.

of_shared(items)        what is shared with others; no samples without --shared-state
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.live_sources import SharedCounts
from sglang_router.observe.readings import Reader, Sample

SENT, RECEIVED = "sent", "received"


def of_shared(items: Callable[[SharedCounts], Iterable[Sample]]) -> Reader:
    """Read samples of what is shared; none without --shared-state."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        shared = counts.sources.shared
        return [] if shared is None else items(shared)

    return read


def number(value: Callable[[SharedCounts], float]) -> Reader:
    """Read one number of what is shared."""
    return of_shared(lambda shared: [((), value(shared))])


def per_worker(counts: MetricCounts) -> Iterable[Sample]:
    """Read what other routers have in flight at each worker."""
    if counts.sources.shared is None:
        return []
    return [((worker.url,), worker.elsewhere) for worker in counts.fleet]


def state(shared: SharedCounts) -> list[Sample]:
    """Return 1 for the state of the store."""
    return [((shared.state,), 1)]


def messages(shared: SharedCounts) -> list[Sample]:
    """Count messages by direction and topic."""
    traffic = shared.traffic
    return [*_by(SENT, traffic.sent), *_by(RECEIVED, traffic.received)]


def sizes(shared: SharedCounts) -> list[Sample]:
    """Sum up the bytes of messages by direction and topic."""
    traffic = shared.traffic
    return [*_by(SENT, traffic.sent_bytes), *_by(RECEIVED, traffic.received_bytes)]


def lag(shared: SharedCounts) -> list[Sample]:
    """Return how old what is read is, in seconds; nothing before it was measured."""
    found = shared.traffic.lag
    return [] if found is None else [((), found)]


def dropped(shared: SharedCounts) -> list[Sample]:
    """Count what was lost by reason; `unwritten`: the store did not take it."""
    lost = sum(shared.traffic.lost.values())
    reasons = shared.reading.dropped
    return [(("unwritten",), lost), *(((reason,), reasons[reason]) for reason in reasons)]


def placements(shared: SharedCounts) -> list[Sample]:
    """Count placements by direction."""
    reading = shared.reading
    return [((SENT,), reading.told), ((RECEIVED,), reading.heard)]


def _by(direction: str, counts: dict[str, int]) -> list[Sample]:
    return [((direction, topic), count) for topic, count in counts.items()]
