"""TLS by the real command: for clients, with certificates that are renewed while it runs, and towards workers."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from certificates import LOCAL, Authority, Pair
from routers import COMMAND, WITHIN, PlainWorker, RouterProcess, environment, router_process

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ONCE = ("--max-worker-retries", "1", "--max-total-retries", "0", "--worker-startup-check-interval", "0.05")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


@pytest.fixture
def pair(ca: Authority) -> Pair:
    return ca.issue("router")


class TLSWorker(PlainWorker):
    """A PlainWorker that speaks TLS; with `clients` it requires a certificate from that authority."""

    def __init__(self, pair: Pair, clients: str | None = None) -> None:
        super().__init__({CHAT: (200, {"content-type": "application/json"}, b'{"id": "c"}')})
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*pair)
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def tls_worker(pair: Pair, clients: str | None = None) -> Iterator[TLSWorker]:
    with TLSWorker(pair, clients) as worker:
        thread = threading.Thread(target=worker.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield worker
        finally:
            worker.shutdown()
            thread.join(WITHIN)


def trusting(ca: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca.cert)


def serial(connection: http.client.HTTPConnection) -> Any:
    """Return the serial number of the certificate that a connection was opened with."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    certificate = connection.sock.getpeercert()
    assert certificate is not None
    return certificate["serialNumber"]


def answered(connection: http.client.HTTPConnection) -> int:
    connection.request("POST", CHAT, b'{"messages": []}')
    answer = connection.getresponse()
    answer.read()
    return answer.status


def last_error(router: RouterProcess, url: str) -> str:
    router.until(lambda: bool(router.worker(url)["last_error"]))
    return str(router.worker(url)["last_error"])


# -- clients -----------------------------------------------------------------------------------------------------------


def test_clients_speak_tls_and_new_certificates_drop_nobody(ca: Authority, pair: Pair) -> None:
    flags = ("--tls-cert-path", pair.cert, "--tls-key-path", pair.key)
    with (
        tls_worker(ca.issue("w")) as worker,
        router_process([worker.url], *flags, "--ca-cert-paths", ca.cert, tls=trusting(ca)) as router,
    ):
        router.until(lambda: "listening on https://" in router.log())
        host = urlsplit(router.url).netloc
        kept = http.client.HTTPSConnection(host, timeout=WITHIN, context=trusting(ca))
        assert answered(kept) == 200
        before = serial(kept)
        pair.become(ca.issue("renewed"))

        def renewed() -> bool:
            fresh = http.client.HTTPSConnection(host, timeout=WITHIN, context=trusting(ca))
            with contextlib.closing(fresh):
                assert answered(fresh) == 200
                return bool(serial(fresh) != before)

        router.until(renewed)
        assert answered(kept) == 200
        assert serial(kept) == before
        kept.close()
        assert router.samples(router.metrics_url).total("sgl_router_requests_total") > 0


def test_plain_http_gets_nothing_from_a_tls_port(ca: Authority, pair: Pair) -> None:
    flags = ("--tls-cert-path", pair.cert, "--tls-key-path", pair.key)
    with router_process([], *flags, tls=trusting(ca)) as router:
        host, _, port = urlsplit(router.url).netloc.rpartition(":")
        with socket.create_connection((host, int(port)), WITHIN) as client, contextlib.suppress(ConnectionResetError):
            client.sendall(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n")
            assert b"HTTP" not in client.recv(1000)
        assert router.get("/health").status == 200
        assert router.post("/flush_cache").status == 200  # a change, from this machine: the router sees the peer


def test_a_silent_client_does_not_hold_up_the_end(ca: Authority, pair: Pair) -> None:
    """Clients without a handshake, and with one but without a request. `router_process` checks that the router ends."""
    flags = ("--tls-cert-path", pair.cert, "--tls-key-path", pair.key)
    with contextlib.ExitStack() as clients, router_process([], *flags, tls=trusting(ca)) as router:
        host, _, port = urlsplit(router.url).netloc.rpartition(":")
        for shake in (False, True):
            client = clients.enter_context(socket.create_connection((host, int(port)), WITHIN))
            if shake:
                clients.enter_context(trusting(ca).wrap_socket(client, server_hostname=host))


def test_a_stranger_with_a_large_body_is_refused_over_tls_too(ca: Authority, pair: Pair) -> None:
    flags = ("--tls-cert-path", pair.cert, "--tls-key-path", pair.key, "--api-key", "k")
    with router_process([], *flags, tls=trusting(ca), key="k") as router:
        host, _, port = urlsplit(router.url).netloc.rpartition(":")
        head = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 400000000\r\n\r\n".encode()
        with (
            socket.create_connection((host, int(port)), WITHIN) as plain,
            trusting(ca).wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=True) as client,
            client.makefile("rb") as answers,
        ):
            client.sendall(head)
            assert answers.readline().startswith(b"HTTP/1.1 401 ")
            assert b"connection: close\r\n" in answers.read()


