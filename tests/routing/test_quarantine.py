"""Requests that broke workers: what is remembered, for how long, and what is not."""

from __future__ import annotations

import random

import pytest

from fleets import Attempt, Bench, facts
from sglang_router.errors import RequestBreaksWorkers
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Listener, Quarantined
from sglang_router.routing.facts import Facts
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.quarantine import LATER, MOST, SOON, Quarantine, fingerprint
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules, RetryRules
from sglang_router.routing.spec import WorkerSpec

DEATH = b"DEATH"
RULES = FleetRules(breaker=BreakerRules(threshold=1 << 30), slow_start=0.0)


def bench(count: int, *, retries: int = 6) -> Bench:
    return Bench(count, rules=RULES, retries=RetryRules(total=retries))


def kill(b: Bench, now: float = 0.0, text: bytes = DEATH) -> int:
    """Send a request that ends each worker it reaches; return how many."""
    attempt: Attempt | None = b.route(text, now=now)
    killed = 0
    while attempt is not None:
        killed += 1
        last, attempt = attempt, attempt.retry(Outcome.BROKEN, now)
        b.fleet.probed(last.worker, "refused", now, refused=True)
    return killed


def refused(b: Bench, now: float, text: bytes = DEATH) -> float | None:
    """Return for how long a request is refused; None when it is not, and then it is served."""
    try:
        b.serve(text, now=now)
    except RequestBreaksWorkers as error:
        return error.retry_after
    return None


def test_case_2_a_request_that_ended_two_workers_is_refused_for_a_while() -> None:
    """Each time a client tried again, more engines ended."""
    b = bench(6)
    assert kill(b) == 2
    assert refused(b, 1.0) == LATER - 1.0
    assert refused(b, 1.0, b"ALIVE") is None, "as long, but another one"
    assert refused(b, LATER - 1.0) == 1.0
    assert refused(b, LATER) is None
    assert refused(b, LATER) is None
    assert not b.router.quarantine.broken, "it was served, so it is harmless"


def test_f3_without_retries_two_of_its_copies_are_enough() -> None:
    b = bench(6, retries=0)
    assert [kill(b, 0.0), kill(b, 1.0)] == [1, 1]
    assert refused(b, 2.0) == LATER - 1.0


def test_case_2_ranks_of_one_engine_that_ends_count_once() -> None:
    """Copies of a request at two ranks of an engine that was killed were taken for two engines that it had ended."""
    b = Bench(0, rules=RULES, retries=RetryRules(total=0))
    ranks = [
        b.fleet.add(WorkerSpec(url="http://e:1", dp_rank=rank, health=HealthRules(enabled=False)), 0.0)
        for rank in range(4)
    ]
    copies = [b.route(DEATH) for _ in ranks]
    for copy in copies:
        assert copy.retry(Outcome.BROKEN, 0.0) is None
    assert len({copy.worker for copy in copies}) > 1
    for rank in ranks:
        b.fleet.probed(rank, "refused", 0.0, refused=True)
        b.fleet.probed(rank, None, 0.5)
    assert refused(b, 1.0) is None


def test_f3_a_single_worker_that_comes_back_counts_again() -> None:
    b = bench(1)
    kill(b, 0.0)
    b.fleet.probed(b.workers[0], None, 5.0)
    kill(b, 6.0)
    assert refused(b, 7.0) == LATER - 1.0


def test_many_copies_that_one_death_cut_off_count_once() -> None:
    b = bench(2)
    attempts = [b.ask(facts(DEATH, streaming=True)).attempt for _ in range(20)]
    for attempt in attempts:
        if attempt.worker is b.workers[0]:
            attempt.end(Outcome.CUT, 1.0)
        else:
            attempt.end(Outcome.GONE, 1.0)
    assert refused(b, 2.0) is None


def test_a_stream_that_is_cut_counts_too() -> None:
    b = bench(2)
    for _ in range(2):
        b.ask(facts(DEATH, streaming=True)).attempt.end(Outcome.CUT, 1.0)
    assert refused(b, 2.0) is not None


def test_dropped_connections_of_workers_that_are_there_are_soon_forgiven() -> None:
    b = bench(3)
    attempt = b.route(DEATH).retry(Outcome.BROKEN, 0.0)
    assert attempt is not None
    assert attempt.retry(Outcome.BROKEN, 0.0) is None
    assert refused(b, SOON - 1.0) == 1.0
    assert refused(b, SOON) is None


def test_a_request_that_a_third_worker_serves_is_harmless() -> None:
    b = bench(3)
    attempt = b.route(DEATH).retry(Outcome.REFUSED, 0.0)
    assert attempt is not None
    following = attempt.retry(Outcome.BROKEN, 0.0)
    assert following is not None
    following.end()
    assert not b.router.quarantine.broken


def test_it_is_told_once_with_the_request() -> None:
    told: list[Quarantined] = []

    class Hears(Listener):
        def quarantined(self, event: Quarantined) -> None:
            told.append(event)

    b = bench(6)
    b.router._listener.add(Hears())  # type: ignore[attr-defined]
    kill(b)
    assert [(event.tag.id, event.workers) for event in told] == [("r1", 2)]


def test_the_memory_is_bounded_and_forgets() -> None:
    worker = bench(1).workers[0]
    quarantine = Quarantine(random.Random(1))
    for n in range(3 * MOST):
        quarantine.broke(facts(b"x" * n), worker, 0, float(n))
    assert len(quarantine.broken) == len(quarantine._shapes) == MOST
    quarantine.tidy(3.0 * MOST + LATER)
    assert not quarantine.broken
    assert not quarantine._shapes


@pytest.mark.parametrize("path", sorted(ENDPOINTS))
def test_bodies_of_every_endpoint_and_size_are_told_apart(path: bytes) -> None:
    one, other = bench(2).workers
    for size in (1, 1000, 32768, 40000, 1 << 20):
        quarantine = Quarantine(random.Random(1))
        bodies = [b"a" * size, b"b" + b"a" * (size - 1), b"a" * (size - 1) + b"b", b"a" * (size + 1)]
        first, *rest = [Facts(ENDPOINTS[path], body=body) for body in bodies]
        for worker in (one, other):
            quarantine.broke(first, worker, 0, 0.0)
        with pytest.raises(RequestBreaksWorkers):
            quarantine.check(first, 1.0)
        for each in rest:
            quarantine.check(each, 1.0)


def test_a_request_of_another_process_is_recognised_by_its_fingerprint() -> None:
    """A relay process holds the body; the decider has its size, and the fingerprint once it needs one."""
    b, key = Bench(2), b"k" * 32
    quarantine = b.router.quarantine
    quarantine.use(key)
    here = facts(b"a prompt that ends engines")
    there = facts(b"")
    there.body = Imprint(len(here.body))
    assert quarantine.broke(there, b.workers[0], 0, 0.0) == 0, "not known yet: it cannot be remembered"
    assert not quarantine.broken
    there.body.digest = fingerprint(key, here)
    assert [quarantine.broke(there, worker, 0, 0.0) for worker in b.workers] == [1, 2]
    with pytest.raises(RequestBreaksWorkers):
        quarantine.check(here, 1.0)
    again = facts(b"")
    again.body = Imprint(len(here.body))
    quarantine.check(again, 1.0)
    again.body = Imprint(len(here.body), fingerprint(key, here))
    with pytest.raises(RequestBreaksWorkers):
        quarantine.check(again, 1.0)
    quarantine.served(again)
    assert not quarantine.broken
    assert repr(again.body) == f"<Imprint of {len(here.body)} bytes>"
