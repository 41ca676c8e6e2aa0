"""What the page says of a worker's state, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fleets import Bench
from sglang_router.admin.worker_row import WorkerRow, row_of, state_of
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.model_names import Names
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker


def drained(bench: Bench, worker: Worker) -> None:
    bench.fleet.set_draining(worker, True)


def returning(bench: Bench, worker: Worker) -> None:
    drained(bench, worker)
    worker.returning = True


def unwell(bench: Bench, worker: Worker) -> None:
    worker.health, worker.last_error = Health.UNHEALTHY, "connection refused"


def ejected(bench: Bench, worker: Worker) -> None:
    worker.ejected = "9 of its last 10 answers failed"


def broken(bench: Bench, worker: Worker) -> None:
    for now in range(20):
        bench.route(b"x", now=float(now)).end(Outcome.FAILED, now=float(now))


def withheld(bench: Bench, worker: Worker) -> None:
    bench.fleet.withhold(worker, "its pod is not ready")


def paused(bench: Bench, worker: Worker) -> None:
    bench.fleet.set_paused(worker, ("kv_cache", "weights"))


CASES: list[tuple[Callable[[Bench, Worker], None], str, str]] = [
    (lambda bench, worker: None, "healthy", ""),
    (drained, "draining", "no new requests; 0 requests in flight"),
    (returning, "restarting", "its engine is restarted"),
    (withheld, "withheld", "its pod is not ready"),
    (paused, "paused", "by the control plane: kv_cache, weights"),
    (unwell, "unhealthy", "connection refused"),
    (ejected, "ejected", "9 of its last 10 answers failed"),
    (broken, "open", "in a row; the breaker is open for"),
]


@pytest.mark.parametrize(("happens", "state", "why"), CASES, ids=[case[1] for case in CASES])
def test_one_word_for_its_state_and_the_reason(happens: Callable[[Bench, Worker], None], state: str, why: str) -> None:
    bench = Bench(1, "round_robin")
    (worker,) = bench.workers
    happens(bench, worker)
    told, reason = state_of(worker, None)
    assert told == state
    assert (why in reason) if why else not reason


def test_a_replica_says_why_it_ended() -> None:
    bench = Bench(1, "round_robin")
    (worker,) = bench.workers
    worker.health = Health.DOWN
    replica = {"reason": "exit status 1, 5 times in 300 s", "restarts": 5}
    assert state_of(worker, replica) == ("down", "exit status 1, 5 times in 300 s")
    row = row_of(worker, (0.0, None, 0.0, None), 7, 1000.0, replica)
    assert (row.restarts, row.managed, row.tree, row.since) == (5, True, 7, 1000.0 + worker.since)


def test_every_figure_of_a_row() -> None:
    bench = Bench(1, "round_robin")
    (worker,) = bench.workers
    worker.announce(Names(("tiny", "other")))
    worker.tell_role("decode")
    worker.elsewhere, worker.load = 2, 5  # two of them are another router's
    worker.report = EngineReport(queued=4, used_tokens=25, capacity_tokens=100, window=8)
    worker.waiting, worker.draining = 9, True
    assert row_of(worker, (1.5, 0.25, 12.0, 0.4), 77, 1000.0, None) == WorkerRow(
        id=worker.id,
        url=worker.url,
        model="tiny",
        role="decode",
        state="draining",
        why="no new requests; 3 requests in flight",
        running=3,
        waiting=4,
        limit=8,
        requests=1.5,
        ttft=0.25,
        tokens=12.0,
        cached=0.4,
        tree=77,
        kv=0.25,
        restarts=None,
        since=1000.0 + worker.since,
        draining=True,
        managed=False,
    )
    worker.report, worker.window.limit = EngineReport(window=8), 5
    told = row_of(worker, (0.0, None, 0.0, None), 0, 0.0, None)
    assert (told.waiting, told.limit, told.kv) == (9, 5, None)
