"""Engines are added, removed, killed and restarted while clients are served: a constant load must not notice."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import WITHIN, RouterProcess, engine_on_fixed_port, plain_worker, router_process

QUICK = ("--health-check-interval-secs", "0.1", "--worker-startup-check-interval", "0.05")
TOKENS = 4
"""An answer takes about 30 ms, nearly all of it before its first byte: an engine that dies while it computes has sent
nothing yet, and such a request can be retried on another one."""


class Load:
    """Clients that send the next request when they are answered, each on a kept connection, from `with` to its end.

    Each begins a new conversation with every fourth request: a new prefix goes to the worker with the smallest tree, so
    a worker that is new or empty gets its share.

    served   answers with status 200 and the complete text
    refused  other statuses, with the answer's headers
    broken   what came instead of an answer
    """

    def __init__(self, url: str, clients: int = 6) -> None:
        self.served = 0
        self.refused: list[tuple[int, dict[str, str]]] = []
        self.broken: list[str] = []
        self._address = urlsplit(url).netloc
        self._news = threading.Condition()
        self._over = False
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(WITHIN)
        assert not any(thread.is_alive() for thread in self._threads)

    def until_served(self, more: int) -> None:
        """Wait for so many more answers."""
        with self._news:
            goal = self.served + more
            assert self._news.wait_for(lambda: self.served >= goal, WITHIN), self.failures()

    def failures(self) -> str:
        return f"{self.served} served; {[status for status, _ in self.refused]}; {self.broken}"

    def none_failed(self) -> bool:
        return not self.refused and not self.broken

    def _ask(self, client: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=WITHIN)
        with contextlib.closing(connection):
            for n in itertools.count():
                if self._over:
                    return
                beginning = f"{client}.{n // 4}: a conversation with a beginning of its own. " * 10
                sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
                body = json.dumps({"text": f"{beginning} Question {n}", "sampling_params": sampling})
                try:
                    connection.request("POST", "/generate", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    self._note(answer.status, dict(answer.getheaders()), answer.read())
                except (OSError, http.client.HTTPException) as exc:
                    self.broken.append(repr(exc))
                    connection.close()

    def _note(self, status: int, headers: dict[str, str], body: bytes) -> None:
        with self._news:
            if status != 200:
                self.refused.append((status, headers))
            elif json.loads(body)["meta_info"]["completion_tokens"] != TOKENS:
                self.broken.append(body.decode())
            else:
                self.served += 1
            self._news.notify_all()


@contextlib.contextmanager
def mortal_engines(n: int) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Yield engines by URL that a test may kill and `revive`."""
    engines = {url: process for process, url in (engine_on_fixed_port() for _ in range(n))}
    try:
        for url in engines:
            wait_until_healthy(url)
        yield engines
    finally:
        for process in engines.values():
            end_engine(process)


def kill(engines: dict[str, subprocess.Popen[str]], url: str) -> None:
    """Kill an engine as a crash or the kernel would."""
    engines[url].kill()
    engines[url].wait(WITHIN)


def revive(engines: dict[str, subprocess.Popen[str]], url: str) -> None:
    """Start it again at the same address: another process, with an empty cache."""
    end_engine(engines[url])
    engines[url], again = start_engine("--port", str(urlsplit(url).port))
    assert again == url


def nothing_runs(router: RouterProcess) -> bool:
    return all(worker["load"] == 0 for worker in router.workers().values())


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(2) as urls:
        yield urls


# -- the three commands ------------------------------------------------------------------------------------


def test_add_and_remove_while_serving(urls: list[str]) -> None:
    old, new = urls
    with router_process([old], *QUICK) as router:
        with Load(router.url) as load:
            load.until_served(20)
            added = router.post("/add_worker?url=" + quote(new, safe=""))
            assert (added.status, added.body.decode()) == (200, f"Successfully added worker: {new}")
            assert router.get("/list_workers").json() == {"urls": [old, new]}
            router.until(lambda: router.worker(new)["processed"] > 0)

            removed = router.post("/remove_worker?url=" + quote(old, safe=""))
            assert (removed.status, removed.body.decode()) == (200, f"Successfully removed worker: {old}")
            assert router.get("/list_workers").json() == {"urls": [new]}
            before = router.worker(new)["processed"]
            load.until_served(20)
            assert router.worker(new)["processed"] > before
        assert load.none_failed(), load.failures()
        router.until(lambda: nothing_runs(router))


