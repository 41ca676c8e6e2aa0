"""Routers that fill the windows of the same decode workers: together no more than one would, and each its part."""

from __future__ import annotations

from typing import Any

from fleets import Asked, Bench
from joined import Joined
from pairs import NEVER, UNCHECKED, chat
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.facts import read
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.queue import ROOM
from sglang_router.routing.rules import QueueRules
from sglang_router.routing.spec import WorkerSpec


def pairs_of(routers: int, window: int, decode: int = 1) -> Joined:
    """Return routers in front of the same prefill worker, and of decode workers with a window."""
    joined = Joined(routers, 0, assign=None, rules=NEVER, queue=QueueRules(queue_size=100))
    for bench in joined.benches:
        for name in ("p0", *(f"d{number}" for number in range(decode))):
            role = {"p": "prefill", "d": "decode"}[name[0]]
            worker = bench.fleet.add(WorkerSpec(url=f"http://{name}:1", worker_type=role, health=UNCHECKED), 0.0)
            bench.workers.append(worker)
            if role == "decode":
                bench.fleet.reported(worker, EngineReport(window=window))
    flush(joined, 0.0)
    return joined


def flush(joined: Joined, now: float) -> None:
    joined.flush(now)
    for state, bench in zip(joined.states, joined.benches, strict=True):
        state.look(now)
        bench.settle(now)


def ask(joined: Joined, number: int, count: int, now: float = 0.1) -> list[Asked]:
    return [joined.benches[number].ask(chat(), now) for _ in range(count)]


def waits(asked: list[Asked]) -> list[bool]:
    return [each.waits is not None and each.waits[0] == ROOM for each in asked]


def end(bench: Bench, asked: list[Asked], now: float) -> None:
    for each in asked:
        for leg in each.plan.legs:
            bench.router.ended(each.tag, leg, Outcome.SERVED, now)


def test_each_router_gets_its_part_of_a_window_that_another_one_has_filled() -> None:
    joined = pairs_of(2, 4)
    greedy = ask(joined, 0, 6)
    assert waits(greedy) == [False] * 4 + [True] * 2
    flush(joined, 0.2)
    late = ask(joined, 1, 3, 0.3)
    assert waits(late) == [False, False, True]
    flush(joined, 0.4)
    end(joined.benches[0], greedy[:2], 0.5)  # six of four are there until then
    joined.benches[0].settle(0.5)
    assert waits(greedy[4:]) == [True, True]
    flush(joined, 0.6)
    assert waits(late) == [False, False, True]
    end(joined.benches[0], greedy[2:3], 0.7)
    joined.benches[0].settle(0.7)
    assert waits(greedy[4:]) == [False, True], "it has one there, and its part is two"


def test_routers_that_do_not_fill_their_part_leave_the_window_to_the_others() -> None:
    joined = pairs_of(3, 6)
    first = ask(joined, 0, 1)
    flush(joined, 0.2)
    assert waits(ask(joined, 1, 6, 0.3)) == [False] * 5 + [True]
    flush(joined, 0.4)
    assert waits(ask(joined, 0, 2, 0.5)) == [False, True]
    assert not any(waits(first))


def test_a_window_smaller_than_the_number_of_routers_has_no_parts() -> None:
    joined = pairs_of(3, 1)
    first = ask(joined, 0, 1)
    flush(joined, 0.2)
    waiting = ask(joined, 1, 1, 0.3)
    assert waits(waiting) == [True]
    end(joined.benches[0], first, 0.4)
    flush(joined, 0.5)
    flush(joined, 0.6)
    assert waits(waiting) == [False]


def test_a_list_of_prompts_counts_as_many_times_in_the_part_of_its_router() -> None:
    joined = pairs_of(2, 8)
    ask(joined, 0, 8)
    flush(joined, 0.2)
    bench = joined.benches[1]

    def listed(count: int) -> Asked:
        return bench.ask(read(ENDPOINTS[b"/generate"], b'{"text":[%b]}' % b",".join([b'"x"'] * count)), 0.3)

    assert waits([listed(3), listed(2)]) == [False, True]
    assert bench.workers[1].window.more == 2


def test_what_other_routers_run_is_not_taken_for_requests_of_strangers() -> None:
    joined = pairs_of(2, 8)
    ask(joined, 0, 3)
    flush(joined, 0.2)
    bench = joined.benches[1]
    decode = bench.workers[1]
    for _ in range(3):
        bench.fleet.reported(decode, EngineReport(window=8, running=3))
    assert decode.window.limit == 8
    for _ in range(3):
        bench.fleet.reported(decode, EngineReport(window=8, running=5))
    assert decode.window.limit == 6


def test_a_worker_that_joins_later_is_divided_too() -> None:
    joined = pairs_of(2, 4)
    said: dict[str, Any] = {"url": "http://d1:1", "worker_type": "decode", "health": UNCHECKED}
    for bench in joined.benches:
        bench.fleet.set_draining(bench.workers[1], True)
        worker = bench.fleet.add(WorkerSpec(**said), 0.0)
        bench.fleet.reported(worker, EngineReport(window=4))
    ask(joined, 0, 4)
    flush(joined, 0.2)
    assert waits(ask(joined, 1, 3, 0.3)) == [False, False, True]
