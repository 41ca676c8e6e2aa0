"""The stream of KV events of one engine, over ZeroMQ. Imported only with --kv-events: it needs pyzmq.

    connected --> forget all --> replay from 0 --> live: batch after batch, each number one more than the last
                       ^                             |-- a number is missing --> replay from there; filled: go on
                       |                             |-- not filled, or the numbers begin anew
                       '-----------------------------'   (the replay buffer was too small, or the engine restarted)
    cut       --> the holder is not live: its worker's cache is estimated again; a new socket, from the beginning

While a replay is read, what is published waits in the socket, of which the queue is bounded; what does not fit there
is a gap later on. A stream without a replay address begins in the middle: its holder is not `whole`.

Each message is applied in pieces, and the event loop turns between two of them. So a flood of events takes what time
requests leave. No thread of Python's reads; ZeroMQ itself has one for its sockets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from sglang_router.routing.kv_blocks import Cleared, Holder, Removed, Stored
from sglang_router.routing.kv_index import KVIndex
from sglang_router.workers.kv_format import EventReader, batch_of, frames_of
from sglang_router.workers.kv_sources import Published

log = logging.getLogger("sglang_router.kv_events")

_PIECE = 256
"""Blocks that are applied in one turn of the event loop: 0.2 ms."""
_MOST_BYTES = 2 << 20
"""Bytes of a message; whoever sends a longer one is disconnected."""
_MOST_WAITING = 1024
"""Messages that wait in the socket."""
_MOST_REPLAYED = 1 << 14
"""The same of a replay; engines keep 10,000. They drop what does not fit."""
_REPLAY_WITHIN = 5.0
"""Seconds for each message of a replay."""
_RESYNC_EVERY = 1.0
"""Least seconds between two times that everything is learnt anew."""
_QUIET = 5.0
"""Seconds without a message after which the engine is asked for what was missed: else the next one would tell."""
_CONNECT_WITHIN = 10.0
_RECONNECT = 0.5
_HEARTBEAT, _SILENT = 5.0, 15.0
"""Seconds between two questions whether the engine is there, and without an answer after which it is not."""


class KVStream:
    """See the module.

    url      the worker's, for the log
    emptied  called when the cache was cleared now, not before the stream was followed
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        published: Published,
        index: KVIndex,
        holder: Holder,
        url: str,
        emptied: Callable[[], None],
    ) -> None:
        self._context = context
        self._published = published
        self._index = index
        self._holder = holder
        self._url = url
        self._emptied = emptied
        self._reader = EventReader()
        self._next: int | None = None  # number of the next batch; None: whatever comes
        self._whole = False
        self._replays = bool(published.replay)  # False once it did not answer, until the next connection
        self._work = 0  # blocks applied in this turn
        self._warned = ""  # of what, since events were followed

    def __repr__(self) -> str:
        return f"<KVStream {self._published.endpoint}, next {self._next}, {self._holder!r}>"

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        while True:
            subscriber = self._socket(zmq.SUB, _MOST_WAITING)
            monitor = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            try:
                self._replays = bool(self._published.replay)
                subscriber.setsockopt(zmq.SUBSCRIBE, self._published.topic.encode())
                subscriber.connect(self._published.endpoint)
                await asyncio.wait_for(_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED), _CONNECT_WITHIN)
                await _first_of(self._follow(subscriber), _event(monitor, zmq.EVENT_DISCONNECTED))
                self._warn("the stream of KV events is cut: the cache is estimated")
            except asyncio.TimeoutError:
                self._warn("the stream of KV events cannot be reached: the cache is estimated")
            finally:
                self._index.settle(self._holder, live=False, whole=False)
                subscriber.disable_monitor()
                monitor.close(linger=0)
                subscriber.close(linger=0)
            await asyncio.sleep(_RECONNECT)

    def _socket(self, kind: int, most: int) -> zmq.asyncio.Socket:
        made = self._context.socket(kind)
        made.setsockopt(zmq.RCVHWM, most)
        made.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        made.setsockopt(zmq.IPV6, 1)
        made.setsockopt(zmq.HEARTBEAT_IVL, int(_HEARTBEAT * 1000))
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(_SILENT * 1000))
        made.setsockopt(zmq.LINGER, 0)
        return made

    def _fields(self) -> dict[str, Any]:
        return {"fields": {"worker": self._url, "endpoint": self._published.endpoint}}

    def _warn(self, what: str) -> None:
        """Log what is wrong, once in a row."""
        if what != self._warned:
            self._warned = what
            log.warning(what, extra=self._fields())

    # -- following -----------------------------------------------------------------------------------------------------

    async def _follow(self, subscriber: zmq.asyncio.Socket) -> None:
        await self._sync()
        self._warned = ""
        log.info("KV events are followed", extra=self._fields())
        last = -1
        while True:
            frames = await self._received(subscriber)
            if frames is None:
                await self._replay(self._next or 0)
                continue
            found = frames_of(frames)
            if found is None or found[0] < 0:
                self._missed()
                await self._turn(_PIECE)
                continue
            seq, payload = found
            if seq <= last:
                await self._resync("the engine's numbers begin anew")
            last = seq
            if self._next is not None and seq > self._next:
                self._holder.gaps += 1
                await self._replay(self._next)
                if seq > self._next:
                    await self._resync("a gap could not be filled")
            if self._next is None or seq > self._next:
                self._begin(seq)
            if seq == self._next:
                await self._apply(payload)
            await self._turn(1)

    async def _received(self, subscriber: zmq.asyncio.Socket) -> list[bytes] | None:
        """Return the next message; None when there is none for a while, and what came last may have been missed."""
        coming = asyncio.ensure_future(subscriber.recv_multipart())
        if coming.done() or not self._replays:
            return await coming
        try:
            return await asyncio.wait_for(coming, _QUIET)
        except asyncio.TimeoutError:
            return None

    async def _resync(self, why: str) -> None:
        """Learn everything anew."""
        self._holder.resyncs += 1
        log.warning("%s: KV events are learnt anew", why, extra=self._fields())
        self._index.settle(self._holder, live=False, whole=False)
        await asyncio.sleep(_RESYNC_EVERY)
        await self._sync()

    async def _sync(self) -> None:
        """Forget what the holder has, and learn what is replayed."""
        self._index.clear(self._holder)
        self._next, self._whole = None, False
        self._reader = EventReader()
        before: int | None = -1
        while self._replays and self._next != before:  # a replay may lose a part: ask for it
            before = self._next
            if await self._replay(before or 0):
                break
        self._index.settle(self._holder, live=True, whole=self._whole)

    def _begin(self, seq: int) -> None:
        """Take this number for the next one."""
        self._whole = seq == 0 and self._next is None
        self._next = seq
        if self._holder.live:
            self._index.settle(self._holder, live=True, whole=self._whole)

    async def _replay(self, start: int) -> bool:
        """Apply what the engine still has from a number on; return whether that was all."""
        if not self._replays:
            return False
        dealer = self._socket(zmq.DEALER, _MOST_REPLAYED)
        try:
            dealer.connect(self._published.replay)
            await dealer.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                found = frames_of(await asyncio.wait_for(dealer.recv_multipart(), _REPLAY_WITHIN))
                if found is None:
                    self._missed()
                    continue
                seq, payload = found
                if seq < 0:
                    if self._next is None:  # nothing was published yet
                        self._begin(0)
                    return True
                if self._next is None:
                    self._begin(seq)
                if seq > (self._next or 0):
                    return False
                if seq == self._next:
                    await self._apply(payload)
        except asyncio.TimeoutError:
            self._replays = False
            self._warn("the engine does not replay KV events")
            return False
        finally:
            dealer.close(linger=0)

    # -- events --------------------------------------------------------------------------------------------------------

    async def _apply(self, payload: bytes) -> None:
        """Apply the next batch."""
        self._next = (self._next or 0) + 1
        try:
            events = batch_of(payload)
        except ValueError:
            self._missed()
            return
        index, holder = self._index, self._holder
        for raw in events:
            try:
                event = self._reader.read(raw)
            except ValueError:
                self._missed()
                continue
            holder.events += 1
            if isinstance(event, Stored):
                done, count = 0, len(event.hashes)
                while done < count:
                    start, done = done, index.store(holder, event, done, _PIECE)
                    await self._turn(done - start)
            elif isinstance(event, Removed):
                for key in event.hashes:
                    index.remove(holder, key, event.tier)
                    await self._turn(1)
            elif isinstance(event, Cleared):
                news = holder.live and holder.blocks
                index.clear(holder)
                if news:
                    self._emptied()
                self._whole = True
                index.settle(holder, holder.live, whole=holder.live)
                await self._turn(_PIECE)

    def _missed(self) -> None:
        """Note that something could not be read: the cache may hold more than is known."""
        self._holder.unread += 1
        self._whole = False
        self._index.settle(self._holder, self._holder.live, whole=False)

    async def _turn(self, work: int) -> None:
        """Let the event loop turn when enough was done."""
        self._work += work
        if self._work >= _PIECE:
            self._work = 0
            await asyncio.sleep(0)


async def _event(monitor: zmq.asyncio.Socket, wanted: int) -> None:
    """Wait for an event of a socket's connection."""
    while (await recv_monitor_message(monitor))["event"] != wanted:
        pass


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Wait for the first of some works to end, and cancel the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class KVStreams:
    """Makes streams, which share a context of ZeroMQ."""

    def __init__(self) -> None:
        self._context: zmq.asyncio.Context | None = None

    def follow(
        self, published: Published, index: KVIndex, holder: Holder, url: str, emptied: Callable[[], None]
    ) -> Coroutine[Any, Any, None]:
        """Return what follows a stream until it is cancelled. Called on the event loop."""
        if self._context is None:
            self._context = zmq.asyncio.Context()
        return KVStream(self._context, published, index, holder, url, emptied).run()

    def close(self) -> None:
        """Free the context, when no stream is followed any more."""
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None
