"""An engine's publisher of KV events, over real ZeroMQ sockets on the test's own event loop.

publisher = Publisher()
await publisher.start()                    # publisher.published: where
await publisher.publish(stored([1, 2], None, [7] * 8, 4))
await publisher.publish(..., lost=True)    # it goes to the replay buffer only
await publisher.stop()                     # and start() again: another process, whose numbers begin anew
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from sglang_router.workers.kv_sources import Published

END = (-1).to_bytes(8, "big", signed=True)


def stored(hashes: list[Any], parent: Any, tokens: list[int], size: int, **more: Any) -> dict[str, Any]:
    """Return an event as SGLang 0.5.23 and vLLM 0.32 write it."""
    assert len(tokens) == len(hashes) * size
    names = {"block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": size}
    return {"type": "BlockStored", **names, "lora_id": None, "medium": "GPU", "lora_name": None, **more}


def removed(hashes: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}
_ROWS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


def as_row(event: dict[str, Any]) -> list[Any]:
    """Return the event as older engines write it."""
    return [event["type"], *(event[name] for name in _ROWS[event["type"]])]


class Publisher:
    """See the module.

    rows        events are arrays
    replays     there is a replay socket; buffer: batches that it keeps
    hangs       the replay socket does not answer
    asked       the start numbers of the replays it was asked for
    subscribed  somebody gets what is published; before, only replays tell of it
    """

    def __init__(self, *, rows: bool = False, replays: bool = True, buffer: int = 10_000, topic: str = "") -> None:
        self.rows = rows
        self.replays = replays
        self.topic = topic
        self.hangs = False
        self.subscribed = False
        self.asked: list[int] = []
        self.seq = 0
        self._ports = [0, 0]
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._context: zmq.asyncio.Context | None = None
        self._pub: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def published(self) -> Published:
        live, replay = (f"tcp://127.0.0.1:{port}" for port in self._ports)
        return Published(live, replay if self.replays else "", self.topic)

    async def start(self) -> None:
        self._context = context = zmq.asyncio.Context()
        self.seq = 0
        self._buffer.clear()
        self._pub, router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        for number, each in enumerate((self._pub, router)):
            each.bind(f"tcp://127.0.0.1:{self._ports[number] or '*'}")
            self._ports[number] = urlsplit(each.get_string(zmq.LAST_ENDPOINT)).port or 0
        self._tasks = [asyncio.create_task(work) for work in (self._serve(router), self._watch(self._pub))]

    async def _watch(self, pub: zmq.asyncio.Socket) -> None:
        """Read who comes and goes: an XPUB socket is a PUB socket that tells."""
        while True:
            self.subscribed = (await pub.recv()).startswith(b"\x01")

    async def _serve(self, router: zmq.asyncio.Socket) -> None:
        while True:
            client, empty, start = await router.recv_multipart()
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            if self.hangs:
                continue
            for seq, payload in list(self._buffer):
                if seq >= first:
                    await router.send_multipart([client, empty, seq.to_bytes(8, "big"), payload])
            await router.send_multipart([client, empty, END, b""])

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        """Publish a batch of events."""
        batch = [1.5, [as_row(event) for event in events] if self.rows else list(events), 0]
        await self.send(msgspec.msgpack.encode(batch), lost=lost)

    async def send(self, payload: bytes, *, lost: bool = False) -> None:
        """Publish a batch as it is."""
        self._buffer.append((self.seq, payload))
        if not lost:
            await self.send_frames(self.topic.encode(), self.seq.to_bytes(8, "big"), payload)
        self.seq += 1

    async def send_frames(self, *frames: bytes) -> None:
        """Publish a message that no engine would."""
        assert self._pub is not None
        await self._pub.send_multipart(frames)

    async def stop(self) -> None:
        if self._context is not None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._context.destroy(linger=0)
            self._context = None
            self.subscribed = False
