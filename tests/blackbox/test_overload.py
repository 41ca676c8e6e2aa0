"""More load than capacity, as operators and clients see it: exact limits, order, refusals, and goodput."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import quote, urlsplit

import pytest

from arrivals import offer, request, schedule
from engines import engine_processes
from routers import WITHIN, Answer, RouterProcess, ask, router_process

FLAGS = ("--slow-start-secs", "0", "--worker-startup-check-interval", "0.05")
CLIENTS = 200
BATCH = 4
ENGINE = ("--max-running-requests", str(BATCH), "--decode-base-ms", "20", "--decode-ms-per-request", "0")


class CountingWorker(http.server.ThreadingHTTPServer):
    """Counts its requests in flight, exactly. Nothing is answered before `doors` are open.

    peak    the most requests in flight at once
    bodies  bodies of the requests, in order
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _CountingHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.doors = threading.Event()
        self.lock = threading.Lock()
        self.running = self.peak = 0
        self.bodies: list[bytes] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: a client of the router that leaves closes the connection too."""


class _CountingHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingWorker

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        worker = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        with worker.lock:
            worker.running += 1
            worker.peak = max(worker.peak, worker.running)
            worker.bodies.append(body)
        worker.doors.wait(WITHIN)
        with worker.lock:
            worker.running -= 1  # before the answer: its last byte frees the place
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def counting_worker() -> Iterator[CountingWorker]:
    with CountingWorker() as worker:
        thread = threading.Thread(target=worker.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield worker
        finally:
            worker.doors.set()
            worker.shutdown()
            thread.join(WITHIN)


@contextlib.contextmanager
def asking(router: RouterProcess, worker: CountingWorker, count: int) -> Iterator[list[Future[Answer]]]:
    """So many clients at once, numbered; the doors open at the latest when the block ends."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield [pool.submit(router.post, "/generate", {"text": f"{number}"}) for number in range(count)]
        finally:
            worker.doors.set()


def waiting(router: RouterProcess) -> float:
    return router.samples().total("sgl_router_waiting_requests")


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--max-concurrent-requests", "--max-running-per-worker"])
def test_200_clients_and_exactly_7_places(option: str) -> None:
    """The queue takes all but the 7, and not one more."""
    flags = (option, "7", "--queue-size", f"{CLIENTS - 7}")
    with (
        counting_worker() as worker,
        router_process([worker.url], *flags, *FLAGS) as router,
        asking(router, worker, CLIENTS) as asked,
    ):
        router.until(lambda: waiting(router) == CLIENTS - 7)
        router.until(lambda: worker.running == 7)
        assert router.worker(worker.url)["load"] == 7
        one_more = router.post("/generate", {"text": "x"})
        assert (one_more.status, one_more.json()["error"]["code"]) == (429, "queue_full")
        worker.doors.set()
        assert [answer.result(WITHIN).status for answer in asked] == [200] * CLIENTS
        assert worker.peak == 7
        assert waiting(router) == 0


def refused(router: RouterProcess) -> tuple[int, str, str]:
    """Send a request that is refused with Retry-After; the connection stays usable. Return status, code and type."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
    with contextlib.closing(connection):
        connection.request("POST", "/generate", b'{"text": "x"}', {"content-type": "application/json"})
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        assert answer.headers["x-smg-error-code"] == error["code"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        sock = connection.sock
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        assert connection.sock is sock
    return answer.status, error["code"], error["type"]


@pytest.mark.parametrize("option", ["--max-concurrent-requests", "--max-running-per-worker"])
def test_who_comes_first_is_served_first_and_who_finds_the_queue_full_not_at_all(option: str) -> None:
    with (
        counting_worker() as worker,
        router_process([worker.url], option, "1", "--queue-size", "5", *FLAGS) as router,
        ThreadPoolExecutor(6) as pool,
    ):
        try:
            for number in range(6):
                pool.submit(router.post, "/generate", {"text": f"{number}"})
                if number:
                    router.until(lambda number=number: waiting(router) == number)  # type: ignore[misc]
                else:
                    router.until(lambda: worker.running == 1)
            assert refused(router) == (429, "queue_full", "rate_limit_error")
        finally:
            worker.doors.set()
        router.until(lambda: len(worker.bodies) == 6)
        assert [json.loads(body)["text"] for body in worker.bodies] == [f"{number}" for number in range(6)]


@pytest.mark.parametrize("option", ["--max-concurrent-requests", "--max-running-per-worker"])
def test_who_waits_too_long_is_408(option: str) -> None:
    with (
        counting_worker() as worker,
        router_process([worker.url], option, "1", "--queue-timeout-secs", "0.1", *FLAGS) as router,
        asking(router, worker, 1) as asked,
    ):
        router.until(lambda: worker.running == 1)
        assert refused(router) == (408, "queue_timeout", "timeout_error")
        worker.doors.set()
        assert asked[0].result(WITHIN).status == 200
        assert len(worker.bodies) == 1, "a refused request reached the worker"


def test_too_many_in_a_second_are_429() -> None:
    with (
        counting_worker() as worker,
        router_process([worker.url], "--rate-limit-tokens-per-second", "1", *FLAGS) as router,
        asking(router, worker, 1),
    ):
        router.until(lambda: len(worker.bodies) == 1)
        worker.doors.set()
        answers = [router.post("/generate", {"text": "x"}) for _ in range(3)]  # normally in less than a second
        limited = [answer for answer in answers if answer.status == 429]
        assert all(answer.json()["error"]["code"] == "rate_limited" for answer in limited)
        assert all(answer.headers["retry-after"] == "1" for answer in limited)
        assert len(worker.bodies) == 4 - len(limited)
        assert limited


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    """Three engines, each of which computes four requests at once and a pass in 20 ms."""
    with engine_processes(3, *ENGINE) as urls:
        yield urls


def loads(urls: Sequence[str]) -> list[tuple[int, int]]:
    """Return the running and waiting requests, by the engines' own count."""
    told = [ask(url, "GET", "/v1/loads").json()["aggregate"] for url in urls]
    return [(load["total_running_reqs"], load["total_waiting_reqs"]) for load in told]


