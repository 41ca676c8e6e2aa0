"""How many workers there should be, in virtual time: rules one by one, laws under Hypothesis, and simulated fleets."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.autoscale.scaler import Decision, Flow, Reading, Scaler, ScalingRules, wants_of

QUICK = ScalingRules(fewest=1, most=10, step=2, up_cooldown=15.0, down_cooldown=60.0)


def feed(scaler: Scaler, reading: Reading, times: Iterable[float]) -> list[Decision]:
    """The same reading again and again."""
    return [scaler.decide(reading, now) for now in times]


def seconds(first: int, last: int) -> list[float]:
    return [float(now) for now in range(first, last)]


def settled(reading: Reading, rules: ScalingRules = QUICK, desired: int = 1) -> Scaler:
    """A scaler that has seen `desired` workers long enough not to owe them to the start any more."""
    scaler = Scaler(rules)
    busy = Reading(ready=desired, load=math.ceil(rules.target_load * desired))
    feed(scaler, busy, [-rules.down_cooldown - 1.0, -0.5])
    assert scaler.desired == desired
    return scaler


# -- what each measure asks for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "measure", "wants", "sentence"),
    [
        (Reading(ready=1, load=70), "load", 3, "load: 70 requests in flight, target 32 per worker, wants 3"),
        (Reading(ready=1, load=37, queue=37), "queue", 10, "queue: 37 queued, target 4 per worker, wants 10"),
        (
            Reading(ready=1, load=2, tokens=200_000),
            "tokens",
            4,
            "tokens: 200000 prompt tokens to compute, target 65536 per worker, wants 4",
        ),
        (Reading(ready=4, load=9, ttft=3.0), "ttft", 6, "ttft: 3 s until the first token, goal 2 s, wants 6"),
        (Reading(ready=4, load=9, ttft=60.0), "ttft", 8, "ttft: 60 s until the first token, goal 2 s, wants 8"),
        (Reading(ready=0, load=9, ttft=60.0), "ttft", None, ""),  # nobody to make a token: no measure of how many
        (Reading(ready=3, load=0, ttft=60.0), "ttft", None, ""),
        (Reading(ready=3, load=5), "ttft", None, ""),
        (Reading(ready=3, load=0), "load", 0, "load: 0 requests in flight, target 32 per worker, wants 0"),
        (Reading(ready=3, load=64), "load", 2, "load: 64 requests in flight, target 32 per worker, wants 2"),
    ],
)
def test_a_measure_wants(reading: Reading, measure: str, wants: int | None, sentence: str) -> None:
    rules = ScalingRules(ttft_goal=2.0)
    found = {want.measure: want for want in wants_of(reading, rules)}
    assert found.keys() == {"load", "queue", "tokens"} | ({"ttft"} if reading.ttft and wants else set())
    if wants is not None:
        assert (found[measure].wants, str(found[measure])) == (wants, sentence)


def test_without_a_goal_the_time_to_first_token_wants_nothing() -> None:
    assert "ttft" not in {want.measure for want in wants_of(Reading(ready=1, load=1, ttft=9.0), ScalingRules())}


def test_the_largest_wins_and_says_so() -> None:
    scaler = settled(Reading(), QUICK)
    decisions = feed(scaler, Reading(ready=1, load=70, queue=37, tokens=70_000), seconds(0, 4))
    assert decisions[-1].desired == 3
    assert decisions[-1].reason == "queue: 37 queued, target 4 per worker, wants 10; 2 at a time"
    assert {want.measure: want.wants for want in decisions[-1].wants} == {"load": 3, "queue": 10, "tokens": 2}


# -- up ----------------------------------------------------------------------------------------------------


def test_a_spike_of_a_second_is_no_demand() -> None:
    scaler = settled(Reading())
    spike, calm = Reading(ready=1, load=90), Reading(ready=1, load=3)
    readings = [calm, spike, spike, calm, spike, spike, calm]
    decisions = [scaler.decide(reading, float(now)) for now, reading in enumerate(readings)]
    assert {decision.desired for decision in decisions} == {1}
    assert not any(decision.changed for decision in decisions)
    assert decisions[1].reason == (
        "load: 90 requests in flight, target 32 per worker, wants 3; added when this lasts 3 s"
    )


def test_steps_and_cooldown_on_the_way_up() -> None:
    scaler = settled(Reading())
    decisions = feed(scaler, Reading(ready=1, load=32 * 7), seconds(0, 60))
    ups = [(decision.at, decision.desired) for decision in decisions if decision.changed]
    assert ups == [(3.0, 3), (18.0, 5), (33.0, 7)]
    assert decisions[10].reason.endswith("wants 7; next addition in 8 s")
    assert decisions[-1].reason.endswith("wants 7")


@pytest.mark.parametrize("rules", [QUICK, ScalingRules(fewest=0, most=10, up_cooldown=15.0, down_cooldown=60.0)])
def test_paused_workers_are_neither_too_few_nor_idle(rules: ScalingRules) -> None:
    scaler = settled(Reading(), rules, desired=3)
    waiting = Reading(ready=3, paused=3, load=500, held=500, queue=500)
    idle = Reading(ready=3, paused=1)
    decisions = [*feed(scaler, waiting, seconds(0, 100)), *feed(scaler, idle, seconds(100, 300))]
    assert {decision.desired for decision in decisions} == {3}
    assert not any(decision.changed for decision in decisions)
    assert decisions[-1].reason == "paused: 1 worker by the control plane, so that the number stays"
    cooling_down = feed(scaler, Reading(ready=3), seconds(300, 350))
    assert {decision.desired for decision in cooling_down} == {3}
    assert scaler.decide(Reading(ready=3), 400.0).desired < 3


def test_never_more_than_the_most() -> None:
    scaler = settled(Reading())
    decisions = feed(scaler, Reading(ready=1, load=10_000), seconds(0, 300))
    assert max(decision.desired for decision in decisions) == decisions[-1].desired == 10
    assert decisions[-1].reason.endswith("wants 313; MAX is 10")


def test_workers_that_come_count_as_there_and_more_demand_adds_more() -> None:
    scaler = settled(Reading())
    feed(scaler, Reading(ready=1, load=96), seconds(0, 4))
    assert scaler.desired == 3
    loading = feed(scaler, Reading(ready=1, coming=2, load=96), seconds(4, 124))
    assert {decision.desired for decision in loading} == {3}
    queue = Reading(ready=1, coming=2, load=500, inflow=1.5)  # one and a half worker, or two with room, keep up
    waiting = feed(scaler, queue, seconds(124, 240))
    assert {decision.desired for decision in waiting} == {3}
    assert waiting[-1].reason.endswith("wants 16; 2 starting")
    more = feed(scaler, Reading(ready=1, coming=2, load=500, inflow=4.0), seconds(240, 244))
    (added,) = [decision for decision in more if decision.changed]
    assert added.desired == 5
    assert added.reason.endswith("wants 16; 5 keep up with the arrivals")


def test_flow() -> None:
    flow = Flow()
    ended = load = 0
    told = []
    for now in range(200):  # three come and one ends, each second
        told.append(flow.say(1, ended, load, float(now)))
        ended, load = ended + 1, load + 2
    assert told[:10] == [None] * 10
    assert set(told[10:]) == {3.0}
    assert flow.say(2, ended, load, 200.0) is None
    assert flow.say(2, ended, load, 230.0) is None  # nothing ended since
    assert flow.say(2, ended + 4, load - 4, 231.0) == 0.0


def test_the_time_to_first_token_does_not_pile_up_while_a_model_loads() -> None:
    """It stays bad until the new worker is there; what is coming must not be multiplied by it."""
    rules = ScalingRules(fewest=1, most=16, ttft_goal=1.0)
    scaler = settled(Reading(), rules)
    for now in range(120):
        scaler.decide(Reading(ready=1, coming=scaler.desired - 1, load=5, ttft=1.0 + now), float(now))
    assert scaler.desired == 2


# -- down --------------------------------------------------------------------------------------------------


def test_down_after_the_cooldown_one_at_a_time_to_what_was_needed_last() -> None:
    scaler = settled(Reading(), desired=5)
    decisions = feed(scaler, Reading(ready=5, load=40), seconds(0, 120))
    downs = [(decision.at, decision.desired) for decision in decisions if decision.changed]
    assert downs == [(60.0, 4), (66.0, 3), (72.0, 2)]
    assert decisions[60].reason == "fewer: at most 2 needed in 60 s"
    assert decisions[61].reason == "fewer: at most 2 needed; next removal in 5 s"
    assert decisions[-1].reason == "load: 40 requests in flight, target 32 per worker, wants 2"


def test_a_moment_of_need_begins_the_cooldown_anew() -> None:
    scaler = settled(Reading(), desired=3)
    feed(scaler, Reading(ready=3, load=10), seconds(0, 50))
    scaler.decide(Reading(ready=3, load=90), 50.0)
    decisions = feed(scaler, Reading(ready=3, load=10), seconds(51, 120))
    assert [decision.at for decision in decisions if decision.changed] == [110.0, 116.0]


def test_the_last_needed_number_of_the_window_is_the_floor() -> None:
    scaler = settled(Reading(), desired=6)
    feed(scaler, Reading(ready=6, load=32 * 4 - 28), seconds(0, 70))
    assert scaler.desired == 4  # 100 requests: 4 workers, and 4 with room (100 / 25.6 = 3.9)


def test_room_to_spare_at_a_boundary() -> None:
    """33 requests want two; 30 would do with one, but without room: it stays."""
    scaler = settled(Reading())
    feed(scaler, Reading(ready=1, load=33), seconds(0, 4))
    decisions = feed(scaler, Reading(ready=2, load=30), seconds(4, 1000))
    assert {decision.desired for decision in decisions} == {2}
    assert decisions[-1].reason.endswith("wants 1; 2 leave room to spare")
    assert feed(scaler, Reading(ready=2, load=25), seconds(1000, 1070))[-1].desired == 1


# -- zero --------------------------------------------------------------------------------------------------

ZERO = ScalingRules(fewest=0, most=4, down_cooldown=60.0)


def test_the_last_goes_only_when_nothing_was_asked_for_the_cooldown() -> None:
    scaler = settled(Reading(), ZERO)
    seen = [scaler.decide(Reading(ready=1, idle=now % 50), float(now)) for now in range(200)]
    assert {decision.desired for decision in seen} == {1}  # a short request between two readings, every 50 s
    assert seen[-1].reason == "idle for 49 s; the last worker is removed after 60 s"
    seen = [scaler.decide(Reading(ready=1, idle=float(now)), 200.0 + now) for now in range(70)]
    assert [(d.at, d.desired) for d in seen if d.changed] == [(260.0, 0)]
    assert seen[60].reason == "idle: no request for 60 s"
    assert seen[-1].reason == "idle: nothing to do"


def test_a_model_that_loads_for_longer_than_the_cooldown_is_not_idle() -> None:
    scaler = Scaler(ZERO)
    loading = feed(scaler, Reading(coming=1, idle=300.0), seconds(0, 200))
    assert {decision.desired for decision in loading} == {1}
    assert loading[-1].reason == "idle: the last worker still starts"


def test_a_held_request_wakes_at_once() -> None:
    scaler = settled(Reading(), ZERO)
    feed(scaler, Reading(ready=1, idle=100.0), seconds(0, 61))
    assert scaler.desired == 0
    woken = scaler.decide(Reading(load=1, held=1, queue=1), 61.0)
    assert (woken.desired, woken.changed) == (1, True)
    assert woken.reason == "wake: 1 queued and no worker is ready"
    many = Scaler(ZERO)
    assert many.decide(Reading(load=50, held=50, queue=50), 0.0).desired == 2  # the step


def test_with_the_fewest_above_zero_nothing_goes_below() -> None:
    scaler = settled(Reading(), QUICK, desired=2)
    assert feed(scaler, Reading(ready=2, idle=1e6), seconds(0, 500))[-1].desired == 1
    assert scaler.decide(Reading(ready=1, idle=1e6), 500.0).reason.endswith("wants 0; MIN is 1")


# -- the start, and failures -------------------------------------------------------------------------------


def test_what_is_found_at_the_start_is_wanted_for_a_cooldown() -> None:
    scaler = Scaler(QUICK)
    first = scaler.decide(Reading(coming=2), 0.0)
    assert (first.desired, first.changed) == (2, False)
    more = scaler.decide(Reading(ready=2, coming=2), 10.0)  # others registered by and by
    assert (more.desired, more.reason[:35]) == (4, "found: 4 workers at the start; load")
    assert feed(scaler, Reading(ready=4), seconds(11, 70))[-1].desired == 4
    assert feed(scaler, Reading(ready=4), seconds(70, 72))[-1].desired == 3


def test_with_a_short_cooldown_too_there_is_time_to_be_found() -> None:
    scaler = Scaler(ScalingRules(fewest=0, down_cooldown=1.0))
    assert scaler.decide(Reading(), 0.0).desired == 0
    assert scaler.decide(Reading(coming=2), 3.0).desired == 2
    assert scaler.decide(Reading(ready=2), 5.0).desired == 1
    assert scaler.decide(Reading(ready=2), 6.0).desired == 1  # one was to go: it is not found again


def test_too_few_at_the_start_is_told_at_once() -> None:
    first = Scaler(ScalingRules(fewest=2)).decide(Reading(), 0.0)
    assert (first.desired, first.current, first.changed) == (2, 0, True)


def test_more_than_the_most_at_the_start_is_told_too() -> None:
    first = Scaler(ScalingRules(most=2)).decide(Reading(ready=3), 0.0)
    assert (first.desired, first.current, first.changed) == (2, 3, True)


def test_a_failed_worker_is_not_there_and_is_told_once() -> None:
    scaler = settled(Reading(), desired=3)
    decisions = feed(scaler, Reading(ready=2, failed=1, load=60), seconds(0, 3))
    assert [decision.changed for decision in decisions] == [True, False, False]
    assert (decisions[0].desired, decisions[0].current) == (3, 2)
    assert decisions[0].reason.startswith("failed: 1 down or unhealthy, 2 of 3 left; ")
    assert not scaler.decide(Reading(ready=3, load=60), 3.0).changed  # replaced, or well again
    assert not scaler.decide(Reading(ready=3, failed=1, load=60), 4.0).changed  # one too many, and it failed


def test_when_the_next_may_come() -> None:
    scaler = settled(Reading())
    (*_, up) = feed(scaler, Reading(ready=1, load=90), seconds(0, 4))
    assert scaler.desired == 3
    assert (scaler.next_up(4.0), scaler.next_down(up, 4.0)) == (14.0, None)  # needed at this very moment
    (*_, calm) = feed(scaler, Reading(ready=3, load=3), seconds(4, 14))
    assert scaler.next_down(calm, 14.0) == 3.0 + 60.0 - 14.0
    full = settled(Reading(), desired=10)
    assert full.next_up(0.0) is None
    zero = settled(Reading(), ZERO)
    (*_, quiet) = feed(zero, Reading(ready=1, idle=10.0), [0.0])
    assert zero.next_down(quiet, 0.0) == pytest.approx(59.5)  # load until half a second before


# -- laws --------------------------------------------------------------------------------------------------

RULES = st.builds(
    lambda fewest, extra, step, up, down, goal: ScalingRules(
        fewest=fewest, most=max(1, fewest + extra), step=step, up_cooldown=up, down_cooldown=down, ttft_goal=goal
    ),
    st.integers(0, 4),
    st.integers(0, 12),
    st.integers(1, 4),
    st.sampled_from([0.0, 1.0, 7.0, 15.0]),
    st.sampled_from([0.0, 5.0, 30.0, 100.0]),
    st.sampled_from([None, 0.5, 2.0]),
)
DEMAND = st.tuples(st.integers(0, 500), st.integers(0, 80), st.integers(0, 1_000_000), st.floats(0.0, 100.0))


def reading_of(demand: tuple[int, int, int, float], ready: int, coming: int = 0) -> Reading:
    load, queue, tokens, work = demand
    held = min(load, queue) if not ready else 0
    ttft = work / ready if ready else None
    return Reading(ready=ready, coming=coming, load=load, held=held, queue=min(load, queue), tokens=tokens, ttft=ttft)


@given(RULES, DEMAND, st.integers(0, 20))
def test_a_constant_demand_settles_for_good(rules: ScalingRules, demand: tuple[int, int, int, float], n: int) -> None:
    scaler = Scaler(rules)
    desired, ready, numbers = n, n, []
    for now in range(0, 1200, 3):
        ready = desired  # whoever acts on it is quick
        desired = scaler.decide(reading_of(demand, ready), float(now)).desired
        numbers.append(desired)
    assert len(set(numbers[-100:])) == 1
    moves = [b - a for a, b in itertools.pairwise(numbers) if a != b]
    assert all(move > 0 for move in moves) or all(move < 0 for move in moves)


@given(RULES, st.lists(DEMAND, min_size=1, max_size=60), st.integers(1, 20))
def test_bounds_steps_and_cooldowns_always_hold(
    rules: ScalingRules, demands: list[tuple[int, int, int, float]], pause: int
) -> None:
    scaler = Scaler(rules)
    ups: list[float] = []
    before = None
    for n, demand in enumerate(demands):
        now = float(n * pause)
        decision = scaler.decide(reading_of(demand, ready=scaler.desired), now)
        assert rules.fewest <= decision.desired <= rules.most
        assert decision.reason.isprintable()
        if before is not None:
            assert -1 <= decision.desired - before <= rules.step
            assert decision.changed == (decision.desired != before)
            if decision.desired > before:
                assert before == 0 or not ups or now - ups[-1] >= rules.up_cooldown
                ups.append(now)
            if decision.desired < before and ups:
                assert now - ups[-1] >= rules.down_cooldown
        before = decision.desired


@given(RULES, st.lists(st.integers(0, 50), min_size=2, max_size=100))
def test_a_rising_demand_never_takes_away(rules: ScalingRules, rises: list[int]) -> None:
    scaler = Scaler(rules)
    numbers = []
    for now, load in enumerate(itertools.accumulate(rises)):
        reading = Reading(ready=scaler.desired, load=load, queue=load // 3, idle=0.0)
        numbers.append(scaler.decide(reading, float(now * 3)).desired)
    assert numbers == sorted(numbers)


# -- simulated fleets --------------------------------------------------------------------------------------


class Fleet:
    """Workers that run 16 requests at once, 8 s each, and need two minutes to load; one queue before them."""

    SLOTS, TAKES, LOADS = 16, 8.0, 120

    def __init__(self, rules: ScalingRules, ready: int) -> None:
        self.scaler = Scaler(rules)
        self.ready = ready
        self.coming: deque[int] = deque()  # when each will be ready
        self.running: list[float] = []
        self.waiting: deque[float] = deque()
        self.waits: list[float] = []
        self.numbers: list[int] = []
        self.idle = 0.0
        self.flow = Flow()

    def run(self, arrivals: Callable[[int], int], start: int, stop: int) -> list[int]:
        """One second after the other; the numbers of workers decided."""
        for now in range(start, stop):
            self._second(float(now), arrivals(now))
        return self.numbers[start:stop]

    def _second(self, now: float, arrivals: int) -> None:
        while self.coming and self.coming[0] <= now:
            self.coming.popleft()
            self.ready += 1
        while self.running and self.running[0] <= now:
            heapq.heappop(self.running)
        self.waiting.extend([now] * arrivals)
        while self.waiting and len(self.running) < self.ready * self.SLOTS:
            self.waits.append(now - self.waiting.popleft())
            heapq.heappush(self.running, now + self.TAKES)
        load = len(self.running) + len(self.waiting)
        self.idle = 0.0 if load else self.idle + 1.0
        held = 0 if self.ready else len(self.waiting)
        oldest = now - self.waiting[0] if self.waiting else 0.0
        reading = Reading(
            ready=self.ready,
            coming=len(self.coming),
            load=load,
            held=held,
            queue=len(self.waiting),
            ttft=oldest,
            inflow=self.flow.say(self.ready, len(self.waits) - len(self.running), load, now),
            idle=self.idle,
        )
        decision = self.scaler.decide(reading, now)
        self.numbers.append(decision.desired)
        self._obey(decision.desired, now)

    def _obey(self, desired: int, now: float) -> None:
        for _ in range(desired - self.ready - len(self.coming)):
            self.coming.append(int(now) + self.LOADS)
        for _ in range(self.ready + len(self.coming) - desired):
            if self.coming:
                self.coming.pop()
            else:
                self.ready -= 1


def changes(numbers: list[int]) -> int:
    return sum(a != b for a, b in itertools.pairwise(numbers))


FLEET = ScalingRules(fewest=1, most=12, target_load=14.0, target_queue=8.0, step=2, up_cooldown=60.0)


def test_a_burst_is_met_and_forgotten() -> None:
    fleet = Fleet(FLEET, 1)
    fleet.run(lambda now: 1, 0, 400)
    burst = fleet.run(lambda now: 8, 400, 1400)  # 64 at work: 5 workers at 14 each
    assert max(burst) <= 12
    assert burst[-1] >= 5
    assert not fleet.waiting
    assert burst == sorted(burst[:200]) + burst[200:]  # first up only
    calm = fleet.run(lambda now: 1, 1400, 3000)
    assert calm == sorted(calm, reverse=True)
    assert calm[250] == burst[-1]
    assert calm[-1] == 1


def test_a_ramp_is_followed() -> None:
    fleet = Fleet(FLEET, 1)
    numbers = fleet.run(lambda now: 1 + now // 300, 0, 2400)  # to 8 per second
    assert numbers == sorted(numbers)
    assert 5 <= numbers[-1] <= 8
    assert sorted(fleet.waits)[len(fleet.waits) * 9 // 10] <= 60.0


def test_a_day_of_chance_arrivals_does_not_flap() -> None:
    """Poisson arrivals whose rate swings between 1 and 7 per second, four times in four hours."""
    rng = random.Random(5)

    def arrivals(now: int) -> int:
        return poisson(rng, 4.0 - 3.0 * math.cos(now * math.tau / 3600))

    fleet = Fleet(FLEET, 1)
    numbers = fleet.run(arrivals, 0, 4 * 3600)
    assert changes(numbers) <= 4 * 2 * 8
    turns = [b - a for a, b in itertools.pairwise(numbers) if a != b]
    assert sum((a > 0) != (b > 0) for a, b in itertools.pairwise(turns)) <= 4 * 3
    assert sorted(fleet.waits)[len(fleet.waits) * 9 // 10] <= 30.0
    assert sum(numbers) / len(numbers) <= 6.0  # 12 all the time would be the other way to serve this


def poisson(rng: random.Random, rate: float) -> int:
    """How many come in a second."""
    count, at = 0, rng.expovariate(rate)
    while at < 1.0:
        count += 1
        at += rng.expovariate(rate)
    return count


def test_a_fleet_that_sleeps_wakes_and_serves() -> None:
    fleet = Fleet(ScalingRules(fewest=0, most=4, target_load=14.0, target_queue=8.0), 1)
    assert fleet.run(lambda now: 0, 0, 400)[-1] == 0
    awake = fleet.run(lambda now: int(now == 400), 400, 900)
    assert awake[0] == 1
    assert fleet.waits == [120.0]
    assert max(awake) == 1
    assert awake[-1] == 0
