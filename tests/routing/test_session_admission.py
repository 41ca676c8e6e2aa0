"""New sessions start where they fit, wait where they do not, and give back what was set aside for them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Asked, Bench, facts, spec
from sglang_router.errors import SessionsFull
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan
from sglang_router.routing.queue import ROOM, SESSION
from sglang_router.routing.return_times import UNKNOWN
from sglang_router.routing.rules import FleetRules, QueueRules
from sglang_router.routing.sessions import Sessions

PROMPT = b"x" * 40_000
"""10,000 tokens: a session that begins with them is expected to have 56,000 at its end."""


def bench(count: int = 2, capacity: int = 120_000, size: int = 10) -> Bench:
    b = Bench(count, "least_load", queue=QueueRules(queue_size=size, session_timeout=600.0))
    b.router.sessions = Sessions(True, waits=True, capacity=capacity)
    return b


def of(session: bytes, text: bytes = PROMPT) -> Facts:
    found = facts(text)
    found.session = session
    return found


def ask(b: Bench, session: bytes, now: float = 0.0, text: bytes = PROMPT) -> Asked:
    return b.ask(of(session, text), now)


def reserved(b: Bench) -> list[int]:
    return [b.router.sessions.table.share(worker).tokens for worker in b.workers]


def test_sessions_start_on_the_emptiest_worker_until_both_are_full() -> None:
    b = bench()
    started = [ask(b, b"s%d" % n) for n in range(4)]
    assert b.spread([each.attempt for each in started]) == [2, 2]
    assert reserved(b) == [112_000, 112_000]
    fifth = ask(b, b"s4")
    assert fifth.waits == (SESSION, 600.0)
    assert b.router.queue.sessions == 1


def test_live_sessions_go_on_while_others_wait() -> None:
    b = bench()
    started = [ask(b, b"s%d" % n) for n in range(4)]
    waiting = ask(b, b"s4")
    for number, each in enumerate(started):
        each.attempt.end(now=1.0)
        again = ask(b, b"s%d" % number, 2.0, PROMPT + b"more")
        assert again.attempt.worker is each.attempt.worker
        again.attempt.end(now=3.0)
    b.settle(3.0)
    assert waiting.waits is not None
    assert b.send(facts(b"no session")).branch == "least", "and so do requests without a session"


def test_those_that_wait_start_in_order_when_sessions_end() -> None:
    b = bench()
    homes = []
    for number in range(4):
        attempt = ask(b, b"s%d" % number).attempt
        attempt.end(now=float(number))
        homes.append(attempt.worker)
    first, second = ask(b, b"a", 4.0), ask(b, b"b", 5.0)
    b.router.look(UNKNOWN)
    assert first.waits is not None
    b.router.look(UNKNOWN + 0.5)
    assert first.attempt.worker is homes[0], "the session that ended was there"
    assert second.waits is not None
    b.router.look(UNKNOWN + 1.5)
    assert second.attempt.worker is homes[1]
    assert b.router.queue.sessions == 0


def test_a_session_that_waits_too_long_or_behind_too_many_is_refused() -> None:
    b = bench(size=2)
    for number in range(4):
        ask(b, b"s%d" % number)
    waiting = [ask(b, b"a"), ask(b, b"b")]
    with pytest.raises(SessionsFull) as refused:
        ask(b, b"c")
    assert refused.value.status == 429
    assert refused.value.retry_after is not None
    error = b.router.expired(waiting[0].tag, 600.0)
    assert isinstance(error, SessionsFull)
    assert error.retry_after is not None
    assert ask(b, b"c").waits is not None
    assert b.router.queue.refused["sessions_full"] == 1


def test_a_client_that_leaves_the_queue_takes_nothing() -> None:
    b = bench()
    for number in range(4):
        ask(b, b"s%d" % number)
    waiting = ask(b, b"a")
    b.router.withdraw(waiting.tag)
    assert b.router.queue.sessions == 0
    assert b.router.queue.idle


def test_a_session_larger_than_any_cache_starts_on_an_empty_worker() -> None:
    b = bench(capacity=50_000)
    assert ask(b, b"a").attempt.worker is not ask(b, b"b").attempt.worker
    assert ask(b, b"c").waits is not None


def test_what_engines_report_counts_before_the_option_and_without_both_all_start() -> None:
    b = bench(2, capacity=60_000)
    b.fleet.reported(b.workers[0], EngineReport(capacity_tokens=1_000_000))
    started = [ask(b, b"s%d" % n) for n in range(10)]
    assert b.spread([each.attempt for each in started]) == [9, 1]
    b = bench(2, capacity=0)
    assert b.spread([ask(b, b"s%d" % n).attempt for n in range(40)]) == [20, 20]


def test_what_is_reserved_grows_with_a_session_that_is_larger_than_expected() -> None:
    b = bench(1, capacity=1_000_000)
    ask(b, b"s").attempt.end()
    assert reserved(b) == [56_000]
    ask(b, b"s", 1.0, b"x" * 400_000).attempt.end(now=1.0)
    assert reserved(b) == [100_000]
    ask(b, b"s", 2.0, b"x" * 100_000).attempt.end(now=2.0)
    assert reserved(b) == [100_000], "it was compacted, but may grow again"


def test_a_pause_longer_than_usual_lets_others_start_and_the_session_goes_on_when_it_returns() -> None:
    b = bench(1, capacity=100_000)
    for turn in range(40):
        ask(b, b"s", turn * 10.0).attempt.end(now=turn * 10.0)
    waiting = ask(b, b"a", 391.0)
    b.router.look(390.0 + 29.0)
    assert waiting.waits is not None
    b.router.look(390.0 + 31.0)
    assert reserved(b) == [56_000], "that of the other one"
    waiting.attempt.end(now=422.0)
    again = ask(b, b"s", 425.0).attempt
    assert again.branch == "session"
    assert reserved(b) == [112_000]


def test_growth_is_learnt_from_sessions_that_ended() -> None:
    b = bench(1, capacity=0)
    now = 0.0
    for number in range(300):
        for size in (4_000, 40_000):
            ask(b, b"s%d" % number, now, b"x" * size).attempt.end(now=now)
        now += 1000.0
        b.router.look(now)
    assert 8_400 <= b.router.sessions.contexts.growth < 12_000, "10,000 tokens, 1,600 of them by the factor"
    assert b.router.sessions.contexts.expected(of(b"x", b"x" * 4_000), False) < 14_000


def test_a_request_that_no_worker_served_begins_no_session() -> None:
    for outcome in (Outcome.REJECTED, Outcome.GONE, Outcome.FAILED):
        b = bench()
        ask(b, b"s").attempt.end(outcome)
        assert reserved(b) == [0, 0]


def test_a_worker_that_is_lost_takes_its_reservations_along() -> None:
    b = bench()
    started = [ask(b, b"s%d" % n) for n in range(4)]
    waiting = ask(b, b"a")
    gone = started[0].attempt.worker
    b.fleet.remove(gone)
    assert b.router.sessions.table.share(gone).tokens == 0
    for each in started:
        if each.attempt.worker is gone:
            each.attempt.end(Outcome.CUT, 1.0)
    b.settle(1.0)
    assert waiting.waits is not None, "the other one is full"
    b.workers.append(b.fleet.add(spec("new"), 2.0))
    b.settle(2.0)
    assert waiting.attempt.worker is b.workers[-1]


def test_a_retry_moves_what_is_reserved() -> None:
    b = bench()
    first = ask(b, b"s").attempt
    second = first.retry(Outcome.FAILED)
    assert second is not None
    assert second.worker is not first.worker
    second.end()
    shares = {worker: b.router.sessions.table.share(worker).tokens for worker in b.workers}
    assert shares == {first.worker: 0, second.worker: 56_000}


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_reservations_return_to_zero_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    b = bench(3, capacity=150_000, size=5)
    open_: list[Asked] = []
    now = 0.0
    for _ in range(150):
        now += rng.choice((0.1, 1.0, 400.0))
        match rng.randrange(8):
            case 0 | 1 | 2:
                try:
                    open_.append(ask(b, b"s%d" % rng.randrange(12), now, b"x" * rng.randrange(200_000)))
                except SessionsFull:
                    assert b.router.queue.sessions == 5
            case 3 | 4 if open_:
                each = open_.pop(rng.randrange(len(open_)))
                if each.waits is not None:
                    b.router.withdraw(each.tag)
                else:
                    each.attempt.end(rng.choice((Outcome.SERVED, Outcome.REJECTED, Outcome.GONE, Outcome.CUT)), now)
            case 5 if open_:
                each = open_.pop(rng.randrange(len(open_)))
                if each.waits is not None:
                    b.router.expired(each.tag, now)
                elif each.attempt.retry(Outcome.FAILED, now) is not None:
                    open_.append(each)
            case 6:
                b.fleet.emptied(rng.choice(b.workers))
            case 7 if rng.random() < 0.2:
                b.fleet.lost(rng.choice(b.workers), now)
                for worker in b.workers:
                    b.fleet.probed(worker, None, now)
        b.settle(now)
        b.router.look(now)
        table = b.router.sessions.table
        for worker in b.workers:
            assert table.share(worker).tokens >= 0
        assert sum(table.share(worker).sessions for worker in b.workers) == table.live
    while open_:
        for each in open_:
            if each.waits is not None:
                b.router.withdraw(each.tag)
            else:
                each.attempt.end(now=now)
        open_.clear()
        b.settle(now)
    for step in range(20):
        b.router.look(now + 4000.0 * (step + 1))
    assert reserved(b) == [0, 0, 0]
    assert b.router.sessions.table.live == len(b.router.sessions.table) == b.router.queue.sessions == 0


def test_a_session_that_waits_keeps_its_time_when_all_workers_are_full_for_a_moment() -> None:
    b = Bench(
        1,
        "least_load",
        rules=FleetRules(most_load=2),
        queue=QueueRules(queue_size=10, queue_timeout=60.0, session_timeout=600.0),
    )
    b.router.sessions = Sessions(True, waits=True, capacity=60_000)
    ask(b, b"s0")
    waiting = ask(b, b"s1", 1.0)
    ask(b, b"s0", 300.0)
    b.router.look(300.0)
    assert waiting.waits == (SESSION, 601.0)
    assert b.router.queue.sessions == 1


def test_another_request_of_a_session_that_begins_does_not_wait_behind_those_that_have_not() -> None:
    b = bench(1, 60_000)
    first = ask(b, b"s0")
    one, large, other = ask(b, b"s1", 1.0), ask(b, b"s2", 1.0, PROMPT * 3), ask(b, b"s1", 1.0)
    first.attempt.end(now=2.0)
    b.router.look(2.0 + UNKNOWN + 1.0)
    b.settle(2.0 + UNKNOWN + 1.0)
    assert one.waits is None
    assert other.waits is None, "its session is live"
    assert large.waits == (SESSION, 601.0)
    assert (len(b.router.queue), b.router.queue.sessions) == (1, 1)


def test_nobody_waits_behind_a_session_that_ended_while_its_request_was_queued() -> None:
    b = Bench(
        2,
        "least_load",
        rules=FleetRules(most_load=2),
        queue=QueueRules(queue_size=10, queue_timeout=60.0, session_timeout=600.0),
    )
    b.router.sessions = Sessions(True, waits=True, capacity=60_000)
    running = {name: [ask(b, name).attempt for _ in range(2)] for name in (b"s0", b"s1")}
    waiting, plain = ask(b, b"s0", 1.0), b.ask(facts(b"x"), 1.0)
    assert waiting.waits == plain.waits == (ROOM, 61.0)
    b.fleet.remove(running[b"s0"][0].worker)
    for attempt in running[b"s0"]:
        attempt.end(Outcome.BROKEN, 2.0)
    b.settle(2.0)
    assert waiting.waits == (SESSION, 601.0), "it begins anew, and the other session leaves no room"
    assert plain.waits == (ROOM, 61.0)
    running[b"s1"][0].end(now=3.0)
    b.settle(3.0)
    assert isinstance(plain.answers[-1], Plan)
    assert repr(waiting.answers[-1]) == "<Wait for session until 601.000>"
    assert (len(b.router.queue), b.router.queue.sessions) == (1, 1)


def chat(*texts: bytes) -> Facts:
    messages = b",".join(b'{"role":"user","content":"%b"}' % text for text in texts)
    return read(ENDPOINTS[b"/v1/chat/completions"], b'{"messages":[%b]}' % messages)


def test_single_questions_do_not_fill_the_caches_that_they_do_not_need() -> None:
    b = bench(1, 1_000_000)
    for n in range(200):
        b.ask(chat(b"question %d" % n), float(n)).attempt.end(now=n + 0.5)
    assert reserved(b)[0] < 10_000
    assert ask(b, b"s0", 200.0).waits is None
    assert b.router.sessions.contexts.growth == 40_000.0, "nothing is learnt from them"


def test_a_single_question_that_goes_on_is_a_session() -> None:
    b = bench(1, 1_000_000)
    b.send(chat(b"one"))
    single = reserved(b)[0]
    b.send(chat(b"one", b"two"))
    assert single < 100
    assert 40_000 < reserved(b)[0] < 40_100


def test_a_single_question_does_not_wait_for_a_full_cache() -> None:
    b = bench(1, 60_000)
    ask(b, b"s0")
    assert ask(b, b"s1").waits == (SESSION, 600.0)
    assert b.ask(chat(b"one")).waits is None
