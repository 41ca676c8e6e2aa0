"""The table of the control plane: each row is served, other paths and methods are refused, docs/endpoints.md is up to
date."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sglang_router.access.host_names import OwnNames
from sglang_router.access.permissions import AccessKind
from sglang_router.admin.app import create_metrics_app
from sglang_router.admin.page import markdown
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.rows import ControlRow, relayed_rows
from stack import stack

PAGE = Path(__file__).parents[2] / "docs" / "endpoints.md"

ROWS = [row for rows in ROUTES.values() for row in rows]


def test_docs_endpoints_md_is_made_from_the_tables() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m sglang_router.admin.app --markdown > docs/endpoints.md"


def test_each_path_and_method_has_one_row() -> None:
    pairs = [(method, row.path) for row in ROWS for method in row.methods]
    pairs += [(row.method, row.path) for row in relayed_rows()]
    assert len(pairs) == len(set(pairs))


def test_who_may_ask() -> None:
    """A row that is not named here is for admins: a forgotten one lets nobody in."""
    kinds = {kind: {row.path for row in ROWS if row.kind is kind} for kind in AccessKind}
    assert kinds[AccessKind.PUBLIC] == {"/", "/health", "/liveness", "/readiness"}
    about_models = {"/get_model_info", "/model_info", "/get_server_info", "/server_info"}
    lists = {"/v1/files", "/v1/batches", "/api/tags", "/api/ps"}
    models = {"/v1/models", "/v1/models/{model:path}", *about_models}
    assert kinds[AccessKind.INFERENCE] == {"/health_generate", *models, *lists}
    reads = {row.path for row in ROWS if row.kind is AccessKind.CONTROL_READ}
    decisions = {"/decisions", "/decisions/{request:path}"}
    looks = {"/get_loads", "/metrics", "/engine_metrics", "/version", "/list_workers", "/scale", "/openapi.json"}
    looks |= {"/is_paused", "/is_sleeping", "/v1/rl/workers", "/overview", "/config", "/docs"}
    assert reads == {*looks, "/workers", "/workers/{id:path}", "/restart_workers", *decisions}
    for row in ROWS:
        assert row.kind is AccessKind.CONTROL_CHANGE or row.methods == ["GET"], (
            "a body is read from who may change things"
        )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.route)
def test_every_row_is_served(row: ControlRow) -> None:
    """Without workers the answer may be an error, but neither an unknown path nor a fault."""
    path = row.path.replace("{id:path}", "x").replace("{model:path}", "x")
    with stack() as router:
        for method in row.methods:
            reply = router.ask(method, path, b"{}" if method != "GET" else None)
            assert reply.status in (200, 206, 400, 404, 409, 422, 503)
            assert reply.headers.get("x-smg-error-code") != "not_found"


@pytest.mark.parametrize("path", ["/nothing", "/health/", "/workers/", "/v1/models/", "//health", "/%ff"])
def test_unknown_paths(path: str) -> None:
    with stack() as router:
        reply = router.get(path)
        if path in ("/workers/", "/v1/models/"):  # an empty name is a name nobody has
            assert reply.status in (404, 503)
            return
        assert reply.status == 404
        assert reply.json()["error"]["code"] == "not_found"
        assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", {"GET", "HEAD"}),
        ("GET", "/add_worker", {"POST"}),
        ("PUT", "/v1/files", {"GET", "HEAD", "POST"}),
        ("PATCH", "/v1/files/x", {"GET", "HEAD", "DELETE"}),
        ("DELETE", "/workers", {"GET", "HEAD", "POST"}),
        ("POST", "/workers/x", {"GET", "HEAD", "PUT", "DELETE"}),
        ("GET", "/workers/x/drain", {"POST"}),
        ("PUT", "/flush_cache", {"GET", "HEAD", "POST"}),
        ("GET", "/v1/chat/completions", {"POST"}),
        ("OPTIONS", "/generate", {"POST"}),
    ],
)
def test_wrong_methods(method: str, path: str, allowed: set[str]) -> None:
    with stack() as router:
        reply = router.ask(method, path)
        assert reply.status == 405
        assert set(reply.headers["allow"].split(", ")) == allowed
        assert reply.json()["error"]["code"] == "method_not_allowed"


def test_head_is_get_without_the_body() -> None:
    with stack() as router:
        reply = router.ask("HEAD", "/health")
        assert (reply.status, reply.body, reply.headers["content-length"]) == (200, b"", "2")
        assert router.ask("HEAD", "/readiness").status == 503


def test_a_fault_of_the_router_is_answered_as_one_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(accept: str) -> tuple[bytes, str]:
        raise ZeroDivisionError("a fault")

    with stack(metrics_render=broken) as router, caplog.at_level(logging.ERROR, "sglang_router"):
        reply = router.get("/metrics")
        assert reply.status == 500
        assert reply.json()["error"]["code"] == "internal_error"
        assert "a fault" not in reply.text
        assert router.get("/health").status == 200
    assert "a fault" in caplog.text


def test_the_clients_request_id_comes_back() -> None:
    with stack() as router:
        assert router.get("/nothing", x_request_id="mine").headers["x-request-id"] == "mine"


async def up(accept: str) -> tuple[bytes, str]:
    return b"up 1\n", "text/plain"


def test_the_metrics_app_serves_metrics_on_any_path() -> None:
    with stack() as router:
        router.plane.app = create_metrics_app(up, OwnNames())
        assert router.get("/metrics").text == "up 1\n"
        assert router.ask("HEAD", "/metrics").headers["content-length"] == "5"
        assert router.post("/metrics").status == 405
        assert router.get("/any/other").text == "up 1\n"
        page = router.get("/metrics", host="evil.example", user_agent="Mozilla/5.0")
        assert (page.status, page.json()["error"]["code"]) == (403, "host_not_allowed")
