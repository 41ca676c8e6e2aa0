"""The figures of `sglang-router top`: rates between two scrapes of a router. No I/O.

    Scrape(moment, text)           one exposition of /metrics
    overall(old, new), of_workers(old, new)    what happened between two of them

Shares and percentiles are those of the time between the scrapes, not since the start; None where nothing happened.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

_REQUESTS: Final = "sgl_router_requests_total"
_ERRORS: Final = "sgl_router_request_errors_total"
_FIRST_BYTE: Final = "sgl_router_time_to_first_byte_seconds_bucket"
_PROMPT: Final = "sgl_router_prompt_tokens_total"
_CACHED: Final = "sgl_router_cached_tokens_total"
_PROCESSED: Final = "sgl_router_processed_requests_total"
_COMPLETION: Final = "sgl_router_completion_tokens_total"
_READ: Final = (_REQUESTS, _ERRORS, _FIRST_BYTE, _PROMPT, _CACHED, _PROCESSED, _COMPLETION)

Labels = Mapping[str, str]


class Scrape:
    """One exposition. moment: seconds of any clock. Raises: ValueError, when it is none."""

    def __init__(self, moment: float, text: str) -> None:
        self.moment = moment
        self._totals: dict[str, dict[str, float]] = {name: defaultdict(float) for name in _READ}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in self._totals:
                    label = "le" if sample.name == _FIRST_BYTE else "worker"
                    self._totals[sample.name][sample.labels.get(label, "")] += sample.value

    def total(self, name: str) -> float:
        """Return the sum over all samples of a counter."""
        return sum(self._totals[name].values())

    def by_worker(self, name: str) -> Mapping[str, float]:
        """Return the sums of a counter by worker."""
        return self._totals[name]

    def buckets(self) -> dict[float, float]:
        """Return the cumulative histogram of the time to the first byte: answers by upper bound in seconds."""
        return {float(bound): count for bound, count in self._totals[_FIRST_BYTE].items()}


class Rates(NamedTuple):
    """What happened between two scrapes. Per second; times in seconds; cached: the share of prompt tokens that engines
    had in their caches, as they say."""

    requests: float
    errors: float
    tokens: float
    first_byte_p50: float | None
    first_byte_p95: float | None
    cached: float | None


class WorkerRates(NamedTuple):
    """The same of one worker."""

    requests: float
    tokens: float
    cached: float | None


def overall(old: Scrape, new: Scrape) -> Rates:
    """Return what happened at all workers."""
    seconds = max(new.moment - old.moment, 1e-9)

    def rate(name: str) -> float:
        return max(new.total(name) - old.total(name), 0.0) / seconds

    before = old.buckets()
    grown = {bound: count - before.get(bound, 0.0) for bound, count in sorted(new.buckets().items())}
    cached = _share(new.total(_CACHED) - old.total(_CACHED), new.total(_PROMPT) - old.total(_PROMPT))
    return Rates(
        rate(_REQUESTS), rate(_ERRORS), rate(_COMPLETION), _percentile(grown, 0.5), _percentile(grown, 0.95), cached
    )


def of_workers(old: Scrape, new: Scrape) -> dict[str, WorkerRates]:
    """Return what happened at each worker, by URL."""
    seconds = max(new.moment - old.moment, 1e-9)

    def grown(name: str, worker: str) -> float:
        return max(new.by_worker(name).get(worker, 0.0) - old.by_worker(name).get(worker, 0.0), 0.0)

    return {
        worker: WorkerRates(
            grown(_PROCESSED, worker) / seconds,
            grown(_COMPLETION, worker) / seconds,
            _share(grown(_CACHED, worker), grown(_PROMPT, worker)),
        )
        for worker in new.by_worker(_PROCESSED)
    }


def _share(part: float, whole: float) -> float | None:
    return min(part / whole, 1.0) if whole > 0 else None


def _percentile(cumulative: Mapping[float, float], wanted: float) -> float | None:
    """Return a percentile of a histogram, interpolated within its bucket as Prometheus does; None without answers."""
    total = max(cumulative.values(), default=0.0)
    if total <= 0:
        return None
    below, low = 0.0, 0.0
    for bound, count in cumulative.items():
        if count >= wanted * total:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (wanted * total - below) / max(count - below, 1e-9)
        below, low = count, bound
    return low
