"""Clients that are slow, many, silent or greedy. Each is answered or closed, and no other client is affected."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from hostile.arena import PATIENCE, Arena, Client, Leg, arena, post

IDLE = 1000
CHURN = 1000
FLOODED = 20
MOST_PER_CLIENT = 1 << 20
"""Most bytes that the router may hold for one client that does not read: one read of the worker, and what the client's
transport buffers before it pauses."""
EVENT = b"data: " + b"x" * 4000 + b"\n\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
LONG = b"x" * 3_000_000 + b"."
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def flood(leg: Leg) -> None:
    """Send events without end."""
    await leg.send(STREAM)
    while True:
        await leg.send(CHUNK * 8)


def dripped(field: Arena, client: Client, data: Iterator[bytes]) -> None:
    """Send in small pieces, one per iteration of the router's loop, until the router answers."""
    client.sock.setblocking(False)
    for bit in data:
        client.send(bit)
        field.settle()
        with contextlib.suppress(BlockingIOError, ConnectionError):
            if client.sock.recv(1, socket.MSG_PEEK):
                break
    client.sock.settimeout(PATIENCE)


def endless(start: bytes, more: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield more


# -- slow --------------------------------------------------------------------------------------------------------------


def test_slow_header(field: Arena) -> None:
    """However slowly the bytes come: the time for a head counts from its first byte."""
    with field.polite(), field.connect() as client:
        begun = time.monotonic()
        dripped(field, client, endless(b"POST /generate HTTP/1.1\r\nHost: x\r\nA: ", b"b"))
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert time.monotonic() - begun < 10.0
        assert client.ended()


def test_slow_header_of_many(field: Arena) -> None:
    """Several clients that stop in the middle of a head; each gets an error and loses its connection."""
    with field.polite(), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(field.connect()) for _ in range(200)]
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\nHost:")
        answers = [client.answer() for client in clients]
        assert {answer.status for answer in answers if answer is not None} == {408}
        assert all(client.ended() for client in clients)


@pytest.mark.parametrize(
    "body", [b"Content-Length: 9\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhe"], ids=repr
)
def test_body_that_stops(field: Arena, body: bytes) -> None:
    with field.polite(), field.connect() as client:
        client.send(b"POST /generate HTTP/1.1\r\nHost: x\r\n" + body)
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert client.ended()


def test_slow_reader(field: Arena) -> None:
    """One byte at a time, while many polite requests are served: its worker is paused, all its bytes are correct."""
    field.worker.lies["long"] = SIZED % len(LONG) + LONG
    with field.polite() as polite, field.connect(receive_buffer=4096) as client:
        client.send(post("/generate?lie=long"))
        got = b""
        while len(polite.waits) < 100:
            got += client.sock.recv(1)
            field.settle()
        while not got.endswith(b"x" * 10 + b"."):
            piece = client.sock.recv(1 << 16)
            assert piece
            got += piece
        assert got.partition(b"\r\n\r\n")[2] == LONG


def test_clients_that_never_read_a_flood(field: Arena) -> None:
    """The worker would send for ever; the router reads as much as it may hold, and no more until the client reads."""
    field.worker.lies["flood"] = flood
    field.worker.sent["flood"] = 0
    with field.polite(), contextlib.ExitStack() as stack:
        before = field.rss
        clients = [stack.enter_context(field.connect(receive_buffer=4096)) for _ in range(FLOODED)]
        for client in clients:
            client.send(post("/generate?lie=flood", b'{"stream": true}'))
        sent, steady = 0, 0
        while steady < 50:  # iterations in a row in which nothing was read from any worker
            field.settle()
            steady, sent = (steady + 1 if field.worker.sent["flood"] == sent else 0), field.worker.sent["flood"]
        assert field.rss - before < FLOODED * MOST_PER_CLIENT
        for client in clients:
            client.reset()
    field.until(lambda: field.router.worker(field.worker.url)["load"] == 0)


