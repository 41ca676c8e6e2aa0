"""What engines report reaches counters and policy, once for each leg that was served."""

from __future__ import annotations

import pytest

from fleets import Attempt, Bench
from fleets import facts as facts_of
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.usage import Usage


class Hears(Policy):
    """Keeps what is reported to it."""

    name = "hears"

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.settings, policy.rng)
        self.reports: list[tuple[str, bytes, Usage | None, float]] = []

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        return self.least_loaded(candidates, "least")

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        self.reports.append((choice.worker.url, facts.text, usage, now))


def hearing(count: int = 1) -> tuple[Bench, Hears]:
    bench = Bench(count, "least_load")
    bench.pool.policy = hears = Hears(bench.pool.policy)
    return bench, hears


def test_each_served_leg_is_reported_once() -> None:
    bench, hears = hearing()
    attempt = bench.route(b"one", now=0.0)
    usage = Usage(10, 4, 2)
    attempt.end(Outcome.SERVED, 1.5, usage)
    attempt.end(Outcome.SERVED, 2.5, usage)
    assert hears.reports == [(attempt.worker.url, b"one", usage, 1.5)]
    assert repr(attempt.worker.tokens) == "<Tokens 4 of 10 cached, 2 written>"
    bench.route(b"two", now=3.0).end(Outcome.SERVED, 4.0)
    assert hears.reports[1:] == [(attempt.worker.url, b"two", None, 4.0)]


@pytest.mark.parametrize("outcome", [each for each in Outcome if each is not Outcome.SERVED])
def test_other_legs_are_not_reported(outcome: Outcome) -> None:
    bench, hears = hearing()
    bench.route(b"one", now=0.0).end(outcome, 1.0, Usage(10, 4, 2))
    assert hears.reports == []
    assert bench.workers[0].tokens.prompt == 0


def test_a_retried_request_is_reported_of_the_worker_that_served_it() -> None:
    bench, hears = hearing(2)
    attempt = bench.route(b"one", now=0.0)
    again = attempt.retry(Outcome.BROKEN, 1.0)
    assert again is not None
    again.end(Outcome.SERVED, 2.0, Usage(10, 4, 2))
    assert [report[0] for report in hears.reports] == [again.worker.url]
    assert again.worker is not attempt.worker
    assert attempt.worker.tokens.prompt == 0


def test_what_is_told_of_a_removed_worker_is_nobodys() -> None:
    bench, hears = hearing(2)
    attempt = bench.route(b"one", now=0.0)
    bench.fleet.remove(attempt.worker)
    attempt.end(Outcome.SERVED, 2.0, Usage(10, 4, 2))
    assert hears.reports == []


def test_unknown_figures_are_not_counted() -> None:
    bench, _ = hearing()
    bench.route(b"one", now=0.0).end(Outcome.SERVED, 2.0, Usage(10, -1, -1))
    assert repr(bench.workers[0].tokens) == "<Tokens 0 of 10 cached, 0 written>"
    assert repr(Usage(10, -1, 3)) == "<Usage ? of 10 cached, 3 written>"


def test_a_policy_that_fails_to_hear_hurts_no_request() -> None:
    class Deaf(Hears):
        def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
            raise ValueError("deaf")

    bench, hears = hearing()
    bench.pool.policy = Deaf(hears)
    attempt = bench.route(b"one", now=0.0)
    attempt.end(Outcome.SERVED, 1.0, Usage(10, 4, 2))
    assert (attempt.worker.load, bench.router.leases, attempt.worker.processed) == (0, 0, 1)
    with pytest.raises(ValueError, match="deaf"):
        bench.settle(1.0)


# -- what is learnt of a cache -----------------------------------------------------------------------------------------


