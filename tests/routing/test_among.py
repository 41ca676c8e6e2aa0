"""Requests for which a gateway names the only workers that may get them (`Facts.among`)."""

from __future__ import annotations

import pytest

from fleets import Asked, Bench, facts, spec
from sglang_router.errors import NoWorkers, Unavailable
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.queue import ROOM
from sglang_router.routing.rules import FleetRules, QueueRules
from sglang_router.routing.sessions import Sessions


def of(*names: str, text: bytes = b"x" * 200) -> Facts:
    found = facts(text)
    found.among = frozenset(f"http://{name}:1" for name in names)
    return found


def ask(b: Bench, *names: str, now: float = 0.0) -> Asked:
    return b.ask(of(*names), now)


@pytest.mark.parametrize("policy", ["cache_aware", "round_robin", "least_load", "consistent_hashing", "cost", "random"])
def test_only_those_are_chosen(policy: str) -> None:
    b = Bench(4, policy)
    chosen = {ask(b, "w1", "w3").attempt.worker.url for _ in range(12)}
    assert chosen <= {"http://w1:1", "http://w3:1"}
    assert b.ask(facts(b"y"), 0.0).attempt.worker in b.workers


def test_a_worker_that_has_the_prefix_is_no_reason_to_leave_them() -> None:
    b = Bench(2, "cache_aware")
    first = b.ask(facts(b"p" * 400), 0.0).attempt
    other = next(worker for worker in b.workers if worker is not first.worker)
    again = facts(b"p" * 400)
    again.among = frozenset({other.url})
    assert b.ask(again, 0.0).attempt.worker is other


def test_none_of_them_is_known_or_none_is_named() -> None:
    b = Bench(2, "round_robin")
    for names in ([], ["nowhere"]):
        with pytest.raises(NoWorkers):
            ask(b, *names)
    assert not b.router.leases


def test_one_that_is_drained_is_unavailable_though_others_are_not() -> None:
    b = Bench(2, "round_robin")
    b.fleet.set_draining(b.workers[0], True)
    with pytest.raises(Unavailable) as caught:
        ask(b, "w0")
    assert not isinstance(caught.value, NoWorkers)
    assert ask(b, "w0", "w1").attempt.worker is b.workers[1]


def test_who_waits_for_a_full_one_holds_up_nobody_else() -> None:
    b = Bench(2, "round_robin", rules=FleetRules(most_load=1), queue=QueueRules(queue_size=10))
    held = ask(b, "w0").attempt
    waits = ask(b, "w0")
    assert waits.waits is not None
    assert waits.waits[0] == ROOM
    free = ask(b, "w1").attempt
    behind = b.ask(facts(b"z"), 0.0)
    assert behind.waits is not None
    free.end(Outcome.SERVED, 1.0)
    b.settle(1.0)
    assert behind.attempt.worker is b.workers[1]
    assert waits.answers[-1] is waits.answers[0]
    held.end(Outcome.SERVED, 2.0)
    b.settle(2.0)
    assert waits.attempt.worker is b.workers[0]


def test_a_session_leaves_its_home_for_them_and_what_is_kept_elsewhere_is_not_asked_for() -> None:
    b = Bench(2, "least_load")
    b.router.sessions = Sessions(True)
    first = facts(b"x" * 200)
    first.session = b"s"
    home = b.ask(first, 0.0).attempt
    b.router.holds(home.leg, b"resp_1")
    home.end(Outcome.SERVED, 1.0)
    other = next(worker for worker in b.workers if worker is not home.worker)
    again = of(other.spec.url.removeprefix("http://").removesuffix(":1"))
    again.session, again.follows = b"s", b"resp_1"
    assert b.ask(again, 2.0).attempt.worker is other


def test_a_worker_that_comes_later_lets_them_in() -> None:
    b = Bench(1, "round_robin")
    with pytest.raises(NoWorkers):
        ask(b, "w9")
    b.fleet.add(spec("w9"), 0.0)
    assert ask(b, "w9").attempt.worker.url == "http://w9:1"
