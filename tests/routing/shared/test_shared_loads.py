"""What routers tell each other of the load: it counts everywhere, and nothing of it lasts longer than who told it."""

from __future__ import annotations

import random

import msgspec
import pytest

from fleets import Attempt, facts, spec
from joined import KEY, LARGE, Joined
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import FleetRules, QueueRules
from sglang_router.routing.shared.records import FORM, LoadsMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret


def test_a_request_of_another_router_counts_at_its_worker() -> None:
    joined = Joined(2, 2)
    attempt = joined.benches[0].route()
    number = joined.benches[0].number(attempt.worker)
    assert joined.loads(1) == [0, 0]
    joined.flush(1.0)
    assert joined.loads(0) == joined.loads(1) == [1 - number, number]
    assert (joined.worker(0, number).own_load, joined.worker(1, number).own_load) == (1, 0)
    attempt.end(Outcome.SERVED, now=1.5)
    joined.flush(2.0)
    assert joined.loads(0) == joined.loads(1) == [0, 0]


def test_the_roster_follows_so_that_the_least_loaded_worker_is_that_of_all_routers() -> None:
    joined = Joined(2, 3)
    joined.benches[0].load(5, 0, 3)
    joined.benches[1].load(0, 2, 0)
    joined.flush(1.0)
    for bench in joined.benches:
        roster = bench.pool.candidates(1.0).roster
        assert [roster.levels[load].bit_count() for load in (2, 3, 5)] == [1, 1, 1]
        assert (roster.low, roster.high) == (2, 5)


def test_only_what_changed_is_told_and_all_of_it_once_a_second() -> None:
    joined = Joined(2, 2)
    joined.flush(0.0)
    joined.flush(0.1)
    assert len(joined.sent) == 2  # the first ones hold all loads
    joined.benches[0].route()
    joined.flush(0.2)
    joined.flush(0.3)
    assert len(joined.sent) == 3
    joined.flush(1.1)
    assert len(joined.sent) == 5
    assert {topic for _, topic, _ in joined.sent} == {SharedTopic.LOADS}


def test_a_message_that_is_lost_is_mended_by_the_next_whole_one() -> None:
    joined = Joined(2, 2)
    joined.flush(0.0)
    first, second = joined.benches[0].route(), joined.benches[0].route()
    joined.flush(0.1)
    joined.lost = True
    first.end(now=0.2)
    second.end(now=0.2)
    joined.flush(0.3)
    joined.lost = False
    assert joined.loads(1) == [1, 1]
    joined.flush(1.3)
    assert joined.loads(1) == [0, 0]


def test_what_comes_twice_or_late_changes_nothing() -> None:
    joined = Joined(2, 1)
    attempt = joined.benches[0].route()
    joined.flush(0.0)
    attempt.end(now=0.1)
    joined.flush(0.2)
    for _, topic, payload in joined.sent:
        joined.states[1].receive(topic, payload)
        joined.states[1].apply(0.3, 1000)
    assert joined.loads(1) == [0]


def test_a_router_that_is_silent_for_three_seconds_counts_no_more() -> None:
    joined = Joined(2, 1)
    joined.benches[0].route()
    joined.flush(0.0)
    joined.states[1].look(2.9)
    assert joined.loads(1) == [1]
    joined.states[1].look(3.1)
    assert joined.loads(1) == [0]
    assert not joined.states[1].peers.by_name


def test_old_messages_that_somebody_writes_again_bring_back_no_router_that_is_gone() -> None:
    joined = Joined(2, 1)
    joined.benches[0].route()
    joined.flush(0.0)
    state, told = joined.states[1], [message[1:] for message in joined.sent if message[0] == 0]

    def write_again(now: float) -> None:
        for topic, payload in told:
            state.receive(topic, payload)
        state.apply(now, 1000)

    write_again(2.9)  # it was killed
    state.look(3.1)
    assert joined.loads(1) == [0]
    write_again(3.2)
    assert joined.loads(1) == [0]
    assert not state.peers.by_name


