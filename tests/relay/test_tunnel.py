"""WebSockets through the router: real ones (the package `websockets`), and raw sockets for what those would not do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from sglang_router.access.permissions import Access
from sglang_router.app.admission import admission
from sglang_router.config.keys import ClientKey
from sglang_router.relay.renaming import model_in_query
from sglang_router.relay.tunnel import TunnelExchange
from sglang_router.routing.model_names import is_name, text_of
from sglang_router.routing.rules import HealthRules
from sglang_router.wire.cors import Cors
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.request import Request
from stack import Stack, stack

HEAD = (
    b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: r\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
ASK = HEAD + b"\r\n"
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n"
)
WITHIN = 10.0


@pytest.fixture(autouse=True)
def engines_closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


OPENED: list[socket.socket] = []


class Engine:
    """A listening socket; the test plays the engine, one connection after the other."""

    def __init__(self, router: Stack, **spec: Any) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(WITHIN)
        OPENED.append(self.listener)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.worker = router.add(self.url, health=NO_CHECKS, **spec)

    def accept(self) -> tuple[socket.socket, bytes]:
        """Take the next connection with a request of a client; return it with the head of that."""
        while True:
            connection, _ = self.listener.accept()
            connection.settimeout(WITHIN)
            head = until(connection, b"\r\n\r\n")
            if head.startswith((b"GET /v1/realtime", b"POST /generate")):
                return connection, head
            connection.close()  # the router asks what the engine is

    @property
    def asked(self) -> bool:
        """Whether a request of a client has come."""
        self.listener.settimeout(0.0)
        with contextlib.suppress(BlockingIOError):
            self.accept()
            return True
        return False


def until(connection: socket.socket, end: bytes) -> bytes:
    """Read up to these bytes, and nothing after them."""
    data = b""
    while not data.endswith(end):
        byte = connection.recv(1)
        assert byte, data
        data += byte
    return data


def exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        assert more, data
        data += more
    return data


def rest(connection: socket.socket) -> bytes:
    """Read to the end."""
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def dial(router: Stack, request: bytes = ASK) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", router.port))
    client.settimeout(WITHIN)
    client.sendall(request)
    return client


REALTIME = [Subprotocol("realtime")]
NO_CHECKS = HealthRules(enabled=False)


@contextmanager
def opened(router: Stack, engine: Engine) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An open tunnel: the client's socket and the engine's."""
    with dial(router) as client:
        worker, _ = engine.accept()
        with worker:
            worker.sendall(SWITCH)
            until(client, b"\r\n\r\n")
            yield client, worker
    router.until(lambda: not router.clients.exchanges)
    assert engine.worker.load == 0
    assert not router.app.relay.tunnels.open


@contextmanager
def answering(router: Stack, answer: Callable[[ServerConnection], Coroutine[Any, Any, None]]) -> Iterator[str]:
    """A WebSocket server as a worker, on the router's loop."""

    async def serve() -> tuple[Server, int]:
        server = await serve_async(answer, "127.0.0.1", 0, subprotocols=REALTIME)
        return server, next(iter(server.sockets)).getsockname()[1]

    server, port = router.run(serve())
    url = f"http://127.0.0.1:{port}"
    router.add(url, health=NO_CHECKS, api_key="worker-key")
    try:
        yield url
    finally:
        router.call(server.close)


def client_of(router: Stack, path: str = "/v1/realtime?model=m", **how: Any) -> ClientConnection:
    how.setdefault("subprotocols", REALTIME)
    return connect(f"ws://127.0.0.1:{router.port}{path}", legacy=True, **how)


# -- real WebSockets ---------------------------------------------------------------------------------------------------


