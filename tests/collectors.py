"""Collectors of OpenTelemetry traces that speak the real protocols: OTLP over HTTP/protobuf, and over gRPC.

with collector("grpc") as got:
    ... "--otlp-traces-endpoint", got.endpoint ...
    spans = got.until(lambda spans: len(spans) == 3)
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

WITHIN = 30.0


class Got(NamedTuple):
    """A span as it arrived. Ids in hexadecimal digits, "" for no parent; times in nanoseconds since 1970; `service` is
    the service.name of the process that sent it."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    error: bool


class Collector:
    """Keeps what it is sent. resource: the attributes of the last resource."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.resource: dict[str, Any] = {}
        self._spans: list[Got] = []
        self._news = threading.Condition()

    def take(self, request: service.ExportTraceServiceRequest) -> None:
        found = []
        for of_resource in request.resource_spans:
            self.resource = _values(of_resource.resource.attributes)
            service = str(self.resource.get("service.name", ""))
            found += [_got(service, span) for of_scope in of_resource.scope_spans for span in of_scope.spans]
        with self._news:
            self._spans += found
            self._news.notify_all()

    def until(self, holds: Callable[[list[Got]], object]) -> list[Got]:
        """Wait until what has arrived is as wanted; return it."""
        deadline = time.monotonic() + WITHIN
        with self._news:
            while not holds(self._spans):
                assert self._news.wait(deadline - time.monotonic()), self._spans
            return list(self._spans)

    def of_requests(self, number: int) -> list[Got]:
        """Wait until so many requests have ended; return all spans."""
        return self.until(lambda spans: sum(span.kind == "SERVER" for span in spans) >= number)


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _got(service: str, span: Span) -> Got:
    return Got(
        service,
        span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        span.status.code == 2,
    )


class _Handler(http.server.BaseHTTPRequestHandler):
    collector: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        found = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        if found:
            self.collector.take(service.ExportTraceServiceRequest.FromString(body))
        answer = service.ExportTraceServiceResponse().SerializeToString()
        self.send_response(200 if found else 404)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


class _Servicer(service_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: service.ExportTraceServiceRequest, context: object) -> Any:
        self._collector.take(request)
        return service.ExportTraceServiceResponse()


@contextlib.contextmanager
def collector(protocol: str) -> Iterator[Collector]:
    """Yield a collector that listens."""
    made = Collector()
    if protocol == "grpc":
        with futures.ThreadPoolExecutor(2) as pool:
            grpc_server = grpc.server(pool)
            service_grpc.add_TraceServiceServicer_to_server(_Servicer(made), grpc_server)  # type: ignore[no-untyped-call]
            made.endpoint = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
            grpc_server.start()
            try:
                yield made
            finally:
                grpc_server.stop(0).wait(WITHIN)
        return
    handler = type("Handler", (_Handler,), {"collector": made})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        made.endpoint = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join(WITHIN)
