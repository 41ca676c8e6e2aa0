"""The queue: places, room, start and rate; and all of it beside a naive model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_router.errors import QueueFull, RateLimited, TooManyWaiting
from sglang_router.routing.queue import PAUSED, PLACE, ROOM, START, Queue
from sglang_router.routing.rules import QueueRules
from sglang_router.routing.token_bucket import TokenBucket


def queue_of(
    places: int | None = 2, size: int = 2, rate: float | None = None, burst: float | None = None
) -> Queue[str]:
    rules = QueueRules(max_concurrent=places, queue_size=size, rate=rate, burst=burst, queue_timeout=60.0)
    return Queue(rules)


def enter(queue: Queue[str], number: int, now: float = 0.0, line: str = "") -> bool:
    """A newcomer whose workers have room, as the router brings it: True: it begins."""
    why = queue.why_wait(line)
    if why:
        queue.check_length(why, now)
    queue.take_token(now)
    if why:
        queue.wait(number, str(number), line, why, now)
    else:
        queue.begin(number, now)
    return not why


def end(queue: Queue[str], number: int, now: float) -> int | None:
    """A request ends; the one that begins in its place, if there is one."""
    queue.leave(number, now)
    following = queue.first(()) if queue.has_place else None
    if following is None:
        return None
    queue.remove(following.number)
    queue.begin(following.number, now)
    return following.number


def filled(count: int, *, size: int = 10, now: float = 0.0) -> Queue[str]:
    """Two places, and so many newcomers."""
    queue = queue_of(size=size)
    for number in range(count):
        enter(queue, number, now)
    return queue


def numbers(queue: Queue[str]) -> list[int]:
    return [queued.number for queued in queue]


# -- places ------------------------------------------------------------------------------------------------------------


def test_as_many_begin_as_there_are_places_then_as_many_wait_as_fit() -> None:
    queue = queue_of()
    assert [enter(queue, number) for number in range(4)] == [True, True, False, False]
    with pytest.raises(QueueFull) as refusal:
        enter(queue, 4)
    assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
    assert (queue.running, numbers(queue)) == (2, [2, 3])
    assert queue.refused["queue_full"] == 1
    assert repr(queue) == "<Queue 2 of 2 running, 2 queued>"
    assert repr(next(iter(queue))) == "<Queued 2 for place since 0.000 until 60.000>"


def test_a_place_passes_to_the_first_that_waits() -> None:
    queue = filled(4)
    assert end(queue, 1, 1.0) == 2
    assert end(queue, 2, 1.0) == 3
    assert end(queue, 0, 1.0) is None
    assert (queue.running, len(queue)) == (1, 0)


def test_one_that_leaves_the_queue_frees_its_slot_there_at_once() -> None:
    queue = filled(4, size=2)
    assert queue.remove(2) is not None
    assert queue.remove(2) is None
    assert queue.running == 2
    assert enter(queue, 4, 1.0) is False
    assert [end(queue, 0, 2.0), end(queue, 1, 2.0)] == [3, 4]


def test_ending_twice_frees_one_place() -> None:
    queue = filled(4)
    queue.leave(0, 1.0)
    queue.leave(0, 1.0)
    assert (queue.running, queue.has_place) == (1, True)


def test_without_a_queue_all_beyond_the_limit_is_refused() -> None:
    queue = queue_of(1, 0)
    assert enter(queue, 0)
    with pytest.raises(QueueFull):
        enter(queue, 1)
    assert end(queue, 0, 1.0) is None
    assert enter(queue, 1, 1.0)


def test_without_limits_nothing_is_kept() -> None:
    queue = queue_of(None)
    assert queue.idle
    assert all(enter(queue, number) for number in range(1000))
    assert (queue.running, queue.idle) == (0, True)


def test_with_a_limit_or_somebody_queued_it_is_not_idle() -> None:
    assert not queue_of(1).idle
    assert not queue_of(None, rate=1.0).idle
    queue = queue_of(None)
    queue.wait(1, "", "pool", ROOM, 0.0)
    assert not queue.idle
    queue.remove(1)
    assert queue.idle


# -- lines and reasons -------------------------------------------------------------------------------------------------


def test_newcomers_wait_behind_their_own_line_and_behind_all_that_wait_for_a_place() -> None:
    queue = queue_of(2, 10)
    queue.wait(1, "", "a", ROOM, 0.0)
    assert (queue.why_wait("a"), queue.why_wait("b")) == (ROOM, "")
    queue.begin(2, 0.0)
    queue.begin(3, 0.0)
    queue.wait(4, "", "b", PLACE, 0.0)
    queue.leave(2, 1.0)
    assert queue.has_place
    assert queue.why_wait("c") == PLACE


def test_the_first_is_the_oldest_of_the_lines_that_are_not_passed_over() -> None:
    queue = queue_of(None, 10)
    for number, line in enumerate("abba"):
        queue.wait(number, "", line, ROOM, 0.0)

    def first(*passed_over: str) -> int | None:
        found = queue.first(passed_over)
        return None if found is None else found.number

    assert (first(), first("a"), first("b"), first("a", "b")) == (0, 1, 0, None)
    queue.remove(0)
    queue.remove(1)
    assert (first(), first("b"), first("a")) == (2, 3, 2)


def test_another_reason_has_another_moment() -> None:
    rules = QueueRules(queue_timeout=60.0, start_timeout=10.0)
    queue: Queue[str] = Queue(rules)
    queued = queue.wait(1, "", "a", START, 5.0)
    assert (queued.until, queue.why_wait("a")) == (15.0, START)
    assert queue.now_for(queued, ROOM)
    assert not queue.now_for(queued, ROOM)
    assert (queued.until, queue.why_wait("b")) == (65.0, "")
    assert queue.now_for(queued, PLACE)
    assert queue.why_wait("b") == PLACE
    queue.remove(1)
    assert queue.why_wait("b") == ""


def test_all_of_a_line_wait_for_one_reason() -> None:
    queue = queue_of(None, 10)
    for number, line, why in ((1, "a", ROOM), (2, "a", PLACE), (3, "b", PLACE), (4, "a", ROOM)):
        queue.wait(number, "", line, why, 0.0)

    def changed(line: str, why: str) -> list[int]:
        return [queued.number for queued in queue.line_waits_for(line, why)]

    assert changed("a", ROOM) == [2]
    assert queue.why_wait("c") == PLACE, "one of the other line still does"
    assert (changed("b", START), changed("b", START)) == ([3], [])
    assert queue.why_wait("c") == ""
    assert (changed("a", START), changed("a", START)) == ([1, 2, 4], [])


def test_when_lines_change_the_order_remains() -> None:
    queue = queue_of(None, 10)
    for number, line in enumerate("abbac"):
        queue.wait(number, line, line, ROOM, 0.0)
    queue.regroup(lambda item: "ab" if item in "ab" else item)
    assert [(queued.line, queued.why) for queued in queue] == [("ab", PLACE)] * 4 + [("c", ROOM)]
    order = []
    while (queued := queue.first(())) is not None:
        order.append(queued.number)
        queue.remove(queued.number)
    assert order == [0, 1, 2, 3, 4]
    assert queue.why_wait("ab") == ""


def test_more_may_wait_for_a_start_than_for_a_place() -> None:
    queue: Queue[str] = Queue(QueueRules(queue_size=1, most_starting=3))
    for number in range(3):
        queue.check_length(START, 0.0)
        queue.wait(number, "", "a", START, 0.0)
    with pytest.raises(TooManyWaiting) as refusal:
        queue.check_length(START, 0.0)
    assert (refusal.value.code, refusal.value.retry_after) == ("too_many_waiting", 5.0)
    with pytest.raises(QueueFull):
        queue.check_length(ROOM, 0.0)


def test_more_may_wait_for_a_paused_worker_and_for_longer() -> None:
    queue: Queue[str] = Queue(QueueRules(queue_size=3, most_starting=1, most_paused=2, paused_timeout=700.0))
    for number in range(2):
        queue.check_length(PAUSED, 0.0)
        assert queue.wait(number, "", "a", PAUSED, 5.0).until == 705.0
    with pytest.raises(TooManyWaiting):
        queue.check_length(PAUSED, 0.0)


def test_no_more_wait_for_a_start_than_could_run_or_wait_afterwards() -> None:
    queue: Queue[str] = Queue(QueueRules(max_concurrent=2, queue_size=1))
    for number in range(3):
        queue.check_length(START, 0.0)
        queue.wait(number, "", "a", START, 0.0)
    with pytest.raises(TooManyWaiting):
        queue.check_length(START, 0.0)


# -- Retry-After -------------------------------------------------------------------------------------------------------


def test_retry_after_of_a_full_queue_is_the_time_it_takes_to_empty() -> None:
    queue = filled(5, size=3)
    for moment, number in ((2.0, 0), (4.0, 1), (6.0, 2)):
        end(queue, number, moment)
        enter(queue, 10 + number, moment)
    with pytest.raises(QueueFull) as refusal:
        enter(queue, 20, 6.0)
    assert refusal.value.retry_after == pytest.approx(8.0)  # three wait, one would be the fourth, one goes each 2 s


def test_the_same_holds_where_workers_are_full() -> None:
    queue = queue_of(None, 10)
    queue.wait(1, "", "a", ROOM, 10.0)
    queue.wait(2, "", "a", ROOM, 10.0)
    queue.leave(99, 12.0)
    queue.remove(1)
    assert queue.retry_after(12.0) == pytest.approx(4.0)  # one waits, one would be the second, one goes each 2 s


def test_an_idle_night_says_nothing_of_the_pace() -> None:
    queue = filled(2, now=0.0)
    queue.leave(0, 1.0)
    enter(queue, 2, 40_000.0)
    queue.leave(1, 40_001.0)
    assert queue.retry_after(40_001.0) == 1.0


def test_nothing_ending_makes_the_estimate_grow_up_to_a_minute() -> None:
    queue = filled(3, now=100.0)
    assert [queue.retry_after(moment) for moment in (100.0, 105.0, 500.0)] == [1.0, 10.0, 60.0]


# -- rate --------------------------------------------------------------------------------------------------------------


def test_the_rate_lets_a_second_of_requests_through_at_once_and_then_one_by_one() -> None:
    queue = queue_of(None, rate=4.0)
    assert all(enter(queue, number, 100.0) for number in range(4))
    with pytest.raises(RateLimited) as refusal:
        enter(queue, 4, 100.1)
    assert (refusal.value.status, refusal.value.code) == (429, "rate_limited")
    assert refusal.value.retry_after == pytest.approx(0.15)
    assert queue.refused["rate_limited"] == 1
    assert enter(queue, 4, 100.25)


def test_a_slow_rate_lets_one_through_at_a_time() -> None:
    bucket = TokenBucket(0.1)
    assert [bucket.take(moment) for moment in (0.0, 4.0, 10.0, 100.0, 100.0)] == pytest.approx([0, 6, 0, 0, 10])


def test_the_end_of_a_request_gives_no_token_back() -> None:
    queue = queue_of(None, rate=1.0)
    enter(queue, 0)
    queue.leave(0, 0.1)
    with pytest.raises(RateLimited):
        enter(queue, 1, 0.2)


def test_one_that_finds_the_queue_full_takes_no_token() -> None:
    queue = queue_of(1, 0, rate=1.0, burst=2.0)
    enter(queue, 0)
    for number in range(1, 4):
        with pytest.raises(QueueFull):
            enter(queue, number)
    queue.leave(0, 0.0)
    assert enter(queue, 5)


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
def test_one_that_retries_when_told_is_let_in(pauses: list[float], rate: float) -> None:
    bucket = TokenBucket(rate)
    for now in itertools.accumulate(pauses):
        missing = bucket.take(now)
        if missing:
            assert not bucket.take(now + missing)
            return


# -- beside a model ----------------------------------------------------------------------------------------------------


class QueueBesideModel(RuleBasedStateMachine):
    """The model keeps lists and looks through them. Each request is in exactly one of its lists."""

    @initialize(places=st.integers(1, 4), size=st.integers(0, 5))
    def begin(self, places: int, size: int) -> None:
        self.queue = queue_of(places, size, rate=2.0, burst=6.0)
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
        number = self.entered
        self.entered += 1
        free = len(self.running) < self.places
        if not free and len(self.waiting) >= self.size:
            self.full.append(number)
            with pytest.raises(QueueFull) as refusal:
                enter(self.queue, number, self.now)
            assert 1.0 <= (refusal.value.retry_after or 0.0) <= 60.0
        elif self.tokens < 1.0:
            self.limited.append(number)
            with pytest.raises(RateLimited) as limited:
                enter(self.queue, number, self.now)
            assert limited.value.retry_after == pytest.approx((1.0 - self.tokens) / 2.0)
        else:
            self.tokens -= 1.0
            assert enter(self.queue, number, self.now) is free
            (self.running if free else self.waiting).append(number)

    @rule(pick=st.integers(0, 1000))
    def end(self, pick: int) -> None:
        if self.running:
            number = self.running.pop(pick % len(self.running))
            following = self.waiting.pop(0) if self.waiting else None
            if following is not None:
                self.running.append(following)
            self.left.append(number)
            assert end(self.queue, number, self.now) == following

    @rule(pick=st.integers(0, 1000))
    def give_up(self, pick: int) -> None:
        if self.waiting:
            number = self.waiting.pop(pick % len(self.waiting))
            self.left.append(number)
            assert self.queue.remove(number) is not None

    @rule(pick=st.integers(0, 1000))
    def leave_again(self, pick: int) -> None:
        gone = self.left + self.full + self.limited
        if gone:
            number = gone[pick % len(gone)]
            self.queue.leave(number, self.now)
            assert self.queue.remove(number) is None

    @invariant()
    def same(self) -> None:
        assert self.queue.running == len(self.running) <= self.places
        assert numbers(self.queue) == self.waiting
        assert len(self.queue) <= self.size
        assert not self.waiting or len(self.running) == self.places
        refused = self.queue.refused
        assert (refused["rate_limited"], refused["queue_full"]) == (len(self.limited), len(self.full))
        everyone = [*self.running, *self.waiting, *self.left]
        assert sorted(everyone + self.full + self.limited) == list(range(self.entered))


TestQueueBesideModel = QueueBesideModel.TestCase
TestQueueBesideModel.settings = settings(max_examples=40, stateful_step_count=40)
