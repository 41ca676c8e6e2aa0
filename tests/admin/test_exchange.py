"""The adapter between a client connection and an ASGI app, with apps that do one thing each."""

from __future__ import annotations

import contextlib
import http.client
import logging
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_router.errors import NotFound, ShuttingDown
from sglang_router.routing.events import Finished, Listener
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


# -- what is told of it ------------------------------------------------------------------------------------------------


class Heard(Listener):
    """Keeps the ends of requests."""

    def __init__(self) -> None:
        self.ends: list[Finished] = []

    def finished(self, event: Finished) -> None:
        self.ends.append(event)


def told_of(*steps: float | Message | Exception, method: str = "POST") -> Finished:
    """Return the end of a request that came at the moment 10. steps: of the app; a number lets so many seconds pass."""
    now, heard = [10.0], Heard()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for step in steps:
            if isinstance(step, float):
                now[0] += step
            else:
                await app_of(step)(scope, receive, send)

    with stack() as router:
        router.plane.app, router.plane.clock, router.plane.listener = app, lambda: now[0], heard
        with contextlib.suppress(http.client.HTTPException, OSError):
            router.ask(method, "/nothing", b"{}", x_request_id="mine")
    (end,) = heard.ends
    return end


def test_the_first_byte_of_an_answer_is_its_head_and_the_end_its_last_byte() -> None:
    """A stream (of the page) lasts for hours, and its first byte came at once."""
    end = told_of(2.0, START, HALF, 3600.0, REST, 1.0)
    answer = end.answer
    assert (answer.first_byte, answer.duration, answer.sent) == (2.0, 3603.0, 4)
    assert (answer.status, answer.code, end.leg) == (200, "", None)
    tag = end.tag
    assert (tag.id, tag.start, tag.received, tag.route.method, tag.route.path) == ("mine", 10.0, 2, "POST", "/nothing")


def test_the_first_byte_of_an_error_is_its_end() -> None:
    answer = told_of(2.0, NotFound("no such thing")).answer
    assert (answer.first_byte, answer.duration, answer.status, answer.code) == (2.0, 2.0, 404, "not_found")
    assert answer.sent == len(NotFound("no such thing").body())


def test_an_answer_that_broke_off_was_begun() -> None:
    answer = told_of(1.0, START, HALF, 1.0, NotFound()).answer
    assert (answer.first_byte, answer.duration, answer.sent) == (1.0, 2.0, 2)


def test_the_bytes_of_an_answer_to_head_are_not_sent() -> None:
    answer = told_of(START, HALF, REST, method="HEAD").answer
    assert (answer.status, answer.first_byte, answer.sent) == (200, 0.0, 0)
