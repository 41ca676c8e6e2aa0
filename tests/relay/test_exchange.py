"""Requests over real sockets, with clients and workers that the test plays by hand."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from played import Client, Leg, Play, narrow, post, run
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.upstream import UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.states import Breaker

CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "messages":[{"role":"user","content":"hi"}], "unknown_field": [1.50, 1e3, -0],  "x":"\\u00e9"}'

Test = Callable[[], Coroutine[Any, Any, None]]


def on_loop(test: Test) -> Callable[[], None]:
    def wrapper() -> None:
        run(test())

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper


def code(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["message"]
    return str(error["code"])


async def exchange(play: Play, client: Client, path: str = CHAT, body: bytes = BODY, *headers: str) -> Leg:
    await client.send(post(path, body, *headers))
    return await play.leg()


# -- the good way ------------------------------------------------------------------------------------------------------


@on_loop
async def test_body_passes_byte_for_byte_and_the_answer_comes_back() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        assert leg.start == f"POST {CHAT} HTTP/1.1"
        assert leg.body == BODY
        await leg.answer(201, b'{"answer": 1.0}', "x-engine: e")
        response = await client.response()
        assert (response.status, response.body, response.headers["x-engine"]) == (201, b'{"answer": 1.0}', "e")
        (end,) = await play.ended(1)
        assert (end.answer.status, end.answer.outcome, end.tag.route.endpoint, end.tag.received) == (
            201,
            Outcome.SERVED,
            "chat",
            len(BODY),
        )
        assert end.answer.sent == len(b'{"answer": 1.0}')


@on_loop
async def test_request_id_is_the_clients_or_a_new_one_and_reaches_both_sides() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client, CHAT, BODY, "X-Correlation-ID: mine-7")
        assert leg.headers["x-request-id"] == "mine-7"
        await leg.answer(200, b"{}", "x-request-id: the-workers-own")
        assert (await client.response()).headers["x-request-id"] == "mine-7"
        await client.send(post("/generate", b'{"text":"a"}'))
        await leg.request()
        await leg.answer(200)
        made = (await client.response()).headers["x-request-id"]
        assert made.startswith("gnt-")
        assert len(made) == 28
        assert leg.headers["x-request-id"] == made


@on_loop
async def test_headers_by_whitelist_and_authorization_once() -> None:
    async with Play(workers=0) as play:
        await play.add_worker(key="worker-secret")
        client = await play.client()
        sent = ("Authorization: Bearer mine", "Cookie: c=1", "X-Custom: 1", "Traceparent: 00-1", "Accept: */*")
        leg = await exchange(play, client, CHAT, BODY, *sent)
        names = [name for name, _ in leg.fields]
        assert names.count("authorization") == 1
        assert leg.headers["authorization"] == "Bearer mine"
        assert {"traceparent", "accept", "content-type", "host"} <= set(names)
        assert not {"cookie", "x-custom"} & set(names)
        await leg.answer(200)
        await client.response()
        await client.send(post(CHAT, BODY))
        await leg.request()
        assert leg.headers["authorization"] == "Bearer worker-secret"
        await leg.answer(200)
        await client.response()


@on_loop
async def test_forward_all_sends_every_end_to_end_header() -> None:
    async with Play(forward_headers="all") as play:
        client = await play.client()
        leg = await exchange(
            play, client, CHAT, BODY, "X-Custom: 1", "X-Hop: 2", "Connection: keep-alive, X-Hop", "TE: x"
        )
        assert leg.headers["x-custom"] == "1"
        assert not {"x-hop", "te", "connection"} & set(leg.headers)
        await leg.answer(200)
        await client.response()


@on_loop
async def test_stream_arrives_chunk_by_chunk_as_the_worker_sends_it() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client, CHAT, b'{"stream":true,"messages":[]}')
        await leg.start_stream()
        for word in (b"data: one\n\n", b"data: two\n\n"):
            await leg.chunk(word)
            if word == b"data: one\n\n":
                _, fields = await client.head()
                assert dict(fields)["transfer-encoding"] == "chunked"
            assert await client.chunk() == word  # before the next one is sent
        await leg.end_stream()
        assert await client.exactly(5) == b"0\r\n\r\n"
        (end,) = await play.ended(1)
        assert end.tag.streaming
        assert 0 < end.answer.first_byte <= end.answer.duration


@on_loop
async def test_connections_are_kept_on_both_sides() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        for _ in range(3):
            await leg.answer(200)
            assert (await client.response()).status == 200
            await client.send(post(CHAT, BODY))
            await leg.request()
        await leg.answer(200)
        await client.response()
        assert play.played[0].connections == 1


@on_loop
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with Play(workers=2) as play:
        client = await play.client()
        await client.send(b"".join(post("/generate", b'{"text":"%d"}' % i) for i in range(4)))
        for i in range(4):
            leg = await play.leg() if i < 2 else leg_of(play, i)
            if i >= 2:
                await leg.request()
            assert leg.body == b'{"text":"%d"}' % i
            await leg.answer(200, b"%d" % i)
        assert [(await client.response()).body for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def leg_of(play: Play, turn: int) -> Leg:
    """Return the first connection of the worker whose turn it is (round robin)."""
    return play._seen[turn % len(play.workers)]


@on_loop
async def test_http10_client_gets_plain_bytes_and_a_close() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(post(CHAT, b'{"stream":true}', version="1.0"))
        leg = await play.leg()
        await leg.start_stream()
        await leg.chunk(b"data: one\n\n")
        await leg.end_stream()
        response = await client.response()
        assert response.body == b"data: one\n\n"
        assert response.headers["connection"] == "close"
        assert "transfer-encoding" not in response.headers


@on_loop
async def test_http10_keep_alive() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(post(CHAT, BODY, "Connection: keep-alive", version="1.0"))
        leg = await play.leg()
        await leg.answer(200, b"one")
        response = await client.response()
        assert (response.body, response.headers["connection"]) == (b"one", "keep-alive")
        await client.send(post(CHAT, BODY, version="1.0"))
        await leg.request()
        await leg.answer(200, b"two")
        assert (await client.response()).body == b"two"
        await client.closed()


@on_loop
async def test_expect_100_continue() -> None:
    async with Play() as play:
        client = await play.client()
        request = post(CHAT, BODY, "Expect: 100-continue")
        await client.send(request[: -len(BODY)])
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(BODY)
        leg = await play.leg()
        assert leg.body == BODY
        assert "expect" not in leg.headers
        await leg.answer(200)
        assert (await client.response()).status == 200


@on_loop
async def test_chunked_request_reaches_the_worker_with_a_length() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(b"POST /generate HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.send(b'7\r\n{"text"\r\n5;x=y\r\n:"a"}\r\n0\r\n\r\n')
        leg = await play.leg()
        assert (leg.body, leg.headers["content-length"]) == (b'{"text":"a"}', "12")
        assert "transfer-encoding" not in leg.headers
        await leg.answer(200)
        assert (await client.response()).status == 200


@on_loop
async def test_big_body_both_ways() -> None:
    async with Play() as play:
        client = await play.client()
        body = b'{"text":"%s"}' % (b"word " * 2_000_000)
        sending = asyncio.ensure_future(client.send(post("/generate", body)))
        leg = await play.leg()
        await sending
        assert leg.body == body
        answering = asyncio.ensure_future(leg.answer(200, body))
        assert (await client.response()).body == body
        await answering


@on_loop
async def test_answer_without_length_ends_with_the_connection() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await leg.send(b" and half")
        leg.close()
        response = await client.response()
        assert (response.body, response.headers["connection"]) == (b"half and half", "close")


@on_loop
async def test_interim_responses_are_not_the_answer() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        await leg.answer(200, b"real")
        response = await client.response()
        assert (response.status, response.body) == (200, b"real")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status", "expected"),
    [
        (post(CHAT, b"{nonsense"), 400, "json_parse_error"),
        (post(CHAT, b"[]"), 400, "json_parse_error"),
        (post(CHAT, b""), 400, "json_parse_error"),
        (post(CHAT, b'{"a":NaN,}'), 400, "json_parse_error"),
        (post(CHAT, b'{"a":' + b"[" * 100_000), 400, "json_parse_error"),
        (post(CHAT, b"{}", "Content-Encoding: gzip"), 415, "unsupported_media_type"),
        (post(CHAT, b"x" * 2000), 413, "payload_too_large"),
        (
            b"POST /generate HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000,
            413,
            "payload_too_large",
        ),
        (b"GET / HTTP/1.1\r\nHost: r\r\nX: " + b"y" * 5000, 431, "head_too_large"),
        (b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\nHost: r\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: r\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431, "head_too_large"),
        (b"CONNECT r:1 HTTP/1.1\r\nHost: r\r\n\r\n", 501, "upgrade_not_supported"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 501, "upgrade_not_supported"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_http"),
    ],
)
def test_bad_requests_are_refused_and_reach_no_worker(request_bytes: bytes, status: int, expected: str) -> None:
    async def test() -> None:
        async with Play(
            max_head_bytes=4096, max_header_count=100, max_payload_size=1000_000 if b"[[" in request_bytes else 1000
        ) as play:
            client = await play.client()
            await client.send(request_bytes)
            response = await client.response()
            assert (response.status, code(response.body)) == (status, expected)
            assert response.headers["x-request-id"]
            if "connection" in response.headers:
                await client.closed()
            assert play.legs.empty()
            assert not play.played[0].connections

    run(test())


@on_loop
async def test_refusal_arrives_although_the_client_is_still_sending() -> None:
    async with Play(max_payload_size=1000) as play:
        client = await play.client()
        await client.send(b"POST /generate HTTP/1.1\r\nHost: r\r\nContent-Length: 50000000\r\n\r\n")
        client.writer.write(b"x" * 20_000_000)
        assert (await client.response()).status == 413


@on_loop
async def test_no_workers_is_503_with_retry_after() -> None:
    async with Play(workers=0) as play:
        client = await play.client()
        await client.send(post(CHAT, BODY))
        response = await client.response()
        assert (response.status, code(response.body)) == (503, "no_workers")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-smg-error-code"] == "no_workers"


# -- workers that fail -------------------------------------------------------------------------------------------------


@on_loop
async def test_worker_that_breaks_before_the_first_byte_is_retried_elsewhere() -> None:
    async with Play(workers=2) as play:
        client = await play.client()
        first = await exchange(play, client)
        first.reset()
        second = await play.leg()
        assert second.worker is not first.worker
        assert second.body == BODY
        await second.answer(200, b"saved")
        assert (await client.response()).body == b"saved"
        (end,) = await play.ended(1)
        assert end.answer.retries == 1
        assert [worker.circuit.failures for worker in play.workers] == [1, 0]
        assert play.checked == [play.workers[0]]


@on_loop
async def test_refused_connection_is_retried_elsewhere() -> None:
    async with Play(workers=2) as play:
        play.played[0].refuse()
        client = await play.client()
        leg = await exchange(play, client)
        assert leg.worker is play.played[1]
        await leg.answer(200)
        assert (await client.response()).status == 200


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_failing_status_is_retried_elsewhere(status: int) -> None:
    async def test() -> None:
        async with Play(workers=2) as play:
            client = await play.client()
            first = await exchange(play, client)
            await first.answer(status, b"broken")
            second = await play.leg()
            await second.answer(200, b"fine")
            assert (await client.response()).body == b"fine"
            assert [worker.circuit.failures for worker in play.workers] == [1, 0]
            assert [worker.processed for worker in play.workers] == [0, 1]

    run(test())


@on_loop
async def test_the_last_failing_answer_is_passed_on_unchanged() -> None:
    async with Play(workers=1, max_worker_retries=2, retry_initial_backoff_ms=1) as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(500, b"first")
        await leg.request()
        await leg.answer(500, b"second", "x-why: because")
        response = await client.response()
        assert (response.status, response.body, response.headers["x-why"]) == (500, b"second", "because")


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_4xx_passes_through_and_does_not_count(status: int) -> None:
    async def test() -> None:
        async with Play(workers=2, cb_failure_threshold=1) as play:
            client = await play.client()
            leg = await exchange(play, client)
            await leg.answer(status, b"your fault")
            response = await client.response()
            assert (response.status, response.body) == (status, b"your fault")
            assert all(worker.breaker is Breaker.CLOSED for worker in play.workers)

    run(test())


@pytest.mark.parametrize(("status", "headers"), [(429, ()), (503, ("Retry-After: 1",))])
def test_back_pressure_is_tried_elsewhere_and_is_no_failure(status: int, headers: tuple[str, ...]) -> None:
    async def test() -> None:
        async with Play(workers=2, cb_failure_threshold=1) as play:
            client = await play.client()
            first = await exchange(play, client)
            await first.answer(status, b"busy", *headers)
            second = await play.leg()
            await second.answer(status, b"busy too", *headers)
            response = await client.response()
            assert (response.status, response.body) == (status, b"busy too")
            assert all(worker.breaker is Breaker.CLOSED for worker in play.workers)

    run(test())


@on_loop
async def test_all_workers_dead_is_502_and_then_503_at_once() -> None:
    async with Play(workers=2, cb_failure_threshold=2) as play:
        for played in play.played:
            played.refuse()
        client = await play.client()
        await client.send(post(CHAT, BODY))
        response = await client.response()
        assert (response.status, code(response.body)) == (502, "worker_unreachable")
        await client.send(post(CHAT, BODY))
        response = await client.response()
        assert (response.status, code(response.body)) == (503, "no_available_workers")
        assert 1 <= int(response.headers["retry-after"]) <= 11


@pytest.mark.parametrize(
    "nonsense",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 000 ?\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
    ],
)
def test_worker_that_does_not_speak_http_is_502(nonsense: bytes) -> None:
    async def test() -> None:
        async with Play(max_total_retries=0) as play:
            client = await play.client()
            leg = await exchange(play, client)
            await leg.send(nonsense)
            response = await client.response()
            assert (response.status, code(response.body)) == (502, "worker_invalid_response")
            await leg.closed()

    run(test())


@on_loop
async def test_bytes_behind_the_answer_reach_nobody_and_end_the_connection() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.send(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
        )
        assert (await client.response()).body == b"ok"
        await leg.closed()
        leg = await exchange(play, client)
        await leg.answer(200, b"good")
        assert (await client.response()).body == b"good"
        assert play.played[0].connections == 2


@on_loop
async def test_stale_pooled_connection_is_replaced_and_nobody_is_blamed() -> None:
    async with Play(cb_failure_threshold=1, max_total_retries=0) as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(200)
        await client.response()
        await client.send(post(CHAT, BODY))
        await leg.request()
        leg.reset()  # the worker had decided to close just before the request came
        again = await play.leg()
        await again.answer(200, b"again")
        assert (await client.response()).body == b"again"
        ends = await play.ended(2)
        assert [end.answer.retries for end in ends] == [0, 0]
        assert play.workers[0].circuit.failures == 0


@on_loop
async def test_worker_that_dies_inside_a_stream_of_events() -> None:
    async with Play(workers=2) as play:
        client = await play.client()
        leg = await exchange(play, client, CHAT, b'{"stream":true}')
        await leg.start_stream()
        await leg.chunk(b"data: one\n\n")
        await client.head()
        assert await client.chunk() == b"data: one\n\n"
        leg.reset()
        body, complete = await client._chunks()
        assert not complete
        assert body.startswith(b"\n\ndata: ")
        assert code(body.strip()[6:]) == "stream_broken"
        (end,) = await play.ended(1)
        assert (end.answer.outcome, end.answer.retries) == (Outcome.CUT, 0)
        assert play.legs.empty()


@on_loop
async def test_worker_that_dies_inside_a_chunk_leaves_a_readable_error() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client, "/v1/messages", b'{"stream":true}')
        await leg.start_stream()
        await leg.chunk(b"event: x\ndata: 1\n\n")
        await client.head()
        assert await client.chunk() == b"event: x\ndata: 1\n\n"
        await leg.send(b"1e\r\nevent: x\n")
        leg.close()
        rest, clean = await client._chunks()
        assert not clean
        assert rest.startswith(b'\n\nevent: error\ndata: {"type":"error","error":{"type":"api_error"')


@on_loop
async def test_worker_that_dies_inside_a_sized_body_leaves_it_short() -> None:
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        leg.close()
        response = await client.response()
        assert (response.body, response.complete) == (b"half", False)


@on_loop
async def test_silent_worker_is_504_and_is_not_retried() -> None:
    async with Play(workers=2, request_timeout_secs=0.05) as play:
        client = await play.client()
        leg = await exchange(play, client)
        response = await client.response()
        assert (response.status, code(response.body)) == (504, "request_overdue")
        await leg.closed()
        assert play.legs.empty()


@on_loop
async def test_return_to_a_failed_worker_comes_after_a_pause() -> None:
    async with Play(
        max_worker_retries=3, retry_initial_backoff_ms=50, retry_max_backoff_ms=50, retry_jitter_factor=0.0
    ) as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(500)
        began = play.loop.time()
        await leg.request()
        assert play.loop.time() - began >= 0.04
        await leg.answer(200)
        assert (await client.response()).status == 200


# -- clients that misbehave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_client_that_leaves_frees_the_worker_at_once(streaming: bool) -> None:
    async def test() -> None:
        async with Play() as play:
            client = await play.client()
            leg = await exchange(play, client, CHAT, b'{"stream":true}' if streaming else b"{}")
            assert play.workers[0].load == 1
            if streaming:
                await leg.start_stream()
                await leg.chunk(b"data: 1\n\n")
                await client.head()
            client.close()
            await leg.closed()
            (end,) = await play.ended(1)
            assert end.answer.outcome is Outcome.GONE
            assert play.workers[0].load == 0
            assert play.workers[0].circuit.failures == 0

    run(test())


@on_loop
async def test_client_that_leaves_during_the_pause_before_a_retry() -> None:
    async with Play(retry_initial_backoff_ms=30000, retry_max_backoff_ms=30000) as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(500)
        await play.until(lambda: len(play.events.routes) == 2)
        client.close()
        (end,) = await play.ended(1)
        assert end.answer.outcome is Outcome.GONE
        assert play.workers[0].load == 0


@on_loop
async def test_client_that_leaves_while_the_connection_is_being_made() -> None:
    async with Play() as play:
        client = await play.client()
        await client.send(post(CHAT, BODY))
        client.reset()
        (end,) = await play.ended(1)
        assert end.answer.outcome is Outcome.GONE


@on_loop
async def test_slow_reader_pauses_its_worker_and_memory_stays_bounded() -> None:
    async with Play() as play:
        client = await play.client(limit=65536)
        leg = await exchange(play, client, CHAT, b'{"stream":true}')
        connection, upstream = play.narrow(client), upstream_of(play)
        for transport in (upstream, leg.writer.transport):
            narrow(transport.get_extra_info("socket"))
        await leg.start_stream()
        chunk, count = b"10000\r\n%s\r\n" % (b"x" * 65536), 200  # far more than all buffers take
        leg.writer.write(chunk * count)
        await play.until(lambda: connection.stalled and not upstream.is_reading())
        for _ in range(1000):  # and it stays so
            await asyncio.sleep(0)
        assert connection.transport.get_write_buffer_size() < 1 << 20
        assert leg.writer.transport.get_write_buffer_size() > count // 2 * 65536  # the rest is still the worker's
        reading = asyncio.ensure_future(client.response())
        await leg.send(b"0\r\n\r\n")
        response = await reading
        assert response.complete
        assert len(response.body) == count * 65536


def upstream_of(play: Play) -> asyncio.Transport:
    """Return the router's end of the connection to the worker of the only request."""
    (connection,) = play.clients.connections
    assert isinstance(connection, ClientConnection)
    assert isinstance(connection.exchange, Exchange)
    (leg,) = connection.exchange.legs
    assert isinstance(leg.connection, UpstreamConnection)
    return leg.connection.transport


