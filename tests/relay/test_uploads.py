"""Bodies over real sockets: admitted before they are read, bounded in time, and held once. See also test_budget.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import tracemalloc
from typing import Any

import pytest

from played import Client, Leg, Play, post, run
from sglang_router.config.keys import ControlKey
from sglang_router.relay.budget import ByteBudget
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.clients import Clients
from sglang_router.relay.deadlines import NEVER, Deadline, Due
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.states import BUSY
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Request, RequestParser
from sglang_router.wire.splice import splice

PATH = "/v1/audio/transcriptions"
LIMIT = 1_000_000


def code(answer: bytes) -> str:
    found: str = json.loads(answer)["error"]["code"]
    return found


def connections(play: Play) -> list[ClientConnection]:
    return [each for each in play.clients.connections if isinstance(each, ClientConnection)]


def in_line(play: Play, count: int) -> bool:
    return sum(each.deadline[0] is Due.BUDGET for each in connections(play)) == count


def came_earlier(play: Play, seconds: float) -> None:
    for each in connections(play):
        each._hold.since += seconds


def chunked(body: bytes, size: int) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def serve_all(play: Play, count: int) -> list[int]:
    """Answer so many requests; return the lengths of their bodies."""
    sizes = []
    for _ in range(count):
        leg = await play.leg()
        sizes.append(len(leg.body))
        await leg.answer(200, b"{}", "connection: close")
        leg.close()
    return sizes


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunks", "both"])
def test_f1_many_times_the_clients_that_fit_are_all_served(framing: str) -> None:
    """Twice as many uploads as fit were all refused, again and again, and small requests with them."""

    async def upload(play: Play, number: int) -> int:
        client = await play.client()
        body = b"x" * 200_000
        by_length = framing == "length" or (framing == "both" and number % 2)
        await client.send(post(PATH, body) if by_length else chunked(body, 5000))
        return (await client.response()).status

    async def test() -> None:
        async with Play(max_buffered_request_bytes=LIMIT) as play:
            uploads = [asyncio.ensure_future(upload(play, number)) for number in range(40)]
            await play.until(lambda: play.clients.budget.short)
            small = await play.client()
            await small.send(post(PATH, b"hello"))
            serving = asyncio.ensure_future(serve_all(play, 41))
            assert (await small.response()).status == 200
            assert await asyncio.gather(*uploads) == [200] * 40
            assert sorted(await serving) == [5] + [200_000] * 40

    run(test())


def test_f1_a_body_is_not_asked_for_before_there_is_room() -> None:
    async def test() -> None:
        async with Play(max_buffered_request_bytes=LIMIT) as play:
            first, second = await play.client(), await play.client()
            await first.send(post(PATH, b"x" * 900_000))
            leg = await play.leg()
            request = post(PATH, b"y" * 900_000, "Expect: 100-continue")
            head = request[: request.index(b"\r\n\r\n") + 4]
            await second.send(head)
            await play.until(lambda: in_line(play, 1))
            await leg.answer(200, b"{}", "connection: close")
            leg.close()
            await first.response()
            start, _ = await second.head()
            assert start == "HTTP/1.1 100 Continue"
            await second.send(request[len(head) :])
            assert await serve_all(play, 1) == [900_000]
            assert (await second.response()).status == 200

    run(test())


def test_f8_who_sends_too_slowly_goes_while_others_wait() -> None:
    """Three connections that sent a byte now and then had nearly the whole budget, and kept it."""

    async def test() -> None:
        async with Play(max_buffered_request_bytes=LIMIT) as play:
            slow = [await play.client() for _ in range(3)]
            for client in slow:
                await client.send(post(PATH, b"x" * 280_000)[:5000])
            await play.until(lambda: play.clients.budget.held >= 3 * 280_000)
            came_earlier(play, -10.0)  # they came 10 s ago
            await slow[1].send(b"x" * 1000)
            honest = await play.client()
            await honest.send(post(PATH, b"x" * 400_000))
            assert await serve_all(play, 1) == [400_000]
            assert (await honest.response()).status == 200
            answers = [await client.response() for client in (slow[0], slow[2])]
            assert [(each.status, code(each.body)) for each in answers] == [(408, "request_timeout")] * 2
            assert in_line(play, 0)
            assert len([each for each in connections(play) if each.deadline[0] is Due.BODY]) == 1
            slow[1].close()
            await play.until(lambda: not play.clients.budget.held)

    run(test())


def test_f42_a_body_that_trickles_ends() -> None:
    """A connection that sent a byte within each timeout stayed for ever."""

    async def test() -> None:
        async with Play() as play:
            client = await play.client()
            await client.send(post(PATH, b"x" * 50_000)[:5000])
            await play.until(lambda: any(each.deadline[0] is Due.BODY for each in connections(play)))
            came_earlier(play, -61.0)
            await client.send(b"x")
            assert (await client.response()).status == 408

    run(test())


def test_f42_while_connections_are_short_slow_bodies_end_sooner() -> None:
    """Nearly all descriptors were in bodies that trickle, so that not even a health check was answered."""

    async def test() -> None:
        async with Play() as play:
            play.clients.limit = 8
            slow = [await play.client() for _ in range(8)]
            for client in slow:
                await client.send(post(PATH, b"x" * 5000)[:500])
            await play.until(lambda: sum(each.deadline[0] is Due.BODY for each in connections(play)) == 8)
            came_earlier(play, -6.0)
            answers = [await client.response() for client in slow]
            assert {answer.status for answer in answers} == {408}

    run(test())


# -- times -------------------------------------------------------------------------------------------------------------


class Neighbour:
    """A connection whose end gives the others more time."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.deadline: Deadline = (Due.BUDGET, 5.0)
        self.told = 0

    def overdue(self, now: float) -> None:
        self.told += 1
        for each in self.clients.connections:
            each.deadline = (Due.BODY, now + 60.0)

    def lateness(self, now: float) -> float:
        return 0.0

    def forgive(self, pause: float) -> None:
        self.deadline = (self.deadline[0], self.deadline[1] + pause)

    def close_if_idle(self) -> None: ...

    def cut(self) -> None: ...


