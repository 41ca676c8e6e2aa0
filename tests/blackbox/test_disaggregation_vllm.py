"""Prefill/decode pairs of vLLM (NIXL) through a real router: the hand-over, and what can go wrong.

After each test every fake engine is idle, and so is the router (`pd_fakes.routed`).
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
from pd_fakes.texts import answer_text
from pd_fakes.vllm import VllmEngine, VllmPair, Work
from routers import Answer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = " ".join(f"tok{n}" for n in range(160))
ROLES = ("prefill", "decode")
VllmBed = Bed[VllmPair]


def completion(prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 4, **more}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 4, **more}


def events(answer: Answer) -> list[Any]:
    lines = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def served(answer: Answer, *prompts: str) -> None:
    """Check that an answer of /v1/completions is complete, and for these prompts."""
    assert answer.status == 200, answer.body
    assert [each["text"] for each in answer.json()["choices"]] == [answer_text(each, 4) for each in prompts or [PROMPT]]


@contextlib.contextmanager
def bed_of(prefills: int, decodes: int, *flags: str, **settings: Any) -> Iterator[VllmBed]:
    """A router in front of so many engines of each role."""
    with routed(VllmPair(prefills, decodes, **settings), *flags) as bed:
        yield bed


@pytest.fixture
def one() -> Iterator[VllmBed]:
    """One engine of each role."""
    with bed_of(1, 1) as bed:
        yield bed


def of(bed: VllmBed, role: str) -> list[VllmEngine]:
    return bed.pair.prefills if role == "prefill" else bed.pair.decodes


def works(engines: list[VllmEngine], kind: str) -> list[Work]:
    return [work for engine in engines for work in engine.works if work.kind == kind]


# -- the hand-over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def test_prefill_reads_the_prompt_and_decode_gets_its_blocks(more: tuple[str, ...]) -> None:
    with bed_of(1, 1, *more) as bed:
        served(bed.ask(COMPLETIONS, completion()))
        answer = bed.ask(CHAT, chat())
        assert answer.json()["choices"][0]["message"]["content"] == answer_text(f"<user> {PROMPT}", 4)
        told = events(bed.ask(CHAT, chat(stream=True, stream_options={"include_usage": True})))
        said = "".join(each["choices"][0]["delta"]["content"] for each in told[:4])
        assert said == answer_text(f"<user> {PROMPT}", 4)
        assert told[-1] == "[DONE]"
        prefill, decode = bed.pair.prefill, bed.pair.decode
        assert (decode.moves, decode.recomputed, prefill.expired) == (3, 0, 0)
        assert decode.hits == 160 + 161 + 161
        assert len(works([prefill], "prefill")) == len(works([decode], "decode")) == 3


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def test_prefill_pushes_and_requests_with_the_same_id_get_their_own_blocks(more: tuple[str, ...]) -> None:
    with bed_of(1, 2, "--pd-kv-connector", "nixl_push", *more, pushes=True) as bed:
        prompts = [f"{n} {PROMPT}" for n in range(8)]
        hold = bed.fakes.hold(Stage.MOVED, bed.pair.prefill)
        sent = [bed.send(COMPLETIONS, completion(each), x_request_id="same") for each in prompts]
        bed.fakes.until(bed.pair.prefill, lambda it: len(works([it], "prefill")) == 8)
        bed.fakes.release(hold)
        for prompt, answer in zip(prompts, sent, strict=True):
            served(answer.result(), prompt)
        assert sum(engine.moves for engine in bed.pair.decodes) == 8
        assert sum(engine.recomputed + engine.expired for engine in bed.pair.engines) == 0


def test_the_very_first_request_is_handed_over() -> None:
    """That engines are vLLM is known before they get a request, however seldom they are asked."""
    with bed_of(1, 1, "--engine-report-interval-secs", "60") as bed:
        served(bed.ask(COMPLETIONS, completion()))
        assert bed.pair.decode.moves == 1


def test_prefill_makes_one_token_and_no_stream_and_decode_gets_the_body_of_the_client(one: VllmBed) -> None:
    body = b'{"model":"tiny","stream_options":{"include_usage":true},"min_tokens":3,"unknown":[1.50],"n":1,' + (
        b'"messages":[{"role":"user","content":"a b"}], "max_tokens":4,"stream":true}'
    )
    assert one.ask(CHAT, body, x_request_id="mine").status == 200
    (first,), (second,) = works([one.pair.prefill], "prefill"), works([one.pair.decode], "decode")
    assert first.wanted == 1
    assert first.body["stream"] is False
    assert not first.body.get("stream_options")
    assert not first.body.get("min_tokens")
    assert first.body["unknown"] == second.body["unknown"] == [1.5]
    assert second.request.raw.startswith(body[:-1])
    assert first.request.headers["x-request-id"] == second.request.headers["x-request-id"]
    params = second.body["kv_transfer_params"]
    assert params["remote_port"] == one.pair.prefill.side_port
    assert params["remote_request_id"].startswith("cmpl-")


def test_many_hand_overs_at_once() -> None:
    with bed_of(2, 2) as bed:
        prompts = [f"{n} {PROMPT}" for n in range(24)]
        for prompt, answer in zip(prompts, [bed.send(COMPLETIONS, completion(each)) for each in prompts], strict=True):
            served(answer.result(), prompt)
        assert sum(engine.moves for engine in bed.pair.decodes) == 24
        assert sum(engine.recomputed + engine.expired for engine in bed.pair.engines) == 0


def test_several_sequences_are_not_handed_over_as_one(one: VllmBed) -> None:
    """Parameters are those of one sequence: a batch or several samples go without, or one by one."""
    served(one.ask(COMPLETIONS, completion(["a", "b"])), "a", "b")
    answer = one.ask(COMPLETIONS, completion(n=2, temperature=0.7))
    assert answer.status in (200, 400)
    for work in works([one.pair.decode], "decode"):
        assert len(work.prompts) == 1
        assert work.body.get("n") in (None, 1)
    assert one.pair.prefill.expired == 0


def test_readiness_and_roles(one: VllmBed) -> None:
    assert one.router.get("/readiness").status == 200
    kinds = {worker["url"]: worker["worker_type"] for worker in one.router.workers().values()}
    assert kinds == {one.pair.prefill.url: "prefill", one.pair.decode.url: "decode"}


# -- one leg fails -----------------------------------------------------------------------------------------------------

FAULTS = [Fault.RESET, Fault.CUT_HEAD, (500, {"error": {"message": "out of memory"}}), (503, {})]


@pytest.mark.parametrize("fault", FAULTS)
def test_when_decode_fails_another_one_answers(fault: Any) -> None:
    """Whether the failed one has read the blocks is unknown: they are not used again."""
    with bed_of(1, 2) as bed:
        bad = bed.pair.decodes[0]
        bed.fakes.call(partial(bad.fail, COMPLETIONS, fault))
        for n in range(2):
            served(bed.ask(COMPLETIONS, completion(f"{n} {PROMPT}")), f"{n} {PROMPT}")
        assert bad.count(COMPLETIONS) >= 1
        assert sum(engine.moves for engine in bed.pair.decodes) == 2
        assert sum(engine.recomputed for engine in bed.pair.decodes) == 0


def test_a_decode_that_is_down_costs_no_second_prefill() -> None:
    with bed_of(1, 2) as bed:
        bed.fakes.call(bed.pair.decodes[0].kill)
        for n in range(4):
            served(bed.ask(COMPLETIONS, completion(f"{n} {PROMPT}")), f"{n} {PROMPT}")
        assert len(works([bed.pair.prefill], "prefill")) == 4
        assert bed.pair.decodes[1].moves == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_when_prefill_fails_another_one_reads_the_prompt(fault: Any) -> None:
    with bed_of(2, 1) as bed:
        bad = bed.pair.prefills[0]
        bed.fakes.call(partial(bad.fail, COMPLETIONS, fault))
        for n in range(2):
            served(bed.ask(COMPLETIONS, completion(f"{n} {PROMPT}")), f"{n} {PROMPT}")
        assert bad.count(COMPLETIONS) >= 1
        assert bed.pair.decode.moves == 2


@pytest.mark.parametrize("role", ROLES)
def test_an_engine_that_is_down_is_replaced_at_once(role: str) -> None:
    with bed_of(2, 2) as bed:
        bed.fakes.call(of(bed, role)[0].kill)
        for n in range(4):
            served(bed.ask(COMPLETIONS, completion(f"{n} {PROMPT}")), f"{n} {PROMPT}")
        assert sum(engine.moves for engine in bed.pair.decodes) == 4


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.ADMITTED, Stage.MOVED])
def test_a_decode_killed_before_its_answer_costs_no_request(stage: Stage) -> None:
    with bed_of(1, 2) as bed:
        held = bed.fakes.hold(stage, *bed.pair.decodes)
        asked = bed.send(COMPLETIONS, completion())
        bed.fakes.call(bed.fakes.reached(held).kill)
        bed.fakes.release(held)
        served(asked.result())
        assert bed.pair.prefill.expired == sum(engine.recomputed for engine in bed.pair.decodes) == 0


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.MOVED])
def test_a_prefill_killed_before_its_answer_costs_no_request(stage: Stage) -> None:
    with bed_of(2, 1) as bed:
        held = bed.fakes.hold(stage, *bed.pair.prefills)
        asked = bed.send(COMPLETIONS, completion())
        bed.fakes.call(bed.fakes.reached(held).kill)
        bed.fakes.release(held)
        served(asked.result())
        assert bed.pair.decode.moves == 1


def test_a_prefill_killed_before_decode_has_read_its_blocks_costs_no_request() -> None:
    """Decode answers 500 after five seconds, in no words that name the prefill. The request is sent without parameters
    then, or with those of another prefill."""
    with bed_of(2, 2, dead_after=0.2) as bed:
        held = bed.fakes.hold(Stage.ADMITTED, *bed.pair.decodes)
        asked = bed.send(COMPLETIONS, completion())
        bed.fakes.reached(held)
        (used,) = [engine for engine in bed.pair.prefills if works([engine], "prefill")]
        bed.fakes.call(used.kill)
        bed.fakes.release(held)
        served(asked.result())


def test_a_decode_killed_in_mid_stream_ends_the_stream_with_an_error() -> None:
    with bed_of(1, 2) as bed:
        held = bed.fakes.hold(Stage.STREAMING, *bed.pair.decodes)
        with bed.client(COMPLETIONS, completion(stream=True)) as connection, connection.makefile("rb") as stream:
            told = bed.first_event(stream)
            bed.fakes.call(bed.fakes.reached(held).kill)
            told += stream.read()
        assert answer_text(PROMPT, 1).encode() in told
        assert b'"error"' in told
        assert not told.endswith(b"0\r\n\r\n"), "no clean end"


@pytest.mark.parametrize("role", ROLES)
def test_a_request_that_an_engine_refuses_goes_back_to_the_client(role: str) -> None:
    with bed_of(2, 2) as bed:
        refusal = (400, {"error": {"message": "temperature must not be negative"}})
        for engine in of(bed, role):
            bed.fakes.call(partial(engine.fail, COMPLETIONS, refusal))
        answer = bed.ask(COMPLETIONS, completion())
        assert answer.status == 400
        assert b"temperature must not be negative" in answer.body
        assert sum(engine.count(COMPLETIONS) for engine in of(bed, role)) == 1


@pytest.mark.parametrize("role", ROLES)
def test_a_leg_that_is_never_answered_does_not_hold_the_client(role: str) -> None:
    with bed_of(2, 2, "--first-byte-timeout-secs", "1") as bed:
        bed.fakes.call(partial(of(bed, role)[0].fail, COMPLETIONS, Fault.SILENT))
        bodies = [completion(f"{n} {PROMPT}", stream=True) for n in range(2)]
        statuses = {bed.ask(COMPLETIONS, body).status for body in bodies}
        assert statuses <= {200, 504}
        assert 200 in statuses


def test_a_prefill_that_hands_nothing_over_leaves_the_work_to_decode(one: VllmBed) -> None:
    said = {"id": "x", "choices": [{"index": 0, "text": " a", "finish_reason": "length"}], "kv_transfer_params": None}
    one.fakes.call(partial(one.pair.prefill.fail, COMPLETIONS, (200, said)))
    served(one.ask(COMPLETIONS, completion()))
    assert [work.kind for work in one.pair.decode.works][-1] == "plain"


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"kv_transfer_params":[1]}', b"[" * 100_000, b'"' + b"x" * 3_000_000])
def test_a_prefill_that_answers_nonsense_does_not_fail_the_request(one: VllmBed, garbage: bytes) -> None:
    one.fakes.call(partial(one.pair.prefill.fail, COMPLETIONS, (200, garbage)))
    served(one.ask(COMPLETIONS, completion()))


# -- the client leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.MOVED])
@pytest.mark.parametrize("role", ROLES)
def test_a_client_that_leaves_frees_both_engines(one: VllmBed, role: str, stage: Stage) -> None:
    held = one.fakes.hold(stage, of(one, role)[0])
    with one.client(COMPLETIONS, completion()):
        one.fakes.reached(held)
    one.router.until(lambda: all(worker["load"] == 0 for worker in one.router.workers().values()))
    one.fakes.release(held)
    if role == "prefill":
        one.fakes.idle()
        assert works([one.pair.decode], "decode") == []


def test_a_client_that_leaves_in_mid_stream_frees_the_engine(one: VllmBed) -> None:
    held = one.fakes.hold(Stage.STREAMING, one.pair.decode)
    with one.client(COMPLETIONS, completion(stream=True)) as client:
        one.fakes.reached(held)
        assert b"200 OK" in client.recv(1000)
    one.router.until(lambda: all(worker["load"] == 0 for worker in one.router.workers().values()))
    one.fakes.release(held)
    one.all_over()
    assert one.pair.decode.works[-1].fate == "left"


# -- what clients may not say ------------------------------------------------------------------------------------------

DEADLY: dict[str, Any] = {"do_remote_prefill": True}
HOSTILE: list[dict[str, Any]] = [
    {"kv_transfer_params": DEADLY},
    {"vllm_xargs": {"kv_transfer_params": DEADLY}},
    {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 1}},
]


@pytest.mark.parametrize("fields", HOSTILE)
def test_a_client_cannot_end_an_engine(one: VllmBed, fields: dict[str, Any]) -> None:
    answer = one.ask(COMPLETIONS, completion(**fields))
    assert answer.status in (200, 400)
    doubled = json.dumps(completion(**fields))[:-1].encode() + b',"kv_transfer_params":{"do_remote_prefill":true}}'
    assert one.ask(COMPLETIONS, doubled).status in (200, 400)
    assert one.pair.prefill.up
    assert one.pair.decode.up
    served(one.ask(COMPLETIONS, completion("still alive")), "still alive")
