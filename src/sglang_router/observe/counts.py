"""What a scrape reads: one plain state object, below both the listener that fills it and the readers of the families.

    observe.metrics (listener) --writes--> MetricCounts <--reads-- observe.readings <-- observe.catalogue
                                             |
                                             +-- tallies, removed, series, changes, unresumed, handoffs    counted here
                                             +-- fleet, memory, sources                          read at the scrape

Owner: `observe.metrics.Metrics`, on the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Protocol

from sglang_router.observe.live_sources import LiveSources
from sglang_router.observe.tallies import ClientTally, Histogram, ModelAnswers, Series, SeriesKind, Tally
from sglang_router.routing.decisions import Decisions
from sglang_router.routing.worker import Worker


class RememberedPrefixes(Protocol):
    """What a scrape reads of the policy's prefix memory. `size` and `evicted_bytes` are in bytes of routing text."""

    @property
    def nodes(self) -> int:
        """Nodes of the tree."""

    @property
    def held(self) -> int:
        """Bytes of text in memory, each counted once."""

    @property
    def retired_size(self) -> int:
        """Bytes of removed or emptied workers that are not freed yet."""

    def size(self, worker: Worker) -> int:
        """Bytes that a worker is believed to have cached."""

    def entries(self, worker: Worker) -> int:
        """Number of texts that a worker is believed to have cached."""

    def evictions(self, worker: Worker) -> int:
        """Number of nodes of a worker that were evicted."""

    def evicted_bytes(self, worker: Worker) -> int:
        """Bytes of those nodes."""


class MetricCounts:
    """See the module. `policy` is the policy's name; `bounds` are the histograms' upper bounds in seconds, ascending.

    tallies    by worker id; a worker's tally is there from `added` to `removed`
    removed    sums over the removed workers, by role
    series     by kind, labels bounded
    changes    changes of workers, by what changed and the new state
    unresumed  streams that broke and were not continued, by reason
    handoffs   requests of vLLM pairs, by what became of what the prefill worker handed over
    queued     seconds that queued requests waited
    lag        seconds by which timers of the event loop were late
    renamed    requests that were served under another name, by the labels of both
    clients    by label, see `observe.clients`
    """

    def __init__(
        self,
        fleet: Iterable[Worker],
        policy: str,
        memory: RememberedPrefixes | None,
        sources: LiveSources,
        bounds: list[float],
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.memory = memory
        self.sources = sources
        self.bounds = bounds
        self.tallies: dict[str, Tally] = {}
        self.removed: dict[str, Tally] = {}
        self.series: dict[SeriesKind, Series] = {}
        self.changes: dict[tuple[str, str], int] = {}
        self.unresumed: dict[str, int] = {}
        self.handoffs: dict[str, int] = {}
        self.queued = self.histogram()
        self.lag = self.histogram()
        self.renamed: dict[tuple[str, str], int] = {}
        self.clients: dict[str, ClientTally] = {}

    def __repr__(self) -> str:
        return f"<MetricCounts {len(self.tallies)} workers, {len(self.series)} series>"

    def histogram(self) -> Histogram:
        """Return an empty histogram with these bounds."""
        return Histogram(len(self.bounds) + 1)

    def series_of(self, kind: SeriesKind, endpoint: str) -> Series:
        """Return the series of a kind, an empty one if it is new."""
        series = self.series.get(kind)
        if series is None:
            series = self.series[kind] = Series(kind, endpoint, len(self.bounds) + 1)
        return series

    def answers(self, tally: Tally, model: str) -> ModelAnswers:
        """Return what is counted of a worker's answers for a model, by its label."""
        return tally.answers.setdefault(model, ModelAnswers(len(self.bounds) + 1))

    def observe(self, histogram: Histogram, seconds: float) -> None:
        """Add one observation."""
        histogram.counts[bisect_left(self.bounds, seconds)] += 1
        histogram.sum += seconds

    def tally(self, worker_id: str, role: str) -> Tally:
        """Return the tally of a worker, or that of the removed workers of its role."""
        return self.tallies.get(worker_id) or self.of_removed(role)

    def of_removed(self, role: str) -> Tally:
        """Return the tally of the removed workers of a role."""
        return self.removed.setdefault(role, Tally("", role, Decisions()))

    def worker_added(self, worker: Worker) -> None:
        """Start the worker's tally, unless it has one."""
        self.tallies.setdefault(worker.id, Tally(worker.url, worker.role, worker.decisions))

    def worker_removed(self, worker: Worker) -> None:
        """Add what was counted for the worker to the removed workers of its role."""
        tally = self.tallies.pop(worker.id, None)
        if tally is not None:
            self.of_removed(tally.role).add(tally)
