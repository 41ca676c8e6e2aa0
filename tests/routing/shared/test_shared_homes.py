"""Sessions whose requests come to several routers: all of them send a session to the same home."""

from __future__ import annotations

import random

import pytest

from fleets import Attempt, facts
from joined import KEY, LARGE, Joined
from sglang_router.routing.facts import Facts
from sglang_router.routing.message_chains import MARK
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.sessions import BRANCH, Sessions
from sglang_router.routing.shared.homes import MOST_TOLD, SharedHomes
from sglang_router.routing.shared.members import Members
from sglang_router.routing.shared.records import SharedTopic
from sglang_router.routing.shared.secret import Secret


def joined(routers: int = 2, workers: int = 4, policy: str = "least_load", waits: bool = False) -> Joined:
    return Joined(routers, workers, policy, sessions=lambda: Sessions(True, waits=waits))


def of(session: bytes) -> Facts:
    found = facts()
    found.session = session
    return found


def serve(routers: Joined, number: int, session: bytes, now: float) -> Attempt:
    return routers.benches[number].send(of(session), now)


def hold(routers: Joined, number: int, session: bytes, now: float) -> Attempt:
    return routers.benches[number].ask(of(session), now).attempt


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_stays_at_one_worker_whichever_router_its_requests_come_to(policy: str) -> None:
    routers = joined(3, 5, policy)
    chance = random.Random(1)
    now = 0.0
    seen: dict[int, set[str]] = {}
    for turn in range(8):
        for session in range(20):
            attempt = serve(routers, chance.randrange(3), b"s%d" % session, now)
            seen.setdefault(session, set()).add(attempt.worker.url)
            assert attempt.branch == BRANCH or not turn
            now += 0.1
            routers.flush(now)
    assert {len(urls) for urls in seen.values()} == {1}


def test_sessions_that_began_at_two_routers_at_once_end_up_with_one_home() -> None:
    routers = joined(2, 4, "round_robin")
    routers.benches[1].serve()  # so that the turns differ
    first, second = serve(routers, 0, b"s", 0.0), serve(routers, 1, b"s", 0.0)
    assert first.worker.url != second.worker.url
    routers.flush(0.1)
    homes = [serve(routers, number, b"s", 0.2).worker.url for number in (0, 1, 0, 1)]
    assert len(set(homes)) == 1


def test_a_session_that_moves_takes_the_others_with_it() -> None:
    routers = joined(2, 2)
    home = serve(routers, 0, b"s", 0.0).worker
    routers.flush(0.1)
    serve(routers, 1, b"s", 0.2)
    bench = routers.benches[0]
    bench.fleet.set_draining(home, True)
    away = serve(routers, 0, b"s", 1.0).worker
    assert away is not home
    routers.flush(1.1)
    assert serve(routers, 1, b"s", 1.2).worker.url == away.url


def test_a_home_whose_cache_is_gone_is_none() -> None:
    routers = joined(2, 4, "round_robin")
    home = serve(routers, 0, b"s", 0.0).worker
    routers.flush(0.1)
    routers.benches[0].fleet.emptied(home)
    routers.flush(0.2)
    assert serve(routers, 1, b"s", 0.3).branch != BRANCH


def test_a_home_that_is_no_worker_here_is_none() -> None:
    routers = joined(1, 2)
    routers.add(1, "least_load", sessions=lambda: Sessions(True))
    serve(routers, 0, b"a", 0.0)
    serve(routers, 0, b"b", 0.0)
    routers.flush(0.1)
    assert {serve(routers, 1, b"a", 0.2).branch, serve(routers, 1, b"b", 0.2).branch} == {BRANCH, "least"}


def test_an_overloaded_home_is_left_or_visited_not_joined() -> None:
    routers = joined(2, 2)
    home = serve(routers, 0, b"s", 0.0).worker
    routers.flush(0.1)
    bench = routers.benches[1]
    bench.load(*[60 if worker.url == home.url else 0 for worker in bench.workers])
    away = serve(routers, 1, b"s", 0.2).worker
    assert away.url != home.url
    routers.flush(0.3)
    assert serve(routers, 0, b"s", 0.4).worker.url == away.url


def test_a_home_is_told_when_it_is_new_and_every_half_a_minute() -> None:
    routers = joined()
    for second in range(0, 100, 5):
        serve(routers, 0, b"s", float(second))
        routers.flush(second + 0.1)
    told = [topic for _, topic, _ in routers.sent if topic is SharedTopic.PLACEMENTS]
    assert len(told) == 3


def test_a_session_that_only_its_messages_name_is_not_told() -> None:
    routers = joined()
    serve(routers, 0, MARK + b"digest", 0.0)
    routers.flush(0.1)
    assert not [topic for _, topic, _ in routers.sent if topic is SharedTopic.PLACEMENTS]


def test_a_session_that_another_router_knows_does_not_wait_to_begin() -> None:
    routers = joined(2, 1, waits=True)
    sessions = routers.benches[1].router.sessions
    assert sessions.begins(of(b"s"), 0.0)
    serve(routers, 0, b"s", 0.0)
    routers.flush(0.1)
    assert not sessions.begins(of(b"s"), 0.2)
    assert sessions.begins(of(b"s"), 5000.0)


def test_a_new_router_learns_the_last_home_of_the_past() -> None:
    routers = joined(1, 3)
    home = serve(routers, 0, b"s", 0.0).worker
    routers.flush(0.1)
    routers.benches[0].fleet.set_draining(home, True)
    away = serve(routers, 0, b"s", 1.0).worker
    routers.flush(1.1)
    _, state = routers.add(3, "least_load", sessions=lambda: Sessions(True))
    for _, topic, payload in reversed(routers.sent):
        state.receive(topic, payload, old=True)
    assert not state.apply(2.0, LARGE)
    assert serve(routers, 1, b"s", 2.0).worker.url == away.url


def test_homes_are_bounded() -> None:
    secret = Secret(KEY, 512)
    routers = Joined(1, 1)
    members = routers.states[0].members
    homes = SharedHomes(members, secret, most=100)
    for number in range(20_000):
        homes.tell(b"%d" % number, routers.worker(0, 0), 0.0)
        assert len(homes) <= 102
    told = 0
    while found := homes.gather():
        assert len(found) <= 2 * MOST_TOLD
        told += len(found) // 2
    assert told + homes.crowded == 20_000
    assert homes.find(b"19999", -1.0) is routers.worker(0, 0)
    assert homes.find(b"1", -1.0) is None
    assert isinstance(members, Members)
