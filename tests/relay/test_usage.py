"""What engines tell of tokens reaches the decider, the policy and the listeners: over sockets, read by read."""

from __future__ import annotations

from typing import Any

import pytest

from played import Client, Leg, Play, post, run
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.usage import Usage

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}'
USAGE = b'"usage":{"prompt_tokens":455,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":454}}'
ANSWER = b'{"id":"1","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}],' + USAGE + b"}"
EVENTS = [
    b'data: {"id":"1","object":"chunk","created":1795350322,"choices":[{"delta":{"content":"Hi"}}],"usage":null}\n\n',
    b'data: {"id":"1","object":"chunk","created":1795350322,"choices":[],' + USAGE + b"}\n\n",
    b"data: [DONE]\n\n",
]


class Hears(Policy):
    """Takes the first candidate, and keeps what is reported."""

    name = "hears"

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.settings, policy.rng)
        self.reports: list[tuple[Choice, Facts, Usage | None]] = []

    def choose(self, facts, candidates, now):  # type: ignore[no-untyped-def]
        return self.least_loaded(candidates, "first")

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        self.reports.append((choice, facts, usage))


def figures(usage: Usage | None) -> tuple[int, int, int] | None:
    return None if usage is None else (usage.prompt, usage.cached, usage.completion)


async def told(play: Play, hears: Hears) -> tuple[int, int, int] | None:
    """Return what all have heard of the one request so far: the same."""
    (end,) = await play.ended(1)
    assert end.answer.outcome is Outcome.SERVED
    ((choice, facts, usage),) = hears.reports
    assert choice.worker is play.workers[0]
    assert facts.endpoint.name == "chat"
    assert end.answer.usage is usage
    tokens = play.workers[0].tokens
    assert (tokens.prompt, tokens.cached, tokens.completion) == (figures(usage) or (0, 0, 0))
    return figures(usage)


def hear(play: Play) -> Hears:
    """Put the policy that hears into the one pool."""
    pool = play.fleet.pools.default
    pool.policy = hears = Hears(pool.policy)
    return hears


async def asked(play: Play, body: bytes) -> tuple[Client, Leg]:
    client = await play.client()
    await client.send(post(CHAT, body))
    return client, await play.leg()


def test_the_usage_of_an_answer_in_one_read() -> None:
    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, BODY)
            await leg.answer(200, ANSWER)
            assert (await client.response()).body == ANSWER
            assert await told(play, hears) == (455, 454, 8)

    run(main())


def test_the_usage_of_an_answer_that_comes_byte_by_byte() -> None:
    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, BODY)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
            await leg.send(head + ANSWER[:1])
            await client.head()
            for at in range(len(ANSWER)):
                if at:
                    await leg.send(ANSWER[at : at + 1])
                assert await client.exactly(1) == ANSWER[at : at + 1]
            assert await told(play, hears) == (455, 454, 8)

    run(main())


@pytest.mark.parametrize("together", [True, False])
def test_the_usage_of_a_stream(together: bool) -> None:
    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, STREAM)
            await leg.start_stream()
            await client_has(client, leg, EVENTS, together)
            assert await told(play, hears) == (455, 454, 8)

    run(main())


async def client_has(client: Client, leg: Leg, events: list[bytes], together: bool) -> None:
    """Send events, each when the client has the one before, or all in one write; then the end."""
    if together:
        await leg.send(b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events))
    await_head = True
    for event in events:
        if not together:
            await leg.chunk(event)
        if await_head:
            await client.head()
            await_head = False
        got = await client.chunk()
        while len(got) < len(event):
            got += await client.chunk()
        assert got == event
    await leg.end_stream()
    assert await client.exactly(5) == b"0\r\n\r\n"


def test_the_usage_of_a_stream_whose_events_are_cut() -> None:
    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, STREAM)
            await leg.start_stream()
            data = b"".join(EVENTS)
            for at in range(0, len(data), 7):
                await leg.chunk(data[at : at + 7])
            await leg.end_stream()
            assert (await client.response()).body == data
            assert await told(play, hears) == (455, 454, 8)

    run(main())


async def silent(play: Play) -> None:
    """Let the router look twice at a stream that says nothing: it sends a head of its own."""
    assert play.app.keepalives is not None
    play.app.keepalives.look()
    looked = play.clock()
    await play.until(lambda: play.clock() > looked + 0.001)
    play.app.keepalives.look()


@pytest.mark.parametrize("options", [{"resume_streams": True}, {"sse_keepalive_secs": 0.0001}])
def test_the_usage_of_a_stream_that_is_handled(options: dict[str, Any]) -> None:
    """By a body handler, or because its head was sent early."""

    async def main() -> None:
        async with Play(**options) as play:
            hears = hear(play)
            body = STREAM.replace(b'"stream"', b'"temperature":0,"stream"')
            client, leg = await asked(play, body)
            if play.app.keepalives is not None:
                await silent(play)
                await client.head()
            await leg.start_stream()
            for event in EVENTS:
                await leg.chunk(event)
            await leg.end_stream()
            got = await client.until(b"[DONE]\n\n")
            assert EVENTS[1] in got
            assert await told(play, hears) == (455, 454, 8)

    run(main())


def test_a_stream_without_a_usage_is_reported_all_the_same() -> None:
    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, STREAM)
            await leg.start_stream()
            await client_has(client, leg, [EVENTS[0], EVENTS[2]], together=False)
            assert await told(play, hears) is None

    run(main())


def test_what_is_not_served_is_not_reported() -> None:
    """Neither a 4xx, nor an answer that breaks, nor one whose client leaves."""

    async def main() -> None:
        async with Play() as play:
            hears = hear(play)
            client, leg = await asked(play, BODY)
            await leg.answer(400, ANSWER, "connection: close")
            await client.response()
            client, leg = await asked(play, STREAM)
            await leg.start_stream()
            await leg.chunk(EVENTS[1])
            await client.until(b"\n\n\r\n")
            leg.reset()
            await client.rest()
            client, leg = await asked(play, STREAM)
            await leg.start_stream()
            await leg.chunk(EVENTS[1])
            await client.until(b"\n\n\r\n")
            client.reset()
            ends = await play.ended(3)
            assert [end.answer.outcome for end in ends] == [Outcome.REJECTED, Outcome.CUT, Outcome.GONE]
            assert [end.answer.usage for end in ends] == [None] * 3
            assert hears.reports == []
            assert play.workers[0].tokens.prompt == 0

    run(main())


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel")])
def test_a_stored_response_does_not_take_its_tokens_again(method: str, path: str) -> None:
    """Who asks for it gets the usage of the answer that made it, each time."""
    usage = b'"usage":{"input_tokens":455,"input_tokens_details":{"cached_tokens":454},"output_tokens":8}'
    stored = b'{"id":"resp_1","output":[],' + usage + b"}"

    async def main() -> None:
        async with Play() as play:
            client = await play.client()
            await client.send(post("/v1/responses", b'{"input":"hi"}'))
            leg = await play.leg()
            await leg.answer(200, stored)
            await client.response()
            for _ in range(2):
                await client.send(post(f"/v1/responses/resp_1{path}", b"").replace(b"POST", method.encode(), 1))
                await leg.request()
                await leg.answer(200, stored)
                assert (await client.response()).body == stored
            first, *others = await play.ended(3)
            assert figures(first.answer.usage) == (455, 454, 8)
            assert [each.answer.usage for each in others] == [None, None]
            assert play.workers[0].tokens.prompt == 455

    run(main())
