"""When an answer begins, what is retried before that, and that only whole events reach the client.

The workers' answers are written by hand, byte by byte where that matters.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from played import PATIENCE, Client, HandClock, Leg, Play, post, run
from sglang_router.config.keys import ClientKey
from sglang_router.relay.beginning import Beginning
from sglang_router.relay.deadlines import Due
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.whole_events import ANY_END, CHUNKED_ENDS, PLAIN_ENDS, WholeEvents, split
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.states import Breaker
from sglang_router.wire.error_events import first_event
from sglang_router.wire.framing import Chunked, Framing, UntilClose, chunk

CHAT = "/v1/chat/completions"
STREAM = b'{"stream":true,"messages":[]}'
EVENT = b'data: {"choices":[]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
FULL = b'data: {"error":{"object":"error","message":"The queue is full.","type":"SERVICE_UNAVAILABLE","code":503}}\n\n'

Test = Callable[[], Coroutine[Any, Any, None]]


def on_loop(test: Test) -> Callable[[], None]:
    def wrapper() -> None:
        run(test())

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper


async def asked(play: Play, path: str = CHAT, body: bytes = STREAM, version: str = "1.1") -> tuple[Client, Leg]:
    client = await play.client()
    await client.send(post(path, body, version=version))
    return client, await play.leg()


async def serve(leg: Leg) -> None:
    await leg.start_stream()
    await leg.chunk(EVENT)
    await leg.chunk(DONE)
    await leg.end_stream()


async def is_served(client: Client) -> None:
    response = await client.response()
    assert (response.status, response.body, response.complete) == (200, EVENT + DONE, True)


# -- case 3: a stream whose first event is an error --------------------------------------------------------------------

ERRORS = {
    "sglang": (FULL, 503),
    "vllm, older": (b'data: {"object":"error","message":"m","type":"InternalServerError","code":500}\n\n', 500),
    "code as text": (b'data: {"error":{"message":"m","code":"429"}}\n\n', 429),
    "openai": (b'data: {"error":{"message":"m","type":"rate_limit_error","code":"rate_limit_exceeded"}}\n\n', 429),
    "llama.cpp, older": (b'error: {"code":503,"message":"Loading model","type":"unavailable_error"}\n\n', 503),
    "anthropic": (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"m"}}\n\n', 503),
    "responses": (b'event: error\ndata: {"type":"error","code":"server_error","message":"m","param":null}\n\n', 500),
    "CRLF": (b'event: error\r\ndata: {"error":{"message":"m","code":502}}\r\n\r\n', 502),
    "CR": (b'data: {"error":{"message":"m","code":504}}\r\r', 504),
    "behind a comment and a ping": (b': hi\n\nevent: ping\ndata: {"type":"ping"}\n\n' + FULL, 503),
}


@pytest.mark.parametrize("name", ERRORS)
def test_case_3_a_first_event_that_is_an_error_is_retried(name: str) -> None:
    """An engine that answers 200 and then says in its first event that it failed was counted as served."""

    async def test() -> None:
        event, status = ERRORS[name]
        async with Play(2, cb_failure_threshold=1) as play:
            client, leg = await asked(play)
            await leg.send(CHUNKED + chunk(event) + chunk(DONE) + b"0\r\n\r\n")
            second = await play.leg()
            assert second.worker is not leg.worker
            await serve(second)
            await is_served(client)
            (end,) = await play.ended(1)
            assert end.answer.retries == 1
            opened = [worker.breaker is Breaker.OPEN for worker in play.workers]
            assert opened == [status != 429, False]  # as a plain answer with that status

    run(test())


@pytest.mark.parametrize("ended", [True, False])
def test_case_3_without_a_retry_the_client_gets_the_status(ended: bool) -> None:
    async def test() -> None:
        async with Play(1, max_total_retries=0) as play:
            client, leg = await asked(play)
            await leg.send(CHUNKED + chunk(FULL) + (b"0\r\n\r\n" if ended else b""))
            response = await client.response()
            assert (response.status, response.headers["content-type"]) == (503, "application/json")
            assert json.loads(response.body)["error"]["code"] == 503
            (end,) = await play.ended(1)
            assert (end.answer.status, end.answer.outcome) == (503, Outcome.FAILED)
            await client.send(post(CHAT, STREAM))  # its connection stays open
            await (leg.request() if ended else asyncio.sleep(0))
            await serve(leg if ended else await play.leg())
            await is_served(client)

    run(test())


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"no code"}}\n\n',
        b'data: {"choices":[{"delta":{"content":"error: 503"}}]}\n\n',
        b'data: {"id":"x","error":null,"code":503}\n\n',
        b"data: error 503\n\n",
        b'data: ["error"]\n\n',
    ],
)
def test_case_3_what_is_not_the_engines_failure_is_passed_on(event: bytes) -> None:
    async def test() -> None:
        async with Play(2, cb_failure_threshold=1) as play:
            client, leg = await asked(play)
            await leg.send(CHUNKED + chunk(event) + chunk(DONE) + b"0\r\n\r\n")
            response = await client.response()
            assert (response.status, response.body) == (200, event + DONE)
            assert all(worker.breaker is Breaker.CLOSED for worker in play.workers)
            assert play.legs.empty()

    run(test())


@on_loop
async def test_case_3_a_first_event_that_rejects_the_request_is_an_answer_with_that_status() -> None:
    async with Play(2, cb_failure_threshold=1) as play:
        client, leg = await asked(play)
        await leg.send(CHUNKED + chunk(b'data: {"error":{"message":"too long","code":400}}\n\n') + b"0\r\n\r\n")
        response = await client.response()
        assert (response.status, json.loads(response.body)["error"]["message"]) == (400, "too long")
        (end,) = await play.ended(1)
        assert (end.answer.outcome, end.answer.retries) == (Outcome.REJECTED, 0)
        assert all(worker.breaker is Breaker.CLOSED for worker in play.workers)
        assert play.legs.empty()


@on_loop
async def test_case_3_an_error_behind_the_first_event_passes() -> None:
    async with Play(2) as play:
        client, leg = await asked(play)
        await leg.send(CHUNKED + chunk(EVENT) + chunk(FULL) + b"0\r\n\r\n")
        assert (await client.response()).body == EVENT + FULL


@given(st.binary(max_size=80))
def test_case_3_no_event_breaks_the_reader(data: bytes) -> None:
    first = first_event(b'data: {"error": ' + data + b"\n\n")
    assert first is None or 0 <= first.status < 600


# -- case 4: the answer begins with its first byte ---------------------------------------------------------------------

BEGINNINGS = {
    "chunked": CHUNKED,
    "chunked, size line": CHUNKED + b"40\r\n",
    "half an event": CHUNKED + chunk(EVENT[:9]),
    "comments": CHUNKED + chunk(b": keep-alive\n\n") * 3,
    "a ping": CHUNKED + chunk(b'event: ping\ndata: {"type": "ping"}\n\n'),
    "until close": HEAD + b"\r\n",
    "sized": HEAD + b"content-length: 500\r\n\r\n",
    "sized JSON": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n",
    "chunked JSON": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
    "chunked JSON, size line": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n",
}


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_case_4_an_engine_that_dies_before_the_first_event_is_replaced(name: str, resets: bool, version: str) -> None:
    """The head of an answer ended the chance to retry, though nothing of the answer was there."""

    async def test() -> None:
        async with Play(2) as play:
            client, leg = await asked(play, version=version)
            await leg.send(BEGINNINGS[name])
            await play.until(lambda: any("Beginning" in repr(e.legs[-1].handled) for e in play.clients.exchanges))  # type: ignore[attr-defined]
            if resets:
                leg.reset()
            else:
                leg.close()
            await serve(await play.leg())
            await is_served(client)
            (end,) = await play.ended(1)
            assert (end.answer.retries, end.answer.outcome) == (1, Outcome.SERVED)
            assert [worker.circuit.failures for worker in play.workers] == [1, 0]

    run(test())


@on_loop
async def test_case_4_the_first_byte_is_the_first_event() -> None:
    """The time to the first byte was the time to the head, which engines send at once."""
    async with Play(1) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        await leg.chunk(b": wait\n\n")
        (exchange,) = play.clients.exchanges
        await play.until(lambda: "Beginning" in repr(exchange.legs[-1].handled))  # type: ignore[attr-defined]
        worker = play.workers[0]
        assert (worker.waiting, play.clients.unanswered().requests, play.events.firsts) == (1, 1, [])
        assert exchange.deadline[0] is Due.FIRST_BYTE
        held_at = play.clock()
        await leg.chunk(EVENT)
        await leg.chunk(DONE)
        await leg.end_stream()
        response = await client.response()
        assert response.body == b": wait\n\n" + EVENT + DONE
        (end,), (first,) = await play.ended(1), play.events.firsts
        assert end.answer.first_byte == first.seconds >= held_at - end.tag.start
        assert (worker.waiting, play.clients.unanswered().requests) == (0, 0)


@on_loop
async def test_case_4_a_body_that_is_no_body_before_the_first_byte_is_retried_too() -> None:
    async with Play(2) as play:
        client, leg = await asked(play)
        await leg.send(CHUNKED + b"no size\r\n")
        await leg.closed()
        await serve(await play.leg())
        await is_served(client)


@on_loop
async def test_case_4_comments_do_not_extend_the_first_byte_timeout() -> None:
    async with Play(1, first_byte_timeout_secs=0.2) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        await leg.chunk(b": wait\n\n")
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (504, "first_byte_timeout")


@on_loop
async def test_case_4_a_head_without_a_body_has_the_chunk_timeout() -> None:
    async with Play(1, chunk_timeout_secs=0.1) as play:
        client, leg = await asked(play, body=b"{}")
        await leg.send(BEGINNINGS["sized JSON"])
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (504, "chunk_timeout")


@on_loop
async def test_case_4_a_beginning_that_does_not_end_is_passed_on() -> None:
    async with Play(1) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        long = b": " + b"x" * 1_100_000
        sending = asyncio.ensure_future(leg.chunk(long))
        await client.head()
        await sending
        await leg.chunk(b"\n\n" + DONE)
        await leg.end_stream()
        body, clean = await client._chunks()
        assert (body, clean) == (long + b"\n\n" + DONE, True)


@on_loop
async def test_case_4_a_long_first_event_is_held_to_its_end() -> None:
    """A worker that died inside a first event of 300 kB left the client with 200 and an error event."""
    async with Play(2) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        await leg.chunk(b"data: " + b"x" * 300_000)
        (exchange,) = play.clients.exchanges
        assert isinstance(exchange, Exchange)

        def held() -> bool:
            beginning = exchange.legs[0].handled
            return isinstance(beginning, Beginning) and beginning._size > 300_000

        await play.until(held)
        leg.reset()
        await serve(await play.leg())
        await is_served(client)


@on_loop
async def test_case_4_a_compressed_stream_is_not_read() -> None:
    """Its bytes are no events: they pass as they come, and no error event follows them."""
    async with Play(1) as play:
        client, leg = await asked(play)
        await leg.send(HEAD + b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"\x1f\x8b."))
        await client.head()
        leg.reset()
        assert await client._chunks() == (b"\x1f\x8b.", False)


# -- case 17: whole events only ----------------------------------------------------------------------------------------

ENDS = [b"\n\n", b"\r\n\r\n", b"\r\r"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("framing", ["chunked", "until close", "sized"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_case_17_half_an_event_is_not_sent(end: bytes, framing: str, version: str) -> None:
    """An engine that died inside a line left half an event at the client, in front of the error event."""

    async def test() -> None:
        coded = framing == "chunked"
        field = {"chunked": b"transfer-encoding: chunked\r\n", "sized": b"content-length: 9999\r\n"}.get(framing, b"")
        one, two = b"data: {}" + end, b'data: "2"' + end
        async with Play(1) as play:
            client, leg = await asked(play, "/v1/messages", version=version)
            await leg.send(HEAD + field + b"\r\n" + (chunk(one) if coded else one))
            await client.head()
            chunks = coded and version == "1.1"
            assert await (client.chunk() if chunks else client.exactly(len(one))) == one
            half = two + b"data: half"
            await leg.send(chunk(half) if coded else half)
            assert await (client.chunk() if chunks else client.exactly(len(two))) == two
            leg.reset()
            rest = (await client._chunks())[0] if chunks else await client.rest()
            assert b"half" not in rest
            assert rest.startswith(b"\n\nevent: error\ndata: {") or framing == "sized"
            assert rest.endswith(b"}\n\n") or framing == "sized"

    run(test())


@on_loop
async def test_case_17_a_close_inside_an_event_is_a_break() -> None:
    """Without a length only the close ends the answer; a process that dies closes too."""
    async with Play(2) as play:
        client, leg = await asked(play)
        await leg.send(HEAD + b"\r\ndata: ha")
        leg.close()  # not begun: elsewhere
        leg = await play.leg()
        await leg.send(HEAD + b"\r\n" + EVENT + b"data: ha")
        leg.close()
        await client.head()
        body = await client.rest()
        assert body.startswith(EVENT + b'\n\ndata: {"error":')
        (end,) = await play.ended(1)
        assert (end.answer.code, end.answer.retries) == ("stream_broken", 1)


class Playing:
    """A leg without a client: `sent` is what the client got."""

    def __init__(self, framing: Framing, chunked: bool) -> None:
        self.framing: Framing | None = framing
        self.worker = framing
        self.chunked = chunked
        self.decoding = False
        self.events = True
        self.ends: tuple[bytes, ...] = CHUNKED_ENDS if chunked else PLAIN_ENDS
        self.sink: WholeEvents | None = None
        self.sent = b""

    def handle_by(self, sink: WholeEvents | None) -> None:
        self.sink = sink

    def pass_on(self, data: bytes, done: bool) -> None:
        self.sent += data

    def broken(self, outcome: Outcome, detail: str) -> None:
        raise AssertionError(detail)

    def read(self, data: bytes) -> None:
        """Do what `UpstreamConnection.data_received` and `Leg.data` do."""
        pieces: list[bytes] = []
        decoding = self.decoding
        end = self.worker.feed(data, pieces) if decoding else self.worker.feed(data)
        content, done = b"".join(pieces) if decoding else data, end >= 0
        if self.sink is not None:
            self.sink.data(self, content, done)
        elif done or data.endswith(self.ends):
            self.pass_on(content, done)
        else:
            split(self, content)


events = st.lists(
    st.sampled_from(
        [EVENT, DONE, b'data: "x"\r\n\r\n', b"data: {}\r\n\r\n", b": c\n\n", b"data: 1\r\r", b"data: a\ndata: b\n\n"]
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(events, st.booleans(), st.data())
def test_case_17_however_events_chunks_and_reads_are_cut(parts: list[bytes], coded: bool, data: st.DataObject) -> None:
    """The client has whole events after each read, as soon as they are there, and all bytes in the end."""
    stream = b"".join(parts)
    sizes = st.integers(1, data.draw(st.sampled_from([1, 3, 40])))
    raw, at = b"", 0
    while at < len(stream):
        size = data.draw(sizes)
        raw += chunk(stream[at : at + size]) if coded else stream[at : at + size]
        at += size
    leg = Playing(Chunked() if coded else UntilClose(), coded)
    whole = [b"".join(parts[:n]) for n in range(len(parts) + 1)]
    at = 0
    while at < len(raw):
        size = data.draw(st.integers(1, data.draw(st.sampled_from([1, 5, 60]))))
        leg.read(raw[at : at + size])
        at += size
        got = decoded(leg.sent) if coded else leg.sent
        assert got in whole or (got[:-1] in whole and got.endswith(b"\r"))
        assert not coded or (leg.framing is not None and leg.framing.gap == 0)
    if coded:
        leg.read(b"0\r\n\r\n")
        assert decoded(leg.sent, True) == stream
    else:
        assert stream.startswith(leg.sent)
        assert len(stream) - len(leg.sent) < 2


def decoded(raw: bytes, ended: bool = False) -> bytes:
    pieces: list[bytes] = []
    framing = Chunked()
    assert (framing.feed(raw, pieces) == len(raw)) is ended
    assert ended or framing.gap == 0
    return b"".join(pieces)


def test_case_17_content_that_looks_like_the_end_of_a_chunk_is_never_garbled() -> None:
    leg = Playing(Chunked(), True)
    content = EVENT + b"\r\n" + EVENT + DONE
    raw = chunk(content)
    cut = raw.index(b"}\n\n\r\n") + 5
    leg.read(raw[:cut])
    leg.read(raw[cut : cut + 9])
    leg.read(raw[cut + 9 :])
    leg.read(b"0\r\n\r\n")
    assert leg.ends == ANY_END
    assert decoded(leg.sent, True) == content


def test_case_17_an_event_without_end_is_passed_on() -> None:
    leg = Playing(UntilClose(), False)
    for _ in range(40):
        leg.read(b"x" * 65536)
    assert len(leg.sent) >= 40 * 65536 - (1 << 20)
    assert leg.sink is not None
    assert leg.sink.torn
    leg.read(b"\n\n" + EVENT)
    assert leg.sent == b"x" * 40 * 65536 + b"\n\n" + EVENT
    assert leg.sink is None


@on_loop
async def test_case_17_what_is_held_counts_as_progress() -> None:
    async with Play(1, chunk_timeout_secs=0.4) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        await leg.chunk(EVENT)
        await client.head()
        assert await client.chunk() == EVENT
        (exchange,) = play.clients.exchanges
        for _ in range(12):  # a look each 0.1 s: nothing is sent for longer than the timeout
            await leg.chunk(b"data: ")
            due = exchange.deadline
            await play.until(lambda due=due: exchange.deadline != due)  # type: ignore[misc]
        await leg.chunk(b"\n\n")
        await leg.end_stream()
        assert (await client._chunks())[1]


# -- case 18: the shape of errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{}", STREAM])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true"])
def test_case_18_every_error_on_messages_has_anthropics_shape(path: str, body: bytes) -> None:
    async def test() -> None:
        async with Play(1, max_total_retries=0, max_payload_size=1000, api_key=[ClientKey("someone", "K")]) as play:
            client = await play.client()
            key = "Authorization: Bearer K"
            broken, large = b"{nonsense", b'{"a":"%s"}' % (b"x" * 1000)
            for headers, sent, kind in (
                ((), body, "authentication_error"),
                ((key,), broken, "invalid_request_error"),
                ((key,), body, "api_error"),
                ((key,), large, "request_too_large"),
            ):
                client = await play.client()
                await client.send(post(path, sent, *headers))
                if kind == "api_error":
                    (await play.leg()).reset()
                told = json.loads((await client.response()).body)
                assert (told["type"], told["error"]["type"]) == ("error", kind)
                assert set(told["error"]) == {"type", "message"}

    run(test())


# -- F35 and F23 -------------------------------------------------------------------------------------------------------


@on_loop
async def test_f35_a_408_on_a_kept_connection_is_sent_again() -> None:
    """A worker that gave an idle connection up with a 408 just as it was used again: the client got the 408."""
    async with Play(1) as play:
        client, leg = await asked(play, body=b"{}")
        await leg.answer(200)
        await client.response()
        await client.send(post(CHAT, b"{}"))
        await leg.request()
        await leg.send(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        fresh = await play.leg()
        assert play.played[0].connections == 2
        await fresh.send(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        assert (await client.response()).status == 408  # on a new connection it is the answer
        assert [end.answer.retries for end in await play.ended(2)] == [0, 0]


@on_loop
async def test_f23_a_client_that_takes_nothing_is_cut() -> None:
    """A client that did not read its stream held its place at the worker until --request-timeout-secs."""
    async with Play(1, send_timeout_secs=0.3) as play:
        client, leg = await asked(play)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await leg.start_stream()
        sending = asyncio.ensure_future(leg.send(chunk(b"data: {%s}\n\n" % (b"x" * (32 << 20)))))
        (end,) = await play.ended(1)
        assert end.answer.outcome is Outcome.GONE
        with pytest.raises(ConnectionError):
            await sending
        assert play.workers[0].load == 0


@on_loop
async def test_f23_a_client_that_reads_slowly_is_served() -> None:
    clock = HandClock()
    async with Play(1, clock=clock, send_timeout_secs=0.3) as play:
        client = await play.client(limit=1 << 13)
        await client.send(post(CHAT, STREAM))
        leg = await play.leg()
        connection = play.narrow(client, 1 << 14)
        await leg.start_stream()
        event = b"data: {%s}\n\n" % (b"x" * (4 << 20))
        sending = asyncio.ensure_future(leg.send(chunk(event) + b"0\r\n\r\n"))
        await client.head()
        end, stalled_at = b"", []
        while end != b"\r\n0\r\n\r\n":
            await play.until(lambda: connection.stalled or connection.exchange is None)
            due, left = connection.deadline, connection.transport.get_write_buffer_size()
            if due[0] is Due.SEND:
                stalled_at.append(clock.now)
            while end != b"\r\n0\r\n\r\n":
                data = await asyncio.wait_for(client.reader.read(1 << 13), PATIENCE)
                assert data, "the client was cut"
                end = (end + data)[-7:]
                if connection.deadline != due or connection.transport.get_write_buffer_size() < left:
                    break  # the router has noticed
            if len(stalled_at) < 20:
                clock.now += 0.2  # the pace of this client
                play.clients.sweep()
        await sending
        await play.ended(1)
        assert stalled_at[-1] - stalled_at[0] > 0.3


# -- case 8: a host that vanished --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{}", STREAM])
def test_case_8_requests_at_a_host_that_vanished_go_elsewhere(body: bytes) -> None:
    """They waited for timeouts that are made for engines that compute."""

    async def test() -> None:
        async with Play(2) as play:
            client, leg = await asked(play, body=body)
            gone, other = play.workers
            assert leg.worker is play.played[0]
            play.app.checks.vanished(other.target.name)  # nothing is there
            play.app.checks.vanished(gone.target.name)
            await leg.closed()
            second = await play.leg()
            assert second.worker is play.played[1]
            await second.answer(200, b"saved")
            assert (await client.response()).body == b"saved"
            assert gone.circuit.failures == 0

    run(test())


@on_loop
async def test_case_8_an_answer_that_has_begun_stays() -> None:
    async with Play(2) as play:
        client, leg = await asked(play)
        await leg.start_stream()
        await leg.chunk(EVENT)
        await client.head()
        play.app.checks.vanished(play.workers[0].target.name)
        await leg.chunk(DONE)
        await leg.end_stream()
        assert await client._chunks() == (EVENT + DONE, True)
        assert play.legs.empty()


@on_loop
async def test_case_8_without_another_worker_it_ends_at_once() -> None:
    async with Play(1) as play:
        client, _ = await asked(play)
        play.app.checks.vanished(play.workers[0].target.name)
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (502, "worker_broken")


# -- --sse-keepalive-secs ----------------------------------------------------------------------------------------------

COMMENT = b": keep-alive\n\n"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def filling(workers: int = 1) -> Play:
    return Play(workers, sse_keepalive_secs=0.0001)


async def fill(play: Play) -> None:
    """Let the router look twice, with some silence in between."""
    assert play.app.keepalives is not None
    await play.until(lambda: not play.connections._opening)
    play.app.keepalives.look()
    looked = play.clock()
    await play.until(lambda: play.clock() > looked + 0.001)
    play.app.keepalives.look()


@pytest.mark.parametrize(("path", "event"), [(CHAT, COMMENT), ("/v1/messages", PING)])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_keepalive_in_a_stream_that_is_silent(path: str, event: bytes, version: str) -> None:
    async def test() -> None:
        async with filling() as play:
            client, leg = await asked(play, path, version=version)
            await leg.start_stream()
            await leg.chunk(EVENT)
            await client.head()
            read = client.chunk if version == "1.1" else lambda: client.exactly(len(EVENT))
            assert await read() == EVENT
            await leg.chunk(b"data: half")
            await fill(play)
            await leg.chunk(b"\n\n")
            await leg.end_stream()
            body = (await client._chunks())[0] if version == "1.1" else await client.rest()
            assert body == event + b"data: half\n\n"
            assert (await play.ended(1))[0].answer.sent < 200

    run(test())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("resume", [True, False])
def test_keepalive_before_the_first_event_commits_to_200_and_retries_go_on(version: str, resume: bool) -> None:
    async def test() -> None:
        async with Play(2, sse_keepalive_secs=0.0001, resume_streams=resume) as play:
            client, leg = await asked(play, "/generate", b'{"text":"a","stream":true}', version=version)
            await leg.start_stream()
            await fill(play)
            start, fields = await client.head()
            assert start == "HTTP/1.1 200 OK"
            assert dict(fields)["content-type"].startswith("text/event-stream")
            leg.reset()
            second = await play.leg()
            await second.send(HEAD + b"\r\n" + EVENT + DONE)  # another framing than the head promised
            second.close()
            body, clean = await client._chunks() if version == "1.1" else (await client.rest(), True)
            assert (body, clean) == (COMMENT + EVENT + DONE, True)
            (end,) = await play.ended(1)
            assert (end.answer.status, end.answer.retries) == (200, 1)

    run(test())


@on_loop
async def test_keepalive_tells_who_asks_which_worker_was_chosen_by_then() -> None:
    async with filling() as play:
        client = await play.client()
        await client.send(post(CHAT, STREAM, "X-Request-Id: r", "X-SGLang-Router-Explain: 1"))
        leg = await play.leg()
        await leg.start_stream()
        await fill(play)
        _, fields = await client.head()
        told = dict(fields)
        assert told["x-sglang-router-decision"].endswith('; attempt=1; id="r"')
        assert told["x-sglang-router-worker"] == play.app.fleet.candidates(play.clock())[0].url
        assert "x-sglang-router-explain" not in leg.headers
        await leg.chunk(EVENT)
        await leg.end_stream()
        assert (await client._chunks())[0] == COMMENT + EVENT


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("answer", ["status", "break", "plain"])
def test_keepalive_before_a_failure_is_followed_by_an_error_event(path: str, answer: str) -> None:
    async def test() -> None:
        async with Play(1, sse_keepalive_secs=0.0001, max_total_retries=0) as play:
            client, leg = await asked(play, path)
            await fill(play)
            await client.head()
            if answer == "status":
                await leg.answer(400, b'{"error":\n {"message": "no"}}')
            elif answer == "plain":
                await leg.answer(500, b"oops")
            else:
                leg.reset()
            body, clean = await client._chunks()
            assert not clean
            told = body.removeprefix(PING if "messages" in path else COMMENT).strip().rpartition(b"data: ")
            assert (b"event: error" in told[0]) is ("messages" in path)
            assert "error" in json.loads(told[2])
            if answer == "status":
                assert json.loads(told[2]) == {"error": {"message": "no"}}

    run(test())


@on_loop
async def test_keepalive_an_answer_that_is_no_stream_is_one_event() -> None:
    async with filling() as play:
        client, leg = await asked(play)
        await fill(play)
        await client.head()
        await leg.answer(200, b'{\n"a": 1\n}')
        assert await client._chunks() == (COMMENT + b'data: {"a":1}\n\n', True)
        await client.send(post(CHAT, STREAM))
        await leg.request()
        await serve(leg)
        await is_served(client)


@on_loop
async def test_keepalive_not_for_answers_that_are_no_streams() -> None:
    async with filling(2) as play:
        client, leg = await asked(play, body=b"{}")
        await fill(play)
        await leg.answer(200, b"{}")
        assert (await client.response()).body == b"{}"
        client, leg = await asked(play)
        await leg.send(HEAD + b"content-length: %d\r\n\r\n" % len(EVENT + DONE) + EVENT)
        await client.head()
        await fill(play)
        await leg.send(DONE)
        assert await client.exactly(len(EVENT + DONE)) == EVENT + DONE


@pytest.mark.parametrize("coding", ["gzip", ""])
def test_keepalive_an_answer_that_cannot_be_sent_in_a_stream_is_no_fault_of_its_worker(coding: str) -> None:
    """Two compressed answers behind a comment opened breakers, and the request was refused for breaking workers."""

    async def test() -> None:
        async with filling(2) as play:
            for _ in range(4):
                client, leg = await asked(play)
                await fill(play)
                await client.head()
                await leg.answer(
                    200, b"\x1f\x8b.", "connection: close", *[f"content-encoding: {coding}"] * bool(coding)
                )
                body, clean = await client._chunks()
                assert b"not with a stream of events" in body
                assert not clean
            assert {end.answer.outcome for end in await play.ended(4)} == {Outcome.SERVED}
            assert [worker.circuit.failures for worker in play.workers] == [0, 0]
            assert not play.router.quarantine.broken

    run(test())


@pytest.mark.parametrize("seconds", [0, 15])
def test_keepalive_workers_are_not_asked_for_compressed_streams(seconds: int) -> None:
    """Nothing can be written into a compressed stream."""

    async def test() -> None:
        async with Play(1, sse_keepalive_secs=seconds, forward_headers="all") as play:
            client = await play.client()
            await client.send(post(CHAT, STREAM, "Accept-Encoding: gzip"))
            leg = await play.leg()
            assert ("accept-encoding" in leg.headers) is (seconds == 0)
            await serve(leg)
            await is_served(client)

    run(test())


@on_loop
async def test_keepalive_not_inside_a_chunk_that_looks_ended() -> None:
    """A read that ended with an empty line inside a chunk got the comment there, and the chunks were garbled."""
    async with filling() as play:
        client, leg = await asked(play)
        content = EVENT + b"\r\n" + DONE
        await leg.send(CHUNKED + b"%x\r\n" % len(content) + EVENT + b"\r\n")
        await client.head()
        await client.until(EVENT + b"\r\n")
        await fill(play)
        await leg.send(DONE + b"\r\n0\r\n\r\n")
        assert await client.until(b"0\r\n\r\n") == DONE + b"\r\n0\r\n\r\n"
