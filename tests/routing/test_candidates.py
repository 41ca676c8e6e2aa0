"""Who is a candidate for the moment: slow start, room, outliers, lost and given-up processes, fleets that grow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Log, any_policy, spec
from sglang_router.errors import NoWorkers, Unavailable, WorkersFull, WorkersStarting
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules, OutlierRules
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

SLOW = 30.0


def a_fleet(count: int, *, slow_start: float = SLOW, **rules: Any) -> tuple[Fleet, Log, list[Worker]]:
    """Workers whose slow start is long over at moment 100."""
    log, ids = Log(), itertools.count()
    fleet = Fleet(log, lambda: f"id{next(ids)}", any_policy, FleetRules(slow_start=slow_start, **rules))
    workers = [fleet.add(spec(f"w{n}", checked=True), 0.0) for n in range(count)]
    for worker in workers:
        fleet.probed(worker, None, 0.0)
    return fleet, log, workers


def newcomer(fleet: Fleet, now: float) -> Worker:
    worker = fleet.add(spec("new", checked=True), now)
    fleet.probed(worker, None, now)
    return worker


def test_a_newcomer_gets_one_request_first_and_its_share_with_time() -> None:
    fleet, _, old = a_fleet(2)
    for worker in old:
        for _ in range(10):
            fleet.lease(worker)
    new = newcomer(fleet, 100.0)
    allowed = {}
    for now in (100.0, 106.0, 115.0, 124.0, 129.9, 130.0):
        while new in fleet.candidates(now) and new.load < 100:
            fleet.lease(new)
        allowed[now] = new.load
    assert allowed == {100.0: 1, 106.0: 2, 115.0: 5, 124.0: 8, 129.9: 10, 130.0: 100}


def test_a_newcomer_takes_part_while_the_others_have_nothing_to_do() -> None:
    fleet, _, old = a_fleet(2)
    new = newcomer(fleet, 100.0)
    assert fleet.candidates(100.0) == (*old, new)
    fleet.lease(new)
    assert fleet.candidates(100.0) == tuple(old)


def test_where_all_are_new_nobody_is_held_back() -> None:
    fleet, _, workers = a_fleet(2)
    for _ in range(5):
        fleet.lease(workers[0])
    assert fleet.candidates(1.0) == tuple(workers)


def test_the_last_one_able_is_never_held_back() -> None:
    fleet, _, (old,) = a_fleet(1)
    new = newcomer(fleet, 100.0)
    fleet.lease(old)
    fleet.lease(new)
    assert fleet.candidates(100.0) == (old,)
    fleet.set_draining(old, True)
    assert fleet.candidates(100.0) == (new,)


def test_the_same_object_comes_again_while_the_same_are_held_back() -> None:
    fleet, _, _ = a_fleet(2)
    fleet.lease(newcomer(fleet, 100.0))
    (pool,) = fleet.pools
    assert len(pool.candidates(100.0)) == 2
    assert pool.candidates(100.0) is pool.candidates(100.1)


def test_a_slow_start_of_nothing_is_none() -> None:
    fleet, _, old = a_fleet(1, slow_start=0.0)
    new = newcomer(fleet, 100.0)
    fleet.lease(new)
    assert fleet.candidates(100.0) == (*old, new)


def test_a_worker_that_came_back_empty_starts_slowly() -> None:
    fleet, log, (one, other) = a_fleet(2)
    fleet.lease(one).close(Outcome.REFUSED, 100.0)
    fleet.probed(one, None, 100.5)
    assert "restarted" in log.whats(one)
    fleet.lease(one)
    assert fleet.candidates(100.5) == (other,)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4),
    st.floats(100.0, 140.0),
)
def test_held_back_are_only_newcomers_above_their_share(
    loads: list[int], newcomers: list[tuple[int, int]], now: float
) -> None:
    fleet, _, old = a_fleet(len(loads))
    for worker, load in zip(old, loads, strict=True):
        worker.load = load
    mean = sum(loads) / len(loads)
    fresh = []
    for n, (came, load) in enumerate(newcomers):
        worker = fleet.add(spec(f"n{n}", checked=True), float(came))
        fleet.probed(worker, None, 60.0 + came)
        worker.load = load
        fresh.append(worker)
    able = fleet.candidates(now)
    assert set(old) <= set(able)
    warm = [*old, *(w for w in fresh if w.warm_at <= now)]
    mean = sum(w.load for w in warm) / len(warm)
    for worker in fresh:
        share = 1.0 - (worker.warm_at - now) / SLOW
        held_back = worker.warm_at > now and worker.load >= max(1.0, mean * share)
        assert (worker in able) is not held_back


# -- processes that are gone -------------------------------------------------------------------------------------------


def test_a_lost_worker_is_out_at_once_empty_and_starting() -> None:
    fleet, log, (one, other) = a_fleet(2)
    for _ in range(4):
        fleet.lease(one).close(Outcome.FAILED, 100.0)
    assert one.breaker is Breaker.OPEN
    fleet.lost(one, 100.0)
    assert (one.health, one.breaker, one.since, one.circuit.failures) == (Health.STARTING, Breaker.CLOSED, 100.0, 0)
    assert log.whats(one)[-1] == "restarted"
    assert fleet.candidates(100.0) == (other,)
    fleet.probed(one, "refused", 101.0, refused=True)
    fleet.probed(one, None, 102.0)
    assert log.moves("health")[-2:] == [("healthy", "starting"), ("starting", "healthy")]
    assert fleet.candidates(102.0) == (one, other)


def test_its_time_to_start_counts_from_the_loss() -> None:
    fleet, _, (one,) = a_fleet(1, startup_timeout=10.0)
    fleet.lost(one, 100.0)
    states = []
    for now in (109.0, 111.0):
        fleet.probed(one, "refused", now)
        states.append(one.health)
    assert states == [Health.STARTING, Health.UNHEALTHY]


def test_all_lost_means_that_they_are_starting() -> None:
    fleet, _, workers = a_fleet(2)
    for worker in workers:
        fleet.lost(worker, 100.0)
    assert isinstance(fleet.unavailable(100.0), WorkersStarting)


def test_a_worker_given_up_is_no_candidate_whatever_a_check_finds() -> None:
    fleet, _, (one, other) = a_fleet(2)
    fleet.down(one, "it was restarted 5 times in 600 s")
    fleet.probed(one, None, 100.0)
    assert (one.health, one.last_error) == (Health.DOWN, "it was restarted 5 times in 600 s")
    for _ in range(3):
        fleet.probed(other, "sick", 101.0)
    assert other.health is Health.UNHEALTHY
    assert fleet.candidates(101.0) == (other,)  # all sick at once: those that may be there


def test_only_given_up_workers_are_not_worth_waiting_for() -> None:
    fleet, _, (one,) = a_fleet(1)
    fleet.down(one, "gone")
    assert fleet.candidates(100.0) == ()
    assert type(fleet.unavailable(100.0)) is Unavailable


@pytest.mark.parametrize("then", ["lost", "down"])
def test_nothing_happens_to_a_removed_worker(then: str) -> None:
    fleet, log, (one,) = a_fleet(1)
    fleet.remove(one)
    if then == "lost":
        fleet.lost(one, 100.0)
    else:
        fleet.down(one, "gone")
    assert one.health is Health.HEALTHY
    assert log.whats(one)[-1] == "removed"


def test_requests_may_wait_for_a_worker_that_is_drained_to_be_restarted() -> None:
    fleet, _, (one,) = a_fleet(1)
    fleet.set_draining(one, True)
    assert type(fleet.unavailable(100.0)) is Unavailable
    fleet.set_draining(one, True, returning=True)
    assert isinstance(fleet.unavailable(100.0), WorkersStarting)
    fleet.set_draining(one, False)
    assert not one.returning


def test_requests_may_wait_for_the_first_worker_of_a_fleet_that_grows() -> None:
    fleet, _, _ = a_fleet(0)
    assert isinstance(fleet.unavailable(0.0), NoWorkers)
    fleet, _, _ = a_fleet(0, elastic=True)
    assert isinstance(fleet.unavailable(0.0), WorkersStarting)


# -- room --------------------------------------------------------------------------------------------------------------


def test_full_workers_are_no_candidates_and_when_all_are_requests_may_wait() -> None:
    fleet, _, (one, other) = a_fleet(2, most_load=2)
    leases = [fleet.lease(one), fleet.lease(one)]
    assert fleet.candidates(100.0) == (other,)
    (pool,) = fleet.pools
    assert pool.candidates(100.0) is pool.candidates(100.0)
    leases += [fleet.lease(other), fleet.lease(other)]
    assert fleet.candidates(100.0) == ()
    assert fleet.able(100.0) == (one, other)
    assert isinstance(fleet.unavailable(100.0), WorkersFull)
    leases[0].close(Outcome.SERVED, 100.0)
    assert fleet.candidates(100.0) == (one,)


def test_where_nobody_is_able_there_is_nothing_to_wait_for() -> None:
    fleet, _, (one,) = a_fleet(1, most_load=1)
    fleet.lease(one)
    fleet.down(one, "gone")
    assert type(fleet.unavailable(100.0)) is Unavailable


# -- outliers ----------------------------------------------------------------------------------------------------------


def judged(count: int) -> tuple[Fleet, Log, list[Worker]]:
    return a_fleet(count, outliers=OutlierRules(), breaker=BreakerRules(enabled=False))


def answers(fleet: Fleet, worker: Worker, *outcomes: Outcome) -> None:
    for outcome in outcomes:
        fleet.lease(worker).close(outcome, 100.0)


def test_a_worker_that_fails_is_ejected_and_comes_back() -> None:
    fleet, log, (bad, *good) = judged(3)
    answers(fleet, bad, *[Outcome.FAILED, Outcome.FAILED, Outcome.SERVED] * 10)
    for worker in good:
        answers(fleet, worker, *[Outcome.SERVED] * 30)
    fleet.judge(101.0)
    assert fleet.candidates(101.0) == tuple(good)
    assert bad.ejected.startswith("20 of 30 requests failed in 30 s (67%)")
    fleet.judge(132.0)
    assert fleet.candidates(132.0) == (bad, *good)
    assert log.moves("outlier") == [("kept", "held_off"), ("held_off", "kept")]


def test_an_ejected_worker_is_better_than_an_unhealthy_one() -> None:
    fleet, _, (bad, good) = judged(2)
    answers(fleet, bad, *[Outcome.FAILED] * 30)
    answers(fleet, good, *[Outcome.SERVED] * 30)
    fleet.judge(101.0)
    assert fleet.candidates(101.0) == (good,)
    for _ in range(3):
        fleet.probed(good, "sick", 102.0)
    assert fleet.candidates(102.0) == (bad,)


def test_a_lost_process_takes_its_bad_name_with_it() -> None:
    fleet, _, (bad, good) = judged(2)
    answers(fleet, bad, *[Outcome.FAILED] * 30)
    answers(fleet, good, *[Outcome.SERVED] * 30)
    fleet.judge(101.0)
    fleet.lost(bad, 102.0)
    fleet.probed(bad, None, 103.0)
    assert set(fleet.candidates(103.0)) == {bad, good}


def test_streams_that_wait_for_their_first_byte_are_counted() -> None:
    fleet, _, (one,) = judged(1)
    begun, given_up, plain = (fleet.lease(one) for _ in range(3))
    begun.streams(1000, 100.0)
    given_up.streams(1000, 100.0)
    assert one.waiting == 2
    begun.began(100.5)
    begun.began(100.7)
    assert (one.waiting, begun.first_byte) == (1, 0.5)
    for lease in (begun, given_up, plain):
        lease.close(Outcome.SERVED, 101.0)
    assert (one.waiting, given_up.bucket) == (0, 0)
    given_up.began(101.0)  # its failing answer is passed on, because nothing else is tried
    assert (one.waiting, given_up.first_byte) == (0, -1.0)
