"""Options of sockets: a peer that vanishes is noticed, on both sides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from sglang_router.app.build import build
from sglang_router.app.listening import Listening, open_all
from sglang_router.config import RouterArgs
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.keepalive import probe_worker
from sglang_router.routing.plan import Target
from sglang_router.workers.fetch import Collector

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has not all the options")

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


def options(sock: Any) -> dict[str, int]:
    """Read the options of a socket, in seconds."""
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    found = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names}
    found["TCP_USER_TIMEOUT"] /= 1000
    return {"SO_KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), **found}


def test_case_8_a_worker_that_vanishes_is_noticed_within_half_a_minute(run: Run) -> None:
    """A connection to a machine that is gone was kept for a quarter of an hour with a request on it, else for ever."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as worker:
            target = Target(f"http://127.0.0.1:{worker.getsockname()[1]}")
            pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
            collector = Collector(loop.create_future(), 1024)
            collector.connection = pool.send(target, collector, b"GET / HTTP/1.1\r\n\r\n", b"")
            accepted, _ = await loop.run_in_executor(None, worker.accept)
            with accepted:
                connection: Any = collector.connection
                while not hasattr(connection, "transport"):
                    await asyncio.sleep(0.001)
                    connection = collector.connection
                found = options(connection.transport.get_extra_info("socket"))
                connection.abort()
            await pool.close()
        assert found["SO_KEEPALIVE"] == 1
        assert found["TCP_KEEPIDLE"] + found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"] <= 30
        assert found["TCP_USER_TIMEOUT"] <= 30

    run(scene())


def test_a_connection_that_is_closed_already_has_no_options() -> None:
    class Closed:
        """What uvloop shows of a socket that is closed."""

        def setsockopt(self, level: int, option: int, value: int, /) -> None:
            raise ValueError("negative file descriptor")

    probe_worker(Closed())
    with socket.socket() as closed:
        closed.close()
        probe_worker(closed)


def test_case_8_a_client_that_vanishes_is_noticed(run: Run) -> None:
    """Accepted sockets inherit the options of the socket that listens."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        app = build(RouterArgs(), loop)
        listening = Listening(loop)
        await open_all(await listening.bind(app.frontend, "127.0.0.1", 0))
        _, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        while not app.clients.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        client: Any = next(iter(app.clients.connections))
        found = options(client.transport.get_extra_info("socket"))
        writer.close()
        app.clients.cut()
        await listening.close()
        await app.connections.close()
        assert found["SO_KEEPALIVE"] == 1
        assert found["TCP_KEEPIDLE"] <= 30
        assert found["TCP_KEEPIDLE"] + found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"] <= 60
        assert found["TCP_USER_TIMEOUT"] == 120, "clients may stop to read for a while"

    run(scene())
