"""Requests that a prefill and a decode worker serve together: who gets them, what each is told, and that all ends."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleets import Asked
from pairs import UNCHECKED, Pairs, chat, names, spliced
from sglang_router.errors import NoWorkers, RouterError, SeveralAnswers, Unavailable, WebSocketUnserved, WorkersFull
from sglang_router.routing.batches import batch_size
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.events import LegEnded, Listener
from sglang_router.routing.facts import Facts, Skimming, read
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.queue import ROOM
from sglang_router.routing.roles import DECODE
from sglang_router.routing.rules import BreakerRules, FleetRules, PairRules, PolicySettings, QueueRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.usage import Usage

WINDOW = 2


# -- both legs ---------------------------------------------------------------------------------------------------------


def test_a_request_goes_to_a_worker_of_each_kind() -> None:
    b = Pairs(2, 2)
    asked, plan = b.plan(chat(stream=True))
    assert names(plan) == ["p0", "d0"]
    assert [leg.target.role for leg in plan.legs] == ["prefill", "decode"]
    assert plan.legs[1].partner is plan.legs[0]
    assert not plan.handoff
    assert [worker.load for worker in b.workers] == [1, 0, 1, 0]
    assert names(b.plan(chat())[1]) == ["p1", "d1"]
    assert len(b.log.decisions) == 4, "each leg is told"
    b.router.began(plan.legs[1], 1.0)
    for leg in plan.legs:
        b.end(asked, leg)
    assert [worker.load for worker in b.workers] == [0, 1, 0, 1]


def test_sglang_is_told_where_both_meet() -> None:
    b = Pairs(0, 1)
    b.add("p0", "prefill", bootstrap_port=8999)
    _, first = b.plan(chat())
    _, second = b.plan(chat())
    told = [spliced(leg) for plan in (first, second) for leg in plan.legs]
    assert told[0] == told[1]
    assert {"bootstrap_host": "p0", "bootstrap_port": 8999}.items() <= told[0].items()
    assert told[0]["bootstrap_room"] != told[2]["bootstrap_room"]
    assert told[0]["rid"] != told[2]["rid"]
    assert 0 <= told[0]["bootstrap_room"] < 1 << 63
    assert first.legs[0].rid == first.legs[1].rid == told[0]["rid"].encode()


@pytest.mark.parametrize(
    ("path", "fields", "count"),
    [
        (b"/v1/completions", {"prompt": "one"}, 0),
        (b"/v1/completions", {"prompt": [1, 2]}, 0),
        (b"/v1/completions", {"prompt": ["one"]}, 1),
        (b"/v1/completions", {"prompt": ["one, or more", "two"]}, 2),
        (b"/generate", {"text": ["a", "b", "c"]}, 3),
        (b"/generate", {"input_ids": [[1, 2], [3]]}, 2),
        (b"/generate", {"input_ids": [1, 2]}, 0),
        (b"/v1/completions", {"prompt": ["x"] * 1000}, 256),
    ],
)
def test_each_prompt_of_a_list_can_be_aborted(path: bytes, fields: dict[str, Any], count: int) -> None:
    """SGLang calls them rid_0, rid_1 ..., and aborts only what has exactly the name that it is told."""
    _, plan = Pairs().plan(chat(path, **fields))
    rid = spliced(plan.legs[0])["rid"].encode()
    wanted = b" ".join(b"%b_%d" % (rid, number) for number in range(count)) if count else rid
    assert plan.legs[0].rid == plan.legs[1].rid == wanted


def test_a_list_that_is_cut_is_counted_too() -> None:
    request = chat(b"/v1/completions", prompt=["one", "two"])
    request.text = request.text[:9]
    assert batch_size(request) == 2


@pytest.mark.parametrize(
    ("url", "host"), [("http://[2001:db8::7]:30000", "[2001:db8::7]"), ("https://Engine.local/base", "engine.local")]
)
def test_the_host_is_that_of_the_prefill_url(url: str, host: str) -> None:
    b = Pairs(0, 1)
    b.fleet.add(WorkerSpec(url=url, worker_type="prefill", health=UNCHECKED), 0.0)
    told = spliced(b.plan(chat())[1].legs[1])
    assert (told["bootstrap_host"], told["bootstrap_port"]) == (host, None)


def test_the_engine_tells_its_bootstrap_port_unless_an_operator_does() -> None:
    b = Pairs()
    b.fleet.reported(b.named("p0"), EngineReport(role="prefill", bootstrap_port=9001))
    assert spliced(b.plan(chat())[1].legs[0])["bootstrap_port"] == 9001


@given(st.integers(0, 7), st.integers(0, 3))
def test_ranks_are_told_and_are_those_of_the_room(rank: int, decode_rank: int) -> None:
    b = Pairs(0, 0)
    p = b.add("p", "prefill", dp_rank=rank)
    d = b.add("d", "decode", dp_rank=decode_rank)
    b.fleet.reported(p, EngineReport(ranks=8, role="prefill"))
    _, plan = b.plan(chat())
    prefill, decode = map(spliced, plan.legs)
    assert plan.legs[0].target == p.target
    assert plan.legs[1].target == d.target
    assert prefill["bootstrap_room"] % 8 == rank == prefill["routed_dp_rank"] == decode["disagg_prefill_dp_rank"]
    assert decode["routed_dp_rank"] == decode_rank
    assert prefill["bootstrap_host"] == "p", "without the rank"


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (b"/v1/chat/completions", {"max_tokens": 1, "max_completion_tokens": 1, "n": 1, "min_tokens": 0}),
        (b"/v1/completions", {"max_tokens": 1, "n": 1, "min_tokens": 0}),
        (b"/v1/responses", {"max_output_tokens": 1}),
    ],
)
def test_vllm_prefill_reads_first_and_hands_over(path: bytes, limit: dict[str, int]) -> None:
    b = Pairs(runtime="vllm")
    _, plan = b.plan(chat(path, stream=True))
    prefill, decode = plan.legs
    told = spliced(prefill)
    assert plan.handoff
    assert told["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert told["stream"] is False
    assert limit.items() <= told.items()
    assert decode.splice == decode.rid == prefill.rid == b""
    assert decode.mark == prefill.mark == b"", "the engine knows the request by its own id"


def test_vllm_that_pushes_knows_each_attempt_by_an_id_of_its_own() -> None:
    b = Pairs(1, 2)
    b.router.pairs.rules = PairRules(connector="nixl", pushes=True)
    asked, plan = b.plan(chat())
    prefill, decode = plan.legs
    assert plan.handoff
    assert prefill.mark == decode.mark != b""
    b.end(asked, prefill, now=1.0)
    again = b.router.retry(asked.tag, decode, asked.facts, Outcome.REFUSED, 2.0)
    assert isinstance(again, Plan)
    assert [leg.mark for leg in again.legs] == [prefill.mark], "that of what was handed over"
    anew = b.router.retry(asked.tag, again.legs[0], asked.facts, Outcome.BROKEN, 3.0)
    assert isinstance(anew, Plan)
    assert len({leg.mark for leg in anew.legs} | {prefill.mark}) == 2
    assert b.plan(chat())[1].legs[0].mark not in (prefill.mark, anew.legs[0].mark)


def test_the_engine_tells_that_it_is_vllm() -> None:
    b = Pairs()
    assert not b.plan(chat())[1].handoff
    b.fleet.reported(b.named("d0"), EngineReport(runtime="vllm"))
    assert b.plan(chat())[1].handoff, "one of them is enough"
    b.fleet.reported(b.named("p0"), EngineReport(runtime="vllm"))
    assert b.plan(chat())[1].handoff
    b.router.pairs.rules = PairRules(connector="sglang")
    assert not b.plan(chat())[1].handoff


# -- who serves alone --------------------------------------------------------------------------------------------------


def test_what_is_not_generated_needs_no_pair() -> None:
    b = Pairs(1, 1)
    assert names(b.plan(chat(b"/v1/embeddings"))[1]) == ["p0"]
    b.add("r0")
    assert names(b.plan(chat(b"/v1/embeddings"))[1]) == ["r0"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (b"/v1/chat/completions", {"n": 2}),
        (b"/v1/completions", {"n": "3"}),
        (b"/v1/completions", {"best_of": 4}),
        (b"/generate", {"sampling_params": {"n": 2.0}}),
        (b"/generate", {"sampling_params": [{"n": 1}, {"n": 2}]}),
    ],
)
def test_several_answers_of_a_prompt(path: bytes, fields: dict[str, Any]) -> None:
    """Pairs of SGLang hang at them for ever."""
    b = Pairs()
    with pytest.raises(SeveralAnswers) as refused:
        b.ask(chat(path, **fields))
    assert (refused.value.status, refused.value.param) == (400, "n")
    assert b.is_idle
    b.add("r0")
    assert names(b.plan(chat(path, **fields))[1]) == ["r0"]
    v = Pairs(runtime="vllm")
    _, plan = v.plan(chat(path, **fields))
    assert (names(plan), plan.handoff, plan.legs[0].splice) == (["d0"], False, b"")


@pytest.mark.parametrize("fields", [{}, {"n": 1}, {"n": None}, {"n": "x"}, {"sampling_params": {"n": 1}}, {"n": 0}])
def test_one_answer_of_a_prompt(fields: dict[str, Any]) -> None:
    assert len(Pairs().plan(chat(**fields))[1].legs) == 2


@pytest.mark.parametrize("model", [b"", b'"m"'])
def test_websockets_go_to_who_can_answer_alone(model: bytes) -> None:
    """A prefill worker answers nobody, and SGLang's decode worker waits for one."""

    def realtime() -> Facts:
        facts = read(ENDPOINTS[b"/v1/realtime"], b"")
        facts.model = model
        return facts

    b = Pairs()
    with pytest.raises(WebSocketUnserved):
        b.ask(realtime())
    with pytest.raises(WebSocketUnserved):
        Pairs(decode=0).ask(realtime())
    b.add("r0")
    assert names(b.plan(realtime())[1]) == ["r0"]
    assert names(Pairs(runtime="vllm").plan(realtime())[1]) == ["d0"]
    with pytest.raises(WebSocketUnserved):
        Pairs(decode=0, runtime="vllm").ask(realtime())


