"""What the page hears: figures of each worker while somebody looks, and events with their reasons."""

from __future__ import annotations

import pytest

from event_makers import finished, leg, tag
from fleets import Bench
from sglang_router.admin.witness import Witness
from sglang_router.routing.events import Quarantined, WorkerChanged
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg
from sglang_router.routing.states import Health
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker


def made() -> tuple[Bench, Worker, Witness]:
    bench = Bench(2, "round_robin")
    return bench, bench.workers[0], Witness(lambda: 1e9)


def test_figures_are_of_the_seconds_that_somebody_looks() -> None:
    _, worker, witness = made()
    witness.finished(finished(leg(worker)))  # nobody looks
    for _ in range(5):
        witness.look()
        witness.finished(finished(leg(worker), first_byte=0.1, usage=Usage(100, 40, 20)))
        witness.finished(finished(leg(worker), first_byte=0.3, usage=Usage(100, 10, -1)))
    witness.look()
    assert witness.figures(worker.id) == (2.0, 0.2, 20.0, 0.25)
    for _ in range(10):
        witness.look()
    assert witness.figures(worker.id) == (0.0, None, 0.0, None)


def test_an_answer_without_a_first_byte_or_usage_counts_as_a_request_only() -> None:
    _, worker, witness = made()
    witness.look()
    witness.finished(finished(leg(worker), first_byte=-1.0))
    witness.finished(finished(leg(worker), first_byte=0.4, usage=Usage(-1, -1, -1)))
    witness.finished(finished())  # it had no worker
    witness.look()
    assert witness.figures(worker.id) == (2.0, 0.4, 0.0, None)


def test_a_request_of_a_pair_is_one_of_both_workers_and_its_tokens_are_of_the_one_that_answers() -> None:
    bench, worker, witness = made()
    other = bench.workers[1]
    both: PlannedLeg = leg(worker)
    both.partner = leg(other)
    witness.look()
    witness.finished(finished(both, first_byte=0.5, usage=Usage(10, 5, 4)))
    witness.look()
    assert witness.figures(worker.id) == (1.0, 0.5, 4.0, 0.5)
    assert witness.figures(other.id) == (1.0, None, 0.0, None)


def test_nothing_is_kept_once_nobody_looks() -> None:
    _, worker, witness = made()
    witness.look()
    witness.finished(finished(leg(worker)))
    watched = [witness.watched]
    witness.look_away()
    assert [*watched, witness.watched] == [True, False]
    assert witness.figures(worker.id) == (0.0, None, 0.0, None)


@pytest.mark.parametrize(
    ("what", "new", "why"),
    [
        ("outlier", "held_off", "9 of its last 10 answers failed"),
        ("health", "unhealthy", "connection refused"),
        ("breaker", "open", "in a row; open for"),
        ("breaker", "closed", ""),
        ("draining", "draining", ""),
    ],
)
def test_an_event_says_when_what_and_why(what: str, new: str, why: str) -> None:
    bench, worker, witness = made()
    worker.ejected, worker.health, worker.last_error = "9 of its last 10 answers failed", Health.UNHEALTHY, "refused"
    worker.last_error = "connection refused"
    for now in range(20):
        bench.route(b"x", now=float(now)).end(Outcome.FAILED, now=float(now))
    witness.worker_changed(WorkerChanged(worker, what, "before", new))
    (event,) = witness.events
    assert (event.number, event.at, event.what, event.worker) == (1, 1e9, what, worker.url)
    assert (event.old, event.new) == ("before", new)
    assert why in event.why if why else event.why == ""


def test_a_request_that_breaks_workers_is_an_event() -> None:
    _, _, witness = made()
    witness.quarantined(Quarantined(tag(id="chatcmpl-9"), 2))
    (event,) = witness.events
    assert (event.what, event.why) == (
        "quarantined",
        "request chatcmpl-9 broke 2 workers: it is refused for a while",
    )


def test_an_update_of_weights_is_no_event() -> None:
    _, worker, witness = made()
    witness.worker_changed(WorkerChanged(worker, "updating", "running", "updating"))
    assert not witness.events
