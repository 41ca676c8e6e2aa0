"""Cache pressure: what is used again after how long, against what is new."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.pressure import Pressure

ONE, OTHER = 1, 2


def text(seed: int, size: int = 1000) -> bytes:
    return (b"%d|" % seed * size)[:size]


def test_without_anything_that_comes_back_evicting_costs_nothing() -> None:
    pressure = Pressure()
    for number in range(50):
        pressure.inserted(b"", text(number), (0, 0), ONE, 1000, float(number))
    assert pressure.evicting(0.0) == 0.0


def test_half_comes_back() -> None:
    """Half of what is read was there before, 40 s ago: R = D, so evicting what is younger costs 2."""
    pressure = Pressure()
    pressure.remember(1000)
    for number in range(2000):
        pressure.inserted(b"", text(number), (0, 0), ONE, 1000, 100.0 * number)
        pressure.inserted(b"", text(number), (0, 0), ONE, 1000, 100.0 * number + 40.0)
    assert pressure.evicting(10.0) == pytest.approx(2.0, rel=0.15)
    assert pressure.evicting(70.0) == 0.0


def test_what_is_used_again_sooner_does_not_count() -> None:
    pressure = Pressure()
    pressure.inserted(b"", text(1), (0, 0), ONE, 1000, 0.0)
    pressure.used(1000, 5.0)
    assert pressure.evicting(3.0) > 0.0
    assert pressure.evicting(8.0) == 0.0


def test_a_copy_at_another_worker_was_not_evicted() -> None:
    pressure = Pressure()
    pressure.inserted(b"", text(1), (0, 0), ONE, 1000, 0.0)
    pressure.inserted(b"", text(1), (0, 1000), OTHER, 1000, 5.0)
    assert pressure.evicting(1.0) == 0.0
    pressure.inserted(b"", text(1), (0, 1000), ONE, 1000, 9.0)  # but this one had it
    assert pressure.evicting(1.0) > 0.0


def test_what_nobody_has_any_more_was_evicted_whoever_reads_it_now() -> None:
    pressure = Pressure()
    pressure.inserted(b"", text(1), (0, 0), ONE, 1000, 0.0)
    pressure.inserted(b"", text(1), (0, 0), OTHER, 1000, 9.0)
    assert pressure.evicting(1.0) > 0.0


def test_namespaces_are_different_prompts() -> None:
    pressure = Pressure()
    pressure.inserted(b"a", text(1), (0, 0), ONE, 1000, 0.0)
    pressure.inserted(b"b", text(1), (0, 0), ONE, 1000, 9.0)
    assert pressure.evicting(0.0) == 0.0


def test_only_what_is_missing_counts() -> None:
    """A session grows by a tenth, and loses its second half: that half comes back."""
    lost, grown = Pressure(), Pressure()
    for pressure in (lost, grown):
        pressure.remember(100_000)
        pressure.inserted(b"", text(1, 10000), (0, 0), ONE, 10000, 0.0)
    lost.inserted(b"", text(1, 10000), (5000, 5000), ONE, 5000, 20.0)
    grown.inserted(b"", text(1, 10000) + b"!" * 1000, (10000, 10000), ONE, 1000, 20.0)
    assert lost.evicting(8.0) == pytest.approx(2 * 5000 / (10000 + 0.05 * 100_000), rel=0.15)
    assert grown.evicting(8.0) == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 3), st.floats(0, 1e5)),
        max_size=60,
    )
)
def test_older_never_costs_more_and_there_is_a_most(calls: list[tuple[int, int, int, int, float]]) -> None:
    pressure, now = Pressure(), 0.0
    for seed, size, mine, slot, pause in calls:
        now += pause
        whole = text(seed, size)
        had = min(mine, size)
        pressure.inserted(b"", whole, (had, had), 1 << slot, size - had, now)
        pressure.used(had, pause)
        costs = [pressure.evicting(2.0**power) for power in range(-1, 24)]
        assert costs == sorted(costs, reverse=True)
        assert 0.0 <= costs[0] <= 32.0
