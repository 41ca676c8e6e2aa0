"""The control plane across processes: a relay has the client, the decider has the app.

    relay:    ControlProxy, an ASGI app      AppAsk -->                decider: ControlDesk runs the real app
                                             <-- AppWants              a part of the body at a time
                                             AppBody -->
                                             <-- AppHead, AppData ..., AppDone or AppFailed
                                             AppTaken -->              a part of the answer at a time

What nobody reads is not sent: a request waits for a decider that reads, the body for an app that wants it, and the
answer for its client.

So everything about the client stays as in one process: keep-alive, CORS, limits, errors; and the app sees the client's
own address. A client that leaves cancels the app (AppGone).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sglang_router.admin.exchange import ASGIApp
from sglang_router.errors import DeciderGone, InternalError, RouterError
from sglang_router.processes import failures
from sglang_router.processes.link import Link
from sglang_router.processes.message import (
    AppAsk,
    AppBody,
    AppData,
    AppDone,
    AppFailed,
    AppGone,
    AppHead,
    AppTaken,
    AppWants,
    ErrorSent,
    Message,
)
from sglang_router.processes.ports import RelayPort

log = logging.getLogger("sglang_router.admin")

_PART = 1 << 18
"""Bytes of a body in one message."""
_PATIENCE = 10.0
"""Seconds that a request waits for a decider that is away, or does not read."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
FromApp = AppWants | AppHead | AppData | AppFailed | AppDone


class ControlProxy:
    """The relay's side: an ASGI app that asks the decider."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._reads = asyncio.Event()  # set when the decider may read
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Queue[FromApp | None]] = {}

    def __repr__(self) -> str:
        return f"<ControlProxy {len(self._calls)} requests>"

    def connected(self, link: Link) -> None:
        """Ask this decider from now on."""
        self._link = link
        self._reads.set()

    def reads_again(self) -> None:
        """Ask again: the decider reads."""
        self._reads.set()

    def lost(self) -> None:
        """Fail what is asked; further requests wait."""
        self._link = None
        for call in self._calls.values():
            call.put_nowait(None)

    def heard(self, message: FromApp) -> None:
        """Take a part of an answer."""
        call = self._calls.get(message.number)
        if call is not None:
            call.put_nowait(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises: RouterError, the app's own, or DeciderGone."""
        try:
            link = await asyncio.wait_for(self._link_that_reads(), _PATIENCE)
        except asyncio.TimeoutError:
            raise DeciderGone(retry_after=1.0) from None
        number = next(self._numbers)
        body, refusal = b"", None
        try:
            body = (await receive())["body"]
        except RouterError as error:
            refusal = failures.failure_of(error)
        if self._link is not link:  # it was lost meanwhile
            raise DeciderGone(retry_after=1.0)
        call = self._calls[number] = asyncio.Queue[FromApp | None]()
        ended = False
        try:
            _put_request(link, number, scope, body, refusal)
            sent = _PART
            while (message := await call.get()) is not None:
                if isinstance(message, AppDone):
                    ended = True
                    return
                if isinstance(message, AppFailed):
                    ended = True
                    raise failures.error_of(message.error)
                if isinstance(message, AppWants):
                    link.put_large(AppBody(number, bytes(body[sent : sent + _PART]), len(body) > sent + _PART))
                    sent += _PART
                else:
                    await _pass_on(message, link, send)
            raise DeciderGone(retry_after=1.0)
        finally:
            del self._calls[number]
            if not ended and self._link is link:
                link.put(AppGone(number))

    async def _link_that_reads(self) -> Link:
        while (link := self._link) is None or link.stuck:
            self._reads.clear()
            await self._reads.wait()
        return link


def _put_request(link: Link, number: int, scope: Scope, body: bytes, refusal: ErrorSent | None) -> None:
    peer = scope["state"]["peername"]
    link.put_large(
        AppAsk(
            number,
            scope["http_version"],
            scope["method"],
            scope["scheme"],
            scope["path"],
            scope["raw_path"],
            scope["query_string"],
            [(bytes(name), bytes(value)) for name, value in scope["headers"]],
            scope["client"],
            scope["server"],
            list(peer) if isinstance(peer, tuple) else None,
            bytes(body[:_PART]),
            len(body) > _PART,
            refusal,
        )
    )


