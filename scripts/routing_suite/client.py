"""Plays a script against a router, in real time: each request on a connection of its own.

Chains begin at their moments, whatever the router does: an open loop. A request that fails ends its chain.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import cast

from scripts.routing_suite.answers import Answer, read
from scripts.routing_suite.figures import Sent
from scripts.routing_suite.scripted import Chain, Turn

PATIENCE = 90.0
"""Seconds for one answer."""


class Exchange(asyncio.Protocol):
    """One request and its response. begun: when its first token came; negative: it did not."""

    def __init__(self, request: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begun = -1.0
        self._request = request
        self._pieces: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        if self.begun < 0 and b"data: {" in (data if len(self._pieces) == 1 else self.raw):
            self.begun = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def raw(self) -> bytes:
        """What came so far."""
        return b"".join(self._pieces)

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()


def request(port: int, prompt: str, output: int, session: str) -> bytes:
    """Return the bytes of a request."""
    fields = {"model": "built-in", "prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(fields, separators=(",", ":")).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", "Connection: close", *([f"x-smg-routing-key: {session}"] * bool(session))]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Player:
    """Plays a script against one router, or several in turn, by their ports. sent: what became of each request, in the
    order of their moments."""

    def __init__(self, *ports: int) -> None:
        self.sent: list[Sent] = []
        self._ports = itertools.cycle(ports)

    async def play(self, chains: list[Chain]) -> None:
        """Send all requests, and wait for all answers."""
        start = time.monotonic()
        await asyncio.gather(*(self._chain(chain, start) for chain in chains))

    async def _chain(self, chain: Chain, start: float) -> None:
        moment, prompt = start, ""
        for turn in chain.turns:
            moment += turn.pause
            prompt += turn.text
            await asyncio.sleep(moment - time.monotonic())
            sent, answer = await self._one(turn, prompt, chain.session, moment)
            self.sent.append(sent)
            if answer.error:
                return
            prompt += answer.text
            moment = sent.end

    async def _one(self, turn: Turn, prompt: str, session: str, moment: float) -> tuple[Sent, Answer]:
        """Send one request; its times count from its moment, which is not later than when it is really sent."""
        sent_at = time.monotonic()
        port = next(self._ports)
        exchange = Exchange(request(port, prompt, turn.output, session))
        try:
            await asyncio.get_running_loop().create_connection(lambda: exchange, "127.0.0.1", port)
            await asyncio.wait_for(exchange.ended, PATIENCE)
        except asyncio.TimeoutError:
            answer = Answer(f"no answer in {PATIENCE:.0f} s")
        except OSError as error:
            answer = Answer(f"connection failed: {error.strerror}")
        else:
            answer = read(exchange.raw, turn.output)
        finally:
            exchange.close()
        return Sent(moment, sent_at, exchange.begun, time.monotonic(), answer), answer
