"""Routing, retrying and queueing: where a request goes first and next, when, and when it goes nowhere.

All of it beside a model is the matter of test_router_model.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from event_makers import leg, routed
from fleets import Asked, Attempt, Bench, Log, by_model, facts, spec
from sglang_router.errors import (
    InternalError,
    NoWorkers,
    QueueFull,
    QueueTimeout,
    RateLimited,
    ShuttingDown,
    Unavailable,
    WorkersStarting,
)
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import Listener, Listeners, Routed, WorkerChanged
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import BREAKS, Hears, Outcome
from sglang_router.routing.plan import Plan
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.rules import BreakerRules, FleetRules, HealthRules, QueueRules, RetryBudgetRules, RetryRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

NEVER = BreakerRules(threshold=1 << 30)
RETRYABLE = [outcome for outcome in Outcome if outcome.retryable]
FINAL = [outcome for outcome in Outcome if not outcome.retryable]


def bench(count: int, policy: str = "round_robin", breaker: BreakerRules = NEVER, **rules: Any) -> Bench:
    return Bench(count, policy, rules=FleetRules(breaker=breaker), retries=RetryRules(**rules))


class Fragile(Policy):
    """Fails at the requests whose text says so."""

    name = "fragile"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        if facts.text == b"broken":
            raise RuntimeError("this policy is broken")
        return self.in_turn(candidates, candidates.mask, "turn")


def test_a_policy_that_fails_takes_no_place_and_holds_up_no_queue() -> None:
    bench = Bench(1, Fragile, queue=QueueRules(max_concurrent=1, queue_size=9))
    with pytest.raises(RuntimeError):
        bench.ask(facts(b"broken"))
    first, broken, last = bench.ask(facts(b"a")), bench.ask(facts(b"broken")), bench.ask(facts(b"b"))
    first.attempt.end(Outcome.SERVED)
    with pytest.raises(RuntimeError):
        bench.settle()
    bench.settle()
    assert isinstance(broken.answers[-1], InternalError)
    assert last.attempt.worker is bench.workers[0]


def legs(bench: Bench, *outcomes: Outcome) -> list[Attempt]:
    """The attempts of one request whose legs end so, as far as there are any."""
    attempts = [bench.route()]
    for outcome in outcomes:
        following = attempts[-1].retry(outcome)
        if following is None:
            break
        attempts.append(following)
    return attempts


def where(bench: Bench, attempts: list[Attempt]) -> list[int]:
    return [bench.number(attempt.worker) for attempt in attempts]


def loads(bench: Bench) -> list[int]:
    return [worker.load for worker in bench.workers]


# -- the first leg -----------------------------------------------------------------------------------------------------


def test_a_request_takes_a_lease_where_the_policy_says() -> None:
    b = bench(2, "least_load")
    b.load(1, 0)
    plan = b.route(b"hello")
    assert plan.worker is b.workers[1]
    assert (b.router.leases, loads(b)) == (1, [1, 1])
    assert (plan.branch, plan.delay, plan.retries) == ("least", 0.0, 0)


def test_a_decision_is_told_with_its_reason() -> None:
    b = bench(1, "cache_aware")
    prompt = b"a prompt that is long enough to count"
    b.serve(prompt)
    again = b.route(prompt)
    size = len(prompt)
    event = b.log.decisions[1]
    assert (event.tag, event.leg, event.policy, event.retries) == (again.asked.tag, again.leg, "cache_aware", 0)
    assert (again.branch, again.matched, again.total) == ("hit", size, size)
    assert repr(again.plan) == f"<Plan retry 0: <PlannedLeg 2 http://w0:1 hit {size}/{size}>>"


def test_nobody_to_route_to_is_an_error_and_no_lease() -> None:
    with pytest.raises(NoWorkers):
        bench(0).route()
    b = Bench(1, checked=True)
    assert b.ask(facts()).waits == ("start", 10.0)
    assert (b.router.leases, loads(b), b.log.decisions) == (0, [0], [])
    b = bench(1, breaker=BreakerRules(threshold=1, timeout=10.0))
    assert b.route().retry(Outcome.REFUSED, 1.0) is None
    with pytest.raises(Unavailable) as caught:
        b.route(now=4.0)
    assert caught.value.retry_after == 7.0
    assert b.workers[0].load == 0
    assert len(b.log.decisions) == 1


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED])
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
    following = first.retry(Outcome.BROKEN)
    assert following is not None
    assert following.worker is not home


@pytest.mark.parametrize("outcome", FINAL)
def test_other_ends_are_final_and_close_the_lease(outcome: Outcome) -> None:
    b = bench(3)
    plan = b.route()
    assert b.router.retry(plan.asked.tag, plan.leg, plan.asked.facts, outcome, 0.0) is None
    assert loads(b) == [0, 0, 0]
    plan.end(outcome)
    assert (b.router.leases, loads(b)) == (0, [0, 0, 0])
    assert len(b.log.decisions) == 1


def test_only_when_all_have_failed_it_returns_after_a_growing_pause() -> None:
    b = bench(2, per_worker=3, total=99, initial_backoff=0.1, multiplier=2.0, jitter=0.0)
    plans = legs(b, *[Outcome.REFUSED] * 99)
    assert where(b, plans) == [0, 1, 0, 1, 0, 1]
    assert [plan.delay for plan in plans] == [0.0, 0.0, 0.1, 0.2, 0.4, 0.8]


def test_the_pause_before_a_retry_is_no_time_of_the_worker() -> None:
    b = bench(1, per_worker=9, total=9, initial_backoff=2.0, jitter=0.0)
    first = b.ask(facts(b"a prompt", streaming=True)).attempt
    again = first.retry(Outcome.FAILED)
    assert again is not None
    assert again.delay == 2.0
    lease = b.router._leases[again.leg.lease]
    assert lease.sent_at == 2.0
    b.router.began(again.leg, 2.5)
    assert lease.first_byte == 0.5


def test_a_first_byte_before_the_end_of_the_pause_is_at_once() -> None:
    b = bench(1, per_worker=9, total=9, initial_backoff=2.0, jitter=0.0)
    again = b.ask(facts(b"a prompt", streaming=True)).attempt.retry(Outcome.FAILED)
    assert again is not None
    worker, lease = again.worker, b.router._leases[again.leg.lease]
    b.router.began(again.leg, 1.999)
    assert (lease.first_byte, worker.waiting) == (0.0, 0)
    again.end(Outcome.SERVED, 3.0)
    assert (worker.waiting, worker.load) == (0, 0)


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
        b = Bench(1, rules=FleetRules(breaker=NEVER), retries=RetryRules(initial_backoff=1.0, jitter=0.2), seed=seed)
        delays.append(legs(b, Outcome.FAILED)[1].delay)
    assert 0.8 <= min(delays) < 0.83
    assert 1.17 < max(delays) <= 1.2


def test_a_worker_is_tried_no_more_often_than_the_rules_say() -> None:
    for per_worker in (1, 2, 3):
        b = bench(1, per_worker=per_worker, total=99)
        assert len(legs(b, *[Outcome.FAILED] * 9)) == per_worker


def test_a_request_is_retried_no_more_often_than_the_rules_say() -> None:
    for total in (0, 1, 6):
        assert len(legs(bench(9, total=total), *[Outcome.REFUSED] * 20)) == total + 1


def test_a_worker_under_pressure_is_not_asked_again() -> None:
    assert len(legs(bench(1), Outcome.BUSY)) == 1
    assert len(legs(bench(2), Outcome.BUSY, Outcome.BUSY)) == 2
    b = bench(2)
    plans = legs(b, Outcome.BUSY, *[Outcome.FAILED] * 9)
    assert where(b, plans) == [0, 1, 1, 1], "not even when the others fail"
    assert [plan.delay > 0 for plan in plans] == [False, False, True, True]
    assert len(legs(bench(2), Outcome.FAILED, Outcome.BUSY)) == 2, "its own 429 is the answer then"


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.BROKEN, Outcome.FAILED])
def test_a_retry_prefers_another_engine_to_another_rank(outcome: Outcome) -> None:
    """With many ranks, all tries of a request could go to the ranks of one dead engine."""
    b, unchecked = bench(0), HealthRules(enabled=False)
    for rank in range(8):
        b.fleet.add(WorkerSpec(url="http://dead:1", dp_rank=rank, health=unchecked), 0.0)
    other = b.fleet.add(WorkerSpec(url="http://live:1", health=unchecked), 0.0)
    for _ in range(9):
        attempt = b.route()
        if attempt.worker is not other:
            retry = attempt.retry(outcome, 0.0, 500)
            assert retry is not None
            assert retry.worker is other
            attempt = retry
        attempt.end()


def test_a_worker_that_broke_off_is_not_asked_again() -> None:
    for outcome in (Outcome.BROKEN, Outcome.LOST):
        assert len(legs(bench(1), outcome)) == 1
        b = bench(2)
        assert where(b, legs(b, Outcome.REFUSED, outcome, Outcome.REFUSED, Outcome.REFUSED)) == [0, 1, 0, 0]


def test_a_breaker_that_opens_meanwhile_ends_the_retries() -> None:
    b = bench(1, breaker=BreakerRules(threshold=2), per_worker=9, total=9)
    assert len(legs(b, *[Outcome.REFUSED] * 9)) == 2


def test_a_worker_that_comes_meanwhile_is_fresh_and_one_that_left_is_not_asked() -> None:
    b = bench(1)
    plan = b.route()
    b.workers.append(b.fleet.add(spec("late"), 0.0))
    b.fleet.remove(b.workers[0])
    following = plan.retry(Outcome.BROKEN)
    assert following is not None
    assert (following.worker, following.delay) == (b.workers[1], 0.0)


@pytest.mark.parametrize(("outcome", "state"), [(Outcome.REFUSED, "closed"), (Outcome.FAILED, "half_open")])
def test_a_retry_may_be_the_probe_of_a_half_open_breaker_if_the_request_has_not_failed(
    outcome: Outcome, state: str
) -> None:
    b = bench(2, breaker=BreakerRules(threshold=2, timeout=10.0))
    for _ in range(2):
        b.fleet.lease(b.workers[0]).close(Outcome.FAILED, 0.0)
    plan = b.route(now=5.0)
    assert plan.worker is b.workers[1]
    following = plan.retry(outcome, 10.0)
    assert following is not None
    assert following.worker is b.workers[0]
    following.end(now=11.0)
    assert b.workers[0].breaker.value == state


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
        self.kinds: set[tuple[str, Worker]] = set()

    def is_final(self, worker: Worker, outcome: Outcome) -> bool:
        """Notes a failure; returns whether another worker failed alike, so that the request is to blame."""
        if outcome.hears not in (Hears.ANSWER_FAILURE, Hears.BREAK_FAILURE) and outcome is not Outcome.LOST:
            return False
        kind = "break" if outcome in BREAKS else outcome.label
        self.kinds.add((kind, worker))
        return sum(each == kind for each, _ in self.kinds) == 2

    def end(self, plan: Attempt, outcome: Outcome, now: float) -> Attempt | None:
        """Ends a leg, and checks what the router makes of it."""
        assert plan.retries == len(self.workers)
        self.workers.append(plan.worker)
        once = outcome in (Outcome.BUSY, Outcome.VANISHED) or outcome in BREAKS
        self.pressed |= {plan.worker} if once else set()
        final = self.is_final(plan.worker, outcome)
        load, leases = sum(loads(self.bench)), self.bench.router.leases
        following = plan.retry(outcome, now)
        gone = following is None
        assert (sum(loads(self.bench)), self.bench.router.leases) == (load - gone, leases - gone)
        candidates = set(self.bench.fleet.candidates(now))
        if following is not None:
            candidates.add(following.worker)  # it may be the one request of a half-open breaker now
        fresh = candidates.difference(self.workers)
        again = {w for w in candidates - self.pressed if self.workers.count(w) < self.rules.per_worker}
        allowed = fresh or (again if outcome not in (Outcome.BUSY, Outcome.VANISHED) else set())
        if final or not outcome.retryable or len(self.workers) > self.rules.total or not allowed:
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
    b = Bench(count, policy, rules=FleetRules(breaker=breaker), retries=rules, seed=seed)
    background = [b.route(b"another prompt") for _ in range(others)]
    story = Story(b, rules)
    plan: Attempt | None = b.route(b"a prompt")
    for now, (outcome, event) in enumerate(ends):
        assert plan is not None
        _happen(b, event)
        plan = story.end(plan, outcome, float(now))
        if plan is None:
            break
    assert plan is None, "no rule allows this many legs"
    told = b.log.decisions[others:]
    chosen = [(worker.url, n) for n, worker in enumerate(story.workers)]
    assert [(event.leg.target.name, event.retries) for event in told] == chosen
    for other in background:
        other.end(now=99.0)
    assert (b.router.leases, sum(loads(b))) == (0, 0)


def _happen(b: Bench, event: str) -> None:
    """Something else that happens while the request is in flight."""
    if event == "add":
        b.workers.append(b.fleet.add(spec(f"late{len(b.workers)}"), 0.0))
        return
    for worker in b.workers:
        if event and worker.in_rotation:
            b.fleet.remove(worker) if event == "remove" else b.fleet.set_draining(worker, True)
            return


# -- legs that begin and end -------------------------------------------------------------------------------------------


def test_an_end_that_is_told_again_changes_nothing() -> None:
    b = Bench(2, queue=QueueRules(max_concurrent=2))
    first, other = b.route(), b.route()
    for outcome in (Outcome.SERVED, Outcome.BROKEN, Outcome.SERVED):
        first.end(outcome)
        assert (b.router.leases, b.router.queue.running, loads(b)) == (1, 1, [0, 1])
    other.end()
    assert (b.router.leases, b.router.queue.running, loads(b)) == (0, 0, [0, 0])
    assert [worker.processed for worker in b.workers] == [1, 1]


def test_a_retry_closes_the_lease_once() -> None:
    b = bench(2, breaker=BreakerRules(threshold=2))
    first = b.route()
    following = first.retry(Outcome.BROKEN)
    assert following is not None
    assert (b.router.leases, loads(b)) == (1, [0, 1])
    first.end(Outcome.BROKEN)
    assert (b.router.leases, loads(b)) == (1, [0, 1])
    assert (first.worker.circuit.failures, first.worker.breaker.value) == (0, "closed")
    following.end()
    assert (first.worker.circuit.failures, first.worker.breaker.value) == (1, "closed")
    assert (b.router.leases, loads(b)) == (0, [0, 0])


def test_a_stream_is_awaited_until_its_first_byte() -> None:
    b = bench(1)
    stream, other = b.ask(facts(b"x", streaming=True)).attempt, b.route()
    assert b.workers[0].waiting == 1
    for _ in range(2):
        b.router.began(stream.leg, 2.0)
        b.router.began(other.leg, 2.0)
        assert b.workers[0].waiting == 0
    stream.end()
    b.router.began(stream.leg, 3.0)
    assert b.workers[0].waiting == 0


def test_the_worker_of_a_leg_that_broke_is_checked_now() -> None:
    b = bench(2)
    plan = b.route()
    b.router.suspect(plan.leg)
    assert b.checked == [plan.worker]
    b.fleet.remove(plan.worker)
    b.router.suspect(plan.leg)
    assert b.checked == [plan.worker]


# -- queued requests ---------------------------------------------------------------------------------------------------

QUEUE = QueueRules(queue_timeout=60.0, start_timeout=10.0)
FULL = FleetRules(most_load=1)


def two_models(places: int | None = None, **rules: Any) -> Bench:
    """A worker for model A and one for model B, each with room for one request."""
    b = Bench(0, rules=FleetRules(most_load=1, **rules), queue=QueueRules(max_concurrent=places), assign=by_model)
    b.workers += [b.fleet.add(a_worker_of(model), 0.0) for model in "AB"]
    return b


def a_worker_of(model: str) -> WorkerSpec:
    return WorkerSpec(url=f"http://{model}:1", model_id=model, health=spec("").health)


def ask(b: Bench, model: str, now: float = 0.0) -> Asked:
    return b.ask(facts(model=b'"%b"' % model.encode()), now)


def kinds(*requests: Asked) -> list[str]:
    """What each was answered last: what it waits for, or the kind of the answer."""
    return [request.waits[0] if request.waits else type(request.answers[-1]).__name__ for request in requests]


def at_rest(b: Bench, *requests: Asked) -> None:
    """Ends the requests that have a plan; nothing is left then."""
    for request in requests:
        if isinstance(request.answers[-1], Plan):
            request.attempt.end()
    b.settle()
    assert (b.router.leases, sum(loads(b)), len(b.router.queue), b.router.queue.running) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("b", "why", "until"),
    [
        (Bench(1, rules=FULL, queue=QUEUE), "room", 63.0),
        (Bench(1, checked=True, queue=QUEUE), "start", 13.0),
        (Bench(0, rules=FleetRules(elastic=True), queue=QUEUE), "start", 13.0),
        (Bench(1, queue=QueueRules(max_concurrent=1)), "place", 63.0),
    ],
)
def test_a_request_that_cannot_begin_waits_for_a_reason_and_for_so_long(b: Bench, why: str, until: float) -> None:
    if why != "start":
        b.route()
    assert b.ask(facts(), 3.0).waits == (why, until)
    assert b.router.budget.requests == (why != "start"), "it counts once it begins"


def test_a_full_queue_refuses() -> None:
    b = Bench(1, queue=QueueRules(max_concurrent=1, queue_size=2))
    waiting = [b.ask(facts()) for _ in range(3)]
    with pytest.raises(QueueFull):
        b.ask(facts())
    assert len(b.router.queue) == 2
    assert repr(b.router) == f"<Router 1 leases, <Queue 1 of 1 running, 2 queued>, {b.router.budget!r}>"
    waiting[0].attempt.end()
    b.settle()
    assert kinds(*waiting) == ["Plan", "Plan", "place"]


@pytest.mark.parametrize("why", ["place", "room", "start"])
def test_a_request_takes_its_token_when_it_comes(why: str) -> None:
    queue = QueueRules(max_concurrent=1 if why == "place" else None, rate=1.0, burst=3.0)
    b = Bench(1, rules=FULL, queue=queue, checked=why == "start")
    requests = [b.ask(facts()) for _ in range(3)]
    assert kinds(*requests[1:]) == [why] * 2
    with pytest.raises(RateLimited):
        b.ask(facts())
    b.fleet.probed(b.workers[0], None, 0.0)
    b.settle()
    requests[0].attempt.end()
    b.settle()
    assert kinds(*requests[:2]) == ["Plan", "Plan"], "none is taken when it begins"


def test_when_a_worker_is_healthy_all_that_waited_for_it_begin_in_order() -> None:
    b = Bench(1, checked=True)
    requests = [b.ask(facts()) for _ in range(3)]
    b.fleet.probed(b.workers[0], None, 1.0)
    assert kinds(*requests) == ["start"] * 3, "not inside the call that changed something"
    b.settle(1.0)
    assert kinds(*requests) == ["Plan"] * 3
    assert [event.tag.number for event in b.log.decisions] == [1, 2, 3]
    assert b.router.queue.idle
    at_rest(b, *requests)


@pytest.mark.parametrize(
    "b", [Bench(1, rules=FULL), Bench(1, queue=QueueRules(max_concurrent=1)), Bench(2, rules=FULL, checked=True)]
)
def test_each_end_lets_the_next_one_begin(b: Bench) -> None:
    b.fleet.probed(b.workers[0], None, 0.0)
    requests = [b.ask(facts()) for _ in range(4)]
    for n, request in enumerate(requests):
        assert [isinstance(each.answers[-1], Plan) for each in requests] == [m <= n for m in range(4)]
        request.attempt.end()
        b.settle()
    at_rest(b)


def test_a_newcomer_does_not_overtake() -> None:
    for b in (Bench(1, rules=FULL), Bench(1, queue=QueueRules(max_concurrent=1))):
        running, first = b.ask(facts()), b.ask(facts())
        running.attempt.end()
        late = b.ask(facts())
        b.settle()
        assert kinds(first, late) in (["Plan", "room"], ["Plan", "place"])


def test_a_retry_keeps_the_place_of_its_request() -> None:
    b = Bench(2, queue=QueueRules(max_concurrent=1))
    running, waiting = b.route(), b.ask(facts())
    following = running.retry(Outcome.FAILED)
    assert following is not None
    b.settle()
    assert kinds(waiting) == ["place"]
    assert following.retry(Outcome.TIMEOUT) is None
    b.settle()
    assert kinds(waiting) == ["Plan"]


def test_a_failed_leg_makes_room_before_its_request_ends() -> None:
    b = Bench(2, rules=FULL)
    first, _ = b.route(), b.route()
    waiting = b.ask(facts())
    first.retry(Outcome.FAILED)
    b.settle()
    assert waiting.attempt.worker is first.worker, "the retry went to the other one, though it is full"


def test_a_pool_without_room_is_passed_over() -> None:
    b = two_models(places=2)
    _, running = ask(b, "A"), ask(b, "B")
    first, second, third = ask(b, "A"), ask(b, "B"), ask(b, "A")
    assert kinds(first, second, third) == ["place"] * 3
    running.attempt.end()
    b.settle()
    assert kinds(first, second, third) == ["room", "Plan", "room"]


def test_who_waits_for_room_keeps_nobody_from_a_free_place() -> None:
    b = two_models(places=2)
    ask(b, "A")
    first, running, second = ask(b, "A"), ask(b, "B"), ask(b, "A")
    assert kinds(first, second) == ["room", "place"], "the places were taken when the second one came"
    running.attempt.end(now=5.0)
    b.settle(5.0)
    assert (first.waits, second.waits) == (("room", 60.0), ("room", 60.0))
    assert (len(first.answers), len(second.answers)) == (1, 2), "only the other one has news"
    assert kinds(ask(b, "B")) == ["Plan"]


def test_when_the_reason_changes_all_that_wait_hear_of_it() -> None:
    b = Bench(1, checked=True, rules=FULL, queue=QUEUE)
    first, second, third = (b.ask(facts(), now) for now in (0.0, 1.0, 2.0))
    b.fleet.probed(b.workers[0], None, 5.0)
    b.settle(5.0)
    assert kinds(first) == ["Plan"]
    assert (second.waits, third.waits) == (("room", 61.0), ("room", 62.0))
    b.fleet.lost(b.workers[0], 6.0)
    b.settle(6.0)
    assert (second.waits, third.waits) == (("start", 11.0), ("start", 12.0)), "its time counts from the beginning"
    first.attempt.end(Outcome.BROKEN, 7.0)
    b.settle(7.0)
    assert [len(request.answers) for request in (second, third)] == [3, 3], "nothing is new"


@pytest.mark.parametrize(("event", "error"), [("remove", NoWorkers), ("down", Unavailable), ("drain", Unavailable)])
def test_when_the_last_worker_goes_all_that_wait_hear_why(event: str, error: type[Unavailable]) -> None:
    b = Bench(1, checked=True)
    requests = [b.ask(facts()) for _ in range(3)]
    _happen(b, event)
    if event == "down":
        b.fleet.down(b.workers[0], "it is given up")
    b.settle()
    assert [type(request.answers[-1]) for request in requests] == [error] * 3
    assert [len(request.answers) for request in requests] == [2] * 3
    at_rest(b)


def test_who_waited_too_long_hears_why() -> None:
    for b in (Bench(1, rules=FULL), Bench(1, queue=QueueRules(max_concurrent=1))):
        running, waiting = b.ask(facts()), b.ask(facts())
        error = b.router.expired(waiting.tag, 60.0)
        assert (type(error), error.status, error.retry_after) == (QueueTimeout, 408, 60.0)
        at_rest(b, running)
        assert kinds(waiting) != ["Plan"], "it left the queue"
    b = Bench(1, checked=True)
    waiting = b.ask(facts())
    error = b.router.expired(waiting.tag, 10.0)
    assert (type(error), error.status, error.code) == (WorkersStarting, 503, "workers_starting")
    b.fleet.probed(b.workers[0], None, 10.0)
    at_rest(b)
    assert kinds(waiting) == ["start"]


def test_a_client_that_leaves_the_queue_is_not_answered() -> None:
    b = Bench(1, rules=FULL)
    running, first, second = (b.ask(facts()) for _ in range(3))
    b.router.withdraw(first.tag)
    b.router.withdraw(first.tag)
    running.attempt.end()
    b.settle()
    assert kinds(first, second) == ["room", "Plan"]
    at_rest(b, second)


def test_at_the_end_those_are_refused_that_no_worker_is_left_for() -> None:
    b = two_models()
    running = [ask(b, model) for model in "AB"]
    requests = [ask(b, model) for model in "ABA"]
    b.fleet.set_draining(b.workers[0], True)
    b.router.refuse_stranded(ShuttingDown(), 1.0)
    assert kinds(*requests) == ["ShuttingDown", "room", "ShuttingDown"]
    b.settle()
    running[1].attempt.end()
    b.settle()
    assert kinds(*requests) == ["ShuttingDown", "Plan", "ShuttingDown"]
    at_rest(b, running[0], requests[1])


def test_time_alone_may_make_a_candidate() -> None:
    """A breaker's time is up: nothing tells of it."""
    b = Bench(2, rules=FleetRules(most_load=1, breaker=BreakerRules(threshold=1, timeout=10.0)))
    b.route().end(Outcome.FAILED)
    _, waiting = b.route(), b.ask(facts())
    b.router.look(9.0)
    assert (kinds(waiting), len(waiting.answers)) == (["room"], 1)
    b.router.look(10.0)
    assert waiting.attempt.worker is b.workers[0]


