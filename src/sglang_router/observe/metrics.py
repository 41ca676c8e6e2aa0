"""Prometheus metrics: hears every event, and tells all it heard when it is scraped.

    core.events --> Metrics.routed, .finished --> observe.tallies: plain integers
                                                     |
    GET /metrics -> render -> prometheus_client -> collect: one row of observe.catalogue per family
                                                     |
                                                  fleet, the policy's tree, the network's counts

prometheus_client's own counters take a lock and a look-up of labels for each increment, which would cost
more than the routing decision; so it only writes the exposition. What has a state of its own (load, health,
breakers, tree) is not counted along but read at the scrape. Everything happens on the event loop's thread.

`python -m sglang_router.observe.metrics --markdown` prints docs/metrics.md.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sglang_router.core.events import Listener
from sglang_router.core.request import ENDPOINTS
from sglang_router.core.tree import Tree
from sglang_router.core.worker import Outcome
from sglang_router.observe.catalogue import METRICS, markdown
from sglang_router.observe.tallies import OTHER, Histogram, Labels, Series, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from prometheus_client import Metric

    from sglang_router.core.events import Finished, Retried, Routed, WorkerChanged
    from sglang_router.core.policies import Policy
    from sglang_router.core.worker import Worker

DURATION_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0),
)
"""Upper bounds in seconds; those of the Rust router."""

_MOST_KINDS = 20_000
_SERVED = Outcome.SERVED  # looking up a member of an enumeration costs more than the rest of that line


class Metrics(Listener, Collector):
    """See the module. Give `render` to whoever serves /metrics.

    fleet                 the workers there are
    connections           open client connections
    active                requests under way
    upstream_connections  open connections to workers
    lost_lines            log lines that could not be written
    waiting               requests that wait because no worker is ready
    desired_workers       how many there should be, where somebody decides that
    replicas              URL, restarts and whether it is up, of each replica that the router runs itself
    duration_buckets      upper bounds in seconds for all histograms
    paths                 paths served beside the relayed ones, "{name}" for one segment; the rest is "other"
    """

    def __init__(
        self,
        fleet: Iterable[Worker],
        policy: Policy,
        *,
        connections: Callable[[], int] | None = None,
        active: Callable[[], int] | None = None,
        upstream_connections: Callable[[], int] | None = None,
        lost_lines: Callable[[], int] | None = None,
        waiting: Callable[[], int] | None = None,
        desired_workers: Callable[[], int] | None = None,
        replicas: Callable[[], Iterable[tuple[str, int, bool]]] | None = None,
        duration_buckets: Sequence[float] | None = None,
        paths: Iterable[str] = (),
    ) -> None:
        self.fleet: Iterable[Worker] = fleet
        self.policy = policy.name
        tree = getattr(policy, "tree", None)
        self.tree = tree if isinstance(tree, Tree) else None
        self.bounds = sorted(set(duration_buckets or DURATION_BUCKETS))
        self.live: dict[str, Callable[[], Any] | None] = {  # may be set later, when who knows is there
            "connections": connections,
            "active": active,
            "upstream_connections": upstream_connections,
            "lost_lines": lost_lines,
            "waiting": waiting,
            "desired_workers": desired_workers,
            "replicas": replicas,
        }
        self.changes: dict[tuple[str, str], int] = {}  # of workers, by what and new state
        self.unresumed: dict[str, int] = {}  # streams that broke and were not continued, by reason
        self.tallies: dict[Worker, Tally] = {}
        self.removed: dict[str, Tally] = {}  # by worker type
        self.series: dict[tuple[str, str, str, bool, int, str], Series] = {}  # by bounded kind
        # The same by kind as events have it, for those alone whose labels are equal to it: bounded as well.
        self._known: dict[tuple[str, str, str, bool, int, str], Series] = {}
        self._labels = Labels([*(path.decode() for path in ENDPOINTS), *paths])
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._registry.register(self)

    # -- Listener, on the hot path -----------------------------------------------------------------------

    def routed(self, event: Routed) -> None:
        tally = self.tallies.get(event.worker) or self._tally(event.worker)
        decision = (event.policy, event.branch)
        decisions = tally.decisions
        decisions[decision] = decisions.get(decision, 0) + 1
        tally.matched += event.matched
        tally.total += event.total

    def finished(self, event: Finished) -> None:
        kind = (event.method, event.path, event.model, event.streaming, event.status, event.code)
        series = self._known.get(kind) or self._series(event, kind)
        seconds = event.duration
        histogram = series.duration
        histogram.counts[bisect_left(self.bounds, seconds)] += 1
        histogram.sum += seconds
        seconds = event.first_byte
        if seconds >= 0.0:
            histogram = series.first_byte
            histogram.counts[bisect_left(self.bounds, seconds)] += 1
            histogram.sum += seconds
        series.received += event.received
        series.sent += event.sent
        outcome = event.outcome
        if event.worker is not None and outcome is not None:
            self._leg_ended(event.worker, outcome)
            series.legs += 1
        if outcome is not _SERVED or event.retries:
            series.legs += event.retries
            series.retries += event.retries
            series.exhausted += outcome is not None and outcome.retryable
            series.gone += outcome is Outcome.GONE or event.status == 0
            series.resumed += event.resumed > 0
            if event.unresumed:
                self.unresumed[event.unresumed] = self.unresumed.get(event.unresumed, 0) + 1

    def retried(self, event: Retried) -> None:
        self._leg_ended(event.worker, event.outcome)

    def _leg_ended(self, worker: Worker, outcome: Outcome) -> None:
        tally = self.tallies.get(worker) or self._tally(worker)
        outcomes, label = tally.outcomes, outcome.label
        outcomes[label] = outcomes.get(label, 0) + 1

    def worker_changed(self, event: WorkerChanged) -> None:
        change = (event.what, event.new)
        self.changes[change] = self.changes.get(change, 0) + 1
        tally = self._tally(event.worker)
        if event.what == "breaker":
            move = (event.old, event.new)
            tally.transitions[move] = tally.transitions.get(move, 0) + 1
        elif event.what == "removed" and (gone := self.tallies.pop(event.worker, None)) is not None:
            self._tally(event.worker).add(gone)

    # -- off the hot path --------------------------------------------------------------------------------

    def _tally(self, worker: Worker) -> Tally:
        """The tally of a worker; requests that outlive their worker count for the removed."""
        if worker.removed and worker not in self.tallies:
            return self.removed.setdefault(worker.spec.worker_type, Tally())
        return self.tallies.setdefault(worker, Tally())

    def _series(self, event: Finished, kind: tuple[str, str, str, bool, int, str]) -> Series:
        """The series of a kind that is new, or has a label that is folded."""
        labels = self._labels
        method, path = labels.method(event.method), labels.path(event.path)
        model = labels.model(event.model, event.status)
        bounded = (method, path, model, event.streaming, event.status, event.code)
        if bounded not in self.series and len(self.series) >= _MOST_KINDS:
            model = OTHER
            bounded = (method, path, model, event.streaming, event.status, event.code)
        series = self.series.get(bounded)
        if series is None:
            series = self.series[bounded] = Series(
                method=method,
                path=path,
                endpoint=event.endpoint,
                model=model,
                streaming=event.streaming,
                status=event.status,
                code=event.code,
                duration=self.histogram(),
                first_byte=self.histogram(),
            )
        if method == event.method and path == event.path and model != OTHER:
            self._known[kind] = series
        return series

    def histogram(self) -> Histogram:
        """An empty one."""
        return Histogram([0] * (len(self.bounds) + 1))

    def totals(self) -> Iterator[tuple[str, Tally]]:
        """The tallies of all workers there are and were, each with the worker's type."""
        for worker, tally in self.tallies.items():
            yield worker.spec.worker_type, tally
        yield from self.removed.items()

    # -- the scrape --------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """One family per row of the catalogue."""
        for row in METRICS:
            yield row.family(self)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that an Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def main(argv: Sequence[str]) -> int:
    if list(argv) != ["--markdown"]:
        sys.stderr.write("usage: python -m sglang_router.observe.metrics --markdown\n")
        return 2
    sys.stdout.write(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