def test_messages_go_both_ways_and_the_end_is_clean() -> None:
    heads: list[dict[str, str]] = []

    async def echo(connection: ServerConnection) -> None:
        assert connection.request is not None
        heads.append({name.lower(): value for name, value in connection.request.headers.raw_items()})
        heads[-1]["path"] = connection.request.path
        async for message in connection:
            await connection.send(message)

    with stack() as router, answering(router, echo) as url:
        with client_of(router) as client:
            assert client.subprotocol == "realtime"
            for message in ("one", b"two" * 100_000, "\u20ac"):
                client.send(message)
                assert client.recv(WITHIN) == message
            assert router.worker(url).load == 1
        router.until(lambda: not router.clients.exchanges)
        assert (router.worker(url).load, router.worker(url).processed) == (0, 1)
        assert heads[0]["path"] == "/v1/realtime?model=m"
        assert heads[0]["authorization"] == "Bearer worker-key"
        assert heads[0]["upgrade"] == "websocket"
        assert "content-length" not in heads[0]


@pytest.mark.parametrize(
    ("query", "model"),
    [
        (b"model=m", b'"m"'),
        (b"a=b&model=org%2Fm+1&c", b'"org/m 1"'),
        (b"m%6Fdel=m", b'"m"'),
        (b"model=m&model=m", b'"m"'),
        (b"model=m&model=n", b""),  # a key for some models got any other one: engines take the last
        (b"model=m&mod%65l=n", b""),
        (b"model=m&model", b""),
        (b"models=m&xmodel=n&model%00=o", b""),
        (b"model=m" + b"&a%41" * 63, b'"m"'),
        (b"model=m" + b"&a%41" * 64, b""),  # the last one might be another model
        (b"model=", b""),
        (b"model=%0a", b""),
        (b"", b""),
    ],
)
def test_the_model_of_a_query(query: bytes, model: bytes) -> None:
    found = model_in_query(Request(b"GET", b"/v1/realtime?" + query, b"/v1/realtime", []))
    assert (text_of(found.name) if found is not None and is_name(found.name) else b"") == model


def test_the_workers_close_reaches_the_client() -> None:
    async def leave(connection: ServerConnection) -> None:
        await connection.close(4001, "enough")

    with stack() as router, answering(router, leave) as url, client_of(router) as client:
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(WITHIN)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "enough")
        worker = router.worker(url)
        router.until(lambda: worker.load == 0)


def test_a_worker_that_refuses_is_answered_as_it_says() -> None:
    with stack() as router:
        fake = router.fake({"GET /v1/realtime?model=m": b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno"})
        router.add(fake.url, health=NO_CHECKS)
        with pytest.raises(InvalidStatus) as refused:
            client_of(router)
        assert refused.value.response.status_code == 403
        assert refused.value.response.body == b"no"


def test_clients_need_their_key_and_workers_do_not_see_it() -> None:
    heads: list[str] = []

    async def take(connection: ServerConnection) -> None:
        assert connection.request is not None
        heads.append(str(connection.request.headers))
        await connection.send("x")

    with stack() as router, answering(router, take):
        access = Access([ClientKey("client", "client-key")])
        router.app.frontend.admit = admission(access, router.app.frontend.routes)
        router.app.relay.forward = ForwardRules(guarded=True, withheld=access.withholds)
        with pytest.raises(InvalidStatus) as refused:
            client_of(router)
        assert refused.value.response.status_code == 401
        browser = ["realtime", "openai-insecure-api-key.client-key"]
        for how in ({"additional_headers": {"Authorization": "Bearer client-key"}}, {"subprotocols": browser}):
            with client_of(router, **how) as client:
                assert client.recv(WITHIN) == "x"
        assert len(heads) == 2
        assert not any("client-key" in head for head in heads)
        assert all("Bearer worker-key" in head for head in heads)


def test_pages_of_other_sites_may_not_ask() -> None:
    async def take(connection: ServerConnection) -> None:
        await connection.send("x")

    with stack() as router, answering(router, take):
        with pytest.raises(InvalidStatus) as refused:
            client_of(router, origin="https://other.example")
        assert refused.value.response.headers["x-smg-error-code"] == "origin_not_allowed"
        with client_of(router, origin=f"http://127.0.0.1:{router.port}") as client:
            assert client.recv(WITHIN) == "x"
        router.app.relay.answers.cors = Cors(["https://other.example"])
        with client_of(router, origin="https://other.example") as client:
            assert client.recv(WITHIN) == "x"


# -- bytes, order, halves, pressure ------------------------------------------------------------------------------------


def test_what_a_client_sends_before_the_answer_comes_first() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, ASK + b"early\n") as client:
            worker, head = engine.accept()
            client.sendall(b"more\r\n\r\n")
            with worker:
                assert b"early" not in head
                worker.sendall(SWITCH + b"first")
                assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
                assert exactly(client, 5) == b"first"
                client.sendall(b"last")
                assert exactly(worker, 18) == b"early\nmore\r\n\r\nlast"


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_request_may_come_in_pieces(size: int) -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, b"") as client:
            data = ASK + b"GET / HTTP/1.1\r\n"
            for at in range(0, len(data), size):
                client.sendall(data[at : at + size])
            worker, _ = engine.accept()
            with worker:
                worker.sendall(SWITCH)
                until(client, b"\r\n\r\n")
                assert exactly(worker, 16) == b"GET / HTTP/1.1\r\n"


