"""The control plane across a link: bodies and answers in parts, errors, clients that leave, deciders that end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import pytest
import uvloop

from sglang_router.errors import DeciderGone, PayloadTooLarge, RouterError, WorkerNotFound
from sglang_router.processes import message
from sglang_router.processes.control import ControlDesk, ControlProxy
from sglang_router.processes.link import Link, decode_from_decider, decode_from_relay
from sglang_router.processes.ports import RelayPort

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
SCOPE: dict[str, Any] = {
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/path",
    "raw_path": b"/path",
    "query_string": b"a=b",
    "headers": [(b"host", b"router")],
    "client": ("10.0.0.9", 1234),
    "server": ("10.0.0.1", 30000),
    "state": {"peername": ("10.0.0.9", 1234)},
}


class Joined:
    """Both ends of a link in one event loop: what one end sends, the other hears in the next turn."""

    def __init__(self, app: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.proxy, self.desk = ControlProxy(), ControlDesk(app, self.loop)
        self.near = Link(self, decode_from_decider, self._soon)
        self.far = Link(self, decode_from_relay, self._soon)
        self.near.transport = cast("asyncio.Transport", _Pipe(self.far))
        self.far.transport = cast("asyncio.Transport", _Pipe(self.near))
        self.port = RelayPort(0, self.far, b"")
        self.desk.open()
        self.proxy.connected(self.near)

    def _soon(self, link: Link) -> None:
        self.loop.call_soon(link.send)

    def heard(self, link: Link, heard: list[Any]) -> None:
        hear: dict[type, Any] = {
            message.AppAsk: self.desk.ask,
            message.AppBody: self.desk.body,
            message.AppTaken: self.desk.taken,
            message.AppGone: self.desk.gone,
        }
        for each in heard:
            if link is self.near:
                self.proxy.heard(each)
            else:
                hear[type(each)](self.port, each)

    def link_lost(self, link: Link) -> None: ...

    async def ask(self, body: bytes | RouterError = b"") -> tuple[int, bytes, int]:
        """Ask once; return status, body, and in how many parts it came."""
        status, parts = 0, list[bytes]()

        async def receive() -> MutableMapping[str, Any]:
            if isinstance(body, RouterError):
                raise body
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(each: MutableMapping[str, Any]) -> None:
            nonlocal status
            if each["type"] == "http.response.start":
                status = each["status"]
            else:
                parts.append(each["body"])

        await self.proxy(dict(SCOPE), receive, send)
        return status, b"".join(parts), len(parts)


class _Pipe:
    """Stands for a transport. sent: bytes in all; longest: of one frame."""

    def __init__(self, other: Link) -> None:
        self._other = other
        self.sent = self.longest = 0

    def write(self, data: bytearray) -> None:
        self.sent += len(data)
        self.longest = max(self.longest, len(data))
        asyncio.get_running_loop().call_soon(self._other.data_received, bytes(data))

    def is_closing(self) -> bool:
        return False


def run(main: Awaitable[None]) -> None:
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main, 20.0))
    finally:
        loop.close()


async def echo(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        part = await receive()
        body, more = body + part["body"], part["more_body"]
    assert (scope["client"], scope["state"]["peername"]) == (("10.0.0.9", 1234), ("10.0.0.9", 1234))
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(("size", "parts"), [(0, 1), (10, 1), (1 << 18, 1), ((1 << 18) + 1, 2), (5 << 18, 5)])
def test_bodies_of_any_size_go_there_and_back(size: int, parts: int) -> None:
    async def main() -> None:
        joined = Joined(echo)
        assert await joined.ask(b"x" * size) == (201, b"x" * size, parts)
        await asyncio.sleep(0)
        assert not joined.port.calls

    run(main())


def test_errors_of_the_app_are_the_clients() -> None:
    async def main() -> None:
        async def fails(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            raise WorkerNotFound

        joined = Joined(fails)
        with pytest.raises(WorkerNotFound):
            await joined.ask()
        with pytest.raises(PayloadTooLarge, match="for this endpoint"):
            await joined.ask(PayloadTooLarge("The body is too large for this endpoint."))

    run(main())


def test_a_client_that_leaves_cancels_the_app() -> None:
    async def main() -> None:
        cancelled, began = asyncio.Event(), asyncio.Event()

        async def waits(scope: Any, receive: Receive, send: Send) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        joined = Joined(waits)
        asked = asyncio.ensure_future(joined.ask())
        await began.wait()
        asked.cancel()
        await cancelled.wait()
        assert not joined.port.calls

    run(main())


def test_a_decider_that_ends_is_an_error_and_a_relay_that_ends_cancels() -> None:
    async def main() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def waits(scope: Any, receive: Receive, send: Send) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        joined = Joined(waits)
        asked = asyncio.ensure_future(joined.ask())
        await began.wait()
        joined.proxy.lost()
        with pytest.raises(DeciderGone):
            await asked
        joined.desk.leave(joined.port)
        await cancelled.wait()

    run(main())


def test_a_body_is_sent_as_far_as_the_app_wants_it() -> None:
    """Otherwise one client could fill the decider, and the longest frame, with what is refused after some bytes."""

    async def main() -> None:
        got = list[int]()

        async def refuses(scope: Any, receive: Receive, send: Send) -> None:
            while sum(got) <= 1 << 18:
                got.append(len((await receive())["body"]))
            raise PayloadTooLarge

        joined = Joined(refuses)
        with pytest.raises(PayloadTooLarge):
            await joined.ask(bytes(400 << 20))
        assert got == [1 << 18, 1 << 18]
        assert joined.near.transport.sent < 1 << 20  # type: ignore[attr-defined]

    run(main())


def test_a_request_waits_for_a_decider_that_reads() -> None:
    async def main() -> None:
        joined = Joined(echo)
        joined.near.pause_writing()
        asked = asyncio.ensure_future(joined.ask(b"body"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert joined.near.transport.sent == 0  # type: ignore[attr-defined]
        joined.near.resume_writing()
        joined.proxy.reads_again()
        assert await asked == (201, b"body", 1)

    run(main())


def test_parts_of_many_answers_are_as_many_frames() -> None:
    """A frame of all that a turn has to send could be longer than a frame may be."""

    async def main() -> None:
        joined = Joined(echo)
        bodies = [bytes(1 << 18)] * 20
        answers = await asyncio.gather(*map(joined.ask, bodies))
        assert [body for _, body, _ in answers] == bodies
        assert joined.far.transport.longest < 1 << 19  # type: ignore[attr-defined]
        assert joined.near.transport.longest < 1 << 19  # type: ignore[attr-defined]

    run(main())
