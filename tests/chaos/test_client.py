"""How the client of the chaos runs classifies the end of a request, against servers that send exactly these bytes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripts.reliability.answers import DIFFERENT, Question, Questions
from scripts.reliability.client import Connection, Fate, Result
from scripts.reliability.shim import Mode, Shim
from scripts.reliability.slopes import Tolerance, growth

from engines import start_engine
from routers import free_port


def question() -> Question:
    questions = Questions(random.Random(2), 20, (4, 6))
    while True:
        found = questions.next()
        if found.path == "/v1/completions" and not found.streamed:
            return found


def answer(text: str, more: str = "") -> bytes:
    body = f'{{"id": "1", "choices": [{{"text": "{text}", "finish_reason": "length"}}]}}'
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n{more}\r\n{body}".encode()


@contextlib.asynccontextmanager
async def server(said: bytes) -> AsyncIterator[int]:
    """Yield the port of a server that sends this for each request; b"": it closes. It has ended after the block."""
    ended: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            while said and await reader.read(65536):
                writer.write(said)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield listener.sockets[0].getsockname()[1]
    await asyncio.gather(*filter(None, ended))
    listener.close()
    await listener.wait_closed()


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Connection]:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    yield connection
    connection.transport.close()
    await asyncio.sleep(0)


async def asked(said: bytes, *, leave: float = 0.0, times: int = 1) -> list[Result]:
    """Return what the client reports of a server that sends this."""
    async with server(said) as port, client(port) as connection:
        return [await connection.ask(question(), close=False, leave=leave) for _ in range(times)]


RIGHT = answer(question().text)


@pytest.mark.parametrize(
    ("said", "fate", "reason"),
    [
        (RIGHT, Fate.ANSWERED, ""),
        (RIGHT + RIGHT, Fate.WRONG, "a second answer"),
        (RIGHT + b"x", Fate.WRONG, "a second answer"),
        (answer("something else"), Fate.WRONG, DIFFERENT),
        (b"not HTTP at all\r\n", Fate.WRONG, "not HTTP"),
        (b"", Fate.LOST, "on a new connection"),
        (b"HTTP/1.1 503 No\r\nx-smg-error-code: busy\r\ncontent-length: 0\r\n\r\n", Fate.FAILED, "busy"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", Fate.FAILED, "http_500"),
    ],
)
def test_fates(said: bytes, fate: Fate, reason: str) -> None:
    (result,) = asyncio.run(asked(said))
    assert result.fate is fate
    assert result.reason.startswith(reason)


def test_a_kept_connection_is_used_again() -> None:
    first, second = asyncio.run(asked(RIGHT, times=2))
    assert (first.fate, second.fate) == (Fate.ANSWERED, Fate.ANSWERED)


def test_leaving() -> None:
    (result,) = asyncio.run(asked(b"HTTP/1.1 200 OK\r\n", leave=0.01))
    assert result.fate is Fate.LEFT


@pytest.mark.parametrize(
    ("mode", "fate"),
    [("pass", Fate.ANSWERED), ("slow", Fate.ANSWERED), ("reset", Fate.LOST), ("hole", Fate.LEFT)],
)
def test_networks(mode: Mode, fate: Fate) -> None:
    async def through_the_shim() -> Result:
        async with server(RIGHT) as port:
            shim = Shim(free_port(), port, delay=0.01)
            await shim.start()
            await shim.set(mode)
            async with client(shim.port) as connection:
                result = await connection.ask(question(), close=False, leave=0.3 if mode == "hole" else 0.0)
            await shim.stop()
            return result

    assert asyncio.run(through_the_shim()).fate is fate


def test_a_network_that_refuses_comes_back() -> None:
    async def refuse() -> list[bool]:
        shim = Shim(free_port(), free_port())
        await shim.start()
        told = []
        modes: tuple[Mode, ...] = ("refuse", "pass")
        for mode in modes:
            await shim.set(mode)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", shim.port)
            except ConnectionRefusedError:
                told.append(False)
            else:
                told.append(True)
                writer.close()
                await writer.wait_closed()
        await shim.stop()
        return told

    assert asyncio.run(refuse()) == [False, True]


def test_growth() -> None:
    assert growth([]) == growth([5.0]) == 0.0
    assert growth([7.0] * 9) == 0.0
    assert growth([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.0)
    assert growth([10.0, 0.0, 10.0, 0.0, 10.0]) == pytest.approx(0.0)
    assert Tolerance("x", share=0.1, least=2.0).of([10.0, 30.0]) == 2.0
    assert Tolerance("x", share=0.5, least=2.0).of([10.0, 30.0]) == 10.0


def test_case_27_what_is_being_started_ends_with_an_interrupt() -> None:
    """Ctrl-C while an engine was being started left it running: nobody knew the process yet."""
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)  # an engine takes longer to start
    try:
        with pytest.raises(KeyboardInterrupt):
            start_engine()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert not [pid for pid in children if b"sglang_router.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()]
