"""Prefill/decode pairs of SGLang through a real router: every way in which one leg can go wrong.

After each test every fake engine is idle, and so is the router (`pd_fakes.routed`). The fakes wait as long as real
engines do: a decode notices a dead prefill after 11 s and a missing one after 300 s, and the router must not.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from pd_fakes.edge import Fault, Stage
from pd_fakes.routed import Bed, routed
from pd_fakes.sglang import SglangEngine, SglangPair, Timing
from pd_fakes.texts import answer_text
from routers import Answer

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
PROMPT = "alpha beta gamma delta"
ROLES = ("prefill", "decode")
SglangBed = Bed[SglangPair]


def generate(text: Any = PROMPT, tokens: int = 3, **more: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": tokens}, **more}


def chat(tokens: int = 3, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, **more}


def events(answer: Answer) -> list[Any]:
    lines = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def served(answer: Answer, prompt: str = PROMPT, tokens: int = 3) -> None:
    """Check that an answer of /generate is complete, and for this prompt."""
    assert answer.status == 200, answer.body
    assert answer.json()["text"] == answer_text(prompt, tokens)


@pytest.fixture
def one() -> Iterator[SglangBed]:
    """One engine of each role."""
    with routed(SglangPair()) as bed:
        yield bed


@contextlib.contextmanager
def two(*flags: str, **settings: Any) -> Iterator[SglangBed]:
    """Two engines of each role."""
    with routed(SglangPair(2, 2, **settings), *flags) as bed:
        yield bed


def of(bed: SglangBed, role: str) -> list[SglangEngine]:
    return bed.pair.prefills if role == "prefill" else bed.pair.decodes


def fates(bed: SglangBed) -> set[str]:
    return {fate for engine in bed.pair.engines for fate in engine.fates}


def noticed(bed: SglangBed) -> list[str]:
    """Return what legs had to find out by themselves, because the router did not end them."""
    return [leg.error for engine in bed.pair.engines for leg in engine.legs if leg.error]


# -- what is answered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def test_every_kind_of_request_is_answered_by_a_pair(more: tuple[str, ...]) -> None:
    with routed(SglangPair(), *more) as bed:
        served(bed.ask(GENERATE, generate()))
        served(bed.ask(GENERATE, {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 3}}), "#1 #2 #3")
        answer = bed.ask(GENERATE, generate(["one", "two"]))
        assert [each["text"] for each in answer.json()] == [answer_text("one", 3), answer_text("two", 3)]
        answer = bed.ask(GENERATE, {"input_ids": [[1], [2]], "sampling_params": {"max_new_tokens": 3}})
        assert [each["text"] for each in answer.json()] == [answer_text("#1", 3), answer_text("#2", 3)]
        answer = bed.ask(COMPLETIONS, {"model": "tiny", "prompt": PROMPT, "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == answer_text(PROMPT, 3)
        answer = bed.ask(COMPLETIONS, {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 2})
        assert [each["text"] for each in answer.json()["choices"]] == [answer_text("one", 2), answer_text("two", 2)]
        answer = bed.ask(CHAT, chat())
        assert answer.json()["choices"][0]["message"]["content"] == answer_text(f"<user> {PROMPT}", 3)
        told = events(bed.ask(CHAT, chat(stream=True, stream_options={"include_usage": True})))
        said = "".join(each["choices"][0]["delta"]["content"] for each in told[:3])
        assert said == answer_text(f"<user> {PROMPT}", 3)
        assert told[-1] == "[DONE]"
        bed.fakes.idle()  # an engine ends its leg a moment after its answer
        assert fates(bed) == {"finished"}
        assert len(bed.pair.prefill.legs) == len(bed.pair.decode.legs) == 8


def test_both_legs_get_the_body_of_the_client_and_the_same_room(one: SglangBed) -> None:
    body = b'{"text": "alpha  beta" , "unknown":[1.50, {}],"sampling_params":{"max_new_tokens": 2}}'
    assert one.ask(GENERATE, body).status == 200
    (first,), (second,) = one.pair.prefill.legs, one.pair.decode.legs
    for leg in (first, second):
        assert leg.request.raw.startswith(body[:-1])
        assert leg.body["bootstrap_host"] == "127.0.0.1"
        assert leg.body["bootstrap_port"] == one.pair.prefill.bootstrap_port
        assert 0 <= leg.body["bootstrap_room"] < 1 << 63
        assert leg.body["rid"]
    assert first.rooms == second.rooms
    assert one.ask(GENERATE, body).status == 200
    assert one.pair.decode.legs[1].rooms != second.rooms


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_the_prompt_are_merged(one: SglangBed, stream: bool) -> None:
    answer = one.ask(GENERATE, generate(return_logprob=True, stream=stream))
    answers = events(answer)[:-1] if stream else [answer.json()]
    assert len(answers) == (3 if stream else 1)
    for made, each in enumerate(answers, 1 if stream else 3):
        assert len(each["meta_info"]["input_token_logprobs"]) == 4
        assert len(each["meta_info"]["output_token_logprobs"]) == made


def test_several_samples_never_hang(one: SglangBed) -> None:
    answer = one.ask(CHAT, chat(n=2))
    if answer.status == 200:
        assert len(answer.json()["choices"]) == 2
    else:
        assert answer.status == 400
        assert "n" in answer.json()["error"]["message"]
    assert "stuck" not in fates(one)


def test_a_decode_gets_no_more_requests_than_its_window() -> None:
    with routed(SglangPair(window=2)) as bed:
        bed.surveyed()
        held = bed.fakes.hold(Stage.ADMITTED, bed.pair.decode)
        asked = [bed.send(GENERATE, generate(f"{PROMPT} {n}")) for n in range(5)]
        bed.fakes.until(bed.pair.decode, lambda _: len(bed.pair.decode.living) == 2)
        bed.fakes.release(held)
        for n, answer in enumerate(asked):
            served(answer.result(), f"{PROMPT} {n}")
        assert bed.pair.decode.most == 2


def test_readiness_needs_both_roles(one: SglangBed) -> None:
    assert one.router.get("/readiness").status == 200
    kinds = {worker["url"]: worker["worker_type"] for worker in one.router.workers().values()}
    assert kinds == {one.pair.prefill.url: "prefill", one.pair.decode.url: "decode"}


# -- one leg fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "fault", [Fault.RESET, Fault.CUT_HEAD, (500, {"error": {"message": "out of memory"}}), (503, {})]
)
@pytest.mark.parametrize("role", ROLES)
def test_a_leg_that_fails_is_tried_on_another_pair(role: str, fault: Any, stream: bool) -> None:
    with two() as bed:
        bad = of(bed, role)[0]
        bed.fakes.call(lambda: bad.fail(GENERATE, fault))
        for n in range(2):
            answer = bed.ask(GENERATE, generate(f"{PROMPT} {n}", stream=stream))
            assert answer.status == 200, answer.body
            text = events(answer)[-2]["text"] if stream else answer.json()["text"]
            assert text == answer_text(f"{PROMPT} {n}", 3)
        assert bad.count(GENERATE) >= 1
        bed.all_over()
        assert noticed(bed) == []


@pytest.mark.parametrize("role", ROLES)
def test_an_engine_that_is_down_is_replaced_at_once(role: str) -> None:
    with two() as bed:
        bed.fakes.call(of(bed, role)[0].kill)
        for n in range(4):
            served(bed.ask(GENERATE, generate(f"{PROMPT} {n}")), f"{PROMPT} {n}")
        bed.all_over()
        assert noticed(bed) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_leg_that_is_never_answered_does_not_hold_the_client(role: str) -> None:
    with two("--first-byte-timeout-secs", "1") as bed:
        bed.fakes.call(lambda: of(bed, role)[0].fail(GENERATE, Fault.SILENT))
        answers = [bed.ask(GENERATE, generate(f"{PROMPT} {n}")) for n in range(2)]
        assert {answer.status for answer in answers} <= {200, 504}
        assert 200 in {answer.status for answer in answers}
        bed.all_over()
        assert noticed(bed) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_request_that_an_engine_refuses_goes_back_to_the_client(role: str) -> None:
    with two() as bed:
        refusal = (400, {"error": {"message": "temperature must not be negative"}})
        for engine in of(bed, role):
            bed.fakes.call(partial(engine.fail, GENERATE, refusal))
        answer = bed.ask(GENERATE, generate())
        assert answer.status == 400
        assert b"temperature must not be negative" in answer.body
        bed.all_over()
        assert sum(engine.count(GENERATE) for engine in of(bed, role)) == 1
        assert noticed(bed) == []


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.ADMITTED, Stage.MOVED])
@pytest.mark.parametrize("role", ROLES)
def test_an_engine_killed_before_the_answer_costs_no_request(role: str, stage: Stage) -> None:
    with two() as bed:
        held = bed.fakes.hold(stage, *of(bed, role))
        asked = bed.send(GENERATE, generate())
        bed.fakes.call(bed.fakes.reached(held).kill)
        bed.fakes.release(held)
        served(asked.result())
        bed.all_over()
        assert noticed(bed) == []


def test_a_prefill_killed_after_the_hand_over_costs_nothing() -> None:
    with two() as bed:
        first = bed.fakes.hold(Stage.MOVED, *bed.pair.prefills)
        second = bed.fakes.hold(Stage.STREAMING, *bed.pair.decodes)
        with bed.client(GENERATE, generate(stream=True)) as connection, connection.makefile("rb") as stream:
            told = bed.first_event(stream)
            bed.fakes.call(bed.fakes.reached(first).kill)
            bed.fakes.release(second)
            told += b"".join(iter(stream.readline, b"0\r\n"))
        assert answer_text(PROMPT, 3).encode() in told
        assert b"data: [DONE]" in told
        assert sum(len(engine.legs) for engine in bed.pair.decodes) == 1


def test_a_decode_killed_in_mid_stream_ends_the_stream_with_an_error() -> None:
    with two() as bed:
        held = bed.fakes.hold(Stage.STREAMING, *bed.pair.decodes)
        with bed.client(GENERATE, generate(stream=True)) as connection, connection.makefile("rb") as stream:
            told = bed.first_event(stream)
            bed.fakes.call(bed.fakes.reached(held).kill)
            told += stream.read()
        assert answer_text(PROMPT, 1).encode() in told
        assert b'"error"' in told
        assert not told.endswith(b"0\r\n\r\n"), "no clean end"


@pytest.mark.parametrize("role", ROLES)
def test_a_pair_without_another_one_is_answered_within_seconds(one: SglangBed, role: str) -> None:
    """Decode alone needs 11 s to see that its prefill is dead."""
    engine = of(one, role)[0]
    held = one.fakes.hold(Stage.ADMITTED, engine)
    asked = one.send(GENERATE, generate())
    one.fakes.reached(held)
    one.fakes.call(engine.kill)
    assert asked.result().status in (502, 503)
    one.all_over()
    assert noticed(one) == []
    one.fakes.run(engine.start())
    one.router.until_healthy()
    served(one.ask(GENERATE, generate()))


def test_a_decode_that_blames_its_prefill_is_not_blamed_itself() -> None:
    """The router believes the text of a 500: the prefill is avoided, not the decode."""
    with routed(SglangPair(2, 1)) as bed:
        lost = {
            "error": {"message": "Decode transfer failed: Lost connection with prefill instance (bootstrap_addr: x)"}
        }
        bed.fakes.call(lambda: bed.pair.decode.fail(GENERATE, (500, lost)))
        served(bed.ask(GENERATE, generate()))
        bed.all_over()
        assert len({leg.request.raw for engine in bed.pair.prefills for leg in engine.legs}) == 2


def test_a_restarted_prefill_is_used_again(one: SglangBed) -> None:
    served(one.ask(GENERATE, generate()))
    one.fakes.call(one.pair.prefill.kill)
    assert one.ask(GENERATE, generate()).status in (502, 503)
    one.fakes.run(one.pair.prefill.start())
    one.router.until_healthy()
    served(one.ask(GENERATE, generate()))
    one.all_over()
    assert one.pair.prefill.fates[-1] == "finished"


@pytest.mark.parametrize("role", ROLES)
def test_a_batch_is_given_up_entry_by_entry(role: str) -> None:
    with two() as bed:
        held = bed.fakes.hold(Stage.ADMITTED, *of(bed, role))
        asked = bed.send(COMPLETIONS, {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 2})
        bed.fakes.call(bed.fakes.reached(held).kill)
        bed.fakes.release(held)
        answer = asked.result()
        assert [each["text"] for each in answer.json()["choices"]] == [answer_text("one", 2), answer_text("two", 2)]
        bed.all_over()
        assert noticed(bed) == []


def test_a_frozen_prefill_does_not_hold_the_client() -> None:
    """The system takes its connections, and nothing is ever answered: no abort arrives there either."""
    with two("--first-byte-timeout-secs", "1") as bed:
        frozen = bed.pair.prefills[0]
        bed.fakes.call(frozen.freeze)
        statuses = {bed.ask(GENERATE, generate(f"{PROMPT} {n}")).status for n in range(2)}
        assert statuses <= {200, 504}
        assert 200 in statuses
        for engine in bed.pair.decodes:
            bed.fakes.until(engine, lambda it: not it.left())
        bed.fakes.call(frozen.kill)


# -- the client leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.ADMITTED, Stage.MOVED])
@pytest.mark.parametrize("role", ROLES)
def test_a_client_that_leaves_frees_both_engines(one: SglangBed, role: str, stage: Stage) -> None:
    held = one.fakes.hold(stage, of(one, role)[0])
    with one.client(GENERATE, generate()):
        one.fakes.reached(held)
    if stage is Stage.MOVED and role == "prefill":  # decode has all it needs
        one.fakes.release(held)
    one.all_over()
    assert noticed(one) == []


def test_a_client_that_leaves_in_mid_stream_frees_both_engines(one: SglangBed) -> None:
    held = one.fakes.hold(Stage.STREAMING, one.pair.decode)
    with one.client(GENERATE, generate(stream=True)) as client:
        one.fakes.reached(held)
        assert b"200 OK" in client.recv(1000)
    one.all_over()
    assert one.pair.decode.fates == ["aborted"]


def test_a_client_that_leaves_the_queue_reaches_no_engine() -> None:
    with routed(SglangPair(window=1)) as bed:
        bed.surveyed()
        held = bed.fakes.hold(Stage.ADMITTED, bed.pair.decode)
        asked = bed.send(GENERATE, generate())
        bed.fakes.reached(held)
        with bed.client(GENERATE, generate("never sent")):
            bed.router.until(lambda: bed.router.samples().total("sgl_router_waiting_requests") == 1)
        bed.router.until(lambda: bed.router.samples().total("sgl_router_waiting_requests") == 0)
        bed.fakes.release(held)
        served(asked.result())
        assert len(bed.pair.decode.legs) == len(bed.pair.prefill.legs) == 1


# -- the fleet changes -------------------------------------------------------------------------------------------------


def test_roles_are_followed_when_engines_switch_them() -> None:
    with routed(SglangPair(2, 1)) as bed:
        served(bed.ask(GENERATE, generate()))
        other, pair = bed.pair.prefills[1], bed.pair
        bed.fakes.idle()
        bed.fakes.call(lambda: other.switch("decode"))
        bed.router.until(lambda: bed.router.worker(other.url)["worker_type"] == "decode")
        bed.fakes.call(pair.decode.kill)
        served(bed.ask(GENERATE, generate("after the switch")), "after the switch")
        bed.fakes.idle()
        assert other.fates[-1] == "finished"
        bed.fakes.run(pair.decode.start())


def test_roles_and_bootstrap_ports_of_added_workers_are_found_by_asking() -> None:
    with routed(SglangPair(2, 2)) as bed:
        for engine in bed.pair.engines:
            assert (
                bed.router.ask("DELETE", "/workers/" + engine.url.replace(":", "%3A").replace("/", "%2F")).status == 202
            )
        bed.router.until(lambda: not bed.router.workers())
        for engine in (bed.pair.prefills[1], bed.pair.decodes[1]):
            assert bed.router.post("/workers", {"url": engine.url}).status == 202
        bed.router.until(lambda: {w["worker_type"] for w in bed.router.workers().values()} == {"prefill", "decode"})
        bed.router.until_healthy()
        served(bed.ask(GENERATE, generate()))
        assert bed.pair.prefills[1].legs[0].body["bootstrap_port"] == bed.pair.prefills[1].bootstrap_port


# -- what clients may not say ------------------------------------------------------------------------------------------

HOSTILE = (
    *({"bootstrap_host": "10.0.0.1"}, {"bootstrap_port": 9}, {"bootstrap_room": 1}, {"routed_dp_rank": 3}),
    *({"disagg_prefill_dp_rank": 3}, {"data_parallel_rank": 3}, {"rid": "another client's"}),
    {"kv_transfer_params": {"do_remote_prefill": True}},
)


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: next(iter(fields)))
def test_fields_of_the_router_are_refused_or_taken_out(one: SglangBed, fields: dict[str, Any]) -> None:
    answer = one.ask(GENERATE, generate(**fields))
    assert answer.status in (200, 400)
    for engine in one.pair.engines:
        for leg in engine.legs:
            ((name, value),) = fields.items()
            assert leg.body.get(name) != value
            assert leg.rids != ["another client's"]
    served(one.ask(GENERATE, generate("still alive")), "still alive")


@pytest.mark.parametrize("name", ["bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"])
def test_headers_of_the_router_do_not_reach_engines_that_would_believe_them(name: str) -> None:
    with routed(SglangPair(header_overrides=True)) as bed:
        answer = bed.ask(GENERATE, generate(), **{f"x_override_{name}": "77"})
        assert answer.status in (200, 400)
        for engine in bed.pair.engines:
            assert not any(header.startswith("x-override") for leg in engine.legs for header in leg.request.headers)
        served(bed.ask(GENERATE, generate("still alive")), "still alive")


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "two relays"])
@pytest.mark.parametrize("role", ROLES)
def test_many_requests_while_an_engine_dies_and_comes_back(role: str, more: tuple[str, ...]) -> None:
    with two(*more, timing=Timing(token=0.002)) as bed:
        asked = [bed.send(GENERATE, generate(f"{PROMPT} {n}", 10)) for n in range(60)]
        engine = of(bed, role)[0]
        bed.fakes.until(engine, lambda it: len(it.legs) >= 3)
        bed.fakes.call(engine.kill)
        bed.fakes.run(engine.start())
        for n, answer in enumerate(asked):
            served(answer.result(), f"{PROMPT} {n}", 10)
        bed.all_over()
        assert noticed(bed) == []
