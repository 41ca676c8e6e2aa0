"""The simulation: the same seed gives the same, nothing is lost, and simple cases come out as arithmetic says."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_router.config import RouterArgs
from sglang_router.engine.scheduler import BatchLimits, CostModel
from sglang_router.replay.generator import SHAPES, generated
from sglang_router.replay.load import Load, LoadRequest, pages_of
from sglang_router.replay.options import KINDS
from sglang_router.replay.result import Result
from sglang_router.replay.setup import FleetChange, Setup
from sglang_router.replay.simulation import Simulation
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy

NO_OPTIONS: Mapping[str, Any] = {}
COST = CostModel(prefill_tokens_per_s=1000, decode_base=0.010, decode_per_request=0.001)


class Given(Load):
    """Requests that come at given times; a session's next one a second after the answer, `turns` times."""

    def __init__(self, *asks: LoadRequest, turns: int = 0) -> None:
        super().__init__("given", 16)
        self.asks = asks
        self.turns = turns

    def arrivals(self) -> Iterator[LoadRequest]:
        yield from self.asks

    def answered(self, ask: LoadRequest, now: float) -> LoadRequest | None:
        if not self.turns:
            return None
        self.turns -= 1
        return LoadRequest(ask.number + 1, now + 1.0, ask.pages, ask.prompt, ask.output, ask.session)