def clients_at(times: list[float]) -> Clients:
    """The registry of a port; its clock shows these times, and the last one from then on."""

    def clock() -> float:
        return times.pop(0) if len(times) > 1 else times[0]

    return Clients(clock, ByteBudget(LIMIT), 100, lambda: 0, itertools.count())


def test_f9_a_deadline_is_looked_at_when_it_is_acted_on() -> None:
    """The end of one upload let the next one go on, and the same sweep refused that one."""
    clients = clients_at([5.0])
    neighbours = [Neighbour(clients) for _ in range(3)]
    for each in neighbours:
        clients.add(each)
    clients.sweep()
    assert sum(each.told for each in neighbours) == 1


def test_f37_a_router_that_was_stopped_gives_its_clients_the_time_back() -> None:
    """What waited in the sockets counted as silence, because timers come before sockets."""
    clients = clients_at([1.0, 1.3, 11.3, 11.6, 15.1])
    one = Neighbour(clients)
    clients.add(one)
    for _ in range(4):
        clients.sweep()
        assert not one.told
    assert one.deadline == (Due.BUDGET, 15.0)
    clients._swept = 15.0
    clients.sweep()
    assert one.told == 1


# -- memory ------------------------------------------------------------------------------------------------------------


def test_f5_tiny_chunks_cost_no_more_than_their_bytes() -> None:
    """A list of pieces took twenty times the bytes that were counted."""
    wire = chunked(b"ab" * 100_000, 2)
    parser = RequestParser(Limits())
    tracemalloc.start()
    try:
        ready = [each for at in range(0, len(wire), 20_000) for each in parser.feed(wire[at : at + 20_000])]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (request,) = ready
    assert isinstance(request, Request)
    assert request.body == b"ab" * 100_000
    assert peak < 2 * len(request.body) + 100_000


def test_f30_a_large_body_is_one_buffer_that_is_forwarded_as_it_is() -> None:
    async def test() -> None:
        async with Play() as play:
            client = await play.client()
            request = post(PATH, b"x" * 3_000_000)
            await client.send(request)
            leg = await play.leg()
            (connection,) = connections(play)
            assert isinstance(connection.exchange, Exchange)
            assert isinstance(connection.exchange.request.body, bytearray)
            assert leg.body == b"x" * 3_000_000
            assert play.clients.budget.held < 3_001_000
            await leg.answer(200)
            await client.response()
            assert not play.clients.budget.held

    run(test())


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bodies_of_both_types_are_spliced(kind: type[bytes] | type[bytearray]) -> None:
    blanks = b" " * 5000
    for body, expected in ((b'{"a":1 } ', b'{"a":1 ,"r":2} '), (b"{%b}" % blanks, b'{%b"r":2}' % blanks)):
        assert splice(kind(body), b'"r":2') == expected


# -- the control plane -------------------------------------------------------------------------------------------------


