"""The engine's scheduler in virtual time: exact durations, exact cache hits, no token lost when the cache is full."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.engine.kv import KVCache, pack
from sglang_router.engine.scheduler import (
    BatchLimits,
    BatchStep,
    CostModel,
    EngineRequest,
    EngineScheduler,
    TooLongError,
)

COST = CostModel(prefill_tokens_per_s=1000, decode_base=0.010, decode_per_request=0.001)


class Counting:
    """Writes `first`, `first` + 1, ... and never ends by itself."""

    def __init__(self, first: int) -> None:
        self.last = first - 1

    def next(self) -> tuple[int, str | None]:
        self.last += 1
        return self.last, None


class Saying:
    """Writes `tokens` and stops."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def next(self) -> tuple[int, str | None]:
        return self.tokens.pop(0), None if self.tokens else "stop"


def scheduler(capacity: int = 10_000, page: int = 1, **limits: int | bool) -> EngineScheduler:
    return EngineScheduler(KVCache(capacity, page), COST, BatchLimits(**{"reserve": 0, **limits}))  # type: ignore[arg-type]


def request(name: str, tokens: Iterable[int], limit: int = 2, namespace: str = "") -> EngineRequest:
    return EngineRequest(name, pack(tokens), Counting(1_000_000), limit, namespace)


def run(engine: EngineScheduler) -> list[BatchStep]:
    """Run all passes until nothing is left to do; return them."""
    steps = []
    while (step := engine.step()) is not None:
        assert engine.kv.tree + engine.kv.private <= engine.kv.capacity
        steps.append(step)
        assert len(steps) < 10_000
    return steps


def durations(steps: list[BatchStep]) -> list[float]:
    return [round(step.duration, 9) for step in steps]


def test_one_request_takes_what_the_cost_model_says() -> None:
    engine = scheduler()
    engine.submit(request("a", range(100), limit=3))
    steps = run(engine)
    # 100 tokens at 1000/s and a pass; then two tokens more, 10 ms + 1 request each.
    assert durations(steps) == [0.110, 0.011, 0.011]
    assert [len(step.advanced) for step in steps] == [1, 1, 1]
    assert [one.finish for one in steps[-1].finished] == ["length"]


def test_a_decode_pass_costs_more_with_more_requests() -> None:
    engine = scheduler()
    for name in range(5):
        engine.submit(request(str(name), [name] * 10, limit=2))
    assert durations(run(engine)) == [0.060, 0.015]


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    engine = scheduler(chunk=100)
    engine.submit(request("a", range(250), limit=1))
    steps = run(engine)
    assert [step.prefilled for step in steps] == [100, 100, 50]
    assert [len(step.advanced) for step in steps] == [0, 0, 1]


def test_a_chunk_is_shared_by_the_end_of_one_prompt_and_the_start_of_the_next() -> None:
    engine = scheduler(chunk=100)
    engine.submit(request("a", range(130), limit=1))
    engine.submit(request("b", range(500, 600), limit=1))
    assert [step.prefilled for step in run(engine)] == [100, 100, 30]


def test_prefill_goes_before_decode() -> None:
    engine = scheduler()
    engine.submit(request("a", range(10), limit=3))
    engine.step()
    engine.submit(request("b", range(50, 70), limit=1))
    steps = run(engine)
    assert [(step.prefilled, step.decoded) for step in steps] == [(20, 0), (0, 1), (0, 1)]


def test_mixed_passes_do_both() -> None:
    engine = scheduler(mixed=True)
    engine.submit(request("a", range(10), limit=3))
    engine.step()
    engine.submit(request("b", range(50, 70), limit=1))
    steps = run(engine)
    assert [(step.prefilled, step.decoded) for step in steps] == [(20, 1), (0, 1)]
    assert durations(steps)[0] == 0.031


def test_a_repeated_prompt_finds_all_but_one_token() -> None:
    engine = scheduler()
    first, again = request("a", range(100)), request("b", range(100))
    engine.submit(first)
    run(engine)
    engine.submit(again)
    steps = run(engine)
    assert (first.cached, again.cached) == (0, 99)
    assert steps[0].prefilled == 1


def test_with_pages_the_hit_is_whole_pages() -> None:
    engine = scheduler(page=16)
    for name in ("a", "b"):
        last = request(name, range(461))
        engine.submit(last)
        run(engine)
    assert last.cached == 448  # what SGLang 0.5.23 reports with --page-size 16


def test_requests_of_one_pass_do_not_share_but_the_next_one_does() -> None:
    engine = scheduler()
    twins = [request("a", range(50), limit=9), request("b", range(50), limit=9)]
    for twin in twins:
        engine.submit(twin)
    engine.step()
    late = request("c", range(50), limit=1)
    engine.submit(late)  # while the twins are still writing
    run(engine)
    assert [one.cached for one in (*twins, late)] == [0, 0, 49]


def test_the_next_turn_finds_the_answer_too() -> None:
    engine = scheduler()
    turn = EngineRequest("a", pack(range(100)), Saying(201, 202, 203), 50)
    engine.submit(turn)
    run(engine)
    assert turn.finish == "stop"
    following = request("b", [*range(100), 201, 202, 203, 9, 9])
    engine.submit(following)
    run(engine)
    assert following.cached == 102  # the last token of an answer is never computed


def test_namespaces_are_apart() -> None:
    engine = scheduler()
    for name, space in (("a", ""), ("b", "lora")):
        last = request(name, range(20), namespace=space)
        engine.submit(last)
        run(engine)
    assert last.cached == 0