class Engines:
    """Workers of the policy cache_aware, whose engines report what the test says: tokens of 4 bytes."""

    def __init__(self, count: int = 1) -> None:
        self.bench = Bench(count, "cache_aware")
        self.now = 0.0

    def asked(self, group: int, share: float | None = 1.0, streaming: bool = False) -> Usage:
        """Route and serve a prompt of a group; its engine had this share of what was predicted (None: says nothing)."""
        attempt = self.send(group, streaming)
        return self.serve(attempt, share)

    def warm(self) -> None:
        """Serve prompts of twenty groups, as predicted."""
        for number in range(600):
            self.asked(number % 20)

    def send(self, group: int, streaming: bool = False) -> Attempt:
        self.now += 1.0
        text = b"%04d" % group * 1000 + (b"%08d" % int(self.now))[::-1]
        asked = self.bench.ask(facts_of(text, streaming=streaming), self.now)
        assert asked.attempt is not None
        return asked.attempt

    def serve(self, attempt: Attempt, share: float | None = 1.0) -> Usage:
        self.now += 1.0
        prompt = attempt.total // 4
        usage = Usage(prompt, -1 if share is None else int(attempt.matched // 4 * share), 1)
        attempt.end(Outcome.SERVED, self.now, usage)
        return usage

    @property
    def size(self) -> int:
        memory = self.bench.pool.policy.memory
        assert memory is not None
        return memory.size(self.bench.workers[0])

    @property
    def emptied(self) -> int:
        return self.bench.log.whats().count("emptied")


def test_predicted_and_reported_tokens_are_compared_per_answer() -> None:
    engines = Engines()
    assert engines.asked(1, None).predicted == -1, "what is not told is not compared"
    assert engines.asked(2, 0.0).predicted == 0
    usage = engines.asked(1, 1.0)
    assert (usage.predicted, usage.missed) == (1000, False)
    usage = engines.asked(1, 0.4)
    assert (usage.predicted, usage.cached, usage.missed) == (1000, 400, True)
    assert engines.bench.workers[0].belief.misses == 1


def test_a_worker_with_nothing_in_its_cache_is_emptied_once() -> None:
    engines = Engines()
    engines.warm()
    for group in range(3):
        engines.asked(group, 0.0)
    assert (engines.emptied, engines.size > 50_000) == (0, True)
    engines.asked(3, 0.0)
    assert (engines.emptied, engines.size) == (1, 0)
    for group in range(20):
        engines.asked(group, 0.0)
        engines.asked(group, 0.0)
    assert engines.emptied == 1, "no second time without a hit"


def test_one_client_whose_prompts_are_never_cached_empties_nothing() -> None:
    """It asks for log probabilities of prompts that begin alike, alone at night, as often as it likes."""
    engines = Engines()
    for _ in range(3):
        engines.warm()
        for number in range(200):
            engines.asked(number % 2, 0.0)
    assert engines.emptied == 0
    engines.warm()
    for group in range(20):
        engines.asked(group, 0.0)
    assert engines.emptied == 1, "and when its cache is empty, that is seen all the same"


def test_an_endpoint_that_never_told_a_hit_says_nothing_of_the_cache() -> None:
    """Some say 0 whatever they found."""
    engines = Engines()
    engines.warm()
    for group in range(100, 200):
        for name in ("/generate", "/v1/responses"):
            asked = engines.send(group)
            asked.asked.facts.endpoint = ENDPOINTS[name.encode()]
            engines.serve(asked, 0.0 if name == "/v1/responses" else 1.0)
        if group > 150:
            asked = engines.send(group)
            asked.asked.facts.endpoint = ENDPOINTS[b"/v1/responses"]
            engines.serve(asked, 0.0)
    assert engines.bench.workers[0].belief.row == 0
    assert engines.bench.workers[0].belief.misses > 100
    assert engines.emptied == 0


def test_a_burst_of_one_new_prefix_is_no_evidence() -> None:
    """Its first request is not read yet when the others are sent; the engine has nothing cached for them."""
    engines = Engines()
    engines.warm()
    for streaming in (True, False):
        for group in range(100, 105):
            burst = [engines.send(group + 50 * streaming, streaming) for _ in range(8)]
            assert burst[-1].matched == 4000
            assert [engines.serve(each, 0.0).missed for each in burst] == [False] + [True] * 7
    belief = engines.bench.workers[0].belief
    assert (engines.emptied, belief.share, belief.row, belief.misses) == (0, 1.0, 0, 70)


def test_a_stream_that_has_begun_does_not_hide_the_evidence() -> None:
    engines = Engines()
    engines.warm()
    runs = engines.send(0, streaming=True)
    engines.bench.router.began(runs.leg, engines.now)
    for group in range(1, 5):
        engines.asked(group, 0.0)
    assert engines.emptied == 1
    assert not runs.worker.unread
    engines.serve(runs)
    assert not runs.worker.unread


def test_leases_of_an_earlier_process_say_nothing() -> None:
    engines = Engines()
    engines.warm()
    worker = engines.bench.workers[0]
    for group in range(6):
        attempt = engines.send(group)
        worker.life += 1
        assert engines.serve(attempt, 0.0).missed
    assert engines.emptied == 0


def test_misses_tell_how_much_a_cache_holds() -> None:
    engines = Engines()
    engines.warm()
    worker = engines.bench.workers[0]
    assert worker.belief.capacity == 0
    before = engines.size
    for number in range(100):
        engines.asked(number % 20, 1.0 if number % 4 else 0.3)
    assert before < worker.belief.capacity < engines.size
    engines.bench.fleet.emptied(worker)
    assert worker.belief.capacity == 0


def test_policies_without_a_memory_are_told_and_not_judged() -> None:
    bench, hears = hearing()
    usage = Usage(1000, 0, 1)
    bench.route(b"x" * 4000, now=0.0).end(Outcome.SERVED, 1.0, usage)
    assert (usage.predicted, usage.missed) == (-1, False)
    assert len(hears.reports) == 1
