"""An exchange whose stream another worker continues: whole events, one clean end, and an error event when none can."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from played import Client, Leg, Play, post, run
from sglang_router.relay.body import Broken, Complete
from sglang_router.resume.continuation import ResumeRules
from sglang_router.resume.handler import ResumableStream
from sglang_router.routing.facts import LARGE, read
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.framing import UntilClose
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.sse import EventSplitter, payloads
from token_streams import STYLES, Style, answer, ask, seen

CHAT = Style("chat")
PATH = "/v1/chat/completions"
Test = Callable[[], Coroutine[None, None, None]]


def on_loop(test: Test) -> Callable[[], None]:
    def wrapper() -> None:
        run(test())

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper


def stream_of(events: Sequence[bytes]) -> bytes:
    return b"".join(map(as_event, events))


def events_of(stream: bytes) -> list[bytes]:
    return [data for _, data in payloads(stream)]


# -- without sockets -------------------------------------------------------------------------------------------------


HEAD = ResponseHead(200, b"OK", b"\r\nContent-Type: text/event-stream", False, False, False, None, 0)


def as_event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def broken(style: Style, body: bytes, cuts: Sequence[int], size: int) -> list[bytes]:
    """Return what the client gets when each leg but the last breaks after so many bytes, in reads of one size."""
    stream = ResumableStream(style.row, body, read(style.row, body), ResumeRules())
    assert stream.begin(HEAD, UntilClose(), chunked=False, events=True) is not None
    present, client = body, b""
    for leg, cut in enumerate([*cuts, 1 << 30]):
        if leg:
            assert stream.follow(HEAD, UntilClose()) == ""
        sent = stream_of(answer(style, present, leg))[:cut]
        for start in range(0, len(sent), size):
            client += stream.feed(sent[start : start + size])
        if cut == 1 << 30:
            client += stream.end()
            break
        assert client.endswith(b"\n\n") or not client
        following = stream.broke()
        if isinstance(following, Broken):
            assert stream.unresumed == "no_progress"
            return []
        if isinstance(following, Complete):
            client += following.rest
            break
        client += following.events
        present = following.body
        stream.follows()
    return events_of(client)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_a_break_behind_each_byte(style: Style) -> None:
    body = ask(style, 5)
    stream = stream_of(answer(style, body, 0))
    whole = seen(style, answer(style, body, 0))
    first = stream.index(b"\n\n") + 2
    for cut in range(first, len(stream) + 1):
        assert seen(style, broken(style, body, [cut], 1 << 20)) == whole


@given(st.sampled_from(STYLES), st.lists(st.integers(0, 700), max_size=3), st.integers(1, 300))
def test_several_breaks_and_reads_of_any_size(style: Style, cuts: list[int], read: int) -> None:
    body = ask(style, 8)
    whole = seen(style, answer(style, body, 0))
    ours = broken(style, body, [800, *[cut + 700 for cut in cuts]], read)
    assume(ours)
    assert seen(style, ours) == whole


@given(
    st.lists(st.sampled_from([b": ping\n\n", b"data: {}\n\n", b"data: 1\r\n\r\n", b"event: x\ndata:2\n\n"])), st.data()
)
def test_the_splitter_cuts_behind_events_only(events: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(events)
    splitter = EventSplitter()
    passed = b""
    start = 0
    while start < len(stream):
        size = data.draw(st.integers(1, 20))
        passed += splitter.feed(stream[start : start + size])
        assert [event for event, _ in payloads(passed)] == events[: len(payloads(passed))]
        start += size
    assert (passed, splitter.take()) == (stream, b"")


# -- with sockets ----------------------------------------------------------------------------------------------------


def resuming(workers: int, **options: Any) -> Play:
    return Play(workers, resume_streams=True, resume_max_bytes=1 << 16, **options)


async def asked(play: Play, body: bytes = b"", path: str = PATH, version: str = "1.1") -> tuple[Client, Leg]:
    client = await play.client()
    await client.send(post(path, body or ask(CHAT), version=version))
    return client, await play.leg()


async def streams(leg: Leg, events: Sequence[bytes], *, end: bool = True, cut: int = 1 << 30) -> None:
    await leg.start_stream()
    await leg.chunk(stream_of(events)[:cut])
    if end:
        await leg.end_stream()


def first_half(style: Style = CHAT) -> list[bytes]:
    return answer(style, ask(style), 0)[:4]


@on_loop
async def test_another_worker_goes_on_and_the_connection_too() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        for event in first_half():
            await leg.chunk(as_event(event))
        await leg.chunk(b'data: {"id":"half an ev')
        await client.head()
        received = b"".join([await client.chunk() for _ in first_half()])
        leg.reset()
        following = await play.leg()
        assert following.worker is not leg.worker
        await streams(following, answer(CHAT, following.body, 1))
        rest, clean = await client._chunks()
        assert clean
        assert seen(CHAT, events_of(received + rest)) == seen(CHAT, answer(CHAT, ask(CHAT), 0))
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.retries, end.answer.status, end.answer.code, end.answer.unresumed) == (
            1,
            1,
            200,
            "",
            "",
        )
        assert (end.tag.received, end.answer.outcome) == (len(ask(CHAT)), Outcome.SERVED)
        await client.send(post("/generate", b'{"text":"a"}'))
        await (again := await play.leg()).answer(200)
        assert (await client.response()).status == 200
        assert again.body == b'{"text":"a"}'


@on_loop
async def test_only_the_end_was_missing() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        await streams(leg, answer(CHAT, ask(CHAT), 0), end=False)
        await client.head()
        await client.chunk()
        leg.reset()
        assert await client.exactly(5) == b"0\r\n\r\n"
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.retries, end.answer.code, end.answer.outcome) == (1, 0, "", Outcome.CUT)


@on_loop
async def test_a_usage_that_only_an_engine_can_tell_is_asked_for() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        *told, _, _ = whole = answer(CHAT, ask(CHAT), 0)
        await streams(leg, told, end=False, cut=len(stream_of(told)) + 3)
        await client.head()
        received = await client.chunk()
        leg.reset()
        following = await play.leg()
        assert json.loads(following.body)["max_tokens"] == 1
        await streams(following, answer(CHAT, following.body, 1))
        rest, clean = await client._chunks()
        assert clean
        assert seen(CHAT, events_of(received + rest)) == seen(CHAT, whole)


@on_loop
async def test_an_answer_that_ends_with_its_connection_is_known_by_its_last_event() -> None:
    """For clients of HTTP/1.1 and 1.0 alike; the continuation comes in chunks and is passed on without."""
    for version in ("1.1", "1.0"):
        async with resuming(workers=2) as play:
            client, leg = await asked(play, version=version)
            await leg.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + stream_of(first_half()))
            await client.head()
            leg.close()
            following = await play.leg()
            await streams(following, answer(CHAT, following.body, 1))
            assert seen(CHAT, events_of(await client.rest())) == seen(CHAT, answer(CHAT, ask(CHAT), 0))


@on_loop
async def test_an_engine_that_says_it_failed() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        await streams(leg, [*first_half(), b'{"error":{"message":"EngineCore died","code":500}}', b"[DONE]"])
        following = await play.leg()
        await streams(following, answer(CHAT, following.body, 1))
        response = await client.response()
        assert response.complete
        assert seen(CHAT, events_of(response.body)) == seen(CHAT, answer(CHAT, ask(CHAT), 0))


@on_loop
async def test_what_a_worker_says_of_its_failure_reaches_the_client_where_nobody_goes_on() -> None:
    for code, retries in ((400, 6), (500, 0)):
        async with resuming(workers=2, max_total_retries=retries) as play:
            client, leg = await asked(play)
            said = [*first_half(), b'{"error":{"message":"no","code":%d}}' % code, b"[DONE]"]
            await streams(leg, said)
            response = await client.response()
            assert (response.body, response.complete) == (stream_of(said), True)
            (end,) = await play.ended(1)
            assert end.answer.unresumed == ("" if code == 400 else "no_retry")


@on_loop
async def test_a_worker_that_cannot_go_on_is_passed_over() -> None:
    async with resuming(workers=4) as play:
        client, leg = await asked(play)
        await streams(leg, first_half(), end=False)
        await client.head()
        received = await client.chunk()
        leg.reset()
        await (await play.leg()).answer(400, b'{"error":"no continue_final_message"}')
        await streams(garbled := await play.leg(), [b"<html>"], end=False)
        following = await play.leg()
        await garbled.closed()
        await streams(following, answer(CHAT, following.body, 1))
        rest, _ = await client._chunks()
        assert seen(CHAT, events_of(received + rest)) == seen(CHAT, answer(CHAT, ask(CHAT), 0))
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.retries) == (2, 3)


@on_loop
async def test_f3_a_second_worker_that_breaks_at_the_same_token_or_before_it_answers_is_the_last() -> None:
    """A prompt that ends engines at its tenth token ended one more with each continuation."""
    for answers in (True, False):
        async with resuming(workers=4) as play:
            client, leg = await asked(play)
            await streams(leg, first_half(), end=False)
            await client.head()
            await client.chunk()
            leg.reset()
            second = await play.leg()
            if answers:
                await streams(second, first_half()[:1], end=False)
            second.close()
            assert not (await client._chunks())[1]
            (end,) = await play.ended(1)
            assert (end.answer.retries, end.answer.unresumed) == (1, "no_progress" if answers else "no_retry")


@on_loop
async def test_when_nobody_is_left_the_client_gets_the_error_event_behind_whole_events() -> None:
    async with resuming(workers=2, max_worker_retries=1) as play:
        client, leg = await asked(play)
        await streams(leg, first_half(), end=False)
        await leg.chunk(b"data: half")
        await client.head()
        received = await client.chunk()
        play.played[1].refuse() if leg.worker is play.played[0] else play.played[0].refuse()
        leg.reset()
        rest, clean = await client._chunks()
        assert not clean
        *events, last = events_of(received + rest)
        assert [event for event in events if event] == first_half()
        assert json.loads(last)["error"]["code"] == "stream_broken"
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.unresumed, end.answer.code) == (0, "no_retry", "stream_broken")


@on_loop
async def test_a_worker_that_falls_silent() -> None:
    async with resuming(workers=2, chunk_timeout_secs=0.1) as play:
        client, leg = await asked(play)
        await streams(leg, first_half(), end=False)
        following = await play.leg()
        await streams(following, answer(CHAT, following.body, 1))
        response = await client.response()
        assert response.complete
        assert seen(CHAT, events_of(response.body)) == seen(CHAT, answer(CHAT, ask(CHAT), 0))
        await leg.closed()


@on_loop
async def test_a_stream_that_is_not_continued_passes_as_it_comes() -> None:
    """Chunk for chunk, whole events only; and the reason is reported."""
    async with resuming(workers=2) as play:
        client, leg = await asked(play, ask(CHAT, temperature=1))
        await leg.start_stream()
        await leg.chunk(b"data: one\n\n")
        await client.head()
        assert await client.chunk() == b"data: one\n\n"
        await leg.chunk(b"data: half an")
        leg.reset()
        rest, clean = await client._chunks()
        assert not clean
        assert rest.startswith(b'\n\ndata: {"error"')
        assert b"stream_broken" in rest
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.unresumed, end.answer.retries) == (0, "sampling", 0)


@on_loop
async def test_f10_a_large_body_is_not_decoded_in_order_to_resume_its_stream() -> None:
    """F10: with --resume-streams each body was decoded once more."""
    async with resuming(workers=2) as play:
        client, leg = await asked(play, ask(CHAT, unread="x" * LARGE))
        await streams(leg, first_half(), end=False)
        await client.head()
        leg.reset()
        rest, clean = await client._chunks()
        assert (clean, b"stream_broken" in rest) == (False, True)
        (end,) = await play.ended(1)
        assert (end.answer.resumed, end.answer.unresumed) == (0, "large")


@on_loop
async def test_more_text_than_is_kept_passes_on() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        event = b'{"choices":[{"index":0,"delta":{"content":"%b"}}]}' % (b"x" * 30000)
        await leg.start_stream()
        for n in range(4):
            await leg.chunk(as_event(event))
            if not n:
                await client.head()
            assert await client.chunk() == as_event(event)
        leg.reset()
        rest, clean = await client._chunks()
        assert (clean, b"stream_broken" in rest) == (False, True)
        (end,) = await play.ended(1)
        assert end.answer.unresumed == "too_long"


@on_loop
async def test_answers_that_are_no_streams_of_events() -> None:
    async with resuming(workers=1) as play:
        client, leg = await asked(play)
        await leg.answer(400, b'{"error":"no"}')
        assert (await client.response()).body == b'{"error":"no"}'
        await client.send(post(PATH, ask(CHAT)))
        await leg.request()
        await leg.start_stream("application/json")
        await leg.chunk(b'{"choices"')
        await leg.chunk(b":[]}")
        await leg.end_stream()
        assert (await client.response()).body == b'{"choices":[]}'


@on_loop
async def test_a_client_that_leaves_between_two_workers() -> None:
    async with resuming(workers=2) as play:
        client, leg = await asked(play)
        await streams(leg, first_half(), end=False)
        await client.head()
        await client.chunk()
        leg.reset()
        following = await play.leg()
        client.close()
        await following.closed()
        (end,) = await play.ended(1)
        assert end.answer.outcome is Outcome.GONE