def test_requests_before_it_are_answered_first() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, b"GET /version HTTP/1.1\r\nHost: r\r\n\r\n" + ASK + b"x") as client:
            worker, _ = engine.accept()
            with worker:
                worker.sendall(SWITCH)
                assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
                until(client, b"101 Switching Protocols\r\n")
                assert exactly(worker, 1) == b"x"


def test_an_interim_answer_and_a_head_in_pieces_are_no_matter() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router) as client:
            worker, _ = engine.accept()
            with worker:
                worker.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + SWITCH[:30])
                worker.sendall(SWITCH[30:])
                assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def test_the_sides_can_end_their_sending_one_after_the_other() -> None:
    with stack() as router:
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            client.sendall(b"all")
            client.shutdown(socket.SHUT_WR)
            assert rest(worker) == b"all"
            worker.sendall(b"answer")
            worker.shutdown(socket.SHUT_WR)
            assert rest(client) == b"answer"
        with opened(router, engine) as (client, worker):
            worker.sendall(b"all")
            worker.shutdown(socket.SHUT_WR)
            assert rest(client) == b"all"
            client.sendall(b"answer")
            client.shutdown(socket.SHUT_WR)
            assert rest(worker) == b"answer"


@pytest.mark.parametrize("to_worker", [True, False])
def test_a_side_that_reads_nothing_pauses_the_other(to_worker: bool) -> None:
    """The router holds little of what is sent; when the reader reads, all of it comes."""
    size = 64 << 20
    with stack() as router:
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            sender, reader = (client, worker) if to_worker else (worker, client)
            (exchange,) = router.clients.exchanges
            assert isinstance(exchange, TunnelExchange)
            sending = threading.Thread(target=sender.sendall, args=(b"x" * size,))
            sending.start()
            transport = exchange.client.transport
            if to_worker:
                transport = next(iter(router.connections.known[engine.worker.target].live)).transport
            while router.call(transport.get_write_buffer_size) == 0:
                assert sending.is_alive()
            assert router.call(transport.get_write_buffer_size) < 4 << 20
            assert len(exactly(reader, size)) == size
            sending.join(WITHIN)
            assert not sending.is_alive()


@pytest.mark.parametrize("ends", ["client", "worker"])
def test_when_one_side_has_ended_the_other_may_not_be_silent_for_long(ends: str) -> None:
    """A process that was killed ends its sending and no more: the other side's connection would stay for minutes."""
    with stack() as router:
        rules(router, half=0.2)
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            ended, other = (client, worker) if ends == "client" else (worker, client)
            ended.shutdown(socket.SHUT_WR)
            assert rest(other) == b""
            router.until(lambda: not router.clients.exchanges)
            assert rest_or_reset(ended) == b""


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_it_and_its_last_bytes_arrive() -> None:
    with stack() as router:
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            client.sendall(b"bye")
            client.close()
            assert rest(worker) == b"bye"


