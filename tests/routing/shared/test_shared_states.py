"""What one router finds out about a worker, or is told to do with it, and what the others make of that."""

from __future__ import annotations

import msgspec
import pytest

from fleets import spec
from joined import KEY, LARGE, Joined
from sglang_router.routing.outcome import Hears
from sglang_router.routing.shared.packing import packed
from sglang_router.routing.shared.records import FORM, OrderMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.routing.source import Source
from sglang_router.routing.states import Breaker


def fail(joined: Joined, router: int, number: int, times: int, now: float = 0.0) -> None:
    """Let requests of one router fail at a worker."""
    bench = joined.benches[router]
    worker = bench.workers[number]
    for _ in range(times):
        lease = bench.fleet.lease(worker)
        bench.fleet.hear(lease, Hears.ANSWER_FAILURE, now)
        worker.load -= 1
        if worker.bit:
            worker.roster.lowered(worker.bit, worker.load + 1)


def succeed(joined: Joined, router: int, number: int, now: float = 0.0) -> None:
    bench = joined.benches[router]
    lease = bench.fleet.lease(bench.workers[number])
    bench.fleet.hear(lease, Hears.SUCCESS, now)


def orders(joined: Joined) -> list[bytes]:
    return [payload for _, topic, payload in joined.sent if topic is SharedTopic.ORDERS]


def replay(joined: Joined, state: SharedState) -> None:
    """Let a new router read the orders from the beginning."""
    for payload in orders(joined):
        state.receive(SharedTopic.ORDERS, payload)
    assert not state.apply(1.0, LARGE)


# -- doubt -------------------------------------------------------------------------------------------------------------


def test_a_worker_that_another_router_took_out_is_checked_and_its_next_failure_counts_for_all() -> None:
    joined = Joined(2, 3)
    fail(joined, 0, 1, 4)
    assert joined.worker(0, 1).breaker is Breaker.OPEN
    joined.flush(0.1)
    there = joined.worker(1, 1)
    assert there.lets_pass
    assert joined.benches[1].checked == [there]
    joined.flush(0.2)
    joined.flush(1.2)
    assert joined.benches[1].checked == [there]  # once, not with each message
    fail(joined, 1, 1, 1, 1.3)
    assert there.breaker is Breaker.OPEN


def test_a_worker_that_is_well_here_stays_as_it_was() -> None:
    joined = Joined(2, 3)
    fail(joined, 0, 1, 4)
    joined.flush(0.1)
    succeed(joined, 1, 1)
    fail(joined, 1, 1, 3)
    assert joined.worker(1, 1).breaker is Breaker.CLOSED


def test_a_router_that_fails_everywhere_takes_no_worker_from_the_others() -> None:
    joined = Joined(2, 4)
    for number in range(4):
        fail(joined, 0, number, 4)
    joined.flush(0.1)
    assert [worker.breaker for worker in joined.benches[1].workers] == [Breaker.CLOSED] * 4
    assert len(joined.benches[1].pool.candidates(0.1)) == 4
    for number in range(4):
        succeed(joined, 1, number)
    assert [worker.circuit.failures for worker in joined.benches[1].workers] == [0] * 4


def test_an_ejected_worker_is_doubted_and_again_when_it_is_ejected_again() -> None:
    joined = Joined(2, 2)
    joined.worker(0, 0).ejected = "it lags"
    joined.flush(0.1)
    joined.worker(0, 0).ejected = ""
    joined.flush(0.2)
    joined.worker(0, 0).ejected = "it lags"
    joined.flush(0.3)
    assert joined.benches[1].checked == [joined.worker(1, 0)] * 2
    assert joined.worker(1, 0).ejected == ""


# -- orders ------------------------------------------------------------------------------------------------------------


def draining(joined: Joined, number: int = 0) -> list[bool]:
    return [bench.workers[number].draining for bench in joined.benches]


