"""What one sick router, a stream that loses, doubles and mixes up, or a late key may not do to the others."""

from __future__ import annotations

import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Attempt
from joined import KEY, LARGE, Joined
from sglang_router.routing.shared.homes import SharedHomes
from sglang_router.routing.shared.members import Members
from sglang_router.routing.shared.packing import packed
from sglang_router.routing.shared.peers import MOST_NAMES
from sglang_router.routing.shared.records import FORM, LoadsMessage, PlacementsMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.shared.sharing import SharedState

OTHER = bytes(reversed(range(32)))
SECRET = Secret(KEY, 512)


def lie(state: SharedState, number: int, now: float = 0.0, **fields: Any) -> None:
    """Let a router that has the key tell something."""
    message = LoadsMessage(FORM, b"sick one", number, **fields)
    state.receive(SharedTopic.LOADS, SECRET.seal("loads", msgspec.msgpack.encode(message)))
    assert not state.apply(now, LARGE)


def test_strange_workers_of_the_key_before_are_forgotten_with_it() -> None:
    secret = Secret(KEY, 512)
    members = Members(secret, lambda name: None)
    for name in range(1 << 14):
        assert members.find(name).worker is None
    secret.use(OTHER)
    members.rename()
    assert members.strange == 0
    for name in range((1 << 14) + 1):
        members.find(name)
    assert members.strange == 1 << 14


def test_an_order_counts_under_the_key_that_the_fleet_has_later() -> None:
    joined = Joined(2, 2)
    joined.flush(0.0)
    joined.benches[0].fleet.set_draining(joined.worker(0, 0), True)  # not told yet
    for state in joined.states:
        state.use_key(OTHER)
    joined.flush(0.1)
    assert [bench.workers[0].draining for bench in joined.benches] == [True, True]
    for state in joined.states:
        state.use_key(KEY)
    late, state = joined.add(1)
    joined.flush(0.2)
    assert not late.workers[0].draining  # what it can read was sealed by the keys of before
    joined.flush(9.0)
    assert late.workers[0].draining


def test_what_a_router_is_about_to_tell_of_a_session_counts_more_than_what_came_before() -> None:
    joined = Joined(1, 2)
    members, (first, second) = joined.states[0].members, joined.benches[0].workers
    homes = SharedHomes(members, SECRET)
    homes.tell(b"s", first, 0.0)
    (session, home) = homes.gather()
    homes.tell(b"s", second, 0.1)
    homes.hear(session, home, False, 0.2)  # the own message comes back
    assert homes.find(b"s", 0.0) is second
    assert homes.gather()
    homes.hear(session, home, False, 0.3)
    assert homes.find(b"s", 0.0) is first


def test_workers_of_a_message_that_are_too_many_leave_no_lives_behind() -> None:
    state = Joined(1, 1).states[0]
    for begin_at in (1, 5001, 10001, 15001):
        names = range(begin_at, begin_at + 5000)
        workers = packed([1, *names] if begin_at == 15001 else names)
        message = PlacementsMessage(FORM, b"sick one", begin_at, workers)
        state.receive(SharedTopic.PLACEMENTS, SECRET.seal("placements", msgspec.msgpack.encode(message)))
        assert not state.apply(0.0, LARGE)
    assert state.members.strange == 1 << 14
    assert int(repr(state.prefixes).split()[2]) == 1 << 14


def test_a_router_that_doubts_all_the_time_is_not_heard_all_the_time() -> None:
    joined = Joined(1, 1)
    bench, name = joined.benches[0], SECRET.worker(joined.worker(0, 0).url)
    for number in range(400):
        lie(joined.states[0], number, number * 0.025, names=packed([name]), states=packed([(number & 1) << 24]))
    assert 1 <= len(bench.checked) <= 5


def test_a_router_that_tells_of_endless_workers_takes_no_memory() -> None:
    joined = Joined(1, 1)
    for number in range(12):
        names = range(number * 4000, number * 4000 + 4000)
        lie(joined.states[0], number, names=packed(names), states=packed([1] * 4000))
    (peer,) = joined.states[0].peers.by_name.values()
    assert len(peer.sent) == len(peer.running) == MOST_NAMES
    lie(joined.states[0], 99, whole=True, high=(1 << 64) - 1)
    assert not peer.running
    assert not peer.sent


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32))
def test_after_a_stream_that_loses_doubles_and_mixes_up_all_agree(seed: int) -> None:
    """Loads, with workers that are removed and come back, drains, and routers that leave and go on."""
    chance, joined = random.Random(seed), Joined(3, 3)
    joined.lost = True  # this test carries the messages
    open_: list[Attempt] = []
    now, carried = 0.0, 0
    waiting: list[tuple[SharedTopic, bytes]] = []
    for _ in range(80):
        now += 0.03
        bench = chance.choice(joined.benches)
        act = chance.random()
        if act < 0.4:
            if bench.pool.candidates(now):
                open_.append(bench.route(now=now))
        elif act < 0.7 and open_:
            open_.pop(chance.randrange(len(open_))).end(now=now)
        elif act < 0.8:
            worker = chance.choice(list(bench.fleet))
            bench.fleet.remove(worker)
            bench.fleet.probed(bench.fleet.add(worker.spec, now), None, now)
        elif act < 0.85:
            waiting += chance.choice(joined.states).leave()
        joined.tell(now)
        for _, topic, payload in joined.sent[carried:]:
            waiting += [(topic, payload)] * chance.choice([0, 1, 1, 2])
        carried = len(joined.sent)
        chance.shuffle(waiting)
        for topic, payload in waiting[: len(waiting) // 2]:
            for state in joined.states:
                state.receive(topic, payload)
        del waiting[: len(waiting) // 2]
        for state in joined.states:
            state.apply(now, LARGE)
            state.look(now)
    joined.lost = False
    joined.flush(now + 1.5)
    own = [[bench.fleet.by_url(w.url).own_load for w in joined.benches[0].fleet] for bench in joined.benches]  # type: ignore[union-attr]
    total = [sum(column) for column in zip(*own, strict=True)]
    for bench in joined.benches:
        assert [bench.fleet.by_url(w.url).load for w in joined.benches[0].fleet] == total  # type: ignore[union-attr]
    for attempt in open_:
        attempt.end(now=now + 2.0)
    joined.flush(now + 3.0)
    assert [worker.load for bench in joined.benches for worker in bench.fleet] == [0] * 9
