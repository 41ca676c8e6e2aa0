"""A collector of traces that answers strangely costs no memory, and gets no one else's credentials."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from sglang_router.observe.span_export import HTTP, exporter_of

MUCH = 1 << 28
"""Bytes that a collector would answer, if somebody read them."""


class Strange(http.server.ThreadingHTTPServer):
    """Answers with a status, fields and so many bytes. written: how many were taken; asked: requests."""

    daemon_threads = True

    def __init__(self, status: int = 200, length: int = 0, **fields: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.length, self.fields = status, length, fields
        self.written = self.asked = 0
        self.ended = threading.Semaphore(0)  # answers that are over
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Strange

    def do_POST(self) -> None:
        server = self.server
        server.asked += 1
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(server.status)
        for name, value in {"content-length": str(server.length), **server.fields}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for left in range(server.length, 0, -65536):
                self.wfile.write(bytes(min(left, 65536)))
                server.written += min(left, 65536)
        server.ended.release()

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def listening(server: Strange) -> Iterator[Strange]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_without_an_end_is_not_read(status: int) -> None:
    with listening(Strange(status, MUCH)) as collector:
        done = exporter_of(collector.endpoint, HTTP).export(())
        assert done is (SpanExportResult.SUCCESS if status == 200 else SpanExportResult.FAILURE)
        assert collector.ended.acquire(timeout=30.0), "the connection was closed"
        assert collector.written < MUCH / 8


def test_a_redirect_is_not_followed() -> None:
    with listening(Strange()) as other, listening(Strange(302, location=f"http://{other.endpoint}/")) as collector:
        assert exporter_of(collector.endpoint, HTTP).export(()) is SpanExportResult.FAILURE
        assert (collector.asked, other.asked) == (1, 0)


def test_usual_answers_are_read() -> None:
    with listening(Strange(200, 100)) as collector:
        exporter = exporter_of(collector.endpoint, HTTP)
        assert [exporter.export(()) for _ in range(3)] == [SpanExportResult.SUCCESS] * 3
        assert collector.asked == 3
        assert all(collector.ended.acquire(timeout=30.0) for _ in range(3))
        assert collector.written == 300