def test_add_answers_when_the_engine_is_healthy_and_nothing_waits_meanwhile(urls: list[str]) -> None:
    """The test decides when the engine is healthy: however long the router takes to start, adding lasts until then."""
    starting: dict[str, tuple[int, Mapping[str, str], bytes]] = {
        "/health": (503, {}, b""),
        "/generate": (
            200,
            {"content-type": "application/json"},
            json.dumps({"text": "y", "meta_info": {"completion_tokens": TOKENS}}).encode(),
        ),
    }
    with (
        plain_worker(starting) as slow,
        router_process(urls[:1], *QUICK) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        with Load(router.url, clients=2) as load:
            adding = pool.submit(router.post, "/add_worker?url=" + quote(slow.url, safe=""))
            router.until(lambda: slow.url in router.workers())
            load.until_served(3)
            assert not adding.done()
            assert router.worker(slow.url)["health"] == "starting"
            starting["/health"] = (200, {}, b"")
            assert adding.result(WITHIN).status == 200
            assert router.worker(slow.url)["health"] == "healthy"
        assert load.none_failed(), load.failures()


def test_what_add_and_remove_refuse(urls: list[str]) -> None:
    nobody = "http://127.0.0.1:9"
    with router_process(urls[:1], *QUICK, "--worker-startup-timeout-secs", "0.3") as router:
        asked = {
            "/add_worker": 400,
            "/add_worker?url=ftp://x": 400,
            "/add_worker?url=" + quote(urls[0], safe=""): 400,
            "/add_worker?url=" + quote(nobody, safe=""): 400,  # after 0.3 s
            "/remove_worker": 400,
            "/remove_worker?url=" + quote(nobody, safe=""): 404,
        }
        answers = {target: router.post(target) for target in asked}

        assert {target: answer.status for target, answer in answers.items()} == asked
        assert all(answer.json()["error"]["message"] for answer in answers.values())
        assert router.get("/list_workers").json() == {"urls": urls[:1]}


def test_a_removed_engine_finishes_its_stream(urls: list[str]) -> None:
    with router_process(urls[:1], *QUICK) as router:
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
        with contextlib.closing(connection):
            sampling = {"max_new_tokens": 100, "ignore_eos": True}
            body = json.dumps({"text": "x", "stream": True, "sampling_params": sampling})
            connection.request("POST", "/generate", body)
            stream = connection.getresponse()
            assert stream.readline().startswith(b"data: {")
            assert router.post("/remove_worker?url=" + quote(urls[0], safe="")).status == 200
            late = router.post("/generate", {"text": "y"})
            rest = stream.read()

        assert (late.status, late.json()["error"]["code"]) == (503, "no_workers")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b"data: {") == 99


# -- the REST family ---------------------------------------------------------------------------------------


def test_workers_by_rest_while_serving(urls: list[str]) -> None:
    old, new = urls
    with router_process([old], *QUICK, "--policy", "round_robin") as router:
        with Load(router.url, clients=3) as load:
            accepted = router.post("/workers", {"url": new, "priority": 7, "cost": 2.5, "labels": {"zone": "b"}})
            assert accepted.status == 202
            place = accepted.headers["location"]
            router.until_healthy(new)
            router.until(lambda: router.worker(new)["processed"] > 2)
            shown = router.get(place).json()
            assert (shown["url"], shown["priority"], shown["cost"]) == (new, 7, 2.5)
            assert shown["metadata"] == {"zone": "b"}

            assert router.ask("PUT", place, {"priority": 9}).status == 202
            assert router.get(place).json()["priority"] == 9
            assert router.ask("DELETE", place).status == 202
            assert router.get(place).status == 404
            assert list(router.workers()) == [old]
            load.until_served(5)
        assert load.none_failed(), load.failures()
        router.until(lambda: nothing_runs(router))


def test_drain_and_resume_while_serving(urls: list[str]) -> None:
    """A draining worker gets no new requests, the router keeps its prefixes, and `resume` gives it requests again."""
    with router_process(urls, *QUICK) as router:
        with Load(router.url) as load:
            router.until(lambda: all(worker["processed"] > 3 for worker in router.workers().values()))
            resting = router.worker(urls[0])
            place = f"/workers/{resting['id']}"
            assert router.post(place + "/drain").json()["draining"] is True
            router.until(lambda: router.get(place).json()["load"] == 0)
            before = router.get(place).json()
            load.until_served(30)
            after = router.get(place).json()
            assert (after["processed"], after["tree_size"]) == (before["processed"], before["tree_size"])
            assert after["tree_size"] > 0

            assert router.post(place + "/resume").json()["draining"] is False
            router.until(lambda: bool(router.get(place).json()["processed"] > before["processed"]))
        assert load.none_failed(), load.failures()


