"""Restarts as an operator makes them: a new process takes over the port under load, and what the state file kept."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from certificates import Authority
from engines import end_engine, engine_processes, start_engine
from routers import (
    COMMAND,
    WITHIN,
    RouterProcess,
    engine_on_fixed_port,
    environment,
    free_port,
    plain_worker,
    router_process,
)

RESTARTS = int(os.environ.get("RESTARTS", "3"))
"""The requirement is 20: RESTARTS=20 pytest tests/blackbox/test_restart.py"""
CLIENTS = 3
"""Of each kind."""


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2, "--speed", "0") as urls:
        yield urls


class Routers:
    """Routers with the same address, one after the other."""

    def __init__(self, folder: Path, urls: Sequence[str], *flags: str) -> None:
        self._folder = folder
        self._port, metrics = free_port(), free_port()
        self._words = ["--port", str(self._port), "--prometheus-port", str(metrics), "--reuse-port", *flags]
        self._words += ["--worker-urls", *urls] if urls else []
        self._started: list[RouterProcess] = []

    def start(self) -> RouterProcess:
        """Start the next one; return when it listens."""
        log = self._folder / f"router-{len(self._started)}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*COMMAND, *self._words], env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        scheme = "https" if "--tls-cert-path" in self._words else "http"
        router = RouterProcess(process, f"{scheme}://127.0.0.1:{self._port}", "", log)
        self._started.append(router)
        router.until(lambda: "listening on" in router.log())
        return router

    def end(self) -> None:
        """Check that all of them ended cleanly."""
        for router in self._started:
            router.end()

    def kill(self) -> None:
        for router in self._started:
            if router.process.poll() is None:
                router.process.kill()
                router.process.wait()


@contextlib.contextmanager
def routers(folder: Path, urls: Sequence[str], *flags: str) -> Iterator[Routers]:
    them = Routers(folder, urls, *flags)
    try:
        yield them
        them.end()
    finally:
        them.kill()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False
    )


# -- the port ----------------------------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Sends one request after the other; `keeps`: on the same connection until an answer announces its end."""

    def __init__(self, url: str, keeps: bool, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.place = urlsplit(url).netloc
        self.keeps = keeps
        self.tls = tls
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.place, timeout=WITHIN)
        if self.tls is not None:
            connection = http.client.HTTPSConnection(self.place, timeout=WITHIN, context=self.tls)
        while not self.over.is_set():
            body = json.dumps({"text": f"You are {self.seen}", "sampling_params": {"max_new_tokens": 2}})
            try:
                connection.request("POST", "/generate", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                whole = answer.read().endswith(b"}")
            except (OSError, http.client.HTTPException) as exc:
                self.seen[repr(exc)] += 1
                connection.close()
                continue
            self.seen["served" if whole and answer.status == 200 else f"status {answer.status}"] += 1
            if answer.getheader("connection") == "close" or not self.keeps:
                connection.close()
        connection.close()


def until_served(router: RouterProcess, clients: Sequence[Client]) -> None:
    """Wait until each client was served some more times."""
    enough = [client.seen["served"] + 3 for client in clients]
    router.until(lambda: all(client.seen["served"] >= n for client, n in zip(clients, enough, strict=True)))


def test_rolling_restarts_lose_no_request(urls: list[str], tmp_path: Path) -> None:
    seen = restarted(urls, tmp_path, RESTARTS, "--state-file", str(tmp_path / "state"))
    print(f"{RESTARTS} restarts: {dict(seen)}")
    assert set(seen) == {"served"}


def test_nor_do_they_with_tls(urls: list[str], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("router")
    tls = ssl.create_default_context(cafile=authority.cert)
    seen = restarted(urls, tmp_path, 1, "--tls-cert-path", pair.cert, "--tls-key-path", pair.key, tls=tls)
    assert set(seen) == {"served"}


def restarted(
    urls: list[str], folder: Path, times: int, *flags: str, tls: ssl.SSLContext | None = None
) -> Counter[str]:
    """Replace a router that often; return what its clients saw."""
    with routers(folder, urls, "--disable-access-log", *flags) as them:
        router = them.start()
        clients = [Client(router.url, keeps, tls) for keeps in (True, False) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for _ in range(times):
                old, router = router, them.start()
                old.send_signal(signal.SIGTERM)
                assert old.exit_status(WITHIN) == 0
                until_served(router, clients)
        finally:
            for client in clients:
                client.over.set()
            for client in clients:
                client.join(WITHIN)
    return sum((client.seen for client in clients), Counter[str]())


def test_a_kept_connection_gets_a_last_answer_that_says_so(urls: list[str], tmp_path: Path) -> None:
    with routers(tmp_path, urls) as them:
        old = them.start()
        idle = http.client.HTTPConnection(urlsplit(old.url).netloc, timeout=WITHIN)
        with contextlib.closing(idle):
            idle.request("GET", "/health")
            first = idle.getresponse()
            assert (first.read(), first.getheader("connection")) == (b"OK", None)
            new = them.start()
            old.send_signal(signal.SIGTERM)
            old.until(lambda: no_longer_listens(old))
            idle.request("GET", "/health")
            last = idle.getresponse()
            assert (last.read(), last.getheader("connection")) == (b"OK", "close")
        assert old.exit_status() == 0
        assert new.get("/health").status == 200


def no_longer_listens(router: RouterProcess) -> bool:
    """Return whether it has closed its copy of the listening socket; another router still has one."""
    end = f":{urlsplit(router.url).port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    (inode,) = {fields[9] for fields in lines if fields[3] == "0A" and fields[1].endswith(end)}
    return f"socket:[{inode}]" not in {os.readlink(fd) for fd in Path(f"/proc/{router.process.pid}/fd").iterdir()}


class GatedWorker(http.server.BaseHTTPRequestHandler):
    """A worker whose streams end when the test says so."""

    protocol_version = "HTTP/1.1"
    gate: threading.Event

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"d\r\ndata: first\n\n\r\n")
        assert self.gate.wait(WITHIN)
        self.wfile.write(b"c\r\ndata: last\n\n\r\n0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def gated_worker(gate: threading.Event) -> Iterator[str]:
    handler = type("Handler", (GatedWorker,), {"gate": gate})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            gate.set()
            server.shutdown()
            thread.join(WITHIN)


def test_a_stream_that_runs_is_finished_by_the_old_one(tmp_path: Path) -> None:
    gate = threading.Event()
    with gated_worker(gate) as url, routers(tmp_path, [url]) as them:
        old = them.start()
        old.until_healthy(url)
        connection = http.client.HTTPConnection(urlsplit(old.url).netloc, timeout=WITHIN)
        with contextlib.closing(connection):
            connection.request("POST", "/generate", b'{"text": "x", "stream": true}')
            stream = connection.getresponse()
            assert stream.readline() == b"data: first\n"
            new = them.start()
            old.send_signal(signal.SIGTERM)
            old.until(lambda: no_longer_listens(old))
            gate.set()
            assert stream.read() == b"\ndata: last\n\n"
            # Its head was sent before the drain began: one more request may come, and its answer announces the close.
            connection.request("GET", "/health")
            last = connection.getresponse()
            assert (last.read(), last.getheader("connection")) == (b"OK", "close")
        assert old.exit_status() == 0
        assert new.get("/health").status == 200


def test_without_a_successor_the_port_is_free_at_once(urls: list[str]) -> None:
    with router_process(urls, "--reuse-port") as router:
        silent = socket.create_connection(("127.0.0.1", urlsplit(router.url).port or 0), timeout=WITHIN)
        with silent:
            router.send_signal(signal.SIGTERM)
            assert silent.recv(1) == b""
        assert router.exit_status(5.0) == 0


def test_a_successor_that_dies_is_none(urls: list[str], tmp_path: Path) -> None:
    with routers(tmp_path, urls) as them:
        old = them.start()
        for _ in range(2):  # it can be tried again
            new = them.start()
            new.send_signal(signal.SIGKILL)
            assert new.exit_status() == -signal.SIGKILL
            for _ in range(5):
                assert old.get("/health").status == 200
        old.until(lambda: old.log().count("as well") == 2)  # a line is written a moment after it is said


def test_both_must_have_the_option(urls: list[str], tmp_path: Path) -> None:
    with router_process(urls) as router:
        port = str(urlsplit(router.url).port)
        done = run("--port", port, "--prometheus-port", "0", "--reuse-port")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"127.0.0.1:{port} is in use" in done.stderr


# -- the state ---------------------------------------------------------------------------------------------------------


def test_everything_is_there_after_a_restart(urls: list[str], tmp_path: Path) -> None:
    text = "Once upon a time there was a router that forgot everything. " * 20
    flags = ("--state-file", str(tmp_path / "state"), "--worker-startup-check-interval", "0.05")
    with router_process([], *flags) as router:
        for url in urls:
            body = {"url": url, "priority": 7, "labels": {"rack": url[-5:]}, "api_key": f"key-of-{url[-5:]}"}
            assert router.post("/workers", body).status == 202
        router.until_healthy(*urls)
        for _ in range(4):
            answer = router.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": 1}})
            assert answer.status == 200
        before = router.workers()
        assert sum(worker["tree_size"] for worker in before.values()) >= len(text)
        drained = min(urls, key=lambda url: before[url]["tree_size"])
        assert router.post(f"/workers/{before[drained]['id']}/drain").status == 200

    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
    with router_process([], *flags) as router:
        router.until_healthy(*urls)
        after = router.workers()
        for url in urls:
            for same in ("id", "priority", "metadata", "tree_size"):
                assert after[url][same] == before[url][same]
            assert after[url]["draining"] == (url == drained)
        router.post("/generate", {"text": text, "sampling_params": {"max_new_tokens": 1}})
        branches = router.samples().by("sgl_router_policy_decisions_total", "branch")
        assert branches == {"hit": 1}
        for url in urls:
            assert f"key-of-{url[-5:]}" not in router.log()


def test_a_worker_that_a_file_names_comes_back_as_it_was_changed_or_not_at_all(tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"
    flags = ("--config", str(config), "--state-file", str(tmp_path / "state"))
    with plain_worker({}) as named, plain_worker({}) as added:
        config.write_text(f"worker_urls: [{named.url}]\n")
        with router_process([], *flags) as router:
            before = router.worker(named.url)
            assert router.ask("PUT", f"/workers/{before['id']}", {"labels": {"rack": "7"}}).status == 202
            assert router.post(f"/workers/{before['id']}/drain").status == 200
            assert router.post("/workers", {"url": added.url}).status == 202
        with router_process([], *flags) as router:
            after = router.worker(named.url)
            assert (after["id"], after["metadata"], after["draining"]) == (before["id"], {"rack": "7"}, True)
            assert set(router.workers()) == {named.url, added.url}
        config.write_text("port: 1\n")
        with router_process([], *flags) as router:
            assert list(router.workers()) == [added.url]


def test_a_worker_that_was_restarted_meanwhile_is_cold(tmp_path: Path) -> None:
    flags = ("--state-file", str(tmp_path / "state"), "--worker-startup-check-interval", "0.05")
    engine, url = engine_on_fixed_port("--speed", "0")
    try:
        with router_process([url], *flags) as router:
            router.post("/generate", {"text": "x" * 500, "sampling_params": {"max_new_tokens": 1}})
            assert router.worker(url)["tree_size"] >= 500
        end_engine(engine)
        with router_process([url], *flags, healthy=False) as router:
            router.until(lambda: bool(router.worker(url)["last_error"]))
            engine, _ = start_engine("--port", str(urlsplit(url).port), "--speed", "0")
            router.until_healthy(url)
            assert router.worker(url)["tree_size"] == 0
    finally:
        end_engine(engine)


def test_a_router_that_is_killed_loses_no_more_than_the_last_moments(tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = ("--state-file", str(state), "--state-interval-secs", "0.05")
    with plain_worker({}) as worker:
        with router_process([], *flags) as router:
            assert router.post("/workers", {"url": worker.url}).status == 202
            router.until(lambda: state.exists() and worker.url.encode() in state.read_bytes())
            router.send_signal(signal.SIGKILL)
            assert router.exit_status() == -signal.SIGKILL
        with router_process([], *flags) as router:
            assert list(router.workers()) == [worker.url]


def warnings(log: str) -> list[str]:
    """Return the warnings in a log, without the one about the container in which the tests may run."""
    return [line for line in log.splitlines() if " WARN " in line and "this is a container" not in line]


def test_a_damaged_file_is_one_warning(urls: list[str], tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(os.urandom(1000))
    with router_process(urls, "--state-file", str(state)) as router:
        assert router.post("/generate", {"text": "x"}).status == 200
        assert len(warnings(router.log())) == 1
        assert "was not written by this router" in router.log()
    with router_process(urls, "--state-file", str(state)) as router:  # by now the file is valid
        assert not warnings(router.log())


def test_a_state_file_in_no_folder_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run("--port", str(free_port()), "--prometheus-port", "0", "--state-file", str(tmp_path / "no" / "state"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "it must name a file in a folder that exists" in done.stderr