def test_the_end_of_each_leg_is_told_once() -> None:
    """The first one by itself, the last one with the end of the request or with its retry."""
    b = Pairs(2, 2)
    heard: list[tuple[str, Outcome]] = []

    class Ear(Listener):
        def half_ended(self, event: LegEnded) -> None:
            heard.append((event.leg.target.name, event.outcome))

    b.listeners.add(Ear())
    asked, plan = b.plan(chat())
    prefill, decode = plan.legs
    b.end(asked, prefill, Outcome.FAILED)  # after decode has begun
    b.end(asked, decode)
    assert heard == [("http://p0:1", Outcome.FAILED)]
    heard.clear()
    asked, plan = b.plan(chat())
    b.retry(asked, plan.legs[0], Outcome.BROKEN)
    assert heard == [(plan.legs[1].target.name, Outcome.ABANDONED)]
    for leg in asked.plan.legs:
        b.end(asked, leg)
    assert len(heard) == 2
    assert b.is_idle


def test_large_bodies_are_read_for_it_too() -> None:
    b = Pairs()
    huge = [{"role": "user", "content": "x" * (1 << 20)}]
    with pytest.raises(SeveralAnswers):
        b.ask(skimmed(chat(messages=huge, n=2)))
    assert len(b.plan(skimmed(chat(messages=huge)))[1].legs) == 2


