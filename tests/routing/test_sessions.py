"""Sessions stay where their context is, with any policy, as long as that does not overload anybody."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Attempt, Bench, facts
from sglang_router.routing import sessions as module
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.return_times import CEILING, UNKNOWN
from sglang_router.routing.rules import RetryRules
from sglang_router.routing.sessions import BRANCH, Sessions
from sglang_router.routing.worker import Worker

PLAIN = "least_load"


def bench(count: int = 4, policy: str = PLAIN, most: int = 1000, **settings: object) -> Bench:
    b = Bench(count, policy, **settings)  # type: ignore[arg-type]
    b.router.sessions = Sessions(True, most=most)
    return b


def of(session: bytes, text: bytes = b"", namespace: bytes = b"") -> Facts:
    found = facts(text, namespace=namespace)
    found.session = session
    return found


def serve(b: Bench, session: bytes, now: float = 0.0, text: bytes = b"") -> Attempt:
    return b.send(of(session, text), now)


def hold(b: Bench, session: bytes, now: float = 0.0, text: bytes = b"") -> Attempt:
    return b.ask(of(session, text), now).attempt


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_stays_at_one_worker_with_any_policy(policy: str) -> None:
    b = bench(5, policy)
    homes: dict[int, set[Worker]] = {}
    branches = Counter[str]()
    for turn in range(6):
        for session in range(20):
            text = b"prompt of %d " % session * (turn + 1)
            attempt = serve(b, b"s%d" % session, now=float(turn), text=text)
            homes.setdefault(session, set()).add(attempt.worker)
            branches[attempt.branch] += 1
    assert {len(workers) for workers in homes.values()} == {1}
    assert branches[BRANCH] == 100
    assert b.router.sessions.placed == {"new": 20, "free": 0, "home": 100, "leave": 0, "visit": 0}


def test_the_policy_learns_from_what_it_did_not_choose() -> None:
    b = bench(3, "cache_aware")
    first = serve(b, b"s", text=b"a long prompt that is cached now")
    second = serve(b, b"s", text=b"a long prompt that is cached now, and goes on")
    assert (second.worker, second.branch, second.matched) == (first.worker, BRANCH, 32)
    other = b.serve(b"a long prompt that is cached now, and goes on elsewhere")
    assert (other.worker, other.branch) == (first.worker, "hit"), "the tree knows what was sent home"
    assert other.matched == len(b"a long prompt that is cached now, and goes on")


def test_the_same_name_with_another_model_is_another_session() -> None:
    b = bench(2)
    hold(b, b"s")
    other = b.ask(of(b"s", namespace=b'"m"')).attempt
    assert other.branch == "least"
    assert [worker.load for worker in b.workers] == [1, 1]
    assert len(b.router.sessions.table) == 2


def test_nothing_is_done_when_nobody_asked_for_it() -> None:
    b = Bench(3, PLAIN)
    assert {serve(b, b"s").branch for _ in range(5)} == {"least"}
    assert len(b.router.sessions.table) == 0


def test_a_session_without_a_home_gets_another_one_and_stays_there() -> None:
    b = bench(3)
    home = serve(b, b"s").worker
    b.fleet.set_draining(home, True)
    moved = serve(b, b"s")
    assert moved.worker is not home
    assert moved.branch == "least"
    b.fleet.set_draining(home, False)
    again = serve(b, b"s")
    assert (again.worker, again.branch) == (moved.worker, BRANCH)


def test_a_home_that_was_emptied_is_none() -> None:
    b = bench(3)
    home = serve(b, b"s").worker
    b.fleet.emptied(home)
    assert serve(b, b"s").branch == "least"
    assert serve(b, b"s").branch == BRANCH


def test_a_home_whose_process_is_another_one_is_none() -> None:
    b = bench(2, checked=True)
    for worker in b.workers:
        b.fleet.probed(worker, None, 0.0)
    home = serve(b, b"s").worker
    b.fleet.lost(home, 1.0)
    assert serve(b, b"s", 1.0).worker is not home


def test_a_home_that_was_removed_is_none() -> None:
    b = bench(2)
    home = serve(b, b"s").worker
    b.fleet.remove(home)
    assert serve(b, b"s").worker is not home
    assert b.router.sessions.table.share(home).sessions == 0
    assert b.router.sessions.table.share(b.workers[1 - b.number(home)]).sessions == 1


def test_a_session_that_pauses_longer_than_sessions_do_is_free_again() -> None:
    b = bench(4)
    serve(b, b"s", 0.0)
    assert serve(b, b"s", UNKNOWN).branch == BRANCH
    assert serve(b, b"s", 2 * UNKNOWN + 1.0).branch == "least"


def test_a_long_answer_is_no_pause() -> None:
    b = bench(4)
    running = hold(b, b"s", 0.0)
    assert serve(b, b"s", 5 * UNKNOWN).branch == BRANCH
    running.end(now=9 * UNKNOWN)
    assert serve(b, b"s", 9.9 * UNKNOWN).branch == BRANCH


def test_pauses_are_learnt() -> None:
    b = bench(4)
    for turn in range(200):
        serve(b, b"s", turn * 10.0)
    assert b.router.sessions.table.returns.time_to_live == 60.0
    assert serve(b, b"s", 1990.0 + 59.0).branch == BRANCH
    assert serve(b, b"s", 2049.0 + 61.0).branch == "least"


def test_new_sessions_are_spread_once_the_live_ones_fill_the_caches() -> None:
    """They share their beginning, so the policy would send all of them to one worker."""
    b = Bench(2, "cache_aware")
    b.router.sessions = Sessions(True, capacity=100_000)
    text = b"x" * 40_000  # 10,000 tokens: it is expected to have 56,000 in the end
    attempts = [serve(b, b"s%d" % number, text=text) for number in range(6)]
    assert [attempt.branch for attempt in attempts[:3]] == ["miss", "hit", "hit"], "112,000 of 200,000"
    assert sorted(b.spread(attempts[:3])) == [0, 3]
    assert sorted(b.spread(attempts)) == [3, 3]
    b = Bench(2, "cache_aware")
    b.router.sessions = Sessions(True)
    attempts = [serve(b, b"s%d" % number, text=text) for number in range(6)]
    assert sorted(b.spread(attempts)) == [0, 6], "nobody knows how large the caches are"


# -- overload --------------------------------------------------------------------------------------------------------


def test_a_session_leaves_a_home_that_is_far_more_loaded_than_the_others() -> None:
    b = bench(3)
    assert serve(b, b"s").worker is b.workers[1]
    b.load(1, 10, 1)
    assert serve(b, b"s", 1.0).branch == BRANCH, "twice the mean of 1, and 8, is 10"
    b.load(1, 11, 1)
    left = serve(b, b"s", 2.0)
    assert left.worker is not b.workers[1]
    assert left.branch == "least"
    assert b.router.sessions.placed["leave"] == 1


def test_it_does_not_leave_again_before_its_time() -> None:
    b = bench(2)
    home = serve(b, b"s").worker
    other = b.workers[1 - b.number(home)]
    for _ in range(10):
        b.fleet.lease(home)
    assert serve(b, b"s", 1.0).worker is other
    for _ in range(30):
        b.fleet.lease(other)
    assert serve(b, b"s", 2.0).worker is other, "30 against 10 is overloaded, but it came a second ago"
    assert serve(b, b"s", 1.0 + UNKNOWN).worker is home


def test_one_that_moved_still_evades_a_home_that_is_far_overloaded_but_does_not_move() -> None:
    b = bench(2)
    home = serve(b, b"s").worker
    other = b.workers[1 - b.number(home)]
    leases = [b.fleet.lease(home) for _ in range(10)]
    assert serve(b, b"s", 1.0).worker is other
    more = [b.fleet.lease(other) for _ in range(60)]
    visit = serve(b, b"s", 2.0)
    assert (visit.worker, b.router.sessions.placed["visit"]) == (home, 1)
    for lease in leases + more:
        lease.close(Outcome.SERVED, 3.0)
    assert serve(b, b"s", 3.0).worker is other, "it was a visit only"


def test_a_single_candidate_is_never_overloaded() -> None:
    b = bench(1)
    serve(b, b"s")
    b.load(100)
    assert serve(b, b"s").branch == BRANCH


def test_known_backlogs_count_instead_of_loads() -> None:
    backlogs: dict[Worker, float] = {}
    b = Bench(3, PLAIN)
    b.router.sessions = Sessions(True, backlog=lambda worker, size, now: backlogs[worker] + size / 1000)
    backlogs.update(dict.fromkeys(b.workers, 0.0))
    text = b"x" * 10_000
    home = serve(b, b"s", text=text).worker
    for _ in range(50):
        b.fleet.lease(home)
    assert serve(b, b"s", text=text).branch == BRANCH, "many requests, but they take no time"
    backlogs[home] = 40.9
    assert serve(b, b"s", text=text).branch == BRANCH, "its text would take 10 s elsewhere, and that counts four times"
    backlogs[home] = 41.1
    assert serve(b, b"s", text=text).worker is not home


def test_where_no_backlog_is_known_loads_count() -> None:
    b = Bench(2, PLAIN)
    b.router.sessions = Sessions(True, backlog=lambda worker, size, now: -1.0)
    home = serve(b, b"s").worker
    for _ in range(9):
        b.fleet.lease(home)
    assert serve(b, b"s").worker is not home


@settings(max_examples=60)
@given(st.integers(2, 8), st.integers(1, 300), st.integers(0, 2**32))
def test_one_key_that_all_use_piles_up_on_nobody(count: int, requests: int, seed: int) -> None:
    """No worker has more than twice (twice the mean of the others, and 8) requests, and one."""
    b = bench(count, "power_of_two", seed=seed)
    for _ in range(requests):
        hold(b, b"everybody")
        loads = [worker.load for worker in b.workers]
        highest = max(loads)
        mean = (sum(loads) - highest) / (count - 1)
        assert highest <= module._FAR * (module._FACTOR * mean + module._SPARE) + 1


# -- legs and memory -------------------------------------------------------------------------------------------------


def test_a_retry_moves_the_session_to_where_it_was_served() -> None:
    b = bench(3, retries=RetryRules(initial_backoff=0.0))
    home = serve(b, b"s").worker
    attempt = hold(b, b"s").retry(Outcome.FAILED)
    assert attempt is not None
    assert attempt.worker is not home
    attempt.end()
    assert serve(b, b"s").worker is attempt.worker
    session = b.router.sessions.get(of(b"s"))
    assert session is not None
    assert session.running == 0


def test_a_stream_that_is_continued_stays_in_its_session() -> None:
    b = bench(3)
    attempt = hold(b, b"s")
    rest = facts(b"the rest")
    again = b.router.retry(attempt.asked.tag, attempt.leg, rest, Outcome.CUT, 0.0, True)
    assert again is not None
    assert rest.session == b"s"


def test_what_is_remembered_is_bounded() -> None:
    b = bench(3, most=10)
    for number in range(50):
        serve(b, b"s%d" % number)
    assert len(b.router.sessions.table) == 10
    assert serve(b, b"s49").branch == BRANCH
    assert serve(b, b"s0").branch == "least"


def test_a_session_that_was_forgotten_while_it_ran_ends_quietly() -> None:
    b = bench(3, most=1)
    attempt = hold(b, b"a")
    serve(b, b"b")
    attempt.end()
    assert len(b.router.sessions.table) == 1


def test_silent_sessions_are_forgotten_in_time() -> None:
    b = bench(3)
    for number in range(5):
        serve(b, b"s%d" % number, float(number))
    running = hold(b, b"long", 5.0)
    table = b.router.sessions.table
    b.router.look(6.0)
    assert table.live == 6
    assert sum(table.share(worker).sessions for worker in b.workers) == 6
    b.router.look(3.5 + UNKNOWN)
    assert table.live == 2
    b.router.look(2.5 + CEILING)
    assert len(b.router.sessions.table) == 3
    b.router.look(9 * CEILING)
    b.router.look(9 * CEILING)
    assert len(b.router.sessions.table) == 1
    running.end(now=9 * CEILING)
    b.router.look(11 * CEILING)
    assert len(table) == table.live == 0
    assert all(table.share(worker).sessions == 0 for worker in b.workers)


def test_placing_changes_nothing() -> None:
    b = bench(4, "power_of_two")
    rng = random.Random(3)
    for number in range(200):
        asked = of(b"s%d" % rng.randrange(20))
        before = repr(b.router.sessions), dict(b.router.sessions.placed)
        one, other = (b.router.sessions.place(asked, b.pool.candidates(0.0), float(number)) for _ in "12")
        assert repr(one) == repr(other)
        assert before == (repr(b.router.sessions), b.router.sessions.placed)
        hold(b, asked.session, float(number))
