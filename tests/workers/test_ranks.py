"""Ranks as workers: who comes and goes when an engine says how many ranks it has."""

from __future__ import annotations

import pytest

from fleets import any_policy
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.ranks import MAX_RANKS, follow

URL = "http://h:1"


class Rig(Listener):
    """A fleet with one engine that is well."""

    def __init__(self, *, aware: bool = True) -> None:
        self.news: list[str] = []
        self.fleet = Fleet(self, lambda: "id", any_policy)
        rules = HealthRules(interval=7.0)
        spec = WorkerSpec(
            url=URL, dp_aware=aware, api_key="k", labels={"zone": "a"}, model_id="m", health=rules, source=Source.FILE
        )
        self.whole = self.well(self.fleet.add(spec, 0.0))
        self.news.clear()

    def worker_changed(self, event: WorkerChanged) -> None:
        if event.what in ("added", "removed"):
            self.news.append(f"{event.what} {event.worker.url}")

    def well(self, worker: Worker) -> Worker:
        self.fleet.probed(worker, None, 1.0)
        return worker

    def told(self, worker: Worker, ranks: int | None) -> list[str]:
        """What changes when a worker's engine says so."""
        self.news.clear()
        self.fleet.reported(worker, EngineReport(ranks=ranks))
        follow(self.fleet, worker, 2.0)
        return self.news

    def entry(self, rank: int) -> Worker:
        worker = self.fleet.by_url(f"{URL}@{rank}")
        assert worker is not None
        return worker

    @property
    def urls(self) -> list[str]:
        return [worker.url for worker in self.fleet]

    def split(self, ranks: int) -> None:
        self.told(self.whole, ranks)
        for rank in range(ranks):
            self.told(self.well(self.entry(rank)), ranks)


def test_the_engine_serves_as_a_whole_until_the_first_rank_is_well() -> None:
    rig = Rig()
    assert rig.told(rig.whole, 2) == [f"added {URL}@0", f"added {URL}@1"]
    assert rig.fleet.candidates(2.0) == (rig.whole,)
    assert rig.told(rig.whole, 2) == []
    assert rig.told(rig.well(rig.entry(1)), 2) == [f"removed {URL}"]
    assert rig.fleet.candidates(3.0) == (rig.entry(1),)
    assert rig.told(rig.well(rig.entry(0)), 2) == []
    assert rig.fleet.candidates(3.0) == (rig.entry(0), rig.entry(1))


def test_ranks_are_workers_like_the_whole() -> None:
    rig = Rig()
    rig.fleet.set_draining(rig.whole, True)
    rig.told(rig.whole, 2)
    for rank in (0, 1):
        entry = rig.entry(rank)
        assert (entry.spec.url, entry.dp_rank, entry.health, entry.draining) == (URL, rank, Health.STARTING, True)
        assert (entry.key, entry.spec.labels, entry.spec.model_id) == (b"k", {"zone": "a"}, "m")
        assert (entry.spec.health, entry.spec.source) == (rig.whole.spec.health, Source.FILE)


def test_a_request_under_way_ends_on_the_worker_that_is_gone() -> None:
    rig = Rig()
    lease = rig.fleet.lease(rig.whole)
    rig.split(2)
    assert (rig.whole.removed, rig.whole.load) == (True, 1)
    lease.close(Outcome.SERVED, 3.0)
    assert (rig.whole.load, rig.whole.processed) == (0, 1)


@pytest.mark.parametrize("ranks", [None, 1, MAX_RANKS + 1])
def test_an_engine_of_one_rank_or_who_knows_stays(ranks: int | None) -> None:
    rig = Rig()
    assert rig.told(rig.whole, ranks) == []
    assert rig.urls == [URL]


def test_nobody_asked_for_ranks() -> None:
    rig = Rig(aware=False)
    assert rig.told(rig.whole, 4) == []


def test_entries_follow_an_engine_that_came_back_with_more_ranks() -> None:
    rig = Rig()
    rig.split(2)
    assert rig.told(rig.entry(0), 3) == [f"added {URL}@2"]
    assert rig.urls == [f"{URL}@0", f"{URL}@1", f"{URL}@2"]


def test_entries_follow_an_engine_that_came_back_with_fewer_ranks() -> None:
    rig = Rig()
    rig.split(3)
    assert rig.told(rig.entry(2), 2) == [f"removed {URL}@2"]
    assert rig.told(rig.entry(0), 2) == []
    assert rig.urls == [f"{URL}@0", f"{URL}@1"]


def test_an_engine_that_came_back_with_one_rank_is_a_whole_again() -> None:
    rig = Rig()
    rig.split(2)
    assert rig.told(rig.entry(1), 1) == [f"added {URL}"]
    whole = rig.fleet.by_url(URL)
    assert whole is not None
    assert whole.dp_rank is None
    assert rig.told(rig.well(whole), 1) == [f"removed {URL}@0", f"removed {URL}@1"]
    assert rig.urls == [URL]


def test_a_rank_that_was_removed_by_hand_meanwhile_changes_nothing() -> None:
    rig = Rig()
    rig.split(2)
    gone = rig.entry(1)
    rig.fleet.remove(gone)
    assert rig.told(gone, 2) == []