def skimmed(request: Facts) -> Facts:
    """The facts of a large body, as the relay reads them."""
    assert isinstance(request.body, bytes)
    reading = Skimming(request.endpoint, request.body)
    while (found := reading.step()) is None:
        pass
    return found


def test_vllm_hands_one_prompt_over() -> None:
    b = Pairs(runtime="vllm")
    assert names(b.plan(chat(b"/v1/completions", prompt=["a", "b"]))[1]) == ["d0"]
    assert names(b.plan(chat(b"/v1/completions", prompt=[[1, 2], [3]]))[1]) == ["d0"]
    assert names(b.plan(chat(b"/v1/completions", prompt=[1, 2, 3]))[1]) == ["p0", "d0"]
    assert names(b.plan(chat(b"/v1/messages"))[1]) == ["d0"], "it does not hand over there"
    assert names(Pairs().plan(chat(b"/v1/completions", prompt=["a", "b"]))[1]) == ["p0", "d0"]


def test_short_prompts_spare_a_pair() -> None:
    long = [{"role": "user", "content": "x" * 4000}]
    b = Pairs(runtime="vllm", policy="cache_aware")
    b.router.pairs.rules = PairRules(uncached_tokens=100)
    assert names(b.plan(chat())[1]) == ["d0"]
    asked, plan = b.plan(chat(messages=long))
    assert names(plan) == ["p0", "d0"]
    for leg in plan.legs:
        b.end(asked, leg)
    more = [*long, {"role": "user", "content": "and?"}]
    assert names(b.plan(chat(messages=more))[1]) == ["d0"], "the decode worker has nearly all of it now"
    s = Pairs(regular=1, policy="cache_aware")
    assert names(s.plan(chat())[1]) == ["p0", "d0"], "there is no threshold"
    s.router.pairs.rules = PairRules(uncached_tokens=100)
    assert names(s.plan(chat())[1]) == ["r0"]
    assert names(s.plan(chat(messages=long))[1]) == ["p0", "d0"]
    no_regular = Pairs()
    no_regular.router.pairs.rules = PairRules(uncached_tokens=100)
    assert names(no_regular.plan(chat())[1]) == ["p0", "d0"], "SGLang's decode workers serve nothing alone"


