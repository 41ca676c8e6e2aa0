"""The cost policy: which worker is the cheapest, by arithmetic.

The pace of each worker is set: 1,000 bytes take 1 s, a request by itself nothing, answers do not slow each other down.
So a prompt of 4,000 bytes that nobody has costs 4 s, and the cost of a worker can be worked out by hand.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleets import Asked, Attempt, Bench, facts
from sglang_router.errors import RouterError
from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.cost import Cost
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker


class Costs(Bench):
    """A bench whose workers have a known pace: seconds per byte, each its own."""

    def __init__(
        self, count: int, *, paces: tuple[float, ...] = (0.001,), batch: float = 0.0, cost_load_cap: float = 0.0
    ):
        super().__init__(count, "cost", cost_load_cap=cost_load_cap)
        policy = self.policy
        assert isinstance(policy, Cost)
        self.cost = policy
        policy.paces.prompts.per_item, policy.paces.prompts.per_unit = 0.0, 0.001
        for number, worker in enumerate(self.workers):
            self.pace(worker, paces[number % len(paces)], batch)

    def pace(self, worker: Worker, per_byte: float, batch: float = 0.0) -> None:
        work = worker.work
        work.prompts.per_item, work.prompts.per_unit = 0.0, per_byte
        work.answers.per_request = batch
        work.last = -1e9  # nobody came there for so long that nobody is expected to

    def stream(self, text: bytes, now: float = 0.0) -> Asked:
        return self.ask(facts(text, streaming=True), now)

    def has(self, number: int, text: bytes, now: float = 0.0) -> None:
        """Make a worker hold a text, as if it had been served there."""
        tree, worker = self.cost.tree, self.workers[number]
        tree.insert(tree.match(b"", text), worker.slot, now)

    def costs(self, text: bytes, now: float = 0.0) -> dict[int, float]:
        """Return what a request costs, by the number of the worker."""
        able = candidates_of(self.workers)
        weighed = self.cost.weigh(facts(text), able, able.mask, now)
        return {self.number(worker): cost for worker, cost in zip(weighed.workers, weighed.costs, strict=True)}


def text(seed: str, size: int) -> bytes:
    """A text that begins unlike all others."""
    return (seed.encode() + b"|" + b"%d" % size * size)[:size]


# -- what a worker costs -----------------------------------------------------------------------------------------------


def test_an_idle_worker_costs_what_it_must_read() -> None:
    bench = Costs(2)
    bench.has(0, text("a", 3000))
    bench.workers[0].work.free_at = 10.0
    costs = bench.costs(text("a", 3000) + b"!" * 1000, now=8.0)
    assert costs[0] == pytest.approx(2.0 + 1.0, rel=1e-6)
    assert costs[1] == pytest.approx(4.0, rel=1e-6)


def test_who_comes_meanwhile_waits_longer() -> None:
    """Read 1 s behind a backlog of 3 s, where one request comes every 2 s: 1 x (2 x 3 + 1) / 2."""
    bench = Costs(1)
    work = bench.workers[0].work
    work.free_at, work.gap, work.last = 3.0, 2.0, 0.0
    assert bench.costs(b"x" * 1000) == {0: pytest.approx(3.0 + 1.0 + 3.5)}


def test_requests_in_flight_slow_the_answer_down() -> None:
    bench = Costs(2, batch=0.5)
    bench.load(4, 0)
    costs = bench.costs(b"x" * 1000)
    assert costs[0] - costs[1] == pytest.approx(0.1 * 4 * 0.5)


@pytest.mark.parametrize(("spec", "factor"), [({"cost": 2.0}, 2.0), ({"priority": 100}, 0.5), ({"priority": 0}, 1.0)])
def test_what_the_operator_says_counts(spec: dict[str, float], factor: float) -> None:
    bench = Costs(1)
    worker = bench.workers[0]
    bench.fleet.amend(worker, WorkerSpec(url=worker.url, **spec))  # type: ignore[arg-type]
    assert bench.costs(b"x" * 1000) == {0: pytest.approx(factor)}


def test_a_miss_that_evicts_costs_what_the_evicted_bring_back() -> None:
    bench = Costs(2)
    full = bench.workers[0]
    bench.has(0, b"a" * 1000, now=0.0)
    bench.cost.tree.bound(full.slot, 1500)
    bench.cost.pressure.used(10**6, 300.0)  # much is used again after so long
    costs = bench.costs(b"x" * 1000, now=100.0)
    assert costs[1] == pytest.approx(1.0, rel=1e-6)
    assert costs[0] == pytest.approx(1.0 + bench.cost.pressure.evicting(100.0), rel=1e-6)
    assert bench.costs(b"x" * 500, now=100.0)[0] == pytest.approx(0.5, rel=1e-6)  # there is room for this one


def test_where_nothing_is_remembered_nothing_is_evicted() -> None:
    """A cache that is smaller than the prompt, of which the last text was forgotten."""
    bench = Costs(2)
    for worker in bench.workers:
        bench.cost.tree.bound(worker.slot, 8)
    assert bench.costs(b"x" * 1000) == {0: pytest.approx(1.0), 1: pytest.approx(1.0)}


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_owner_of_the_prefix_gets_the_request() -> None:
    bench = Costs(3)
    first = bench.serve(text("a", 4000))
    again = bench.serve(text("a", 4000) + b"!" * 400, now=1.0)
    assert (first.branch, again.branch, again.worker) == ("miss", "hit", first.worker)
    assert (again.matched, again.total) == (4000, 4400)


def test_a_backlog_longer_than_reading_it_elsewhere_spills() -> None:
    bench = Costs(2)
    bench.has(0, text("a", 4000))
    work = bench.workers[0].work
    work.free_at = 3.9  # and 0.4 s for what is new: less than 4.4 s elsewhere
    assert bench.policy.choose(facts(text("a", 4000) + b"!" * 400), candidates_of(bench.workers), 0.0).branch == "hit"
    work.free_at = 4.9
    choice = bench.policy.choose(facts(text("a", 4000) + b"!" * 400), candidates_of(bench.workers), 0.0)
    assert (choice.branch, choice.worker, choice.matched) == ("spill", bench.workers[1], 0)


def test_near_ties_keep_the_prefix() -> None:
    """0.1 of reading the whole prompt is near: 4.4 s elsewhere against up to 4.84 s."""
    bench = Costs(2)
    bench.has(0, text("a", 4000))
    request, work = facts(text("a", 4000) + b"!" * 400), bench.workers[0].work
    for free_at, branch in ((4.4, "hit"), (4.5, "spill")):
        work.free_at = free_at
        assert bench.policy.choose(request, candidates_of(bench.workers), 0.0).branch == branch


def test_prefixes_that_differ_by_a_few_bytes_are_equal() -> None:
    bench = Costs(2)
    bench.has(0, text("a", 4000) + b"xy")
    bench.has(1, text("a", 4000))
    bench.workers[0].work.free_at = 0.1
    choice = bench.policy.choose(facts(text("a", 4000) + b"xyz" * 100), candidates_of(bench.workers), 0.0)
    assert (choice.worker, choice.branch) == (bench.workers[1], "hit")


def test_a_burst_of_one_new_prefix_stays_where_it_began() -> None:
    """Each one adds 10 ms to 4 s: within what is near, all go where the first one went."""
    bench = Costs(4)
    prefix = text("new", 4000)
    attempts = [bench.stream(prefix + text(f"u{number}", 10)).attempt for number in range(32)]
    assert sorted(bench.spread(attempts)) == [0, 0, 0, 32]


def test_a_longer_burst_is_not_read_again_where_others_would_wait_for_it() -> None:
    """Each worker gets a request every 2 s: to read 4.2 s there once more delays two others, 8.8 s in all."""
    bench = Costs(8)
    for worker in bench.workers:
        worker.work.gap, worker.work.last = 2.0, 0.0
    prefix = text("new", 4000)
    attempts = [bench.stream(prefix + text(f"u{number}", 200)).attempt for number in range(30)]
    assert len([count for count in bench.spread(attempts) if count]) <= 2


def test_idle_workers_help_with_a_longer_burst_and_each_reads_the_prefix_once() -> None:
    bench = Costs(4)
    prefix = text("new", 4000)
    attempts = [bench.stream(prefix + text(f"u{number}", 200)).attempt for number in range(64)]
    holders = [count for count in bench.spread(attempts) if count]
    read = [attempt for attempt in attempts if attempt.matched < 4000]
    assert len(read) == len(holders)
    assert max(worker.work.backlog(0.0) for worker in bench.workers) < 4.0 + 0.2 * 64


def test_a_shared_system_prompt_does_not_pull_all_to_one_worker() -> None:
    """Sessions come faster than one worker can read what is new of them; all begin alike."""
    bench = Costs(4)
    system = text("system", 2000)
    attempts = [bench.stream(system + text(f"s{number}", 1000), now=number * 0.25).attempt for number in range(40)]
    assert max(bench.spread(attempts)) < 20
    assert min(bench.spread(attempts)) > 3


def test_slow_engines_get_their_share() -> None:
    """Of 28 prompts that come at once, a worker at 0.4 of the speed gets two fifths of what the others get."""
    bench = Costs(4, paces=(0.001, 0.001, 0.001, 0.0025))
    for worker in bench.workers:
        worker.work.gap = 1e9
    attempts = [bench.stream(text(f"t{number}", 1000)).attempt for number in range(34)]
    for worker in bench.workers:
        assert worker.work.backlog(0.0) == pytest.approx(10.0, abs=2.6)
    assert bench.spread(attempts)[3] == pytest.approx(4, abs=1)


def test_without_a_difference_the_caches_fill_evenly() -> None:
    bench = Costs(3)
    attempts = [bench.serve(text(f"t{number}", 600), now=100.0 * number) for number in range(9)]
    assert bench.spread(attempts) == [3, 3, 3]


def test_without_text_the_least_backlog_decides() -> None:
    bench = Costs(3)
    for worker, free_at in zip(bench.workers, (3.0, 1.0, 2.0), strict=True):
        worker.work.free_at = free_at
    choice = bench.choose()
    assert (choice.worker, choice.branch, choice.total) == (bench.workers[1], "no_text", 0)


def test_a_scaffold_alone_is_no_match() -> None:
    bench = Costs(2)
    bench.send(facts(b"[{role:" + b"a" * 1000, scaffold=7))
    choice = bench.policy.choose(facts(b"[{role:" + b"b" * 1000, scaffold=7), candidates_of(bench.workers), 1.0)
    assert (choice.branch, choice.matched, choice.total) == ("miss", 0, 1000)


def test_a_new_worker_is_tried_and_not_flooded() -> None:
    """It has the pace of the pool, so of requests that come at once it gets its share and no more."""
    bench = Costs(3)
    newcomer = bench.fleet.add(WorkerSpec(url="http://new:1", health=bench.workers[0].spec.health), 0.0)
    bench.workers.append(newcomer)
    assert newcomer.work.prompts.per_unit == 0.001
    bench.pace(newcomer, 0.001)
    attempts = [bench.stream(text(f"t{number}", 1000)).attempt for number in range(40)]
    assert bench.spread(attempts)[3] == pytest.approx(10, abs=2)


def test_a_cap_on_the_load_comes_before_the_prefix() -> None:
    bench = Costs(3, cost_load_cap=1.5)
    bench.has(0, text("a", 4000))
    request = facts(text("a", 4000))
    bench.load(1, 1, 1)
    assert bench.policy.choose(request, candidates_of(bench.workers), 0.0).branch == "hit"
    bench.load(4, 1, 1)  # 1.5 x 2: no more than 3 in flight
    choice = bench.policy.choose(request, candidates_of(bench.workers), 0.0)
    assert (choice.branch, choice.worker is bench.workers[0]) == ("capped", False)


@pytest.mark.parametrize("cap", [1e-300, 1e308])
def test_any_cap_will_do(cap: float) -> None:
    bench = Costs(2, cost_load_cap=cap)
    for number in range(20):
        bench.stream(text(f"a{number}", 1000))
    assert sum(worker.load for worker in bench.workers) == 20


def test_a_longer_match_is_not_shortened_by_one_that_is_worth_nothing() -> None:
    bench = Costs(2)
    bench.has(0, b"0123456789abcdefghij")
    bench.has(1, b"0123456789")
    chosen = bench.stream(b"0123456789abcdefghij", 1.0).attempt
    assert (chosen.branch, chosen.matched) == ("hit", 20)


def test_an_owner_that_is_sure_to_be_cheap_is_not_compared() -> None:
    bench = Costs(2)
    bench.has(0, text("a", 4000))
    assert list(bench.costs(text("a", 4000) + b"!" * 400)) == [0]
    bench.workers[0].work.free_at = 2.0
    assert list(bench.costs(text("a", 4000) + b"!" * 400)) == [0, 1]


def test_of_many_workers_few_are_compared_and_all_get_their_turn() -> None:
    bench = Costs(100)
    assert len(bench.costs(b"x" * 1000)) == 4
    attempts = [bench.stream(text(f"t{number}", 1000)).attempt for number in range(200)]
    assert max(bench.spread(attempts)) <= 3


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans(), st.floats(0.0, 3.0)), max_size=40))
def test_a_choice_changes_nothing_and_is_of_the_candidates(
    requests: list[tuple[int, int, bool, float]],
) -> None:
    bench, now, open_ = Costs(5, cost_load_cap=3.0), 0.0, []
    for group, length, streams, pause in requests:
        now += pause
        asked = facts(text(f"g{group}", 700 * length), streaming=streams)
        candidates = candidates_of(bench.workers[: 1 + group])
        before = repr(bench.policy), [repr(worker.work) for worker in bench.workers]
        first, second = (bench.policy.choose(asked, candidates, now) for _ in range(2))
        assert (first.worker, first.branch, first.matched) == (second.worker, second.branch, second.matched)
        assert (repr(bench.policy), [repr(worker.work) for worker in bench.workers]) == before
        assert first.worker in candidates
        assert 0 <= first.matched <= first.total
        open_.append(bench.ask(asked, now).attempt)
        if len(open_) > 8:
            open_.pop(0).end(Outcome.SERVED, now)
    for attempt in open_:
        attempt.end(Outcome.SERVED, now)
    assert [worker.work.awaited for worker in bench.workers] == [0] * 5


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_memory_of_a_worker_is_as_large_as_its_cache() -> None:
    bench = Costs(1)
    worker = bench.workers[0]
    bench.fleet.reported(worker, EngineReport(capacity_tokens=500))
    for number in range(8):
        bench.serve(text(f"t{number}", 600), now=float(number))
    assert bench.cost.memory is not None
    assert bench.cost.memory.size(worker) <= 4 * 500
    assert bench.cost.memory.evictions(worker) > 0


def test_a_worker_that_gets_no_requests_is_remembered_as_its_engine_tells_too() -> None:
    bench = Costs(1)
    worker = bench.workers[0]
    bench.fleet.reported(worker, EngineReport(capacity_tokens=2))
    bench.serve(text("t", 600))
    assert bench.cost.tree.books(worker.slot).max_size == 8
    bench.fleet.reported(worker, EngineReport(capacity_tokens=500))
    bench.cost.tidy(1.0, 100)
    assert bench.cost.tree.books(worker.slot).max_size == 2000


def test_a_worker_that_restarts_has_nothing_and_the_pace_of_the_pool() -> None:
    bench = Costs(2)
    attempt = bench.serve(text("a", 4000))
    bench.fleet.lost(attempt.worker, 1.0)
    assert bench.cost.memory is not None
    assert bench.cost.memory.size(attempt.worker) == 0
    assert attempt.worker.work.prompts.per_unit == 0.001


def test_a_request_that_was_refused_is_forgotten() -> None:
    bench = Costs(1)
    bench.route(text("a", 4000)).end(Outcome.REJECTED)
    assert bench.cost.tree.held == 0


def test_an_explanation_tells_backlog_and_cost_of_each_candidate() -> None:
    bench = Costs(3)
    bench.has(1, text("a", 4000))
    bench.workers[1].work.free_at = 2.0
    request = facts(text("a", 4000) + b"!" * 400)
    considered = bench.policy.consider(request, candidates_of(bench.workers), 0.0)
    assert [each.matched for each in considered] == [0, 4000, 0]
    assert [each.backlog for each in considered] == [0.0, 2.0, 0.0]
    assert [each.cost for each in considered] == [pytest.approx(cost, rel=1e-6) for cost in (4.4, 2.4, 4.4)]


def test_the_length_of_a_token_is_learnt_from_what_engines_tell() -> None:
    bench = Costs(1)
    worker = bench.workers[0]
    attempt = bench.route(text("a", 3000))
    bench.router.ended(attempt.asked.tag, attempt.leg, Outcome.SERVED, 1.0, Usage(prompt=1000))
    bench.fleet.reported(worker, EngineReport(capacity_tokens=500))
    bench.serve(text("b", 100), now=2.0)
    assert bench.cost.tree.books(worker.slot).max_size == 1500


# -- whatever happens --------------------------------------------------------------------------------------------------

_SIZES = st.sampled_from([0, 10, 40, 400, 3000])
_NUMBERS = st.sampled_from([0, 1, 2, 500, 10**6, 1 << 53])
_EVENTS = st.one_of(
    st.tuples(st.just("ask"), _SIZES, st.integers(0, 3), st.booleans()),
    st.tuples(st.just("began"), st.integers(0, 20)),
    st.tuples(st.just("end"), st.integers(0, 20), st.sampled_from(list(Outcome))),
    st.tuples(st.just("retry"), st.integers(0, 20), st.sampled_from([each for each in Outcome if each.retryable])),
    st.tuples(st.just("told"), st.integers(0, 2), _NUMBERS, _NUMBERS, _NUMBERS),
    st.tuples(st.just("usage"), st.integers(0, 20), _NUMBERS),
    st.tuples(st.sampled_from(["lost", "flushed", "left"]), st.integers(0, 2)),
    st.tuples(st.just("pause"), st.sampled_from([0.0, 0.001, 1.0, 70.0, 1e5])),
    st.tuples(st.just("tidy")),
)


class Story:
    """A fleet to which anything happens. The figures of its workers are checked after each event."""

    def __init__(self, start: float) -> None:
        self.bench = Costs(3)
        self.works = [worker.work for worker in self.bench.workers]
        self.now = start
        self.open: list[Attempt] = []
        self.numbers = count()

    def happen(self, event: tuple[Any, ...]) -> None:
        getattr(self, event[0])(*event[1:])
        for worker in self.bench.workers:
            if worker.work not in self.works:
                self.works.append(worker.work)
        for work in self.works:
            assert 0.0 <= work.backlog(self.now) < math.inf
            assert math.isfinite(work.free_at)
            assert work.gap > 0.0
            assert 0.0 < work.prefill(1) < math.inf
            assert work.awaited <= len(self.open)

    def take(self, number: int) -> Attempt | None:
        return self.open.pop(number % len(self.open)) if self.open else None

    def ask(self, size: int, seed: int, streams: bool) -> None:
        if list(self.bench.fleet):
            asked = facts(text(str(seed), size), streaming=streams)
            asked.body = b"%d" % next(self.numbers)  # no two are one request, which the quarantine would refuse
            try:
                self.open.append(self.bench.ask(asked, self.now).attempt)
            except RouterError:
                assert not self.bench.fleet.candidates(self.now)

    def began(self, number: int) -> None:
        if self.open:
            self.bench.router.began(self.open[number % len(self.open)].leg, self.now)

    def end(self, number: int, outcome: Outcome) -> None:
        if (attempt := self.take(number)) is not None:
            attempt.end(outcome, self.now)

    def usage(self, number: int, prompt: int) -> None:
        if (attempt := self.take(number)) is not None:
            attempt.end(Outcome.SERVED, self.now, Usage(prompt, 0, 1))

    def retry(self, number: int, outcome: Outcome) -> None:
        if (attempt := self.take(number)) is not None:
            again = attempt.retry(outcome, self.now)
            if again is not None:
                self.open.append(again)

    def told(self, number: int, tokens: int, busy: int, capacity: int) -> None:
        report = EngineReport(prefilled_tokens=tokens, prefill_busy_us=busy, capacity_tokens=capacity or None)
        self.bench.fleet.reported(self.bench.workers[number], report)

    def lost(self, number: int) -> None:
        self.bench.fleet.lost(self.bench.workers[number], self.now)
        self.bench.fleet.probed(self.bench.workers[number], None, self.now)

    def flushed(self, number: int) -> None:
        self.bench.fleet.emptied(self.bench.workers[number])

    def left(self, number: int) -> None:
        self.bench.fleet.remove(self.bench.workers[number])

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def tidy(self) -> None:
        self.bench.policy.tidy(self.now, 1000)


@settings(max_examples=100)
@given(st.lists(_EVENTS, max_size=60), st.sampled_from([0.0, 1e6]))
@example([("ask", 10, 0, True), ("ask", 10, 0, True), ("pause", 0.001), ("began", 1)], 0.0)
@example([("ask", 0, 0, False), ("retry", 0, Outcome.LOST), ("end", 0, Outcome.CUT), ("ask", 0, 0, False)], 0.0)
def test_no_event_makes_a_decision_fail_or_spoils_the_figures(events: list[tuple[Any, ...]], start: float) -> None:
    story = Story(start)
    for event in events:
        story.happen(event)
    for attempt in story.open:
        attempt.end(Outcome.SERVED, story.now)
    assert [work.awaited for work in story.works] == [0] * len(story.works)
