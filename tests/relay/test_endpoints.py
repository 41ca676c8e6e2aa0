"""Every relayed path: what passes unchanged, who answers, what is sent once, streams of lines, and unknown paths."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from played import Client, Leg, Play, Response, post, run
from sglang_router.config.keys import ClientKey
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.spec import WorkerSpec

FORM = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
LINES = "application/x-ndjson"
LINE = b'{"model":"m","response":"Hi","done":false}\n'
FAILURE = b'{"error":"boom"}\n'
ENDPOINT_METHODS = [(row, method) for row in ENDPOINTS.values() if not row.tunnel for method in row.methods]
ONCE = [row for row in ENDPOINTS.values() if row.once]


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return functools.wraps(test)(wrapper)


def place(row: Endpoint) -> str:
    """A path of this row."""
    path = row.path.decode()
    for name in ("{id}", "{item}", "{name}", "{slot}"):
        path = path.replace(name, "a%2Fb.1" if name == "{id}" else "1")
    return path


def bare(method: str, target: str, body: bytes = b"") -> bytes:
    """A request without a content type."""
    return f"{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def asked(row: Endpoint, method: str = "POST") -> bytes:
    """A request for this row."""
    body = b"" if method != "POST" else FORM if row.form else b'{"model":"m", "x" : 1e2}'
    return bare(method, place(row) + "?q=1", body)


async def sent(client: Client, request: bytes, play: Play) -> Leg:
    await client.send(request)
    return await play.leg()


async def answered(leg: Leg, client: Client, status: int = 200, body: bytes = b"{}", *headers: str) -> Response:
    """Answer on a connection that is closed then, so that each request has one of its own."""
    await leg.answer(status, body, "connection: close", *headers)
    leg.close()
    return await client.response()


# -- the table ---------------------------------------------------------------------------------------------------------


@on_loop
async def test_every_row_is_relayed_unchanged() -> None:
    async with Play(1) as play:
        client = await play.client()
        for number, (row, method) in enumerate(ENDPOINT_METHODS, 1):
            request = asked(row, method.decode())
            leg = await sent(client, request, play)
            assert leg.start == f"{method.decode()} {place(row)}?q=1 HTTP/1.1"
            assert leg.body == request.partition(b"\r\n\r\n")[2]
            response = await answered(leg, client, 200, b'{"n": 1.50}')
            assert (response.status, response.body) == (200, b'{"n": 1.50}')
            end = (await play.ended(number))[-1]
            assert (end.tag.route.endpoint, end.tag.route.method) == (row.name, method.decode())


@on_loop
async def test_every_json_row_refuses_reserved_fields_and_what_is_no_json() -> None:
    async with Play(1) as play:
        client = await play.client()
        for row in (row for row in ENDPOINTS.values() if row.json):
            for body, code in ((b'{"bootstrap_host":"h"}', "reserved_field"), (b"[1]", "json_parse_error")):
                await client.send(post(place(row), body))
                response = await client.response()
                assert (response.status, response.headers["x-smg-error-code"]) == (400, code), row
        assert play.legs.empty()


@on_loop
async def test_an_error_has_the_shape_that_clients_of_the_path_know() -> None:
    async with Play(1) as play:
        client = await play.client()
        for path in ("/api/chat", "/v1/messages/count_tokens", "/v1/chat/completions"):
            await client.send(post(path, b"[1]"))
            error = json.loads((await client.response()).body)
            if path == "/api/chat":
                assert set(error) == {"error"}
                assert error["error"].startswith("The body is not a JSON object")
            else:
                assert error["error"]["type"] == "invalid_request_error"
                assert ("type" in error) == path.startswith("/v1/messages")


@on_loop
async def test_with_several_models_a_request_goes_where_it_may_be_answered() -> None:
    async with Play(0) as play:
        for model in ("a", "b"):
            await play.add_worker()
            play.fleet.remove(play.workers.pop())
            worker = play.fleet.add(WorkerSpec(url=play.played[-1].url, model_id=model), play.clock())
            play.fleet.probed(worker, None, play.clock())
            play.workers.append(worker)
        client = await play.client()
        for request, port in (
            (post("/tokenize", b'{"model":"b","prompt":"x"}'), 1),
            (bare("GET", "/props?model=b"), 1),
            (bare("GET", "/slots?x=1&model=%62&y=2"), 1),
            (bare("GET", "/props"), 0),
            (bare("POST", "/v1/files?model=b", b"unread"), 1),
            (post("/parse_function_call", b'{"text":"x"}'), 0),
            (post("/parse/reasoning", b'{"text":"x","model":"b"}'), 1),
        ):
            leg = await sent(client, request, play)
            assert leg.worker is play.played[port], request
            assert (await answered(leg, client)).status == 200
        for request, status in (
            (post("/tokenize", b'{"prompt":"x"}'), 400),
            (bare("GET", "/props?model=c"), 404),
            (post("/api/chat", b'{"model":"c"}'), 404),
        ):
            await client.send(request)
            assert (await client.response()).status == status


@pytest.mark.parametrize(
    "target",
    [
        *("/v1/files/..", "/v1/files/.", "/v1/files/../content", "/v1/files/%2e%2E", "/v1/responses/.%2e/input_items"),
        *("/v1/files/..%2F..%2Fflush_cache", "/v1/files/a%2f..%2f..%2fmetrics", "/v1/files/a%5C..%5Cb/content"),
    ],
)
@on_loop
async def test_no_id_leads_to_another_path(target: str) -> None:
    async with Play(1) as play:
        client = await play.client()
        await client.send(bare("GET", target))
        response = await client.response()
        assert (response.status, response.headers["x-smg-error-code"]) == (404, "not_found")
        assert play.legs.empty()


@on_loop
async def test_an_id_may_have_dots() -> None:
    async with Play(1) as play:
        client = await play.client()
        for target in ("/v1/files/a..b", "/v1/files/...", "/v1/files/.a", "/v1/responses/a%2Fb.c"):
            leg = await sent(client, bare("GET", target), play)
            assert leg.start.split()[1] == target
            assert (await answered(leg, client)).status == 200


# -- HEAD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ("content-length: 7000\r\n", ("content-length", "7000")),
        ("content-length: 7000\r\nconnection: keep-alive\r\n", ("content-length", "7000")),
        ("transfer-encoding: chunked\r\n", None),
        ("", None),
    ],
)
@on_loop
async def test_an_answer_to_head_has_no_body(fields: str, shown: tuple[str, str] | None) -> None:
    async with Play(1) as play:
        client = await play.client()
        leg = await sent(client, bare("HEAD", "/v1/files/f-1/content"), play)
        assert leg.start == "HEAD /v1/files/f-1/content HTTP/1.1"
        for again in (True, False):
            await leg.send(f"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n{fields}\r\n".encode())
            start, got = await client.head()
            assert start == "HTTP/1.1 200 OK"
            assert dict(got).get("content-length") == (shown and shown[1])
            assert "transfer-encoding" not in dict(got)
            await client.send(bare("HEAD", "/v1/files/f-1/content") if again else bare("GET", "/props"))
            await leg.request()  # on the same connection: nothing is waited for
        await leg.answer(200)
        assert (await client.response()).body == b"{}"


# -- sent once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ONCE, ids=repr)
@on_loop
async def test_what_a_worker_may_have_taken_is_not_sent_to_another(row: Endpoint) -> None:
    async with Play(2) as play:
        client = await play.client()
        leg = await sent(client, asked(row), play)
        leg.reset()
        assert (await client.response()).status == 502
        leg = await sent(client, asked(row), play)
        assert (await answered(leg, client, 500)).status == 500
        assert play.legs.empty()
        assert [end.answer.retries for end in await play.ended(2)] == [0, 0]


@pytest.mark.parametrize("row", ONCE, ids=repr)
@on_loop
async def test_what_no_worker_has_taken_is_sent_to_another(row: Endpoint) -> None:
    async with Play(2) as play:
        client = await play.client()
        first = await sent(client, asked(row), play)
        await first.answer(503, b"{}", "retry-after: 1")
        second = await play.leg()
        assert second.worker is not first.worker
        await second.answer(200)
        assert (await client.response()).status == 200
        play.played[0].refuse()
        for _ in range(2):
            leg = await sent(client, asked(row), play)
            assert leg.worker is play.played[1]
            assert (await answered(leg, client)).status == 200


@on_loop
async def test_what_is_sent_once_never_goes_on_a_kept_connection() -> None:
    async with Play(1) as play:
        client = await play.client()
        for number in (1, 2):
            leg = await sent(client, bare("POST", "/v1/files"), play)
            await leg.answer(200)
            assert (await client.response()).status == 200
            assert play.played[0].connections == number
        await client.send(bare("GET", "/v1/files/f-1"))
        await leg.request()
        await leg.answer(200)
        assert (await client.response()).status == 200
        assert play.played[0].connections == 2


@pytest.mark.parametrize(
    ("broke", "other", "requests"),
    [
        (bare("GET", "/v1/files/file-1"), bare("GET", "/v1/files/file-2"), 1),
        (bare("GET", "/v1/responses/resp_1"), bare("DELETE", "/v1/responses/resp_1"), 1),
        (bare("GET", "/unheard?of=1"), bare("GET", "/unheard?of=2"), 1),
        (bare("POST", "/one"), bare("POST", "/two"), 2),
        (bare("POST", "/slots/1?action=save"), bare("POST", "/slots/2?action=save"), 2),
    ],
)
@on_loop
async def test_a_request_without_a_body_that_broke_workers_does_not_stand_for_all_others(
    broke: bytes, other: bytes, requests: int
) -> None:
    """Two engines that ended while they were asked for one file made the router refuse all clients all files.

    requests  how many it takes to break two workers
    """
    async with Play(4, relay_unknown_paths=True, disable_circuit_breaker=True) as play:
        client = await play.client()
        for _ in range(requests):
            await client.send(broke)
            for _ in range(2 // requests):
                (await play.leg()).reset()
            assert (await client.response()).status == 502
        await client.send(broke)
        assert (await client.response()).status == 422
        leg = await sent(client, other, play)
        assert (await answered(leg, client)).status == 200


@on_loop
async def test_a_small_question_is_retried() -> None:
    async with Play(2) as play:
        client = await play.client()
        (await sent(client, post("/tokenize", b'{"prompt":"x"}'), play)).reset()
        assert (await answered(await play.leg(), client)).status == 200


# -- what workers keep -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "answer", "about"),
    [
        ("/v1/files", b'{"id":"file-1","object":"file","filename":"a {"}', "/v1/files/file-1"),
        ("/v1/files", b'{"object":"file","id":"backend:9~x"}', "/v1/files/backend:9~x/content"),
        ("/v1/batches", b'{"id":"batch_1","errors":{"id":"no"}}', "/v1/batches/batch_1"),
        (
            "/v1/conversations",
            b'{"id": "conv_1", "metadata":{"id":"conv_2"}}',
            "/v1/conversations/conv_1/items?limit=3",
        ),
        ("/v1/responses", b'{"id":"resp_1","output":[]}', "/v1/responses/resp_1/input_items"),
    ],
)
@on_loop
async def test_who_has_made_something_is_asked_about_it(create: str, answer: bytes, about: str) -> None:
    async with Play(5) as play:
        client = await play.client()
        leg = await sent(client, post(create, b"{}"), play)
        made_by = leg.worker
        await answered(leg, client, 200, answer)
        for _ in range(4):
            leg = await sent(client, bare("GET", about), play)
            assert leg.worker is made_by
            assert (await answered(leg, client)).status == 200


@on_loop
async def test_a_batch_goes_where_its_file_is_or_looks_for_it() -> None:
    async with Play(4) as play:
        client = await play.client()
        leg = await sent(client, bare("POST", "/v1/files", FORM), play)
        home = leg.worker
        await answered(leg, client, 200, b'{"id":"file-1"}')
        for name in ("file-1", "file-1"):
            leg = await sent(client, post("/v1/batches", json.dumps({"input_file_id": name}).encode()), play)
            assert leg.worker is home
            await answered(leg, client, 200, b'{"id":"batch_1"}')
        leg = await sent(client, post("/v1/batches", b'{"input_file_id":"file-2"}'), play)
        asked_of = []
        for _ in range(4):
            asked_of.append(leg.worker)
            await leg.answer(404, b"{}", "connection: close")
            leg.close()
            if len(asked_of) < 4:
                leg = await play.leg()
        assert (await client.response()).status == 404
        assert len(set(asked_of)) == 4


@on_loop
async def test_a_file_is_streamed_as_it_comes() -> None:
    async with Play(1) as play:
        client = await play.client()
        leg = await sent(client, bare("GET", "/v1/files/f-1/content"), play)
        await leg.start_stream("application/octet-stream")
        for part in (b'{"a":1}\n{"b"', b":2}\n"):
            await leg.chunk(part)
            if part.startswith(b"{"):
                assert (await client.head())[0] == "HTTP/1.1 200 OK"
            assert await client.chunk() == part
        await leg.end_stream()
        assert await client.until(b"0\r\n\r\n")


# -- streams of lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@on_loop
async def test_a_stream_of_lines_begins_with_its_first_line(path: str) -> None:
    async with Play(2) as play:
        client = await play.client()
        first = await sent(client, post(path, b'{"model":"m","prompt":"hi"}'), play)
        await first.start_stream(LINES)
        await first.chunk(LINE[:9])
        await play.until(lambda: not play.events.firsts)
        first.reset()  # nothing of it reached the client
        second = await play.leg()
        await second.start_stream(LINES)
        await second.chunk(LINE[:9])
        await second.chunk(LINE[9:])
        assert (await client.head())[0] == "HTTP/1.1 200 OK"
        assert await client.chunk() + await client.chunk() == LINE
        await play.until(lambda: len(play.events.firsts) == 1)
        (exchange,) = play.clients.exchanges
        assert exchange.tag.streaming  # type: ignore[attr-defined]
        await second.chunk(b'{"done":true}\n')
        assert await client.chunk() == b'{"done":true}\n'
        await second.end_stream()
        assert await client.until(b"0\r\n\r\n")
        (end,) = await play.ended(1)
        assert (end.tag.streaming, end.answer.retries, end.answer.outcome) == (True, 1, Outcome.SERVED)


@pytest.mark.parametrize("parts", [(b'{"error":"model runner has ended"}\n',), (b'\n {"err', b'or" : "full"}\n')])
@on_loop
async def test_a_first_line_that_is_an_error_is_retried_and_reaches_the_client_with_a_status(
    parts: tuple[bytes, ...],
) -> None:
    async with Play(2) as play:
        client = await play.client()
        for last in (False, True):
            await client.send(post("/api/chat", b'{"messages":[]}'))
            for _ in range(2 if last else 1):
                leg = await play.leg()
                await leg.start_stream(LINES)
                for part in parts:
                    await leg.chunk(part)
            if not last:
                leg = await play.leg()
                await leg.answer(200, LINE, "connection: close")
                leg.close()
                assert (await client.response()).body == LINE
        response = await client.response()
        assert response.status == 500
        assert set(json.loads(response.body)) == {"error"}


@pytest.mark.parametrize(
    "framed",
    [
        b"transfer-encoding: chunked\r\n\r\n11\r\n" + FAILURE + b"\r\n0\r\n\r\n",
        b"content-length: 17\r\n\r\n" + FAILURE,
        b"content-length: 16\r\n\r\n" + FAILURE[:-1],
    ],
)
@on_loop
async def test_a_line_that_is_an_error_is_retried_also_where_the_answer_ends_with_it(framed: bytes) -> None:
    async with Play(2) as play:
        client = await play.client()
        leg = await sent(client, post("/api/chat", b'{"messages":[]}'), play)
        await leg.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n" + framed)
        leg = await play.leg()
        await leg.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n%b" % (len(LINE), LINE)
        )
        response = await client.response()
        assert (response.status, response.body) == (200, LINE)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("parts", "told"),
    [((LINE,), True), ((LINE, LINE), True), ((LINE, LINE[:-1]), False), ((LINE, LINE[:20]), False)],
    ids=["a line", "two lines", "no end of line", "half a line"],
)
@on_loop
async def test_a_stream_of_lines_that_breaks_ends_with_an_error_but_not_cleanly(
    parts: tuple[bytes, ...], told: bool, version: str
) -> None:
    async with Play(2) as play:
        client = await play.client()
        leg = await sent(client, post("/api/generate", b'{"prompt":"hi"}', version=version), play)
        await leg.start_stream(LINES)
        for part in parts:
            await leg.chunk(part)
        exchange: Any = next(iter(play.clients.exchanges))
        end = parts[-1].rstrip()
        await play.until(lambda: exchange.shown is not None and exchange.shown.last.rstrip(b"\r\n").endswith(end))
        leg.reset()
        response = await client.response()
        assert response.body.startswith(b"".join(parts))
        rest = response.body.removeprefix(b"".join(parts))
        assert set(json.loads(rest)) == {"error"} if told else not rest
        assert response.complete == (version == "1.0"), "without a length nobody can see the break"
        assert play.legs.empty()


@on_loop
async def test_a_long_first_line_is_passed_on_as_it_comes() -> None:
    async with Play(1) as play:
        client = await play.client()
        leg = await sent(client, post("/api/chat", b"{}"), play)
        await leg.start_stream(LINES)
        await leg.chunk(b'{"response":"' + b"x" * 70_000)
        assert (await client.head())[0] == "HTTP/1.1 200 OK"
        await leg.chunk(b'"}\n')
        await leg.end_stream()
        assert (await client.until(b'"}\n\r\n0\r\n\r\n')).count(b"x") >= 70_000


@on_loop
async def test_no_event_fills_the_silence_of_lines() -> None:
    async with Play(1, sse_keepalive_secs=0.01) as play:
        keepalives = play.app.keepalives
        assert keepalives is not None
        client = await play.client()
        leg = await sent(client, post("/api/chat", b"{}"), play)
        other = await play.client()
        events = await sent(other, post("/v1/chat/completions", b'{"stream":true}'), play)

        async def fill() -> None:
            while True:
                keepalives.look()
                await asyncio.sleep(0.005)

        filling = asyncio.ensure_future(fill())
        assert (await other.head())[0] == "HTTP/1.1 200 OK"
        assert await other.chunk() == b": keep-alive\n\n"
        filling.cancel()
        await leg.answer(200, LINE)
        assert (await client.response()).body == LINE
        events.close()


# -- unknown paths -----------------------------------------------------------------------------------------------------

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


@on_loop
async def test_unknown_paths_are_not_relayed_unless_that_is_asked_for() -> None:
    async with Play(1, app=None) as play:
        client = await play.client()
        for method in METHODS:
            await client.send(bare(method, "/v1/fine_tuning/jobs"))
            assert (
                (await client.head())[0].startswith("HTTP/1.1 404")
                if method == "HEAD"
                else ((await client.response()).status == 404)
            )
        assert play.legs.empty()


@on_loop
async def test_unknown_paths_are_relayed_unread_with_any_method() -> None:
    async with Play(1, app=None, relay_unknown_paths=True) as play:
        client = await play.client()
        for number, method in enumerate(METHODS, 1):
            body = b"" if method in ("GET", "HEAD", "OPTIONS") else b'not JSON {"bootstrap_host":1}'
            leg = await sent(client, bare(method, "/v1/fine_tuning/jobs/%C3%BC?x=1", body), play)
            assert (leg.start, leg.body) == (f"{method} /v1/fine_tuning/jobs/%C3%BC?x=1 HTTP/1.1", body)
            await leg.answer(200, b"" if method == "HEAD" else b"[1]", "connection: close")
            leg.close()
            if method == "HEAD":
                assert (await client.head())[0] == "HTTP/1.1 200 Said"
            else:
                assert (await client.response()).body == b"[1]"
            end = (await play.ended(number))[-1]
            assert (end.tag.route.endpoint, end.tag.route.method) == ("unknown", method)


@pytest.mark.parametrize(
    "target",
    [
        *("/flush_cache", "/%66lush_cache", "/flush_cache/", "/Flush_Cache", "//flush_cache", "/x/../flush_cache"),
        *("/workers", "/workers/", "/workers/a/b", "/add_worker?url=x", "/metrics", "/v1/models/m", "/decisions/x/y"),
        *("/v1/chat%2Fcompletions", "/v1/chat/completions/", "/v1/responses/r-1/", "/v1/files/"),
        *("/..", "/a/..", "/a/%2e%2e/b", "/a/%252e%252e/b", "/a/./b", "/a//b", "/a%5Cb", "/a%00b", "/a%20b"),
    ],
)
@on_loop
async def test_no_spelling_of_a_path_of_the_router_reaches_a_worker(target: str) -> None:
    async with Play(1, app=None, relay_unknown_paths=True) as play:
        client = await play.client()
        for method in ("PATCH", "OPTIONS"):
            await client.send(bare(method, target))
            assert (await client.response()).status in (404, 405)
        assert play.legs.empty()


@on_loop
async def test_other_methods_of_known_paths_stay_refused() -> None:
    async with Play(1, app=None, relay_unknown_paths=True) as play:
        client = await play.client()
        for method, target in (("PUT", "/v1/chat/completions"), ("PUT", "/v1/responses/r-1"), ("PATCH", "/v1/files")):
            await client.send(bare(method, target))
            assert (await client.response()).status == 405
        await client.send(b"TRACE /x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await client.response()).status == 404
        assert play.legs.empty()


@on_loop
async def test_an_unknown_path_is_asked_again_only_if_that_changes_nothing() -> None:
    async with Play(2, app=None, relay_unknown_paths=True) as play:
        client = await play.client()
        (await sent(client, bare("GET", "/v1/jobs"), play)).reset()
        assert (await answered(await play.leg(), client)).status == 200
        (await sent(client, bare("PUT", "/v1/jobs", b"1"), play)).reset()
        assert (await client.response()).status == 502
        assert play.legs.empty()


@on_loop
async def test_browsers_questions_are_answered_by_the_router_and_keys_are_needed_for_the_rest() -> None:
    options: dict[str, Any] = {
        "cors_allowed_origins": ["http://a.example"],
        "api_key": [ClientKey("someone", "client-key")],
    }
    async with Play(1, app=None, relay_unknown_paths=True, **options) as play:
        client = await play.client()
        fields = "Origin: http://a.example\r\nAccess-Control-Request-Method: PUT\r\n"
        await client.send(f"OPTIONS /v1/jobs HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode())
        preflight = await client.response()
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, "http://a.example")
        await client.send(bare("GET", "/v1/jobs"))
        assert (await client.response()).status == 401
        await client.send(b"GET /v1/jobs HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer client-key\r\n\r\n")
        leg = await play.leg()
        assert "authorization" not in leg.headers
        assert (await answered(leg, client)).status == 200