def test_regular_workers_serve_while_no_pair_is_whole() -> None:
    b = Pairs(1, 1, regular=1)
    assert names(b.plan(chat())[1]) == ["p0", "d0"]
    b.fleet.set_draining(b.named("d0"), True)
    assert names(b.plan(chat())[1]) == ["r0"]
    b.fleet.set_draining(b.named("d0"), False)
    b.fleet.remove(b.named("p0"))
    assert names(b.plan(chat())[1]) == ["r0"]


def test_by_cost_a_decode_worker_reads_alone_what_is_done_sooner_there() -> None:
    b = Pairs(1, 1, runtime="vllm", policy="cost")
    b.router.pairs.rules = PairRules(by_cost=True)
    asked, plan = b.plan(chat(messages=[{"role": "user", "content": "y" * 40_000}]))
    assert names(plan) == ["p0", "d0"], "equally soon"
    alone, spared = b.plan(chat(messages=[{"role": "user", "content": "z" * 400}]))
    assert names(spared) == ["d0"], "the prefill worker is busy with the long one"
    b.end(alone, spared.legs[0])
    for leg in plan.legs:
        b.end(asked, leg)
    b.router.pairs.rules = PairRules()
    assert names(b.plan(chat())[1]) == ["p0", "d0"], "nobody asks for it"


# -- whether there is a pair -------------------------------------------------------------------------------------------


def test_which_half_is_missing_is_said() -> None:
    b = Pairs(0, 1)
    with pytest.raises(NoWorkers, match="There is no prefill worker"):
        b.ask(chat())
    b = Pairs(1, 0)
    with pytest.raises(NoWorkers, match="There is no decode worker"):
        b.ask(chat())
    d = b.add("d0", "decode")
    b.fleet.set_draining(d, True)
    with pytest.raises(Unavailable, match="Of the decode workers: No worker can take"):
        b.ask(chat())


