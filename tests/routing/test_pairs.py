"""Who serves a request where there are pairs: hidden counts, models, fallbacks, windows, retries, and what counts."""

from __future__ import annotations

from typing import Any

import pytest

from pairs import Pairs, chat, names
from sglang_router.errors import ModelNotFound, RouterError, SeveralAnswers, ShuttingDown
from sglang_router.routing.batches import batch_size
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.engine_report import EngineReport
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.model_names import Names
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan
from sglang_router.routing.queue import ROOM
from sglang_router.routing.rules import PairRules, QueueRules

COMPLETIONS = b"/v1/completions"


def body(text: bytes, path: bytes = COMPLETIONS) -> Facts:
    return read(ENDPOINTS[path], text)


def model(b: Pairs, name: str, **roles: str) -> None:
    """Let workers with these roles announce a model."""
    for worker, role in roles.items():
        b.fleet.announced(b.add(worker, role), Names((name,)))


# -- several answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (COMPLETIONS, rb'{"prompt":"x","n":"\u0032"}'),
        (COMPLETIONS, rb'{"prompt":"x","\u006e":2}'),
        (COMPLETIONS, rb'{"prompt":"x","n":1,"n":2}'),
        (COMPLETIONS, rb'{"prompt":"x","n":" +2 "}'),
        (COMPLETIONS, '{"prompt":"x","n":2}'.encode("utf-16")),
        (COMPLETIONS, rb'{"prompt":"x \ud83d","n":2}'),
        (COMPLETIONS, rb'{"prompt":"x","n":1e999}'),
        (b"/generate", rb'{"text":"x","sampling_params":{"\u006e":2}}'),
        (b"/generate", rb'{"text":"x","sampling_params":{"n":2,"temperature":NaN}}'),
        (b"/generate", rb'{"text":"x","sampling_params":[{"n":2,"stop":"\ud83d"}]}'),
        (b"/generate", rb'{"text":"x","sampling_params":{"n":"\u0033","stop":"\ud83d"}}'),
    ],
)
def test_no_spelling_of_several_answers_reaches_a_pair(path: bytes, text: bytes) -> None:
    """SGLang's decode engine would hang at it, and keep its memory for ever."""
    b = Pairs()
    with pytest.raises(SeveralAnswers):
        b.ask(body(text, path))
    assert b.is_idle


@pytest.mark.parametrize(
    "text",
    [
        rb'{"text":"x","sampling_params":{"stop":"\u006e"}}',
        rb'{"text":"x","sampling_params":{"n":1,"stop":"\ud83d"}}',
        rb'{"text":"x","sampling_params":{"n":NaN}}',
        rb'{"text":"x","n":"\ud83d"}',
        rb'{"text":"x","n":"two"}',
    ],
)
def test_odd_bodies_that_want_one_answer_get_it(text: bytes) -> None:
    assert len(Pairs().plan(body(text, b"/generate"))[1].legs) == 2


# -- models ------------------------------------------------------------------------------------------------------------


def two_models() -> Pairs:
    b = Pairs(0, 0)
    model(b, "A", p0="prefill", d0="decode")
    model(b, "B", r0="regular")
    return b


def test_a_request_that_a_pair_cannot_serve_is_told_so_and_not_that_its_model_is_unknown() -> None:
    b = two_models()
    with pytest.raises(SeveralAnswers):
        b.ask(chat(model="A", n=2))
    with pytest.raises(ModelNotFound):
        b.ask(chat(model="C", n=2))
    assert names(b.plan(chat(model="B", n=2))[1]) == ["r0"]


def test_a_full_window_is_waited_for_and_no_reason_for_a_fallback() -> None:
    b = two_models()
    b.router.naming.use({}, {"A": ("B",)}, False)
    b.windows(1)
    asked, plan = b.plan(chat(model="A"))
    waiting = b.ask(chat(model="A"))
    assert waiting.waits is not None
    assert waiting.waits[0] == ROOM
    for leg in plan.legs:
        b.end(asked, leg)
    b.settle()
    assert names(waiting.plan) == ["p0", "d0"]


