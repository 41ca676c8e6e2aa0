"""Measure how long large bodies hold up the event loop and other clients.

    sender: large bodies, one after the other ────────> router ──> worker, which reads all and answers
    another client: small requests, one after the other ──┘

Each is a process of its own. In the router a function that calls itself in each turn of the loop reads two clocks: the
CPU time of the thread, which does not count what other programs take of a busy machine, and the wall clock. The longest
turn is the longest time for which the loop served nobody else.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from scripts.reporting import table

from sglang_router.relay.memory import keep_apart
from stack import Stack, stack

PATH = "/v1/chat/completions"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
SMALL = b'{"model":"m","messages":[{"role":"user","content":"How are you?"}]}'
PAUSE = 0.001
"""Seconds between two small requests."""
MOST_CPU = 5.0
"""Milliseconds of CPU time that a turn of the loop may take."""
HEAD = ("body", "MB", "turn CPU ms", "turn wall ms", "small p50 ms", "p99 ms", "max ms", "s a body")


def filled(unit: bytes, size: int) -> bytes:
    """Return about so many bytes of repeated text."""
    return unit * (size // len(unit))


def chat(content: bytes) -> bytes:
    """Return a chat request with one message."""
    return b'{"model":"m","messages":[{"role":"user","content":' + content + b"}]}"


MESSAGE = b'{"role":"user","content":"The quick brown fox jumps over the lazy dog, again and again and again."},'
KINDS: dict[str, Callable[[int], bytes]] = {
    "text": lambda size: chat(b'"' + filled(b"The quick brown fox jumps over the lazy dog. ", size) + b'"'),
    "chat": lambda size: b'{"model":"m","messages":[' + filled(MESSAGE, size)[:-1] + b"]}",
    "image": lambda size: chat(b'[{"type":"image_url","image_url":{"url":"' + filled(b"iVBORw0KGgo", size) + b'"}}]'),
    "ids": lambda size: b'{"model":"m","messages":[' + filled(b"12345, 671, ", size) + b"1]}",
    "escapes": lambda size: chat(b'"' + filled(rb"say \"hello\"\n\u00e9\\ ", size) + b'"'),
    "unread": lambda size: b'{"unread":"' + filled(b"abcdefgh", size) + b'",' + SMALL[1:],
    "nested": lambda size: b'{"unread":[' + filled(b"[[[1,[2]],[]]],", size) + b"1]," + SMALL[1:],
    "space": lambda size: b" " * size + SMALL,
    "not JSON": lambda size: b"{" + filled(b"abcdefgh", size),
}


class Turns:
    """Watches the turns of the router's loop. cpu, wall: seconds of the longest one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.cpu = self.wall = 0.0
        self._loop = loop
        self._runs = False
        self._last = (0.0, 0.0)

    def begin(self) -> None:
        """Watch from now on."""
        self.cpu = self.wall = 0.0
        self._runs = True
        self._last = (time.thread_time(), time.perf_counter())
        self._loop.call_soon(self._turn)

    def end(self) -> tuple[float, float]:
        """Watch no more; return the milliseconds of the longest turn, of CPU time and of the wall clock."""
        self._runs = False
        return 1000 * self.cpu, 1000 * self.wall

    def _turn(self) -> None:
        now = (time.thread_time(), time.perf_counter())
        self.cpu = max(self.cpu, now[0] - self._last[0])
        self.wall = max(self.wall, now[1] - self._last[1])
        self._last = now
        if self._runs:
            self._loop.call_soon(self._turn)


# -- the other processes -----------------------------------------------------------------------------------------------


def work(listener: socket.socket) -> None:
    """Be a worker: read each request whole and answer it."""
    while True:
        connection = listener.accept()[0]
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return
            data += more
        head, _, data = data.partition(b"\r\n\r\n")
        lengths = [line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
        left = (int(lengths[0]) if lengths else 0) - len(data)
        while left > 0:
            left -= connection.recv_into(buffer, min(left, len(buffer)))
        data = b""
        connection.sendall(ANSWER)


def post(body: bytes) -> bytes:
    """Return a request."""
    return f"POST {PATH} HTTP/1.1\r\nhost: r\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def ask(connection: socket.socket, request: bytes) -> None:
    """Send a request and read its answer, which comes in one piece."""
    connection.sendall(request)
    if not connection.recv(65536):
        raise ConnectionError("The router closed the connection.")


def send(orders: Connection) -> None:
    """Send large bodies: (port, kind, bytes, times) -> seconds a body."""
    while True:
        port, kind, size, times = orders.recv()
        request = post(KINDS[kind](size))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            orders.send("ready")
            begin = time.perf_counter()
            for _ in range(times):
                ask(connection, request)
            orders.send((time.perf_counter() - begin) / times)


def probe(orders: Connection) -> None:
    """Be the other client: port -> the milliseconds of each small request, until anything else is received."""
    request = post(SMALL)
    while True:
        port = orders.recv()
        took: list[float] = []
        with socket.create_connection(("127.0.0.1", port)) as connection:
            ask(connection, request)
            orders.send("ready")
            while not orders.poll(PAUSE):
                begin = time.perf_counter()
                ask(connection, request)
                took.append(1000 * (time.perf_counter() - begin))
        orders.recv()
        orders.send(sorted(took))


# -- the measurement ---------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One row. Times in milliseconds, but for the last: seconds a body."""

    kind: str
    size: int
    cpu: float
    wall: float
    p50: float
    p99: float
    most: float
    seconds: float


def measure(router: Stack, sender: Connection, other: Connection, kind: str, size: int, times: int) -> Measured:
    """Send bodies of one kind and size."""
    turns = router.call(lambda: Turns(router.loop))
    other.send(router.port)
    other.recv()
    sender.send((router.port, kind, size, times))
    sender.recv()
    router.call(turns.begin)
    seconds = sender.recv()
    cpu, wall = router.call(turns.end)
    other.send("enough")
    took = other.recv()
    return Measured(kind, size, cpu, wall, took[len(took) // 2], took[len(took) * 99 // 100], took[-1], seconds)


def main() -> int:
    """Measure and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[10, 50], metavar="MB")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=5, help="bodies of each kind and size")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/performance.md")
    args = parser.parse_args()

    fork = multiprocessing.get_context("fork")
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    sender, theirs = fork.Pipe()
    other, others = fork.Pipe()
    for process in (
        fork.Process(target=work, args=(listener,), daemon=True),
        fork.Process(target=send, args=(theirs,), daemon=True),
        fork.Process(target=probe, args=(others,), daemon=True),
    ):
        process.start()
    keep_apart()  # as `app.lifecycle` does
    rows = []
    with stack(f"http://127.0.0.1:{listener.getsockname()[1]}") as router:
        for size in args.size:
            for kind in args.kind:
                rows.append(measure(router, sender, other, kind, size * 1_000_000, args.times))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    cells = [(row.kind, str(row.size // 1_000_000), *(f"{value:.2f}" for value in row[2:])) for row in rows]
    print(table(HEAD, cells, args.markdown))
    return int(any(row.cpu > MOST_CPU for row in rows))


if __name__ == "__main__":
    sys.exit(main())
