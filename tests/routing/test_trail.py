"""Whose doing a failure is: what fails alike at two workers is the request's, and breakers need evidence.

Breakers open at two failures here, so that one wrong count shows.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Attempt, Bench, facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import BreakerRules, FleetRules, OutlierRules, RetryRules
from sglang_router.routing.states import Breaker
from sglang_router.routing.trail import HOLD
from sglang_router.routing.worker import Worker

SUSPECT = [(Outcome.FAILED, 500), (Outcome.FAILED, 502), (Outcome.FAILED, 504), (Outcome.INVALID, 0)]
BREAKS = [(Outcome.BROKEN, 0), (Outcome.LOST, 0)]


def bench(count: int, threshold: int = 2, **retries: Any) -> Bench:
    breaker = BreakerRules(threshold=threshold, timeout=10.0)
    return Bench(count, rules=FleetRules(breaker=breaker, slow_start=0.0), retries=RetryRules(**retries))


def send(b: Bench, bad: dict[Worker, tuple[Outcome, int]], now: float = 0.0) -> list[Attempt]:
    """One request; each of these workers fails it so, the others serve it. Returns its attempts."""
    attempts = [b.ask(facts(b"%f" % now), now).attempt]
    while attempts[-1].worker in bad:
        outcome, status = bad[attempts[-1].worker]
        following = attempts[-1].retry(outcome, now, status)
        if following is None:
            return attempts
        attempts.append(following)
    attempts[-1].end(now=now)
    return attempts


def failures(b: Bench) -> list[int]:
    return [worker.circuit.failures for worker in b.workers]


@pytest.mark.parametrize(("outcome", "status"), SUSPECT)
def test_case_1_the_same_failure_at_a_second_worker_is_the_requests(outcome: Outcome, status: int) -> None:
    """Requests that engines cannot answer opened all breakers, and each was tried up to seven times."""
    b = bench(4)
    for n in range(20):
        assert len(send(b, dict.fromkeys(b.workers, (outcome, status)), float(n))) == 2
    assert failures(b) == [0, 0, 0, 0]
    assert b.fleet.candidates(20.0) == tuple(b.workers)


def test_a_worker_that_fails_what_others_serve_is_found_as_fast_as_ever() -> None:
    b = bench(4)
    bad = {b.workers[2]: (Outcome.FAILED, 500)}
    attempts = [send(b, bad, float(n)) for n in range(8)]
    assert [len(each) for each in attempts].count(2) == 2
    assert b.workers[2].breaker is Breaker.OPEN


def test_a_worker_is_blamed_when_the_stream_of_another_one_begins() -> None:
    b = bench(2)
    first = b.ask(facts(b"p", streaming=True)).attempt
    following = first.retry(Outcome.FAILED, 0.1, 500)
    assert following is not None
    assert failures(b) == [0, 0]
    b.router.began(following.leg, 0.2)
    assert failures(b) == [1, 0]
    following.end(now=9.0)
    assert failures(b) == [1, 0], "once"


def test_a_worker_is_blamed_when_the_other_one_takes_long() -> None:
    b = bench(2)
    following = b.route().retry(Outcome.FAILED, 1.0, 500)
    assert following is not None
    b.router.look(1.0 + HOLD - 0.1)
    assert failures(b) == [0, 0]
    b.router.look(1.0 + HOLD)
    assert failures(b) == [1, 0]
    following.end(now=60.0)


def test_a_request_that_another_worker_rejects_is_to_blame() -> None:
    """One engine answers 500 to what another one calls invalid."""
    b = bench(2)
    following = b.route().retry(Outcome.FAILED, 0.0, 500)
    assert following is not None
    following.end(Outcome.REJECTED)
    assert failures(b) == [0, 0]


def test_without_a_second_opinion_the_worker_is_to_blame() -> None:
    for retried, b in ((False, bench(2, total=0)), (True, bench(2))):
        attempt = b.route()
        if retried:
            b.fleet.set_draining(b.workers[1], True)
            attempt = attempt.retry(Outcome.FAILED, 0.0, 500) or attempt
            attempt.end(Outcome.GONE)
        else:
            assert attempt.retry(Outcome.FAILED, 0.0, 500) is None
        assert failures(b) == [1, 0]


@pytest.mark.parametrize(("outcome", "status"), [*SUSPECT, *BREAKS[:1]])
def test_f2_a_client_that_leaves_the_second_worker_blames_nobody(outcome: Outcome, status: int) -> None:
    """Clients that sent bad requests and left as soon as the second worker had them opened the breaker of the first."""
    b = bench(3)
    for now in range(6):
        retry = b.route(b"%d" % now, now=now).retry(outcome, now, status)
        assert retry is not None
        retry.end(Outcome.GONE, now)
    assert failures(b) == [0, 0, 0]


def test_a_503_is_no_proof_against_a_request_and_another_worker_gets_it() -> None:
    b = bench(4)
    bad = dict.fromkeys(b.workers[:2], (Outcome.FAILED, 503))
    assert len(send(b, bad)) == 3, "two workers that are not ready, and one that is"
    assert failures(b) == [1, 1, 0, 0]
    assert len(send(b, dict.fromkeys(b.workers, (Outcome.FAILED, 503)), 1.0)) == 7
    assert failures(b) == [1, 1, 0, 0], "none served it: no worker is to blame"


def test_different_failures_are_no_proof_either() -> None:
    b = bench(3)
    bad = {b.workers[0]: (Outcome.FAILED, 500), b.workers[1]: (Outcome.FAILED, 502)}
    assert len(send(b, bad)) == 3
    assert failures(b) == [1, 1, 0]


def test_refused_connections_are_told_at_once_and_limit_nothing() -> None:
    b = bench(5)
    attempts = send(b, dict.fromkeys(b.workers[:4], (Outcome.REFUSED, 0)))
    assert len(attempts) == 5
    assert failures(b) == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(("outcome", "status"), BREAKS)
def test_case_2_a_request_breaks_two_workers_at_most(outcome: Outcome, status: int) -> None:
    """One request ended up to seven engines."""
    b = bench(8)
    assert len(send(b, dict.fromkeys(b.workers, (outcome, status)))) == 2


def test_f3_every_way_to_break_off_counts_and_refused_connections_do_not() -> None:
    b = bench(8)
    ends = dict(zip(b.workers, [Outcome.LOST, Outcome.REFUSED, Outcome.UNCONNECTED, Outcome.BROKEN], strict=False))
    assert len(send(b, {worker: (outcome, 0) for worker, outcome in ends.items()})) == 4


def test_f3_a_stream_that_broke_inside_is_not_given_to_a_third_worker_that_breaks_before_it_answers() -> None:
    b = bench(4)
    attempt: Attempt | None = b.ask(facts(b"p", streaming=True)).attempt
    for outcome, goes_on in ((Outcome.CUT, True), (Outcome.BROKEN, False)):
        assert attempt is not None
        attempt = attempt.retry(outcome, 0.0, continued=True)
        assert (attempt is not None) is goes_on


def test_f2_a_request_that_failed_elsewhere_is_no_probe() -> None:
    b = bench(3)
    for _ in range(2):
        b.fleet.lease(b.workers[2]).close(Outcome.FAILED, 0.0)
    assert b.log.moves("breaker") == [("closed", "open")]
    attempt: Attempt | None = b.route(now=10.0)
    seen = []
    while attempt is not None:
        seen.append(b.number(attempt.worker))
        attempt = attempt.retry(Outcome.FAILED, 10.0, 500)
    assert sorted(seen) == [0, 1]
    assert b.workers[2].breaker is Breaker.HALF_OPEN


def test_f2_a_probe_that_two_workers_fail_proves_nothing() -> None:
    b = bench(2)
    for _ in range(2):
        b.fleet.lease(b.workers[0]).close(Outcome.FAILED, 0.0)
    b.route().end(Outcome.GONE)
    while (probe := b.route(now=10.0)).worker is not b.workers[0]:
        probe.end(Outcome.GONE)
    second = probe.retry(Outcome.FAILED, 11.0, 500)
    assert second is not None
    assert b.workers[0].probing == probe.leg.lease, "it is the probe until it is known whose fault it was"
    assert second.retry(Outcome.FAILED, 12.0, 500) is None
    assert (b.workers[0].breaker, b.workers[0].probing) == (Breaker.HALF_OPEN, 0)


@pytest.mark.parametrize("total", [0, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_f2_attackers_take_no_worker_from_the_others(count: int, total: int) -> None:
    """One attacker without retries, or four with, opened all breakers."""
    outliers = OutlierRules(min_volume=5)
    rules = FleetRules(breaker=BreakerRules(), slow_start=0.0, outliers=outliers)
    b = Bench(count, rules=rules, retries=RetryRules(total=total))
    for n in range(400):
        now = n / 20
        send(b, dict.fromkeys(b.workers, (Outcome.FAILED, 500)), now)
        if n % 20 == 0:
            b.fleet.judge(now)
        candidates = b.fleet.candidates(now)
        assert len(candidates) >= (count + 1) // 2
        if n % 4 == 0:
            assert len(send(b, {}, now + 0.01)) == 1, "an honest request is served at its first worker"


# -- never more than half, never the last ------------------------------------------------------------------------------

ANSWERS = [o for o in Outcome if o not in (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.LOST)]
STEP = st.tuples(st.integers(0, 5), st.sampled_from(ANSWERS), st.booleans(), st.sampled_from([0.0, 0.0, 0.5, 10.0]))


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 6), steps=st.lists(STEP, max_size=60), dead=st.integers(0, 3), seconds=st.booleans())
def test_what_requests_may_cause_takes_out_at_most_half_of_the_workers_and_never_the_last(
    count: int, steps: list[tuple[int, Outcome, bool, float]], dead: int, seconds: bool
) -> None:
    b = Bench(
        count + dead,
        rules=FleetRules(
            breaker=BreakerRules(threshold=2), slow_start=0.0, outliers=OutlierRules(min_volume=2, window=6.0)
        ),
    )
    now = 0.0
    gone = b.workers[count:]
    for worker in gone:
        for _ in range(2):
            b.fleet.lease(worker).close(Outcome.REFUSED, now)
    leases = []
    for pick, outcome, late, wait in steps:
        now += wait
        candidates = [worker for worker in b.fleet.candidates(now) if worker not in gone]
        assert 2 * len(candidates) >= count
        assert candidates
        lease = b.fleet.lease(candidates[pick % len(candidates)])
        leases.append((lease, outcome))
        if not late:
            for each, end in leases:
                each.close(end, now)
            leases.clear()
        if seconds:
            b.fleet.judge(now)
    assert len([w for w in b.fleet.candidates(now) if w not in gone]) * 2 >= count


def test_workers_that_are_not_there_are_out_however_many() -> None:
    b = bench(4)
    for worker in b.workers[:3]:
        for _ in range(2):
            b.fleet.lease(worker).close(Outcome.REFUSED, 0.0)
    assert b.fleet.candidates(0.0) == (b.workers[3],)
    for _ in range(9):
        b.fleet.lease(b.workers[3]).close(Outcome.FAILED, 0.0)
    assert b.workers[3].breaker is Breaker.OPEN
    assert b.fleet.candidates(0.0) == (b.workers[3],), "the last one that is there"


def test_of_too_many_those_are_let_in_whose_breakers_opened_for_the_shortest_time() -> None:
    b = bench(4)
    for now, worker in zip((0.0, 1.0, 2.0), b.workers, strict=False):
        for _ in range(2):
            b.fleet.lease(worker).close(Outcome.FAILED, now)
    assert b.fleet.candidates(2.0) == (b.workers[0], b.workers[3])
