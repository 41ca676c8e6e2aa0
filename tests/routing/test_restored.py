"""Workers that a router knew before it was started again: whose cached prefixes are still believed."""

from __future__ import annotations

from fleets import Log, any_policy, spec
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.rules import FleetRules
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker


def restored(startup_timeout: float = 1800.0, **health: object) -> tuple[Fleet, Worker, Log]:
    log = Log()
    fleet = Fleet(log, lambda: "new", any_policy, FleetRules(slow_start=30.0, startup_timeout=startup_timeout))
    worker = fleet.add(spec("w", **{"checked": True, **health}), 0.0, restored="old")  # type: ignore[arg-type]
    return fleet, worker, log


def test_it_keeps_its_id_and_starts_unchecked() -> None:
    fleet, worker, _ = restored()
    assert (worker.id, worker.health) == ("old", Health.STARTING)
    assert fleet.candidates(0.0) == ()


def test_well_at_the_first_check_its_cache_is_warm() -> None:
    fleet, worker, log = restored()
    fleet.probed(worker, None, 1.0)
    assert worker.health is Health.HEALTHY
    assert log.whats() == ["added", "health"]
    assert worker.warm_at == 0.0


def test_not_well_at_the_first_check_its_cache_is_cold() -> None:
    """Whatever was wrong: a process that loads its model is another one, too."""
    fleet, worker, log = restored()
    fleet.probed(worker, "GET /health answered 503", 1.0)
    fleet.probed(worker, None, 2.0)
    assert worker.health is Health.HEALTHY
    assert log.whats().count("restarted") == 1
    assert worker.warm_at == 32.0


def test_later_failures_count_as_for_any_other() -> None:
    fleet, worker, log = restored()
    fleet.probed(worker, None, 1.0)
    fleet.probed(worker, "no answer", 2.0)
    fleet.probed(worker, None, 3.0)
    assert "restarted" not in log.whats()


def test_unhealthy_before_it_was_ever_well() -> None:
    fleet, worker, log = restored(startup_timeout=10.0, success_threshold=1)
    fleet.probed(worker, "no answer", 20.0)
    assert worker.health is Health.UNHEALTHY
    fleet.probed(worker, None, 21.0)
    fleet.probed(worker, "no answer", 22.0)
    fleet.probed(worker, None, 23.0)
    assert log.whats().count("restarted") == 1


def test_without_checks_it_is_like_any_other() -> None:
    fleet, worker, log = restored(checked=False)
    assert worker.health is Health.HEALTHY
    fleet.probed(worker, "no answer", 1.0)
    assert "restarted" not in log.whats()


def test_a_process_that_is_lost_takes_its_cache_along() -> None:
    fleet, worker, log = restored()
    fleet.lost(worker, 1.0)
    assert log.whats().count("restarted") == 1
    fleet.probed(worker, None, 2.0)
    assert log.whats().count("restarted") == 1
