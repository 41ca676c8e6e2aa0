"""How the metrics of sessions are read, see `observe.readings`: for each worker, or together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import Reader, Sample
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.worker import Worker


def of_sessions(samples: Callable[[Sessions, list[Worker]], Iterable[Sample]]) -> Reader:
    """Read samples of the sessions, perhaps for each worker; nothing where no option asks for them."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        sessions = counts.sources.sessions
        return [] if sessions is None else samples(sessions, list(counts.fleet))

    return read
