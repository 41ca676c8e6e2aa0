"""How the metric families of prefill and decode workers are read: see `observe.readings`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import ERRORS, Reader, Sample
from sglang_router.observe.tallies import Tally
from sglang_router.routing.roles import DECODE


def legs_of(role: str) -> Reader:
    """Count the legs of each worker of a role."""
    return _of_role(role, lambda tally: sum(tally.outcomes.values()))


def errors_of(role: str) -> Reader:
    """Count the failed legs of each worker of a role."""
    return _of_role(role, lambda tally: sum(n for label, n in tally.outcomes.items() if label in ERRORS))


def _of_role(role: str, value: Callable[[Tally], int]) -> Reader:
    def read(counts: MetricCounts) -> Iterator[Sample]:
        for tally in list(counts.tallies.values()):
            if tally.role == role:
                yield (tally.name,), value(tally)

    return read


def windows(counts: MetricCounts) -> Iterator[Sample]:
    """Read how many requests decode workers may run at once; skip those whose engines do not tell."""
    for worker in list(counts.fleet):
        if worker.role == DECODE and worker.window.limit:
            yield (worker.url,), worker.window.limit
