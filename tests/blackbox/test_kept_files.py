"""Files and batches over sockets: what one engine keeps is asked for there, in one process or through relays."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from routers import RouterProcess, router_process

FLAGS = ("--policy", "round_robin", "--slow-start-secs", "0", "--metrics-interval-secs", "0")
FORM = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'


class Shelf(http.server.ThreadingHTTPServer):
    """An engine that keeps files and batches.

    kept  what it keeps, by id, with the content
    told  method and path of each request that is not a check
    """

    daemon_threads = True
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ShelfHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.kept: dict[str, bytes] = {}
        self.told: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the router may close a connection at any time."""


class _ShelfHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Shelf

    def do_GET(self) -> None:
        shelf, parts = self.server, urlsplit(self.path)
        steps = parts.path.split("/")
        if steps[1:2] != ["v1"] or steps[2] not in ("files", "batches"):
            return self._send(200, b"")
        shelf.told.append(f"{self.command} {parts.path}")
        if len(steps) == 3:
            query = parse_qs(parts.query)
            names = [name for name in shelf.kept if name.startswith(steps[2][:4])]
            after, limit = query.get("after", [""])[0], int(query.get("limit", ["100"])[0])
            names = names[names.index(after) + 1 :] if after else names
            data = [{"id": name} for name in names[:limit]]
            return self._json({"object": "list", "data": data, "has_more": len(names) > limit})
        if steps[3] not in shelf.kept:
            return self._json({"error": {"message": "There is no such thing here."}}, 404)
        if self.command == "DELETE":
            del shelf.kept[steps[3]]
        elif steps[4:] == ["content"]:
            return self._send(200, shelf.kept[steps[3]], "application/octet-stream")
        return self._json({"id": steps[3], "of": shelf.url})

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        shelf, path = self.server, self.path.partition("?")[0]
        if path not in ("/v1/files", "/v1/batches"):
            return self.do_GET()
        shelf.told.append(f"POST {path}")
        if path == "/v1/batches" and (wanted := json.loads(body)["input_file_id"]) not in shelf.kept:
            return self._json({"error": {"message": f"No file {wanted}."}}, 404)
        name = f"{path[4:8]}-{next(shelf.numbers)}"
        shelf.kept[name] = body
        return self._json({"id": name, "of": shelf.url})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def shelves(count: int) -> Iterator[list[Shelf]]:
    found = [Shelf() for _ in range(count)]
    threads = [threading.Thread(target=shelf.serve_forever, kwargs={"poll_interval": 0.01}) for shelf in found]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for shelf, thread in zip(found, threads, strict=True):
            shelf.shutdown()
            shelf.server_close()
            thread.join()


@pytest.fixture(params=[(), ("--relay-processes", "2")], ids=["one process", "two relays"])
def started(request: pytest.FixtureRequest) -> Iterator[tuple[RouterProcess, list[Shelf]]]:
    with shelves(2) as found, router_process([shelf.url for shelf in found], *FLAGS, *request.param) as router:
        yield router, found


def upload(router: RouterProcess, content: bytes = FORM) -> dict[str, Any]:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = router.ask("POST", "/v1/files", content, **headers)
    assert answer.status == 200
    found: dict[str, Any] = answer.json()
    return found


def test_files_and_their_batches_stay_with_their_engine(started: tuple[RouterProcess, list[Shelf]]) -> None:
    router, found = started
    large = FORM.replace(b"batch\r\n", b"x" * 700_000 + b"\r\n")
    files = [upload(router, large if number else FORM) for number in range(4)]
    assert {len(shelf.kept) for shelf in found} == {2}, "new ones go to all engines in turn"
    for shelf in found:
        shelf.told.clear()
    for number, file in enumerate(files):
        path = f"/v1/files/{file['id']}"
        assert router.get(path).json() == file
        assert router.get(f"{path}/content").body == (large if number else FORM)
        head = router.ask("HEAD", f"{path}/content")
        assert (head.status, int(head.headers["content-length"])) == (200, len(large if number else FORM))
        batch = router.post("/v1/batches", {"input_file_id": file["id"]}).json()
        assert batch["of"] == file["of"]
        assert router.get(f"/v1/batches/{batch['id']}").json() == batch
        assert router.post(f"/v1/batches/{batch['id']}/cancel", b"").json() == batch
        assert router.ask("DELETE", path).json() == file
        assert router.get(path).status == 404
    assert [len(shelf.told) for shelf in found] == [16, 16], "nobody else was asked"


def test_what_the_router_does_not_know_is_looked_for(started: tuple[RouterProcess, list[Shelf]]) -> None:
    router, found = started
    found[1].kept["file-old"] = b"old"
    assert router.get("/v1/files/file-old/content").body == b"old"
    assert router.get("/v1/files/file-old").json()["of"] == found[1].url
    assert router.post("/v1/batches", {"input_file_id": "file-old"}).json()["of"] == found[1].url
    answer = router.post("/v1/batches", {"input_file_id": "file-nobody"})
    assert (answer.status, answer.json()["error"]["message"]) == (404, "No file file-nobody.")


def test_lists_are_of_all_engines_in_pages(started: tuple[RouterProcess, list[Shelf]]) -> None:
    router, _ = started
    made = {upload(router)["id"] for _ in range(5)}
    seen: list[str] = []
    page = router.get("/v1/files?limit=2").json()
    while True:
        seen += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        page = router.get(f"/v1/files?limit=2&after={page['last_id']}").json()
    assert len(seen) == 5
    assert set(seen) == made
    assert router.get("/v1/batches").json() == {"object": "list", "data": [], "has_more": False}
    assert router.ask("PUT", "/v1/files", b"").status == 405


def test_unknown_paths_through_relays_too() -> None:
    with shelves(1) as (shelf,):
        for more in ((), ("--relay-processes", "2")):
            flags = (*FLAGS, "--relay-unknown-paths", "--api-key", "k", *more)
            with router_process([shelf.url], *flags, key="k") as router:
                assert router.get("/v1/other").status == 200
                assert router.get("/v1/other", authorization="Bearer other").status == 401
                assert router.get("/workers").json()["total"] == 1
                assert router.get("/%77orkers").json()["total"] == 1, "the router's own"
                assert router.get("/a/../workers").status == 404
                samples = router.samples()
                assert samples.by("smg_router_requests_total", "endpoint") == {"unknown": 2}
                assert samples.by("sgl_router_requests_total", "route") == {"/{path}": 2}
