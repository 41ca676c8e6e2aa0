"""Limits and priorities of single keys, by the real command: what is refused and how, expiry, reload, the order of the
queue, metrics; in one process and in several."""

from __future__ import annotations

import http.server
import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from routers import WITHIN, Answer, PlainWorker, RouterProcess, ask, plain_worker, router_process

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
EAGER = ("--slow-start-secs", "0", "--worker-startup-check-interval", "0.05")
USAGE = b'{"id": "c", "usage": {"prompt_tokens": 40, "completion_tokens": 20}}'
processes = pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "several"])


class HeldWorker(http.server.ThreadingHTTPServer):
    """Answers a request when the test lets it. names: of the requests, in the order in which they came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HeldHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.doors = threading.Semaphore(0)
        self.names: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: the router may close a connection at any time."""


class _HeldHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HeldWorker

    def do_GET(self) -> None:
        self._answer(b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.names.append(body["messages"][0]["content"])
        assert self.server.doors.acquire(timeout=WITHIN)
        self._answer(b'{"id": "c"}')

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@pytest.fixture
def worker() -> Iterator[PlainWorker]:
    with plain_worker({CHAT: (200, JSON, USAGE)}) as each:
        yield each


@pytest.fixture
def held() -> Iterator[HeldWorker]:
    with HeldWorker() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            for _ in range(100):
                server.doors.release()
            server.shutdown()
            thread.join(WITHIN)


def write(path: Path, *entries: dict[str, Any]) -> str:
    path.touch(0o600)
    path.write_text(json.dumps({"keys": list(entries)}))
    return str(path)


def chat(router: RouterProcess, key: str, name: str = "x", model: str = "m", **headers: str) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": name}]}
    fields = headers | ({"authorization": f"Bearer {key}"} if key else {})
    return ask(router.url, "POST", CHAT, body, **fields)


def told(answer: Answer) -> str:
    return f"{answer.status} {answer.headers.get('x-smg-error-code', '')}".strip()


@processes
def test_keys_with_limits_models_hashes_and_expiry(worker: PlainWorker, more: tuple[str, ...], tmp_path: Path) -> None:
    slow = {"requests_per_second": 0.01, "burst": 2}
    hashed = "sha256:" + sha256(b"hashed-key").hexdigest()
    entries: list[dict[str, Any]] = [
        {"name": "ops", "key": "ops-key"},
        {"name": "alice", "key": "alice-key", **slow},
        {"name": "alice", "key": "alice-new", **slow},
        {"name": "bob", "key": hashed, "tokens_per_minute": 60, "models": ["m"]},
        {"name": "carol", "key": "carol-key", "expires": "2020-01-01"},
    ]
    path = write(tmp_path / "keys.json", *entries)
    flags = ("--api-key-file", path, *EAGER, *more)
    with router_process([worker.url], *flags, key="ops-key") as router:
        assert [told(chat(router, key)) for key in ("alice-key", "alice-new", "alice-key", "alice-new")] == [
            *("200", "200", "429 requests_limited", "429 requests_limited")
        ]
        refused = chat(router, "alice-key")
        assert 1 <= int(refused.headers["retry-after"]) <= 100
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "requests_limited")
        assert "the key alice than 0.01 per second" in error["message"]
        assert told(chat(router, "hashed-key", model="n")) == "403 model_not_allowed"
        assert told(chat(router, "hashed-key")) == "200"
        router.until(lambda: told(chat(router, "hashed-key")) == "429 tokens_limited")
        assert told(chat(router, hashed)) == "401 invalid_api_key"
        assert told(chat(router, "carol-key")) == "401 expired_api_key"
        assert told(chat(router, "ops-key")) == "200"

        def errors(client: str) -> float:
            return router.samples().total(
                "sgl_router_client_errors_total", client=client, error_code="requests_limited"
            )

        router.until(lambda: errors("alice") == 3)
        samples = router.samples()
        assert samples.total("sgl_router_client_requests_total", client="alice") == 5
        assert samples.by("sgl_router_client_tokens_total", "kind", client="alice") == {"prompt": 80, "completion": 40}
        assert samples.by("sgl_router_client_requests_total", "client").keys() == {"alice", "bob", "ops"}

        write(tmp_path / "keys.json", {"key": "ops-key", "name": "ops", "burst": 2})
        router.until(lambda: "the files loaded before stay in use" in router.log())
        assert told(chat(router, "alice-key")) == "429 requests_limited"
        entries[1] = {"name": "alice", "key": "alice-key"}
        entries[4]["expires"] = "2999-01-01"
        write(tmp_path / "keys.json", entries[0], entries[1], entries[4])
        router.until(lambda: told(chat(router, "alice-key")) == "200")
        router.until(lambda: told(chat(router, "carol-key")) == "200")
        router.until(lambda: told(chat(router, "hashed-key")) == "401 invalid_api_key")
        shown = router.log() + router.get("/metrics").body.decode()
        assert not [key for key in ("alice-key", "alice-new", "hashed-key", "carol-key", "ops-key") if key in shown]