def test_a_worker_that_dies_ends_it_and_nothing_is_retried() -> None:
    with stack() as router:
        engine, other = Engine(router), Engine(router)
        engine_of = {engine.url: engine, other.url: other}
        with dial(router) as client:
            url = wait_for_load(router)
            worker, _ = engine_of.pop(url).accept()
            worker.sendall(SWITCH + b"x")
            until(client, b"\r\n\r\nx")
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
            worker.close()
            assert rest(client) == b""
        router.until(lambda: not router.clients.exchanges)
        (spared,) = engine_of.values()
        assert not spared.asked
        assert [each.load for each in router.fleet] == [0, 0]


def wait_for_load(router: Stack) -> str:
    """Return the URL of the worker that got the request."""
    while True:
        loads = router.call(lambda: [each.url for each in router.fleet if each.load])
        if loads:
            return loads[0]


def test_before_the_101_it_is_retried_like_any_request() -> None:
    with stack() as router:
        gone = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
        router.add(url, health=NO_CHECKS)
        gone.close()
        fake = router.fake({"GET /v1/realtime?model=m": b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"})
        router.add(fake.url, health=NO_CHECKS)
        engine = Engine(router)
        for _ in range(3):
            with dial(router) as client:
                worker, _ = engine.accept()
                with worker:
                    worker.sendall(SWITCH)
                    assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def rules(router: Stack, **changes: float) -> None:
    tunnels = router.app.relay.tunnels
    tunnels.rules = msgspec.structs.replace(tunnels.rules, **changes)


def test_it_ends_when_nothing_comes_any_more() -> None:
    with stack() as router:
        rules(router, idle=0.2)
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            assert rest(client) == b""
            assert rest(worker) == b""
        assert router.worker(engine.url).breaker.value == "closed"


def test_it_ends_when_it_was_open_for_too_long_although_bytes_flow() -> None:
    with stack() as router:
        rules(router, longest=0.5)
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            worker.settimeout(0.02)
            count = 0
            while True:
                try:
                    client.sendall(b"x")
                    data = worker.recv(10)
                except TimeoutError:
                    continue
                except OSError:
                    break
                if not data:
                    break
                count += len(data)
            assert count > 0


def test_there_are_only_so_many() -> None:
    with stack() as router:
        rules(router, most=1)
        engine = Engine(router)
        with opened(router, engine):
            assert router.app.relay.tunnels.open == 1
            with dial(router) as second:
                assert b"x-smg-error-code: too_many_websockets" in rest(second)
        with opened(router, engine):
            pass


def test_a_stopping_router_lets_it_be_for_the_grace_and_then_cuts_it() -> None:
    with stack() as router:
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            router.call(router.clients.drain)
            client.sendall(b"on")
            assert exactly(worker, 2) == b"on"
            router.call(router.clients.cut)
            assert rest_or_reset(client) == b""
            assert rest_or_reset(worker) == b""


def rest_or_reset(connection: socket.socket) -> bytes:
    try:
        return rest(connection)
    except ConnectionResetError:
        return b""


def test_its_bytes_and_its_time_are_told() -> None:
    with stack() as router:
        engine = Engine(router)
        with opened(router, engine) as (client, worker):
            client.sendall(b"12345")
            assert exactly(worker, 5) == b"12345"
            worker.sendall(b"123")
            assert exactly(client, 3) == b"123"
            assert "sgl_router_websockets_active 1" in metrics(router)
        assert "sgl_router_websockets_active 0" in metrics(router)
        found: list[str] = []
        while not found:  # ends are counted a moment later
            found = [line for line in metrics(router).splitlines() if "/v1/realtime" in line and "_bytes_total" in line]
        assert sorted(line.rpartition(" ")[2] for line in found) == ["3.0", "5.0"], found


def metrics(router: Stack) -> str:
    """The metrics, of which the last second may be missing."""
    return router.call(lambda: router.app.metrics.render("")[0].decode())


# -- hostile -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 5\r\n\r\nhello",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Host: other\r\n\r\n",
        HEAD.replace(b"Host: r\r\n", b"") + b"\r\n",
    ],
)
def test_a_request_that_is_not_plain_reaches_no_worker(request_bytes: bytes) -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, request_bytes) as client:
            assert rest(client).startswith(b"HTTP/1.1 400 ")
        assert not engine.asked


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/realtime HTTP/1.1\r\nHost: r\r\n\r\n",
        b"GET /v1/realtime HTTP/1.1\r\nHost: r\r\nUpgrade: websocket\r\n\r\n",
        ASK.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        ASK.replace(b"Upgrade: websocket", b"Upgrade: websocket, h2c"),
        ASK.replace(b"HTTP/1.1", b"HTTP/1.0"),
        ASK.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nUpgrade: websocket"),
        ASK.replace(b"Version: 13", b"Version: 8"),
        ASK.replace(b"Version: 13", b"Version: 13, 8"),
        ASK.replace(b"Sec-WebSocket-Version: 13\r\n", b""),
    ],
)
def test_what_asks_for_no_websocket_is_told_to(request_bytes: bytes) -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, request_bytes) as client:
            client.shutdown(socket.SHUT_WR)
            answer = rest(client)
            assert answer.startswith(b"HTTP/1.1 426 ")
            assert b"\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n" in answer
        assert not engine.asked


