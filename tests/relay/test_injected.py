"""--inject-usage: engines are asked for the usage of streams, and clients that have not asked do not see it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fleets import facts as facts_of
from played import Client, Leg, Play, post, run
from sglang_router.relay.injected import UsageHider, wanted, with_ask
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Finished
from sglang_router.routing.facts import LARGE
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.sse import MOST_HELD

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "stream": true,"messages":[{"role":"user","content":"hi"}]}'
ASKED = BODY[:-1] + b',"stream_options":{"include_usage":true}}'
TEXT = b'data: {"id":"1","created":1795350322,"choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}\n\n'
USAGE = (
    b'data: {"id":"1","created":1795350322,"choices":[],"usage":{"prompt_tokens":455,"completion_tokens":8,'
    b'"prompt_tokens_details":{"cached_tokens":454}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ANSWER = TEXT + TEXT + USAGE + DONE


def told(end: Finished) -> tuple[int, int, int] | None:
    usage = end.answer.usage
    return None if usage is None else (usage.prompt, usage.cached, usage.completion)


async def asked(play: Play, body: bytes = BODY, path: str = CHAT, version: str = "1.1") -> tuple[Client, Leg]:
    client = await play.client()
    await client.send(post(path, body, version=version))
    return client, await play.leg()


def injecting(**options: Any) -> Play:
    return Play(inject_usage=True, **options)


# -- whose streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "injected"),
    [
        (CHAT, BODY, True),
        ("/v1/completions", b'{"prompt":"hi","stream":true}', True),
        ("/v1/completions", b'{"prompt":"\\"stream_options\\": {}","stream":true}', True),
        ("/v1/completions", b'{"prompt":"a \\u003c b \\u00e9 \\u4f60","stream":true}', True),
        ("/v1/completions", b'{"prompt":"hi","stream":true,"stream_options":{"include_usage":true}}', False),
        ("/v1/completions", b'{"prompt":"hi","stream":true,"stream_options":{"include_usage":false}}', False),
        ("/v1/completions", b'{"prompt":"hi","stream":true,"stream_options":null}', False),
        ("/v1/completions", b'{"prompt":"hi","stream":true,"stream\\u005foptions":{}}', False),
        ("/v1/completions", b'{"prompt":"hi","stream":true,"\\u0073tream_options":{}}', False),
        ("/v1/completions", b'{"prompt":"hi","stream":false}', False),
        ("/generate", b'{"text":"hi","stream":true}', False),
        ("/v1/responses", b'{"input":"hi","stream":true}', False),
        ("/v1/messages", b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"stream":true}', False),
    ],
)
def test_only_streams_of_completions_whose_clients_say_nothing_are_asked_for(
    path: str, body: bytes, injected: bool
) -> None:
    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play, body, path)
            assert leg.body == (body[:-1] + b"," + with_ask(b"") + b"}" if injected else body)
            assert json.loads(leg.body)
            await leg.answer(200, b"{}")
            await client.response()

    run(main())


@pytest.mark.parametrize("options", ["", ',"stream_options":{"include_usage":false}'])
def test_a_body_in_utf_16_passes_as_it_is(options: str) -> None:
    """The question was added in ASCII, so that engines could not read the body any more."""
    body = BODY.decode().replace("}]}", "}]" + options + "}").encode("utf-16")

    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play, body)
            assert leg.body == body
            await leg.answer(200, b"{}")
            await client.response()

    run(main())


def test_what_a_worker_needs_is_added_to_a_body_in_utf_16_as_well() -> None:
    async def main() -> None:
        async with Play() as play:
            (worker,) = play.workers
            worker.splice, worker.dresses = b'"data_parallel_rank":1', True  # as of a rank
            client, leg = await asked(play, BODY.decode().encode("utf-16"))
            assert leg.body == BODY[:-1] + b',"data_parallel_rank":1}'
            await leg.answer(200, b"{}")
            await client.response()

    run(main())


def test_without_the_option_nothing_is_changed() -> None:
    async def main() -> None:
        async with Play() as play:
            client, leg = await asked(play)
            assert leg.body == BODY
            await leg.start_stream()
            await leg.chunk(ANSWER)
            await leg.end_stream()
            assert (await client.response()).body == ANSWER

    run(main())


def test_bodies_that_are_not_searched_pass_as_they_are() -> None:
    facts = facts_of(b"x", streaming=True)
    assert not wanted(facts, BODY)
    facts.endpoint = ENDPOINTS[CHAT.encode()]
    assert wanted(facts, BODY + b" " * (LARGE - len(BODY)))
    assert wanted(facts, bytearray(BODY))
    assert not wanted(facts, BODY + b" " * (LARGE - len(BODY) + 1))


def test_the_rank_and_the_question_are_added_together() -> None:
    assert with_ask(b'"data_parallel_rank":1') == b'"data_parallel_rank":1,"stream_options":{"include_usage":true}'


# -- what the client sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 50, len(ANSWER)])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("options", [{}, {"resume_streams": True}])
def test_the_client_gets_every_other_byte(size: int, version: str, options: dict[str, Any]) -> None:
    async def main() -> None:
        async with injecting(**options) as play:
            body = BODY.replace(b'"stream"', b'"temperature":0,"stream"')
            client, leg = await asked(play, body, version=version)
            assert b"include_usage" in leg.body
            await leg.start_stream()
            for at in range(0, len(ANSWER), size):
                await leg.chunk(ANSWER[at : at + size])
            await leg.end_stream()
            response = await client.response()
            assert (response.body, response.complete) == (TEXT + TEXT + DONE, True)
            (end,) = await play.ended(1)
            assert (told(end), end.answer.outcome) == ((455, 454, 8), Outcome.SERVED)
            assert play.workers[0].tokens.cached == 454

    run(main())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("options", [{}, {"resume_streams": True}])
def test_a_stream_that_comes_in_one_read(version: str, options: dict[str, Any]) -> None:
    async def main() -> None:
        async with injecting(**options) as play:
            client, leg = await asked(play, BODY.replace(b'"stream"', b'"temperature":0,"stream"'), version=version)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            await leg.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ANSWER), ANSWER))
            assert (await client.response()).body == TEXT + TEXT + DONE
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


def test_a_stream_that_ends_by_closing() -> None:
    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play)
            await leg.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + ANSWER)
            leg.close()
            assert (await client.response()).body == TEXT + TEXT + DONE
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


@pytest.mark.parametrize("inject", [True, False])
def test_no_compressed_stream_is_asked_for(inject: bool) -> None:
    """Nothing could be hidden in it."""

    async def main() -> None:
        async with Play(inject_usage=inject, forward_headers="all") as play:
            client = await play.client()
            await client.send(post(CHAT, BODY, "Accept-Encoding: gzip"))
            leg = await play.leg()
            assert ("accept-encoding" in leg.headers) is not inject
            await leg.answer(200, b"{}")
            await client.response()

    run(main())


def test_a_whole_stream_whose_length_was_told_passes_as_it_is() -> None:
    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play)
            await leg.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
                + ANSWER
            )
            assert (await client.response()).body == ANSWER
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


def test_answers_that_are_no_stream_pass_as_they_are() -> None:
    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play)
            await leg.answer(400, b'{"choices":[],"usage":{}}', "connection: close")
            assert (await client.response()).body == b'{"choices":[],"usage":{}}'
            client, leg = await asked(play)
            await leg.start_stream("application/json")
            await leg.chunk(b'{"choices":[],')
            await leg.chunk(b'"usage":{"prompt_tokens":1}}')
            await leg.end_stream()
            assert (await client.response()).body == b'{"choices":[],"usage":{"prompt_tokens":1}}'

    run(main())


def test_after_a_keep_alive_the_usage_is_hidden_too() -> None:
    async def main() -> None:
        async with injecting(sse_keepalive_secs=0.0001) as play:
            client, leg = await asked(play)
            assert play.app.keepalives is not None
            play.app.keepalives.look()
            looked = play.clock()
            await play.until(lambda: play.clock() > looked + 0.001)
            play.app.keepalives.look()
            await client.head()
            assert await client.chunk() == b": keep-alive\n\n"
            await leg.start_stream()
            for event in (TEXT, USAGE, DONE):
                await leg.chunk(event)
            await leg.end_stream()
            assert await client._chunks() == (TEXT + DONE, True)
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


def test_a_break_after_the_usage_is_a_break() -> None:
    async def main() -> None:
        async with injecting() as play:
            client, leg = await asked(play)
            await leg.start_stream()
            await leg.chunk(TEXT)
            await leg.chunk(USAGE + b"data: ")
            await client.head()
            assert await client.chunk() == TEXT
            leg.reset()
            rest = await client.rest()
            assert b"stream_broken" in rest
            assert b"prompt_tokens" not in rest
            assert (await play.ended(1))[0].answer.outcome is Outcome.CUT

    run(main())


def test_a_resumed_stream_asks_again_and_hides_again() -> None:
    async def main() -> None:
        async with injecting(workers=2, resume_streams=True) as play:
            client, leg = await asked(play, BODY.replace(b'"stream"', b'"temperature":0,"max_tokens":9,"stream"'))
            await leg.start_stream()
            await leg.chunk(TEXT)
            await client.head()
            assert await client.chunk() == TEXT
            leg.reset()
            leg = await play.leg()
            assert json.loads(leg.body)["stream_options"] == {"include_usage": True}
            await leg.start_stream()
            for event in (TEXT, USAGE, DONE):
                await leg.chunk(event)
            await leg.end_stream()
            body, complete = await client._chunks()
            assert complete
            assert body.count(b"data:") == 2
            assert b"prompt_tokens" not in body
            (end,) = await play.ended(1)
            assert (end.answer.resumed, told(end)) == (1, (455, 454, 8))
            assert [worker.tokens.prompt for worker in play.workers] == [0, 0], "it is the usage of two legs"

    run(main())


# -- the hider ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"delta":{"content":"\\"choices\\":[],\\"usage\\":{}"}}]}\n\n',
        b'data: {"choices":[{"delta":{"x":{"choices":[],"usage":{}}}}]}\n\n',
        b'data: {"choices":[],"usage":{}\n\n',
        b'data: ["choices", {"choices":[]}]\n\n',
        b': "choices":[]\n\n',
        b'data: {"choices":[],"usage":{},"a":' + b"[" * 9000 + b"\n\n",
    ],
)
def test_other_events_are_not_dropped(event: bytes) -> None:
    hider = UsageHider()
    assert hider.feed(event) == event
    assert hider.hidden == b""


@pytest.mark.parametrize("options", [{}, {"resume_streams": True}])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [USAGE, DONE, TEXT])
def test_a_last_event_need_not_end_with_an_empty_line(last: bytes, end: bytes, options: dict[str, Any]) -> None:
    """Clients that read by lines would see it."""
    last = last.rstrip() + end

    async def main() -> None:
        async with injecting(**options) as play:
            client, leg = await asked(play, BODY.replace(b'"stream"', b'"temperature":0,"stream"'))
            await leg.start_stream()
            await leg.chunk(TEXT + (b"" if last.startswith(USAGE.rstrip()) else USAGE) + last[:9])
            await leg.chunk(last[9:])
            await leg.end_stream()
            response = await client.response()
            expected = TEXT if last.startswith(USAGE.rstrip()) else TEXT + last
            assert (response.body, response.complete) == (expected, True)
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


@pytest.mark.parametrize("options", [{}, {"resume_streams": True}])
def test_an_event_that_is_too_long_to_be_kept_loses_nothing(options: dict[str, Any]) -> None:
    """It comes to the hider in parts, and looks like the one that tells the usage."""
    long = b'data: {"choices":[],"text":"' + b"x" * (MOST_HELD * 5 // 4) + b'"}\n\n'

    async def main() -> None:
        async with injecting(**options) as play:
            client, leg = await asked(play, BODY.replace(b'"stream"', b'"temperature":0,"stream"'))
            await leg.start_stream()
            await leg.chunk(TEXT)
            for at in range(0, len(long), 50_000):
                await leg.chunk(long[at : at + 50_000])
            await leg.chunk(USAGE + DONE)
            await leg.end_stream()
            assert (await client.response()).body == TEXT + long + DONE
            assert told((await play.ended(1))[0]) == (455, 454, 8)

    run(main())


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_the_one_event_is_dropped_wherever_it_stands(newline: bytes) -> None:
    events = [event.replace(b"\n", newline) for event in (TEXT, USAGE, DONE)]
    hider = UsageHider()
    assert repr(hider) == "<UsageHider waits for the usage>"
    assert hider.feed(b"".join(events)) == events[0] + events[2]
    assert hider.hidden == events[1]
    assert repr(hider) == "<UsageHider has the usage>"
    spaced = b'data: {"choices": [], "usage": {"prompt_tokens": 1}}' + newline * 2
    assert UsageHider().feed(spaced) == b""