def test_a_prefill_only_request_writes_nothing() -> None:
    engine = scheduler()
    only = request("a", range(30), limit=0)
    engine.submit(only)
    (step,) = run(engine)
    assert (step.advanced, step.finished, only.output) == ([], [only], 0)


def test_the_batch_is_bounded() -> None:
    engine = scheduler(max_running=2)
    for name in range(3):
        engine.submit(request(str(name), [name] * 5, limit=2))
    engine.step()
    assert repr(engine).startswith("<EngineScheduler 1 waiting, 2 in the batch")
    assert len(run(engine)) == 3


def test_a_request_waits_until_its_tokens_fit() -> None:
    engine = scheduler(capacity=100)
    first, second = request("a", range(60), limit=5), request("b", range(200, 260), limit=1)
    engine.submit(first)
    engine.submit(second)
    steps = run(engine)
    assert [[one.rid for one in step.finished] for step in steps] == [[], [], [], [], ["a"], ["b"]]
    assert engine.totals.retracted == 0


def test_the_reserve_keeps_a_newcomer_out() -> None:
    engine = scheduler(capacity=100, reserve=30)
    engine.submit(request("a", range(40), limit=30))
    engine.submit(request("b", range(200, 240), limit=1))
    engine.step()
    assert (engine.active, len(engine.waiting)) == (1, 1)


def test_a_full_cache_sends_the_latest_back_and_it_goes_on_later() -> None:
    engine = scheduler(capacity=100)
    first, second = request("a", range(45), limit=50), request("b", range(200, 245), limit=50)
    engine.submit(first)
    engine.submit(second)
    run(engine)
    assert (first.finish, first.output, first.retractions) == ("length", 50, 0)
    assert (second.finish, second.output, second.retractions > 0) == ("length", 50, True)
    assert bytes(second.tokens[45 * 4 :]) == pack(range(1_000_000, 1_000_050))  # no token lost, none twice
    assert engine.totals.generated_tokens == 100


def test_limits_are_cut_to_the_cache_and_longer_prompts_refused() -> None:
    engine = scheduler(capacity=50)
    one = request("a", range(40), limit=1000)
    engine.submit(one)
    run(engine)
    assert one.output == 10
    with pytest.raises(TooLongError, match="50"):
        engine.submit(request("b", range(50), limit=1))


@pytest.mark.parametrize("passes", [0, 1, 3, 4])
def test_abort_gives_everything_back_wherever_the_request_is(passes: int) -> None:
    engine = scheduler(chunk=30)
    one = request("a", range(90), limit=100)
    engine.submit(one)
    for _ in range(passes):
        engine.step()
    assert engine.abort(one)
    assert not engine.abort(one)
    assert one.finish == "abort"
    assert (engine.kv.locked, engine.kv.private, engine.kv.handles, engine.active) == (0, 0, 0, 0)
    assert engine.kv.tree == {0: 0, 1: 30, 3: 90, 4: 91}[passes]  # what was computed stays
    assert engine.step() is None


def test_flush_needs_an_idle_engine() -> None:
    engine = scheduler()
    engine.submit(request("a", range(10)))
    assert not engine.flush()
    run(engine)
    assert engine.flush()
    assert engine.kv.tree == 0


def test_paused_computes_nothing_holding_admits_nobody() -> None:
    engine = scheduler()
    engine.submit(request("a", range(10), limit=5))
    engine.step()
    engine.submit(request("b", range(50, 60), limit=5))
    engine.paused = True
    assert engine.step() is None
    engine.paused, engine.holding = False, True
    run(engine)
    assert (engine.active, len(engine.waiting)) == (0, 1)
    engine.holding = False
    run(engine)
    assert engine.totals.finished == 2


def test_retract_all_keeps_the_order() -> None:
    engine = scheduler()
    for name in "abc":
        engine.submit(request(name, [ord(name)] * 9, limit=5))
    engine.step()
    engine.retract_all()
    assert [one.rid for one in engine.waiting] == ["a", "b", "c"]
    assert engine.kv.handles == 0
    run(engine)
    assert engine.totals.finished == 3


def test_load_counts_held_and_waiting_tokens() -> None:
    engine = scheduler(max_running=1)
    engine.submit(request("a", range(30), limit=9))
    engine.submit(request("b", range(100, 120), limit=9))
    engine.step()
    assert engine.load_tokens == 30 + 20


jobs = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 25), st.integers(0, 6))


@settings(max_examples=80, deadline=None)
@given(
    work=st.lists(jobs, min_size=1, max_size=20),
    capacity=st.integers(70, 200),
    page=st.sampled_from([1, 3, 8]),
    chunk=st.integers(1, 64),
    reserve=st.integers(0, 20),
    mixed=st.booleans(),
)
def test_everything_submitted_ends_and_leaves_nothing_behind(
    work: list[tuple[int, int, int, int]], capacity: int, page: int, chunk: int, reserve: int, mixed: bool
) -> None:
    engine = scheduler(capacity, page, chunk=chunk, reserve=reserve, mixed=mixed, max_running=6)
    submitted = []
    for name, (group, size, limit, passes) in enumerate(work):
        one = request(str(name), [group] * size, limit)
        engine.submit(one)
        submitted.append(one)
        for _ in range(passes):
            engine.step()
    run(engine)
    assert all(one.finish == "length" and one.output == one.limit for one in submitted)
    assert all(one.cached < one.prompt for one in submitted)
    assert (engine.kv.locked, engine.kv.private, engine.kv.handles) == (0, 0, 0)
    assert engine.totals.generated_tokens == sum(one.limit for one in submitted)
