"""Rates and shares of the page: two readings of the router's counters, and what happened between them.

    Totals ... Totals  --> between --> Point      requests and errors a second, TTFT, tokens, cached shares

The counters are the metrics' own (`app.overview` reads them), so what the page says and what Prometheus says agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Totals(msgspec.Struct):
    """Counters since the start of the router, of relayed requests.

    requests    that ended; failed: those of them with an error answer, or a broken one
    first_byte  seconds to the first byte: observations by bucket, the last without an upper bound
    prompt      tokens of prompts, cached of them, and completion: of answers, as far as engines tell
    matched     bytes of routing text that workers were believed to have cached, of total
    """

    first_byte: list[int]
    requests: int = 0
    failed: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    matched: int = 0
    total: int = 0


class FleetReading(msgspec.Struct):
    """The router at a moment of its clock.

    queued, running   requests now
    healthy, workers  workers now
    """

    now: float
    totals: Totals
    queued: int
    running: int
    healthy: int
    workers: int


class Point(msgspec.Struct):
    """What happened in some seconds, until `at` (seconds since 1970). null: nothing that could be measured.

    requests, errors        a second
    ttft_p50, ttft_p95      seconds to the first byte, within the buckets of the metrics
    tokens                  of answers, a second, as far as engines tell
    matched, cached         shares: of routing text believed to be cached, of prompt tokens that engines had cached
    queued, running         requests at the end
    healthy, workers        workers at the end
    """

    at: float
    requests: float
    errors: float
    ttft_p50: float | None
    ttft_p95: float | None
    tokens: float
    matched: float | None
    cached: float | None
    queued: int
    running: int
    healthy: int
    workers: int


def between(old: FleetReading, new: FleetReading, at: float, bounds: Sequence[float]) -> Point:
    """Return what happened between two readings.

    at      of the new one, seconds since 1970
    bounds  upper bounds of the buckets, ascending
    """
    before, after = old.totals, new.totals
    seconds = max(new.now - old.now, 0.001)
    observed = [max(n - m, 0) for n, m in zip(after.first_byte, before.first_byte, strict=True)]
    return Point(
        at=round(at, 1),
        requests=rounded((after.requests - before.requests) / seconds),
        errors=rounded((after.failed - before.failed) / seconds),
        ttft_p50=quantile(observed, bounds, 0.5),
        ttft_p95=quantile(observed, bounds, 0.95),
        tokens=rounded((after.completion - before.completion) / seconds),
        matched=share(after.matched - before.matched, after.total - before.total),
        cached=share(after.cached - before.cached, after.prompt - before.prompt),
        queued=new.queued,
        running=new.running,
        healthy=new.healthy,
        workers=new.workers,
    )


def quantile(counts: Sequence[int], bounds: Sequence[float], q: float) -> float | None:
    """Return a quantile of observations by bucket, as Prometheus does; null without any.

    Within a bucket observations count as evenly spread; those above the last bound count as the last bound.
    """
    wanted, below, lower = sum(counts) * q, 0, 0.0
    if not wanted:
        return None
    for count, upper in zip(counts, bounds, strict=False):
        if below + count >= wanted:
            return rounded(lower + (upper - lower) * (wanted - below) / count)
        below, lower = below + count, upper
    return bounds[-1]


def share(part: float, whole: float) -> float | None:
    """Return a share from 0 to 1; null of nothing."""
    return None if whole <= 0 else round(min(max(part / whole, 0.0), 1.0), 3)


def rounded(number: float) -> float:
    """Return a number with three digits behind the point: more would only make rows look changed."""
    return round(number, 3)
