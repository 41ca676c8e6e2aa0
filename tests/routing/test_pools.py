"""Pools: what is kept apart for each model and role, where a worker belongs, and which pool a request gets.

Who is a candidate within one pool is the matter of test_candidates.py.
"""

from __future__ import annotations

import random

import pytest

from fleets import Bench, Log, by_model, facts, spec
from sglang_router.errors import NoWorkers, Unavailable, WorkersStarting
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.pool import Pool, PoolKey
from sglang_router.routing.rules import BreakerRules, FleetRules, OutlierRules, PolicySettings
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

PROMPT = b"a prompt that is long enough to count"


class Noted(Policy):
    """A policy that writes down what it is told."""

    name = "noted"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.notices: list[tuple[str, str]] = []

    def added(self, worker: Worker) -> None:
        self.notices.append(("added", worker.url))

    def removed(self, worker: Worker) -> None:
        self.notices.append(("removed", worker.url))

    def emptied(self, worker: Worker) -> None:
        self.notices.append(("emptied", worker.url))


class Several:
    """A fleet with a pool for each model, and its router."""

    def __init__(self, policy: str | type[Policy] = "cache_aware", rules: FleetRules | None = None) -> None:
        self.bench = Bench(0, policy, rules=rules, assign=by_model)
        self.fleet = self.bench.fleet
        self.pools = self.fleet.pools

    def add(self, name: str, model: str | None = None, role: str = "regular", *, checked: bool = False) -> Worker:
        said = spec(name, checked=checked)
        return self.fleet.add(WorkerSpec(url=said.url, health=said.health, model_id=model, worker_type=role), 0.0)

    def serve(self, model: str, text: bytes = PROMPT, now: float = 0.0) -> tuple[Worker, str]:
        """Routes a request and ends it well; where it went and why."""
        attempt = self.bench.send(facts(text, model=b'"%b"' % model.encode()), now)
        return attempt.worker, attempt.branch


# -- two models --------------------------------------------------------------------------------------------------------


def test_candidates_policies_and_trees_are_apart() -> None:
    s = Several()
    a, other_a, b = s.add("a", "A"), s.add("a2", "A"), s.add("b", "B")
    one, two = s.pools
    assert (one.key, two.key) == (PoolKey(b'"A"'), PoolKey(b'"B"'))
    assert (tuple(one.candidates(0.0)), tuple(two.candidates(0.0))) == ((a, other_a), (b,))
    assert one.policy is not two.policy
    home, branch = s.serve("A")
    assert (home in (a, other_a), branch) == (True, "miss")
    assert s.serve("B") == (b, "miss"), "what the pool of A knows is not known here"
    assert s.serve("A") == (home, "hit")
    assert s.serve("B") == (b, "hit")
    assert (one.remembered(home), two.remembered(b)) == (len(PROMPT), len(PROMPT))


def test_a_state_change_is_seen_by_the_pool_of_the_worker() -> None:
    s = Several("round_robin", FleetRules(breaker=BreakerRules(threshold=1, timeout=10.0)))
    a, b = s.add("a", "A"), s.add("b", "B")
    one, two = s.pools
    kept = two.candidates(0.0)
    s.fleet.lease(a).close(Outcome.REFUSED, 0.0)
    assert (tuple(one.candidates(1.0)), tuple(two.candidates(1.0))) == ((), (b,))
    assert two.candidates(1.0) is kept, "nothing changed there"
    assert (one.reopen_at, one.unavailable(4.0).retry_after) == (10.0, 6.0)
    assert tuple(one.candidates(10.0)) == (a,), "its time is up"
    assert s.fleet.candidates(10.0) == (a, b)


def test_a_request_without_workers_for_its_model_is_refused() -> None:
    s = Several("round_robin")
    s.add("a", "A")
    s.add("b", "B")
    with pytest.raises(NoWorkers):
        s.serve("C")


