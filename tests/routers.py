"""Real router processes for tests: the command as users start it, on free ports, ended as users end it.

    with engine_processes(2, "--speed", "0") as urls, router_process(urls, "--policy", "round_robin") as router:
        router.post("/generate", {"text": "x"}).status      # sends it a request
        router.samples().total("sgl_router_retries_total")  # what it counted
        router.until(lambda: router.worker(urls[0])["load"] == 0)

Whatever the test is about, the process must end on SIGTERM with status 0 within seconds, and its log may contain no
traceback and no warning of Python. A test that ends the router itself calls `router.exit_status()`.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from engines import start_engine

WITHIN = 30.0
"""Seconds after which a test that waits fails; a busy machine is slow."""
ENDS_WITHIN = 10.0
COMMAND = (sys.executable, "-W", "error", "-m", "sglang_router.launch_router")
_PORTS = (10_000, 29_000)
"""Ports below those that the system uses for outgoing connections. One of those could take the port of a server that is
down, and a connection to such a port can even connect to itself."""
_claims: deque[int] = deque()
"""Descriptors of UDP sockets, one for each port that `free_port` gave away lately, with the same number. They tell
other processes of tests, which choose ports too, what is taken. The system frees them when this process ends."""
_CLAIMS = 64


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Samples:
    """One scrape: the value of each sample by its name and labels."""

    def __init__(self, exposition: str) -> None:
        families = text_string_to_metric_families(exposition)
        self.all = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """Return the sum over the samples of that name that have these labels; 0 without any."""
        wanted = set(labels.items())
        return sum(value for (known, has), value in self.all.items() if known == name and wanted <= set(has))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Return the same by the values of one label, without those that are 0."""
        values = {dict(has)[label] for known, has in self.all if known == name and label in dict(has)}
        totals = {value: self.total(name, **{label: value}, **labels) for value in values}
        return {value: total for value, total in totals.items() if total}


class RouterProcess:
    """A router that runs.

    url          where clients reach it
    metrics_url  the metrics port
    key          sent with every request that has no other
    tls          the context for requests to an https URL
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        url: str,
        metrics_url: str,
        log: Path,
        key: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.process = process
        self.url = url
        self.metrics_url = metrics_url
        self._key = key
        self._tls = tls
        self._log = log
        self._written: str | None = None
        self._asked = False

    # -- its door ----------------------------------------------------------------------------------------

    def ask(self, method: str, target: str, value: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own; `value` goes as JSON, bytes as they are."""
        if self._key:
            headers.setdefault("authorization", f"Bearer {self._key}")
        return ask(self.url, method, target, value, self._tls, **headers)

    def get(self, target: str, **headers: str) -> Answer:
        return self.ask("GET", target, **headers)

    def post(self, target: str, value: Any = None, **headers: str) -> Answer:
        return self.ask("POST", target, value, **headers)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the answer of GET /workers, by URL."""
        return {worker["url"]: worker for worker in self.get("/workers").json()["workers"]}

    def worker(self, url: str) -> dict[str, Any]:
        """Return the answer of GET /workers/{id}."""
        answer = self.get("/workers/" + quote(url, safe=""))
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json()
        return found

    def samples(self, url: str = "") -> Samples:
        """Return a scrape of /metrics, or of `url`."""
        parts = urlsplit(url)
        answer = ask(f"{parts.scheme}://{parts.netloc}", "GET", parts.path) if url else self.get("/metrics")
        assert answer.status == 200, answer
        return Samples(answer.body.decode())

    # -- its life ----------------------------------------------------------------------------------------

    def until(self, holds: Callable[[], bool], within: float = WITHIN) -> None:
        """Wait until a condition holds; poll, because only requests can tell. A failure shows the log."""
        deadline = time.monotonic() + within
        while not holds():
            assert self.process.poll() is None, f"the router ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"not within {within} s; the end of the log:\n{self.log()[-4000:]}"
            time.sleep(0.01)

    def until_healthy(self, *urls: str) -> None:
        """Wait until these workers, or all workers, take requests."""

        def well() -> bool:
            workers = self.workers()
            return all(workers[url]["is_healthy"] for url in urls or workers)

        self.until(well)

    def log(self) -> str:
        """Return what it has written to standard error; after its end as well."""
        return self._written or self._log.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of a log in JSON; without an incomplete last line."""
        return [json.loads(line) for line in self.log().splitlines(keepends=True) if line.endswith("\n")]

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_status(self, within: float = ENDS_WITHIN) -> int:
        """Wait for its end, which the test has caused."""
        self._asked = True
        return self.process.wait(within)

    def end(self) -> None:
        """End it with SIGTERM, and check that nothing went wrong inside."""
        if not self._asked:
            assert self.process.poll() is None, f"ended before its time, {self.process.returncode}:\n{self.log()}"
            self.process.terminate()
            status = self.exit_status()
            assert status == 0, f"exit status {status}:\n{self.log()}"
        self._written = self.log()
        for bad in ("Traceback", "Exception ignored", "Warning:", "never retrieved"):
            assert bad not in self._written, self._written


