"""What the page reads of the metrics: `admin.live` assembles it, and knows nothing of how metrics are counted."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_router.admin.context import Context
from sglang_router.admin.figures import Totals
from sglang_router.admin.live import Counters, Live, ShadowState
from sglang_router.observe.counts import MetricCounts
from sglang_router.observe.live_sources import LiveSources
from sglang_router.observe.readings import count, failed, relayed

_STEP = 50
"""Series, or workers, that are summed up between two places to pause: some 50 us."""


def live_of(context: Context, counts: MetricCounts, policy: str) -> Live:
    """Make what the page shows."""
    sources = counts.sources
    counters = Counters(
        totals=lambda: totals_of(counts),
        bounds=counts.bounds,
        queued=lambda: 0 if sources.waiting is None else sources.waiting(),
        running=lambda: sum(worker.own_load for worker in counts.fleet),
        shadow=lambda: _shadow(sources),
        shared=lambda: None if context.sharing is None else context.sharing.standing,
    )
    return Live(context, counters, policy)


def totals_of(counts: MetricCounts) -> Iterator[Totals | None]:
    """Sum up all counters, in steps: yield None after each, and at last the sums.

    Those of the removed workers come before the first step, so that a worker that is removed in one counts once.
    """
    totals = Totals(counts.histogram().counts)
    tallies = [*counts.removed.values(), *counts.tallies.values()]
    for number, tally in enumerate(tallies, 1):
        totals.matched += tally.decisions.matched
        totals.total += tally.decisions.total
        for tokens in (each.tokens for each in tally.answers.values()):
            totals.prompt += tokens.prompt
            totals.cached += tokens.cached
            totals.completion += tokens.completion
        if not number % _STEP:
            yield None
    for number, series in enumerate(list(counts.series.values()), 1):
        if relayed(series):
            requests = count(series)
            totals.requests += requests
            totals.failed += requests if failed(series) else 0
            totals.first_byte = [sum(pair) for pair in zip(totals.first_byte, series.first_byte.counts, strict=True)]
        if not number % _STEP:
            yield None
    yield totals


def _shadow(sources: LiveSources) -> ShadowState | None:
    tally = sources.shadows
    if tally is None:
        return None
    return ShadowState(tally.policy, tally.agreed, tally.differed, tally.matched, tally.actual_matched)