# -- engines that die --------------------------------------------------------------------------------------


def test_a_killed_engine_costs_no_request_and_rejoins() -> None:
    with mortal_engines(2) as engines, router_process(list(engines), *QUICK) as router:
        victim = next(iter(engines))
        with Load(router.url) as load:
            router.until(lambda: all(worker["processed"] > 3 for worker in router.workers().values()))
            kill(engines, victim)
            router.until(lambda: not router.worker(victim)["is_healthy"])
            router.until(lambda: router.worker(victim)["load"] == 0)
            before = router.worker(victim)["processed"]
            load.until_served(30)
            assert router.worker(victim)["processed"] == before
            assert load.none_failed(), load.failures()

            revive(engines, victim)
            router.until(lambda: bool(router.worker(victim)["processed"] > before))
        assert load.none_failed(), load.failures()
        router.until(lambda: nothing_runs(router))
        counted = router.samples()
        assert counted.total("sgl_router_request_errors_total") == 0
        assert counted.total("sgl_router_processed_requests_total") == load.served
        assert counted.total("sgl_router_worker_changes_total", what="restarted") == 1


def test_a_restarted_engine_is_known_to_be_empty() -> None:
    """A worker that only cannot be reached is not: it may still have its cache."""
    with mortal_engines(2) as engines, router_process(list(engines), *QUICK) as router:
        text = {"text": "The beginning that one of the two has. " * 10, "sampling_params": {"max_new_tokens": 1}}

        def holder() -> list[str]:
            return [url for url, worker in router.workers().items() if worker["tree_size"]]

        assert [router.post("/generate", text).status for _ in range(3)] == [200] * 3
        (victim,) = holder()
        kill(engines, victim)
        router.until(lambda: not router.worker(victim)["is_healthy"])
        assert holder() == [victim]
        revive(engines, victim)
        router.until_healthy(victim)
        assert holder() == []
        assert router.samples().total("sgl_router_tree_size") == 0
        assert router.post("/generate", text).json()["meta_info"]["cached_tokens"] == 0


def test_all_gone_is_503_at_once_and_all_back_is_service() -> None:
    with mortal_engines(2) as engines, router_process(list(engines), *QUICK) as router:
        with Load(router.url) as load:
            load.until_served(10)
            for url in engines:
                kill(engines, url)
            router.until(lambda: bool(load.refused) and load.refused[-1][0] == 503)

            refusal = router.post("/generate", {"text": "x"})
            assert refusal.status == 503
            assert refusal.json()["error"]["code"] == "no_available_workers"
            assert 1 <= int(refusal.headers["retry-after"]) <= 60, "a breaker's pause doubles with each failed probe"
            assert router.get("/readiness").status == 503
            assert router.get("/health").status == 200

            for url in engines:
                revive(engines, url)
            router.until_healthy()
            load.until_served(30)
            known = len(load.refused)
            load.until_served(30)
            assert len(load.refused) == known
        assert not load.broken
        assert {status for status, _ in load.refused} <= {502, 503}
        assert all("retry-after" in headers for status, headers in load.refused if status == 503)
        router.until(lambda: nothing_runs(router))
        router.until(lambda: router.get("/readiness").status == 200)


def test_duration_of_a_refusal(urls: list[str]) -> None:
    """With every breaker open no request is sent, so the answer takes no time: 200 of them fit into a second or two."""
    with router_process(["http://127.0.0.1:9"], "--disable-health-check", healthy=False) as router:
        first = [router.post("/generate", {"text": "x"}).status for _ in range(3)]
        assert first[0] == 502
        assert first[-1] == 503
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
        statuses: list[Any] = []
        with contextlib.closing(connection):
            for _ in range(200):
                connection.request("POST", "/generate", '{"text": "x"}')
                answer = connection.getresponse()
                statuses.append((answer.status, len(answer.read()) > 0))
        assert statuses == [(503, True)] * 200
        assert router.samples().total("sgl_router_request_duration_seconds_sum", route="/generate") < 2.0
