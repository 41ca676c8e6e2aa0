"""Rates, shares and quantiles between two readings."""

from __future__ import annotations

import pytest

from sglang_router.admin.figures import FleetReading, Totals, between, quantile, share

BOUNDS = (0.1, 1.0, 10.0)


def reading(now: float, *first_byte: int, **totals: int) -> FleetReading:
    return FleetReading(now, Totals(list(first_byte), **totals), queued=2, running=3, healthy=4, workers=5)


def test_what_happened_between_two_readings() -> None:
    old = reading(100.0, 5, 0, 0, 0, requests=10, failed=1, prompt=100, cached=50, completion=7, matched=1, total=10)
    new = reading(110.0, 5, 10, 0, 0, requests=30, failed=6, prompt=200, cached=75, completion=107, matched=5, total=18)
    point = between(old, new, 1e9, BOUNDS)
    assert (point.requests, point.errors, point.tokens) == (2.0, 0.5, 10.0)
    assert (point.matched, point.cached) == (0.5, 0.25)
    assert point.ttft_p50 == 0.55
    assert (point.ttft_p95, point.at) == (0.955, 1e9)
    assert (point.queued, point.running, point.healthy, point.workers) == (2, 3, 4, 5)


def test_nothing_happened() -> None:
    same = reading(100.0, 5, 0, 0, 0, requests=10)
    point = between(same, same, 1e9, BOUNDS)
    assert (point.requests, point.ttft_p50, point.ttft_p95, point.matched, point.cached) == (
        0.0,
        None,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("counts", "q", "seconds"),
    [
        ([4, 0, 0, 0], 0.5, 0.05),
        ([0, 4, 0, 0], 0.5, 0.55),
        ([2, 2, 0, 0], 0.5, 0.1),
        ([0, 0, 0, 4], 0.5, 10.0),
        ([0, 0, 4, 0], 1.0, 10.0),
        ([0, 0, 0, 0], 0.5, None),
    ],
)
def test_a_quantile_lies_within_its_bucket(counts: list[int], q: float, seconds: float | None) -> None:
    assert quantile(counts, BOUNDS, q) == seconds


def test_a_share_is_from_0_to_1_and_nothing_of_nothing() -> None:
    assert (share(1, 4), share(5, 4), share(-1, 4), share(0, 0)) == (0.25, 1.0, 0.0, None)
