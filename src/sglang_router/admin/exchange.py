"""Hands a request that is not inference to the control plane's ASGI app, and its answer to the client.

    start --> preflight: answered here            (browsers, CORS)
          --> a task: app(scope, receive, send)   --> head, body ... --> end
                          '-- RouterError         --> the router's one error answer; InternalError for a fault

The control plane is seldom asked, so a task per request is fine here. The app's answer streams: with a Content-Length
as it is, otherwise chunked (or closing, for HTTP/1.0).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

from sglang_router.errors import InternalError, LoopDetected, NotFound, PayloadTooLarge, RouterError
from sglang_router.relay import answers
from sglang_router.relay.answers import Answers
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.deadlines import ERRORS, NEVER, Deadline, Due
from sglang_router.routing.events import Answered, Finished, Listener
from sglang_router.routing.plan import RequestTag, Route
from sglang_router.wire.framing import LAST_CHUNK, chunk
from sglang_router.wire.request import Request

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

log = logging.getLogger("sglang_router.admin")

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


class ControlPlane:
    """What all requests to one app share. `timeout`: seconds for a whole exchange."""

    __slots__ = ("answers", "app", "clock", "listener", "loop", "timeout")

    def __init__(
        self,
        app: ASGIApp,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        answers: Answers,
        listener: Listener,
        timeout: float,
    ) -> None:
        self.app = app
        self.loop = loop
        self.clock = clock
        self.answers = answers
        self.listener = listener
        self.timeout = timeout

    def exchange(self, client: ClientConnection, request: Request) -> AppExchange:
        """The factory for the table of a port."""
        return AppExchange(self, client, request)


class AppExchange:
    """One request to the control plane."""

    def __init__(self, plane: ControlPlane, client: ClientConnection, request: Request) -> None:
        # of the request
        self.deadline: Deadline = NEVER
        self._plane = plane
        self._client = client
        self._request = request
        named = plane.answers.ids.read(request.headers, b"req-")
        self._request_id, self._fault = named[0], named[3]
        self._started_at = plane.clock()
        self._keep_alive = request.keep_alive
        self._task: asyncio.Task[None] | None = None
        self._body_read = False
        self._left = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        # of the answer
        self._status = 0
        self._first_byte = -1.0  # seconds until its head was written
        self._code = ""
        self._chunked = False
        self._bodyless = False
        self._sent = 0
        self._complete = False
        self._ended = False

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"status {self._status}" if self._status else "no answer yet"
        return f"<AppExchange {self._request!r}: {state}>"

    # -- the client's side (relay.clients.AnyExchange) -----------------------------------------------------------------

    def start(self) -> None:
        """Answer a preflight, or run the app."""
        preflight = self._plane.answers.preflight(self._request, self._request_id, self._persists())
        if preflight is not None:
            self._status = 200
            self._client.write(preflight)
            self._finish()
            return
        self.deadline = (Due.REQUEST, self._started_at + self._plane.timeout)
        self._task = self._plane.loop.create_task(self._run())

    def unanswered(self) -> None:
        """No engine answers this request."""

    def unanswered_since(self) -> float | None:
        """Return when the request was complete; None once the client was sent a part of the answer."""
        return None if self._status else self._started_at

    def gone(self) -> None:
        """Cancel the app: the client closed its connection."""
        self._left.set()
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._end()

    def pause(self) -> None:
        """Make the app wait: the client does not read."""
        self._writable.clear()

    def resume(self) -> None:
        """Let the app write again."""
        self._writable.set()

    def overdue(self, now: float) -> None:
        """Cancel the app and answer with the error of the deadline."""
        if self._task is not None:
            self._task.cancel()
        self._keep_alive = False
        self._fail(ERRORS[self.deadline[0]]())

    # -- the app -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            self._check()
            await self._plane.app(self._scope(), self._receive, self._send)
        except asyncio.CancelledError:  # the client left, or the request is overdue
            return
        except RouterError as error:
            self._fail(error.with_traceback(None))
        except Exception:  # a fault of a handler: the client gets an answer, the log gets the traceback
            log.exception("the control plane failed at %s", self._request.path.decode("latin-1"))
            self._fail(InternalError())
        else:
            if self._complete:
                self._finish()
            else:
                self._fail(InternalError())

    def _check(self) -> None:
        """Refuse what goes in a circle, and paths that no endpoint has: what came decoded must not go on the wire.

        Raises: LoopDetected, NotFound.
        """
        if isinstance(self._fault, LoopDetected):
            raise self._fault
        if _CONTROL.search(_unquote(self._request.path)):
            raise NotFound

    def _scope(self) -> MutableMapping[str, Any]:
        request = self._request
        path, _, query = request.target.partition(b"?")
        transport = self._client.transport
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.0" if request.http10 else "1.1",
            "method": request.method.decode("latin-1"),
            "scheme": "http" if transport.get_extra_info("ssl_object") is None else "https",
            "path": _unquote(request.path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": request.headers,
            "client": _address(transport.get_extra_info("peername")),
            "server": _address(transport.get_extra_info("sockname")),
            "state": {"peername": transport.get_extra_info("peername")},
        }

    async def _receive(self) -> MutableMapping[str, Any]:
        if not self._body_read:
            self._body_read = True
            if isinstance(self._request.refusal, PayloadTooLarge):  # nobody should want it: it was not read
                raise self._request.refusal
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._head(message["status"], message.get("headers", ()))
            return
        body: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        out = body
        if self._chunked:
            out = chunk(body) if more else chunk(body) + LAST_CHUNK
        if out and not self._bodyless:
            self._sent += len(out)
            self._client.write(out)
        self._complete = not more
        await self._writable.wait()

    def _head(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        request = self._request
        self._status = status
        self._bodyless = request.method == b"HEAD" or status in (204, 304)
        framing = b""
        if not any(name.lower() == b"content-length" for name, _ in fields) and status not in (204, 304):
            if request.http10:
                self._keep_alive = False
            else:
                self._chunked = True
                framing = b"transfer-encoding: chunked\r\n"
        tail = framing + self._plane.answers.tail(request, self._persists())
        self._first_byte = self._plane.clock() - self._started_at
        self._client.write(answers.app_head(status, fields, self._request_id, tail))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _persists(self) -> bool:
        """Whether the connection stays open after this answer."""
        self._keep_alive = self._keep_alive and not self._client.clients.draining
        return self._keep_alive

    def _finish(self) -> None:
        """The answer is written."""
        if not self._ended:
            self._end()
            self._client.done(self._keep_alive, self._plane.clock())

    def _fail(self, error: RouterError) -> None:
        """Answer with an error; if a head has been sent already, abort the connection."""
        if self._ended:
            return
        if self._status:
            self._end()
            self._client.abort()
            return
        self._status, self._code = error.status, error.code
        self._keep_alive = self._keep_alive and not error.close
        self._sent = 0 if self._request.method == b"HEAD" else len(error.body())
        self._client.write(self._plane.answers.error(error, self._request, self._request_id, self._persists()))
        self._finish()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.deadline = NEVER
        request = self._request
        duration = self._plane.clock() - self._started_at
        route = Route(request.method.decode("latin-1"), request.path.decode("latin-1"))
        number, peer = next(self._client.clients.numbers), self._client.peer
        tag = RequestTag(number, self._request_id, self._started_at, route, peer, received=len(request.body))
        first_byte = duration if self._status and self._first_byte < 0.0 else self._first_byte
        answer = Answered(self._status, self._code, None, duration, first_byte, self._sent)
        self._plane.listener.finished(Finished(tag, None, answer))


def _address(name: Any) -> tuple[str, int] | None:
    """Host and port of a socket name: IPv6 names have four parts; those of Unix sockets are strings and give None."""
    return (name[0], name[1]) if isinstance(name, tuple) else None


def _unquote(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")
