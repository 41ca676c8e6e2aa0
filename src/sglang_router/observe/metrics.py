"""Prometheus metrics: a listener that counts events, and the exposition of all counts at a scrape.

    routing.events --> Metrics.finished, .retried ... --> observe.counts: plain integers
                                                           |
    GET /metrics -> pieces -> observe.exposition: one family per row of observe.catalogue

prometheus_client's own counters take a lock and look labels up for each increment, which would cost more than the
routing decision; here prometheus_client only tells of the process. What has a state of its own (load, health, breakers,
decisions, prefix memory) is not counted but read at the scrape. Everything runs on the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from sglang_router.observe import exposition
from sglang_router.observe.catalogue import METRICS
from sglang_router.observe.counts import MetricCounts, RememberedPrefixes
from sglang_router.observe.live_sources import LiveSources
from sglang_router.observe.tallies import OTHER, Labels, ModelAnswers, Series, SeriesKind
from sglang_router.routing.endpoints import ENDPOINTS, UNKNOWN
from sglang_router.routing.events import Answered, Finished, LegEnded, Listener, Retried, WorkerChanged
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker

DURATION_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0),
)
"""Upper bounds in seconds; those of the Rust router."""

_PROCESS: Final[dict[bool, Callable[[CollectorRegistry], bytes]]] = {False: generate_latest, True: generate_openmetrics}
"""Writes what is told of the process, by whether in OpenMetrics."""
_MOST_KINDS: Final = 20_000
_UNKNOWN: Final = UNKNOWN.path.decode()
"""The label of all paths that `--relay-unknown-paths` relays; those that nobody has are "other"."""
_SERVED: Final = Outcome.SERVED  # a global is quicker than a member of an enumeration
_EJECTED: Final = ("outlier", "held_off")
_GONE: Final = Outcome.GONE


class Metrics(Listener):
    """See the module. `render` is the answer of GET /metrics, `pieces` the same in many pieces.

    fleet             the present workers
    policy            the policy's name
    memory            the policy's prefix memory; None: it has none
    sources           numbers that other parts of the router own
    duration_buckets  upper bounds in seconds for all histograms; None: DURATION_BUCKETS
    paths             paths served beside the relayed ones, "{name}" for one segment; any other path is "other"
    models            the names that workers announce now, by their JSON text; any other name is "other"
    aliases           the same of the names that an operator gives to models
    """

    def __init__(
        self,
        fleet: Iterable[Worker],
        policy: str,
        memory: RememberedPrefixes | None = None,
        sources: LiveSources | None = None,
        *,
        duration_buckets: Sequence[float] | None = None,
        paths: Iterable[str] = (),
        models: Mapping[str, str] = MappingProxyType({}),
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.sources = sources or LiveSources()
        self._bounds = sorted(set(duration_buckets or DURATION_BUCKETS))
        self.counts = MetricCounts(fleet, policy, memory, self.sources, self._bounds)
        for worker in fleet:
            self.counts.worker_added(worker)
        self._tallies = self.counts.tallies
        self._series = self.counts.series
        self._labels = Labels([*(path.decode() for path in ENDPOINTS), *paths], models, aliases)
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    # -- Listener, on the hot path -----------------------------------------------------------------------

    def finished(self, event: Finished) -> None:
        """Count a request."""
        self.finished_all((event,))

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Count requests, their durations, their bytes and the outcomes of their last legs."""
        known, tallies, bounds, label_of = self._series, self._tallies, self._bounds, self._labels.model
        for event in events:
            tag, leg, answer = event.tag, event.leg, event.answer
            route = tag.route
            kind = (route.method, route.path, label_of(tag.model), tag.streaming, answer.status, answer.code)
            series = known.get(kind) or self._other_series(kind, route.endpoint)
            seconds, histogram = answer.duration, series.duration
            bucket = bisect_left(bounds, seconds)
            histogram.counts[bucket] += 1
            histogram.sum += seconds
            seconds = answer.first_byte
            if seconds >= 0.0:
                histogram = series.first_byte
                histogram.counts[bisect_left(bounds, seconds)] += 1
                histogram.sum += seconds
            series.received += tag.received
            series.sent += answer.sent
            outcome = answer.outcome
            if leg is not None and outcome is not None:
                series.legs += 1
                target, label = leg.target, outcome.label
                tally = tallies.get(target.worker_id) or self.counts.of_removed(target.role)
                outcomes = tally.outcomes
                outcomes[label] = outcomes.get(label, 0) + 1
                answers = tally.answers.get(series.model) or self.counts.answers(tally, series.model)
                if answer.usage is not None:
                    answers.tokens.add(answer.usage)
                if outcome is _SERVED:
                    histogram = answers.duration
                    histogram.counts[bucket] += 1
                    histogram.sum += answer.duration
                    if tag.streaming:
                        self._stream(answers, answer)
                if leg.model:
                    names = (series.model, label_of(leg.model.decode("utf-8", "replace")))
                    self.counts.renamed[names] = self.counts.renamed.get(names, 0) + 1
            if tag.queued:
                self.counts.observe(self.counts.queued, tag.queued)
            if outcome is not _SERVED or answer.retries or answer.handoff:
                self._failed_or_retried(series, answer)

    # -- off the hot path --------------------------------------------------------------------------------

    def retried(self, event: Retried) -> None:
        """Count the outcome of a leg that is retried."""
        target = event.leg.target
        self.counts.tally(target.worker_id, target.role).ended(event.outcome.label)

    def half_ended(self, event: LegEnded) -> None:
        """Count the outcome of the leg of a pair that ends first."""
        target = event.leg.target
        self.counts.tally(target.worker_id, target.role).ended(event.outcome.label)

    def worker_changed(self, event: WorkerChanged) -> None:
        """Count a change; start or end the worker's own counts."""
        counts, what, worker = self.counts, event.what, event.worker
        change = (what, event.new)
        counts.changes[change] = counts.changes.get(change, 0) + 1
        if what == "added":
            counts.worker_added(worker)
        elif what == "removed":
            counts.worker_removed(worker)
        elif what == "role" and worker.id in counts.tallies:
            counts.tallies[worker.id].role = worker.role
        elif what == "breaker" and worker.id in counts.tallies:
            counts.tallies[worker.id].moved(event.old, event.new)
        elif change == _EJECTED and worker.id in counts.tallies:
            counts.tallies[worker.id].ejections += 1

    def _failed_or_retried(self, series: Series, answer: Answered) -> None:
        """Count what only requests have that their first leg did not serve, or served with another worker."""
        outcome, unresumed, handoffs = answer.outcome, self.counts.unresumed, self.counts.handoffs
        series.legs += answer.retries
        series.retries += answer.retries
        series.exhausted += outcome is not None and outcome.retryable
        series.gone += outcome is _GONE or answer.status == 0
        series.resumed += answer.resumed > 0
        if answer.unresumed:
            unresumed[answer.unresumed] = unresumed.get(answer.unresumed, 0) + 1
        if answer.handoff:
            handoffs[answer.handoff] = handoffs.get(answer.handoff, 0) + 1

    def _stream(self, answers: ModelAnswers, answer: Answered) -> None:
        """Count the pace of a stream."""
        first, usage = answer.first_byte, answer.usage
        if first >= 0.0:
            self.counts.observe(answers.first_token, first)
            if usage is not None and usage.completion > 1:
                self.counts.observe(answers.inter_token, (answer.duration - first) / (usage.completion - 1))

    def late(self, seconds: float) -> None:
        """Count by how much a timer of the event loop was late."""
        self.counts.observe(self.counts.lag, seconds)

    def _other_series(self, kind: SeriesKind, endpoint: str) -> Series:
        """Return the series of a kind that is new, or whose labels are folded."""
        return self.counts.series_of(self._bounded(kind, endpoint), endpoint)

    def _bounded(self, kind: SeriesKind, endpoint: str) -> SeriesKind:
        """Return the kind with labels that clients cannot multiply; that of its model is one already."""
        method, path, model, streaming, status, code = kind
        method = self._labels.method(method)
        path = _UNKNOWN if endpoint == UNKNOWN.name else self._labels.path(path)
        bounded = (method, path, model, streaming, status, code)
        if bounded not in self.counts.series and len(self.counts.series) >= _MOST_KINDS:
            return (method, path, OTHER, streaming, status, code)
        return bounded

    # -- the scrape --------------------------------------------------------------------------------------

    def pieces(self, openmetrics: bool) -> Iterator[str]:
        """Yield the exposition in small pieces. Requests may be counted between two of them."""
        yield _PROCESS[openmetrics](self._registry).decode().removesuffix(exposition.END)
        for family in METRICS:
            yield from exposition.write(family, self.counts, openmetrics)
        if openmetrics:
            yield exposition.END

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition in the format that an Accept header asks for, and its content type."""
        openmetrics = exposition.wanted(accept)
        content_type = exposition.OPENMETRICS_TYPE if openmetrics else exposition.TEXT_TYPE
        return "".join(self.pieces(openmetrics)).encode(), content_type
