"""The log probabilities of a prompt: prefill's list in decode's answer, whole and streamed, bounded."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pair_deciders import Pairs, finish, on_loop, streamed
from played import Client, Play, post
from sglang_router.relay.logprobs import MOST, PromptLogprobs, asked
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import read
from sglang_router.routing.outcome import Outcome

GENERATE = ENDPOINTS[b"/generate"]
BODY = b'{"text":"hi","return_logprob":true}'
STREAM = b'{"text":"hi","return_logprob":true,"stream":true}'
LIST = b"[[-1.50,1,null], [-2e0,2,null]]"


def result(entries: bytes, text: str = "t", index: int | None = None) -> bytes:
    place = b"" if index is None else b',"index":%d' % index
    return b'{"text":"%b","meta_info":{"id":"r","input_token_logprobs":%b,"x":1.0}%b}' % (text.encode(), entries, place)


def lists_of(body: bytes) -> Any:
    answer = json.loads(body)
    results = answer if isinstance(answer, list) else [answer]
    return [each["meta_info"]["input_token_logprobs"] for each in results]


def learnt(answer: bytes, streaming: bool = False) -> PromptLogprobs:
    logprobs = PromptLogprobs(streaming)
    logprobs.learn(answer, True)
    assert logprobs.ready
    return logprobs


def events(*data: bytes) -> bytes:
    return b"".join(b"data: %b\n\n" % each for each in data)


# -- without sockets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (b"/generate", BODY, True),
        (b"/generate", b'{"text":["a","b"],"return_logprob" : [true,false]}', True),
        (b"/generate", b'{"text":"a","return_logprob":false}', False),
        (b"/generate", b'{"text":"\\"return_logprob\\":true"}', False),
        (b"/generate", b'{"text":"a"}', False),
        (b"/v1/completions", b'{"prompt":"a","return_logprob":true}', False),
    ],
)
def test_only_a_request_that_asks_for_them_is_changed(path: bytes, body: bytes, wanted: bool) -> None:
    row = ENDPOINTS[path]
    assert asked(read(row, body, b""), body) is wanted
    assert not asked(None, body)


def test_the_list_is_inserted_as_it_came() -> None:
    logprobs = learnt(result(LIST))
    assert logprobs.whole(result(b"[]")) == result(LIST)
    assert logprobs.whole(result(b"[ [-3.0,3,null]]")) == result(b"[ " + LIST[1:-1] + b",[-3.0,3,null]]")
    assert learnt(result(b"[]")).whole(result(b"[[1,2,null]]")) == result(b"[[1,2,null]]")


def test_each_prompt_of_a_batch_has_its_own() -> None:
    prefill = b"[%b,%b]" % (result(b"[1]"), result(b"[2]"))
    decode = b"[%b, %b]" % (result(b"[]"), result(b"[]"))
    assert lists_of(learnt(prefill).whole(decode)) == [[1], [2]]
    assert learnt(prefill).whole(result(b"[]")) == result(b"[]"), "not one place for each"


@pytest.mark.parametrize(
    "prefill",
    [
        b"",
        b"{}",
        b"no json",
        b"[" * 50_000,
        b'{"meta_info":{"input_token_logprobs":null}}',
        b'{"meta_info":7}',
        b"\xff",
    ],
)
def test_what_cannot_be_read_leaves_decodes_answer_as_it_is(prefill: bytes) -> None:
    for streaming in (False, True):
        logprobs = learnt(prefill, streaming)
        assert logprobs.whole(result(b"[]")) == result(b"[]")
        assert logprobs.feed(events(result(b"[]"))) == events(result(b"[]"))


def test_a_list_that_is_too_long_is_left_out() -> None:
    logprobs = PromptLogprobs(False)
    logprobs.learn(b"x" * MOST, False)
    assert not logprobs.ready
    logprobs = PromptLogprobs(False)
    logprobs.learn(b"x" * (MOST + 1), False)
    assert logprobs.ready
    logprobs.learn(result(LIST), True)
    assert logprobs.whole(result(b"[]")) == result(b"[]")
    assert not asked(read(GENERATE, BODY, b""), BODY + b" " * MOST)


def test_each_event_of_a_stream_gets_it_but_done() -> None:
    logprobs = PromptLogprobs(True)
    first = events(result(LIST))
    logprobs.learn(first[:30], False)
    half = logprobs.ready
    logprobs.learn(first[30:], False)
    assert (half, logprobs.ready) == (False, True), "one prompt: its first event is enough"
    text = result(b"[]", text="[DONE] data: [DONE]\\n\\n")
    stream = events(result(b"[]"), text, b'{"text":"none"}') + b": ping\n\n" + events(b"[DONE]")
    merged = events(result(LIST), text.replace(b"[]", LIST), b'{"text":"none"}') + b": ping\n\n" + events(b"[DONE]")
    assert logprobs.feed(stream) == merged
    assert logprobs.last(b"data: [DONE]") == b"data: [DONE]"


def test_events_of_several_prompts_are_told_apart() -> None:
    logprobs = PromptLogprobs(True)
    logprobs.learn(events(result(b"[2]", index=1)), False)
    assert not logprobs.ready
    logprobs.learn(events(result(b"[1]", index=0), b"[DONE]"), True)
    decode = events(result(b"[]", index=0), result(b"[]", index=1), result(b"[]", index=2))
    assert logprobs.feed(decode) == events(result(b"[1]", index=0), result(b"[2]", index=1), result(b"[]", index=2))


@given(st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4))
def test_whatever_the_text_is(text: str, floats: list[float]) -> None:
    prefill = json.dumps({"text": text, "meta_info": {"input_token_logprobs": floats}}).encode()
    decode = {"text": text, "meta_info": {"input_token_logprobs": [7], "t": text}}
    merged = json.loads(learnt(prefill).whole(json.dumps(decode).encode()))
    assert merged["meta_info"]["input_token_logprobs"] == [*floats, 7]
    assert (merged["text"], merged["meta_info"]["t"]) == (text, text)


# -- with sockets ------------------------------------------------------------------------------------------------------


async def generate(play: Play, body: bytes) -> Client:
    client = await play.client()
    await client.send(post("/generate", body))
    return client


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("chunked", [False, True])
@on_loop
async def test_a_whole_answer(first: str, chunked: bool) -> None:
    async with Pairs() as (play, decider):
        client = await generate(play, BODY)
        prefill, decode = await decider.legs(play)
        if first == "prefill":
            await finish(prefill, result(LIST))
            await play.until(lambda: len(decider.ends) == 1)
        if chunked:
            await decode.send(b"HTTP/1.1 200 OK\r\nx-engine: d\r\ntransfer-encoding: chunked\r\n\r\n")
            await decode.chunk(result(b"[]")[:20])
            await decode.chunk(result(b"[]")[20:])
            await decode.end_stream()
        else:
            await decode.answer(200, result(b"[]"), "x-engine: d")
        if first == "decode":
            await finish(prefill, result(LIST))
        response = await client.response()
        assert (response.status, response.body, response.headers["x-engine"]) == (200, result(LIST), "d")
        assert sorted(decider.ends) == [("decode", Outcome.SERVED), ("prefill", Outcome.SERVED)]


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("resume", [False, True])
@on_loop
async def test_a_stream(first: str, resume: bool) -> None:
    async with Pairs(resume_streams=resume) as (play, decider):
        client = await generate(play, STREAM)
        prefill, decode = await decider.legs(play)
        if first == "decode":
            await streamed(decode, result(b"[]"), result(b"[]", "tt"))
            await decode.chunk(b"data: [DONE]\n\n")
            await decode.end_stream()
        await streamed(prefill, result(LIST))
        if first == "prefill":
            await streamed(decode, result(b"[]"))
            await client.head()
            assert await client.chunk() == events(result(LIST))
            await decode.chunk(events(result(b"[]", "tt"))[:50])
            await decode.chunk(events(result(b"[]", "tt"))[50:])
            assert await client.chunk() == events(result(LIST, "tt"))
            await decode.chunk(b"data: [DONE]\n\n")
            await decode.end_stream()
            assert await client.chunk() == b"data: [DONE]\n\n"
            assert await client.until(b"0\r\n\r\n")
        else:
            response = await client.response()
            assert response.body == events(result(LIST), result(LIST, "tt"), b"[DONE]")
        await prefill.end_stream()


@pytest.mark.parametrize("body", [BODY, STREAM])
@on_loop
async def test_prefill_fails_while_decodes_answer_is_held(body: bytes) -> None:
    async with Pairs(script={"retries": 1}) as (play, decider):
        client = await generate(play, body)
        prefill, decode = await decider.legs(play)
        if body is STREAM:
            await streamed(decode, result(b"[]"))
        else:
            await finish(decode, result(b"[]"))
        await play.until(lambda: not decode.writer.transport.get_write_buffer_size())
        prefill.reset()
        legs = await decider.legs(play)
        if body is STREAM:
            for leg, entries in zip(legs, (LIST, b"[]"), strict=True):
                await streamed(leg, result(entries), b"[DONE]")
                await leg.end_stream()
            assert (await client.response()).body == events(result(LIST), b"[DONE]")
        else:
            await finish(legs[0], result(LIST))
            await finish(legs[1], result(b"[]"))
            assert (await client.response()).body == result(LIST)
        assert decider.told[:2] == [("ended", "decode", Outcome.ABANDONED), ("retry", "prefill", Outcome.BROKEN)]


@on_loop
async def test_a_whole_answer_that_is_too_long_is_passed_on_unchanged() -> None:
    async with Pairs() as (play, decider):
        client = await generate(play, BODY)
        prefill, decode = await decider.legs(play)
        answer = result(b"[]", "x" * (MOST + (1 << 20)))
        answering = asyncio.ensure_future(decode.answer(200, answer))
        assert (await client.response()).body == answer
        await answering
        await prefill.answer(200, result(LIST))


@on_loop
async def test_decodes_error_is_not_held() -> None:
    async with Pairs() as (play, decider):
        client = await generate(play, BODY)
        _, decode = await decider.legs(play)
        await finish(decode, b"{}", 400)
        assert (await client.response()).status == 400
