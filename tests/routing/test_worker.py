"""A worker shows its state and knows its target; a lease is closed once and has a number of its own."""

from __future__ import annotations

from typing import Any

import pytest

from fleets import Log, any_policy, spec
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.routing.rules import BreakerRules, FleetRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import UPDATING, Worker


def fleet_of_one(**said: Any) -> tuple[Fleet, Worker, Log]:
    log = Log()
    fleet = Fleet(log, lambda: "id", any_policy, FleetRules(breaker=BreakerRules(threshold=1)))
    return fleet, fleet.add(WorkerSpec(**{"url": "http://w:1", "health": spec("w").health, **said}), 0.0), log


def test_a_worker_shows_its_state() -> None:
    fleet, worker, _ = fleet_of_one()
    lease = fleet.lease(worker)
    assert repr(worker) == "<Worker http://w:1: healthy, breaker closed, load 1>"
    assert repr(lease) == "<Lease 1 on http://w:1>"
    fleet.set_draining(worker, True)
    worker.ejected = "it is slow"
    fleet.remove(worker)
    lease.close(Outcome.SERVED, 1.0)
    assert repr(worker) == "<Worker http://w:1: healthy, breaker closed, load 0, ejected, draining, removed>"
    assert repr(lease) == "<Lease 1 on http://w:1, closed>"


def test_a_workers_key_is_bytes_or_none() -> None:
    assert Worker(WorkerSpec(url="http://w", api_key="sécret"), "id", 1, 0.0).key == "sécret".encode()
    assert Worker(WorkerSpec(url="http://w", api_key=""), "id", 1, 0.0).key is None


def test_a_worker_without_health_checks_is_healthy_at_once() -> None:
    assert Worker(spec("w"), "id", 1, 0.0).health is Health.HEALTHY
    assert Worker(spec("w", checked=True), "id", 1, 0.0).health is Health.STARTING


def test_its_target_is_what_the_relay_knows_of_it_and_is_amended_with_it() -> None:
    fleet, worker, _ = fleet_of_one(dp_rank=2, api_key="old")
    assert worker.target == Target("http://w:1", 2, b"old", "http://w:1@2", "id", "regular")
    fleet.amend(worker, WorkerSpec(url="http://elsewhere", api_key="new", worker_type="prefill"))
    assert worker.target == Target("http://w:1", 2, b"new", "http://w:1@2", "id", "prefill")
    assert (worker.key, worker.spec.url, worker.spec.dp_rank) == (b"new", "http://w:1", 2)


# -- leases ------------------------------------------------------------------------------------------------------------


def test_leases_are_numbered_over_all_workers() -> None:
    fleet, worker, _ = fleet_of_one()
    other = fleet.add(spec("other"), 0.0)
    assert [fleet.lease(w).number for w in (worker, other, worker)] == [1, 2, 3]


@pytest.mark.parametrize("first", Outcome)
def test_a_lease_closes_once(first: Outcome) -> None:
    fleet, worker, log = fleet_of_one()
    lease, _other = fleet.lease(worker), fleet.lease(worker)
    lease.close(first, 0.0)
    breaker, events = worker.breaker, len(log.changes)
    for second in Outcome:
        lease.close(second, 0.0)
    assert (worker.load, worker.processed) == (1, first in (Outcome.SERVED, Outcome.REJECTED))
    assert (worker.breaker, len(log.changes)) == (breaker, events)
    assert lease.closed


def test_new_weights_are_no_pause_in_what_is_told_of_a_worker() -> None:
    """A trainer may send them in a hundred parts: each is a change of its own, which nobody needs to keep."""
    fleet, worker, log = fleet_of_one()
    steps = ((UPDATING,), (), (UPDATING,), ("generation", UPDATING), ("generation",), ("generation", UPDATING))
    for paused in (*steps, (UPDATING,)):
        fleet.set_paused(worker, paused)
    rotates = [worker.in_rotation]
    fleet.set_paused(worker, ())
    assert [*rotates, worker.in_rotation] == [False, True]
    begun, ended = ("running", "updating"), ("updating", "running")
    assert log.moves("updating") == [begun, ended, begun, ended]
    assert log.moves("paused") == [("running", "paused"), ("paused", "running")]