@on_loop
async def test_slow_head_is_408_however_it_drips() -> None:
    async with Play(head_timeout_secs=0.2) as play:
        client = await play.client()

        async def drip() -> None:
            for byte in post(CHAT, BODY):
                client.writer.write(bytes((byte,)))
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        response = await client.response()
        assert (response.status, code(response.body)) == (408, "request_timeout")
        dripping.cancel()


@on_loop
async def test_silence_inside_a_body_is_408() -> None:
    async with Play(body_timeout_secs=0.1) as play:
        client = await play.client()
        await client.send(post(CHAT, BODY)[:-5])
        assert (await client.response()).status == 408
        assert play.legs.empty()


@on_loop
async def test_idle_connection_is_closed_without_a_word() -> None:
    async with Play(keepalive_timeout_secs=0.1) as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(200)
        await client.response()
        await client.closed()


# -- waiting -----------------------------------------------------------------------------------------------------------


@on_loop
async def test_request_waits_while_every_worker_is_starting() -> None:
    async with Play(healthy=False) as play:
        client = await play.client()
        await client.send(post(CHAT, BODY))
        await play.until(lambda: len(play.router.queue) == 1)
        play.fleet.probed(play.workers[0], None, play.clock())
        leg = await play.leg()
        await leg.answer(200)
        assert (await client.response()).status == 200


