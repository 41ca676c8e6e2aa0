"""Events are heard in batches, in their order, and all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from event_makers import finished, leg, routed, tag
from sglang_router.observe.deferred import Deferred
from sglang_router.routing.events import Finished, FirstByte, LegEnded, Listener, Retried, Routed, WorkerChanged
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

WORKER = Worker(WorkerSpec(url="http://w:1"), "id", 1, 0.0)
LEG = leg(WORKER)


class Ear(Listener):
    def __init__(self) -> None:
        self.heard: list[object] = []

    def routed(self, event: Routed) -> None:
        self.heard.append(event)

    def retried(self, event: Retried) -> None:
        self.heard.append(event)

    def half_ended(self, event: LegEnded) -> None:
        self.heard.append(event)

    def first_byte(self, event: FirstByte) -> None:
        self.heard.append(event)

    def finished(self, event: Finished) -> None:
        self.heard.append(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        self.heard.append(event)


class Scene:
    """A Deferred with one listener, on a loop that never comes to its timers; `due` are these timers."""

    def __init__(self) -> None:
        self.ear = Ear()
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.deferred = Deferred(self.later)
        self.deferred.add(self.ear)

    def later(self, seconds: float, callback: Callable[[], None]) -> Any:
        self.due.append((seconds, callback))


def test_every_kind_of_event_is_heard_in_its_order() -> None:
    scene = Scene()
    deferred = scene.deferred
    deferred.worker_changed(added := WorkerChanged(WORKER, "added", "", "healthy"))
    deferred.routed(decided := routed(LEG))
    deferred.retried(retried := Retried(tag(), LEG, Outcome.REFUSED, 0.0))
    deferred.half_ended(half := LegEnded(tag(), LEG, Outcome.SERVED, 0.0, None, b""))
    deferred.first_byte(began := FirstByte(tag(), LEG, 0.1))
    deferred.finished(ended := finished(LEG))
    assert scene.ear.heard == []
    deferred.flush()
    assert scene.ear.heard == [added, decided, retried, half, began, ended]


def test_a_full_batch_is_heard_at_once_and_a_small_one_after_a_moment() -> None:
    scene = Scene()
    for _ in range(31):
        scene.deferred.routed(routed(LEG))
    assert (len(scene.ear.heard), len(scene.due)) == (0, 1)
    scene.deferred.routed(routed(LEG))
    assert len(scene.ear.heard) == 32
    scene.deferred.finished(finished(LEG))
    assert (len(scene.ear.heard), len(scene.due)) == (32, 2)
    seconds, timer = scene.due[-1]
    assert seconds <= 0.1
    timer()
    assert len(scene.ear.heard) == 33


def test_first_bytes_are_wanted_only_by_who_hears_them() -> None:
    scene = Scene()
    assert scene.deferred.hears_first_byte
    assert not Deferred(scene.later).hears_first_byte