def test_a_decode_worker_gets_no_more_than_its_window() -> None:
    b = Pairs(1, 2, queue=QueueRules(queue_size=2))
    b.windows(WINDOW)
    begun = [b.plan(chat()) for _ in range(4)]
    assert [worker.load for worker in b.workers] == [4, 2, 2]
    queued = [b.ask(chat()), b.ask(chat())]
    assert [each.waits is not None and each.waits[0] for each in queued] == [ROOM, ROOM]
    with pytest.raises(RouterError) as full:
        b.ask(chat())
    assert full.value.code == "queue_full"
    asked, plan = begun[1]
    b.end(asked, plan.legs[0])
    b.settle()
    assert queued[0].waits is not None, "its decode leg goes on"
    b.end(asked, plan.legs[1])
    b.settle()
    assert names(queued[0].plan) == ["p0", "d1"]
    assert queued[1].waits is not None
    assert isinstance(b.router.expired(queued[1].tag, 99.0), RouterError)


def test_a_retry_exceeds_a_window_rather_than_fail() -> None:
    """It is not queued, and its engine queues what is above its window."""
    b = Pairs(1, 3)
    b.windows(1)
    asked, plan = b.plan(chat())
    b.plan(chat())
    retried = b.retry(asked, plan.legs[1], Outcome.BROKEN)
    assert retried is not None
    assert names(retried) == ["p0", "d2"], "where there is room"
    other, plan = b.plan(chat())
    assert names(plan) == ["p0", "d0"]
    retried = b.retry(other, plan.legs[1], Outcome.BROKEN)
    assert retried is not None
    assert names(retried)[1] in ("d1", "d2"), "nowhere is room"


def test_a_queued_request_is_not_stranded_while_a_window_is_full() -> None:
    b = Pairs(1, 1)
    b.windows(1)
    asked, plan = b.plan(chat())
    queued = b.ask(chat())
    b.router.refuse_stranded(Unavailable("the router ends"), 0.0)
    for leg in plan.legs:
        b.end(asked, leg)
    b.settle()
    assert names(queued.plan) == ["p0", "d0"]


def test_a_window_without_room_says_so() -> None:
    b = Pairs()
    b.windows(1)
    b.plan(chat())
    waiting = b.ask(chat(), 0.0)
    error = b.router.expired(waiting.tag, 99.0)
    assert error.code == "queue_timeout"
    pair = b.router.pairs.serving(chat())
    assert isinstance(pair.unavailable(0.0), WorkersFull)


def test_a_window_opens_again() -> None:
    b = Pairs()
    b.windows(0)
    b.plan(chat())
    b.plan(chat())
    assert b.named("d0").load == 2, "no window is told"


# -- retries -----------------------------------------------------------------------------------------------------------


def test_a_failed_leg_ends_its_pair_and_another_pair_follows() -> None:
    b = Pairs(2, 2)
    asked, plan = b.plan(chat())
    first = spliced(plan.legs[0])["bootstrap_room"]
    again = b.retry(asked, plan.legs[0], Outcome.BROKEN)
    assert again is not None
    assert names(again)[0] == "p1", "the other half may be the same worker"
    assert again.retries == 1
    assert spliced(again.legs[0])["bootstrap_room"] != first
    for leg in again.legs:
        b.end(asked, leg)
    assert b.is_idle


def test_only_the_guilty_worker_is_blamed() -> None:
    b = Pairs(2, 2, rules=FleetRules(breaker=BreakerRules(threshold=1)))
    asked, plan = b.plan(chat())
    again = b.retry(asked, plan.legs[1], Outcome.FAILED)
    assert again is not None
    for leg in again.legs:
        b.end(asked, leg)
    assert [worker.breaker.value for worker in b.workers] == ["closed", "closed", "open", "closed"]
    assert b.is_idle


def test_a_prefill_worker_can_be_blamed_after_its_leg_has_ended() -> None:
    """Its decode worker says that it is gone."""
    b = Pairs(2, 1, rules=FleetRules(breaker=BreakerRules(threshold=1)))
    asked, plan = b.plan(chat())
    prefill, decode = plan.legs
    b.end(asked, prefill, Outcome.SERVED)
    b.router.ended(asked.tag, decode, Outcome.ABANDONED, 1.0)
    assert b.is_idle


