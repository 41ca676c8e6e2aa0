"""Error answers of the control plane: status, header fields, code, type, parameter and connection are fixed.

These are what programs read; the message is for people and may be reworded.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
from collections.abc import Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from routers import router_process
from sglang_router.access.host_names import OwnNames
from sglang_router.access.permissions import Access
from sglang_router.admin.app import create_metrics_app
from sglang_router.config.keys import ControlKey
from sglang_router.errors import RateLimited
from stack import Reply, Stack, stack

BEARER = 'Bearer realm="sglang-router"'
KEYS = Access((), (ControlKey("a", "A", "admin-key", "admin"), ControlKey("u", "U", "user-key", "user")))
USER = {"authorization": "Bearer user-key"}


class Case(NamedTuple):
    """A request and its error answer. `fields`: header fields besides those that every error answer has."""

    ask: str
    status: int
    code: str
    type: str = "invalid_request_error"
    body: bytes | None = None
    sent: Mapping[str, str] = MappingProxyType({})
    fields: Mapping[str, str] = MappingProxyType({})
    param: str | None = None


PLAIN = (
    Case("GET /nothing", 404, "not_found"),
    Case("POST /nothing", 404, "not_found", body=b"{}"),
    Case("GET /health/", 404, "not_found"),
    Case("DELETE /health", 405, "method_not_allowed", fields={"allow": "GET, HEAD"}),
    Case("GET /add_worker", 405, "method_not_allowed", fields={"allow": "POST"}),
    Case("PATCH /workers/x", 405, "method_not_allowed", fields={"allow": "GET, HEAD, PUT, DELETE"}),
    Case("GET /v1/chat/completions", 405, "method_not_allowed", fields={"allow": "POST"}),
    Case("DELETE /generate", 405, "method_not_allowed", fields={"allow": "POST"}),
    Case("OPTIONS /v1/audio/transcriptions", 405, "method_not_allowed", fields={"allow": "POST"}),
    Case("POST /add_worker", 400, "invalid_request", param="url"),
    Case("POST /workers", 400, "json_parse_error", body=b"{"),
    Case("POST /workers", 422, "unprocessable", body=b"{}"),
    Case("GET /workers/x", 404, "WORKER_NOT_FOUND"),
    Case("GET /scale", 409, "conflict"),
    Case("POST /restart_workers", 409, "conflict"),
    Case("GET /v1/models", 503, "no_workers", "service_unavailable", fields={"retry-after": "5"}),
    Case("POST /abort_request", 503, "no_workers", "service_unavailable", body=b"{}", fields={"retry-after": "5"}),
)
GUARDED = (
    Case("GET /workers", 401, "missing_api_key", fields={"www-authenticate": BEARER}),
    Case(
        "GET /workers",
        401,
        "invalid_api_key",
        sent={"authorization": "Bearer other"},
        fields={"www-authenticate": BEARER},
    ),
    Case("POST /flush_cache", 401, "missing_api_key", fields={"www-authenticate": BEARER}),
    Case("GET /flush_cache", 403, "forbidden", "permission_error", sent=USER, fields={"www-authenticate": BEARER}),
    Case("PUT /workers/x", 403, "forbidden", "permission_error", None, USER, {"www-authenticate": BEARER}),
)
REMOTE = Case(
    "POST /flush_cache",
    403,
    "forbidden",
    "permission_error",
    sent={"x-forwarded-for": "10.0.0.1"},
    fields={"www-authenticate": BEARER},
)


def check(reply: Reply, case: Case) -> None:
    """Compare the whole answer, except for its message."""
    method = case.ask.split()[0]
    headers = dict(reply.headers)
    length = int(headers.pop("content-length"))
    assert headers.pop("x-request-id")
    assert headers == {"content-type": "application/json", "x-smg-error-code": case.code, **case.fields}
    assert reply.status == case.status
    if method == "HEAD":
        assert reply.body == b""
        assert length > 0
        return
    assert length == len(reply.body)
    body = json.loads(reply.body)
    message = body["error"].pop("message")
    assert body == {"error": {"type": case.type, "code": case.code, "param": case.param}}
    assert message


def asked(router: Stack, case: Case) -> Reply:
    """Send the request; the connection must serve another request after the answer."""
    method, target = case.ask.split()
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=20)
    with closing(connection):
        connection.request(method, target, case.body, dict(case.sent))
        kept = connection.sock
        got = connection.getresponse()
        reply = Reply(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b"OK"
        assert connection.sock is kept
    return reply


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: f"{case.ask} {case.status}")
def test_errors_of_the_control_plane(case: Case) -> None:
    with stack() as router:
        check(asked(router, case), case)


@pytest.mark.parametrize("case", GUARDED, ids=lambda case: f"{case.ask} {case.status}")
def test_refusals(case: Case) -> None:
    with stack(access=KEYS) as router:
        check(asked(router, case), case)


def test_a_change_that_is_not_local() -> None:
    with stack() as router:
        check(asked(router, REMOTE), REMOTE)


@pytest.mark.parametrize(
    "case",
    [
        Case("HEAD /nothing", 404, "not_found"),
        Case("HEAD /workers/x", 404, "WORKER_NOT_FOUND"),
        Case("HEAD /add_worker", 405, "method_not_allowed", fields={"allow": "POST"}),
        Case("HEAD /generate", 405, "method_not_allowed", fields={"allow": "POST"}),
        Case("HEAD /v1/models", 503, "no_workers", fields={"retry-after": "5"}),
    ],
    ids=lambda case: case.ask,
)
def test_head_gets_the_head_of_an_error(case: Case) -> None:
    with stack() as router:
        head = asked(router, case)
        check(head, case)
        full = asked(router, case._replace(ask=case.ask.replace("HEAD", "GET")))
        if full.status == head.status and case.status != 405:
            assert head.headers["content-length"] == full.headers["content-length"]


def test_too_many_requests_and_faults() -> None:
    async def limited(accept: str) -> tuple[bytes, str]:
        raise RateLimited(retry_after=1.2)

    async def broken(accept: str) -> tuple[bytes, str]:
        raise ZeroDivisionError("a fault")

    with stack(metrics_render=limited) as router:
        case = Case("GET /metrics", 429, "rate_limited", "rate_limit_error", fields={"retry-after": "2"})
        check(asked(router, case), case)
    with stack(metrics_render=broken) as router:
        for method in ("GET", "HEAD"):
            case = Case(f"{method} /metrics", 500, "internal_error", "server_error")
            check(asked(router, case), case)


def test_a_fault_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(accept: str) -> tuple[bytes, str]:
        raise ZeroDivisionError("a fault")

    with stack(metrics_render=broken) as router, caplog.at_level(logging.DEBUG, "sglang_router"):
        assert router.get("/metrics").status == 500
        assert router.get("/nothing").status == 404
    logged = [record for record in caplog.records if record.exc_info is not None]
    assert [record.getMessage() for record in logged] == ["the control plane failed at /metrics"]


async def up(accept: str) -> tuple[bytes, str]:
    return b"up 1\n", "text/plain"


@pytest.mark.parametrize(("method", "status"), [("POST", 405), ("DELETE", 405)])
def test_the_metrics_port(method: str, status: int) -> None:
    with stack() as router:
        router.plane.app = create_metrics_app(up, OwnNames())
        reply = router.ask(method, "/metrics")
    check(reply, Case(f"{method} /metrics", status, "method_not_allowed", fields={"allow": "GET, HEAD"}))


@pytest.mark.parametrize(
    ("more", "connection"),
    [(b"", b"connection: close"), (b"connection: keep-alive\r\n", b"connection: keep-alive")],
)
def test_the_connection_field_of_an_error_in_http_1_0(more: bytes, connection: bytes) -> None:
    with stack() as router, socket.create_connection(("127.0.0.1", router.port), timeout=20) as client:
        client.sendall(b"GET /nothing HTTP/1.0\r\nx-request-id: mine\r\n" + more + b"\r\n")
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.recv(65536)
    lines = received.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 404 Not Found"
    assert connection in lines
    assert b"x-request-id: mine" in lines


def test_access_log_and_cors_fields_of_errors() -> None:
    """The access log has the code of the error; the CORS fields are on error answers, too."""
    flags = ("--log-format", "json", "--cors-allowed-origins", "https://a.example")
    with router_process([], *flags) as router:
        answers = [
            router.get("/nothing", origin="https://a.example"),
            router.get("/v1/models", origin="https://a.example"),
            router.ask("GET", "/generate", origin="https://a.example"),
        ]
        ids = [answer.headers["x-request-id"] for answer in answers]
        router.until(lambda: all(each in router.log() for each in ids))
        records: list[dict[str, Any]] = [line for line in router.records() if line.get("id") in ids]
    assert [(line["status"], line["code"]) for line in records] == [
        (404, "not_found"),
        (503, "no_workers"),
        (405, "method_not_allowed"),
    ]
    for line, answer in zip(records, answers, strict=True):
        assert line["out"] == len(answer.body)
        assert line["outcome"] is None
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