def ask(number: int, at: float, space: int, prompt: int, output: int = 1, session: bytes = b"") -> LoadRequest:
    return LoadRequest(number, at, pages_of(space, (prompt + output) // 16 + 1), prompt, output, session)


def simulate(
    load: Load,
    workers: int = 1,
    policy: str = "round_robin",
    seed: int = 1,
    router: Mapping[str, Any] = NO_OPTIONS,
    **more: Any,
) -> Simulation:
    """Run a load; check that nothing is left, and that each request ended once. router: options of the router."""
    setup = Setup(RouterArgs(**router).checked(), workers, page=load.page, **{"cost": COST, **more})
    simulation = Simulation(setup, load, KINDS[policy], seed)
    simulation.run()
    at_rest(simulation)
    return simulation


def at_rest(simulation: Simulation) -> None:
    for router in simulation.routers:
        assert not router.leases
        assert not len(router.queue)
    assert not simulation._flights
    assert not simulation._of
    for fleet in simulation.fleets:
        for worker in fleet:
            assert (worker.own_load, worker.waiting) == (0, 0)
    for engine in simulation.workers.engines:
        if engine.stopped == math.inf:
            kv = engine.scheduler.kv
            assert (kv.private, kv.locked, kv.handles) == (0, 0, 0)
            assert engine.due == math.inf
    for one in simulation.result.served:
        assert one.end >= one.arrival
        assert one.error or one.arrival < one.first <= one.end
        assert one.cached <= one.reusable


def lines_of(result: Result) -> list[str]:
    return [repr(one) for one in result.served]


# -- simple cases -----------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_what_the_cost_model_says() -> None:
    """1,600 tokens in one pass of 10 ms + 1.6 s, which gives the first token; then 9 passes of 11 ms."""
    (one,) = simulate(Given(ask(1, 5.0, 1, 1600, 10))).result.served
    assert one.ttft == pytest.approx(1.610)
    assert one.end - one.first == pytest.approx(9 * 0.011)
    assert one.pace == pytest.approx(0.011)
    assert one.cached == 0


def test_a_repeated_prompt_is_found_in_whole_pages() -> None:
    """Of 1,600 tokens at least one must be computed, so that the last page of 16 is."""
    first, again = simulate(Given(ask(1, 0.0, 1, 1600), ask(2, 10.0, 1, 1600))).result.served
    assert (first.cached, again.cached) == (0, 1584)
    assert again.ttft == pytest.approx(0.010 + 0.016)


def test_prompts_of_a_chunk_each_are_computed_one_after_the_other() -> None:
    """With equal prompts that fill a pass, the n-th of those that come together waits for all before it."""
    chunk = BatchLimits(chunk=1600)
    served = simulate(Given(*(ask(n, 0.0, n, 1600) for n in range(1, 6))), limits=chunk).result.served
    assert [one.ttft for one in served] == pytest.approx([n * 1.610 for n in range(1, 6)])


def test_a_slow_engine_takes_longer() -> None:
    load = Given(ask(1, 0.0, 1, 1600), ask(2, 0.0, 2, 1600))
    fast, slow = simulate(load, 2, speeds=(1.0, 0.4)).result.served
    assert [fast.ttft, slow.ttft] == pytest.approx([1.610, 1.610 / 0.4])


def test_answers_that_run_together_slow_each_other_down() -> None:
    """Prompts are computed first; a pass for both answers takes 12 ms."""
    first, second = simulate(Given(ask(1, 0.0, 1, 160, 100), ask(2, 0.0, 2, 160, 100))).result.served
    assert [first.first, second.first] == pytest.approx([0.170, 0.340])
    assert first.end == pytest.approx(0.340 + 99 * 0.012)
    assert second.end == first.end


def test_a_session_goes_on_after_its_answer() -> None:
    served = simulate(Given(ask(1, 0.0, 1, 1600, 11, b"s"), turns=2)).result.served
    assert len(served) == 3
    for before, after in itertools.pairwise(served):
        assert after.arrival == pytest.approx(before.end + 1.0)


def test_a_session_stays_at_one_worker_if_the_options_say_so() -> None:
    def workers(**options: Any) -> set[str]:
        load = Given(ask(1, 0.0, 1, 1600, session=b"s"), turns=5)
        return {served.worker for served in simulate(load, workers=3, router=options).result.served}

    assert len(workers()) == 3
    assert len(workers(session_affinity=True)) == 1


def test_a_new_session_waits_until_it_fits() -> None:
    """Two sessions of 1,600 tokens are expected to need more than the cache has; the first one ends after 900 s."""
    load = Given(ask(1, 0.0, 1, 1600, session=b"a"), ask(2, 1.0, 2, 1600, session=b"b"))
    options = {"session_admission": True, "session_wait_secs": 2_000.0, "request_timeout_secs": 3_000.0}
    first, second = simulate(load, router=options, cache_tokens=60_000).result.served
    assert first.first < 3.0
    assert 900.0 < second.first < 910.0


def test_waiting_times_are_those_of_a_queue_with_one_server() -> None:
    """M/D/1 (Pollaczek-Khinchine): at a utilisation of u, the mean wait is u / (2 (1 - u)) service times."""
    rng, at, rate, service = random.Random(7), 0.0, 4.0, 0.170
    asks = []
    for number in range(20_000):
        at += rng.expovariate(rate)
        asks.append(ask(number, at, number, 160))
    figures = simulate(Given(*asks), limits=BatchLimits(chunk=160)).result.figures(1.0, 1.0)
    used = rate * service
    assert figures["ttft_mean"] - service == pytest.approx(used / (2 * (1 - used)) * service, rel=0.1)
    assert figures["ttft_mean_bound"] == pytest.approx(figures["ttft_mean"], rel=0.25)  # one engine: little to gain
    assert figures["ttft_mean_bound"] <= figures["ttft_mean"]


def test_a_prompt_that_fits_no_cache_fails() -> None:
    small, large = simulate(Given(ask(1, 0.0, 1, 160), ask(2, 0.0, 2, 1600)), cache_tokens=1000).result.served
    assert (small.error, large.error) == ("", "too_long")


def test_a_request_that_waits_too_long_fails() -> None:
    """Two places: the third request waits for one, the fourth is one too many."""
    load = Given(*(ask(n, 0.0, n, 16000) for n in range(1, 5)))
    limited = {"max_concurrent_requests": 2, "queue_size": 1, "queue_timeout_secs": 1}
    served = simulate(load, router=limited).result.served
    assert [one.error for one in served] == ["", "", "queue_timeout", "queue_full"]
    assert served[2].end == pytest.approx(1.0)


def test_a_queued_request_begins_when_a_place_is_free() -> None:
    load = Given(*(ask(n, 0.0, n, 1600) for n in range(1, 4)))
    served = simulate(load, router={"max_concurrent_requests": 1}, limits=BatchLimits(chunk=1600)).result.served
    assert [one.end for one in served] == pytest.approx([1.610, 3.220, 4.830])


# -- workers that come and go -----------------------------------------------------------------------------------------


def test_a_worker_that_joins_gets_requests() -> None:
    load = Given(*(ask(n, float(n), n, 160) for n in range(1, 60)))
    simulation = simulate(load, 1, "least_load", changes=(FleetChange("join", 20.5),))
    assert {one.worker for one in simulation.result.served if one.arrival < 20} == {"http://engine0"}
    assert {one.worker for one in simulation.result.served if one.arrival > 50} == {"http://engine0", "http://engine1"}


def test_a_worker_that_leaves_finishes_what_it_has() -> None:
    load = Given(*(ask(n, n / 10, n, 1600) for n in range(1, 40)))
    simulation = simulate(load, 2, changes=(FleetChange("leave", 2.0, 1),))
    assert not any(one.error for one in simulation.result.served)
    assert {one.worker for one in simulation.result.served if one.arrival > 2} == {"http://engine0"}
    assert len(simulation.fleets[0]) == 1


def test_a_worker_that_restarts_loses_what_it_computed() -> None:
    """Its stream breaks, its waiting request goes to the other one, and its cache is empty when it is back."""
    load = Given(
        ask(1, 0.0, 1, 160, 1000),  # to engine 0, and a stream when that dies
        ask(2, 0.0, 2, 160, 1),
        ask(3, 0.9, 3, 16000),  # to engine 0, and without an answer when that dies
        *(ask(n, 40.0 + n, 1, 160) for n in range(4, 60)),
    )
    simulation = simulate(load, 2, changes=(FleetChange("restart", 1.0, 0, 5.0),))
    stream, _, moved, *later = simulation.result.served
    assert (stream.error, stream.worker) == ("cut", "http://engine0")
    assert (moved.error, moved.worker) == ("", "http://engine1")
    back = [one for one in later if one.worker == "http://engine0"]
    assert back
    assert back[0].cached == 0
    assert [engine.name[-1] for engine in simulation.workers.engines] == ["0", "1", "0"]


def test_nothing_is_lost_when_all_workers_restart_at_once() -> None:
    load = generated("groups,requests=500,rate=20", 3)
    changes = tuple(FleetChange("restart", 10.0, number, 3.0) for number in range(4))
    result = simulate(load, 4, "cache_aware", changes=changes, cost=CostModel()).result
    assert len(result.served) == 500
    assert sum(not one.error for one in result.served) > 300


# -- in general -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", KINDS)
def test_the_same_seed_gives_the_same_result(policy: str) -> None:
    runs = [simulate(generated("sessions,requests=300", 5), 4, policy, cost=CostModel()).result for _ in range(2)]
    assert lines_of(runs[0]) == lines_of(runs[1])


def test_another_seed_gives_another_result() -> None:
    one, other = (simulate(generated("groups,requests=100", seed), 4, "random", seed).result for seed in (1, 2))
    assert lines_of(one) != lines_of(other)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 5),
    st.integers(5_000, 60_000),
    st.lists(
        st.builds(
            FleetChange,
            st.sampled_from(["join", "leave", "restart"]),
            st.floats(0.0, 20.0),
            st.integers(0, 5),
            st.sampled_from([0.5, 5.0, 40.0]),
        ),
        max_size=6,
    ),
    st.sampled_from([0, 2, 30]),
    st.integers(0, 1000),
)
@example("strangers", "cost", 1, 5000, [], 0, 0)
@example("hot-prefix", "consistent_hashing", 2, 5000, [FleetChange("restart", 0.5, 0, 0.5)], 0, 0)
def test_every_request_ends_once_whatever_happens(
    shape: str, policy: str, workers: int, capacity: int, changes: list[FleetChange], most: int, seed: int
) -> None:
    load = generated(f"{shape},requests=150,rate=15,think=1,every=3", seed)
    result = simulate(
        load,
        workers,
        policy,
        seed,
        cache_tokens=capacity,
        changes=tuple(sorted(changes, key=lambda change: change.at)),
        cost=CostModel(),
        router={"max_running_per_worker": most},
    ).result
    assert len(result.served) == 150