def test_a_guilty_prefill_worker_is_retried_elsewhere() -> None:
    b = Pairs(2, 1, rules=FleetRules(breaker=BreakerRules(threshold=1)))
    asked, plan = b.plan(chat())
    prefill, decode = plan.legs
    b.end(asked, prefill, Outcome.SERVED)
    answer = b.router.retry(asked.tag, prefill, asked.facts, Outcome.FAILED, 1.0, status=500)
    assert isinstance(answer, Plan)
    b.end(asked, decode, Outcome.ABANDONED, 1.0)
    assert names(answer) == ["p1", "d0"]
    for leg in answer.legs:
        b.end(asked, leg, now=1.5)
    assert [worker.breaker.value for worker in b.workers] == ["open", "closed", "closed"]
    assert b.is_idle


def test_there_is_no_retry_without_another_worker_of_that_half() -> None:
    b = Pairs(1, 2)
    asked, plan = b.plan(chat())
    assert b.retry(asked, plan.legs[0], Outcome.BROKEN) is None
    assert b.is_idle


def test_what_was_handed_over_goes_to_another_decode_worker() -> None:
    b = Pairs(1, 2, runtime="vllm")
    asked, plan = b.plan(chat())
    prefill, decode = plan.legs
    b.router.ended(asked.tag, prefill, Outcome.SERVED, 1.0, Usage(100, 60, 1))
    again = b.router.retry(asked.tag, decode, asked.facts, Outcome.REFUSED, 2.0)
    assert isinstance(again, Plan)
    assert (names(again), again.handoff) == (["d1"], True)
    b.end(asked, again.legs[0], now=3.0)
    assert b.is_idle


@pytest.mark.parametrize(
    ("outcome", "at"), [(Outcome.REFUSED, 30.0), (Outcome.BROKEN, 2.0), (Outcome.FAILED, 2.0), (Outcome.BUSY, 2.0)]
)
def test_what_may_be_fetched_or_is_old_is_not_used_again(outcome: Outcome, at: float) -> None:
    b = Pairs(1, 2, runtime="vllm")
    asked, plan = b.plan(chat())
    b.end(asked, plan.legs[0], now=1.0)
    again = b.router.retry(asked.tag, plan.legs[1], asked.facts, outcome, at)
    assert isinstance(again, Plan)
    assert names(again) == ["p0", "d1"]


class Broken(Policy):
    """Fails when it is told of its choice."""

    name = "broken"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        return self.least_loaded(candidates, "broken")

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        raise RuntimeError("this policy is broken")


def test_a_policy_that_fails_takes_nothing() -> None:
    b = Pairs(1, 0)
    b.fleet.pools.policies[DECODE] = lambda: Broken(PolicySettings(), random.Random(1))
    b.add("d0", DECODE)
    with pytest.raises(RuntimeError):
        b.ask(chat(stream=True))
    assert b.is_idle


# -- roles -------------------------------------------------------------------------------------------------------------


def test_the_role_that_an_engine_tells_counts() -> None:
    b = Pairs(0, 0)
    first, second = b.add("a"), b.add("b")
    assert len(b.plan(chat())[1].legs) == 1
    b.fleet.reported(first, EngineReport(role="prefill"))
    b.fleet.reported(second, EngineReport(role="decode"))
    assert names(b.plan(chat())[1]) == ["a", "b"]
    assert b.log.moves("role") == [("regular", "prefill"), ("regular", "decode")]
    b.fleet.reported(first, EngineReport())
    assert first.role == "prefill", "an answer that is missing changes nothing"
    b.fleet.reported(first, EngineReport(role="decode"))
    b.fleet.reported(second, EngineReport(role="prefill"))
    assert names(b.plan(chat())[1]) == ["b", "a"]
    assert first.target.role == "decode"
    b.fleet.reported(first, EngineReport(role="regular"))
    assert first.role == "regular"


def test_a_worker_that_switches_its_role_is_remembered_anew() -> None:
    b = Pairs(2, 1, policy="cache_aware")
    asked, plan = b.plan(chat())
    for leg in plan.legs:
        b.end(asked, leg)
    worker = b.fleet.by_url(plan.legs[0].target.name)
    assert worker is not None
    assert b.fleet.pools.remembered(worker) > 0
    b.fleet.reported(worker, EngineReport(role="decode"))
    assert b.fleet.pools.remembered(worker) == 0