@on_loop
async def test_request_does_not_wait_for_ever() -> None:
    async with Play(healthy=False, startup_wait_secs=0.05) as play:
        client = await play.client()
        await client.send(post(CHAT, BODY))
        response = await client.response()
        assert (response.status, code(response.body)) == (503, "workers_starting")


@on_loop
async def test_client_that_leaves_while_it_waits() -> None:
    async with Play(healthy=False) as play:
        client = await play.client()
        await client.send(post(CHAT, BODY))
        await play.until(lambda: len(play.router.queue) == 1)
        client.close()
        (end,) = await play.ended(1)
        assert end.answer.outcome is Outcome.GONE
        assert not len(play.router.queue)


def waiting(play: Play, count: int) -> bool:
    return len(play.router.queue) == count


@on_loop
async def test_those_that_wait_are_few_enough_to_remember_and_go_in_order() -> None:
    async with Play(healthy=False, max_concurrent_requests=1, queue_size=2) as play:
        clients = [await play.client() for _ in range(4)]
        for n, client in enumerate(clients[:3], 1):
            await client.send(post(CHAT, BODY + b" " * n))
            await play.until(partial(waiting, play, n))
        await clients[3].send(post(CHAT, BODY))
        response = await clients[3].response()
        assert (response.status, code(response.body)) == (429, "too_many_waiting")
        assert response.headers["retry-after"] == "5"
        play.fleet.probed(play.workers[0], None, play.clock())
        for _ in clients[:3]:
            leg = await play.leg()
            await leg.answer(200, b"{}", "connection: close")
            leg.close()
        assert [event.tag.received - len(BODY) for event in play.events.routes] == [1, 2, 3]
        assert [(await client.response()).status for client in clients[:3]] == [200] * 3