@contextlib.contextmanager
def streams(router: RouterProcess, count: int) -> Iterator[list[socket.socket]]:
    """So many clients that read nothing; they leave when the block ends."""
    parts = urlsplit(router.url)
    address = (parts.hostname or "", parts.port or 0)
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            clients.append(stack.enter_context(socket.create_connection(address, WITHIN)))
            clients[-1].sendall(request(number, 8000))
        yield clients


def test_the_batch_grows_and_shrinks_with_the_engines(engines: list[str]) -> None:
    *two, third = engines
    full = (BATCH, 0)
    with router_process(two, "--max-running-per-worker", f"{BATCH}", *FLAGS) as router, streams(router, 14) as clients:
        router.until(lambda: loads(engines) == [full, full, (0, 0)] and waiting(router) == 6)
        assert router.post(f"/add_worker?url={quote(third, safe='')}").status == 200
        router.until(lambda: waiting(router) == 2)
        router.until(lambda: loads(engines) == [full, full, full])

        assert router.post("/workers/" + quote(third, safe="") + "/drain").status == 200
        for client in clients:
            client.close()
        router.until(lambda: loads(engines) == [(0, 0)] * 3)
        with streams(router, 12):
            router.until(lambda: loads(engines) == [full, full, (0, 0)] and waiting(router) == 4)
        router.until(lambda: loads(engines) == [(0, 0)] * 3)


def test_engines_never_have_more_than_their_batch(engines: list[str]) -> None:
    """While requests come and go, four times as many as there are places."""
    flags = ("--max-running-per-worker", f"{BATCH}")
    with router_process(engines, *flags, *FLAGS) as router, ThreadPoolExecutor(1) as pool:
        arrivals = schedule(40, 1.0, random.Random(1))
        offering = pool.submit(offer, router.url, arrivals, WITHIN)
        seen = []
        while not offering.done():
            seen += loads(engines)
        assert all(answer.whole for answer in offering.result())
    assert max(running + queued for running, queued in seen) == BATCH
    full = [number for number, worker in enumerate(seen) if worker == (BATCH, 0)]
    between = full[-1] - full[0]  # the look-outs before the first requests and after the last ones say nothing
    assert len(full) > between / 4, "they were not busy"


def test_goodput_at_three_times_the_load(engines: list[str]) -> None:
    """Three engines answer about 30 requests of 16 tokens per second. In time: first token within 1.5 s."""
    flags = ("--max-running-per-worker", f"{BATCH}", "--queue-size", "20", "--queue-timeout-secs", "0.7")
    goodput = {}
    with router_process(engines, *flags, *FLAGS) as router:
        for factor, warm_up in ((1, 0.0), (3, 1.5)):  # so long that without limits all later ones would be late
            answers = offer(router.url, schedule(25.0 * factor, warm_up + 1.5), patience=6.0)
            answers = [answer for answer in answers if answer.at >= warm_up]
            goodput[factor] = sum(answer.within(1.5) for answer in answers) / 1.5
            assert {answer.status for answer in answers} <= {200, 408, 429}
            assert all(answer.retry_after for answer in answers if answer.status != 200)
    assert goodput[1] > 12
    assert goodput[3] >= 0.9 * goodput[1]