@pytest.mark.parametrize("lie", ["flood", "long"])
def test_clients_that_never_read_are_cut_in_the_end(brief: Arena, lie: str) -> None:
    """After the timeouts of a request and an idle connection, the router keeps no bytes and no descriptor for them."""
    brief.worker.lies |= {"flood": flood, "long": SIZED % len(LONG) + LONG}
    with contextlib.ExitStack() as stack:
        before = brief.sockets
        for _ in range(10):
            client = stack.enter_context(brief.connect(receive_buffer=4096))
            client.send(post(f"/generate?lie={lie}", b'{"stream": true}'))
        brief.router.until(lambda: brief.sockets >= before + 10)
        brief.router.until(lambda: brief.sockets < before + 5, 5.0)


# -- many --------------------------------------------------------------------------------------------------------------


def test_idle_connections(field: Arena) -> None:
    """Each was served and is idle: they cost some memory, all of them can send again, and all are closed in the end."""
    request = post("/generate", b"no JSON")
    before, memory = field.sockets, field.rss
    with contextlib.ExitStack() as stack:
        clients: list[Client] = []

        def are_answered() -> None:
            for client in clients:
                answer = client.answer()
                assert answer is not None
                assert answer.code == "json_parse_error", answer

        with field.polite():
            for _ in range(IDLE):
                clients.append(stack.enter_context(field.connect()))
                clients[-1].send(request)  # at once: the time for the first head counts from the connection
            are_answered()
            for client in clients:
                client.send(request)
            are_answered()
            assert field.sockets >= before + IDLE
        assert field.rss - memory < IDLE * 50_000
    field.until(lambda: field.sockets <= before + 2)  # the polite client's, and its worker's


def test_connection_churn(field: Arena) -> None:
    """Closed at once, in the middle of a head or a body, with a reset, before the answer."""
    leavings = [
        b"",
        b"POST /gen",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        post("/generate"),
    ]
    before = field.sockets
    with field.polite():
        for number in range(CHURN):
            client = field.connect()
            client.send(leavings[number % 4])
            if number % 8 < 4:
                client.reset()
            else:
                client.close()
    field.until(lambda: field.sockets <= before + 20)  # connections to the worker that are kept
    field.until(lambda: field.router.worker(field.worker.url)["load"] == 0)


def test_pipeline_whose_answers_nobody_reads() -> None:
    """The router stops reading too, and continues when the client reads."""
    request = post("/generate", b"no JSON") * 1000
    with arena() as field, field.polite(), field.connect(receive_buffer=4096) as client:
        before, sent = field.rss, 0
        client.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent < 10_000_000:
                sent += client.sock.send(request)
        assert field.rss - before < 15_000_000
        client.sock.settimeout(PATIENCE)
        for _ in range(sent // (len(request) // 1000)):
            answer = client.answer()
            assert answer is not None
            assert answer.code == "json_parse_error"


# -- large -------------------------------------------------------------------------------------------------------------


def test_five_thousand_headers(field: Arena) -> None:
    with field.polite():
        assert field.ask(post("/generate", b"{}", *(f"A{number}: b" for number in range(5000)))).status == 431


def test_head_of_ten_megabytes(field: Arena) -> None:
    with field.polite():
        for field_line in ("A: " + "b" * 10_000_000, "A" * 10_000_000 + ": b"):
            assert field.ask(post("/generate", b"{}", field_line)).status == 431
        assert field.ask(post("/" + "a" * 10_000_000)).status == 414


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_100_mb_is_refused_early(field: Arena, chunked: bool) -> None:
    """The limit is 1 MB: an announced length is refused before the body comes, any other as soon as it is too long."""
    before = field.rss
    framing = b"Transfer-Encoding: chunked\r\n\r\n5f5e100\r\n" if chunked else b"Content-Length: 100000000\r\n\r\n"
    with field.polite(), field.connect() as client:
        client.send(b"POST /generate HTTP/1.1\r\nHost: x\r\n" + framing)
        sent = 0
        while chunked and sent < 100_000_000 and client.send(b"x" * 500_000):
            sent += 500_000
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (413, "payload_too_large")
    assert field.rss - before < 20_000_000


def test_body_of_100_mb_is_served_where_it_is_allowed() -> None:
    body = b'{"text": "%s"}' % (b"x" * 100_000_000)
    with arena() as field, field.polite():
        assert field.ask(post("/v1/audio/transcriptions", body)).status == 200
        assert [asked.size for asked in field.worker.asked if asked.target != "/generate"] == [len(body)]
