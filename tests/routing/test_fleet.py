"""The fleet, by examples; test_fleet_model.py has the state machine beside a model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fleets import Log, any_policy, spec
from sglang_router.errors import Conflict, NoWorkers, Unavailable, WorkersStarting
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker


def a_fleet(count: int, *, checked: bool = False, **rules: Any) -> tuple[Fleet, Log, list[Worker]]:
    log, ids = Log(), itertools.count()
    fleet = Fleet(log, lambda: f"id{next(ids)}", any_policy, FleetRules(BreakerRules(**rules), startup_timeout=100.0))
    return fleet, log, [fleet.add(spec(f"w{n}", checked=checked), 0.0) for n in range(count)]


def end(fleet: Fleet, worker: Worker, *outcomes: Outcome, now: float = 0.0) -> None:
    """Legs on one worker, one after the other."""
    for outcome in outcomes:
        fleet.lease(worker).close(outcome, now)


# -- membership --------------------------------------------------------------------------------------------------------


def test_workers_are_found_by_url_and_by_id_in_the_order_they_came() -> None:
    fleet, log, workers = a_fleet(3)
    assert list(fleet) == workers
    assert len(fleet) == 3
    assert fleet.by_url("http://w1:1") is workers[1]
    assert fleet.by_id("id2") is workers[2]
    assert (fleet.by_url("http://w9:1"), fleet.by_id("id9")) == (None, None)
    assert [worker.order for worker in workers] == [1, 2, 3]
    assert log.whats() == ["added"] * 3


def test_a_url_is_registered_once() -> None:
    fleet, log, _ = a_fleet(1)
    with pytest.raises(Conflict, match="http://w0:1 already exists"):
        fleet.add(spec("w0"), 1.0)
    assert len(fleet) == len(log.changes) == 1


def test_a_removed_worker_is_gone_at_once_and_its_requests_end_by_themselves() -> None:
    fleet, log, (one, other) = a_fleet(2)
    lease = fleet.lease(one)
    fleet.remove(one)
    fleet.remove(one)
    assert fleet.candidates(0.0) == (other,)
    assert one.load == 1
    lease.close(Outcome.SERVED, 1.0)
    assert (one.load, one.processed) == (0, 1)
    assert log.whats(one) == ["added", "removed"]


def test_a_url_that_comes_again_is_another_worker() -> None:
    fleet, _, (one,) = a_fleet(1)
    end(fleet, one, *[Outcome.FAILED] * 4)
    fleet.remove(one)
    again = fleet.add(spec("w0"), 1.0)
    assert again is not one
    assert again.order > one.order
    assert fleet.candidates(1.0) == (again,)


@pytest.mark.parametrize("outcome", Outcome)
def test_nothing_is_told_of_a_removed_worker(outcome: Outcome) -> None:
    fleet, log, (one, _) = a_fleet(2, threshold=2, timeout=1.0)
    end(fleet, one, Outcome.REFUSED)
    leases = [fleet.lease(one) for _ in range(3)]
    fleet.remove(one)
    log.changes.clear()
    for lease in leases:
        lease.close(outcome, 0.5)
    fleet.probed(one, None, 0.6)
    fleet.probed(one, "down", 0.6, refused=True)
    fleet.candidates(50.0)
    assert log.changes == []
    assert one.load == 0


def test_draining_stops_new_requests_and_resuming_brings_them_back() -> None:
    fleet, log, (one, other) = a_fleet(2)
    fleet.lease(one)
    fleet.set_draining(one, True)
    fleet.set_draining(one, True)
    assert fleet.candidates(0.0) == (other,)
    assert (one.load, one.in_rotation) == (1, False)
    fleet.set_draining(one, False)
    assert fleet.candidates(0.0) == (one, other)
    assert log.moves("draining") == [("active", "draining"), ("draining", "active")]


def test_what_its_source_withholds_and_what_an_operator_drains_are_apart() -> None:
    fleet, log, (one, other) = a_fleet(2)
    fleet.withhold(one, "its pod is not ready")
    fleet.withhold(one, "its pod is not ready")
    assert fleet.candidates(0.0) == (other,)
    assert "withheld" in repr(one)
    fleet.withhold(one, "its pod ends")
    fleet.set_draining(one, True)
    fleet.withhold(one, "")
    assert fleet.candidates(0.0) == (other,)
    fleet.set_draining(one, False)
    assert fleet.candidates(0.0) == (one, other)
    moves = [("allowed", "withheld"), ("withheld", "withheld"), ("withheld", "allowed")]
    assert log.moves("withheld") == moves


def test_a_pause_stops_new_requests_until_nothing_is_missing_or_another_process_is_there() -> None:
    fleet, log, (one, other) = a_fleet(2)
    fleet.set_paused(one, ("kv_cache", "weights"))
    fleet.set_paused(one, ("weights",))
    assert fleet.candidates(0.0) == (other,)
    assert "paused: weights" in repr(one)
    fleet.set_paused(one, ())
    assert fleet.candidates(0.0) == (one, other)
    assert log.moves("paused") == [("running", "paused"), ("paused", "running")]
    fleet.set_paused(one, ("generation",))
    one.weights = "step-7"
    fleet.lost(one, 0.0)
    assert (one.paused, one.weights) == ((), "")


# -- health ------------------------------------------------------------------------------------------------------------


def test_a_new_worker_takes_requests_after_its_first_good_check() -> None:
    fleet, log, (one,) = a_fleet(1, checked=True)
    assert fleet.candidates(0.0) == ()
    fleet.probed(one, "refused", 1.0, refused=True)
    fleet.probed(one, None, 2.0)
    assert fleet.candidates(2.0) == (one,)
    assert log.moves("health") == [("starting", "healthy")]
    assert "restarted" not in log.whats(), "it had nothing to lose"


def test_health_changes_after_as_many_checks_in_a_row_as_the_rules_say() -> None:
    fleet, log, (one, other) = a_fleet(2, checked=True)
    for worker in (one, other):
        fleet.probed(worker, None, 0.0)
    for error in ("a", "b", None, "c", "d"):
        fleet.probed(one, error, 1.0)
    assert (one.health, one.last_error) == (Health.HEALTHY, "d")
    fleet.probed(one, "e", 1.0)
    assert fleet.candidates(1.0) == (other,)
    for error in (None, "f", None):
        fleet.probed(one, error, 2.0)
    assert (one.health, one.last_error) == (Health.UNHEALTHY, "")
    fleet.probed(one, None, 2.0)
    assert fleet.candidates(2.0) == (one, other)
    assert log.moves("health")[2:] == [("healthy", "unhealthy"), ("unhealthy", "healthy")]


def test_a_start_that_takes_too_long_is_a_failure_until_a_check_is_good() -> None:
    fleet, _, (one,) = a_fleet(1, checked=True)
    fleet.probed(one, "loading", 100.0)
    assert one.health is Health.STARTING
    fleet.probed(one, "loading", 100.1)
    assert one.health.value == "unhealthy"
    for _ in range(2):
        fleet.probed(one, None, 101.0)
    assert one.health.value == "healthy"


def test_when_all_are_unhealthy_all_are_tried() -> None:
    fleet, _, (one, other, third) = a_fleet(3, checked=True)
    for worker in (one, other, third):
        fleet.probed(worker, None, 0.0)
    for worker in (one, other):
        for _ in range(3):
            fleet.probed(worker, "down", 1.0)
    assert fleet.candidates(1.0) == (third,)
    end(fleet, third, *[Outcome.REFUSED] * 4, now=1.0)
    assert fleet.candidates(1.0) == (one, other), "the checks say no, the breakers do not"
    end(fleet, one, *[Outcome.REFUSED] * 4, now=1.0)
    assert fleet.candidates(1.0) == (other,)
    fleet.set_draining(other, True)
    assert fleet.candidates(1.0) == ()


def test_a_worker_that_never_started_is_not_tried_in_panic() -> None:
    fleet, _, (one, _) = a_fleet(2, checked=True)
    fleet.probed(one, None, 0.0)
    for _ in range(3):
        fleet.probed(one, "down", 1.0)
    assert fleet.candidates(1.0) == (one,)


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_refused_and_back_is_a_restart_told_once() -> None:
    fleet, log, (one,) = a_fleet(1, checked=True)
    fleet.probed(one, None, 0.0)
    end(fleet, one, Outcome.REFUSED, Outcome.REFUSED)
    for _ in range(5):
        fleet.probed(one, "refused", 1.0, refused=True)
    assert "restarted" not in log.whats()
    for _ in range(3):
        fleet.probed(one, None, 2.0)
        end(fleet, one, Outcome.SERVED)
    assert log.whats().count("restarted") == 1


def test_a_refused_check_alone_tells_it_too() -> None:
    fleet, log, (one,) = a_fleet(1, checked=True)
    for error in (None, "refused", None, None):
        fleet.probed(one, error, 1.0, refused=error is not None)
    assert log.whats().count("restarted") == 1


def test_without_checks_a_served_request_tells_it() -> None:
    fleet, log, (one,) = a_fleet(1)
    end(fleet, one, Outcome.REFUSED, Outcome.BUSY, Outcome.FAILED)
    assert "restarted" not in log.whats()
    end(fleet, one, Outcome.SERVED, Outcome.SERVED)
    assert log.whats().count("restarted") == 1


@pytest.mark.parametrize("outcome", [o for o in Outcome if o not in (Outcome.REFUSED, Outcome.LOST, Outcome.SERVED)])
def test_no_other_end_means_that_nobody_listens(outcome: Outcome) -> None:
    fleet, log, (one,) = a_fleet(1, checked=True)
    fleet.probed(one, None, 0.0)
    end(fleet, one, outcome)
    fleet.probed(one, "timed out", 1.0)
    fleet.probed(one, None, 2.0)
    end(fleet, one, Outcome.SERVED)
    assert "restarted" not in log.whats()


def test_the_last_answers_of_a_server_that_leaves_are_no_restart() -> None:
    fleet, log, (one,) = a_fleet(1, checked=True)
    fleet.probed(one, None, 0.0)
    running = fleet.lease(one)
    end(fleet, one, Outcome.REFUSED)
    running.close(Outcome.SERVED, 1.0)
    assert "restarted" not in log.whats(), "it closed its door and finishes what it has"
    fleet.probed(one, None, 2.0)
    assert log.whats().count("restarted") == 1


# -- nobody ------------------------------------------------------------------------------------------------------------


def unavailable(fleet: Fleet, now: float) -> tuple[type[Unavailable], float | None]:
    assert fleet.candidates(now) == ()
    error = fleet.unavailable(now)
    return type(error), error.retry_after


def test_why_nobody_takes_a_request() -> None:
    fleet, _, workers = a_fleet(2, checked=True, timeout=30.0)
    assert unavailable(Fleet(Log(), lambda: "", any_policy), 0.0) == (NoWorkers, 5.0)
    assert unavailable(fleet, 0.0) == (WorkersStarting, 5.0)
    for worker, now in zip(workers, (1.0, 4.0), strict=True):
        fleet.probed(worker, None, 0.0)
        end(fleet, worker, *[Outcome.REFUSED] * 4, now=now)
    assert unavailable(fleet, 11.0) == (Unavailable, 20.0)
    fleet.set_draining(workers[0], True)
    assert unavailable(fleet, 11.0) == (Unavailable, 23.0)
    fleet.set_draining(workers[1], True)
    assert unavailable(fleet, 11.0) == (Unavailable, 5.0)
    for worker in workers:
        fleet.remove(worker)
    assert unavailable(fleet, 11.0) == (NoWorkers, 5.0)


def test_a_half_open_probe_under_way_is_soon_over() -> None:
    fleet, _, (one, other) = a_fleet(2, timeout=30.0)
    end(fleet, one, *[Outcome.REFUSED] * 4)
    end(fleet, other, *[Outcome.REFUSED] * 4, now=20.0)
    (probing,) = fleet.candidates(30.0)
    fleet.lease(probing)
    assert unavailable(fleet, 30.0) == (Unavailable, 1.0)


def test_one_that_starts_beside_one_that_is_held_off_is_not_all_starting() -> None:
    fleet, _, (one, _) = a_fleet(2, checked=True, timeout=30.0)
    fleet.probed(one, None, 0.0)
    end(fleet, one, *[Outcome.REFUSED] * 4)
    assert unavailable(fleet, 10.0) == (Unavailable, 20.0)


# -- candidates are remembered -----------------------------------------------------------------------------------------


def test_candidates_are_the_same_object_until_something_changes() -> None:
    fleet, _, (one, other) = a_fleet(2)
    (pool,) = fleet.pools
    first = pool.candidates(0.0)
    end(fleet, one, Outcome.SERVED, Outcome.FAILED, Outcome.GONE)
    assert pool.candidates(1000.0) is first
    fleet.set_draining(other, True)
    assert fleet.candidates(1000.0) == (one,)
