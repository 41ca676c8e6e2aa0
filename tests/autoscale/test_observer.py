"""What a reading tells of a fleet: counts, queues, and times to first token in a window that begins anew."""

from __future__ import annotations

from typing import Any

import pytest

from event_makers import finished
from fleets import Bench, spec
from sglang_router.autoscale.observer import Observer
from sglang_router.autoscale.scaler import Reading
from sglang_router.relay.clients import Unanswered
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import Finished
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker

QUIET = Unanswered(requests=0, held=0, size=0, oldest=0.0)


def stream(**fields: Any) -> Finished:
    """A stream that began after half a second and lasted for one."""
    return finished(**{"streaming": True, "duration": 1.0, "first_byte": 0.5, **fields})


class Scene:
    """An observer of some workers, with a clock and a queue set by hand."""

    def __init__(self, workers: int = 1) -> None:
        self.now = 0.0
        self.waiting = QUIET
        self.bench = Bench(workers)
        self.workers = self.bench.workers
        self.observer = Observer(self.bench.fleet, lambda: self.waiting, lambda: self.now)

    def read(self, now: float | None = None) -> Reading:
        self.now = self.now if now is None else now
        return self.observer.read(self.now)

    def end(self, *first_bytes: float, **other: object) -> None:
        for first_byte in first_bytes:
            self.observer.finished(stream(first_byte=first_byte, duration=first_byte + 0.1, **other))

    def report(self, worker: Worker, queued: int | None) -> None:
        self.bench.fleet.reported(worker, EngineReport(queued=queued))


def test_a_paused_worker_is_told_and_is_not_idle() -> None:
    scene = Scene(2)
    scene.bench.fleet.set_paused(scene.workers[0], ("generation",))
    assert (scene.read(100.0).paused, scene.read().idle) == (1, 0.0)
    scene.bench.fleet.set_paused(scene.workers[0], ())
    assert (scene.read(130.0).paused, scene.read().idle) == (0, 30.0)


def test_what_other_routers_hold_wants_a_worker_too_and_is_not_told_to_them_as_its_own() -> None:
    scene = Scene(0)
    scene.waiting = Unanswered(requests=1, held=1, size=0, oldest=2.0)
    scene.observer.elsewhere = lambda: 3
    reading = scene.read(100.0)
    assert (reading.held, reading.load, reading.queue, reading.idle) == (4, 4, 4, 0.0)
    assert scene.observer.held == 1


# -- workers -----------------------------------------------------------------------------------------------


def test_each_worker_counts_once() -> None:
    scene = Scene(5)
    fleet, (ready, failed, leaving, back, removed) = scene.bench.fleet, scene.workers
    fleet.down(failed, "gave up")
    fleet.set_draining(leaving, True)
    fleet.set_draining(back, True, returning=True)
    fleet.remove(removed)
    fleet.add(spec("new", checked=True), 0.0)
    fleet.lease(ready)
    fleet.lease(leaving)
    reading = scene.read()
    assert (reading.ready, reading.coming, reading.leaving, reading.failed) == (1, 2, 1, 1)
    assert (reading.current, reading.load) == (3, 2)
    fleet.withhold(ready, "its pod is not ready")
    reading = scene.read()
    assert (reading.ready, reading.leaving) == (0, 2)


def test_an_unhealthy_worker_has_failed_and_may_come_back() -> None:
    scene = Scene(0)
    fleet = scene.bench.fleet
    worker = fleet.add(spec("w", checked=True, failure_threshold=1, success_threshold=1), 0.0)
    assert (scene.read().coming, scene.read().failed) == (1, 0)
    fleet.probed(worker, None, 1.0)
    assert scene.read().ready == 1
    fleet.probed(worker, "no answer", 2.0)
    assert (scene.read().ready, scene.read().failed) == (0, 1)
    fleet.probed(worker, None, 3.0)
    assert scene.read().ready == 1


# -- what waits --------------------------------------------------------------------------------------------


def test_the_engines_own_queues_count_where_every_one_tells() -> None:
    scene = Scene(2)
    scene.waiting = Unanswered(requests=9, held=2, size=4000, oldest=1.0)
    assert (scene.read().queue, scene.read().tokens, scene.read().held) == (9, 1000, 2)
    scene.report(scene.workers[0], 3)
    assert scene.read().queue == 9
    scene.report(scene.workers[1], 0)
    assert scene.read().queue == 5
    assert scene.read().load == 2


def test_a_worker_that_does_not_serve_need_not_tell() -> None:
    scene = Scene(2)
    scene.report(scene.workers[0], 3)
    scene.bench.fleet.set_draining(scene.workers[1], True)
    assert scene.read().queue == 3
    scene.bench.fleet.set_draining(scene.workers[0], True)
    scene.waiting = Unanswered(requests=4, held=4, size=0, oldest=0.0)
    assert scene.read().queue == 4  # nobody to ask