@on_loop
async def test_what_waits_for_its_first_byte_is_counted() -> None:
    async with Play(healthy=False) as play:
        quiet = play.clients.unanswered()
        assert (quiet.requests, quiet.held, quiet.size, quiet.oldest) == (0, 0, 0, 0.0)
        client = await play.client()
        await client.send(post(CHAT, b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'))
        await play.until(lambda: len(play.router.queue) == 1)
        held = play.clients.unanswered()
        assert (held.requests, held.held) == (1, 1)
        assert held.size > 0
        play.fleet.probed(play.workers[0], None, play.clock())
        leg = await play.leg()
        sent = play.clients.unanswered()
        assert (sent.requests, sent.held) == (1, 0)
        assert sent.oldest > held.oldest
        await leg.answer(200)
        await client.response()
        assert play.clients.unanswered().requests == 0


# -- removal and load --------------------------------------------------------------------------------------------------


@on_loop
async def test_removed_worker_finishes_its_requests_and_gets_no_more() -> None:
    async with Play(workers=2) as play:
        client = await play.client()
        leg = await exchange(play, client)
        play.fleet.remove(play.workers[0])
        others = [await play.client() for _ in range(3)]
        for other in others:
            second = await exchange(play, other)
            assert second.worker is play.played[1]
        for second in play._seen[1:]:
            await second.answer(200)
        for other in others:
            assert (await other.response()).status == 200
        await leg.answer(200, b"finished")
        assert (await client.response()).body == b"finished"


@on_loop
async def test_burst_at_once_spreads_because_load_counts_at_the_decision() -> None:
    async with Play(workers=4, policy="least_load") as play:
        clients = [await play.client() for _ in range(40)]
        for client in clients:
            await client.send(post(CHAT, BODY))
        await play.until(lambda: play.clients.active == 40)
        assert [worker.load for worker in play.workers] == [10, 10, 10, 10]
        for _ in clients:
            await (await play.leg()).answer(200)
        for client in clients:
            assert (await client.response()).status == 200


@on_loop
async def test_a_served_request_leaves_no_cycle_for_the_garbage_collector() -> None:
    """Cycles would stay until a collection, which stops the event loop."""
    async with Play() as play:
        client = await play.client()
        leg = await exchange(play, client)
        await leg.answer(200)
        await client.response()
        gc.collect()
        gc.disable()
        try:
            for body in (BODY, b'{"stream":true}', b"no JSON"):
                await client.send(post(CHAT, body))
                if body != b"no JSON":
                    await leg.request()
                    await leg.answer(200)
                await client.response()
            assert gc.collect() == 0
        finally:
            gc.enable()
