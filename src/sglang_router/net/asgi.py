"""Hands a request that is not inference to the control plane's ASGI app, and its answer to the client.

The control plane is seldom asked, so here a task per request is fine. The app's answer streams: with a Content-Length
as it is, otherwise chunked (or closing, for HTTP/1.0). Browsers' preflights are answered here, before the app.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from sglang_router.core.events import Finished
from sglang_router.errors import InternalError, Overdue, RouterError
from sglang_router.wire.headers import REASONS, error_answer

if TYPE_CHECKING:
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.service import Service
    from sglang_router.wire.cors import Cors
    from sglang_router.wire.request import Request

log = logging.getLogger("sglang_router.admin")


class AppExchange:
    """One request to the control plane."""

    def __init__(self, service: Service, client: Downstream, request: Request) -> None:
        self._service = service
        self._client = client
        self._request = request
        self._request_id = service.id_of(request.headers, b"req-")
        self._started_at = service.clock()
        self._keep_alive = request.keep_alive
        self._task: asyncio.Task[None] | None = None
        self._body_read = False
        self._left = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._status = 0
        self._code = ""
        self._chunked = False
        self._bodyless = False
        self._sent = 0
        self._complete = False
        self._ended = False

    # -- Exchange ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._service.cors is not None and self._preflight(self._service.cors):
            return
        self._client.deadline = self._started_at + self._service.timeouts.request
        self._task = self._service.loop.create_task(self._run())

    def _preflight(self, cors: Cors) -> bool:
        if self._service.draining:
            self._keep_alive = False
        answer = cors.preflight(self._request, self._request_id, self._connection())
        if answer is None:
            return False
        self._status = 200
        self._client.write(answer)
        self._end()
        self._client.done(self._keep_alive)
        return True

    def unanswered(self) -> None:
        """Not for the engines to answer."""

    def gone(self) -> None:
        self._left.set()
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._end()

    def pause(self) -> None:
        self._writable.clear()

    def resume(self) -> None:
        self._writable.set()

    def overdue(self, now: float) -> None:
        if self._task is not None:
            self._task.cancel()
        self._broke_off(Overdue())

    # -- the app -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._service.app(self._scope(), self._receive, self._send)
        except asyncio.CancelledError:
            return
        except Exception:  # the app's own net is Starlette's; this is the last one, so that the client gets an answer
            log.exception("the control plane failed at %s", self._request.path.decode("latin-1"))
        if self._ended:
            return
        if not self._complete:
            self._broke_off(InternalError())
            return
        self._end()
        self._client.done(self._keep_alive)

    def _broke_off(self, error: RouterError) -> None:
        """The app gave no whole answer: the error is one, unless a head has gone out already."""
        if self._status:
            self._end()
            self._client.abort()
            return
        self._status = error.status
        self._code = error.code
        self._client.write(error_answer(error, self._request_id, b"connection: close\r\n" + self._cors()))
        self._end()
        self._client.done(False)

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
        out = b"" if self._bodyless else body
        if self._chunked and not self._bodyless:
            out = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            if not more:
                out += b"0\r\n\r\n"
        self._sent += len(body)
        if out:
            self._client.write(out)
        self._complete = not more
        await self._writable.wait()

    def _head(self, status: int, headers: Any) -> None:
        request = self._request
        self._status = status
        self._bodyless = request.method == b"HEAD" or status in (204, 304)
        sized = False
        lines = [b"HTTP/1.1 %d %s\r\n" % (status, REASONS.get(status, b""))]
        for name, value in headers:
            sized = sized or name.lower() == b"content-length"
            if name.lower() == b"x-smg-error-code":
                self._code = value.decode("latin-1")
            lines += (name, b": ", value, b"\r\n")
        if not sized and status not in (204, 304):
            if request.http10:
                self._keep_alive = False
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if self._service.draining:
            self._keep_alive = False
        lines += (self._connection(), self._cors(), b"x-request-id: ", self._request_id, b"\r\n\r\n")
        self._client.write(b"".join(lines))

    def _connection(self) -> bytes:
        """The Connection field, if one is needed."""
        if not self._keep_alive:
            return b"connection: close\r\n"
        return b"connection: keep-alive\r\n" if self._request.http10 else b""

    def _cors(self) -> bytes:
        cors = self._service.cors
        return b"" if cors is None else cors.fields(self._request.headers)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        request = self._request
        duration = self._service.clock() - self._started_at
        self._service.listener.finished(
            Finished(
                request.method.decode("latin-1"),
                request.path.decode("latin-1"),
                "",
                self._request_id.decode("latin-1"),
                self._client.peer,
                False,
                "",
                None,
                "",
                0,
                0,
                self._status,
                self._code,
                None,
                duration,
                duration if self._status else -1.0,
                len(request.body),
                self._sent,
                0,
            )
        )


def _address(name: Any) -> tuple[str, int] | None:
    """Host and port of a socket name; IPv6 names have four parts, Unix sockets are strings."""
    return (name[0], name[1]) if isinstance(name, tuple) else None


def _unquote(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")
