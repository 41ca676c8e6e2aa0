"""A policy in the shadow of another one: it changes nothing, it follows reality, and its faults hurt nobody."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Attempt, Bench, facts, spec
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.policies.cache_aware import CacheAware
from sglang_router.routing.policies.shadowed import Shadowed, ShadowTally
from sglang_router.routing.policies.simple import LeastLoad
from sglang_router.routing.recorder import Recorder
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

SEED = 5
"""Of what a shadow draws."""


def shadowed(obeyed: str, shadow: str | type[Policy]) -> tuple[Any, ShadowTally, list[str]]:
    """Return what makes a policy with its shadow, the tally, and the list of faults."""
    kind = POLICIES[shadow] if isinstance(shadow, str) else shadow
    tally, faults = ShadowTally(kind.name), list[str]()

    def make(settings: PolicySettings, rng: random.Random) -> Policy:
        made = kind(settings, random.Random(SEED))
        return Shadowed(
            POLICIES[obeyed](settings, rng), made, tally, lambda name, error: faults.append(f"{name}: {error}")
        )

    return make, tally, faults


class Forced(Policy):
    """A policy whose choices are overruled: `next` is the name of the worker that gets the request."""

    name = "forced"
    kind = ""

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.own = POLICIES[self.kind](settings, random.Random(SEED))
        self.memory = self.own.memory
        self.next = ""
        self.wish = ("", "", 0)

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        choice = self.own.choose(facts, candidates, now)
        self.wish = (choice.worker.url, choice.branch, choice.matched)
        (choice.worker,) = (worker for worker in candidates if worker.url == self.next)
        return choice

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        self.own.chosen(choice, facts, now)

    def unread(self, choice: Choice, facts: Facts) -> None:
        self.own.unread(choice, facts)

    def added(self, worker: Worker) -> None:
        self.own.added(worker)

    def removed(self, worker: Worker) -> None:
        self.own.removed(worker)

    def emptied(self, worker: Worker) -> None:
        self.own.emptied(worker)


class Pairing:
    """The same requests to three fleets: a policy with its shadow, that policy alone, the shadow's kind overruled."""

    def __init__(self, obeyed: str, shadow: str) -> None:
        make, self.tally, self.faults = shadowed(obeyed, shadow)
        self.pair = Bench(3, make)
        self.recorder = Recorder(obeyed, 100, 1, 0, lambda: 0.0, print)
        self.pair.router.recorder = self.recorder
        self.alone = Bench(3, type("ForcedKind", (Forced,), {"kind": shadow}))
        self.plain = Bench(3, obeyed)
        self.running: list[tuple[Attempt, Attempt, Attempt]] = []
        self.added = 3

    def route(self, text: bytes, key: bytes) -> None:
        mine, plain = self.pair.route(text, key=key), self.plain.route(text, key=key)
        assert (mine.worker.url, mine.branch, mine.matched) == (plain.worker.url, plain.branch, plain.matched)
        forced = self.alone.policy
        assert isinstance(forced, Forced)
        forced.next = mine.worker.url
        self.running.append((mine, plain, self.alone.route(text, key=key)))
        lease = next(each for each in self.pair.router.open_leases() if each.number == mine.leg.lease)
        shadow = lease.choice.shadow
        assert shadow is not None
        url, branch, matched = forced.wish
        assert (shadow.worker, shadow.branch) == (url, branch)
        if branch == "hit":
            assert shadow.matched == matched

    def end(self, number: int, outcome: Outcome) -> None:
        if self.running:
            for attempt in self.running.pop(number % len(self.running)):
                attempt.end(outcome)

    def change(self, number: int, what: str) -> None:
        for bench in (self.pair, self.alone, self.plain):
            workers = list(bench.fleet)
            worker = workers[number % len(workers)]
            if what == "add":
                bench.fleet.add(spec(f"w{self.added}"), 0.0)
            elif what == "empty":
                bench.fleet.emptied(worker)
            elif len(workers) > 1:
                bench.fleet.remove(worker)
        self.added += 1


