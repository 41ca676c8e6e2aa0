"""Admission: places, queue and rate; and all of it beside a naive model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_router.core.admission import (
    Admission,
    AdmissionRules,
    TokenBucket,
    Waiting,
)
from sglang_router.errors import QueueFull, RateLimited


def admission(places: int | None = 2, size: int = 2, rate: float | None = None) -> Admission[str]:
    return Admission(AdmissionRules(max_concurrent=places, queue_size=size, rate=rate))


def filled(tickets: str, now: float = 0.0, *, size: int = 10) -> Admission[str]:
    """Two places; each letter enters."""
    held = admission(size=size)
    for ticket in tickets:
        held.enter(ticket, now)
    return held


# -- places and queue --------------------------------------------------------------------------------------------------


def test_as_many_begin_as_there_are_places_then_as_many_wait_as_fit() -> None:
    held = admission()
    assert [held.enter(ticket, 0.0) for ticket in "abcd"] == [True, True, False, False]
    with pytest.raises(QueueFull) as refusal:
        held.enter("e", 0.0)
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
    assert (held.running, list(held.waiting)) == (2, ["c", "d"])
    assert held.refused == {"rate_limited": 0, "queue_full": 1}
    assert repr(held) == "<Admission 2 of 2 running, 2 waiting>"


def test_a_place_passes_to_the_first_that_waits() -> None:
    held = filled("abcd")
    assert held.leave("b", 1.0) == "c"
    assert held.leave("c", 1.0) == "d"
    assert held.leave("a", 1.0) is None
    assert (held.running, len(held.waiting)) == (1, 0)


def test_one_that_leaves_the_queue_frees_its_place_there_at_once() -> None:
    held = filled("abcd", size=2)
    assert held.leave("c", 1.0) is None
    assert held.running == 2
    assert held.enter("e", 1.0) is False
    assert [held.leave("a", 2.0), held.leave("b", 2.0)] == ["d", "e"]


def test_leaving_twice_or_after_a_refusal_does_no_harm() -> None:
    held = filled("abcd", size=2)
    with pytest.raises(QueueFull):
        held.enter("e", 0.0)
    assert held.leave("e", 1.0) is None
    assert held.leave("a", 1.0) == "c"
    assert held.leave("a", 1.0) is None
    assert (held.running, list(held.waiting)) == (2, ["d"])


def test_without_a_queue_all_beyond_the_limit_is_refused() -> None:
    held = admission(1, 0)
    assert held.enter("a", 0.0)
    with pytest.raises(QueueFull):
        held.enter("b", 0.0)
    assert held.leave("a", 1.0) is None
    assert held.enter("b", 1.0)


def test_without_limits_all_begin() -> None:
    held: Admission[int] = Admission(AdmissionRules())
    assert all(held.enter(ticket, 0.0) for ticket in range(1000))
    assert held.running == 1000
    assert [held.leave(ticket, 1.0) for ticket in range(1000)] == [None] * 1000
    assert held.running == 0


# -- when to come again ------------------------------------------------------------------------------------------------


def test_retry_after_of_a_full_queue_is_the_time_it_takes_to_empty() -> None:
    held = filled("abcde", size=3)
    for moment, ticket in ((2.0, "a"), (4.0, "b"), (6.0, "c")):
        held.leave(ticket, moment)
        held.enter(f"{ticket}2", moment)
    with pytest.raises(QueueFull) as refusal:
        held.enter("f", 6.0)
    assert refusal.value.retry_after == pytest.approx(8.0)  # three wait, one would be the fourth, one goes each 2 s


def test_an_idle_night_says_nothing_of_the_pace() -> None:
    held = filled("ab", now=0.0)
    held.leave("a", 1.0)
    held.enter("c", 40_000.0)
    held.leave("b", 40_001.0)
    assert held.wait(40_001.0) == 1.0


def test_nothing_departing_makes_the_estimate_grow_up_to_a_minute() -> None:
    held = filled("abc", now=100.0)
    assert [held.wait(moment) for moment in (100.0, 105.0, 500.0)] == [1.0, 10.0, 60.0]


# -- rate --------------------------------------------------------------------------------------------------------------


def test_the_rate_lets_a_second_of_requests_through_at_once_and_then_one_by_one() -> None:
    held = admission(None, rate=4.0)
    assert all(held.enter(ticket, 100.0) for ticket in "abcd")
    with pytest.raises(RateLimited) as refusal:
        held.enter("e", 100.1)
    assert (refusal.value.status, refusal.value.code) == (429, "rate_limited")
    assert refusal.value.retry_after == pytest.approx(0.15)
    assert held.running == 4
    assert held.refused["rate_limited"] == 1
    assert held.enter("e", 100.25)


def test_a_slow_rate_lets_one_through_at_a_time() -> None:
    bucket = TokenBucket(0.1)
    assert [bucket.take(moment) for moment in (0.0, 4.0, 10.0, 100.0, 100.0)] == pytest.approx([0, 6, 0, 0, 10])


def test_the_end_of_a_request_gives_no_token_back() -> None:
    held = admission(None, rate=1.0)
    held.enter("a", 0.0)
    held.leave("a", 0.1)
    with pytest.raises(RateLimited):
        held.enter("b", 0.2)


def test_one_that_finds_the_queue_full_takes_no_token() -> None:
    held = Admission[str](AdmissionRules(max_concurrent=1, queue_size=0, rate=1.0, burst=2.0))
    held.enter("a", 0.0)
    for ticket in "bcd":
        with pytest.raises(QueueFull):
            held.enter(ticket, 0.0)
    held.leave("a", 0.0)
    assert held.enter("e", 0.0)


def test_requests_at_exactly_the_rate_pass_for_a_long_time() -> None:
    bucket = TokenBucket(3.0, 1.0)
    assert not any(bucket.take(1e5 + n / 3) for n in range(20_000))


@given(
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0]), min_size=1, max_size=200),
    st.sampled_from([0.5, 1.0, 7.0]),
    st.sampled_from([1.0, 2.5, 20.0]),
)
def test_no_stretch_of_time_gets_more_than_rate_and_burst(pauses: list[float], rate: float, burst: float) -> None:
    bucket = TokenBucket(rate, burst)
    passed = [now for now in itertools.accumulate(pauses) if not bucket.take(now)]
    for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
        assert last - first + 1 <= burst + rate * (passed[last] - passed[first]) + 1e-6


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=100), st.sampled_from([0.5, 1.0, 7.0]))
def test_one_who_comes_again_when_told_is_let_in(pauses: list[float], rate: float) -> None:
    bucket = TokenBucket(rate)
    for now in itertools.accumulate(pauses):
        missing = bucket.take(now)
        if missing:
            assert not bucket.take(now + missing)
            return


# -- the queue by itself -----------------------------------------------------------------------------------------------


def test_a_queue_keeps_order_and_bound() -> None:
    queue: Waiting[str] = Waiting(3)
    assert [queue.add(ticket) for ticket in "abcd"] == [True, True, True, False]
    assert queue.full
    assert "d" not in queue
    assert (queue.remove("b"), queue.remove("b")) == (True, False)
    assert (list(queue), len(queue), queue.full) == (["a", "c"], 2, False)
    assert queue.add("b")
    assert [queue.pop(), queue.pop(), queue.pop()] == ["a", "c", "b"]
    with pytest.raises(KeyError):
        queue.pop()
    assert repr(queue) == "<Waiting 0 of 3>"


# -- beside a model ----------------------------------------------------------------------------------------------------


class AdmissionBesideModel(RuleBasedStateMachine):
    """The model keeps lists and looks through them. Each ticket is in exactly one of its lists."""

    @initialize(places=st.integers(1, 4), size=st.integers(0, 5))
    def begin(self, places: int, size: int) -> None:
        self.held: Admission[int] = Admission(
            AdmissionRules(max_concurrent=places, queue_size=size, rate=2.0, burst=6.0)
        )
        self.places, self.size = places, size
        self.now, self.tokens = 0.0, 6.0
        self.entered = 0
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.full: list[int] = []
        self.limited: list[int] = []
        self.left: list[int] = []

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 4.0]))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.tokens = min(6.0, self.tokens + 2.0 * seconds)

    @rule()
    def enter(self) -> None:
        ticket = self.entered
        self.entered += 1
        free = len(self.running) < self.places
        if not free and len(self.waiting) >= self.size:
            self.full.append(ticket)
            with pytest.raises(QueueFull) as refusal:
                self.held.enter(ticket, self.now)
            assert 1.0 <= (refusal.value.retry_after or 0.0) <= 60.0
        elif self.tokens < 1.0:
            self.limited.append(ticket)
            with pytest.raises(RateLimited) as limited:
                self.held.enter(ticket, self.now)
            assert limited.value.retry_after == pytest.approx((1.0 - self.tokens) / 2.0)
        else:
            self.tokens -= 1.0
            assert self.held.enter(ticket, self.now) is free
            if free:
                self.running.append(ticket)
            else:
                self.waiting.append(ticket)

    @rule(pick=st.integers(0, 1000))
    def end(self, pick: int) -> None:
        if self.running:
            ticket = self.running.pop(pick % len(self.running))
            following = self.waiting.pop(0) if self.waiting else None
            if following is not None:
                self.running.append(following)
            self.left.append(ticket)
            assert self.held.leave(ticket, self.now) == following

    @rule(pick=st.integers(0, 1000))
    def give_up(self, pick: int) -> None:
        if self.waiting:
            ticket = self.waiting.pop(pick % len(self.waiting))
            self.left.append(ticket)
            assert self.held.leave(ticket, self.now) is None

    @rule(pick=st.integers(0, 1000))
    def leave_again(self, pick: int) -> None:
        gone = self.left + self.full + self.limited
        if gone:
            assert self.held.leave(gone[pick % len(gone)], self.now) is None

    @invariant()
    def same(self) -> None:
        assert self.held.running == len(self.running) <= self.places
        assert list(self.held.waiting) == self.waiting
        assert len(self.held.waiting) <= self.size
        assert not self.waiting or len(self.running) == self.places
        counts = {"rate_limited": len(self.limited), "queue_full": len(self.full)}
        assert self.held.refused == counts
        everyone = [*self.running, *self.waiting, *self.left]
        assert sorted(everyone + self.full + self.limited) == list(range(self.entered))


TestAdmissionBesideModel = AdmissionBesideModel.TestCase
TestAdmissionBesideModel.settings = settings(max_examples=40, stateful_step_count=40)
