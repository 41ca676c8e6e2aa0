"""For how long an operator's order holds: as long as its worker, at the routers that have it and those to come."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fleets import Bench, spec
from joined import KEY, LARGE, Joined
from sglang_router.routing.shared.orders import KEPT_AFTER
from sglang_router.routing.shared.packing import packed
from sglang_router.routing.shared.records import FORM, OrderMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker


def fleet_of(routers: int, **said: Any) -> Joined:
    """Return routers that have one worker, "w", and have heard of each other."""
    joined = Joined(routers, 0)
    for bench in joined.benches:
        add(bench, **said)
    joined.flush(0.0)
    return joined


def add(bench: Bench, **said: Any) -> Worker:
    worker = bench.fleet.add(named(**said), 0.0)
    bench.workers = [worker]
    return worker


def named(**said: Any) -> WorkerSpec:
    found: WorkerSpec = msgspec.structs.replace(spec("w"), **said)
    return found


def drain(joined: Joined, number: int, now: float, draining: bool = True) -> None:
    joined.benches[number].fleet.set_draining(joined.worker(number, 0), draining)
    joined.flush(now)


def remove(joined: Joined, number: int) -> None:
    joined.benches[number].fleet.remove(joined.worker(number, 0))


def draining(joined: Joined) -> list[bool]:
    return [bench.workers[0].draining for bench in joined.benches]


def newcomer(joined: Joined, **said: Any) -> Worker:
    """Let a router read the orders from the beginning, and register the worker; return its worker."""
    bench, state = joined.add(0)
    for topic, payload in [each[1:] for each in joined.sent]:
        if topic is SharedTopic.ORDERS:
            state.receive(topic, payload)
    assert not state.apply(1.0, LARGE)
    return add(bench, **said)


def told(joined: Joined) -> int:
    return sum(topic is SharedTopic.ORDERS for _, topic, _ in joined.sent)


def test_a_drain_ends_with_its_worker_whoever_ordered_it_and_whoever_removes_it_first() -> None:
    joined = fleet_of(3)
    drain(joined, 0, 0.1)
    for number in (1, 2, 0):
        remove(joined, number)
        joined.flush(0.2 + number)
    for bench in joined.benches:
        assert not add(bench).draining
    joined.flush(10.0)
    joined.flush(10.0 + 2 * KEPT_AFTER)
    assert draining(joined) == [False, False, False]
    assert not newcomer(joined).draining


def test_the_end_of_a_worker_ends_the_drain_also_when_the_router_that_ordered_it_is_dead() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    del joined.states[0], joined.benches[0]
    remove(joined, 0)
    joined.flush(5.0)
    assert not newcomer(joined).draining


def test_a_worker_that_is_replaced_at_once_does_not_drain() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    remove(joined, 0)
    assert not add(joined.benches[0]).draining
    joined.flush(0.2)
    remove(joined, 1)
    add(joined.benches[1])
    joined.flush(0.3)
    joined.flush(1.0 + KEPT_AFTER)
    assert draining(joined) == [False, False]


def test_a_worker_that_is_drained_and_removed_at_once_leaves_no_order() -> None:
    joined = fleet_of(2)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)
    joined.tell(0.1)  # on its way
    remove(joined, 0)
    joined.flush(0.2)
    remove(joined, 1)
    joined.flush(0.3)
    assert not newcomer(joined).draining


def test_a_removal_at_one_router_sends_no_requests_to_what_drains_at_the_others() -> None:
    joined = fleet_of(3)
    drain(joined, 0, 0.1)
    remove(joined, 0)
    joined.flush(0.2)
    assert draining(joined)[1:] == [True, True]
    assert told(joined) == 2
    joined.flush(0.1 + KEPT_AFTER)
    assert told(joined) == 2
    joined.flush(0.3 + KEPT_AFTER)  # both tell it at once; later nobody does
    joined.flush(0.4 + 2 * KEPT_AFTER)
    assert told(joined) == 4
    assert newcomer(joined).draining


def test_a_router_that_ends_leaves_the_order_for_what_drains_there() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    remove(joined, 0)
    joined.flush(0.2)
    joined.sent += [(1, topic, payload) for topic, payload in joined.states[1].leave()]
    assert newcomer(joined).draining


def test_what_was_ordered_meanwhile_is_not_taken_back() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    remove(joined, 0)
    joined.flush(0.2)
    drain(joined, 1, 0.3, draining=False)
    joined.flush(1.0 + KEPT_AFTER)
    assert not newcomer(joined).draining


def test_another_pod_at_the_same_address_does_not_drain_and_the_same_one_does() -> None:
    pod: dict[str, Any] = {"source": Source.KUBERNETES, "instance": "uid-1"}
    joined = fleet_of(2, **pod)
    drain(joined, 0, 0.1)
    assert draining(joined) == [True, True]
    assert newcomer(joined, **pod).draining
    assert not newcomer(joined, **pod | {"instance": "uid-2"}).draining  # although nobody told the end of the first
    assert newcomer(joined, source=Source.FLAGS).draining  # it cannot tell which one it has


def test_the_late_end_of_a_pod_ends_no_drain_of_the_next_one() -> None:
    joined = fleet_of(2, instance="uid-1")
    drain(joined, 0, 0.1)
    remove(joined, 0)
    add(joined.benches[0], instance="uid-2")
    joined.flush(0.2)
    drain(joined, 0, 0.3)
    assert draining(joined) == [True, True]
    remove(joined, 1)
    joined.flush(0.4)
    assert newcomer(joined, instance="uid-2").draining


def test_the_end_of_a_pod_at_a_router_that_is_behind_leaves_the_drain_of_the_next_one_there() -> None:
    joined = fleet_of(2, instance="uid-1")
    drain(joined, 0, 0.1)
    remove(joined, 0)
    add(joined.benches[0], instance="uid-2")
    joined.flush(0.2)
    drain(joined, 0, 0.3)
    remove(joined, 1)
    assert add(joined.benches[1], instance="uid-2").draining  # before its own word comes back


def test_the_drain_of_a_pod_is_obeyed_also_where_the_end_of_the_one_before_is_not_told_yet() -> None:
    joined = fleet_of(2, instance="uid-1")
    drain(joined, 0, 0.1)
    for number in (0, 1):
        remove(joined, number)
        add(joined.benches[number], instance="uid-2")
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)
    for topic, payload in joined.states[0].outgoing(0.2):
        for state in joined.states:
            state.receive(topic, payload)
            assert not state.apply(0.2, LARGE)
    joined.flush(0.3)
    assert draining(joined) == [True, True]


def test_an_engine_that_is_restarted_for_repair_drains_on() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    for bench in joined.benches:
        bench.fleet.lost(bench.workers[0], 1.0)
        bench.fleet.probed(bench.workers[0], None, 2.0)
    joined.flush(3.0)
    assert draining(joined) == [True, True]
    assert newcomer(joined, source=Source.FLAGS).draining


def test_an_engine_whose_ranks_become_workers_drains_until_the_last_of_them_has_left() -> None:
    joined = fleet_of(1)
    drain(joined, 0, 0.1)
    fleet = joined.benches[0].fleet
    ranks = [fleet.add(named(dp_rank=rank), 0.2) for rank in (0, 1)]
    for rank in ranks:
        fleet.set_draining(rank, True)
    remove(joined, 0)
    joined.flush(0.3)
    assert newcomer(joined).draining
    for rank in ranks:
        assert newcomer(joined, dp_rank=rank.dp_rank).draining
        fleet.remove(rank)
        joined.flush(0.4)
        assert not newcomer(joined, dp_rank=rank.dp_rank).draining
    assert not newcomer(joined).draining


def test_what_the_store_has_lost_is_told_again_by_one_router() -> None:
    joined = fleet_of(3)
    drain(joined, 0, 0.1)
    for begin in (0.2, 60.0):  # the link is young at first, when the others may have said something else
        joined.flush(begin)
        joined.sent.clear()
        for state in joined.states:
            state.store_lost()
        for step in range(700):
            joined.flush(begin + step / 80)
            assert begin + step / 80 >= 5.0 or not told(joined)
        assert told(joined) == 1
        assert newcomer(joined).draining
        del joined.states[3:], joined.benches[3:]


def test_a_resumed_worker_is_told_again_too_for_a_store_may_know_an_older_order() -> None:
    joined = fleet_of(2)
    drain(joined, 0, 0.1)
    before = list(joined.sent)
    drain(joined, 1, 0.2, draining=False)
    joined.sent[:] = before
    for state in joined.states:
        state.store_lost()
    joined.flush(9.0)
    assert not newcomer(joined).draining


def test_what_newcomers_must_know_is_told_again_each_day_for_a_stream_keeps_so_much() -> None:
    joined = fleet_of(2)
    for state in joined.states:
        state.look(0.0)
    drain(joined, 0, 0.1)
    joined.sent.clear()
    for now in (86_000.0, 86_401.0, 86_410.0, 86_420.0):
        for state in joined.states:
            state.look(now)
        joined.flush(now)
    assert told(joined) == 2  # both at once, for time leaps here
    assert newcomer(joined).draining


def test_a_router_of_before_names_no_instances_and_is_heard() -> None:
    joined = fleet_of(1, instance="uid-1")
    secret = Secret(KEY, 512)
    name = packed([secret.worker(joined.worker(0, 0).url)])
    order(joined.states[0], [FORM, b"older one", 1, name, b""])
    assert draining(joined) == [True]
    order(joined.states[0], [FORM, b"newer one", 1, b"", name, b"", b"", [], b"", b"", b"a field of later"])
    assert draining(joined) == [False]


@pytest.mark.parametrize("instances", [packed([1]), packed([1, 2, 3]), b"1234567"])
def test_instances_that_fit_to_no_worker_are_refused(instances: bytes) -> None:
    joined = fleet_of(1)
    name = packed([Secret(KEY, 512).worker(joined.worker(0, 0).url)])
    order(joined.states[0], msgspec.to_builtins(OrderMessage(FORM, b"stranger", 1, name, b"", name, instances)))
    assert draining(joined) == [False]
    assert joined.states[0].reading.dropped == {"malformed": 1}


def order(state: SharedState, fields: object) -> None:
    state.receive(SharedTopic.ORDERS, Secret(KEY, 512).seal("orders", msgspec.msgpack.encode(fields)))
    assert not state.apply(1.0, LARGE)
