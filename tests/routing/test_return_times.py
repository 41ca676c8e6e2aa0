"""How long a session lives, learnt from pauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.return_times import CEILING, FLOOR, UNKNOWN, ReturnTimes


def test_nothing_is_learnt_from_a_few_gaps() -> None:
    times = ReturnTimes()
    for _ in range(19):
        times.add(1.0)
    assert times.time_to_live == UNKNOWN
    times.add(1.0)
    assert times.time_to_live == FLOOR


@pytest.mark.parametrize("gap", [40.0, 100.0, 700.0])
def test_it_is_twice_the_usual_longest_gap(gap: float) -> None:
    times = ReturnTimes()
    for _ in range(95):
        times.add(5.0)
    for _ in range(5):
        times.add(gap)
    assert 2 * gap <= times.time_to_live <= 2 * gap * 1.42, "buckets are half an octave wide"


def test_rare_gaps_do_not_count_and_there_is_a_ceiling() -> None:
    times = ReturnTimes()
    for _ in range(199):
        times.add(50.0)
    times.add(10_000.0)
    assert times.time_to_live < 150.0
    for _ in range(200):
        times.add(10_000.0)
    assert times.time_to_live == CEILING


def test_new_habits_replace_old_ones() -> None:
    times = ReturnTimes()
    for _ in range(5_000):
        times.add(1_000.0)
    for _ in range(12_000):
        times.add(1.0)
    assert times.time_to_live == FLOOR


@given(st.lists(st.floats(0, 1e6), max_size=300))
def test_it_stays_between_floor_and_ceiling(gaps: list[float]) -> None:
    times = ReturnTimes()
    for gap in gaps:
        times.add(gap)
        assert FLOOR <= times.time_to_live <= CEILING