def test_a_retry_stays_in_the_pool() -> None:
    s = Several("round_robin")
    workers = [s.add(f"a{n}", "A") for n in range(2)]
    s.add("b", "B")
    first = s.bench.ask(facts(PROMPT, model=b'"A"')).attempt
    following = first.retry(Outcome.REFUSED)
    assert following is not None
    assert {first.worker, following.worker} == set(workers)


def test_outliers_are_judged_within_their_pool() -> None:
    """A model whose requests take long is not slow beside one whose requests are short."""
    s = Several("round_robin", FleetRules(breaker=BreakerRules(enabled=False), outliers=OutlierRules()))
    slow, quick = [s.add(f"s{n}", "S") for n in range(2)], [s.add(f"q{n}", "Q") for n in range(2)]
    for worker in [*slow, *quick] * 30:
        lease = s.fleet.lease(worker)
        lease.streams(1000, 100.0)
        lease.began(105.0 if worker in slow else 100.1)
        lease.close(Outcome.SERVED, 106.0)
    bad = s.add("bad", "Q")
    for _ in range(30):
        s.fleet.lease(bad).close(Outcome.FAILED, 106.0)
    s.fleet.judge(107.0)
    assert [worker.url for worker in s.fleet if worker.ejected] == ["http://bad:1"]
    assert tuple(s.pools.of(bad).candidates(107.0)) == tuple(quick)


# -- one pool ----------------------------------------------------------------------------------------------------------


def test_workers_of_one_model_are_in_one_pool() -> None:
    fleet = Fleet(Log(), lambda: "id", lambda: Noted(PolicySettings(), random.Random(1)))
    (pool,) = fleet.pools
    assert (fleet.pools.only, len(fleet.pools), pool.key) == (pool, 1, PoolKey())
    workers = [fleet.add(WorkerSpec(url=f"http://{n}", model_id="model a", health=spec("").health), 0.0) for n in "ab"]
    assert fleet.pools.only is pool
    assert fleet.pools.find(b'"model a"') is pool
    assert fleet.pools.of(workers[0]) is pool
    assert fleet.candidates(0.0) == tuple(pool.candidates(0.0))
    assert pool.workers == workers


def test_a_policy_hears_of_the_workers_of_its_pool() -> None:
    s = Several(Noted)
    a, b = s.add("a", "A"), s.add("b", "B")
    one, two = (pool.policy for pool in s.pools)
    assert isinstance(one, Noted)
    assert isinstance(two, Noted)
    s.fleet.lost(a, 1.0)
    s.fleet.set_draining(a, True)
    s.fleet.emptied(b)
    s.fleet.remove(a)
    s.fleet.emptied(a)
    assert one.notices == [("added", a.url), ("emptied", a.url), ("removed", a.url)]
    assert two.notices == [("added", b.url), ("emptied", b.url)]


def test_the_policy_hears_before_the_listeners_do() -> None:
    known: list[bool] = []

    class Asking(Log):
        def worker_changed(self, event: WorkerChanged) -> None:
            known.append(("added", event.worker.url) in policy.notices)

    policy = Noted(PolicySettings(), random.Random(1))
    Fleet(Asking(), lambda: "id", lambda: policy).add(spec("w"), 0.0)
    assert known == [True]


# -- where a worker belongs --------------------------------------------------------------------------------------------


def test_a_worker_moves_when_more_is_known_of_it() -> None:
    s = Several(Noted)
    known, unknown = s.add("a", "A"), s.add("b")
    assert [pool.key for pool in s.pools] == [PoolKey(), PoolKey(b'"A"')]
    s.fleet.reported(unknown, EngineReport(model="A"))
    (pool,) = s.pools
    assert (pool.key, pool.workers) == (PoolKey(b'"A"'), [known, unknown])
    s.fleet.amend(known, WorkerSpec(url=known.url, model_id="B"))
    assert [(pool.key.model, pool.workers) for pool in s.pools] == [(b'"A"', [unknown]), (b'"B"', [known])]
    assert isinstance(pool.policy, Noted)
    assert pool.policy.notices == [("added", known.url), ("added", unknown.url), ("removed", known.url)]


