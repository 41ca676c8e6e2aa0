"""Stored responses over sockets: whoever created one is asked about it, in one process or through relays."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from routers import RouterProcess, router_process

RESPONSES = "/v1/responses"
FLAGS = ("--policy", "round_robin", "--slow-start-secs", "0", "--metrics-interval-secs", "0")


class Store(http.server.ThreadingHTTPServer):
    """An engine that keeps its responses.

    made  ids of the responses that it keeps
    told  method and path of each request that is not a check
    """

    daemon_threads = True
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StoreHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.made: list[str] = []
        self.told: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the router may close a connection at any time."""


class _StoreHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        if parts[:3] != ["", "v1", "responses"]:
            return self._send(200, b"")
        self.server.told.append(f"{self.command} {self.path}")
        if parts[3] not in self.server.made:
            return self._send(404, b'{"error":{"message":"Response not found.","code":404}}')
        if self.command == "DELETE":
            self.server.made.remove(parts[3])
        return self._send(200, json.dumps({"id": parts[3], "of": self.server.url}).encode())

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if self.path != RESPONSES:
            return self.do_GET()
        asked = json.loads(body)
        self.server.told.append(f"POST {self.path}")
        previous = asked.get("previous_response_id")
        if previous is not None and previous not in self.server.made:
            return self._send(404, b'{"error":{"message":"Previous response not found.","code":404}}')
        self.server.made.append(f"resp_{next(self.server.numbers)}")
        response = {"id": self.server.made[-1], "of": self.server.url}
        if not asked.get("stream"):
            return self._send(200, json.dumps(response).encode())
        event = json.dumps({"type": "response.created", "response": response})
        return self._send(200, f"event: response.created\ndata: {event}\n\n".encode(), "text/event-stream")

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def stores(count: int) -> Iterator[list[Store]]:
    found = [Store() for _ in range(count)]
    threads = [threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01}) for store in found]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for store, thread in zip(found, threads, strict=True):
            store.shutdown()
            store.server_close()
            thread.join()


@pytest.fixture(params=[(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def started(request: pytest.FixtureRequest) -> Iterator[tuple[RouterProcess, list[Store]]]:
    with stores(3) as found, router_process([store.url for store in found], *FLAGS, *request.param) as router:
        yield router, found


def create(router: RouterProcess, **fields: Any) -> dict[str, Any]:
    answer = router.post(RESPONSES, {"input": "hi", **fields})
    assert answer.status == 200
    text = answer.body.partition(b"data: ")[2] if fields.get("stream") else answer.body
    event: dict[str, Any] = json.loads(text)
    return event["response"] if fields.get("stream") else event


def test_a_response_is_asked_for_where_it_was_made(started: tuple[RouterProcess, list[Store]]) -> None:
    router, found = started
    made = [create(router, stream=number % 2 == 1) for number in range(6)]
    assert {len(store.made) for store in found} == {2}, "new ones go to all workers in turn"
    for store in found:
        store.told.clear()
    for response in made:
        path = f"{RESPONSES}/{response['id']}"
        assert router.get(path).json() == response
        assert router.get(f"{path}/input_items?limit=5").json() == response
        assert router.post(f"{path}/cancel", b"").json() == response
        assert create(router, previous_response_id=response["id"])["of"] == response["of"]
        assert router.ask("DELETE", path).json() == response
        assert router.get(path).status == 404
    assert [len(store.told) for store in found] == [12, 12, 12], "nobody else was asked"
    assert router.samples().by("sgl_router_policy_decisions_total", "branch") == {"turn": 6, "holder": 36}


def test_a_response_that_the_router_does_not_know_is_looked_for(started: tuple[RouterProcess, list[Store]]) -> None:
    router, found = started
    found[2].made.append("resp_old")
    assert router.get(f"{RESPONSES}/resp_old").json()["of"] == found[2].url
    assert router.get(f"{RESPONSES}/resp_old").status == 200
    assert len(found[2].told) == 2
    assert len(found[0].told) <= 1
    assert len(found[1].told) <= 1
    found[1].made.append("resp_older")
    assert create(router, previous_response_id="resp_older")["of"] == found[1].url
    for store in found:
        store.told.clear()
    answer = router.get(f"{RESPONSES}/resp_nobody")
    assert (answer.status, answer.json()["error"]["message"]) == (404, "Response not found.")
    assert [store.told for store in found] == [[f"GET {RESPONSES}/resp_nobody"]] * 3, "each was asked once"
    assert router.post(RESPONSES, {"input": "x", "previous_response_id": "resp_nobody"}).status == 404


def test_other_methods_are_refused(started: tuple[RouterProcess, list[Store]]) -> None:
    router, _ = started
    assert router.ask("PUT", f"{RESPONSES}/resp_1").status == 405
    assert router.get(f"{RESPONSES}/resp_1/elsewhere").status == 404
