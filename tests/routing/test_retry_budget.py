"""The retry budget: what it lets through, and that its bound holds whatever comes when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.rules import RetryBudgetRules

WINDOW, SLOTS = 10.0, 10


def budget(*, ratio: float = 0.2, floor: float = 0.0) -> RetryBudget:
    return RetryBudget(RetryBudgetRules(ratio=ratio, floor=floor, window=WINDOW))


def take_all(budget: RetryBudget, now: float) -> int:
    """How many retries it lets through at one moment."""
    count = 0
    while budget.take(now):
        count += 1
    return count


def test_retries_are_a_share_of_requests() -> None:
    retries = budget()
    for _ in range(100):
        retries.request(5.0)
    assert take_all(retries, 5.0) == 20
    assert repr(retries) == "<RetryBudget 20 retries of 100 requests>"
    assert retries.refused == 1


def test_no_request_no_retry_but_for_the_floor() -> None:
    assert take_all(budget(), 0.0) == 0
    assert take_all(budget(floor=3.0), 0.0) == 30


def test_the_default_is_a_fifth_and_three_a_second() -> None:
    retries = RetryBudget()
    for _ in range(1000):
        retries.request(1e6)
    assert take_all(retries, 1e6) == 230


def test_requests_allow_retries_for_a_window_and_no_longer() -> None:
    for moment, allowed in ((0.5, 20), (9.99, 20), (10.0, 0), (25.0, 0)):
        retries = budget()
        for _ in range(100):
            retries.request(0.5)
        assert take_all(retries, moment) == allowed


def test_a_request_pays_for_its_share_once() -> None:
    retries = budget()
    for _ in range(100):
        retries.request(0.0)
    assert take_all(retries, 9.0) == 20
    for moment in (10.0, 11.0, 18.0, 19.5):
        assert take_all(retries, moment) == 0
    assert retries.requests == 0


def test_the_floor_flows_in_again() -> None:
    retries = budget(floor=3.0)
    assert [take_all(retries, moment) for moment in (0.0, 5.0, 9.9, 10.0, 15.0, 20.0)] == [30, 0, 0, 30, 0, 30]


@pytest.mark.parametrize("start", [0.0, 0.37, 1_700_000_000.0])
def test_a_fleet_that_fails_everything_gets_a_fifth_more_and_the_floor(start: float) -> None:
    """Each request fails, and so does each retry, which wants another one: 100 requests/s, a minute long."""
    retries, requests, sent, seconds = budget(floor=3.0), 0, 0, 60
    for tick in range(100 * seconds):
        now = start + tick / 100
        retries.request(now)
        requests += 1
        sent += 1
        for _ in range(6):
            if not retries.take(now):
                break
            sent += 1
    assert requests * 1.2 < sent <= requests * 1.2 + 3.0 * (seconds + WINDOW)


PAUSES = st.floats(0.0, 3.0) | st.sampled_from([9.5, 10.0, 14.5, 40.0])
STEPS = st.lists(st.tuples(PAUSES, st.integers(0, 40), st.integers(0, 12)), max_size=60)


@given(STEPS, st.sampled_from([0.0, 0.1, 0.2, 1.0]), st.sampled_from([0.0, 0.3, 3.0]), st.floats(0.0, 1e6))
def test_the_bound_holds_whatever_comes_when(
    steps: list[tuple[float, int, int]], ratio: float, floor: float, now: float
) -> None:
    """Beside a model that remembers every event: what is let through is exactly what the bound has room for."""
    retries = budget(ratio=ratio, floor=floor)
    requests: list[int] = []  # the slot of each
    passed: list[int] = []
    for pause, asked, wanted in steps:
        now += pause
        slot = math.floor(now / (WINDOW / SLOTS))
        for _ in range(asked):
            retries.request(now)
        requests += [slot] * asked
        paid = sum(slot - SLOTS < at <= slot for at in requests)
        for _ in range(wanted):
            used = sum(slot - SLOTS < at <= slot for at in passed)
            fits = used + 1 <= ratio * paid + floor * WINDOW + 1e-9
            assert retries.take(now) is fits
            passed += [slot] * fits
        if asked or wanted:
            assert retries.requests == paid
    if passed:
        windows = (passed[-1] - passed[0]) // SLOTS + 1
        assert len(passed) <= ratio * len(requests) + floor * WINDOW * windows + 1e-6
