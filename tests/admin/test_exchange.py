"""The adapter between a client connection and an ASGI app, with apps that do one thing each."""

from __future__ import annotations

import http.client
import logging
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_router.errors import NotFound, ShuttingDown
from stack import Reply, stack

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
HALF: Message = {"type": "http.response.body", "body": b"ab", "more_body": True}
REST: Message = {"type": "http.response.body", "body": b"cd"}


def app_of(*steps: Message | Exception) -> ASGIApp:
    """An app that sends messages and raises exceptions, in this order."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            await send(step)

    return app


def answer_of(app: ASGIApp, method: str = "GET") -> Reply:
    with stack() as router:
        router.plane.app = app
        return router.ask(method, "/")


def test_a_whole_answer() -> None:
    reply = answer_of(app_of(START, HALF, REST))
    assert (reply.status, reply.body, reply.headers["content-length"]) == (200, b"abcd", "4")


def test_an_answer_without_a_length_is_chunked() -> None:
    start: dict[str, Any] = {**START, "headers": []}
    reply = answer_of(app_of(start, HALF, REST))
    assert (reply.body, reply.headers["transfer-encoding"]) == (b"abcd", "chunked")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_error_before_the_head_is_answered(method: str) -> None:
    reply = answer_of(app_of(NotFound("no such thing")), method)
    assert (reply.status, reply.headers["x-smg-error-code"]) == (404, "not_found")
    assert "connection" not in reply.headers
    assert (b"no such thing" in reply.body) is (method == "GET")


def test_an_error_that_closes_the_connection() -> None:
    reply = answer_of(app_of(ShuttingDown()))
    assert (reply.status, reply.headers["connection"]) == (503, "close")


def test_an_app_that_sends_nothing_is_a_fault() -> None:
    reply = answer_of(app_of())
    assert (reply.status, reply.headers["x-smg-error-code"]) == (500, "internal_error")


@pytest.mark.parametrize(
    ("error", "logged"), [(NotFound(), []), (ZeroDivisionError(), ["the control plane failed at /"])], ids=repr
)
@pytest.mark.parametrize("sent", [(START,), (START, HALF)], ids=len)
def test_an_error_after_the_head_aborts_the_connection(
    error: Exception, logged: list[str], sent: tuple[Message, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "sglang_router"), pytest.raises((http.client.HTTPException, OSError)):
        answer_of(app_of(*sent, error))
    assert [record.getMessage() for record in caplog.records] == logged


def test_an_answer_that_is_not_finished_aborts_the_connection() -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        answer_of(app_of(START, HALF))
