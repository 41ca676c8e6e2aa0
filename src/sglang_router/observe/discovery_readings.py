"""How the metric families of discovery are read; see `observe.readings`.

per_source(items)        what each source that looks for workers says of itself; no samples without one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import Reader, Sample
from sglang_router.routing.source import SourceReport


def per_source(items: Callable[[SourceReport], Iterable[Sample]]) -> Reader:
    """Several samples per source; the label values of `items` follow the source's name."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        reports = counts.sources.discovery
        for report in reports() if reports is not None else ():
            for values, number in items(report):
                yield (report.source, *values), number

    return read


def age(report: SourceReport) -> list[Sample]:
    """Seconds since the source knew all of its workers; nothing before the first time."""
    return [] if report.listed_secs is None else [((), report.listed_secs)]


def by_reason(counts: dict[str, int]) -> list[Sample]:
    """One sample for each reason."""
    return [((reason,), number) for reason, number in counts.items()]