def test_a_drain_at_one_router_is_one_at_all_and_so_is_its_end() -> None:
    joined = Joined(3, 2)
    joined.flush(0.0)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)
    joined.flush(0.1)
    assert draining(joined) == [True, True, True]
    assert draining(joined, 1) == [False, False, False]
    joined.benches[2].fleet.set_draining(joined.worker(2, 0), False)
    joined.flush(0.2)
    assert draining(joined) == [False, False, False]
    joined.flush(0.3)
    assert len(orders(joined)) == 2  # nobody repeats what he was told


def test_the_stream_decides_between_two_orders_at_once() -> None:
    joined = Joined(2, 1)
    joined.flush(0.0)
    for bench in joined.benches:
        bench.fleet.set_draining(bench.workers[0], True)
    joined.flush(0.1)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), False)
    joined.benches[1].fleet.set_draining(joined.worker(1, 0), False)
    joined.benches[1].fleet.set_draining(joined.worker(1, 0), True)
    joined.flush(0.2)
    assert draining(joined) == [True, True]


def test_a_new_router_learns_what_was_ordered_also_of_workers_that_come_later() -> None:
    joined = Joined(1, 3)
    joined.flush(0.0)
    for number in range(3):
        joined.benches[0].fleet.set_draining(joined.worker(0, number), True)
        joined.flush(0.1)
    joined.benches[0].fleet.set_draining(joined.worker(0, 1), False)
    joined.flush(0.2)
    late, state = joined.add(1)
    replay(joined, state)
    late.join(2)
    assert [worker.draining for worker in late.workers] == [True, False, True]
    assert state.outgoing(2.0)
    assert not [topic for topic, _ in state.outgoing(3.0) if topic is SharedTopic.ORDERS]


def test_an_old_order_that_comes_again_is_no_order() -> None:
    joined = Joined(2, 1)
    joined.flush(0.0)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)
    joined.flush(0.1)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), False)
    joined.flush(0.2)
    replay(joined, joined.states[1])
    joined.states[1].receive(SharedTopic.ORDERS, orders(joined)[0])
    joined.states[1].apply(1.0, LARGE)
    assert draining(joined) == [False, False]


def test_what_a_restart_or_an_own_engine_needs_is_no_order() -> None:
    joined = Joined(2, 1)
    joined.flush(0.0)
    fleet = joined.benches[0].fleet
    fleet.set_draining(joined.worker(0, 0), True, returning=True)
    own = fleet.add(msgspec.structs.replace(spec("own"), source=Source.REPLICAS), 0.0)
    fleet.set_draining(own, True)
    joined.flush(0.1)
    assert draining(joined) == [True, False]
    assert not orders(joined)


def test_what_the_state_file_says_at_the_start_is_no_order() -> None:
    joined = Joined(2, 1)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)
    joined.flush(0.0)
    assert draining(joined) == [True, False]


def test_the_end_of_a_restart_is_told_because_it_ends_what_an_operator_wanted_before() -> None:
    joined = Joined(2, 1)
    joined.flush(0.0)
    fleet = joined.benches[0].fleet
    fleet.set_draining(joined.worker(0, 0), True)
    joined.flush(0.1)
    fleet.set_draining(joined.worker(0, 0), True, returning=True)
    fleet.set_draining(joined.worker(0, 0), True)
    joined.flush(0.2)
    assert draining(joined) == [True, True]


@pytest.mark.parametrize("names", [b"1234567", packed(range(6000))])
def test_orders_of_any_form_do_no_harm(names: bytes) -> None:
    joined = Joined(1, 1)
    payload = Secret(KEY, 512).seal("orders", msgspec.msgpack.encode(OrderMessage(FORM, b"stranger", 1, names)))
    joined.states[0].receive(SharedTopic.ORDERS, payload)
    joined.states[0].apply(0.0, LARGE)
    assert draining(joined) == [False]


def test_many_orders_are_told_in_several_messages() -> None:
    joined = Joined(2, 2500)
    joined.flush(0.0)
    for worker in joined.benches[0].workers:
        joined.benches[0].fleet.set_draining(worker, True)
    joined.flush(0.1)
    assert len(orders(joined)) == 3
    assert all(worker.draining for worker in joined.benches[1].workers)