def test_a_router_that_leaves_counts_no_more_at_once() -> None:
    joined = Joined(2, 1)
    joined.benches[0].route()
    joined.flush(0.0)
    for topic, payload in joined.states[0].leave():
        joined.states[1].receive(topic, payload)
    joined.states[1].apply(0.1, 1000)
    assert joined.loads(1) == [0]


def test_a_worker_that_is_known_here_later_has_the_load_that_was_told() -> None:
    joined = Joined(1, 2)
    joined.benches[0].load(0, 4)
    late, state = joined.add(1)
    joined.flush(0.0)
    assert joined.loads(1) == [0]
    late.join(1)
    assert joined.loads(1) == [0, 4]
    late.fleet.remove(late.workers[1])
    joined.benches[0].load(0, 5)
    joined.flush(0.1)
    assert late.workers[1].elsewhere == 4  # of one that is gone nothing is counted any more
    assert state.members.strange == 1


def test_a_full_worker_is_full_for_all_routers_and_has_room_for_all() -> None:
    joined = Joined(2, 1, rules=FleetRules(most_load=1), queue=QueueRules(queue_size=10))
    first = joined.benches[0].route()
    joined.flush(0.0)
    waiting = joined.benches[1].ask(facts(), 0.1)
    assert waiting.waits is not None
    first.end(now=0.2)
    joined.flush(0.3)
    joined.benches[1].settle(0.3)
    assert waiting.attempt.worker is joined.worker(1, 0)


@pytest.mark.parametrize("liar", [False, True])
def test_a_router_gets_its_part_of_full_workers_although_another_one_always_has_a_queue(liar: bool) -> None:
    joined = Joined(2, 1, rules=FleetRules(most_load=4), queue=QueueRules(queue_size=100))
    running = [joined.benches[0].route(now=0.0) for _ in range(4)]
    if liar:
        joined.benches[0].load(65535)
    joined.flush(0.0)
    joined.states[1].look(0.0)
    asked = [joined.benches[1].ask(facts(), 0.1) for _ in range(3)]
    assert [each.waits is None for each in asked] == [True, True, False]
    joined.flush(0.2)
    assert joined.worker(0, 0).elsewhere == 2
    if not liar:
        for attempt in running[:3]:
            attempt.end(now=0.3)
        joined.flush(0.4)
        joined.benches[1].settle(0.4)
        assert asked[2].attempt.worker is joined.worker(1, 0)
        assert joined.loads(1) == [4]
    joined.benches[0].fleet.pools.limit(1)
    joined.states[0].look(0.5)
    assert not joined.benches[0].pool.has_room(joined.worker(0, 0))


def test_the_backlog_of_all_routers_is_one_clock_and_not_a_sum() -> None:
    joined = Joined(2, 1, "cost")
    here, there = joined.worker(0, 0).work, joined.worker(1, 0).work
    here.free_at = 4.0
    joined.flush(0.0)
    assert there.backlog(0.0) == pytest.approx(4.0)
    there.sent("a", 0, True, 0.0)
    assert there.own_backlog(0.0) == pytest.approx(4.0 + there.prefill(0))
    joined.flush(0.1)
    assert here.backlog(0.1) == pytest.approx(there.own_backlog(0.1), abs=0.01)
    here.free_at = there.free_at = 0.0
    here.head = there.head = float("inf")
    joined.flush(0.2)
    assert here.backlog(0.2) == there.backlog(0.2) == 0.0


@pytest.mark.parametrize("removed", [False, True])
def test_the_first_request_of_another_router_after_a_restart_counts_as_one(removed: bool) -> None:
    joined = Joined(2, 1, "cost")
    joined.flush(0.0)
    fleet, pause = joined.benches[0].fleet, 1.0
    for number in range(1, 4):
        attempt = joined.benches[0].route(now=pause * number)
        joined.flush(pause * number)
        attempt.end(now=pause * number)
    there = joined.worker(1, 0).work
    before = there.gap
    if removed:
        fleet.remove(joined.worker(0, 0))
        fleet.add(spec("w0"), 3.5)
    else:
        fleet.lost(joined.worker(0, 0), 3.5)
        fleet.probed(joined.worker(0, 0), None, 3.6)
    joined.benches[0].route(now=4.0)
    joined.flush(4.0)
    assert joined.loads(1) == [1]
    assert there.gap == pytest.approx(before + (pause - before) * 0.05)


