"""Requests at given times, whether or not earlier ones were answered (an open loop), and the result of each.

    answers = offer(url, schedule(rate=30, seconds=10, lot=random.Random(1)), patience=4)
    sum(answer.within(first=2) for answer in answers) / 10       # goodput: useful answers per second

In a closed loop each client waits for its answer before it sends the next request, so it slows down with the server and
never overloads it; users do not wait for each other. Each request has a connection of its own. A client leaves when its
patience is over, as people do, and does not retry: a refused request counts as refused.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

GROUPS = 8
_BEGINNINGS = [" ".join(random.Random(group).choices("abcdefgh", k=100)) for group in range(GROUPS)]
_DONE = b"data: [DONE]"


class Arrival(NamedTuple):
    """When a request is sent, in seconds from the start, and how many tokens it asks for."""

    at: float
    tokens: int


class Answer(NamedTuple):
    """The result of a request. Times in seconds from its start.

    at           when it was sent, in seconds from the start of the run
    status       0: none; the client left, or the connection broke
    code         the router's error code, or ""
    retry_after  as in the answer; "" without one
    first        the first token; 0.0 without one
    whole        the stream came to its end
    """

    at: float
    status: int = 0
    code: str = ""
    retry_after: str = ""
    first: float = 0.0
    whole: bool = False

    def within(self, first: float) -> bool:
        """Return whether it is useful: a complete answer that began in time."""
        return self.whole and self.first <= first


def schedule(
    rate: float, seconds: float, lot: random.Random | None = None, tokens: tuple[int, int] = (8, 24)
) -> list[Arrival]:
    """Return arrivals at this rate per second: a Poisson process drawn from `lot`, or evenly with equal lengths."""
    arrivals, at = [], 0.0
    while at < seconds:
        arrivals.append(Arrival(at, lot.randint(*tokens) if lot else sum(tokens) // 2))
        at += lot.expovariate(rate) if lot else 1 / rate
    return arrivals


def request(number: int, tokens: int) -> bytes:
    """Return a streamed completion: a prefix that one eighth of the requests share, then words that occur only once."""
    prompt = f"{_BEGINNINGS[number % GROUPS]} question {number} {random.Random(number).getrandbits(64):x}"
    body = {"model": "built-in", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def offer(url: str, arrivals: Sequence[Arrival], patience: float) -> list[Answer]:
    """Send each request at its time; return when all have ended."""

    async def run() -> list[Answer]:
        began = time.monotonic()
        asking = []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began + arrival.at - time.monotonic()))
            asking.append(asyncio.create_task(_ask(url, request(number, arrival.tokens), began, patience)))
        return list(await asyncio.gather(*asking))

    return uvloop.run(run())


def keep_busy(url: str, clients: int, seconds: float, patience: float) -> list[Answer]:
    """Run a closed loop: each client sends the next request when it was answered, until the time is over."""

    async def run() -> list[Answer]:
        began = time.monotonic()
        answers: list[Answer] = []

        async def client(number: int) -> None:
            lot = random.Random(number)
            while time.monotonic() < began + seconds:
                data = request(lot.getrandbits(32), lot.randint(8, 24))
                answers.append(await _ask(url, data, began, patience))

        await asyncio.gather(*map(client, range(clients)))
        return answers

    return uvloop.run(run())


async def _ask(url: str, data: bytes, start: float, patience: float) -> Answer:
    began = time.monotonic()
    try:
        answer = await asyncio.wait_for(_exchange(url, data, began), patience)
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):  # the client left, or the connection broke
        answer = Answer(0.0)
    return answer._replace(at=began - start)


async def _exchange(url: str, data: bytes, began: float) -> Answer:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        status, fields = int(head[9:12]), _fields(head)
        if status != 200:
            return Answer(0.0, status, fields.get("x-smg-error-code", ""), fields.get("retry-after", ""))
        last = await reader.read(1 << 16)
        first = time.monotonic() - began
        while more := await reader.read(1 << 16):
            last = (last + more)[-100:]
        whole = _DONE in last and last.endswith(b"0\r\n\r\n")
        return Answer(0.0, status, first=first, whole=whole)
    finally:
        writer.transport.abort()


def _fields(head: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in lines if name}