# `cost` sees the work of the workers as the policy that is obeyed tells it, which is not what it would tell by itself.
@pytest.mark.parametrize("shadow", [name for name in POLICIES if name != "cost"])
@pytest.mark.parametrize("obeyed", ["cache_aware", "round_robin"])
@settings(max_examples=20)
@given(data=st.data())
def test_it_changes_nothing_and_would_do_what_it_would_do_alone(obeyed: str, shadow: str, data: st.DataObject) -> None:
    pairing = Pairing(obeyed, shadow)
    texts = st.sampled_from([b"", b"a" * 40, b"a" * 30 + b"b" * 30, b"c" * 50, b"c" * 45 + b"d" * 9])
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["route", "route", "route", "end", "change"])):
            case "route":
                pairing.route(data.draw(texts), data.draw(st.sampled_from([b"", b"x", b"y"])))
            case "end":
                pairing.end(
                    data.draw(st.integers(0, 9)), data.draw(st.sampled_from([Outcome.SERVED, Outcome.REJECTED]))
                )
            case "change":
                pairing.change(data.draw(st.integers(0, 9)), data.draw(st.sampled_from(["add", "empty", "remove"])))
    assert not pairing.faults


@settings(max_examples=30)
@given(data=st.data())
def test_in_its_own_shadow_a_policy_that_measures_agrees_with_itself(data: st.DataObject) -> None:
    make, tally, faults = shadowed("cost", "cost")
    bench, running, now = Bench(3, make), list[Attempt](), 0.0
    texts = st.sampled_from([b"", b"a" * 400, b"a" * 300 + b"b" * 300, b"c" * 5000, b"c" * 450 + b"d" * 9000])
    for _ in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.floats(0.0, 1.0))
        match data.draw(st.sampled_from(["route", "route", "began", "end", "empty", "lose"])):
            case "route":
                running.append(bench.ask(facts(data.draw(texts), streaming=data.draw(st.booleans())), now).attempt)
            case "began" if running:
                bench.router.began(data.draw(st.sampled_from(running)).leg, now)
            case "end" if running:
                running.pop().end(Outcome.SERVED, now)
            case "empty":
                bench.fleet.emptied(bench.workers[0])
            case "lose":
                bench.fleet.lost(bench.workers[1], now)
    assert not tally.differed
    assert not faults


def test_a_shadow_learns_how_long_a_token_is() -> None:
    bench = Bench(1, shadowed("cache_aware", "cost")[0])
    bench.route(b"x" * 600).end(Outcome.SERVED, 0.0, Usage(200, 0, 1))
    assert bench.workers[0].work.bytes_per_token == 3.0


def test_a_shadow_that_measures_sees_the_work_of_the_policy_that_is_obeyed() -> None:
    make, _, faults = shadowed("cache_aware", "cost")
    bench = Bench(2, make)
    bench.ask(facts(b"x" * 32000, streaming=True), 10.0)
    assert sorted(worker.work.backlog(10.0) for worker in bench.workers) == [0.0, pytest.approx(0.256)]
    assert not faults


def test_choosing_changes_nothing() -> None:
    make, tally, _ = shadowed("cache_aware", "round_robin")
    b = Bench(3, make)
    b.serve(b"x" * 40)
    before = repr(b.policy), repr(tally)
    asked, candidates = facts(b"x" * 40), b.pool.candidates(0.0)
    first, again = (b.policy.choose(asked, candidates, 0.0) for _ in range(2))
    assert (first.worker, first.shadow) == (again.worker, again.shadow)
    assert (repr(b.policy), repr(tally)) == before


def test_it_is_called_as_the_policy_that_is_obeyed_and_has_its_memory() -> None:
    make, _, _ = shadowed("cache_aware", "least_load")
    b = Bench(1, make)
    b.serve(b"x" * 40)
    assert b.log.decisions[0].policy == "cache_aware"
    assert list(b.workers[0].decisions.legs) == [("cache_aware", "miss")]
    assert b.pool.remembered(b.workers[0]) == 40


def test_what_is_counted() -> None:
    make, tally, _ = shadowed("round_robin", "cache_aware")
    b = Bench(2, make)
    for _ in range(3):
        b.serve(b"x" * 40)
    # The first goes to w0, the second to w1 although w0 has its text, and then both have it.
    assert (tally.agreed + tally.differed, tally.matched, tally.actual_matched) == (3, 80, 40)
    assert (tally.cost, tally.actual_cost, tally.failures) == (0.0, 0.0, 0)


def test_a_decision_that_differs_leaves_a_table() -> None:
    make, tally, _ = shadowed("round_robin", "cache_aware")
    b = Bench(2, make)
    b.router.recorder = recorder = Recorder("round_robin", 10, 0, 0, lambda: 0.0, print)
    first, second = b.route(b"x" * 40), b.route(b"x" * 40)
    newest, oldest = sorted(recorder.running(b.router.open_leases(), 0.0), key=lambda each: each.id, reverse=True)
    assert [first.worker.url, second.worker.url] == [oldest.worker, newest.worker]
    (attempt,) = newest.attempts
    assert attempt.shadow is not None
    assert (attempt.shadow.worker, attempt.shadow.branch) == (first.worker.url, "hit")
    assert (attempt.shadow.matched, attempt.shadow.actual_matched) == (40, 0)
    assert tally.differed == 2  # the first request as well: nothing was cached, and it was another one's turn