def test_workers_are_in_order_of_registration_whenever_they_came_to_the_pool() -> None:
    s = Several(Noted)
    first, second = s.add("a"), s.add("b", "A")
    s.fleet.reported(first, EngineReport(model="A"))
    assert tuple(s.pools.of(second).candidates(0.0)) == (first, second)


def test_an_open_breaker_moves_along() -> None:
    s = Several(Noted, FleetRules(breaker=BreakerRules(threshold=1, timeout=10.0)))
    worker = s.add("a")
    s.fleet.lease(worker).close(Outcome.REFUSED, 0.0)
    s.fleet.reported(worker, EngineReport(model="A"))
    assert tuple(s.pools.of(worker).candidates(9.0)) == ()
    assert tuple(s.pools.of(worker).candidates(10.0)) == (worker,)


def test_a_removed_worker_is_placed_no_more() -> None:
    s = Several(Noted)
    worker = s.add("a", "A")
    s.fleet.remove(worker)
    s.fleet.reported(worker, EngineReport(model="B"))
    s.fleet.amend(worker, WorkerSpec(url=worker.url, model_id="C"))
    assert [pool.workers for pool in s.pools] == [[]]


def test_a_pool_closes_with_its_last_worker_and_its_memory_is_freed() -> None:
    s = Several()
    worker = s.add("a", "A")
    s.serve("A")
    tree = s.pools.of(worker).policy.memory
    assert tree is not None
    assert (s.pools.only, tree.held) == (s.pools.of(worker), len(PROMPT))
    s.fleet.remove(worker)
    assert [pool.key for pool in s.pools] == [PoolKey()]
    assert tree.held == len(PROMPT), "not at once: that may take long"
    while s.pools.tidy(1.0, 1):
        pass
    assert (tree.held, tree.retired_size) == (0, 0)
    again = s.pools.of(s.add("a", "A"))
    assert again.policy.memory is not tree


# -- which pool a request gets -----------------------------------------------------------------------------------------


def test_a_pool_is_found_by_model_and_role_else_the_one_for_any_model() -> None:
    s = Several(Noted)
    a, prefill, rest = s.add("a", "A"), s.add("p", "A", "prefill"), s.add("any")
    find, of = s.pools.find, s.pools.of
    assert s.pools.only is None
    assert find(b'"A"') is of(a)
    assert find(b'"A"', "prefill") is of(prefill)
    assert find(b'"B"') is of(rest)
    assert find(b"") is of(rest)
    for model, role in ((b'"A"', "decode"), (b'"B"', "prefill")):
        nobody = find(model, role)
        assert (tuple(nobody.candidates(0.0)), type(nobody.unavailable(0.0))) == ((), NoWorkers)
    assert list(s.pools) == [of(rest), of(a), of(prefill)], "a question makes no pool"


def test_each_pool_says_why_it_has_no_candidates() -> None:
    s = Several(Noted)
    starting, drained = s.add("a", "A", checked=True), s.add("b", "B")
    s.fleet.set_draining(drained, True)
    assert type(s.pools.of(starting).unavailable(0.0)) is WorkersStarting
    assert type(s.pools.of(drained).unavailable(0.0)) is Unavailable


def test_pools_show_what_they_have() -> None:
    s = Several("round_robin")
    worker = s.add("a", "A")
    pool: Pool = s.pools.of(worker)
    pool.candidates(0.0)
    shown = """<Pool "A" regular: 1 workers, 1 able, <RoundRobin after worker 0>>"""
    assert repr(pool) == shown
    assert repr(s.pools) == f"<Pools [{shown}]>"
    assert repr(s.fleet) == f"<Fleet 1 workers, <Pools [{shown}]>>"