def test_a_worker_that_tells_its_model_serves_those_that_waited_for_it() -> None:
    """It is in a pool of its own from then on."""
    b = Bench(1, checked=True, assign=by_model)
    requests = [ask(b, "A") for _ in range(2)]
    b.fleet.reported(b.workers[0], EngineReport(model="A"))
    b.fleet.probed(b.workers[0], None, 1.0)
    b.settle(1.0)
    assert kinds(*requests) == ["Plan", "Plan"]


def test_a_pool_that_comes_again_serves_those_that_waited_for_it() -> None:
    b = two_models(places=1)
    running, requests = ask(b, "A"), [ask(b, model) for model in "BAB"]
    b.fleet.remove(b.workers[1])
    b.workers.append(b.fleet.add(a_worker_of("B"), 1.0))
    for n, request in enumerate(requests):
        running.attempt.end()
        b.settle()
        assert kinds(*requests) == ["Plan"] * (n + 1) + ["place"] * (2 - n)
        running = request
    at_rest(b, running)


def test_those_of_two_pools_that_become_one_keep_their_order() -> None:
    b = two_models()
    running, requests = [ask(b, model) for model in "AB"], [ask(b, model) for model in "BABA"]
    b.fleet.remove(b.workers[1])
    b.settle(1.0)
    assert kinds(*requests) == ["room"] * 4
    assert [len(request.answers) for request in requests] == [2, 1, 2, 1], "those of B hear of their new reason"
    for request in [running[0], *requests]:
        request.attempt.end()
        b.settle()
    assert [event.tag.number for event in b.log.decisions] == [1, 2, 3, 4, 5, 6]


# -- listeners ---------------------------------------------------------------------------------------------------------


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
    listeners.routed(routed(leg(worker)))
    listeners.worker_changed(WorkerChanged(worker, "health", "a", "b"))
    assert heard == ["one", "other"]
