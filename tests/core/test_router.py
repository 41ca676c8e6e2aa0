"""Routing and retrying: where a failed request goes next, when, and when it goes nowhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Bench, Log, facts, spec
from sglang_router.core.events import Listener, Listeners, Routed, WorkerChanged
from sglang_router.core.policies import Policy, PolicySettings
from sglang_router.core.retry_budget import RetryBudget, RetryBudgetRules
from sglang_router.core.router import Plan, PolicyListener, RetryRules
from sglang_router.core.worker import BreakerRules, Outcome, Worker
from sglang_router.errors import NoWorkers, Unavailable, WorkersStarting

NEVER = BreakerRules(threshold=1 << 30)
RETRYABLE = [outcome for outcome in Outcome if outcome.retryable]
FINAL = [outcome for outcome in Outcome if not outcome.retryable]


def bench(count: int, policy: str = "round_robin", breaker: BreakerRules = NEVER, **rules: Any) -> Bench:
    return Bench(count, policy, breaker=breaker, retries=RetryRules(**rules))


def legs(bench: Bench, *outcomes: Outcome) -> list[Plan]:
    """The legs of one request that ends so, as far as there are any."""
    plans = [bench.route()]
    for outcome in outcomes:
        following = bench.router.retry(plans[-1], outcome, 0.0)
        if following is None:
            break
        plans.append(following)
    return plans


def where(bench: Bench, plans: list[Plan]) -> list[int]:
    return [bench.number(plan.worker) for plan in plans]


# -- the first leg -----------------------------------------------------------------------------------------------------


def test_a_request_takes_a_lease_where_the_policy_says() -> None:
    b = bench(2, "least_load")
    b.load(1, 0)
    plan = b.route(b"hello")
    assert plan.worker is b.workers[1]
    assert (plan.lease.worker, plan.worker.load) == (plan.worker, 1)
    assert (plan.branch, plan.delay, plan.retries, plan.returns, plan.tries) == ("least", 0.0, 0, 0, {})


def test_a_decision_is_told_with_its_reason() -> None:
    b = bench(1, "cache_aware")
    prompt = b"a prompt that is long enough to count"
    b.serve(prompt)
    plan = b.route(prompt)
    size = len(prompt)
    assert b.log.decisions[1] == Routed(plan.facts, b.workers[0], "cache_aware", "hit", size, size, 0)
    assert repr(plan) == f"<Plan http://w0:1 hit {size}/{size} retry 0>"


def test_nobody_to_route_to_is_an_error_and_no_lease() -> None:
    with pytest.raises(NoWorkers):
        bench(0).route()
    with pytest.raises(WorkersStarting):
        Bench(1, checked=True).route()
    b = bench(1, breaker=BreakerRules(threshold=1, timeout=10.0))
    b.router.retry(b.route(), Outcome.FAILED, 1.0)
    with pytest.raises(Unavailable) as caught:
        b.route(now=4.0)
    assert caught.value.retry_after == 7.0
    assert b.workers[0].load == 0
    assert len(b.log.decisions) == 1


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", RETRYABLE)
def test_a_retry_prefers_workers_that_have_not_failed_and_does_not_wait(outcome: Outcome) -> None:
    b = bench(4)
    plans = legs(b, outcome, outcome, outcome)
    assert sorted(where(b, plans)) == [0, 1, 2, 3]
    assert [plan.delay for plan in plans] == [0.0] * 4
    assert [plan.retries for plan in plans] == [0, 1, 2, 3]
    assert [worker.load for worker in b.workers].count(1) == 1


def test_cached_prefixes_do_not_draw_a_request_back_to_the_worker_that_failed_it() -> None:
    b = bench(3, "cache_aware")
    prompt = b"the same long prompt " * 10
    home = b.serve(prompt).worker
    first = b.route(prompt)
    assert (first.worker, first.branch) == (home, "hit")
    following = b.router.retry(first, Outcome.BROKEN, 0.0)
    assert following is not None
    assert following.worker is not home


@pytest.mark.parametrize("outcome", FINAL)
def test_other_ends_are_final_and_close_the_lease(outcome: Outcome) -> None:
    b = bench(3)
    plan = b.route()
    assert b.router.retry(plan, outcome, 0.0) is None
    assert plan.lease.closed
    assert sum(worker.load for worker in b.workers) == 0
    assert len(b.log.decisions) == 1


def test_only_when_all_have_failed_it_returns_after_a_growing_pause() -> None:
    b = bench(2, per_worker=3, total=99, initial_backoff=0.1, multiplier=2.0, jitter=0.0)
    plans = legs(b, *[Outcome.REFUSED] * 99)
    assert where(b, plans) == [0, 1, 0, 1, 0, 1]
    assert [plan.delay for plan in plans] == [0.0, 0.0, 0.1, 0.2, 0.4, 0.8]


def test_the_pause_has_a_most() -> None:
    b = bench(1, per_worker=200, total=200, initial_backoff=1.0, multiplier=10.0, max_backoff=30.0, jitter=0.0)
    b.router.budget = RetryBudget(RetryBudgetRules(floor=100.0))
    plans = legs(b, *[Outcome.FAILED] * 199)
    assert [plan.delay for plan in plans[:4]] == [0.0, 1.0, 10.0, 30.0]
    assert {plan.delay for plan in plans[3:]} == {30.0}
    assert len(plans) == 200


def test_the_pause_is_spread_by_the_jitter() -> None:
    delays = []
    for seed in range(300):
        b = Bench(1, breaker=NEVER, retries=RetryRules(initial_backoff=1.0, jitter=0.2), seed=seed)
        delays.append(legs(b, Outcome.FAILED)[1].delay)
    assert 0.8 <= min(delays) < 0.83
    assert 1.17 < max(delays) <= 1.2


def test_a_worker_is_tried_no_more_often_than_the_rules_say() -> None:
    for per_worker in (1, 2, 3):
        b = bench(1, per_worker=per_worker, total=99)
        assert len(legs(b, *[Outcome.FAILED] * 9)) == per_worker


def test_a_request_is_retried_no_more_often_than_the_rules_say() -> None:
    for total in (0, 1, 6):
        assert len(legs(bench(9, total=total), *[Outcome.FAILED] * 20)) == total + 1


def test_a_worker_under_pressure_is_not_asked_again() -> None:
    assert len(legs(bench(1), Outcome.BUSY)) == 1
    assert len(legs(bench(2), Outcome.BUSY, Outcome.BUSY)) == 2
    b = bench(2)
    plans = legs(b, Outcome.BUSY, *[Outcome.FAILED] * 9)
    assert where(b, plans) == [0, 1, 1, 1], "not even when the others fail"
    assert [plan.delay > 0 for plan in plans] == [False, False, True, True]
    assert len(legs(bench(2), Outcome.FAILED, Outcome.BUSY)) == 2, "its own 429 is the answer then"


def test_a_breaker_that_opens_meanwhile_ends_the_retries() -> None:
    b = bench(1, breaker=BreakerRules(threshold=2), per_worker=9, total=9)
    assert len(legs(b, *[Outcome.FAILED] * 9)) == 2


def test_a_worker_that_comes_meanwhile_is_fresh_and_one_that_left_is_not_asked() -> None:
    b = bench(1)
    plan = b.route()
    b.workers.append(b.fleet.add(spec("late"), 0.0))
    b.fleet.remove(b.workers[0])
    following = b.router.retry(plan, Outcome.BROKEN, 0.0)
    assert following is not None
    assert (following.worker, following.delay) == (b.workers[1], 0.0)


def test_a_retry_may_be_the_probe_of_a_half_open_breaker() -> None:
    b = bench(2, breaker=BreakerRules(threshold=1, timeout=10.0))
    b.router.retry(b.route(), Outcome.GONE, 0.0)
    b.fleet.lease(b.workers[0]).close(Outcome.FAILED, 0.0)
    plan = b.route(now=5.0)
    assert plan.worker is b.workers[1]
    assert b.router.retry(plan, Outcome.FAILED, 9.0) is None
    plan = b.route(now=10.0)
    assert plan.worker is b.workers[0]
    b.router.retry(plan, Outcome.SERVED, 11.0)
    assert b.workers[0].breaker.value == "closed"


# -- any request -------------------------------------------------------------------------------------------------------

POLICY = st.sampled_from(["round_robin", "cache_aware", "power_of_two", "prefix_hash"])
EVENT = st.sampled_from(["", "", "remove", "drain", "add"])
BREAKER = st.sampled_from([NEVER, BreakerRules(threshold=2, timeout=3.0)])
RULES = st.builds(
    RetryRules,
    per_worker=st.integers(1, 4),
    total=st.integers(0, 8),
    max_backoff=st.just(0.1),
    jitter=st.sampled_from([0.0, 0.2, 1.0]),
)


class Story:
    """One request: what became of its legs, and the rules worked out from that alone."""

    def __init__(self, b: Bench, rules: RetryRules) -> None:
        self.bench = b
        self.rules = rules
        self.workers: list[Worker] = []
        self.pressed: set[Worker] = set()
        self.returns = 0

    def end(self, plan: Plan, outcome: Outcome, now: float) -> Plan | None:
        """Ends a leg, and checks what the router makes of it."""
        assert (plan.lease.closed, plan.retries) == (False, len(self.workers))
        self.workers.append(plan.worker)
        self.pressed |= {plan.worker} if outcome is Outcome.BUSY else set()
        following = self.bench.router.retry(plan, outcome, now)
        assert (plan.lease.closed, plan.worker) == (True, self.workers[-1])
        candidates = set(self.bench.fleet.candidates(now))
        if following is not None:
            candidates.add(following.worker)  # it may be the one request of a half-open breaker now
        fresh = candidates.difference(self.workers)
        again = {w for w in candidates - self.pressed if self.workers.count(w) < self.rules.per_worker}
        allowed = fresh or (again if outcome is not Outcome.BUSY else set())
        if not outcome.retryable or len(self.workers) > self.rules.total or not allowed:
            assert following is None
            return None
        assert following is not None
        assert following.worker in allowed
        self.check_pause(following.delay, at_once=bool(fresh))
        return following

    def check_pause(self, delay: float, *, at_once: bool) -> None:
        if at_once:
            assert delay == 0.0
            return
        pause = min(self.rules.initial_backoff * self.rules.multiplier**self.returns, self.rules.max_backoff)
        assert abs(delay - pause) <= pause * self.rules.jitter + 1e-9
        self.returns += 1


@settings(max_examples=400)
@given(
    count=st.integers(1, 4),
    policy=POLICY,
    rules=RULES,
    breaker=BREAKER,
    ends=st.lists(st.tuples(st.sampled_from(Outcome), EVENT), min_size=10, max_size=10),
    others=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_request_obeys_the_rules(
    count: int,
    policy: str,
    rules: RetryRules,
    breaker: BreakerRules,
    ends: list[tuple[Outcome, str]],
    others: int,
    seed: int,
) -> None:
    b = Bench(count, policy, breaker=breaker, retries=rules, seed=seed)
    background = [b.route(b"another prompt") for _ in range(others)]
    story = Story(b, rules)
    plan: Plan | None = b.route(b"a prompt")
    for now, (outcome, event) in enumerate(ends):
        assert plan is not None
        _happen(b, event)
        plan = story.end(plan, outcome, float(now))
        if plan is None:
            break
    assert plan is None, "no rule allows this many legs"
    told = b.log.decisions[others:]
    assert [(event.worker, event.retry) for event in told] == [(w, n) for n, w in enumerate(story.workers)]
    for other in background:
        other.lease.close(Outcome.SERVED, 99.0)
    assert all(worker.load == 0 for worker in b.workers)


def _happen(b: Bench, event: str) -> None:
    """Something else that happens while the request is under way."""
    if event == "add":
        b.workers.append(b.fleet.add(spec(f"late{len(b.workers)}"), 0.0))
        return
    for worker in b.workers:
        if event and worker.in_rotation:
            b.fleet.remove(worker) if event == "remove" else b.fleet.set_draining(worker, True)
            return


# -- listeners ---------------------------------------------------------------------------------------------------------


class _Noted(Policy):
    """A policy that writes down what it is told."""

    name = "noted"

    def __init__(self) -> None:
        super().__init__(PolicySettings(), random.Random(0))
        self.notices: list[tuple[str, Worker]] = []

    def added(self, worker: Worker) -> None:
        self.notices.append(("added", worker))

    def removed(self, worker: Worker) -> None:
        self.notices.append(("removed", worker))

    def emptied(self, worker: Worker) -> None:
        self.notices.append(("emptied", worker))


def test_the_policy_hears_of_workers_that_come_leave_or_come_back_empty() -> None:
    policy, worker = _Noted(), Bench(1).workers[0]
    listener = PolicyListener(policy)
    for what in ("added", "health", "breaker", "draining", "restarted", "removed"):
        listener.worker_changed(WorkerChanged(worker, what, "", ""))
    assert policy.notices == [("added", worker), ("emptied", worker), ("removed", worker)]


def test_listeners_hear_in_order_and_only_what_they_define() -> None:
    heard: list[str] = []

    class One(Listener):
        def routed(self, event: Routed) -> None:
            heard.append("one")

    class Other(One):
        def routed(self, event: Routed) -> None:
            heard.append("other")

    listeners = Listeners()
    for listener in (One(), Log(), Other()):
        listeners.add(listener)
    worker = Bench(1).workers[0]
    listeners.routed(Routed(facts(), worker, "p", "b", 0, 0, 0))
    listeners.worker_changed(WorkerChanged(worker, "health", "a", "b"))
    assert heard == ["one", "other"]