class _Broken(Policy):
    name = "broken"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        raise RuntimeError("no choice")


def test_a_policy_that_fails_ends_the_run() -> None:
    load = Given(ask(1, 0.0, 1, 160))
    with pytest.raises(RuntimeError, match="no choice"):
        Simulation(Setup(RouterArgs().checked(), 1), load, _Broken, 1).run()


def test_the_router_hears_what_the_engines_would_report() -> None:
    same = [ask(number, number * 5.0, 7, 1600) for number in range(4)]
    simulation = simulate(Given(*same), policy="cache_aware")
    (worker,) = simulation.fleets[0]
    served = list(simulation.result.served)
    assert worker.tokens.cached == sum(each.cached for each in served) > 3 * 1500
    assert worker.tokens.prompt == 4 * 1600
    assert worker.belief.misses == 0


# -- several routers ---------------------------------------------------------------------------------------------------


def shared(load: str, seed: int = 1, **more: Any) -> Simulation:
    return simulate(generated(load, seed), 8, "cache_aware", seed, **more)


def test_four_routers_that_share_find_nearly_as_much_as_one_and_others_do_not() -> None:
    load = "groups,requests=1500,groups=200,rate=30"
    hits = [
        shared(load, routers=count, shared_delay=delay).result.figures(1.0, 0.05)["hit"]
        for count, delay in ((1, None), (4, 0.04), (4, None))
    ]
    assert hits[1] > 0.97 * hits[0]
    assert hits[2] < 0.8 * hits[0]


