"""The order of a line: by priority, first come first served within one, and nobody waits for ever."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import QueueFull, SessionsFull, TooManyWaiting
from sglang_router.routing.line import MIXED, Line, Queued, order_of
from sglang_router.routing.queue import PLACE, ROOM, SESSION, START, Queue
from sglang_router.routing.rules import QueueRules

HIGH, LOW = 10, -10


def queue_of(size: int = 10, aging: float = 1.0, places: int | None = None) -> Queue[str]:
    return Queue(QueueRules(max_concurrent=places, queue_size=size, aging=aging))


def wait(
    queue: Queue[str], number: int, now: float, priority: int = 0, line: str = "a", why: str = ROOM
) -> Queued[str]:
    return queue.wait(number, str(number), line, why, now, priority)


def emptied(queue: Queue[str]) -> list[int]:
    """The numbers of the queued requests, in the order in which they begin."""
    order = []
    while (queued := queue.first(())) is not None:
        order.append(queued.number)
        queue.remove(queued.number)
    return order


def test_a_higher_priority_begins_first_and_within_one_the_first_that_came() -> None:
    queue = queue_of()
    for number, priority in enumerate((0, LOW, HIGH, 0, HIGH, LOW)):
        wait(queue, number, 0.1 * number, priority)
    assert emptied(queue) == [2, 4, 0, 3, 1, 5]
    assert (queue.idle, len(queue)) == (True, 0)


def test_priorities_hold_across_lines() -> None:
    queue = queue_of()
    for number, (line, priority) in enumerate((("a", 0), ("b", HIGH), ("c", LOW), ("b", 0), ("a", HIGH))):
        wait(queue, number, 0.0, priority, line)
    assert emptied(queue) == [1, 4, 0, 3, 2]


def test_one_that_waits_is_overtaken_for_a_time_that_is_known() -> None:
    """A point of priority is worth `aging` seconds: ten of them, at 2 s, let those of the next 20 s pass."""
    queue = queue_of(aging=2.0)
    wait(queue, 1, 100.0)
    wait(queue, 2, 119.9, HIGH)
    wait(queue, 3, 120.1, HIGH)
    assert emptied(queue) == [2, 1, 3]


def test_a_newcomer_waits_for_what_those_before_it_wait_for() -> None:
    queue = queue_of()
    wait(queue, 1, 0.0, why=ROOM)
    assert queue.why_wait("a", queue.rank(0, 1.0)) == ROOM
    assert queue.why_wait("a", queue.rank(HIGH, 1.0)) == "", "it overtakes: a worker may have room for it"
    assert queue.why_wait("a", queue.rank(HIGH, 10.5)) == ROOM, "the other one has waited for too long for that"
    assert queue.why_wait("a", queue.rank(LOW, 1.0)) == ROOM
    wait(queue, 2, 5.0, why=ROOM)
    assert queue.why_wait("a", queue.rank(HIGH, 10.5)) == ROOM, "it overtakes the second one only"


def test_a_line_knows_what_all_of_it_wait_for() -> None:
    line: Line[str] = Line()
    first, second = (Queued(n, "", "a", ROOM, 0.0, 9.0) for n in (1, 2))
    other = Queued(3, "", "a", START, 0.0, 9.0)
    line.add(first)
    line.add(second)
    assert (repr(line), line.why, len(line)) == ("<Line of 2 for room>", ROOM, 2)
    line.add(other)
    assert line.why == MIXED
    for queued in (first, second, other):
        line.remove(queued)
    line.add(other)
    assert line.why == START
    assert repr(Queued(4, "", "a", ROOM, 1.0, 2.0, HIGH)) == "<Queued 4 for room priority 10 since 1.000 until 2.000>"


def test_those_of_another_reason_hear_of_it_also_behind_a_newcomer() -> None:
    queue = queue_of()
    wait(queue, 1, 0.0, why=ROOM)
    wait(queue, 2, 1.0, HIGH, why=START)
    assert [queued.number for queued in queue.line_waits_for("a", START)] == [1]


# -- a full queue ------------------------------------------------------------------------------------------------------


def test_a_higher_priority_takes_the_slot_of_the_newest_of_the_lowest() -> None:
    queue = queue_of(3)
    for number, priority in enumerate((LOW, 0, LOW)):
        wait(queue, number, 0.1 * number, priority, line="ab"[number % 2])
    lower = queue.check_length(ROOM, 1.0, 0)
    assert lower is not None
    assert lower.number == 2
    error = queue.give_up(lower, 1.0)
    assert (type(error), queue.refused["queue_full"], len(queue)) == (QueueFull, 1, 2)
    wait(queue, 3, 1.0, 0)
    with pytest.raises(QueueFull):
        queue.check_length(ROOM, 1.0, LOW)
    lower = queue.check_length(ROOM, 1.0, 0)
    assert lower is not None
    assert lower.number == 0
    assert emptied(queue) == [1, 3, 0]


def test_nobody_gives_way_to_his_like() -> None:
    queue = queue_of(1)
    wait(queue, 1, 0.0, HIGH)
    with pytest.raises(QueueFull):
        queue.check_length(ROOM, 0.0, HIGH)


def test_sessions_and_others_do_not_take_each_others_slots() -> None:
    queue = queue_of(1)
    wait(queue, 1, 0.0, LOW, "sessions", SESSION)
    wait(queue, 2, 0.0, 0, "a")
    with pytest.raises(QueueFull):
        queue.check_length(ROOM, 0.0, 0)
    lower = queue.check_length(SESSION, 0.0, 0)
    assert lower is not None
    assert isinstance(queue.give_up(lower, 0.0), SessionsFull)


def test_one_that_waits_for_a_start_gives_way_too() -> None:
    queue: Queue[str] = Queue(QueueRules(most_starting=1))
    wait(queue, 1, 0.0, LOW, why=START)
    lower = queue.check_length(START, 0.0)
    assert lower is not None
    assert isinstance(queue.give_up(lower, 0.0), TooManyWaiting)


def test_retry_after_counts_those_that_one_would_not_overtake() -> None:
    queue = queue_of(places=1)
    queue.begin(0, 0.0)
    for number, priority in enumerate((LOW, LOW, 0, HIGH), 1):
        wait(queue, number, 0.0, priority, why=PLACE)
    queue.leave(0, 2.0)
    assert [queue.retry_after(2.0, priority) for priority in (LOW, 0, HIGH)] == [10.0, 6.0, 4.0]


# -- beside arithmetic -------------------------------------------------------------------------------------------------

arrivals = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 1.0, 7.0]), st.integers(-20, 20), st.sampled_from("ab"), st.booleans()),
    max_size=60,
)


@given(arrivals, st.sampled_from([0.1, 1.0, 5.0]))
def test_who_overtakes_whom_is_bounded_and_nothing_is_left(
    arriving: list[tuple[float, int, str, bool]], aging: float
) -> None:
    """Requests come while others begin. Of two that wait at a time, the one with the smaller rank begins first; so one
    is overtaken only by those that come within (their priority - its own) * aging seconds."""
    queue = queue_of(len(arriving) + 1, aging)
    now, waiting, begun = 0.0, list[Queued[str]](), list[tuple[Queued[str], list[Queued[str]]]]()

    def begin() -> None:
        first = queue.first(())
        assert first is not None
        assert queue.remove(first.number) is first
        waiting.remove(first)
        begun.append((first, list(waiting)))

    for number, (pause, priority, line, takes) in enumerate(arriving):
        now += pause
        waiting.append(wait(queue, number, now, priority, line))
        if takes:
            begin()
    while waiting:
        begin()
    for first, others in begun:
        for other in others:
            assert order_of(first) < order_of(other)
            if first.number > other.number:
                assert first.since - other.since <= (first.priority - other.priority) * aging + 1e-9
    assert (len(queue), queue.idle, queue.first(())) == (0, True, None)


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from("abc")), max_size=30), st.integers(0, 3))
def test_regrouping_and_rejoining_keep_the_order(members: list[tuple[int, str]], moved: int) -> None:
    queue = queue_of(100)
    for number, (priority, line) in enumerate(members):
        wait(queue, number, number / 4, priority, line)
    expected = [queued.number for queued in sorted(queue, key=order_of)]
    queue.regroup(lambda item: "ab" if members[int(item)][1] in "ab" else "c")
    queue.rejoin("ab", "c", lambda item: int(item) % 4 == moved)
    lines = {line: [queued.number for queued in each] for line, each in queue._lines.items()}
    assert all(numbers and numbers == [n for n in expected if n in numbers] for numbers in lines.values())
    assert sorted(itertools.chain(*lines.values())) == sorted(expected)
    assert emptied(queue) == expected
