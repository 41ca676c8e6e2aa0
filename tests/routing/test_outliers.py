"""Outliers: which workers are ejected and which never, by arithmetic and in a played fleet."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.routing.outliers import Ejection, Outliers, bucket_of
from sglang_router.routing.rules import OutlierRules

BUCKET = bucket_of(1200, 1, 1)
FLEET = ("a", "b", "c", "d")


def hear(
    outliers: Outliers[str],
    worker: str,
    now: float,
    *,
    good: int = 0,
    bad: int = 0,
    took: float = 0.1,
    where: int = BUCKET,
) -> None:
    for _ in range(bad):
        outliers.heard(worker, True, 0.0, where, now)
    for _ in range(good):
        outliers.heard(worker, False, took, where, now)


def well(outliers: Outliers[str], now: float, *workers: str) -> None:
    for worker in workers:
        hear(outliers, worker, now, good=20)


def held(ejections: tuple[Ejection[str], ...]) -> list[str]:
    return [ejection.worker for ejection in ejections]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_fails_where_others_do_not_is_ejected() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, good=16, bad=24)
    (ejection,) = outliers.judge(FLEET, 1.0)
    assert (ejection.worker, ejection.until, ejection.cause, ejection.degree) == ("a", 31.0, "failures", 0.6)
    assert ejection.reason == "24 of 40 requests failed in 30 s (60%); the others' median is about 5%."
    assert outliers.judge(FLEET, 30.9)[0] is ejection
    assert outliers.judge(FLEET, 31.0) == ()


@pytest.mark.parametrize(("good", "bad"), [(0, 19), (21, 20), (100, 40)])
def test_few_answers_or_few_failures_eject_nobody(good: int, bad: int) -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, good=good, bad=bad)
    assert outliers.judge(FLEET, 1.0) == ()


def test_what_makes_all_fail_is_nobodys_fault() -> None:
    outliers = Outliers[str]()
    for worker in "bcd":
        hear(outliers, worker, 0.0, good=60, bad=40)
    hear(outliers, "a", 0.0, good=20, bad=80)
    assert outliers.judge(FLEET, 1.0) == ()
    assert not outliers.panic


def test_those_that_fail_fast_and_draw_the_traffic_do_not_pass_for_the_norm() -> None:
    outliers = Outliers[str]()
    hear(outliers, "a", 0.0, bad=1000)
    hear(outliers, "b", 0.0, bad=1000)
    well(outliers, 0.0, *"cd")
    assert sorted(held(outliers.judge(FLEET, 1.0))) == ["a", "b"]


def test_failures_older_than_the_window_are_forgotten() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, bad=19)
    hear(outliers, "a", 30.0, bad=19)
    assert outliers.judge(FLEET, 30.0) == ()
    hear(outliers, "a", 31.0, bad=1)
    assert held(outliers.judge(FLEET, 31.0)) == ["a"]


@pytest.mark.parametrize(("now", "expected"), [(29.9, ["a"]), (30.0, [])])
def test_a_window_ends_though_nothing_more_is_heard(now: float, expected: list[str]) -> None:
    outliers = Outliers[str]()
    hear(outliers, "a", 0.0, bad=20)
    assert held(outliers.judge(FLEET, now)) == expected


# -- slowness ----------------------------------------------------------------------------------------------------------


def test_a_worker_far_slower_for_the_same_work_is_ejected() -> None:
    outliers = Outliers[str]()
    for worker in "bcd":
        hear(outliers, worker, 0.0, good=20, took=0.5)
    hear(outliers, "a", 0.0, good=20, took=2.5)
    (ejection,) = outliers.judge(FLEET, 1.0)
    assert (ejection.worker, ejection.cause) == ("a", "latency")
    assert ejection.degree == pytest.approx(5.0)
    assert ejection.reason == (
        "The first byte came after 2.50 s where the others need 0.50 s in like circumstances"
        " (5.0 times as long; 20 answers in 30 s)."
    )


@pytest.mark.parametrize(("others", "own"), [(0.1, 0.9), (1.0, 2.9), (10.0, 29.0)])
def test_slow_is_three_times_and_a_second(others: float, own: float) -> None:
    outliers = Outliers[str]()
    for worker in "bcd":
        hear(outliers, worker, 0.0, good=20, took=others)
    hear(outliers, "a", 0.0, good=20, took=own)
    assert outliers.judge(FLEET, 1.0) == ()


@pytest.mark.parametrize(("size", "waiting", "load"), [(2400, 1, 1), (600, 1, 1), (1200, 2, 2), (1200, 1, 2)])
def test_only_like_is_compared_with_like(size: int, waiting: int, load: int) -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, good=100, took=20.0, where=bucket_of(size, waiting, load))
    assert outliers.judge(FLEET, 1.0) == ()


def test_like_is_about_as_many_bytes_as_many_waiting_and_about_as_many_running() -> None:
    assert bucket_of(1025, 2, 4) == bucket_of(2047, 2, 7) != bucket_of(2048, 2, 7)
    assert bucket_of(1025, 2, 4) not in (bucket_of(1025, 3, 4), bucket_of(1025, 2, 8))
    assert bucket_of(0, 15, 10_000) > 0
    assert bucket_of(0, 16, 16) == 0


def test_slow_by_chance_is_not_slow() -> None:
    for spread, expected in ((1.5, ["a"]), (40.0, [])):
        outliers = Outliers[str]()
        for times in (1 / spread, spread):
            for worker in "bcd":
                hear(outliers, worker, 0.0, good=10, took=1.0 * times)
            hear(outliers, "a", 0.0, good=10, took=4.0 * times)
        assert held(outliers.judge(FLEET, 1.0)) == expected


def test_one_in_many_buckets_is_judged_by_those_where_others_are() -> None:
    outliers = Outliers[str]()
    for worker in "bcd":
        hear(outliers, worker, 0.0, good=20, took=0.5)
        hear(outliers, worker, 0.0, good=1, took=0.5, where=bucket_of(1200, 1, 9))  # three: too few to compare with
    hear(outliers, "a", 0.0, good=20, took=2.0)
    hear(outliers, "a", 0.0, good=500, took=0.5, where=bucket_of(1200, 1, 9))
    (ejection,) = outliers.judge(FLEET, 1.0)
    assert ejection.degree == pytest.approx(4.0)


def test_one_request_that_met_a_compiling_kernel_does_not_condemn() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, good=19)
    hear(outliers, "a", 0.0, good=1, took=300.0)
    assert outliers.judge(FLEET, 1.0) == ()


def test_answers_that_tell_nothing_of_latency_count_as_answers() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, good=30, where=0)
    hear(outliers, "a", 0.0, bad=20)
    assert outliers.judge(FLEET, 1.0) == ()
    hear(outliers, "a", 0.0, bad=10)
    assert held(outliers.judge(FLEET, 1.0)) == ["a"]


# -- how long ----------------------------------------------------------------------------------------------------------


def spells(outliers: Outliers[str], count: int, now: float = 0.0, *, later: float = 0.0) -> list[float]:
    """How long "a" is ejected each time, when it fails `later` seconds after it came back."""
    lengths = []
    for _ in range(count):
        well(outliers, now, *"bcd")
        hear(outliers, "a", now, bad=20)
        (ejection,) = outliers.judge(FLEET, now)
        lengths.append(ejection.until - now)
        now = ejection.until
        assert outliers.judge(FLEET, now) == ()
        outliers.judge(FLEET, now + later)
        now += later
    return lengths


def test_each_time_is_twice_as_long_up_to_a_bound() -> None:
    assert spells(Outliers(), 6) == [30.0, 60.0, 120.0, 240.0, 300.0, 300.0]


def test_well_for_as_long_as_it_was_out_is_forgiven() -> None:
    assert spells(Outliers(), 3, later=29.0) == [30.0, 60.0, 120.0]
    assert spells(Outliers(), 3, later=30.0) == [30.0, 30.0, 30.0]


def test_it_comes_back_with_a_clean_slate() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *"bcd")
    hear(outliers, "a", 0.0, bad=20)
    outliers.judge(FLEET, 0.0)
    hear(outliers, "a", 29.0, bad=100)  # requests that were in flight
    well(outliers, 29.0, *"bcd")
    assert outliers.judge(FLEET, 30.0) == ()
    hear(outliers, "a", 30.0, bad=19)
    assert outliers.judge(FLEET, 30.0) == ()
    hear(outliers, "a", 30.0, bad=1)
    assert held(outliers.judge(FLEET, 30.0)) == ["a"]


def test_a_short_ejection_ends_with_a_clean_slate_too() -> None:
    outliers = Outliers[str](OutlierRules(ejection=5.0))
    hear(outliers, "a", 0.0, bad=20)
    assert held(outliers.judge(FLEET, 0.0)) == ["a"]
    assert outliers.judge(FLEET, 5.0) == ()


# -- how many ----------------------------------------------------------------------------------------------------------


def test_the_last_worker_is_never_ejected() -> None:
    outliers = Outliers[str]()
    hear(outliers, "a", 0.0, bad=1000)
    assert outliers.judge(["a"], 1.0) == ()
    assert outliers.judge([], 1.0) == ()


def test_the_last_one_is_not_ejected_even_if_all_may_be() -> None:
    outliers = Outliers[str](OutlierRules(max_share=1.0))
    for worker, expected in (("a", ["a"]), ("b", [])):
        hear(outliers, worker, 0.0, bad=20)
        assert held(outliers.judge("ab", 0.0)) == expected


def test_when_more_than_half_would_be_out_all_are_let_in() -> None:
    outliers, now = Outliers[str](), 0.0
    for worker, expected in (("a", ["a"]), ("b", ["a", "b"]), ("c", [])):
        hear(outliers, worker, now, bad=100)
        well(outliers, now, *(other for other in FLEET if other > worker))
        assert sorted(held(outliers.judge(FLEET, now))) == expected
    assert outliers.panic
    assert outliers.judge(FLEET, 30.0) == ()
    assert not outliers.panic


def test_slow_ones_give_way_to_failing_ones_and_are_no_reason_for_panic() -> None:
    outliers = Outliers[str]()
    for worker, took in zip(FLEET, (2.0, 4.0, 0.1, 0.1), strict=True):
        hear(outliers, worker, 0.0, good=20, took=took)
    for _ in range(4):  # the quick ones have most of the answers
        well(outliers, 0.0, *"cd")
    assert held(outliers.judge(FLEET, 0.0)) == ["b", "a"]
    hear(outliers, "c", 1.0, bad=200)
    assert held(outliers.judge(FLEET, 1.0)) == ["c", "b"]
    assert not outliers.panic


def test_half_of_those_that_are_there_now() -> None:
    outliers = Outliers[str]()
    for worker in "ab":
        hear(outliers, worker, 0.0, bad=20)
    well(outliers, 0.0, *"cd")
    assert len(outliers.judge(FLEET, 0.0)) == 2
    assert outliers.judge("abc", 1.0) == ()
    assert held(outliers.judge("acd", 2.0)) == ["a"]


def test_workers_unheard_of_are_forgotten() -> None:
    outliers = Outliers[str]()
    well(outliers, 0.0, *FLEET)
    outliers.judge(FLEET, 1.0)
    assert len(outliers._records) == 4
    outliers.judge((), 40.0)
    assert not outliers._records


ANSWERS = st.tuples(st.sampled_from("abcdefg"), st.booleans(), st.sampled_from([0.1, 2.0, 50.0]), st.integers(1, 60))
STEPS = st.lists(st.tuples(st.floats(0.0, 20.0), st.lists(ANSWERS, max_size=6)), max_size=30)


@given(STEPS, st.integers(1, 7), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_never_more_than_the_share_and_never_the_last(
    steps: list[tuple[float, list[tuple[str, bool, float, int]]]], count: int, share: float
) -> None:
    outliers = Outliers[str](OutlierRules(max_share=share))
    workers = "abcdefg"[:count]
    now = 0.0
    for pause, answers in steps:
        now += pause
        for worker, failed, took, times in answers:
            hear(outliers, worker, now, good=0 if failed else times, bad=times if failed else 0, took=took)
        out = outliers.judge(workers, now)
        assert len(out) <= share * count
        assert len(out) < count
        assert len(set(held(out))) == len(out)
        assert all(ejection.worker in workers and now < ejection.until <= now + 300.0 for ejection in out)
        sums = list(outliers._records.values())
        assert all(record.answers == sum(slot.answers for slot in record.slots) for record in sums)
        assert all(
            sum(cell[0] for cell in record.cells.values())
            == sum(cell[0] for slot in record.slots for cell in slot.cells.values())
            for record in sums
        )
        counted = sum(cell[0] for record in sums for cell in record.cells.values())
        assert sum(cell[0] for cell in outliers._pool.values()) == counted


# -- played ------------------------------------------------------------------------------------------------------------


class Engine:
    """Serves so many requests at once, first come first served: reads at `speed` bytes a second, then writes."""

    def __init__(self, seats: int = 8, speed: float = 1e5, writing: float = 0.5, **ills: float) -> None:
        self.seats, self.speed, self.writing = seats, speed, writing
        self.slower = ills.get("slower", 1.0)
        self.failing = ills.get("failing", 0.0)
        self.reading = self.busy = 0
        self.queue: deque[Sent] = deque()

    @property
    def waiting(self) -> int:
        return self.reading + len(self.queue)

    @property
    def load(self) -> int:
        return self.busy + len(self.queue)


class Sent(NamedTuple):
    at: float
    size: int
    bucket: int


Choose = Callable[["Played", list[int]], int]


class Played:
    """A fleet under virtual time: requests come, are sent, read and heard of; each second is judged."""

    def __init__(self, engines: list[Engine], choose: Choose, seed: int = 1) -> None:
        self.engines = engines
        self.choose = choose
        self.rng = random.Random(seed)
        self.outliers = Outliers[int]()
        self.turn = 0
        self.asked = 0
        self.out: dict[int, list[float]] = {}  # by worker, the seconds at which it was ejected
        self._held: set[int] = set()
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, Sent | None]] = []  # when, ..., where; whose first byte, or an end

    def run(self, seconds: float, rate: float, longest: int = 16) -> None:
        """Requests come at random, `rate` a second in the mean, of up to 2 ** longest bytes."""
        arrival, judgement = self.rng.expovariate(rate), 1.0
        while (now := min(arrival, judgement, self._events[0][0] if self._events else math.inf)) < seconds:
            if now == judgement:
                self._judge(now)
                judgement += 1.0
            elif now == arrival:
                self._send(int(2 ** self.rng.uniform(7, longest)), now)
                arrival += self.rng.expovariate(rate)
            else:
                self._happened()

    def _judge(self, now: float) -> None:
        self._held = {e.worker for e in self.outliers.judge(range(len(self.engines)), now)}
        for worker in self._held:
            self.out.setdefault(worker, []).append(now)

    def _send(self, size: int, now: float) -> None:
        self.asked += 1
        number = self.choose(self, [n for n in range(len(self.engines)) if n not in self._held])
        engine = self.engines[number]
        engine.queue.append(Sent(now, size, bucket_of(size, engine.waiting + 1, engine.load + 1)))
        self._seat(number, now)

    def _seat(self, number: int, now: float) -> None:
        engine = self.engines[number]
        while engine.queue and engine.busy < engine.seats:
            sent = engine.queue.popleft()
            engine.busy += 1
            engine.reading += 1
            self._later(now, 0.3 + sent.size / engine.speed, number, sent)

    def _later(self, now: float, seconds: float, number: int, what: Sent | None) -> None:
        takes = seconds * self.engines[number].slower * self.rng.uniform(0.7, 1.3)
        heapq.heappush(self._events, (now + takes, next(self._order), number, what))

    def _happened(self) -> None:
        now, _, number, sent = heapq.heappop(self._events)
        engine = self.engines[number]
        if sent is None:
            engine.busy -= 1
            self._seat(number, now)
        else:
            engine.reading -= 1
            self.outliers.heard(number, self.rng.random() < engine.failing, now - sent.at, sent.bucket, now)
            self._later(now, engine.writing, number, None)


def in_turn(played: Played, candidates: list[int]) -> int:
    played.turn += 1
    return candidates[played.turn % len(candidates)]


def least_load(played: Played, candidates: list[int]) -> int:
    return min(candidates, key=lambda n: (played.engines[n].load, (n - played.asked) % len(played.engines)))


def better_of_two(played: Played, candidates: list[int]) -> int:
    return min(played.rng.choices(candidates, k=2), key=lambda n: played.engines[n].load)


def mostly_the_first(played: Played, candidates: list[int]) -> int:
    """Each worker gets half of what the one before it gets."""
    return candidates[min(int(-math.log2(1.0 - played.rng.random())), len(candidates) - 1)]


CHOICES = [in_turn, least_load, better_of_two, mostly_the_first]


@pytest.mark.parametrize("choose", [least_load, better_of_two])
@pytest.mark.parametrize("rate", [25.0, 40.0])
def test_one_of_eight_is_slow_and_one_fails(choose: Choose, rate: float) -> None:
    """Requests a second for all eight; they could do 70."""
    engines = [Engine(slower=5.0), Engine(failing=0.6), *(Engine() for _ in range(6))]
    played = Played(engines, choose)
    played.run(180.0, rate)
    assert played.out.keys() == {0, 1}
    assert all(times[0] <= 45.0 and len(times) >= 90 for times in played.out.values())


def test_under_a_policy_blind_to_load_the_failing_one_is_found_and_no_healthy_one() -> None:
    played = Played([Engine(slower=5.0), Engine(failing=0.6), *(Engine() for _ in range(6))], in_turn)
    played.run(180.0, 40.0)
    assert 1 in played.out
    assert played.out.keys() <= {0, 1}


@settings(max_examples=40, derandomize=True)  # chance is at play: the same examples each time
@given(
    st.integers(2, 6),
    st.sampled_from([1, 4, 16]),
    st.sampled_from(CHOICES),
    st.sampled_from([0.2, 0.9, 1.0, 1.5, 4.0]),
    st.sampled_from([0.0, 0.5, 20.0]),
    st.integers(0, 1 << 16),
)
def test_equal_workers_that_do_well_are_never_ejected(
    count: int, seats: int, choose: Choose, load: float, writing: float, seed: int
) -> None:
    """However the requests are spread, and up to four times what the workers can do."""
    played = Played([Engine(seats, writing=writing) for _ in range(count)], choose, seed)
    reading = 0.3 + (2**16 - 2**7) / (math.log(2) * 9) / 1e5  # seconds, in the mean
    rate = load * count * seats / (reading + writing)
    played.run(min(90.0, 2500 / rate), rate)
    assert played.out == {}


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(20, 200), st.floats(0.0, 1e6), st.floats(0.0, 1.3))
def test_one_that_fails_everything_is_out_within_a_window(count: int, answers: int, start: float, pause: float) -> None:
    outliers, workers = Outliers[int](), range(count)
    now = start
    for number in range(answers):
        for worker in workers:
            outliers.heard(worker, worker == 0, 0.1, BUCKET, now)
        found = [ejection.worker for ejection in outliers.judge(workers, now)]
        assert found == ([0] if number >= 19 else [])
        if found:
            assert now - start <= 30.0
            return
        now += pause