def test_requests_that_routers_hold_without_a_worker_count_while_they_are_told() -> None:
    joined = Joined(3, 0)
    joined.states[0].holds, joined.states[1].holds = lambda: 3, lambda: 2
    joined.flush(0.0)
    assert [state.held_elsewhere for state in joined.states] == [2, 3, 5]
    joined.states[0].holds = lambda: 0
    joined.flush(0.5)
    assert joined.states[2].held_elsewhere == 5
    joined.flush(1.0)
    assert joined.states[2].held_elsewhere == 2
    for topic, payload in joined.states[1].leave():
        joined.states[2].receive(topic, payload)
    assert not joined.states[2].apply(1.1, LARGE)
    assert joined.states[2].held_elsewhere == 0
    joined.states[0].look(9.0)  # the others were silent
    assert joined.states[0].held_elsewhere == 0


@pytest.mark.parametrize(("told", "counted"), [((), 0), ((7,), 7), ((-7,), 0), ((1 << 60,), 1 << 20)])
def test_a_router_of_before_tells_nothing_that_it_holds_and_no_figure_is_believed(
    told: tuple[int, ...], counted: int
) -> None:
    joined = Joined(1, 0)
    packed = msgspec.msgpack.encode(LoadsMessage(FORM, b"stranger", 1, whole=True))
    fields = [*msgspec.msgpack.decode(packed)[:-1], *told]
    joined.states[0].receive(SharedTopic.LOADS, Secret(KEY, 512).seal("loads", msgspec.msgpack.encode(fields)))
    assert not joined.states[0].apply(0.0, LARGE)
    assert joined.states[0].held_elsewhere == counted
    assert not joined.states[0].reading.dropped


def test_all_loads_are_zero_in_the_end_whatever_happened() -> None:
    chance = random.Random(3)
    joined = Joined(3, 4)
    open_: list[Attempt] = []
    now = 0.0
    for _ in range(600):
        now += 0.02
        if open_ and chance.random() < 0.5:
            open_.pop(chance.randrange(len(open_))).end(now=now)
        else:
            open_.append(chance.choice(joined.benches).route(now=now))
        joined.lost = chance.random() < 0.3
        joined.flush(now)
        for state in joined.states:
            state.look(now)
    for attempt in open_:
        attempt.end(now=now)
    joined.lost = False
    joined.flush(now + 1.0)
    assert [joined.loads(number) for number in range(3)] == [[0] * 4] * 3


def test_messages_are_bounded_however_many_workers_there_are() -> None:
    joined = Joined(2, 2500)
    joined.benches[0].load(*[1] * 2500)
    joined.flush(0.0)
    assert max(len(payload) for _, _, payload in joined.sent) <= 1 << 16
    assert joined.loads(1) == [1] * 2500


def test_work_is_done_in_pieces() -> None:
    joined = Joined(2, 1000)
    joined.benches[0].load(*[1] * 1000)
    joined.tell(0.0)
    state = joined.states[1]
    assert state.apply(0.0, 100)
    assert 0 < sum(joined.loads(1)) < 300
    while state.apply(0.0, 100):
        pass
    assert sum(joined.loads(1)) == 1000


def test_a_whole_message_in_parts_forgets_nothing_of_the_other_parts() -> None:
    joined = Joined(2, 5000)
    joined.benches[0].load(*[1] * 5000)
    joined.flush(0.0)
    joined.benches[0].load(*[2] * 5000)
    joined.tell(1.0)
    state = joined.states[1]
    seen = []
    while state.apply(1.0, 500):
        seen.append(min(joined.loads(1)))
    assert set(seen) <= {1, 2}
    assert joined.loads(1) == [2] * 5000