def test_a_switch_while_requests_run_leaves_no_load() -> None:
    b = Pairs(2, 2)
    running = [b.plan(chat(stream=True)) for _ in range(4)]
    b.fleet.reported(b.named("p0"), EngineReport(role="decode"))
    b.fleet.reported(b.named("d0"), EngineReport(role="prefill"))
    for asked, plan in running:
        for leg in plan.legs:
            b.end(asked, leg)
    assert b.is_idle
    assert b.fleet.pools.of(b.named("p0")) is b.fleet.pools.of(b.named("d1"))


# -- cached tokens -----------------------------------------------------------------------------------------------------


def test_only_prefill_workers_are_judged_by_what_they_had_cached() -> None:
    b = Pairs(1, 1, policy="cache_aware")
    prompt = [{"role": "user", "content": "z" * 8000}]
    for _ in range(3):
        asked, plan = b.plan(chat(messages=prompt))
        b.router.ended(asked.tag, plan.legs[0], Outcome.SERVED, 0.0, Usage(2000, 1900, 1))
        b.router.ended(asked.tag, plan.legs[1], Outcome.SERVED, 0.0, Usage(2000, 0, 9))
    assert b.fleet.pools.remembered(b.named("d0")) > 0
    assert (b.named("p0").tokens.cached, b.named("d0").tokens.cached) == (5700, 0)
    assert b.named("d0").belief.misses == 0


# -- everything ends ---------------------------------------------------------------------------------------------------

OUTCOMES = st.sampled_from(list(Outcome))


@given(
    st.sampled_from(["", "vllm"]),
    st.sampled_from(["round_robin", "cache_aware", "cost"]),
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.booleans(), st.integers(0, 2)),
            st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 1), OUTCOMES),
            st.tuples(st.just("retry"), st.integers(0, 9), st.integers(0, 1), OUTCOMES),
            st.tuples(st.just("began"), st.integers(0, 9), st.integers(0, 1), OUTCOMES),
            st.tuples(st.just("switch"), st.integers(0, 3), st.sampled_from(["prefill", "decode"])),
        ),
        max_size=30,
    ),
)
def test_counters_return_to_zero_whatever_happens(runtime: str, policy: str, events: list[tuple[Any, ...]]) -> None:
    b = Pairs(2, 2, runtime=runtime, policy=policy, queue=QueueRules(max_concurrent=4, queue_size=3))
    b.windows(WINDOW)
    asked_all: list[Asked] = []
    now, retries = 0.0, 0
    for kind, *what in events:
        now += 0.5
        if kind == "ask":
            try:
                asked_all.append(b.ask(chat(stream=what[0], user=str(what[1])), now))
            except RouterError:
                continue
        elif kind == "switch":
            b.fleet.reported(b.workers[what[0]], EngineReport(role=what[1], window=WINDOW))
        else:
            running = [each for each in asked_all if isinstance(each.answers[-1], Plan)]
            if running:
                each = running[what[0] % len(running)]
                leg = each.plan.legs[what[1] % len(each.plan.legs)]
                open_leg = leg.lease in b.router._leases
                if kind == "began":
                    b.router.began(leg, now)
                elif kind == "end":
                    b.end(each, leg, what[2], now)
                elif open_leg and what[2].retryable:
                    b.retry(each, leg, what[2], now)
                    retries += 1
        b.settle(now)
        for worker in b.workers:
            assert worker.role != "decode" or worker.load <= WINDOW + retries or worker.told_role, worker
            assert worker.load >= 0
    while any(isinstance(each.answers[-1], Plan) or each.waits for each in asked_all):
        for each in asked_all:
            last = each.answers[-1]
            if isinstance(last, Plan):
                for leg in last.legs:
                    b.end(each, leg, Outcome.SERVED, now)
                each.answers.append(None)
            elif each.waits:
                b.router.withdraw(each.tag)
                each.answers.append(None)
            b.settle(now)
    assert b.is_idle
    assert not b.router.queue._running