def test_a_fallback_that_cannot_serve_the_request_is_passed_over() -> None:
    b = Pairs(0, 0)
    model(b, "A", a="regular")
    model(b, "B", p0="prefill", d0="decode")
    model(b, "C", c="regular")
    b.router.naming.use({}, {"A": ("B", "C")}, False)
    b.fleet.set_draining(b.named("a"), True)
    assert names(b.plan(chat(model="A"))[1]) == ["p0", "d0"]
    request = chat(model="A", n=2)
    assert names(b.plan(request)[1]) == ["c"]
    assert (request.model, request.asked) == (b'"C"', b'"A"')
    b.fleet.set_draining(b.named("c"), True)
    request = chat(model="A", n=2)
    with pytest.raises(RouterError) as refused:
        b.ask(request)
    assert refused.value.status == 503
    assert (request.model, request.asked) == (b'"A"', b""), "nothing stands in for it"


def test_a_pair_without_another_prefill_worker_falls_back() -> None:
    b = two_models()
    b.router.naming.use({}, {"A": ("B",)}, False)
    asked, plan = b.plan(chat(model="A"))
    again = b.retry(asked, plan.legs[0], Outcome.REFUSED)
    assert again is not None
    assert names(again) == ["r0"]
    b.end(asked, again.legs[0])
    assert b.is_idle


@pytest.mark.parametrize("half", [0, 1])
def test_regular_workers_take_over_when_a_half_has_no_worker_left(half: int) -> None:
    b = Pairs(1, 1, 1)
    asked, plan = b.plan(chat())
    again = b.retry(asked, plan.legs[half], Outcome.BROKEN)
    assert again is not None
    assert names(again) == ["r0"]
    b.end(asked, again.legs[0])
    assert b.is_idle


def test_an_adapter_is_looked_for_where_a_pair_is_spared() -> None:
    b = Pairs(1, 1)
    for name, adapters in (("r0", ()), ("r1", ("x",))):
        b.fleet.announced(b.add(name), Names(("m",), adapters))
    for worker in (b.named("p0"), b.named("d0")):
        b.fleet.announced(worker, Names(("m",), ("x",)))
    b.router.pairs.rules = PairRules(uncached_tokens=1000)
    for _ in range(3):
        request = chat(lora_path="x")
        serving = b.router.pairs.serving(request)
        assert [worker.url for worker in serving.workers] == ["http://r1:1"]


# -- how workers hand over ---------------------------------------------------------------------------------------------


def test_a_worker_of_which_nothing_is_known_does_not_say_how_pairs_hand_over() -> None:
    """The first one may be down since the start."""
    b = Pairs(2, 1)
    for worker in (b.named("p1"), b.named("d0")):
        b.fleet.reported(worker, EngineReport(runtime="vllm", version="0.32.0"))
    assert b.plan(chat())[1].handoff
    b.fleet.reported(b.named("p0"), EngineReport(version="0.5.23"))
    assert not b.plan(chat())[1].handoff


def test_a_bootstrap_port_counts_on_while_the_engine_is_asked_anew() -> None:
    b = Pairs()
    b.fleet.reported(b.named("p0"), EngineReport(role="prefill", bootstrap_port=9001))
    b.fleet.reported(b.named("p0"), EngineReport())
    assert b'"bootstrap_port":9001' in b.plan(chat())[1].legs[0].splice


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_list_takes_a_room_for_each_prompt() -> None:
    b = Pairs()
    b.windows(4)
    asked, plan = b.plan(chat(COMPLETIONS, prompt=["a", "b", "c"]))
    waiting = b.ask(chat(COMPLETIONS, prompt=["d", "e"]))
    behind = b.ask(chat())
    assert waiting.waits is not None
    assert behind.waits is not None, "it does not overtake the list"
    for leg in plan.legs:
        b.end(asked, leg)
    b.settle()
    assert names(waiting.plan) == names(behind.plan) == ["p0", "d0"]
    assert b.named("d0").window.more == 1
    for each in (waiting, behind):
        for leg in each.plan.legs:
            b.end(each, leg)
    assert b.named("d0").window.more == 0
    assert b.is_idle


def test_a_list_longer_than_the_window_gets_a_worker_without_other_requests() -> None:
    b = Pairs(1, 2)
    b.windows(2)
    b.plan(chat())
    long = chat(COMPLETIONS, prompt=["x"] * 9)
    assert names(b.plan(long)[1]) == ["p0", "d1"]
    assert b.ask(chat(COMPLETIONS, prompt=["x"] * 9)).waits is not None


def test_a_retried_list_gives_its_rooms_back_once() -> None:
    b = Pairs(2, 2)
    b.windows(4)
    asked, plan = b.plan(chat(COMPLETIONS, prompt=["a", "b", "c"]))
    again = b.retry(asked, plan.legs[1], Outcome.FAILED)
    assert again is not None
    assert [b.named(name).window.more for name in ("d0", "d1")] == [0, 2]
    for leg in again.legs:
        b.end(asked, leg)
    assert [b.named(name).window.more for name in ("d0", "d1")] == [0, 0]
    assert b.is_idle