async def _pass_on(message: AppHead | AppData, link: Link, send: Send) -> None:
    if isinstance(message, AppHead):
        await send({"type": "http.response.start", "status": message.status, "headers": message.headers})
        return
    await send({"type": "http.response.body", "body": message.data, "more_body": message.more})
    if message.more:
        link.put(AppTaken(message.number))


class _Call:
    """One request at the decider."""

    __slots__ = ("ask", "more", "parts", "port", "taken", "task")

    task: asyncio.Task[None]

    def __init__(self, port: RelayPort, ask: AppAsk) -> None:
        self.port = port
        self.ask = ask
        self.parts: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        self.parts.put_nowait((ask.body, ask.more))
        self.more = False  # there is a next part, which nobody has asked for
        self.taken = asyncio.Event()

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next part of the body; after the last, wait until the client leaves, which cancels this."""
        if self.ask.refusal is not None:
            raise failures.error_of(self.ask.refusal)
        if self.more:
            self.port.put(AppWants(self.ask.number))
        data, self.more = await self.parts.get()
        return {"type": "http.request", "body": data, "more_body": self.more}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the answer, and wait until it is taken."""
        number = self.ask.number
        if message["type"] == "http.response.start":
            self.port.put(AppHead(number, message["status"], list(message.get("headers", ()))))
            return
        body: bytes = bytes(message.get("body", b""))
        more: bool = message.get("more_body", False)
        for at in range(0, max(len(body), 1), _PART):
            last = at + _PART >= len(body) and not more
            self.taken.clear()
            self.port.link.put_large(AppData(number, body[at : at + _PART], not last))
            if not last:
                await self.taken.wait()


class ControlDesk:
    """The decider's side: runs the app for the requests of all relays."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Answer from now on: the router has started."""
        self._opened.set()

    def ask(self, port: RelayPort, ask: AppAsk) -> None:
        """Run the app for a request."""
        call = port.calls[ask.number] = _Call(port, ask)
        call.task = self._loop.create_task(self._run(call))

    def body(self, port: RelayPort, part: AppBody) -> None:
        """Take a further part of the body."""
        if (call := port.calls.get(part.number)) is not None:
            call.parts.put_nowait((part.data, part.more))

    def taken(self, port: RelayPort, taken: AppTaken) -> None:
        """Let the app send the next part."""
        if (call := port.calls.get(taken.number)) is not None:
            call.taken.set()

    def gone(self, port: RelayPort, gone: AppGone) -> None:
        """Cancel a request: its client left."""
        if (call := port.calls.pop(gone.number, None)) is not None:
            call.task.cancel()

    def leave(self, port: RelayPort) -> None:
        """Cancel all requests of a relay that is gone."""
        for call in port.calls.values():
            call.task.cancel()
        port.calls.clear()

    async def _run(self, call: _Call) -> None:
        number = call.ask.number
        end: Message = AppDone(number)
        try:
            await self._opened.wait()
            await self._app(_scope(call.ask), call.receive, call.send)
        except asyncio.CancelledError:
            return
        except RouterError as error:
            end = AppFailed(number, failures.failure_of(error))
        except Exception:  # a fault of a handler: the client gets an answer, the log gets the traceback
            log.exception("the control plane failed at %s", call.ask.raw_path.decode("latin-1"))
            end = AppFailed(number, failures.failure_of(InternalError()))
        call.port.calls.pop(number, None)
        call.port.put(end)


def _scope(ask: AppAsk) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": ask.http,
        "method": ask.method,
        "scheme": ask.scheme,
        "path": ask.path,
        "raw_path": ask.raw_path,
        "query_string": ask.query,
        "root_path": "",
        "headers": ask.headers,
        "client": ask.client,
        "server": ask.server,
        "state": {"peername": None if ask.peer is None else tuple(ask.peer)},
    }