@processes
def test_requests_in_flight_of_one_key(held: HeldWorker, more: tuple[str, ...], tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.yaml", {"name": "ops", "key": "o"}, {"name": "alice", "key": "a", "max_concurrent_requests": 2}
    )
    flags = ("--api-key-file", path, *EAGER, *more)
    with router_process([held.url], *flags, key="o") as router, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(chat, router, "a") for _ in range(2)]
        router.until(lambda: len(held.names) == 2)
        refused = chat(router, "a")
        assert (told(refused), refused.headers["retry-after"]) == ("429 concurrency_limited", "1")
        other = pool.submit(chat, router, "o")
        router.until(lambda: len(held.names) == 3)
        for _ in range(3):
            held.doors.release()
        assert [told(each.result(WITHIN)) for each in (*running, other)] == ["200"] * 3
        held.doors.release()
        router.until(lambda: told(chat(router, "a")) in ("200", "429 concurrency_limited"))
        held.doors.release()
        assert told(chat(router, "a")) == "200"


@processes
def test_the_queue_begins_with_the_highest_priority(held: HeldWorker, more: tuple[str, ...], tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.yaml",
        {"name": "plain", "key": "plain"},
        {"name": "vip", "key": "vip", "max_priority": "high"},
        {"name": "batch", "key": "batch", "priority": "low"},
    )
    flags = ("--api-key-file", path, "--max-concurrent-requests", "1", "--queue-size", "4", *EAGER, *more)
    flags += ("--priority-aging-secs", "1000")
    with router_process([held.url], *flags, key="plain") as router, ThreadPoolExecutor(8) as pool:
        asked: dict[str, Future[Answer]] = {}

        def queue(name: str, key: str, **headers: str) -> None:
            asked[name] = pool.submit(chat, router, key, name, **headers)
            if name == "running":
                router.until(lambda: held.names == ["running"])
            else:
                count = len(asked) - 1
                router.until(lambda: router.samples().total("sgl_router_waiting_requests") == count)

        queue("running", "plain")
        queue("batch", "batch")
        queue("first", "plain", x_smg_priority="20")
        queue("second", "plain")
        queue("vip", "vip", x_smg_priority="high")
        asked["more"] = pool.submit(chat, router, "vip", "more", x_smg_priority="interactive")
        assert told(asked["batch"].result(WITHIN)) == "429 queue_full", "it gave its slot up"
        assert told(chat(router, "batch")) == "429 queue_full"
        bad = chat(router, "plain", x_smg_priority="soon")
        assert (told(bad), bad.json()["error"]["param"]) == ("400 invalid_request", "x-smg-priority")
        for _ in range(5):
            held.doors.release()
        served = [name for name in asked if name != "batch"]
        assert [told(asked[name].result(WITHIN)) for name in served] == ["200"] * 5
        assert held.names == ["running", "vip", "more", "first", "second"]
        router.until(lambda: router.samples().total("sgl_router_waiting_requests") == 0)


@processes
def test_limits_of_a_model_under_all_its_names(worker: PlainWorker, more: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "router.yaml"
    limits = {"aliases": ["alias"], "requests-per-second": 0.01, "burst": 2}
    config.write_text(json.dumps({"models": {"m": limits}}))
    with router_process([worker.url], "--config", str(config), *EAGER, *more) as router:
        assert [told(chat(router, "", model=name)) for name in ("m", "alias", "m", "alias", "other")] == [
            *("200", "200", "429 requests_limited", "429 requests_limited", "200")
        ]
        assert 'the model "m" than 0.01 per second' in chat(router, "", model="alias").json()["error"]["message"]
        config.write_text(json.dumps({"models": {"m": {**limits, "burst": 0.5}}}))
        router.send_signal(signal.SIGHUP)
        router.until(lambda: "`burst` must be a number of at least 1" in router.log())
        config.write_text(json.dumps({"models": {"m": {"priority": "low"}}}))
        router.send_signal(signal.SIGHUP)
        router.until(lambda: told(chat(router, "", model="m")) == "200")


def test_without_keys_clients_may_lower_their_priority_and_raise_it_as_far_as_the_option_says(
    held: HeldWorker,
) -> None:
    flags = ("--max-concurrent-requests", "1", "--max-priority", "5", "--priority-aging-secs", "1000", *EAGER)
    with router_process([held.url], *flags) as router, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(chat, router, "", "running")]
        router.until(lambda: held.names == ["running"])
        for count, (name, priority) in enumerate((("low", "bulk"), ("five", "5"), ("system", "system")), 1):
            asked.append(pool.submit(chat, router, "", name, x_smg_priority=priority))
            router.until(lambda count=count: router.samples().total("sgl_router_waiting_requests") == count)  # type: ignore[misc]
        for _ in range(4):
            held.doors.release()
        assert [told(each.result(WITHIN)) for each in asked] == ["200"] * 4
        assert held.names == ["running", "five", "system", "low"]