def test_requests_of_others_count_also_when_their_number_does_not_change() -> None:
    b = Pairs()
    busy = EngineReport(window=5, running=3, queued=1)
    for _ in range(3):
        b.fleet.reported(b.named("d0"), busy)
    assert b.named("d0").window.limit == 1
    asked, plan = b.plan(chat())
    assert b.ask(chat()).waits is not None
    b.fleet.reported(b.named("d0"), busy)
    assert b.named("d0").window.limit == 2, "one of them was this router's"
    b.end(asked, plan.legs[1])


def test_an_answer_without_a_count_says_nothing_of_others() -> None:
    b = Pairs()
    busy = EngineReport(window=5, running=4)
    for _ in range(3):
        b.fleet.reported(b.named("d0"), busy, counted=False)
    assert b.named("d0").window.limit == 5


def test_a_shutdown_lets_requests_wait_for_a_window() -> None:
    b = Pairs()
    b.windows(1)
    asked, plan = b.plan(chat())
    waiting = b.ask(chat())
    b.router.refuse_stranded(ShuttingDown(), 1.0)
    for leg in plan.legs:
        b.end(asked, leg)
    b.settle()
    assert names(waiting.plan) == ["p0", "d0"]


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        (rb'["a\"b", "c\\", "d"]', 3),
        (b"[" + b" " * 200 + b'"a", "b"]', 2),
        (b"[[1, 2] , [3],[4]]", 3),
        (b"[1, 2]", 0),
        (b'[{"a": 1}]', 0),
        (b"[]", 0),
        (b"[[]]", 1),
        (b'["' + b'","' * 99_999 + b'"]', 100_000),
    ],
)
def test_prompts_are_counted(prompt: bytes, count: int) -> None:
    assert batch_size(body(b'{"prompt":%b}' % prompt)) == count


# -- what counts -------------------------------------------------------------------------------------------------------


def test_a_request_that_was_spared_a_pair_and_gets_one_after_all_has_one_place() -> None:
    b = Pairs(1, 1, 1, queue=QueueRules(max_concurrent=1, queue_size=3))
    b.router.pairs.rules = PairRules(uncached_tokens=1)
    b.fleet.set_draining(b.named("d0"), True)
    asked, plan = b.plan(chat())
    assert names(plan) == ["r0"]
    b.fleet.set_draining(b.named("d0"), False)
    again = b.retry(asked, plan.legs[0], Outcome.FAILED)
    assert again is not None
    assert names(again) == ["p0", "d0"]
    waiting = b.ask(chat())
    b.end(asked, again.legs[0])
    b.settle()
    assert waiting.waits is not None, "the decode leg goes on"
    b.end(asked, again.legs[1])
    b.settle()
    assert isinstance(waiting.answers[-1], Plan)
    for leg in waiting.plan.legs:
        b.end(waiting, leg)
    assert b.is_idle
    assert not b.router.queue._running


def test_a_pair_that_ends_at_a_regular_worker_has_one_place() -> None:
    b = Pairs(1, 1, 1, queue=QueueRules(max_concurrent=1, queue_size=3))
    asked, plan = b.plan(chat())
    again = b.retry(asked, plan.legs[1], Outcome.BROKEN)
    assert again is not None
    waiting = b.ask(chat())
    assert waiting.waits is not None
    b.end(asked, again.legs[0])
    b.settle()
    assert isinstance(waiting.answers[-1], Plan)


def test_who_keeps_a_response_is_waited_for_though_others_have_room() -> None:
    b = Pairs(1, 2)
    b.windows(1)
    asked, plan = b.plan(chat(b"/v1/responses", input="x"))
    b.router.holds(plan.legs[1], b"resp-1")
    for leg in plan.legs:
        b.end(asked, leg)
    keeper = names(plan)[1]
    next_one: dict[str, Any] = {"input": "y", "previous_response_id": "resp-1"}
    first, running = b.plan(chat(b"/v1/responses", **next_one))
    assert names(running)[1] == keeper
    waiting = b.ask(chat(b"/v1/responses", **next_one))
    assert waiting.waits is not None
    assert waiting.waits[0] == ROOM
    for leg in running.legs:
        b.end(first, leg)
    b.settle()
    assert names(waiting.plan)[1] == keeper