@pytest.mark.parametrize(
    "key", [b"", b"Sec-WebSocket-Key: short\r\n", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" * 2]
)
def test_a_websocket_without_its_one_key_reaches_no_worker(key: bytes) -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, ASK.replace(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", key)) as client:
            answer = rest(client)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"x-smg-error-code: bad_websocket_key" in answer
        assert not engine.asked


@pytest.mark.parametrize("field", [b"close, Upgrade", b"keep-alive\r\nConnection: upgrade", b"Upgrade, Cookie"])
def test_connection_may_say_more_than_upgrade(field: bytes) -> None:
    with stack() as router:
        engine = Engine(router)
        request = ASK.replace(b"Connection: Upgrade", b"Connection: " + field).replace(b": websocket", b": WebSocket")
        with dial(router, request) as client:
            worker, head = engine.accept()
            with worker:
                assert head.count(b"connection: Upgrade\r\nupgrade: websocket\r\n") == 1
                worker.sendall(SWITCH)
                assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def test_a_client_that_has_ended_its_sending_before_the_101_is_told_so() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router) as client:
            worker, _ = engine.accept()
            with worker:
                client.shutdown(socket.SHUT_WR)
                (exchange,) = router.clients.exchanges
                while "half-closed" not in router.call(lambda: repr(exchange.client)):  # type: ignore[attr-defined]
                    pass
                worker.sendall(SWITCH)
                assert b"neither end its sending" in rest(client)
                assert rest_or_reset(worker) == b""


def test_other_paths_are_not_upgraded_and_what_follows_is_http() -> None:
    """Nobody can hide a request behind an upgrade that the router does not make."""
    with stack() as router:
        fake = router.fake({"POST /generate": SWITCH})
        router.add(fake.url, health=NO_CHECKS)
        second = b"GET /version HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n"
        with dial(router, ASK.replace(b"/v1/realtime", b"/health") + second) as client:
            assert rest(client).count(b"HTTP/1.1 200 ") == 2
        body = b'{"text":"x"}'
        post = ASK.replace(b"GET /v1/realtime?model=m", b"POST /generate")[:-2]
        post += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        with dial(router, post + body) as client:
            assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 502 ")
        seen = [each for each in fake.seen if each.route == "POST /generate"]
        assert seen[0].body == body
        assert not any("upgrade" in name or "websocket" in name for name in seen[0].headers)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 X\r\n\r\n",
        SWITCH.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        SWITCH.replace(b"Connection: Upgrade", b"Connection: close"),
        SWITCH.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhello"),
        SWITCH.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        b"data" + SWITCH,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + SWITCH,
    ],
)
def test_a_101_that_is_none_is_a_bad_answer(answer: bytes) -> None:
    with stack() as router:
        fake = router.fake({"GET /v1/realtime?model=m": answer})
        worker = router.add(fake.url, health=NO_CHECKS)
        with dial(router, ASK + b"GET /version HTTP/1.1\r\nHost: r\r\n\r\n") as client:
            told = rest(client)
            assert told.startswith(b"HTTP/1.1 502 ")
            assert told.count(b"HTTP/1.1") == 1
        router.until(lambda: not router.clients.exchanges)
        assert worker.load == 0


