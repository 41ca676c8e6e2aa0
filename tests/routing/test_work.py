"""What is in front of a worker: the virtual clock, the pace that is measured, and the hooks of leases and reports.

Figures are chosen so that each expectation is arithmetic: 1,000 bytes take 1 s unless said otherwise.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Bench, facts
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.pace import AnswerPace, Pace, Paces
from sglang_router.routing.rules import RetryRules
from sglang_router.routing.work import Work


def common(per_item: float = 0.0, per_unit: float = 0.001) -> Paces:
    """The pace of a pool: so many seconds a request, and a byte."""
    paces = Paces()
    paces.prompts.per_item, paces.prompts.per_unit = per_item, per_unit
    return paces


def work(per_item: float = 0.0, per_unit: float = 0.001) -> Work:
    return Work(common(per_item, per_unit))


def other(each: Work, uncached: int) -> None:
    """Let another router send a prompt, of which this one hears now."""
    each.passed(1, each.last)
    each.reads(uncached)


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_prompts_stand_one_behind_the_other() -> None:
    each = work()
    each.sent("a", 1000, True, 10.0)
    each.sent("b", 2000, True, 10.5)
    assert each.backlog(10.5) == pytest.approx(2.5)
    assert each.backlog(10.9) == pytest.approx(2.1)


def test_nothing_is_in_front_of_an_idle_worker() -> None:
    assert work().backlog(5.0) == 0.0


def test_the_last_first_byte_makes_the_clock_right_whatever_was_believed() -> None:
    each = work()
    for key in "abc":
        each.sent(key, 1000, True, 0.0)
    for key, now in (("a", 3.0), ("b", 5.0), ("c", 5.0)):
        each.began(key, 1000, now)
    assert each.free_at == pytest.approx(5.0)
    assert each.backlog(5.0) == 0.0
    assert each.head == math.inf


def test_a_late_first_byte_moves_what_is_behind_it() -> None:
    each = work()
    each.sent("a", 1000, True, 0.0)
    each.sent("b", 1000, True, 0.0)
    each.prompts.weight = 100.0  # its pace is known, so that one time does not change it
    each.began("a", 1000, 1.5)
    assert each.backlog(1.5) == pytest.approx(1.0)


def test_a_stream_that_is_late_stands_for_as_much_again() -> None:
    each = work()
    each.sent("a", 1000, True, 0.0)
    each.sent("b", 1000, True, 0.0)
    # The first one is due at 1; at 3 it is 2 s late, and the second one comes after it.
    assert each.backlog(3.0) == pytest.approx(1.0 + 2.0)


def test_a_request_without_a_stream_counts_until_its_prompt_is_read_and_not_until_its_end() -> None:
    each = work()
    each.sent("a", 1000, False, 0.0)
    assert each.backlog(0.25) == pytest.approx(0.75)
    assert each.backlog(1.0) == 0.0
    assert each.backlog(60.0) == 0.0


def test_a_request_without_a_stream_that_ends_early_corrects_the_clock() -> None:
    each = work()
    due = each.sent("a", 4000, False, 0.0)
    each.sent("b", 1000, False, 0.0)
    each.ended("a", due, 4000, 1.0, 1)
    assert each.backlog(1.0) == pytest.approx(1.0)


def test_a_leg_that_fails_takes_its_work_along() -> None:
    each = work()
    due = each.sent("a", 3000, True, 0.0)
    each.sent("b", 1000, True, 0.0)
    each.ended("a", due, 3000, 1.0)
    # 2 of its 3 seconds were left.
    assert each.backlog(1.0) == pytest.approx(1.0)


def test_the_pause_between_requests_is_measured() -> None:
    each = work()
    for number in range(400):
        each.sent(number, 0, False, number * 0.5)
    assert each.gap == pytest.approx(0.5)
    assert each.last == pytest.approx(199.5)


def test_a_request_without_a_stream_that_fails_leaves_what_is_in_front_of_it() -> None:
    each = work()
    each.sent("a", 30000, True, 0.0)
    due = each.sent("b", 1000, False, 0.0)
    each.ended("b", due, 1000, 0.0)  # nobody served it: the prompt of the first one is still to be read
    assert each.backlog(0.0) == pytest.approx(30.0)


def test_a_stream_that_never_begins_is_given_up() -> None:
    each = work()
    each.sent("stuck", 1000, True, 0.0)
    each.forget(60.0)
    assert each.awaited == 1
    each.forget(62.0)
    assert (each.awaited, each.head, each.backlog(62.0)) == (0, math.inf, 0.0)
    each.sent("b", 2000, True, 62.0)
    each.began("stuck", 1000, 63.0)  # its first byte says nothing of those after it
    assert each.backlog(63.0) == pytest.approx(1.0)
    each.began("b", 2000, 64.0)
    each.forget(300.0)
    assert (each.awaited, each.backlog(64.0)) == (0, 0.0)


@pytest.mark.parametrize("now", [0.0, 1e6])
def test_the_first_request_says_nothing_of_the_pause_before_it(now: float) -> None:
    each = work()
    each.sent("a", 0, False, now)
    assert each.gap == 1.0


def test_a_night_without_requests_is_soon_forgotten() -> None:
    each = work()
    for number in range(400):
        each.sent(number, 0, False, number * 0.5 + (number >= 300) * 36000.0)
    assert each.gap == pytest.approx(0.5, rel=0.1)


def test_a_new_worker_expects_as_many_requests_as_the_others_get() -> None:
    pool = common()
    old = Work(pool)
    for number in range(400):
        old.sent(number, 0, False, number * 0.1)
    assert Work(pool).gap == pytest.approx(0.1)
    assert old.renewed().gap == pytest.approx(0.1)


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.booleans(), st.floats(0.0, 3.0), st.booleans()), max_size=30),
    st.floats(0.0, 5.0),
)
def test_when_all_has_ended_nothing_is_in_front(
    requests: list[tuple[int, bool, float, bool]], last_pause: float
) -> None:
    each, now, open_ = work(0.01), 0.0, []
    for number, (uncached, streams, pause, fails) in enumerate(requests):
        now += pause
        open_.append((number, each.sent(number, uncached, streams, now), uncached, streams, fails))
        assert each.backlog(now) >= 0.0
    for number, due, uncached, streams, fails in open_:
        now += last_pause
        if streams and not fails:
            each.began(number, uncached, now)
        else:
            each.ended(number, due, uncached, now)
        assert each.backlog(now) >= 0.0
    assert each.awaited == 0
    assert each.head == math.inf
    assert each.backlog(max(now, each.free_at)) == 0.0
    assert math.isfinite(each.free_at)
    assert each.prompts.per_unit > 0.0


# -- the pace ----------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.1), st.floats(1e-5, 1e-3))
def test_both_figures_are_found(per_item: float, per_unit: float) -> None:
    pace = Pace(256.0, 0.006, 1 / 32000)
    for number in range(400):
        units = (100.0, 3000.0, 900.0, 20000.0)[number % 4]
        pace.add(1.0, units, per_item + units * per_unit)
    for units in (100.0, 3000.0, 20000.0):
        assert pace.expected(1.0, units) == pytest.approx(per_item + units * per_unit, rel=0.03)


def test_where_all_prompts_are_alike_the_sum_is_right() -> None:
    pace = Pace(256.0, 0.006, 1 / 32000)
    for _ in range(100):
        pace.add(1.0, 1000.0, 0.5)
    assert pace.expected(1.0, 1000.0) == pytest.approx(0.5, rel=0.01)


def test_one_time_that_is_far_off_counts_little() -> None:
    pace = Pace(256.0, 0.0, 0.001)
    for _ in range(50):
        pace.add(1.0, 1000.0, 1.0)
    pace.add(1.0, 1000.0, 60.0)
    assert pace.expected(1.0, 1000.0) < 1.25


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 10**6), st.floats(0.0, 100.0)), max_size=60))
def test_the_figures_are_positive_whatever_is_measured(measured: list[tuple[int, int, float]]) -> None:
    pace, all_of_them = Pace(256.0, 0.006, 1 / 32000), Pace(256.0, 0.006, 1 / 32000)
    for items, units, seconds in measured:
        if items or units:
            all_of_them.add(float(items), float(units), seconds)
            pace.add(float(items), float(units), seconds, all_of_them)
        assert pace.per_item >= 0.0
        assert pace.per_unit >= 0.0
        assert math.isfinite(pace.per_item + pace.per_unit)


def test_a_new_worker_has_the_pace_of_its_pool_and_then_its_own() -> None:
    pool = common()
    fast, slow = Work(pool), Work(pool)
    assert slow.prefill(1000) == fast.prefill(1000) == pytest.approx(1.0)
    now = 0.0
    for _ in range(40):
        for each, seconds in ((fast, 0.1), (slow, 0.25)):
            each.sent("a", 1000, True, now)
            each.began("a", 1000, now + seconds)
        now += 1.0
    assert fast.prefill(1000) == pytest.approx(0.1, rel=0.15)
    assert slow.prefill(1000) == pytest.approx(0.25, rel=0.15)
    newcomer = Work(pool)
    assert fast.prefill(1000) < newcomer.prefill(1000) < slow.prefill(1000)


def test_a_worker_that_gets_nothing_goes_back_to_the_mean() -> None:
    pool = common()
    idle, busy = Work(pool), Work(pool)
    for each, seconds, times in ((idle, 1.0, 20), (busy, 0.1, 200)):
        for number in range(times):
            each.sent("a", 1000, True, float(number))
            each.began("a", 1000, number + seconds)
    assert idle.prefill(1000) > 0.7
    for minute in range(31):
        idle.forget(minute * 60.0)
    assert idle.prefill(1000) == pytest.approx(pool.prompts.expected(1.0, 1000.0), rel=0.05)


def test_forgetting_goes_by_time_and_not_by_calls() -> None:
    pool = common()
    each, other = Work(pool), Work(pool)
    for one, step in ((each, 1.0), (other, 60.0)):
        for number in range(20):
            one.sent("a", 1000, True, float(number))
            one.began("a", 1000, number + 1.0)
        for call in range(int(120 / step) + 1):
            one.forget(100.0 + call * step)
    assert each.prompts.weight == pytest.approx(other.prompts.weight)


@pytest.mark.parametrize("nonsense", [(1 << 53, 2), (3, 1 << 53)])
def test_an_engine_that_tells_nonsense_does_not_spoil_its_pool(nonsense: tuple[int, int]) -> None:
    pool = Paces()
    liar, honest = Work(pool), Work(pool)
    liar.told(1, 1)
    liar.told(*nonsense)
    for number in range(200):
        size = 16000 * (1 + number % 2)  # 32,000 bytes take 1 s
        honest.sent("a", size, True, number * 4.0)
        honest.began("a", size, number * 4.0 + size / 32000)
    for prompts in (honest.prompts, pool.prompts):
        assert prompts.expected(1.0, 8000.0) == pytest.approx(0.25, rel=0.5)
        assert prompts.expected(1.0, 64000.0) == pytest.approx(2.0, rel=0.5)


def test_the_engines_own_counters_count() -> None:
    each = work(per_unit=0.001)
    each.told(1000, 1_000_000)
    before = each.prefill(4000)
    for number in range(1, 100):
        each.told(1000 + 8000 * number, 1_000_000 + 1_000_000 * number)  # 8,000 tokens a second, 4 bytes each
    assert before == pytest.approx(4.0)
    assert each.prompts.per_unit == pytest.approx(1 / 32000, rel=0.05)


def test_counters_of_another_process_are_no_measurement() -> None:
    each = work()
    each.told(90000, 9_000_000)
    each.told(100, 10_000)
    assert each.prompts.weight == 0.0


def test_a_request_beside_an_answer_costs_what_was_measured() -> None:
    answers = AnswerPace()
    for _ in range(100):
        answers.add(4.8, 8.0)
    assert answers.per_request == pytest.approx(4.8 / (8 + 16))


# -- leases, restarts and reports --------------------------------------------------------------------------------------


def test_leases_tell_the_work_of_their_worker() -> None:
    bench = Bench(1, "cost")
    each = bench.workers[0].work
    attempt = bench.ask(facts(b"x" * 32000, streaming=True), 10.0).attempt
    assert each.awaited == 1
    assert each.backlog(10.0) == pytest.approx(0.006 + 0.25)
    bench.router.began(attempt.leg, 10.5)
    assert (each.awaited, each.backlog(10.5)) == (0, 0.0)
    attempt.end(Outcome.SERVED, 12.0)
    assert each.answers.weight == 1.0


def test_a_stream_that_fails_is_awaited_no_more() -> None:
    bench = Bench(1, "cost")
    each = bench.workers[0].work
    bench.ask(facts(b"x" * 32000, streaming=True), 10.0).attempt.end(Outcome.GONE, 10.25)
    assert each.awaited == 0
    assert each.backlog(10.25) == pytest.approx(0.0)


def test_policies_that_do_not_ask_for_it_are_not_measured() -> None:
    bench = Bench(1, "round_robin")
    bench.ask(facts(b"x" * 32000, streaming=True), 10.0)
    for number in (1, 2):
        bench.fleet.reported(bench.workers[0], EngineReport(prefilled_tokens=number, prefill_busy_us=number))
    work = bench.workers[0].work
    assert (work.active, work.awaited, work.prompts.weight) == (False, 0, 0.0)


def test_a_retry_after_a_pause_is_in_nobodys_way_until_it_is_sent() -> None:
    bench = Bench(1, "cost", retries=RetryRules(initial_backoff=30.0, max_backoff=30.0, jitter=0.0))
    attempt = bench.ask(facts(b"x" * 32000, streaming=True), 10.0).attempt.retry(Outcome.FAILED, 10.0)
    assert attempt is not None
    assert attempt.delay > 0.0
    each = bench.workers[0].work
    assert (each.awaited, each.backlog(10.0)) == (0, 0.0)
    bench.router.began(attempt.leg, 41.0)
    attempt.end(Outcome.SERVED, 50.0)
    assert (each.awaited, each.backlog(50.0)) == (0, 0.0)


def test_what_a_prompt_takes_is_expected_by_its_tokens() -> None:
    paces = Paces()
    first, later = Work(paces), Work(paces)
    first.count_in(0.5)
    assert first.prompts.expected(0, 4000) == later.prompts.expected(0, 32000) == 0.25
    later.count_in(0.5)
    assert (later.prompts.per_unit, later.prompts.scale) == (first.prompts.per_unit, 32.0)
    first.sent("a", 4000, True, 0.0)
    first.began("a", 4000, 3.0)
    measured = paces.prompts.per_unit
    Work(paces).count_in(0.5)
    assert paces.prompts.per_unit == measured
    assert first.renewed().prompts.scale == 32.0


def test_another_process_begins_with_no_work_and_the_pace_of_the_pool() -> None:
    bench = Bench(1, "cost")
    worker = bench.workers[0]
    attempt = bench.ask(facts(b"x" * 32000, streaming=True), 10.0).attempt
    before = worker.work
    bench.fleet.lost(worker, 11.0)
    assert worker.work is not before
    assert (worker.work.active, worker.work.awaited, worker.work.backlog(11.0)) == (True, 0, 0.0)
    attempt.end(Outcome.CUT, 12.0)
    assert worker.work.backlog(12.0) == 0.0


def test_a_report_with_counters_reaches_the_work() -> None:
    bench = Bench(1, "cost")
    worker = bench.workers[0]
    for number in range(1, 3):
        report = EngineReport(prefilled_tokens=16000 * number, prefill_busy_us=1_000_000 * number)
        bench.fleet.reported(worker, report)
    assert worker.work.prompts.weight == 1.0


def test_until_read_is_backlog_and_prompt() -> None:
    each = Bench(1, "cost").workers[0].work
    assert each.until_read(0, 10.0) == 0.0
    assert each.until_read(32000, 10.0) == pytest.approx(each.prefill(32000))
    each.sent("a", 32000, True, 10.0)
    assert each.until_read(32000, 10.0) == pytest.approx(each.backlog(10.0) + each.prefill(32000))


def test_until_read_is_unknown_where_nothing_is_measured() -> None:
    assert Bench(1, "round_robin").workers[0].work.until_read(32000, 10.0) < 0.0


# -- other routers -----------------------------------------------------------------------------------------------------


def test_a_prompt_stands_behind_those_of_other_routers() -> None:
    each = work()
    each.elsewhere_until = 13.0
    assert each.backlog(10.0) == pytest.approx(3.0)
    assert each.own_backlog(10.0) == 0.0
    each.sent("a", 1000, True, 10.0)
    assert each.own_backlog(10.0) == pytest.approx(4.0)
    each.began("a", 1000, 14.0)
    assert each.backlog(14.0) == 0.0


def test_requests_of_other_routers_shorten_the_gap() -> None:
    alone, beside = work(), work()
    for second in range(400):
        alone.sent("a", 0, False, second * 0.25)
        beside.sent("a", 0, False, second * 1.0)
        beside.passed(3, second * 1.0 + 0.5)
    assert alone.gap == pytest.approx(0.25, rel=0.2)
    assert beside.gap == pytest.approx(0.25, rel=0.2)


def test_a_gap_is_never_nothing() -> None:
    each = work()
    for _ in range(200):
        each.passed(255, 1.0)
    assert each.gap > 0.0


def test_the_time_of_others_prompts_is_not_that_of_the_own_ones() -> None:
    """Between two prompts of this router another one sends two of 3,000 bytes; the engine reads 10,000 bytes a second,
    and takes 0.1 s more for each prompt."""
    each = work()
    for start in range(0, 2000, 10):
        size = 1000 + 100 * (start % 400)
        each.sent("a", 1000, True, start + 0.0)
        other(each, 3000)
        other(each, 3000)
        each.sent("b", size, True, start + 0.1)
        other(each, 50_000)  # it comes behind all
        each.began("a", 1000, start + 0.3)
        each.began("b", size, start + 0.3 + 0.1 + size / 10_000 + 2 * (0.1 + 0.3))
    assert each.prompts.per_item == pytest.approx(0.1, rel=0.05)
    assert each.prompts.per_unit == pytest.approx(1e-4, rel=0.05)


def test_what_others_sent_to_an_idle_worker_before_says_nothing() -> None:
    each = work()
    other(each, 1 << 20)
    each.sent("a", 1000, True, 0.0)
    each.began("a", 1000, 0.4)
    assert each.prompts.expected(1, 1000) == pytest.approx(0.4, rel=0.01)


def test_a_prompt_that_others_may_have_stood_in_front_of_is_not_measured() -> None:
    """What is heard while the first one is awaited may have been sent before it: messages come late."""
    each = work()
    each.sent("a", 1000, True, 0.0)
    other(each, 1000)
    each.began("a", 1000, 0.8)
    assert each.prompts.weight == 0.0


def test_behind_others_both_figures_of_the_pace_change_alike() -> None:
    """When the others' prompts are over is an estimate: its error is not what each request takes, however short."""
    each, before = work(0.1), work(0.1).prompts
    for start in range(0, 8000, 100):
        other(each, 1000)
        each.elsewhere_until = start + 1.0
        size = 100 if start % 200 else 10_000
        each.sent("a", size, True, start + 0.0)
        each.began("a", size, start + 1.0 + 3.0 * before.expected(1, size))
    assert each.prompts.per_item == pytest.approx(3.0 * before.per_item, rel=0.1)
    assert each.prompts.per_unit == pytest.approx(3.0 * before.per_unit, rel=0.1)


@pytest.mark.parametrize("late", [0.0, 1e6])
def test_a_measurement_behind_others_changes_the_pace_by_a_factor_of_four_at_most(late: float) -> None:
    each = work()
    other(each, 1000)
    each.elsewhere_until = 1.0
    each.sent("a", 1000, True, 0.0)
    before = each.prompts.expected(1, 1000)
    each.began("a", 1000, late)
    assert 0.2 < each.prompts.expected(1, 1000) / before < 4.1
    assert each.prompts.weight == 1.0


def test_a_stream_that_is_given_up_leaves_nothing_to_be_measured() -> None:
    each = work()
    other(each, 1000)
    each.sent("a", 1000, True, 0.0)
    each.sent("b", 1000, True, 0.0)
    each.ended("a", 0.0, 1000, 0.2)
    each.began("b", 1000, 9.0)  # perhaps behind others
    assert each.prompts.weight == 0.0
    each.forget(100.0)
    each.sent("c", 1000, True, 200.0)
    each.began("c", 1000, 200.5)
    assert each.prompts.weight == 1.0