class Faulty(Policy):
    """Fails where a test says so, and at nothing else."""

    name = "faulty"
    at = ""

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        self._fail("choose")
        return Choice(candidates[0], "first")

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        self._fail("chosen")

    def unread(self, choice: Choice, facts: Facts) -> None:
        self._fail("unread")

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        self._fail("reported")

    def added(self, worker: Worker) -> None:
        self._fail("added")

    def removed(self, worker: Worker) -> None:
        self._fail("removed")

    def emptied(self, worker: Worker) -> None:
        self._fail("emptied")

    def tidy(self, now: float, budget: int) -> bool:
        self._fail("tidy")
        return False

    def _fail(self, at: str) -> None:
        if at == self.at:
            raise ValueError(at)


@pytest.mark.parametrize("at", ["choose", "chosen", "unread", "reported", "added", "removed", "emptied", "tidy"])
def test_a_shadow_that_fails_is_switched_off_and_nothing_else_happens(at: str) -> None:
    make, tally, faults = shadowed("round_robin", type("FaultyKind", (Faulty,), {"at": at}))
    b, plain = Bench(3, make), Bench(3, "round_robin")
    for bench in (b, plain):
        for number in range(4):
            bench.route().end(Outcome.REJECTED if number == 2 else Outcome.SERVED)
        bench.fleet.emptied(bench.workers[1])
        bench.fleet.pools.tidy(0.0, 10)
        bench.fleet.remove(bench.workers[0])
        for _ in range(3):
            bench.serve()
    urls = [[each.leg.target.name for each in bench.log.decisions] for bench in (b, plain)]
    assert urls[0] == urls[1]
    assert faults == [f"faulty: {at}"]
    assert tally.failures == 1


def test_what_a_shadow_remembers_is_freed_when_it_fails() -> None:
    class Deaf(Policy):
        """Remembers as cache_aware does, and fails to hear."""

        name = "deaf"

        def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
            super().__init__(settings, rng)
            self.inner = CacheAware(settings, rng)
            self.memory = self.inner.memory

        def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
            return self.inner.choose(facts, candidates, now)

        def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
            self.inner.chosen(choice, facts, now)

        def added(self, worker: Worker) -> None:
            self.inner.added(worker)

        def removed(self, worker: Worker) -> None:
            self.inner.removed(worker)

        def tidy(self, now: float, budget: int) -> bool:
            return self.inner.tidy(now, budget)

        def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
            raise ValueError("deaf")

    shadows: list[Deaf] = []

    def make(settings: PolicySettings, rng: random.Random) -> Policy:
        shadows.append(Deaf(settings, rng))
        return Shadowed(LeastLoad(settings, rng), shadows[-1], ShadowTally("deaf"), lambda name, error: None)

    b = Bench(3, make)  # type: ignore[arg-type]
    attempts = [b.route(b"%d" % number * 5000) for number in range(9)]
    (shadow,) = [each.inner for each in shadows if each.inner.tree.held]
    assert shadow.tree.held > 40_000
    attempts[0].end(Outcome.SERVED, 1.0, Usage(10, 4, 2))
    while b.fleet.pools.tidy(2.0, 100):
        pass
    assert shadow.tree.held == 0
    b.fleet.remove(b.workers[0])
    assert b.route(b"x").worker is not b.workers[0]


def test_both_hear_what_engines_report() -> None:
    class HearsToo(Policy):
        name = "hears"

        def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
            super().__init__(settings, rng)
            self.heard: list[tuple[str, Usage | None]] = []

        def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
            return self.least_loaded(candidates, "least")

        def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
            self.heard.append((choice.worker.url, usage))

    tally, faults = ShadowTally("hears"), list[str]()
    both: list[HearsToo] = []

    def make(settings: PolicySettings, rng: random.Random) -> Policy:
        both[:] = [HearsToo(settings, rng), HearsToo(settings, rng)]
        return Shadowed(both[0], both[1], tally, lambda name, error: faults.append(name))

    b = Bench(2, make)  # type: ignore[arg-type]
    usage = Usage(10, 4, 2)
    attempt = b.route()
    attempt.end(Outcome.SERVED, 1.0, usage)
    assert [each.heard for each in both if each.heard] == [[(attempt.worker.url, usage)]] * 2
    assert faults == []