def test_bytes_behind_a_request_that_is_refused_are_no_request() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router, ASK + b"GET /version HTTP/1.1\r\nHost: r\r\n\r\n") as client:
            worker, _ = engine.accept()
            with worker:
                worker.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
                told = rest(client)
                assert told.startswith(b"HTTP/1.1 200 ")
                assert b"\r\nconnection: close\r\n" in told
                assert told.endswith(b"no")
                assert told.count(b"HTTP/1.1") == 1


def test_a_client_that_sends_without_end_before_the_answer_is_not_read() -> None:
    with stack() as router:
        engine = Engine(router)
        with dial(router) as client:
            worker, _ = engine.accept()
            with worker:
                (exchange,) = router.clients.exchanges
                assert isinstance(exchange, TunnelExchange)
                client.setblocking(False)
                while not router.call(lambda: exchange.client._read_paused):
                    with contextlib.suppress(BlockingIOError):
                        client.send(b"x" * 65536)
                held = exchange.client._parser.early
                assert held is not None
                assert sum(map(len, held)) <= 65536 + 262144


def test_a_client_that_leaves_before_the_answer_frees_the_worker() -> None:
    with stack() as router:
        engine = Engine(router)
        client = dial(router)
        worker, _ = engine.accept()
        client.close()
        with worker:
            assert rest_or_reset(worker) == b""
        router.until(lambda: not router.clients.exchanges)
        assert (engine.worker.load, len(router.app.relay.tunnels._all)) == (0, 0)


def test_an_alias_in_the_query_is_what_the_engine_calls_its_model() -> None:
    with stack() as router:
        engine = Engine(router, model_id="one")
        router.call(lambda: router.router.naming.use({"gpt": "one"}, {}, False))
        with dial(router, ASK.replace(b"model=m", b"model=gpt&intent=x")) as client:
            worker, head = engine.accept()
            with worker:
                assert head.startswith(b"GET /v1/realtime?model=one&intent=x HTTP/1.1\r\n")
                worker.sendall(SWITCH)
                assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_half_of_a_pair_gets_none(role: str) -> None:
    with stack() as router:
        engine = Engine(router, worker_type=role)
        with dial(router) as client:
            assert b"x-smg-error-code: websocket_not_served" in rest(client)
        assert not engine.asked


def test_an_open_one_is_no_prompt_that_waits_to_be_read_and_no_answer_that_takes_so_long() -> None:
    with stack(policy="cost") as router:
        engine = Engine(router)
        worker = engine.worker
        before = repr(worker.work.answers)
        with opened(router, engine):
            router.until(lambda: worker.unread == 0)
            assert worker.work.backlog(router.loop.time()) == 0.0
        assert (worker.unread, worker.work._answers, repr(worker.work.answers)) == (0, 0, before)


def test_the_model_in_the_query_chooses_the_worker() -> None:
    with stack() as router:
        engines = [Engine(router, model_id=name) for name in ("one", "two")]
        for name, engine in zip(("one", "two"), engines, strict=True):
            with dial(router, ASK.replace(b"model=m", b"model=" + name.encode())) as client:
                worker, head = engine.accept()
                with worker:
                    assert b"model=" + name.encode() in head
                    worker.sendall(SWITCH)
                    until(client, b"\r\n\r\n")
        with dial(router) as client:
            assert rest(client).startswith(b"HTTP/1.1 404 ")