def test_f27_bodies_for_the_control_plane_are_not_read_without_its_key() -> None:
    """With keys for the control plane only, 99 MB of a stranger were read before the refusal."""
    bodies = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def test() -> None:
        async with Play(app=app, control_plane_api_keys=[ControlKey("ops", "Ops", "secret", "admin")]) as play:
            for key, status in (("wrong", 401), ("secret", 401)):
                client = await play.client()
                request = post("/workers", b"x" * 90_000, f"Authorization: Bearer {key}")
                await client.send(request[:-80_000])
                if key == "secret":
                    await client.send(request[-80_000:])
                assert (await client.response()).status == status
            inference = await play.client()
            await inference.send(post(PATH, b"hello"))
            assert await serve_all(play, 1) == [5]
            (end,) = [end for end in play.events.ends if end.tag.route.endpoint]
            assert end.tag.client == ""
        assert bodies == [b"", b"x" * 90_000]

    run(test())


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/nowhere", 404),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/chat/completions", 404),
        ("GET", "/health", 404),
        ("POST", "/v1/models", 404),
        ("POST", "/workers/w/drai", 404),
        ("POST", "/w%6frkers", 413),
    ],
)
def test_f27_a_large_body_that_no_endpoint_takes_is_not_read(method: str, path: str, status: int, framing: str) -> None:
    """A body for a path that does not exist was held in memory to its end, up to the whole budget; without any key."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "workers" in scope["path"] and scope["path"].count("/") == 1:
            await receive()
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def test() -> None:
        async with Play(app=app) as play:
            client = await play.client()
            head = (
                post(path, b"x" * 90_000).partition(b"\r\n\r\n")[0].replace(b"POST", method.encode(), 1) + b"\r\n\r\n"
            )
            if framing == "chunked":  # it is read as far as it is small
                head = (
                    head.replace(b"Content-Length: 90000", b"Transfer-Encoding: chunked") + b"15f90\r\n" + b"x" * 90000
                )
            await client.send(head)
            response = await client.response()
            expected = 413 if framing == "chunked" else status
            assert (response.status, response.headers["connection"]) == (expected, "close")
            assert play.clients.budget.held == 0

    run(test())


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/nowhere"), ("POST", "/workers"), ("PUT", "/workers/http:%2F%2Fw")]
)
def test_bodies_that_are_small_or_wanted_are_read(method: str, path: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        size = len((await receive())["body"])
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(f"{size}"))]}
        )
        await send({"type": "http.response.body", "body": f"{size}".encode()})

    async def test() -> None:
        async with Play(app=app) as play:
            client = await play.client()
            for size in (100, 100) if path == "/nowhere" else (100, 90_000, 100):
                await client.send(post(path, b"x" * size).replace(b"POST", method.encode(), 1))
                assert (await client.response()).body == b"%d" % size

    run(test())


# -- half-closed connections -------------------------------------------------------------------------------------------


async def half_closed(play: Play, request: bytes) -> Client:
    client = await play.client()
    await client.send(request)
    client.writer.write_eof()
    return client


@pytest.mark.parametrize("size", [5, 500_000])
def test_f34_a_client_that_only_ends_its_sending_side_is_answered(size: int) -> None:
    """`nc -N` got no answer, not even from /health."""

    async def test() -> None:
        async with Play() as play:
            client = await half_closed(play, post(PATH, b"x" * size) * 2)
            assert await serve_all(play, 2) == [size, size]
            for _ in range(2):
                assert (await client.response()).status == 200
            await client.closed()

    run(test())


def test_f34_a_client_that_waits_long_is_found_to_be_there() -> None:
    async def test() -> None:
        async with Play() as play:
            clients = [await half_closed(play, post(PATH, b"hello", version=version)) for version in ("1.1", "1.0")]
            legs = [await play.leg() for _ in clients]
            assert (await clients[0].head())[0] == "HTTP/1.1 100 Continue"
            await play.until(lambda: all(each.deadline[0] is Due.PRESENT for each in connections(play)))
            assert {each.state for each in connections(play)} == {BUSY}
            assert "half-closed" in repr(connections(play)[0])
            for leg in legs:
                await leg.answer(200)
            for client in clients:
                assert (await client.response()).status == 200
                await client.closed()

    run(test())


def test_f34_a_client_that_ends_its_side_in_the_middle_of_a_body_has_left() -> None:
    async def test() -> None:
        async with Play() as play:
            client = await half_closed(play, post(PATH, b"x" * 100_000)[:-1])
            await client.closed()
            await play.until(lambda: not play.clients.connections)
            assert play.legs.empty()

    run(test())


def test_f34_an_end_in_the_middle_of_an_answer_is_a_client_that_left() -> None:
    async def test() -> None:
        async with Play() as play:
            client = await play.client()
            await client.send(post("/generate", b'{"stream":true}'))
            leg: Leg = await play.leg()
            await leg.start_stream()
            await leg.send(b"9\r\ndata: x\n\n\r\n")
            await client.head()
            client.writer.write_eof()
            await leg.closed()

    run(test())


def test_never_is_never() -> None:
    assert NEVER[1] + 10.0 == NEVER[1], "a shift of all deadlines leaves it"
