"""How the metric families about the router itself are read: see `observe.readings`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator

from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.readings import Reader, Sample
from sglang_router.observe.tallies import Histogram, ModelAnswers
from sglang_router.routing.retry_budget import RetryBudget


def answer_times(value: Callable[[ModelAnswers], Histogram]) -> Reader:
    """Read a histogram of each worker and model; skip those without an observation."""

    def read(counts: MetricCounts) -> Iterator[Sample]:
        for tally in list(counts.tallies.values()):
            for model, answers in list(tally.answers.items()):
                if any(value(answers).counts):
                    yield (tally.name, model), value(answers)

    return read


def build_info(counts: MetricCounts) -> Iterable[Sample]:
    """Read which router this is."""
    return [((counts.sources.version, platform.python_version()), 1)]


def certificates(counts: MetricCounts) -> Iterable[Sample]:
    """Read when the certificates in use expire."""
    found = [(use, files.expires_at) for use, files in counts.sources.certificates.items()]
    return [((use,), moment) for use, moment in found if moment is not None]


def budget(value: Callable[[RetryBudget], int]) -> Reader:
    """Read a number of the retry budget."""

    def read(counts: MetricCounts) -> Iterable[Sample]:
        found = counts.sources.retry_budget
        return [] if found is None else [((), value(found))]

    return read


def spans(counts: MetricCounts) -> Iterable[Sample]:
    """Read what became of the spans of traces; nothing without traces."""
    found = counts.sources.spans
    return [] if found is None else [(("sent",), found.sent), (("lost",), found.lost)]