def test_routers_whose_store_is_away_agree_on_what_is_new() -> None:
    load = "groups,requests=1500,groups=200,rate=30"
    hits = [
        shared(load, routers=4, shared_delay=delay, disconnected=True).result.figures(1.0, 0.05)["hit"]
        for delay in (0.04, None)
    ]
    assert hits[0] > 1.2 * hits[1]


def test_sessions_whose_requests_come_to_all_routers_find_what_they_had() -> None:
    load = "sessions,requests=800"
    hits = [shared(load, routers=count, shared_delay=0.04).result.figures(1.0, 0.05)["hit"] for count in (1, 8)]
    assert hits[1] > 0.97 * hits[0]


def test_sharing_is_the_same_each_time_and_says_what_it_took() -> None:
    runs = [shared("groups,requests=200", routers=3, shared_delay=0.04).result for _ in range(2)]
    assert lines_of(runs[0]) == lines_of(runs[1])
    figures = runs[0].figures(1.0, 0.05)
    assert figures["shared_messages"] > 1
    assert figures["shared_size"] > 100
    assert figures["shared_entries"] > 1000
    assert figures["shared_dropped"] == 0
    assert "shared_size" not in shared("groups,requests=20").result.figures(1.0, 0.05)


def test_an_engine_that_restarts_is_lost_to_all_routers_and_found_by_all() -> None:
    changes = (FleetChange("restart", 5.0, 0, 3.0), FleetChange("leave", 12.0, 1), FleetChange("join", 14.0))
    simulation = shared("groups,requests=600,rate=30", routers=3, shared_delay=0.04, changes=changes)
    assert [worker.life for fleet in simulation.fleets for worker in fleet if worker.url.endswith("e0")] == [1, 1, 1]
    assert [len(fleet) for fleet in simulation.fleets] == [8, 8, 8]
    assert sum(bool(one.error) for one in simulation.result.served) <= 20
