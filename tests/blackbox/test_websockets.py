"""WebSockets by the real command: in one process and several, over TLS, and while the router ends."""

from __future__ import annotations

import contextlib
import http
import os
import re
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

from certificates import Authority
from routers import WITHIN, RouterProcess, router_process

PATH = "/v1/realtime?model=m"
PLAIN = ("--metrics-interval-secs", "0", "--log-format", "json")


def _health(connection: ServerConnection, request: Request) -> Response | None:
    """Answer what is no WebSocket: the health checks."""
    if request.path.startswith("/v1/realtime"):
        return None
    status = http.HTTPStatus.OK if request.path == "/health" else http.HTTPStatus.NOT_FOUND
    return connection.respond(status, "")


def _echo(connection: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        for message in connection:
            connection.send(message)


@contextlib.contextmanager
def engine(context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Yield the URL of a worker that sends back what it gets."""
    with serve(_echo, "127.0.0.1", 0, process_request=_health, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        scheme = "http" if context is None else "https"
        yield f"{scheme}://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(WITHIN)


def dial(router: RouterProcess, path: str = PATH, **how: Any) -> ClientConnection:
    return connect(router.url.replace("http", "ws", 1) + path, legacy=True, **how)


def lines_of(router: RouterProcess) -> list[dict[str, Any]]:
    """The access log's lines about WebSockets."""
    return [line for line in router.records() if line.get("status") == 101]


@pytest.mark.parametrize("flags", [(), ("--relay-processes", "2")], ids=["one", "relays"])
def test_it_is_relayed_counted_and_logged(flags: tuple[str, ...]) -> None:
    with engine() as url, router_process([url], *PLAIN, *flags) as router:
        clients = [dial(router) for _ in range(4)]
        for number, client in enumerate(clients):
            client.send(f"message {number}")
        for number, client in enumerate(clients):
            assert client.recv(WITHIN) == f"message {number}"
        assert router.worker(url)["load"] == 4
        while router.samples().total("sgl_router_websockets_active") != 4:
            pass
        for client in clients:
            client.close()
        while router.worker(url)["load"]:
            pass
        while len(lines_of(router)) < 4:
            pass
        while router.samples().total("sgl_router_websockets_active"):
            pass
        sent = router.samples().total("sgl_router_request_bytes_total", route="/v1/realtime")
        line = lines_of(router)[0]
        assert line["in"] >= len("message 0")
        assert sum(each["in"] for each in lines_of(router)) == sent
        assert line["worker"] == url
        with pytest.raises(InvalidStatus) as refused:
            dial(router, "/health")
        assert refused.value.response.status_code == 200


def test_a_decider_that_dies_soon_after_the_start_knows_the_open_ones_again(tmp_path: Path) -> None:
    """Workers had other ids then, so that open requests were nobody's."""
    state = tmp_path / "state"
    flags = ("--relay-processes", "2", "--state-file", str(state))
    with engine() as url, router_process([url], *PLAIN, *flags) as router:
        router.until(lambda: state.exists() and url.encode() in state.read_bytes())
        with dial(router) as client:
            killed = deciders(router)[-1]
            os.kill(killed, signal.SIGKILL)
            router.until(lambda: deciders(router)[-1] != killed)
            client.send("x")
            assert client.recv(WITHIN) == "x"
            assert router.worker(url)["load"] == 1
        router.until(lambda: router.worker(url)["load"] == 0)


def deciders(router: RouterProcess) -> list[int]:
    """Return the processes that have decided, in their order."""
    return [int(found) for found in re.findall(r"process (\d+) decides for 2 relays", router.log())]


def test_it_works_over_tls_on_both_sides(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("router")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(*pair)
    flags = ("--tls-cert-path", str(pair[0]), "--tls-key-path", str(pair[1]))
    trust = ("--ca-cert-paths", str(authority.cert))
    context = ssl.create_default_context(cafile=str(authority.cert))
    with engine(server) as url, router_process([url], *PLAIN, *flags, *trust, tls=context) as router:
        with dial(router, ssl=context) as client:
            client.send("x" * 300_000)
            assert client.recv(WITHIN) == "x" * 300_000
        while router.worker(url)["load"]:
            pass


def test_a_router_that_ends_lets_it_go_on_for_the_grace() -> None:
    grace = ("--shutdown-grace-period-secs", "1")
    with engine() as url, router_process([url], *PLAIN, *grace) as router:
        with dial(router) as client:
            client.send("before")
            assert client.recv(WITHIN) == "before"
            router.send_signal(signal.SIGTERM)
            client.send("after")
            assert client.recv(WITHIN) == "after"
            with pytest.raises(ConnectionClosed):
                client.recv(WITHIN)
        assert router.exit_status() == 0