@pytest.mark.parametrize("flag", ["--tls-cert-path", "--client-cert-path"])
def test_a_certificate_that_cannot_be_used_ends_the_command_with_one_line(
    ca: Authority, pair: Pair, flag: str, tmp_path: Path
) -> None:
    other = ca.issue("other")
    words = [flag, pair.cert, flag.replace("cert", "key"), other.key]
    done = subprocess.run(
        [*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: the key {other.key} does not belong to the certificate {pair.cert}\n"


# -- workers -----------------------------------------------------------------------------------------------------------


def refusal_of(router: RouterProcess, url: str) -> str:
    """Return what a client is told when the one worker, whatever its health, cannot be reached."""
    assert router.ask("PUT", "/workers/" + quote(url, safe=""), {"disable_health_check": True}).status == 202
    router.until_healthy(url)
    answer = router.post(CHAT, BODY)
    assert (answer.status, answer.json()["error"]["code"]) == (502, "worker_unreachable"), answer
    return str(answer.json()["error"]["message"])


def test_https_workers_are_verified_by_default(ca: Authority) -> None:
    """By the system's authorities, which do not know this one."""
    with tls_worker(ca.issue("w")) as worker, router_process([worker.url], *ONCE, healthy=False) as router:
        said = last_error(router, worker.url)
        assert "the worker's certificate is not accepted" in said
        assert "--ca-cert-paths" in said
        assert "Traceback" not in router.log()


@pytest.mark.parametrize(
    ("names", "trusted", "said"),
    [
        ("DNS:elsewhere.example", True, "certificate is not accepted: IP address mismatch"),
        (LOCAL, False, "certificate is not accepted: unable to get local issuer certificate; name its CA in --ca-cert"),
    ],
)
def test_clients_are_told_why_a_worker_is_not_trusted(
    ca: Authority, stranger: Authority, names: str, trusted: bool, said: str
) -> None:
    flags = ("--ca-cert-paths", (ca if trusted else stranger).cert, "--disable-health-check", *ONCE)
    with tls_worker(ca.issue("w", names)) as worker, router_process([worker.url], *flags) as router:
        answer = router.post(CHAT, BODY)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "worker_unreachable")
        assert said in answer.json()["error"]["message"]
        assert not worker.asked[CHAT]


def test_a_worker_that_wants_a_certificate_gets_it(ca: Authority, stranger: Authority) -> None:
    mine = ca.issue("me")
    flags = ("--ca-cert-paths", ca.cert, stranger.cert, "--client-cert-path", mine.cert, "--client-key-path", mine.key)
    with tls_worker(stranger.issue("w"), clients=ca.cert) as worker, router_process([worker.url], *flags) as router:
        assert router.post(CHAT, BODY).status == 200
        assert worker.asked[CHAT] == 1


@pytest.mark.parametrize("shown", [False, True], ids=["none", "of a stranger"])
def test_a_worker_that_refuses_the_routers_certificate_is_explained(
    ca: Authority, stranger: Authority, shown: bool
) -> None:
    mine = stranger.issue("me")
    flags = ["--ca-cert-paths", ca.cert, "--disable-health-check", *ONCE]
    if shown:
        flags += ["--client-cert-path", mine.cert, "--client-key-path", mine.key]
    with tls_worker(ca.issue("w"), clients=ca.cert) as worker, router_process([worker.url], *flags) as router:
        answer = router.post(CHAT, BODY)
        assert answer.status == 502
        assert "--client-cert-path" in answer.json()["error"]["message"]


def test_https_to_a_worker_without_tls_is_explained(ca: Authority) -> None:
    with tls_worker(ca.issue("w")) as worker:
        plain = worker.url.replace("https", "http")
        with router_process([plain], "--disable-health-check", *ONCE) as router:
            assert router.post(CHAT, BODY).status == 502  # the router only sees that the connection was closed


def test_http_spoken_where_https_is_expected(ca: Authority) -> None:
    from routers import plain_worker

    with plain_worker({}) as worker:
        secure = worker.url.replace("http", "https")
        with router_process([secure], "--disable-health-check", *ONCE) as router:
            answer = router.post(CHAT, BODY)
            assert answer.json()["error"]["code"] == "worker_unreachable"
            assert "its URL may have to begin with http://" in answer.json()["error"]["message"]