# -- times to first token ----------------------------------------------------------------------------------


def test_nine_of_ten() -> None:
    scene = Scene()
    scene.read(0.0)
    scene.now = 10.0
    scene.end(*(n / 10 for n in range(9)))
    assert scene.read().ttft is None  # of nine streams nobody knows what one in ten exceeds
    scene.end(0.9)
    assert scene.read().ttft == 0.9
    scene.end(*[0.2] * 90)
    assert scene.read().ttft == 0.2


@pytest.mark.parametrize(
    "other", [{"streaming": False}, {"status": 503}, {"first_byte": -1.0}, {"endpoint": ""}, {"status": 0}]
)
def test_what_tells_no_time_to_first_token(other: dict[str, object]) -> None:
    scene = Scene()
    scene.read(0.0)
    scene.now = 10.0
    event = stream(**other)
    for _ in range(20):
        scene.observer.finished(event)
    assert scene.read().ttft is None


def test_a_time_counts_for_a_minute() -> None:
    scene = Scene()
    scene.read(0.0)
    scene.now = 10.0
    scene.end(*[3.0] * 10)
    assert scene.read(69.0).ttft == 3.0
    assert scene.read(71.0).ttft is None


def test_only_so_many_are_kept() -> None:
    scene = Scene()
    scene.read(0.0)
    scene.now = 100.0
    scene.end(*[9.0] * 2000, *[0.1] * 1024)
    assert scene.read().ttft == 0.1


def test_another_number_of_workers_begins_the_window_anew() -> None:
    """A stream that began with fewer workers tells nothing of the present number, though it ends now."""
    scene = Scene()
    scene.read(0.0)
    scene.now = 10.0
    scene.end(*[5.0] * 10)
    scene.bench.fleet.add(spec("w9"), 10.0)
    assert scene.read(10.0).ttft is None
    scene.now = 12.0
    scene.end(*[5.0] * 10)
    assert scene.read().ttft is None
    scene.end(*[1.0] * 10)
    assert scene.read().ttft == 1.0


def test_the_oldest_that_waits_counts_when_it_may_be_one_in_ten() -> None:
    scene = Scene()
    scene.read(0.0)
    scene.waiting = Unanswered(requests=1, held=0, size=0, oldest=8.0)
    assert scene.read(20.0).ttft == 8.0
    scene.end(*[0.5] * 20)
    assert scene.read(20.0).ttft == 0.5  # one of twenty-one is less than one in ten
    scene.waiting = Unanswered(requests=3, held=0, size=0, oldest=8.0)
    assert scene.read(20.0).ttft == 8.0


def test_who_waited_for_a_model_to_load_is_no_sign_of_slowness() -> None:
    scene = Scene()
    scene.bench.fleet.lost(scene.workers[0], 0.0)
    scene.waiting = Unanswered(requests=5, held=5, size=0, oldest=120.0)
    assert scene.read(120.0).ttft is None
    scene.bench.fleet.probed(scene.workers[0], None, 120.5)
    scene.waiting = Unanswered(requests=5, held=0, size=0, oldest=121.0)
    assert scene.read(121.0).ttft == 0.0
    assert scene.read(123.0).ttft == 2.0


# -- idleness and flow -------------------------------------------------------------------------------------


def test_idle_since_the_last_request() -> None:
    scene = Scene()
    assert scene.read(10.0).idle == 0.0  # a worker is found ready
    assert scene.read(50.0).idle == 40.0
    lease = scene.bench.fleet.lease(scene.workers[0])
    assert scene.read(60.0).idle == 0.0
    lease.close(Outcome.SERVED, 60.0)
    assert scene.read(61.0).idle == 1.0
    scene.now = 70.5  # one that came and went between two readings
    scene.end(0.1)
    assert scene.read(71.0).idle == 0.5
    scene.end(0.1, endpoint="")  # the control plane is no work for workers
    assert scene.read(75.0).idle == 4.5
    scene.waiting = Unanswered(requests=1, held=1, size=0, oldest=0.0)
    assert scene.read(80.0).idle == 0.0


def test_inflow_is_what_came_for_each_that_ended() -> None:
    scene = Scene()
    for now in range(30):  # two come each second, one ends
        leases = [scene.bench.fleet.lease(scene.workers[0]) for _ in range(2)]
        leases[0].close(Outcome.SERVED, float(now))
        scene.now = float(now)
        scene.end(0.1)
        reading = scene.read()
        assert reading.inflow == (None if now < 10 else 2.0)