def ask(
    url: str, method: str, target: str, value: Any = None, tls: ssl.SSLContext | None = None, /, **headers: str
) -> Answer:
    """Send one request to a base URL on a connection of its own."""
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=WITHIN)
    if tls is not None:
        connection = http.client.HTTPSConnection(host, timeout=WITHIN, context=tls)
    body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    fields = {"content-type": "application/json"} if body else {}
    with contextlib.closing(connection):
        connection.request(method, target, body, fields | {name.replace("_", "-"): v for name, v in headers.items()})
        got = connection.getresponse()
        return Answer(got.status, {name.lower(): v for name, v in got.getheaders()}, got.read())


class PlainWorker(http.server.ThreadingHTTPServer):
    """A worker that always gives the same answers, in threads of the test's process.

    answers  status, headers and body by path; any other path is 200 and empty, so the worker is healthy
    asked    number of requests by path
    seen     headers of the last request by path
    """

    daemon_threads = True

    def __init__(self, answers: Mapping[str, tuple[int, Mapping[str, str], bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _PlainHandler)
        self.answers = answers
        self.asked: Counter[str] = Counter()
        self.seen: dict[str, dict[str, str]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the router may close a connection at any time."""


class _PlainHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PlainWorker

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self._answer()

    def _answer(self) -> None:
        self.server.asked[self.path] += 1
        self.server.seen[self.path] = {name.lower(): value for name, value in self.headers.items()}
        status, headers, body = self.server.answers.get(self.path, (200, {}, b""))
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def plain_worker(answers: Mapping[str, tuple[int, Mapping[str, str], bytes]]) -> Iterator[PlainWorker]:
    """Yield a PlainWorker that listens."""
    with PlainWorker(answers) as worker:
        thread = threading.Thread(target=worker.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield worker
        finally:
            worker.shutdown()
            thread.join(WITHIN)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port on which nothing listens, and which no other process of tests gets before the caller uses it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = random.randrange(*_PORTS)
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            socket.create_server((host, port), family=family).close()
        except OSError:
            claim.close()
        else:
            _claims.append(claim.detach())
            if len(_claims) > _CLAIMS:
                os.close(_claims.popleft())
            return port


def engine_on_fixed_port(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start an engine that can be started again with the same URL: the system gives its port to nothing else."""
    for _ in range(5):
        with contextlib.suppress(AssertionError):
            return start_engine("--port", str(free_port()), *flags)
    raise AssertionError("no engine could be started")


def environment() -> dict[str, str]:
    """Return the environment without options for the router, but one: no load balancer has to notice that it ends."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_ROUTER_")}
    return {**others, "SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0"}


def start_router(
    urls: Sequence[str],
    *flags: str,
    log: Path,
    host: str = "127.0.0.1",
    key: str = "",
    tls: ssl.SSLContext | None = None,
    variables: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> RouterProcess:
    """Start a router process that answers GET /health; its workers may still be starting."""
    for _ in range(5):
        port, metrics_port = free_port(host), free_port(host)
        words = ["--host", host, "--port", str(port), *flags]
        if "--prometheus-port" not in flags:
            words += ["--prometheus-port", str(metrics_port)]
        if "--metrics-interval-secs" not in flags:
            words += ["--metrics-interval-secs", "0"]  # a test scrapes just after what it is about
        if urls:
            words += ["--worker-urls", *urls]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *words],
                env=environment() | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        name = f"[{host}]" if ":" in host else host
        url = f"{'https' if tls else 'http'}://{name}:{port}"
        router = RouterProcess(process, url, f"http://{name}:{metrics_port}/metrics", log, key, tls)
        try:
            if _listens(router):
                return router
        except BaseException:
            process.kill()
            process.wait()
            raise
        if "is in use" not in router.log():  # another process took the port first: try other ports
            break
    raise AssertionError(f"the router did not start, exit status {process.returncode}:\n{router.log()}")


def _listens(router: RouterProcess) -> bool:
    deadline = time.monotonic() + WITHIN
    while router.process.poll() is None:
        with contextlib.suppress(OSError):
            return router.get("/health").status == 200
        assert time.monotonic() < deadline, f"no answer within {WITHIN} s:\n{router.log()}"
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def router_process(
    urls: Sequence[str], *flags: str, host: str = "127.0.0.1", healthy: bool = True, **more: Any
) -> Iterator[RouterProcess]:
    """Yield a router in front of `urls`; with `healthy` when all of them are healthy. `more`: see `start_router`."""
    with tempfile.TemporaryDirectory() as folder:
        router = start_router(urls, *flags, log=Path(folder) / "router.log", host=host, **more)
        try:
            if urls and healthy:
                router.until_healthy(*urls)
            yield router
            router.end()
        finally:
            if router.process.poll() is None:
                router.process.kill()
                router.process.wait()
